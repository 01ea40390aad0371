"""A grid of real pre-trainings, whole and in two shards, cut by kill -9."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
GRID = '''
from configs import ablations
from tests.e2e.tiny import MODEL
SMALL = {f'model.{k}': v for k, v in MODEL.items()} | {
    'steps': 6, 'data.phantom_records': 16, 'batch.ct': 8, 'batch.xray': 8, 'head.hidden_dim': 16,
    'head.bottleneck_dim': 8, 'eval.every': 0, 'eval.records': 24, 'eval.fit': 12, 'checkpoint.every': 2,
    'views.ct.size': (16, 64, 64), 'model.volume_size': (16, 64, 64), 'optim.warmup_epochs': 1.}
GRIDS = {'few': ablations.grid({'no_pairs': {'loss.pair_nce': 0.}}, common=SMALL, seeds=(0,))}
'''
COST = 'seconds', 'cpu_seconds'


def sweep(grid, out, *flags):
  return subprocess.Popen(
      [sys.executable, '-m', 'unimiss_jax.cli.sweep', f'--grids={grid}', '--grid=few', f'--out={out}', *flags],
      cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT)


def ended(run):
  said, _ = run.communicate(timeout=1200)
  assert run.returncode == 0, said
  return said


def table(out) -> list[dict]:
  with (out / 'few' / 'results.csv').open() as f:
    return [{k: v for k, v in row.items() if not any(c in k for c in COST)} for row in csv.DictReader(f)]


def halfway(out):
  """The folder of a run that has a checkpoint and is not the first; None until there is one."""
  begun = [p.parents[1] for p in out.glob('few/*/*/*/checkpoints/2')]
  left = [p for p in begun if not (p / 'DONE').exists()]
  return left[0] if left and list(out.glob('few/*/*/*/DONE')) else None


def test_two_shards_and_a_sweep_that_was_killed_give_the_table_of_one(tmp_path):
  grid, whole, parts, cut = tmp_path / 'grid.py', tmp_path / 'whole', tmp_path / 'parts', tmp_path / 'cut'
  grid.write_text(GRID)
  ended(sweep(grid, whole, '--draft'))
  want = table(whole)
  assert len(want) >= 2      # of one seed: a draft

  for i in range(2):
    ended(sweep(grid, parts, '--num_shards=2', f'--shard_index={i}'))
  assert len(list(parts.glob('few/*/*/*/DONE'))) == 2 and not (parts / 'few' / 'results.csv').exists()
  ended(sweep(grid, parts, '--draft'))
  assert table(parts) == want

  run = sweep(grid, cut, '--draft')
  while not (half := halfway(cut)):
    assert run.poll() is None
    time.sleep(.05)
  children = ' '.join(p.read_text() for p in Path('/proc', str(run.pid), 'task').glob('*/children')).split()
  for pid in (run.pid, *map(int, children)):
    os.kill(pid, signal.SIGKILL)
  run.communicate()
  done = {p: p.stat().st_mtime_ns for p in cut.glob('few/*/*/*/DONE')}
  assert len(done) == len(children) == 1 and not (half / 'DONE').exists()
  ended(sweep(grid, cut, '--draft'))
  assert table(cut) == want and all(p.stat().st_mtime_ns == t for p, t in done.items())
  assert any('resumed step' in p.read_text() for p in (half / 'logs').iterdir())
