"""The curves of a page: which metrics stand in one chart, and so few points of them that the page stays small."""
from __future__ import annotations

from typing import NamedTuple

from unimiss_jax.report.run_files import RunFiles

POINTS = 800        # of a series, at most; of many runs together POINTS * FEW / runs
FEW = 4
GROUPS = {          # title: what the names of its metrics begin with, or end with
    'Losses': lambda k: k.startswith('train/') and k.endswith('loss'),
    'Evaluation': lambda k: k.startswith('eval/') and k.count('/') == 1 and not k.startswith('eval/raw_'),
    'Health': lambda k: k.startswith(('collapse/', 'train/grad_norm', 'train/update_norm', 'train/skip')),
    'Throughput': lambda k: k.startswith('perf/') and k.endswith('_per_s') or k == 'data/wait_frac',
    'Schedules': lambda k: k in ('train/lr', 'train/wd', 'train/momentum', 'train/teacher_temp'),
    'Evaluation by finding': lambda k: k.startswith('eval/') and k.count('/') == 2 and not k.startswith('eval/raw_'),
    'Others': lambda k: not k.startswith('eval/raw_') and k not in ('perf/seconds', 'perf/cpu_seconds'),
}
OPEN = 'Losses', 'Evaluation', 'Health', 'Throughput'      # the others are folded


class Chart(NamedTuple):
  """title: the metric. series: [{'run': number, 'phase', 'x': [step], 'y': [value or None]}].
  levels: {what it is: value}, drawn across."""
  title: str
  series: list
  levels: dict

  def plain(self) -> dict:
    """As JSON takes it."""
    return self._asdict()


def charts(runs: list[RunFiles], chance: dict, scores: dict) -> dict[str, list[Chart]]:
  """{group: charts} of all metrics of the runs, each metric once.

  Args:
    chance: {phase: {metric: value for a network that tells nothing apart}} of the first run.
    scores: {score of an evaluation: its chance or None}.
  """
  found = {}      # metric -> {(run, phase): ([x], [y])}
  for n, run in enumerate(runs):
    for row in run.rows:
      for name, value in row.items():
        if name not in ('step', 'phase'):
          x, y = found.setdefault(name, {}).setdefault((n, row['phase']), ([], []))
          x.append(row['step'])
          y.append(value)
  left, out = dict(found), {}
  most = max(POINTS * FEW // max(len(runs), FEW), 100)
  for group, belongs in GROUPS.items():
    names = [k for k in sorted(left) if belongs(k)]
    made = [Chart(k, [{'run': n, 'phase': p, **thinned(*xy, most)} for (n, p), xy in left.pop(k).items()],
                  _levels(k, runs[0], chance, scores)) for k in names]
    if made:
      out[group] = made
  return out


def thinned(x: list, y: list, most: int) -> dict:
  """{'x', 'y'} with about `most` points: of each stretch the lowest and the highest, so that a spike stays; a value
  that is not finite is a gap. Five digits."""
  order = sorted(range(len(x)), key=x.__getitem__)
  size = max(1, -(-2 * len(order) // most))
  keep = []
  for start in range(0, len(order), size):
    part = order[start:start + size]
    real = [i for i in part if y[i] is not None]
    keep += [min(real, key=y.__getitem__), max(real, key=y.__getitem__)] if real else part[:1]
  keep = sorted({*keep, *order[:1], *order[-1:]}, key=x.__getitem__)
  return {'x': [x[i] for i in keep], 'y': [None if y[i] is None else float(f'{y[i]:.5g}') for i in keep]}


def _levels(name, run, chance, scores) -> dict:
  of = {phase: values[name] for phase, values in chance.items() if name in values}
  out = {'chance': scores.get(name, next(iter(of.values()), None))}
  if len(set(of.values())) > 1:      # each phase has its own
    out = {f'chance {phase}': value for phase, value in of.items()}
  raw = run.last(name.replace('eval/', 'eval/raw_', 1)) if name.startswith('eval/') else None
  blur = name.replace('train/recon_', 'collapse/blur_recon_').removesuffix('_loss')
  blurred = run.last(blur) if name.startswith('train/recon_') else None
  return {k: float(f'{v:.5g}') for k, v in (out | {'raw pixels': raw, 'blurred input': blurred}).items()
          if v is not None}
