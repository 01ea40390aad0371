"""The finished runs of a comparison, from their files alone, and what forbids to compare them.

A grid's folder holds <row>/f<fraction>/s<seed>/, each the folder of a run: DONE, config.json, eval/test.json and
eval/test.npz, or FAILED, one line that says why there is nothing.
"""
from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
from etils import epath

MAIN = {'cls': 'auroc', 'seg': 'dice'}      # the score that rows are compared by
CONTROLS = {'chance': 'chance', 'raw': 'raw pixels'}
SEEDS = 3                                   # fewer are no result
FIELDS = ('kind', 'step', 'init_from', 'frozen', 'loaded', 'split_hash', 'recipe_hash', 'seconds', 'cpu_seconds',
          'parameters', 'scores', 'control')
ROW_LEAVES = ('init_from', 'init_branch', 'init_parts', 'init_allow', 'pos_resize', 'seed', 'task.frozen',
              'task.encoder_rate', 'optim.layer_decay', 'data.label_fraction')
SERVICE = ('mesh', 'log', 'checkpoint')     # sections of a config that change no result


class ComparisonError(Exception):
  """These runs are no result: one line that says what lacks."""


class Result(NamedTuple):
  about: dict      # eval/test.json
  cases: dict      # eval/test.npz, {name: [N, ...]}, ordered by id
  config: dict     # {leaf: value}; {} where there is no config.json


class Runs(NamedTuple):
  """All runs of one fraction of a grid.

  Attributes:
    rows: {row: {seed: Result}}, rows of the grid that were begun, in its order.
    leaves: {row: {leaf: value}}, what a row declares to have of its own.
    base: the row that the others are compared with.
    failed: a line for each run that failed. unfinished: names of those that were cut short.
    against: {row: the one that it is compared with, where that is not the base}.
  """
  fraction: float
  rows: dict
  leaves: dict
  base: str
  failed: list
  unfinished: list
  against: dict = {}

  def rival(self, row: str) -> str:
    """The row that this one is compared with."""
    return self.against.get(row, self.base)

  def main(self) -> str | None:
    """The score that the rows are compared by."""
    return next((MAIN[r.about['kind']] for runs in self.rows.values() for r in runs.values()), None)


def place(folder, row: str, fraction: float, seed: int):
  """The folder of a run below that of its grid."""
  return epath.Path(folder) / row / f'f{fraction:g}' / f's{seed}'


def read(folder, leaves: dict, base: str, fraction: float, load=None) -> Runs:
  """Every seed that lies below the folder of a grid, not only those asked for last: none is chosen.

  Args:
    load: folder of a finished run -> what stands for it in rows; None = a Result.

  Raises:
    ComparisonError: a run that says DONE has no test scores.
  """
  out = Runs(fraction, {}, leaves, base, [], [])
  for row in leaves:
    runs = place(folder, row, fraction, 0).parent
    seeds = sorted(int(p.name[1:]) for p in runs.glob('s*') if p.name[1:].isdigit()) if runs.exists() else ()
    for seed in seeds:
      run, found = runs / f's{seed}', out.rows.setdefault(row, {})
      if (run / 'DONE').exists():
        found[seed] = (load or _result)(run)
      elif (run / 'FAILED').exists():
        out.failed.append((run / 'FAILED').read_text().strip())
      else:
        out.unfinished.append(f'{row} seed {seed}')
  return out


def _result(run) -> Result:
  from unimiss_jax.workdir import flat  # late: it loads jax
  try:
    about = json.loads((run / 'eval' / 'test.json').read_text())
    with (run / 'eval' / 'test.npz').open('rb') as f, np.load(f) as file:
      cases = dict(file)
  except (OSError, ValueError) as e:
    raise ComparisonError(f'{run} is done, but without readable test scores ({e}). FIX: a grid whose config has a '
                          'task; delete the folder to run it anew') from e
  if lost := [k for k in FIELDS if k not in about]:
    raise ComparisonError(f'{run}/eval/test.json lacks {", ".join(lost)}. FIX: delete the folder to run it anew')
  order = np.argsort(cases['id'], kind='stable')
  config = run / 'config.json'
  return Result(about, {k: v[order] if v.ndim else v for k, v in cases.items()},
                flat(json.loads(config.read_text())) if config.exists() else {})


