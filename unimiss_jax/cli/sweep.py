"""Grids of runs, started, continued and compared: python -m unimiss_jax.cli.sweep --grid=NAME --out=DIR.

A run is a process of main.py in DIR/<grid>/<row>/f<fraction>/s<seed>. The same command skips what is done, continues
what was cut short and tries again what failed; it ends with the table (results.md, .csv, .png in DIR/<grid>), made
from the files of the runs alone.
"""
from __future__ import annotations

import fcntl
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from data_pipelines.command import Parser, fail
from unimiss_jax.cli.arguments import PROGRAM, SETTINGS, START, module
from unimiss_jax.progress import clock
from unimiss_jax.report import results, summary

USAGE = ('python -m unimiss_jax.cli.sweep --grid=NAME[,NAME] --out=DIR [--weights=PATH] [--seeds=0,1,2] '
         '[--fractions=.05,1] [--jobs=1] [--num_shards=N --shard_index=I] [--config.a.b=value] [--draft]')
LOG = 'logs/sweep.txt'
LEAVES = 'sweep.json'     # in a run's folder: what was given on its command line
POLL_S = .1


class SweepError(Exception):
  """Nothing can be started; one line."""


class Run(NamedTuple):
  grid: str
  row: str
  fraction: float
  seed: int
  config: str
  leaves: dict      # {leaf: value as text}
  folder: pathlib.Path

  def __str__(self):
    return f'{self.grid} {self.row} f{self.fraction:g} seed {self.seed}'


def main(argv=None) -> int:
  p = Parser(__doc__, USAGE)
  p.several('--grid', (), (), help='names of grids, comma separated')
  p.add_argument('--grids', default='configs/comparison.py', help='the file that holds them')
  p.add_argument('--out', required=True, help='local folder of all runs')
  p.add_argument('--weights', default='', help='fills {weights}: what rows start from; {seed} '
                 'in it becomes the seed of the run')
  p.add_argument('--imported', default='', help='fills {imported}: other weights')
  p.add_argument('--seeds', type=_numbers(int), default=(), help="in place of the grid's")
  p.add_argument('--fractions', type=_numbers(float), default=(), help="of the labels, in place of the grid's")
  p.add_argument('--jobs', type=int, default=1, help='runs at a time')
  p.add_argument('--num_shards', type=int, default=1, help='of the runs, for several machines; one more call without '
                 '--shard_index makes the table')
  p.add_argument('--shard_index', type=int, default=None, help='start the runs of this shard alone')
  p.add_argument('--draft', action='store_true', help='write the table even where it is no result, and say so in it')
  f, rest = p.parse_known_args(argv)
  common = {}
  for a in rest:
    if not (m := re.fullmatch(r'--config\.([\w.]+)=(.*)', a, re.DOTALL)):
      p.error(f'unknown argument {a}')
    common[m[1]] = m[2]
  if not f.grid:
    p.error('missing --grid')
  if '://' in f.out:
    p.error(f'--out={f.out}: a local folder, to be copied afterwards')
  if f.jobs < 1:
    p.error(f'--jobs={f.jobs}: at least 1')
  if f.num_shards < 1 or f.shard_index is not None and not 0 <= f.shard_index < f.num_shards:
    p.error(f'--shard_index={f.shard_index}: with --num_shards, from 0 to one less')
  try:
    grids = chosen(f.grids, f.grid)
    runs = plan(grids, f.out, {'weights': f.weights, 'imported': f.imported}, common, f.seeds, f.fractions)
    runs = runs[f.shard_index or 0::f.num_shards if f.shard_index is not None else 1]
  except SweepError as e:
    return fail(e, 2)
  try:
    todo = [r for r in runs if not finished(r)]
  except SweepError as e:
    return fail(e, 1)
  print(f'{len(runs)} runs, {len(runs) - len(todo)} done before', flush=True)
  failed, stopped = work(todo, f.jobs)
  if stopped:
    print(f'{stopped.name}: stopped; the same command goes on', flush=True)
    return 130 if stopped == signal.SIGINT else 0
  if f.shard_index is not None:
    print('the table: the same command without --shard_index, once all shards are done')
    return int(failed > 0)
  return int(not tables(grids, f) or failed > 0)


