"""Grids of runs: what a table may say and when there is none; what is started, skipped, continued (no training)."""
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from configs import comparison as grids
from tests.conftest import ROOT
from unimiss_jax.cli import arguments, sweep
from unimiss_jax.report import comparison, results

LEAVES = {'scratch': {}, 'untrained': {'task.frozen': True}, 'pretrained': {'init_from': '{weights}'}}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
  monkeypatch.setattr(comparison, 'DRAWS', 20)


# ---- tables: runs written by hand


def finish(folder, row, seed, *, cases=None, config=None, fraction=1., **about):
  """A finished run of 40 cases of 20 patients, two findings; the scores are those of scikit-learn."""
  run = results.place(folder, row, fraction, seed)
  (run / 'eval').mkdir(parents=True)
  cases = cases if cases is not None else classified(row, seed)
  given = {'task': 'toy', 'kind': 'cls', 'step': 200, 'init_from': 'w' if row == 'pretrained' else '', 'seed': seed,
           'frozen': row == 'untrained', 'fraction': fraction, 'loaded': [12 * (row == 'pretrained'), 14],
           'split_hash': 'split', 'recipe_hash': 'recipe', 'seconds': 60. + seed, 'cpu_seconds': 100., 'parameters': 9,
           'control': {'chance/auroc': .5, 'raw/auroc': .6 + .01 * seed}}
  if 'probability' in cases:
    given['scores'] = {'auroc': roc_auc_score(cases['truth'], cases['probability'])}
  (run / 'eval' / 'test.json').write_text(json.dumps(given | about))
  with (run / 'eval' / 'test.npz').open('wb') as f:
    np.savez(f, **cases)
  if config:
    (run / 'config.json').write_text(json.dumps(config))
  (run / 'DONE').write_text('"hash"')
  return run


def classified(row, seed):
  truth = np.random.default_rng(7).integers(0, 2, (40, 2)).astype(float)
  rng = np.random.default_rng([seed, *row.encode()])
  gain = {'pretrained': 1.5, 'scratch': .7}.get(row, 0.)
  return {'id': np.array([f'case {i:02}' for i in range(40)]), 'group': np.array([f'p{i // 2}' for i in range(40)]),
          'probability': 1 / (1 + np.exp(-gain * (truth - .5) - rng.normal(size=(40, 2)))), 'truth': truth,
          'exclusive': np.array(False)}


def three_rows(folder, seeds=(0, 1, 2), **more):
  for row in LEAVES:
    for seed in seeds:
      finish(folder, row, seed, **more)


def tabled(folder, draft=False, leaves=LEAVES, fractions=(1.,)):
  parts = [results.read(folder, leaves, 'scratch', f) for f in fractions]
  return comparison.write(folder, 'toy', parts, draft)


def lines(folder) -> list[dict]:
  return list(csv.DictReader((folder / 'results.csv').read_text().splitlines()))


def test_a_table_says_what_the_files_hold(tmp_path):
  three_rows(tmp_path)
  printed = '\n'.join(tabled(tmp_path))
  found = {r['row']: r for r in lines(tmp_path)}
  assert list(found) == ['chance', 'raw pixels', *LEAVES]
  for row in LEAVES:
    each = [roc_auc_score(c['truth'], c['probability']) for c in (classified(row, s) for s in range(3))]
    np.testing.assert_allclose(float(found[row]['mean']), statistics.mean(each), rtol=1e-12)
    np.testing.assert_allclose(float(found[row]['sd']), statistics.stdev(each), rtol=1e-12)
    np.testing.assert_allclose([float(v) for v in found[row]['values'].split()], each, rtol=1e-12)
    assert f'| {row} | 3 | {statistics.mean(each):.3f} ± {statistics.stdev(each):.3f} |' in printed
  assert float(found['raw pixels']['mean']) == pytest.approx(.61) and found['chance']['mean'] == '0.5'
  gain = float(found['pretrained']['mean']) - float(found['scratch']['mean'])
  d, low, high = (float(found['pretrained'][k]) for k in ('difference', 'low', 'high'))
  assert d == pytest.approx(gain, abs=1e-12) and low < d < high
  assert found['scratch']['difference'] == '' and float(found['pretrained']['seconds']) == 61
  assert found['pretrained']['loaded'] == '12/14' and found['pretrained']['weights'] == 'w'
  text = (tmp_path / 'results.md').read_text()
  assert text.startswith('# toy\n') and '40 test cases of 20 groups; split split, recipe recipe' in text
  assert 'not reportable' not in text and all(r['reportable'] == 'yes' for r in lines(tmp_path))


