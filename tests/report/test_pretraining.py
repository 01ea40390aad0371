"""The table of an ablation, from metrics written by hand; scipy says what means and intervals are."""
import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from unimiss_jax.report import pretraining, results

LEAVES = {'base': {}, 'no_drr': {'loss.drr': 0.}, 'no_xray': {'phases.xray': 0}}
VALUES = {('base', s): .7 + .01 * s * s for s in range(3)} | {('no_drr', s): .66 + .02 * s for s in range(3)} | {
    ('no_xray', s): .5 + .1 * s for s in range(3)}


def finish(folder, row, seed, config=None, **last):
  run = results.place(folder, row, 1., seed)
  run.mkdir(parents=True)
  knn = VALUES[row, seed]
  first = {'step': 0, 'phase': 'eval', 'eval/knn_auc_ct': .55 + .01 * seed, 'eval/raw_knn_auc_ct': .6,
           'eval/drr_to_ct_r10': .05, 'eval/raw_drr_to_ct_r10': 1.}
  done = {'step': 40, 'phase': 'eval', 'eval/knn_auc_ct': knn, 'eval/drr_to_ct_r10': knn - .1,
          'perf/seconds': 60. + seed, 'perf/cpu_seconds': 50.}
  rows = [first, {'step': 39, 'phase': 'ct', 'train/loss': 1.}, done | last]
  (run / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  leaves = {'loss': {'drr': 0. if row == 'no_drr' else .5}, 'phases': {'xray': int(row != 'no_xray')}, 'seed': seed,
            'eval': {'records': 500, 'fit': 300, 'knn': ''}}
  (run / 'config.json').write_text(json.dumps(leaves | (config or {})))
  (run / 'DONE').write_text('"hash"')
  return run


@pytest.fixture
def grid(tmp_path):
  for row, seed in VALUES:
    finish(tmp_path, row, seed)
  return tmp_path


def lines(folder):
  return list(csv.DictReader((folder / 'results.csv').read_text().splitlines()))


def test_means_differences_and_controls(grid):
  shown = pretraining.write(grid, 'toy', LEAVES, 'base')
  row = next(r for r in lines(grid) if r['row'] == 'no_drr' and r['score'] == 'knn_auc_ct')
  mine, base = ([VALUES[name, s] for s in range(3)] for name in ('no_drr', 'base'))
  want = stats.ttest_rel(mine, base).confidence_interval(.95)
  np.testing.assert_allclose([float(row[k]) for k in ('mean', 'sd', 'difference', 'low', 'high')],
                             [np.mean(mine), np.std(mine, ddof=1), np.subtract(mine, base).mean(), want.low, want.high],
                             rtol=1e-9)
  assert row['reportable'] == 'yes' and row['seeds'] == '0 1 2' and float(row['seconds']) == 61
  of = {r['row']: float(r['mean']) for r in lines(grid) if r['score'] == 'drr_to_ct_r10'}
  assert of['chance'] == 10 / 200 and of['untrained'] == pytest.approx(.05) and of['raw pixels'] == 1.
  assert not any('X-ray' in line for line in shown[0].splitlines() if line.startswith('| row'))
  assert '| untrained | 3 | 0.560 ± 0.010 |' in shown[0] and 'results.png' in shown[-1]
  with Image.open(grid / 'results.png') as image:
    assert image.size[0] > 400


def test_drr_of_another_kind_are_not_compared_by_what_they_find(grid):
  pretraining.write(grid, 'toy', LEAVES | {'no_drr': {'loss.drr': 0., 'drr.view': 'axial'}}, 'base')
  of = {r['score']: r['difference'] for r in lines(grid) if r['row'] == 'no_drr'}
  assert of['drr_to_ct_r10'] == '' and of['knn_auc_ct'] != ''


def test_a_row_may_be_compared_with_another_than_the_base(grid):
  shown = pretraining.write(grid, 'toy', LEAVES, 'base', against={'no_drr': 'base', 'no_xray': 'no_drr'})
  row = next(r for r in lines(grid) if r['row'] == 'no_xray' and r['score'] == 'knn_auc_ct')
  want = np.mean([VALUES['no_xray', s] - VALUES['no_drr', s] for s in range(3)])
  assert float(row['difference']) == pytest.approx(want, rel=1e-9)
  assert '| no_xray | no_drr | 3 |' in shown[0] and '| base |  | 3 |' in shown[0]


@pytest.mark.parametrize('spoil, text', [
    (lambda f: (results.place(f, 'no_drr', 1., 2) / 'DONE').unlink(), 'unfinished: no_drr seed 2'),
    (lambda f: finish(f, 'base', 3, {'optim': {'lr': 9.}}), 'recipes differ: base seed'),
], ids=['unfinished', 'recipe'])
def test_what_is_no_result_is_refused_and_drafted(grid, spoil, text, monkeypatch):
  monkeypatch.setitem(VALUES, ('base', 3), .7)
  spoil(grid)
  with pytest.raises(results.ComparisonError, match=re.escape(f'results of toy refused: {text}') + '.*--draft'):
    pretraining.write(grid, 'toy', LEAVES, 'base')
  assert not (grid / 'results.csv').exists()
  assert 'Not reportable' in pretraining.write(grid, 'toy', LEAVES, 'base', draft=True)[0]


def test_a_failed_row_stands_below_the_table(grid):
  run = results.place(grid, 'no_drr', 1., 2)
  (run / 'DONE').rename(run / 'FAILED')
  (run / 'FAILED').write_text('FAILED no_drr seed 2 at step 12: killed by SIGKILL\n')
  shown = pretraining.write(grid, 'toy', LEAVES, 'base', True)[0]
  assert '- FAILED no_drr seed 2 at step 12: killed by SIGKILL' in shown


def test_a_run_that_did_not_evaluate_is_named(grid):
  (results.place(grid, 'base', 1., 0) / 'metrics.jsonl').write_text('{"step": 1, "phase": "ct"}\n')
  with pytest.raises(results.ComparisonError, match='base/f1/s0 is done, but holds no evaluation'):
    pretraining.write(grid, 'toy', LEAVES, 'base')
