"""Diseases provoked by real runs of the train loop on tiny phantoms, each named by its verdict; a healthy demo."""
import json
import logging
import re

import numpy as np
import pytest

from configs import unimiss_plus
from tests.e2e import tiny
from unimiss_jax import sharding, train


def verdict(caplog):
  return next(r.message for r in reversed(caplog.records) if r.message.startswith('HEALTH'))


def run(folder, caplog, **leaves):
  caplog.set_level(logging.INFO)
  assert train.train_and_evaluate(tiny.config(**({'log.health_every': 8, 'eval.tasks': ()} | leaves)), str(folder)) == 0
  return verdict(caplog)


@pytest.mark.slow
def test_a_student_that_does_not_learn(tmp_path, caplog):
  assert 'HEALTH step 8: frozen student' in run(tmp_path, caplog, **{'optim.lr': 0., 'optim.min_lr': 0.})


@pytest.mark.slow
def test_a_broken_record_is_named_and_its_batch_kept(tmp_path, caplog, monkeypatch):
  """One voxel of one X-ray is no number."""
  give = sharding.to_devices

  def broken(batch, mesh):
    if 'xray' in batch:
      x = batch['xray']['xray'] = batch['xray']['xray'].copy()
      x[3, 0, 5, 5] = np.nan
    return give(batch, mesh)
  monkeypatch.setattr(sharding, 'to_devices', broken)
  told = run(tmp_path, caplog, **{'optim.max_skipped': 99})
  assert 'HEALTH step 8: not finite: xray' in told
  said = [r.message for r in caplog.records if 'step skipped' in r.message]
  kept = sorted((tmp_path / 'nan').glob('*.npz'), key=lambda p: int(p.stem))
  assert [p.stem for p in kept] == ['1', '3', '5', '7'] and len(said) == 4
  with np.load(kept[0]) as batch:
    assert np.isnan(batch['xray/xray'][3, 0, 5, 5]).all() and batch['xray/id'].shape == (8,)
    assert f'xray: records that are not finite themselves {batch["xray/id"][3]}; batch in nan/1.npz' in said[0]
  assert re.search(r'not finite: dino_loss.*; \d+ of \d+ gradients are not, one is that of backbone/', said[0])
  row = next(r for r in map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines()) if r['step'] == 1)
  assert row['train/skipped'] == 1 and 'train/bad_tensor' not in row


@pytest.mark.slow
@pytest.mark.parametrize('leaves, disease', [
    ({'ema.momentum': 1.}, 'frozen teacher'),
    ({'views.xray.scale': (5e-5, 5e-5), 'views.xray.noise_std': (0., 0.), 'phases.ct': 0}, 'empty views'),    # a pixel
    ({'loss.shuffle_pairs': True, 'steps': 60, 'log.health_every': 60}, 'pairs do not match'),
], ids=['momentum', 'crop', 'shuffled'])
def test_provoked_diseases(leaves, disease, tmp_path, caplog):
  assert disease in run(tmp_path, caplog, **leaves)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_the_demo_is_healthy(seed, tmp_path, caplog):
  c = unimiss_plus.get_config('phantom')
  c.unlock()
  c.seed, c.steps, c.eval.tasks = seed, 380, ()
  caplog.set_level(logging.INFO)
  assert train.train_and_evaluate(c, str(tmp_path)) == 0
  told = [r.message for r in caplog.records if r.message.startswith('HEALTH')]
  assert len(told) == 2 and all('healthy' in t for t in told), told