def test_the_interval_is_that_of_scipy():
  """Every case a group of its own: the percentile bootstrap of a mean."""
  rng = np.random.default_rng(0)
  gain = rng.normal(.05, .1, 60)
  base = rng.uniform(.3, .6, 60)
  metric = lambda x, truth: x.mean()
  d, low, high = comparison.paired(metric, base + gain, base, base, np.arange(60), 4000, 1)
  want = bootstrap((gain,), np.mean, n_resamples=4000, method='percentile', rng=2).confidence_interval
  np.testing.assert_allclose(d, gain.mean(), rtol=1e-12)
  # the 2.5 % quantile of 4000 draws is known to about 3 % of the standard error (.0129); three such deviations of two
  np.testing.assert_allclose([low, high], [want.low, want.high], atol=3 * 2**.5 * .03 * gain.std(ddof=1) / 60**.5)


def test_rows_are_drawn_together_and_patients_whole():
  metric = lambda x, truth: x.mean()
  base = np.random.default_rng(0).uniform(size=50)
  alike = comparison.paired(metric, base + .1, base, base, np.arange(50), 100, 0)
  np.testing.assert_allclose(alike, [.1] * 3, rtol=1e-9)
  # two patients, one better by 1: both the same one is drawn with probability 1/4, whatever the number of their cases
  gain = np.repeat([0., 1.], [90, 110])
  assert comparison.paired(metric, gain, 0 * gain, gain, gain, 400, 0) == (.55, 0., 1.)


def test_segmentations_are_compared_by_the_dice_of_cases(tmp_path):
  """A class that does not count in a case (NaN) takes no part; a gain of .2 in every case has no spread."""
  dice = np.array([[.4, .6], [.2, np.nan], [.7, .5], [.1, .3]])
  for row in LEAVES:
    for seed in range(3):
      mine = dice + .2 * (row == 'pretrained') + .01 * seed
      finish(tmp_path, row, seed, kind='seg', cases={'id': np.array(list('abcd')), 'group': np.array(list('ppqr')),
                                                     'dice': mine},
             scores={'dice': .4, 'dice/heart': .35}, control={'chance/dice': .1, 'raw/dice': .2})
  tabled(tmp_path)
  row = next(r for r in lines(tmp_path) if r['row'] == 'pretrained')
  np.testing.assert_allclose([float(row[k]) for k in ('difference', 'low', 'high')], .2, rtol=1e-9)
  assert comparison._dice(dice, None) == pytest.approx(statistics.mean([.5, .2, .6, .2]), abs=1e-12)
  assert '| dice/heart |  |  | 0.350 ± 0.000 |' in (tmp_path / 'results.md').read_text()


def test_unknown_labels_take_no_part_in_the_area():
  c = classified('scratch', 0)
  truth = np.where(np.random.default_rng(3).uniform(size=(40, 2)) < .3, np.nan, c['truth'])
  want = [roc_auc_score(t[np.isfinite(t)], p[np.isfinite(t)]) for t, p in zip(truth.T, c['probability'].T)]
  np.testing.assert_allclose(comparison._auroc(c['probability'], truth), np.mean(want), rtol=1e-12)


def drop(row, seed):
  def f(folder):
    run = results.place(folder, row, 1., seed)
    (run / 'DONE').rename(run / 'FAILED')
  return f


def edit(row, seed, **about):
  def f(folder):
    file = results.place(folder, row, 1., seed) / 'eval' / 'test.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
  return f


REFUSED = [
    (drop('pretrained', 1), 'row pretrained has 2 seeds, at least 3 are needed'),
    (edit('pretrained', 1, split_hash='other'), 'split hashes differ: pretrained seed 1 other, scratch seed 0 split'),
    (edit('pretrained', 1, recipe_hash='z'), 'recipes differ: hash of pretrained seed 1 z, of scratch seed 0 recipe'),
    (edit('pretrained', 1, init_from='v'), 'row pretrained mixes weights: v, w'),
    (edit('pretrained', 1, loaded=[0, 14]), 'pretrained seed 1 loaded no tensor of w'),
    (edit('scratch', 1, loaded=[3, 14]), 'scratch seed 1 is from scratch, yet loaded 3 tensors'),
    (edit('untrained', 2, control={'chance/auroc': .5}), 'no raw pixels ("raw/auroc") in 1 run'),
    (edit('untrained', 2, control={'raw/auroc': .6}), 'no chance ("chance/auroc") in 1 run'),
]


