"""Each disease has its own name, from rows that show it; a run of the demo shows none."""
import json
import logging
import math
import re

import numpy as np
import pytest

from configs import unimiss_plus
from tests.e2e import tiny
from unimiss_jax import health, sharding, train
from unimiss_jax.methods import base

HEALTHY = {'train/loss': 2., 'train/grad_norm': 1., 'train/update_norm_rest': .01, 'train/lr': 1e-3, 'train/skipped': 0,
           'train/momentum': .996, 'data/flat_views': 0., 'data/wait_frac': .01, 'collapse/teacher_entropy': 3.,
           'collapse/batch_entropy': 3.5, 'collapse/feature_std': .3, 'collapse/rankme': 5., 'train/nce_loss': 1.,
           'train/pair_nce_loss': .8}
K = 256
CHANCE = {'ct': {'train/nce_loss': math.log(15), 'train/pair_nce_loss': math.log(8)}}
DISEASES = {
    'not finite': {'train/skipped': 1, 'train/loss': None, 'train/grad_norm': None},
    'empty views': {'data/flat_views': .9},
    'frozen student': {'train/update_norm_rest': 0., 'train/update_norm_3d': .1},
    'frozen teacher': {'train/momentum': 1.},
    'uniform teacher': {'collapse/teacher_entropy': math.log(K) - .001, 'collapse/batch_entropy': math.log(K)},
    'one prototype': {'collapse/teacher_entropy': .01, 'collapse/batch_entropy': .02},
    'dead features': {'collapse/feature_std': 1e-5, 'collapse/rankme': 1.},
    'exploding gradient': {'train/grad_norm': 1e3},
    'pairs do not match': {'train/pair_nce_loss': 2.1},
    'data starvation': {'data/wait_frac': .6},
}


@pytest.fixture(scope='module')
def config():
  c = unimiss_plus.get_config('phantom')
  c.unlock()
  c.head.out_dim, c.steps = K, 1000
  return c


def rows(n=20, sick=None, ill=health.LAST, **more):
  """n rows of a healthy run, of which the last `ill` have the values of `sick`."""
  out = [{'step': 20 * i, 'phase': 'ct'} | HEALTHY | more for i in range(n)]
  return [r | (sick if i >= n - ill else {}) for i, r in enumerate(out)] if sick else out


def names(found):
  return [f.disease for f in found]


def test_a_healthy_run(config):
  found = health.findings(rows(), config, CHANCE)
  assert not found
  assert health.line(400, found, rows()) == 'HEALTH step 400: healthy (entropy 3, rankme 5, feature std 0.3)'


@pytest.mark.parametrize('disease', DISEASES)
def test_a_disease_has_its_name_evidence_and_remedy(disease, config):
  found = health.findings(rows(sick=DISEASES[disease]), config, CHANCE)
  assert names(found) == [disease]
  told = health.line(400, found, rows())
  assert told.startswith(f'HEALTH step 400: {disease}: ct: ') and '. FIX: ' in told


def test_a_run_measured_in_epochs_is_judged_by_the_share_that_is_over(config):
  c = config.copy_and_resolve_references()
  c.steps, c.epochs = 0, 10
  of = lambda disease, done: names(health.findings(rows(sick=DISEASES[disease], **{health.DONE: done}), c, CHANCE))
  assert of('frozen teacher', .5) == ['frozen teacher'] and not of('frozen teacher', 1.)
  assert of('pairs do not match', .5) == ['pairs do not match'] and not of('pairs do not match', .01)


def test_xrays_of_steps_that_see_both_are_judged(config):
  sick = {k.replace('/', '/xray_', 1): v for k, v in DISEASES['dead features'].items()}
  found = health.findings(rows(sick=sick), config, CHANCE)
  assert names(found) == ['dead features'] and found[0].evidence.startswith('ct, X-rays: ')


@pytest.mark.parametrize('disease', [d for d in DISEASES if d != 'not finite'])
def test_one_odd_row_is_no_disease(disease, config):
  assert not health.findings(rows(sick=DISEASES[disease], ill=1), config, CHANCE)