def chosen(file: str, names) -> dict:
  """{grid: its entry} of the names in a file of grids."""
  for needed in (file, PROGRAM, SETTINGS):
    if not pathlib.Path(needed).exists():
      raise SweepError(f'{needed}: no such file. FIX: call it in the folder of main.py')
  known = getattr(module(file), 'GRIDS', {})
  if unknown := [n for n in names if n not in known]:
    raise SweepError(f'--grid={unknown[0]} unknown: {file} holds {", ".join(known) or "no GRIDS"}')
  return {n: known[n] for n in names}


def plan(grids, out, given, common, seeds=(), fractions=()) -> list[Run]:
  """All runs, seed by seed, so that the first rows to compare are there early.

  Args:
    grids: {name: {'config', 'rows': {row: {leaf: value}}, 'base', 'seeds', 'fractions', 'table', 'against'}}; without
      fractions the leaf data.label_fraction is left alone; a row may name a `config` of its own; `against`: {row: the
      one that the table compares it with, where that is not the base}.
    given: {placeholder: value}; rows with an empty one are left out, with a line.
    common: {leaf: text} for all runs. seeds, fractions: in place of those of the grids.
  """
  runs = []
  for name, grid in grids.items():
    check_rows(name, grid)
    if fractions and grid.get('table') == 'pretraining':
      raise SweepError(f'--fractions with grid {name}: its rows learn from no labels; leave it out')
    shares = fractions or grid.get('fractions', ())
    rows = {}
    for row, leaves in grid['rows'].items():
      holes = [v for v in map(_hole, leaves.values()) if v]
      if lost := [h for h in holes if not given.get(h)]:
        print(f'{name}: row {row} left out: no --{lost[0]}', flush=True)
      else:
        rows[row] = {k: str(given[_hole(v)] if _hole(v) else v) for k, v in leaves.items()}
    own = {'seed', *(['data.label_fraction'] if shares else []), *(k for r in grid['rows'].values() for k in r)}
    if clash := sorted(own & common.keys()):
      raise SweepError(f'--config.{clash[0]} would make rows of {name} equal: the grid sets this leaf itself')
    for fraction in shares or (1.,):
      for seed in seeds or grid['seeds']:
        for row, leaves in rows.items():
          leaves = {k: v.replace('{seed}', str(seed)) for k, v in leaves.items()}
          share = {'data.label_fraction': f'{fraction:g}'} if shares else {}
          config = leaves.pop('config', grid['config'])
          runs.append(Run(name, row, fraction, seed, config, common | leaves | share | {'seed': str(seed)},
                          pathlib.Path(results.place(pathlib.Path(out) / name, row, fraction, seed))))
  return runs


def check_rows(name, grid) -> None:
  """Raises SweepError for a row that is the one that it is compared with, under another name, or that sets what its
  config has not."""
  for row, leaves in grid['rows'].items():
    rival = grid.get('against', {}).get(row, grid['base'])
    base = {k: str(v) for k, v in grid['rows'][rival].items()}
    config = preset(leaves.get('config', grid['config']))
    try:
      changed = {k for k, v in leaves.items() if k != 'config' and base.get(k, str(_leaf(config, k))) != str(v)}
      changed |= {k for k in base.keys() - leaves.keys() if str(_leaf(config, k)) != base[k]}
    except (KeyError, AttributeError) as e:
      raise SweepError(f'{name}: row {row} sets a leaf that {grid["config"]} has not: {e}') from e
    if row != rival and not changed and 'config' not in leaves:
      raise SweepError(f'{name}: row {row} changes nothing of {rival}: {", ".join(leaves)} are so already')


def preset(setting: str):
  """The config of FILE.py:preset."""
  file, _, arg = setting.partition(':')
  return module(file).get_config(arg or None)


def _leaf(config, name: str):
  for key in name.split('.'):
    config = config[key]
  return config