@pytest.mark.parametrize('spoil,text', REFUSED)
def test_what_is_no_result_is_refused_in_one_line(spoil, text, tmp_path):
  three_rows(tmp_path)
  spoil(tmp_path)
  (tmp_path / 'results.md').write_text('an earlier table')
  with pytest.raises(results.ComparisonError, match=re.escape(f'results of toy refused: f1: {text}')) as e:
    tabled(tmp_path)
  assert '\n' not in str(e.value) and '--draft' in str(e.value)
  assert not (tmp_path / 'results.md').exists()      # it does not outlive its runs
  tabled(tmp_path, draft=True)
  assert (tmp_path / 'results.md').read_text().startswith('# toy (not reportable)\n')
  assert all(r['reportable'] == 'no' for r in lines(tmp_path))


def test_each_seed_may_start_from_weights_of_its_own(tmp_path):
  three_rows(tmp_path)
  for seed in range(3):
    edit('pretrained', seed, init_from=f'w{seed}')(tmp_path)
  tabled(tmp_path)
  assert next(r for r in lines(tmp_path) if r['row'] == 'pretrained')['weights'] == 'w0 w1 w2'


@pytest.mark.parametrize('row,text', [('scratch', 'no scratch row'), ('untrained', 'no untrained encoder row')])
def test_a_table_without_its_partners_is_refused(row, text, tmp_path):
  for other in LEAVES.keys() - {row}:
    for seed in range(3):
      finish(tmp_path, other, seed)
  with pytest.raises(results.ComparisonError, match=text):
    tabled(tmp_path)


def test_other_test_cases_are_refused(tmp_path):
  three_rows(tmp_path, seeds=(0, 1))
  for row in LEAVES:
    c = classified(row, 2)
    finish(tmp_path, row, 2, cases=c if row != 'pretrained' else c | {'truth': 1 - c['truth']})
  with pytest.raises(results.ComparisonError, match='test cases of pretrained seed 2 are not those of scratch seed 0'):
    tabled(tmp_path)


def test_cases_in_another_order_are_the_same_cases(tmp_path):
  three_rows(tmp_path, seeds=(0, 1))
  for row in LEAVES:
    turned = {k: v[::-1] if v.ndim else v for k, v in classified(row, 2).items()}
    finish(tmp_path, row, 2, cases=turned)
  tabled(tmp_path)
  got = next(r for r in lines(tmp_path) if r['row'] == 'pretrained')
  three_rows(tmp_path / 'straight')
  tabled(tmp_path / 'straight')
  want = next(r for r in lines(tmp_path / 'straight') if r['row'] == 'pretrained')
  assert [got[k] for k in ('difference', 'low', 'high')] == [want[k] for k in ('difference', 'low', 'high')]


def test_leaves_that_no_row_declares_must_be_equal(tmp_path):
  leaves = LEAVES | {'slow': {'init_from': '{weights}', 'optim.layer_decay': .5}}
  shared = {'optim': {'lr': 1e-3, 'layer_decay': .75}, 'log': {'every': 1}}
  for row in leaves:
    for seed in range(3):
      mine = shared | {'seed': seed, 'init_from': 'w' * (row in ('pretrained', 'slow')), 'log': {'every': 1 + seed}}
      if row == 'slow':
        mine['optim'] = {'lr': 1e-3, 'layer_decay': .5}
      if row == 'untrained':
        mine['task'] = {'frozen': True}
      finish(tmp_path, row, seed, config=mine, init_from=mine['init_from'], loaded=[len(mine['init_from']), 14])
  tabled(tmp_path, leaves=leaves)
  file = results.place(tmp_path, 'slow', 1., 2) / 'config.json'
  file.write_text(file.read_text().replace('0.001', '0.002'))
  with pytest.raises(results.ComparisonError, match=r'slow seed 2 / scratch seed 0: optim.lr 0.002 / 0.001'):
    tabled(tmp_path, leaves=leaves)