def test_levels_come_from_the_config(config):
  """The entropy that is uniform among 256 prototypes is not among 65,536."""
  wide = config.copy_and_resolve_references()
  wide.head.out_dim = 65536
  assert not health.findings(rows(sick=DISEASES['uniform teacher']), wide, CHANCE)


def test_losses_may_stand_at_chance_at_first_and_the_teacher_still_at_the_end(config):
  assert not health.findings(rows(4, sick=DISEASES['pairs do not match']), config, CHANCE)
  assert not health.findings(rows(51, sick=DISEASES['frozen teacher']), config, CHANCE)


def test_causes_come_before_effects(config):
  found = health.findings(rows(sick=DISEASES['data starvation'] | DISEASES['dead features'] | DISEASES['empty views']),
                          config, CHANCE)
  assert names(found) == ['empty views', 'dead features', 'data starvation']
  assert health.line(1, found, []).endswith('(and: dead features, data starvation)')


# Of a run that collapsed (pilot, 2,048 prototypes, rate 4e-3, step 31 to 51 of 200), and of one that did not although
# its embeddings share much (phantom_long, 4,000 steps, seed 0).
SIGNS = 'collapse/teacher_entropy', 'collapse/batch_entropy', 'collapse/rankme', 'collapse/feature_std'
COLLAPSED = [dict(zip(SIGNS, v)) for v in (
    (.516, .517, 1.29, .0189), (.472, .473, 1.22, .0142), (.249, .249, 1.16, .00994))]
ALIKE = {'collapse/rankme': 1.38, 'collapse/feature_std': .0215, 'train/nce_loss': .27, 'train/pair_nce_loss': .307}


def test_a_run_that_has_nearly_collapsed_is_told(config):
  """Before its numbers reach 0: the teacher says the same of all samples, and no loss tells them apart."""
  config = config.copy_and_resolve_references()
  config.head.out_dim = 2048
  old = [{k: v for k, v in r.items() if 'nce' not in k} for r in rows()]
  found = health.findings(old[:-3] + [r | sick for r, sick in zip(old[-3:], COLLAPSED)], config, {'ct': {}})
  assert names(found) == ['one prototype', 'dead features']
  assert 'entropy 0.249, of the mean over a batch 0.249' in found[0].evidence
  young = [r | sick for r, sick in zip(old[:3], COLLAPSED)]
  assert not health.findings(young, config, {'ct': {}})      # step 40 of 1,000


def test_embeddings_that_share_much_are_healthy_where_a_loss_tells_them_apart(config):
  assert not health.findings(rows(sick=ALIKE), config, CHANCE)
  blind = ALIKE | {k: .95 * v for k, v in CHANCE['ct'].items()}
  assert not health.findings(rows(sick=blind), config, CHANCE)      # the teacher tells them apart
  found = health.findings(rows(sick=blind | {'collapse/batch_entropy': 3.1}), config, CHANCE)
  assert names(found) == ['dead features']


def test_a_disease_of_both_phases_is_named_once(config):
  sick = rows(sick=DISEASES['pairs do not match'] | {'train/nce_loss': 2.7})
  found = health.findings([*sick, *(r | {'phase': 'xray'} for r in sick)], config, CHANCE | {'xray': CHANCE['ct']})
  assert names(found) == ['pairs do not match'] * 4
  assert '(and' not in health.line(400, found, sick)


# ---- provoked


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
    ({'views.xray.brightness': 0., 'views.xray.gamma': (60., 60.), 'views.xray.gamma_p': (1., 1.), 'phases.ct': 0},
     'empty views'),
    ({'loss.shuffle_pairs': True, 'steps': 60, 'log.health_every': 60}, 'pairs do not match'),
], ids=['momentum', 'gamma', 'shuffled'])
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


def test_metrics_of_the_method(config):
  """The names that the verdict reads are those that the method writes."""
  assert set(CHANCE['ct']) <= set(base.make(config, {'ct': (96, {}), 'xray': (96, {})}).phases['ct'].chance)