def lacking(runs: Runs) -> list[str]:
  """Why a table of these runs may not be reported; empty if it may."""
  if not any(runs.rows.values()):
    return ['no run is finished']
  all_ = [(f'{row} seed {seed}', row, r) for row, seeds in runs.rows.items() for seed, r in seeds.items()]
  out, main = [], runs.main()
  if runs.unfinished:
    out.append(f'unfinished: {", ".join(runs.unfinished)}')
  out += [f'no {what} row' for what, frozen in (('scratch', False), ('untrained encoder', True))
          if not any(r.about['frozen'] == frozen and not r.about['init_from'] for _, _, r in all_)]
  for control, name in CONTROLS.items():
    if lost := sum(f'{control}/{main}' not in r.about['control'] for _, _, r in all_):
      out.append(f'no {name} ("{control}/{main}") in {_count(lost, "run")}')
  for row, seeds in runs.rows.items():
    if len(seeds) < SEEDS:
      out.append(f'row {row} has {_count(len(seeds), "seed")}, at least {SEEDS} are needed')
    elif len(shared := seeds.keys() & runs.rows.get(runs.base, {}).keys()) < SEEDS:
      out.append(f'row {row} shares {_count(len(shared), "seed")} with {runs.base}, at least {SEEDS} are needed')
    if 1 < len(weights := {r.about['init_from'] for r in seeds.values()}) < len(seeds):    # each seed may have its own
      out.append(f'row {row} mixes weights: {", ".join(sorted(weights))}')
  out += [f'{who} loaded no tensor of {r.about["init_from"]}' for who, _, r in all_
          if r.about['init_from'] and not r.about['loaded'][0]]
  out += [f'{who} is from scratch, yet loaded {r.about["loaded"][0]} tensors' for who, _, r in all_
          if not r.about['init_from'] and r.about['loaded'][0]]
  return out + _unlike(runs, all_)


def _unlike(runs, all_) -> list[str]:
  """Test cases, and all leaves that a row does not declare as its own, must be those of the base row."""
  name, _, first = next((a for a in all_ if a[1] == runs.base), all_[0])
  out = []
  for who, row, r in all_:
    if r.about['split_hash'] != first.about['split_hash']:
      out.append(f'split hashes differ: {who} {r.about["split_hash"]}, {name} {first.about["split_hash"]}')
    elif not same_cases(r, first):
      out.append(f'test cases of {who} are not those of {name}')
    changed = {k for k in r.config.keys() | first.config.keys() if r.config.get(k) != first.config.get(k)}
    foreign = {k for k in changed - runs.leaves[row].keys() - runs.leaves[runs.base].keys()
               if k.split('.')[0] not in SERVICE and k not in ('seed', 'data.workers')}
    if foreign:
      told = ', '.join(f'{k} {r.config.get(k)} / {first.config.get(k)}' for k in sorted(foreign))
      out.append(f'recipes differ: {who} / {name}: {told}')
    elif r.about['recipe_hash'] != first.about['recipe_hash'] and not changed & runs.leaves[row].keys() - {*ROW_LEAVES}:
      out.append(f'recipes differ: hash of {who} {r.about["recipe_hash"]}, of {name} {first.about["recipe_hash"]}')
  return out


def same_cases(a: Result, b: Result) -> bool:
  """Whether two results speak of the same cases, groups and truth."""
  return all(np.array_equal(a.cases.get(k, 0), b.cases.get(k, 0), equal_nan=k == 'truth')
             for k in ('id', 'group', 'truth'))


def _count(n, what) -> str:
  return f'{n} {what}' + ('' if n == 1 else 's')