def test_a_draft_of_failures_alone_names_them(tmp_path):
  run = results.place(tmp_path, 'scratch', 1., 0)
  run.mkdir(parents=True)
  (run / 'FAILED').write_text('FAILED scratch seed 0 at step 3: why\n')
  assert '- FAILED scratch seed 0 at step 3: why' in '\n'.join(tabled(tmp_path, draft=True))
  with pytest.raises(results.ComparisonError, match='results of toy refused: f1: no run is finished'):
    tabled(tmp_path)


def test_without_the_base_row_a_draft_shows_no_difference(tmp_path):
  for row in ('untrained', 'pretrained'):
    finish(tmp_path, row, 0)
  tabled(tmp_path, draft=True)
  assert [r['difference'] for r in lines(tmp_path)] == [''] * 4


def test_every_fraction_has_its_table(tmp_path):
  three_rows(tmp_path)
  three_rows(tmp_path, fraction=.05)
  tabled(tmp_path, fractions=(.05, 1.))
  text = (tmp_path / 'results.md').read_text()
  assert text.index('## 5 % of the labels') < text.index('## 100 % of the labels')
  assert [r['fraction'] for r in lines(tmp_path)] == ['0.05'] * 5 + ['1'] * 5


def test_the_picture(tmp_path):
  pytest.importorskip('matplotlib')
  three_rows(tmp_path)
  assert 'results.md, results.csv, results.png' in tabled(tmp_path)[-1]
  with Image.open(tmp_path / 'results.png') as image:
    assert image.format == 'PNG' and len(np.unique(np.asarray(image))) > 10


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  three_rows(tmp_path)
  assert tabled(tmp_path)[-2:] == ['results.png needs matplotlib. FIX: pip install -e ".[report]"',
                                   f'{tmp_path}: results.md, results.csv']
  assert (tmp_path / 'results.md').exists() and not (tmp_path / 'results.png').exists()


# ---- the runner, with a program that takes the flags of main.py

MAIN = '''
import json, os, pathlib, shutil, signal, sys, time
flags = dict(a.lstrip('-').split('=', 1) for a in sys.argv[1:])
run, seed = pathlib.Path(flags['workdir']), int(flags['config.seed'])
with open('calls.jsonl', 'a') as f:
  f.write(json.dumps({**flags, 'setting': os.environ.get('SETTING')}) + '\\n')
metrics = run / 'metrics.jsonl'
first = len(metrics.read_text().splitlines()) if metrics.exists() else 0
def save(number, frame):
  sys.exit(0)
signal.signal(signal.SIGTERM, save)
for step in range(first, 4):
  with metrics.open('a') as f:
    f.write(json.dumps({'step': step, 'phase': 'ct'}) + '\\n')
  print(f'I 12:00:00 step {step + 1}/4 ct', flush=True)
  if flags.get('config.broken') == 'True' and step == 2 and not os.path.exists('mended'):
    sys.exit(print('ERROR step 2 ct: not finite. FIX: lower optim.lr') or 1)
  while os.path.exists('wait') and step == 1:
    time.sleep(.02)
(run / 'eval').mkdir(exist_ok=True)
frozen = flags.get('config.task.frozen') == 'True'
weights = flags.get('config.init_from', '')
about = {'kind': 'cls', 'step': 4, 'init_from': weights, 'frozen': frozen, 'loaded': [int(bool(weights)), 2],
         'split_hash': 's', 'recipe_hash': 'r', 'seconds': 1., 'cpu_seconds': 1., 'parameters': 1,
         'scores': {'auroc': .75}, 'control': {'chance/auroc': .5, 'raw/auroc': .6}}
(run / 'eval' / 'test.json').write_text(json.dumps(about))
shutil.copy('cases.npz', run / 'eval' / 'test.npz')
(run / 'DONE').write_text('1')
'''
GRIDS = '''
ROWS = {'scratch': {}, 'untrained': {'task.frozen': True}, 'pretrained': {'init_from': '{weights}'}}
GRIDS = {
    'toy': {'config': 'configs/toy.py:a', 'rows': ROWS, 'base': 'scratch', 'seeds': (0, 1, 2), 'fractions': (.05,)},
    'breaks': {'config': 'configs/toy.py', 'rows': {'scratch': {}, 'bad': {'broken': True}, 'untrained': {
        'task.frozen': True}}, 'base': 'scratch', 'seeds': (0,)},
    'pre': {'config': 'configs/toy.py', 'rows': {'base': {}}, 'base': 'base', 'seeds': (0,), 'table': 'pretraining'},
}
'''