def _hole(value) -> str:
  """'{weights}' -> 'weights'; '' for what is no placeholder."""
  m = re.fullmatch(r'\{(\w+)\}', value) if isinstance(value, str) else None
  return m[1] if m else ''


def finished(run: Run) -> bool:
  """Whether this very run is complete.

  Raises:
    SweepError: its folder holds a complete run with other leaves.
  """
  file = run.folder / LEAVES
  if not (run.folder / 'DONE').exists():
    return False
  theirs = json.loads(file.read_text()) if file.exists() else run.leaves
  if theirs != run.leaves:
    from unimiss_jax.workdir import binding  # late: it loads jax
    theirs, ours = binding(theirs), binding(run.leaves)
    if changed := [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]:
      told = ', '.join(f'{k} {theirs.get(k, "(not set)")} -> {ours.get(k, "(not set)")}' for k in changed)
      raise SweepError(f'{run.folder} holds a finished run with other leaves: {told}. FIX: another --out')
  return True


class Child:
  """A process of main.py. The lock on its log is its own: it lasts as long as the process, whatever becomes of us."""

  def __init__(self, run: Run):
    """Raises BlockingIOError if a process of an earlier call still works there."""
    self.run, self.log = run, run.folder / LOG
    self.log.parent.mkdir(parents=True, exist_ok=True)
    with self.log.open('ab') as f:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self.start = f.tell()
      (run.folder / 'FAILED').unlink(missing_ok=True)
      (run.folder / LEAVES).write_text(json.dumps(run.leaves))
      leaves = [f'--config.{k}={v}' for k, v in run.leaves.items()]
      command = [sys.executable, PROGRAM, f'--config={run.config}', f'--workdir={run.folder}', *leaves]
      self.process = subprocess.Popen(['sh', '-c', START, '-', *command], stdin=subprocess.DEVNULL, stdout=f,
                                      stderr=subprocess.STDOUT, start_new_session=True)

  def said(self, last: int = 1 << 20) -> str:
    """What this process wrote; no more than the `last` bytes of it."""
    with self.log.open('rb') as f:
      f.seek(max(self.start, f.seek(0, 2) - last))
      return f.read().decode(errors='replace')

  def step(self) -> tuple[int, int]:
    """Steps done and in all, by its last line of progress; (0, 0) before the first."""
    found = re.findall(r' step (\d+)/(\d+) ', self.said(4096))
    return tuple(map(int, found[-1])) if found else (0, 0)


def work(todo: list[Run], jobs: int) -> tuple[int, signal.Signals | None]:
  """Runs all, `jobs` at a time. SIGINT and SIGTERM let the children save and end.

  Returns:
    The number of failed runs, the signal that asked to stop.
  """
  waiting, children, asked, failed = list(todo), [], [], 0
  board = Board(len(todo))
  former = {s: signal.signal(s, lambda number, frame: asked.append(signal.Signals(number)))
            for s in (signal.SIGINT, signal.SIGTERM)}
  told = 0
  try:
    while children or waiting and not asked:
      while waiting and len(children) < jobs and not asked:
        run = waiting.pop(0)
        try:
          children.append(Child(run))
        except BlockingIOError:
          failed += 1
          board.ended(f'FAILED {run.row} seed {run.seed} at step {last_step(run)}: a process of an earlier call still '
                      f'works in {run.folder}')
      for number in asked[told:]:
        board.clear()
        print(f'{number.name}: {len(children)} runs {"are killed" if told else "save and end"}', flush=True)
        for child in children:
          (child.process.kill if told else child.process.terminate)()
        told += 1
      time.sleep(POLL_S)
      for child in [c for c in children if c.process.poll() is not None]:
        children.remove(child)
        if asked and not (child.run.folder / 'DONE').exists():
          continue
        line = outcome(child)
        failed += line.startswith('FAILED')
        board.ended(line)
      board.show(children)
  finally:
    for child in children:      # an error of ours
      child.process.terminate()
    for s, handler in former.items():
      signal.signal(s, handler)
    board.clear()
  return failed, asked[0] if asked else None


