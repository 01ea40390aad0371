"""Diseases provoked by real runs of the train loop on tiny phantoms, each named by its verdict; a healthy demo."""
import itertools
import json
import logging
import re
import time

import numpy as np
import pytest

from configs import unimiss_plus
from tests.e2e import tiny
from tests.methods import test_joint
from unimiss_jax import sharding, train

XRAY = {'loss.recon_xray': 0., 'phases.ct': 0}      # X-rays alone, nothing is rebuilt: both compile quickly
CONTRAST = XRAY | {'loss.xray': 0., 'steps': 100, 'log.health_every': 20}
DISTIL = XRAY | {'loss.nce': 0., 'steps': 80, 'log.health_every': 20, 'seed': 1, 'optim.lr': 1e-3,
                        'ema.momentum': .9}
REBUILD = {'phases.ct': 0, 'loss.xray': 0., 'loss.nce': 0., 'steps': 24, 'log.health_every': 24}
RELEASED = {'model.final_norm': False, 'model.init': 'released', 'model.conv_residual': False, 'model.last_stride': 2,
            'head.batch_standardize': False}


def verdicts(caplog):
  return [r.message for r in caplog.records if r.message.startswith('HEALTH')]


def run(folder, caplog, **leaves):
  caplog.set_level(logging.INFO)
  assert train.train_and_evaluate(tiny.config(**({'log.health_every': 8, 'eval.tasks': ()} | leaves)), str(folder)) == 0
  return verdicts(caplog)[-1]


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
], ids=['momentum', 'crop'])
def test_provoked_diseases(leaves, disease, tmp_path, caplog):
  assert disease in run(tmp_path, caplog, **leaves)


@pytest.mark.slow
@pytest.mark.parametrize('leaves', [CONTRAST, DISTIL], ids=['contrast', 'distil'])
def test_the_runs_below_are_healthy_where_nothing_is_provoked(leaves, tmp_path, caplog):
  run(tmp_path, caplog, **leaves)
  told = verdicts(caplog)
  assert len(told) == leaves['steps'] // 20 and all('healthy' in t for t in told), told


@pytest.mark.slow
@pytest.mark.parametrize('leaves, disease', [
    (DISTIL | {'loss.teacher_temp': 10., 'loss.warmup_teacher_temp': 10.}, 'uniform teacher'),
    (DISTIL | {'loss.center_momentum': 1.}, 'one prototype'),
    (CONTRAST | RELEASED, 'dead features'),
    (CONTRAST | RELEASED | {'optim.weight_decay': 100., 'optim.weight_decay_end': 100.}, 'dead features'),
    (CONTRAST | {'loss.shuffle_pairs': True}, 'pairs do not match'),
], ids=['temperature', 'center', 'trunk', 'decay', 'shuffled'])
def test_what_is_provoked_is_named_first(leaves, disease, tmp_path, caplog):
  told = run(tmp_path, caplog, **leaves)
  assert told.startswith(f'HEALTH step {leaves["steps"]}: {disease}: xray: '), told


@pytest.mark.slow
@pytest.mark.parametrize('standardize, told', [(True, 'healthy'), (False, 'clusters at chance: intra: ')])
def test_codes_of_projections_that_are_not_standardised(standardize, told, tmp_path, caplog):
  caplog.set_level(logging.INFO)
  c = tiny.changed(test_joint.tiny('swav2d'), {
      'head.batch_standardize': standardize, 'steps': 120, 'data.phantom_records': 32, 'batch.xray': 8, 'log.every': 1,
      'log.health_every': 20, 'eval.tasks': ()})
  assert train.train_and_evaluate(c, str(tmp_path)) == 0
  late = verdicts(caplog)[-2:]
  assert all(told in t for t in late), late


@pytest.mark.slow
def test_data_that_come_late(tmp_path, caplog, monkeypatch):
  give = sharding.to_devices

  def late(batch, mesh):
    time.sleep(.6)
    return give(batch, mesh)
  monkeypatch.setattr(sharding, 'to_devices', late)
  told = run(tmp_path, caplog, **CONTRAST)
  assert told.startswith('HEALTH step 100: data starvation: xray: '), told


@pytest.mark.slow
def test_xrays_of_another_range_make_the_gradient_explode(tmp_path, caplog, monkeypatch):
  """After 16 steps come radiographs a thousand times as bright, as from a folder in other units."""
  give, come = sharding.to_devices, itertools.count()

  def bright(batch, mesh):
    rows = batch['xray']
    return give({'xray': rows | {'xray': rows['xray'] * (1e3 if next(come) >= 16 else 1)}}, mesh)
  monkeypatch.setattr(sharding, 'to_devices', bright)
  told = run(tmp_path, caplog, **REBUILD)
  assert told.startswith('HEALTH step 24: exploding gradient: xray: '), told


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