TOY = '''
def get_config(arg=None):
  return {'broken': False, 'init_from': '', 'task': {'frozen': False}}
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sweep, 'POLL_S', .02)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'main.py').write_text(MAIN)
  np.savez(tmp_path / 'cases.npz', id=np.array(list('abcd')), group=np.array(list('abcd')), exclusive=False,
           probability=np.array([[.1], [.6], [.4], [.9]]), truth=np.array([[0.], [0], [1], [1]]))
  (tmp_path / 'launch.env').write_text('SETTING="of launch.env"\n')
  (tmp_path / 'configs' / 'comparison.py').write_text(GRIDS)
  (tmp_path / 'configs' / 'toy.py').write_text(TOY)
  return tmp_path


def calls(project) -> list[dict]:
  file = project / 'calls.jsonl'
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_one_of_three_fails_and_only_it_runs_again(project, capsys):
  """Acceptance check 13 of specs/habits.md."""
  assert sweep.main(['--grid=breaks', '--out=runs', '--draft']) == 1
  out = capsys.readouterr().out
  said = ('FAILED bad seed 0 at step 2: step 2 ct: not finite. FIX: lower optim.lr '
          '[runs/breaks/bad/f1/s0/logs/sweep.txt]')
  assert said in out.splitlines()
  text = (project / 'runs/breaks/results.md').read_text()
  assert text.startswith('# breaks (not reportable)') and f'- {said}' in text
  assert [r['row'] for r in lines(project / 'runs/breaks')] == ['chance', 'raw pixels', 'scratch', 'untrained', said]
  assert len(calls(project)) == 3
  (project / 'mended').touch()
  assert sweep.main(['--grid=breaks', '--out=runs', '--draft']) == 0
  assert '3 runs, 2 done before' in capsys.readouterr().out
  assert [c['workdir'] for c in calls(project)[3:]] == ['runs/breaks/bad/f1/s0']
  assert 'FAILED' not in (project / 'runs/breaks/results.md').read_text()


def test_a_child_is_told_all_that_makes_its_run(project, capsys):
  assert sweep.main(['--grid=toy', '--out=runs', '--weights=demo', '--seeds=0,1,2', '--fractions=.5',
                     '--config.optim.lr=2e-3', '--jobs=2']) == 0
  made = calls(project)
  assert len(made) == 9 and {c['setting'] for c in made} == {'of launch.env'}
  assert [c for c in made if c['workdir'] == 'runs/toy/pretrained/f0.5/s2'] == [{
      'config': 'configs/toy.py:a', 'workdir': 'runs/toy/pretrained/f0.5/s2', 'config.init_from': 'demo',
      'config.data.label_fraction': '0.5', 'config.seed': '2', 'config.optim.lr': '2e-3', 'setting': 'of launch.env'}]
  out = capsys.readouterr().out
  assert re.search(r'^\[9/9\] \d+:\d\d, left 0:00 \| toy \w+ f0.5 seed 2: auroc 0.750$', out, re.M), out
  # auroc of .1 .6 against .4 .9: three of four pairs are in order
  assert '| pretrained | 3 | 0.750 ± 0.000 | 0.750 0.750 0.750 | +0.000 [+0.000, +0.000] | 1 | 1 | 4 | 1/2 |' in out


def test_a_terminal_sees_the_steps_of_what_runs(project, capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
  (project / 'wait').touch()

  def go_on():
    until(lambda: waits(project / 'runs/toy/scratch/f0.05/s0'))
    time.sleep(1)
    (project / 'wait').unlink()
  Thread(target=go_on).start()
  assert sweep.main(['--grid=toy', '--out=runs', '--seeds=0', '--draft']) == 0
  assert re.search(r'\r0/2 done \| 0:0\d, left 0:0\d \| scratch f0.05 s0 step 2/4\x1b\[K', capsys.readouterr().out)


def test_rows_without_their_weights_are_left_out(project, capsys):
  assert sweep.main(['--grid=toy', '--out=runs']) == 0
  assert 'toy: row pretrained left out: no --weights' in capsys.readouterr().out
  assert {c['workdir'].split('/')[2] for c in calls(project)} == {'scratch', 'untrained'}


def test_weights_may_name_the_seed(project):
  assert sweep.main(['--grid=toy', '--out=runs', '--weights=pre/s{seed}', '--seeds=3,7', '--draft']) == 0
  given = {c['workdir']: c['config.init_from'] for c in calls(project) if '/pretrained/' in c['workdir']}
  assert sorted(given.values()) == ['pre/s3', 'pre/s7'] and all(v[-1] == k[-1] for k, v in given.items())


def test_a_finished_run_of_other_leaves_is_not_taken_for_this_one(project, capsys):
  common = ['--grid=toy', '--out=runs', '--seeds=0', '--draft']
  assert sweep.main([*common, '--weights=a', '--config.log.every=1']) == 0
  assert sweep.main([*common, '--weights=a', '--config.log.every=2']) == 0      # changes no result
  assert sweep.main([*common, '--weights=b']) == 1
  assert ('ERROR runs/toy/pretrained/f0.05/s0 holds a finished run with other leaves: init_from a -> b. '
          'FIX: another --out') in capsys.readouterr().err
  assert len(calls(project)) == 3


def test_shards_part_the_runs_between_them(project, capsys):
  flags = ['--grid=toy', '--out=runs', '--weights=demo', '--num_shards=2']
  assert sweep.main([*flags, '--shard_index=0']) == 0
  assert len(calls(project)) == 5 and not (project / 'runs/toy/results.md').exists()
  assert sweep.main([*flags, '--shard_index=1']) == 0
  assert sorted(c['workdir'] for c in calls(project)) == sorted(
      f'runs/toy/{row}/f0.05/s{seed}' for row in ('scratch', 'untrained', 'pretrained') for seed in range(3))
  assert sweep.main(flags) == 0
  assert len(calls(project)) == 9 and (project / 'runs/toy/results.md').exists()


def started(project, *flags):
  env = dict(os.environ, PYTHONPATH=str(ROOT))
  return subprocess.Popen([sys.executable, '-m', 'unimiss_jax.cli.sweep', '--grid=breaks', '--out=runs', *flags],
                          cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(happened, timeout=60):
  end = time.monotonic() + timeout
  while not happened():
    assert time.monotonic() < end
    time.sleep(.02)


def waits(run) -> bool:
  """Whether a run has taken its second step, after which it waits."""
  file = run / 'metrics.jsonl'
  return file.exists() and len(file.read_text().splitlines()) == 2


def test_killed_it_goes_on_and_never_beside_a_child_that_lives(project, capsys):
  (project / 'mended').touch()
  (project / 'wait').touch()
  parent = started(project)
  until(lambda: waits(project / 'runs/breaks/scratch/f1/s0'))
  parent.kill()
  parent.communicate()
  (project / 'configs/comparison.py').write_text(GRIDS.replace("'bad': {'broken': True}, ", ''))
  only = ['--grid=breaks', '--out=runs', '--draft', '--num_shards=2', '--shard_index=0']
  assert sweep.main(only) == 1      # the orphan works on
  assert ('FAILED scratch seed 0 at step 1: a process of an earlier call still works in runs/breaks/scratch/f1/s0'
          in capsys.readouterr().out)
  (project / 'wait').unlink()
  until(lambda: (project / 'runs/breaks/scratch/f1/s0/DONE').exists())
  assert sweep.main(['--grid=breaks', '--out=runs', '--draft']) == 0
  assert [c['workdir'] for c in calls(project)] == [f'runs/breaks/{row}/f1/s0' for row in ('scratch', 'untrained')]


def test_a_signal_lets_the_children_save_and_the_same_command_goes_on(project, capsys):
  (project / 'mended').touch()
  (project / 'wait').touch()
  parent = started(project)
  until(lambda: waits(project / 'runs/breaks/scratch/f1/s0'))
  parent.send_signal(signal.SIGTERM)
  out, _ = parent.communicate(timeout=60)
  assert parent.returncode == 0 and 'SIGTERM: stopped; the same command goes on' in out, out
  assert len(calls(project)) == 1 and not (project / 'runs/breaks/scratch/f1/s0/FAILED').exists()
  (project / 'wait').unlink()
  assert sweep.main(['--grid=breaks', '--out=runs', '--draft']) == 0
  rows = [json.loads(r) for r in (project / 'runs/breaks/scratch/f1/s0/metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows] == [0, 1, 2, 3]      # continued, not begun anew


@pytest.mark.parametrize('said,code,want', [
    ('I 12:00:00 step 1/2\nERROR a\nE 12:00:01 the disk is full\nW 12:00:02 x\n', 1, 'the disk is full'),
    ('E 12:00:01 a\nERROR  no such file: x. FIX: y\n', 1, 'no such file: x. FIX: y'),
    ('I 12:00:00 step 1/2\n', -9, 'killed by SIGKILL'),
    ('Traceback (most recent call last):\n  File "x"\njax.errors.JaxRuntimeError: out of memory\n\nnote\n', 1,
     'jax.errors.JaxRuntimeError: out of memory'),
    ('Fatal: something\n', 3, 'Fatal: something'),
    ('', 3, 'exit code 3'),
])
def test_the_cause_is_the_last_error_of_the_log(said, code, want):
  assert sweep.cause(said, code) == want


@pytest.mark.parametrize('flags,code,text', [
    (['--grid=toy'], 2, r'--out.* usage: python -m unimiss_jax.cli.sweep'),
    (['--out=x'], 2, 'missing --grid'),
    (['--grid=toi', '--out=x'], 2, r'--grid=toi unknown: configs/comparison.py holds toy, breaks, pre'),
    (['--grid=toy', '--out=x', '--config.seed=1'], 2, r'--config.seed would make rows of toy equal'),
    (['--grid=toy', '--out=x', '--weights=w', '--config.init_from=y'], 2, '--config.init_from would'),
    (['--grid=toy', '--out=x', '--wights=y'], 2, 'unknown argument --wights=y'),
    (['--grid=toy', '--out=x', '--seeds=a'], 2, '--seeds'),
    (['--grid=toy', '--out=x', '--num_shards=2', '--shard_index=2'], 2, '--shard_index=2: with --num_shards'),
    (['--grid=pre', '--out=x', '--fractions=.05'], 2, 'learn from no labels'),
    (['--grid=toy', '--out=gs://x'], 2, '--out=gs://x: a local folder'),
])
def test_a_wrong_command_is_answered_in_one_line(flags, code, text, project, capsys):
  try:
    got = sweep.main(flags)
  except SystemExit as e:
    got = e.code
  err = capsys.readouterr().err.strip()
  assert got == code and re.search(text, err) and len(err.splitlines()) == 1, err
  assert not calls(project)


def test_outside_of_the_project_it_says_where_to_go(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert sweep.main(['--grid=toy', '--out=x']) == 2
  assert 'configs/comparison.py: no such file. FIX: call it in the folder of main.py' in capsys.readouterr().err


# ---- what is shipped


def test_the_shipped_settings_reach_a_child_and_keep_those_of_the_user():
  env = {'PATH': os.environ['PATH'], 'XLA_FLAGS': '--mine', 'JAX_COMPILATION_CACHE_DIR': '/mine'}
  out = subprocess.run(['sh', '-c', sweep.START, '-', 'env'], cwd=ROOT, env=env, capture_output=True, text=True).stdout
  found = dict(line.split('=', 1) for line in out.splitlines())
  assert found['XLA_FLAGS'].startswith('--xla_cpu_') and found['XLA_FLAGS'].endswith(' --mine')
  assert found['JAX_COMPILATION_CACHE_DIR'] == '/mine' and found['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1'
  assert '. ./launch.env' in (ROOT / 'Makefile').read_text()


@pytest.mark.parametrize('name', grids.GRIDS)
def test_shipped_grids_name_what_exists(name):
  grid = grids.GRIDS[name]
  assert grid['base'] in grid['rows'] and len(grid['seeds']) >= results.SEEDS
  file = ROOT / grid['config'].partition(':')[0]
  if not file.exists():
    pytest.skip(f'no {file.name}')
  known = arguments.leaves(arguments.load(str(ROOT / grid['config'])))
  wanted = {'seed', 'data.label_fraction', *(k for leaves in grid['rows'].values() for k in leaves)}
  assert wanted <= {*known}