def outcome(child: Child) -> str:
  """The line about an ended run; why it failed is kept in its folder."""
  run = child.run
  if (run.folder / 'DONE').exists():
    return f'{run}: {score(run)}'
  line = (f'FAILED {run.row} seed {run.seed} at step {last_step(run)}: {cause(child.said(), child.process.returncode)} '
          f'[{child.log}]')
  if child.process.returncode:      # 0: saved because of a signal, there is nothing wrong with it
    (run.folder / 'FAILED').write_text(line + '\n')
  return line


def cause(said: str, code: int) -> str:
  """The last error line, else what ended the process."""
  lines = [line.strip() for line in said.splitlines() if line.strip()]
  if found := [m[1] for line in lines if (m := re.match(r'(?:ERROR|[EC] \d\d:\d\d:\d\d)\s+(.+)', line))]:
    return found[-1]
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  if not code:
    return 'stopped by a signal after a save; the same command continues it'
  found = [line for line in lines if re.match(r'[\w.]*(Error|Exception|Exit|Interrupt)\b', line)] or lines
  return found[-1] if found else f'exit code {code}'


def last_step(run: Run) -> int:
  return max((r.get('step', 0) for r in summary.rows(run.folder)), default=0)


def score(run: Run) -> str:
  """'auroc 0.712' of a finished run, 'knn_auc_ct 0.712, ...' of a pre-training."""
  if found := [r for r in summary.rows(run.folder) if r.get('phase') == 'eval']:
    scores = {k: v for k, v in found[-1].items() if k in (*summary.KNN, *summary.RECALL)}
    if scores:
      return ', '.join(f'{k[5:]} {v:.3f}' for k, v in scores.items())
  try:
    scores = json.loads((run.folder / 'eval' / 'test.json').read_text())['scores']
    return ', '.join(f'{k} {v:.3f}' for k, v in scores.items() if '/' not in k)
  except (OSError, ValueError, KeyError):
    return 'done'


class Board:
  """A line for each ended run; on a terminal also one below that lives."""

  def __init__(self, total: int):
    self.total, self.done, self.began, self.live = total, 0, time.monotonic(), ''

  def ended(self, line: str) -> None:
    self.done += 1
    self.clear()
    print(f'[{self.done}/{self.total}] {self.times(self.done)} | {line}' if not line.startswith('FAILED') else line,
          flush=True)

  def show(self, children: list[Child]) -> None:
    if not sys.stdout.isatty() or not children:
      return
    steps = [c.step() for c in children]
    work = self.done + sum(k / n for k, n in steps if n)
    told = ', '.join(f'{c.run.row} f{c.run.fraction:g} s{c.run.seed} step {k}/{n or "?"}'
                     for c, (k, n) in zip(children, steps))
    line = f'{self.done}/{self.total} done | {self.times(work)} | {told}'
    if line != self.live:
      self.live = line
      print(f'\r{line}\x1b[K', end='', flush=True)

  def clear(self) -> None:
    if self.live:
      print('\r\x1b[K', end='')
      self.live = ''

  def times(self, done: float) -> str:
    passed = time.monotonic() - self.began
    return f'{clock(passed)}, left {clock(passed / done * (self.total - done)) if done else "?"}'


def tables(grids, f) -> bool:
  """Writes and prints the table of every grid; whether none was refused."""
  from unimiss_jax.report import comparison, pretraining  # late: a usage error should not wait for scipy
  whole = True
  for name, grid in grids.items():
    folder = pathlib.Path(f.out) / name
    try:
      if grid.get('table') == 'pretraining':
        print('\n'.join(pretraining.write(folder, name, grid['rows'], grid['base'], f.draft, grid.get('against'))),
              flush=True)
        continue
      parts = [results.read(folder, grid['rows'], grid['base'], fraction)
               for fraction in f.fractions or grid.get('fractions', (1.,))]
      print('\n'.join(comparison.write(folder, name, parts, f.draft)), flush=True)
    except results.ComparisonError as e:
      fail(e, 1)
      whole = False
  return whole


def _numbers(kind):
  return lambda text: tuple(dict.fromkeys(kind(part) for part in text.split(',')))


if __name__ == '__main__':
  sys.exit(main())
