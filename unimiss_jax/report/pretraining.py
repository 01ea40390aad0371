"""The table of an ablation: what pre-trainings of one grid reach in the evaluation that accompanies them.

Scores are those of the last step, means over seeds with the standard deviation between them (n - 1), beside chance, raw
pixels and the untrained encoder of the same seeds. A row's difference to the base row, or to the one that its grid
names (`against`), is the mean over the seeds that both have; its interval is Student's over these seeds, so it speaks
of other trainings on other data of the same kind.
"""
from __future__ import annotations

import csv
import io
import json
from typing import NamedTuple

import numpy as np
from etils import epath
from scipy import stats

from unimiss_jax.report import summary
from unimiss_jax.report.comparison import FILES, NOT, SHOWN, Row, grid_of, spread
from unimiss_jax.report.results import SEEDS, SERVICE, ComparisonError, Runs, read

SCORES = {'eval/knn_auc_ct': 'kNN CT', 'eval/knn_auc_xray': 'kNN X-ray', 'eval/drr_to_ct_r10': 'DRR→CT R@10',
          'eval/xray_to_ct_r10': 'X-ray→CT R@10'}
HOW = ('Of the last step; mean ± standard deviation over seeds; in brackets the mean difference to the base row, or to '
       "the one that stands under against, over the seeds that both have, with Student's 95 % interval over them. "
       'Untrained: step 0 of the base row. Rows with DRR of another kind look for CT by those: no difference is given.')


class Result(NamedTuple):
  """A finished pre-training: {score: value} of its first and of its last evaluation, {leaf: value} of its config."""
  first: dict
  last: dict
  config: dict


def load(run) -> Result:
  """Raises ComparisonError where a run has not evaluated itself."""
  from unimiss_jax.workdir import flat  # late: it loads jax
  found = [r for r in summary.rows(run) if r.get('phase') == 'eval']
  if not found or not any(name in found[-1] for name in SCORES):
    raise ComparisonError(f'{run} is done, but holds no evaluation. FIX: leave eval.tasks on; delete the folder to run '
                          'it anew')
  return Result(found[0], found[-1], flat(json.loads((run / 'config.json').read_text())))


def write(folder, grid: str, leaves: dict, base: str, draft: bool = False, against: dict | None = None) -> list[str]:
  """results.md, results.csv and, where matplotlib is installed, results.png; as comparison.write.

  Args:
    against: {row: the one that it is compared with, where that is not the base}.
  """
  folder = epath.Path(folder)
  for name in FILES:
    (folder / name).unlink(missing_ok=True)
  runs = read(folder, leaves, base, 1., load)._replace(against=against or {})
  faults = lacking(runs)
  if faults and not draft or not any(runs.rows.values()) and not runs.failed:
    told = '; '.join(faults[:SHOWN]) + (f' and {len(faults) - SHOWN} more' if len(faults) > SHOWN else '')
    raise ComparisonError(f'results of {grid} refused: {told}. FIX: run what lacks, or --draft to see it')
  found, title = rows(runs), grid + (f' ({NOT})' if faults else '')
  text = markdown(title, runs, found, faults)
  (folder / 'results.md').write_text(text)
  (folder / 'results.csv').write_text(table(grid, runs, found, not faults))
  lines = [text.strip()]
  try:
    if found:
      (folder / 'results.png').write_bytes(picture(title, runs, found))
  except ImportError:
    lines += ['results.png needs matplotlib. FIX: pip install -e ".[report]"']
  return lines + [f'{folder}: {", ".join(f for f in FILES if (folder / f).exists())}']


def lacking(runs: Runs) -> list[str]:
  """Why a table of these runs may not be reported; empty if it may."""
  out = ['no run is finished'] if not any(runs.rows.values()) else []
  if runs.unfinished:
    out.append(f'unfinished: {", ".join(runs.unfinished)}')
  base = runs.rows.get(runs.base, {})
  for row, seeds in runs.rows.items():
    if seeds and len(seeds.keys() & base.keys()) < SEEDS:
      out.append(f'row {row} shares {len(seeds.keys() & base.keys())} seeds with {runs.base}, at least {SEEDS} are '
                 'needed')
    for seed, r in seeds.items():
      like = next(iter(base.values()), r)
      changed = {k for k in r.config.keys() | like.config.keys() if r.config.get(k) != like.config.get(k)}
      own = runs.leaves[row].keys() | runs.leaves[runs.base].keys() | {'seed', 'data.workers', 'preset'}
      foreign = sorted(k for k in changed - own if k.split('.')[0] not in SERVICE)
      if foreign and 'config' not in runs.leaves[row]:
        out.append(f'recipes differ: {row} seed {seed} / {runs.base}: {", ".join(foreign[:SHOWN])}')
  return out


def rows(runs: Runs) -> list[Row]:
  """Chance, raw pixels and the untrained encoder, then the rows of the grid in its order."""
  base = runs.rows.get(runs.base, {})
  firsts = [base[s].first for s in sorted(base)]
  out = []
  if base:
    leaves = base[min(base)].config
    level = [0.5 if 'knn' in k else 10 / (leaves['eval.records'] - leaves['eval.fit']) for k in SCORES]
    out.append(Row('chance', [], {k: [v] for k, v in zip(SCORES, level) if k in base[min(base)].last
                                  and ('knn' in k or not leaves['eval.knn'])}))
  for name, prefix in (('raw pixels', 'eval/raw_'), ('untrained', 'eval/')):
    scores = _columns([{k: f[k.replace('eval/', prefix, 1)] for k in SCORES if k.replace('eval/', prefix, 1) in f}
                       for f in firsts])
    if scores:
      out.append(Row(name, sorted(base), scores))
  for name, seeds in runs.rows.items():
    if seeds:
      last = [seeds[s].last for s in sorted(seeds)]
      cost = {k: float(np.mean([r[f'perf/{k}'] for r in last])) for k in ('seconds', 'cpu_seconds')
              if all(f'perf/{k}' in r for r in last)}
      out.append(Row(name, sorted(seeds), _columns(last), None, cost | {'step': float(last[0]['step'])}))
  return out


def _columns(each: list[dict]) -> dict[str, list]:
  return {k: [float(e[k]) for e in each] for k in SCORES if each and all(k in e for e in each)}


def difference(a: dict, b: dict, score: str) -> tuple[float, float, float] | None:
  """Mean of a - b, {seed: Result} each, over the seeds that both have, and its interval; None with fewer than two."""
  d = [a[s].last[score] - b[s].last[score] for s in sorted(a.keys() & b.keys())
       if score in a[s].last and score in b[s].last]
  if len(d) < 2:
    return None
  half = stats.t.ppf(.975, len(d) - 1) * np.std(d, ddof=1) / len(d)**.5
  return float(np.mean(d)), float(np.mean(d) - half), float(np.mean(d) + half)


def markdown(title: str, runs: Runs, found: list[Row], faults=()) -> str:
  lines = [f'# {title}', '']
  if faults:
    lines += [f'**{NOT.capitalize()}**: {"; ".join(faults)}.', '']
  if found:
    names = [n for n in SCORES if any(n in r.scores for r in found)]
    head = ['row', *['against'] * bool(runs.against), 'seeds', *(SCORES[n] for n in names), 's', 'CPU s', 'steps']
    rival = lambda r: [runs.against.get(r.name, '')] * bool(runs.against)
    cells = lambda r: [r.name, *rival(r), str(len(r.seeds)), *(_cell(runs, r, n) for n in names),
                       *(f'{r.cost[k]:.0f}' if k in r.cost else '' for k in ('seconds', 'cpu_seconds', 'step'))]
    lines += grid_of(head, [cells(r) for r in found])
  return '\n'.join([*lines, '', *(f'- {line}' for line in runs.failed), *[''] * bool(runs.failed), HOW, ''])


def to_base(runs: Runs, row: str, score: str) -> tuple[float, float, float] | None:
  """`difference` of a row to the one that it is compared with; None where they cannot be: a row whose DRR are other
  pictures is asked to find CT by those."""
  rival = runs.rival(row)
  drr = [{k: v for k, v in runs.leaves.get(r, {}).items() if k.startswith('drr.')} for r in (row, rival)]
  if row not in runs.rows or row == rival or drr[0] != drr[1] and score == 'eval/drr_to_ct_r10':
    return None
  return difference(runs.rows[row], runs.rows.get(rival, {}), score)


def _cell(runs, row, score) -> str:
  d = to_base(runs, row.name, score)
  return spread(row.scores.get(score, ())) + (' ({:+.3f} [{:+.3f}, {:+.3f}])'.format(*d) if d else '')


def table(grid: str, runs: Runs, found: list[Row], reportable: bool) -> str:
  """CSV: a line for each row and score."""
  out = io.StringIO()
  w = csv.writer(out, lineterminator='\n')
  w.writerow(['grid', 'reportable', 'row', 'score', 'n', 'mean', 'sd', 'values', 'seeds', 'difference', 'low', 'high',
              'seconds', 'cpu_seconds', 'step'])
  for row in found:
    for name, values in row.scores.items():
      d = to_base(runs, row.name, name)
      w.writerow([grid, 'yes' if reportable else 'no', row.name, name[5:], len(values), np.mean(values),
                  np.std(values, ddof=1) if len(values) > 1 else '', ' '.join(map(repr, values)),
                  ' '.join(map(str, row.seeds)), *(d or ('',) * 3),
                  *(row.cost.get(k, '') for k in ('seconds', 'cpu_seconds', 'step'))])
  for line in runs.failed:
    w.writerow([grid, 'no', line] + [''] * 12)
  return out.getvalue()


def picture(title: str, runs: Runs, found: list[Row]) -> bytes:
  """PNG: a panel for each score, every seed of every row, controls as lines. Raises ImportError: no matplotlib."""
  from matplotlib.figure import Figure
  names = [n for n in SCORES if any(n in r.scores for r in found)]
  mine = [r for r in found if r.name in runs.rows]
  fig = Figure((2.2 + 2.6 * len(names), max(.32 * len(mine) + 1.2, 2.4)), layout='constrained')
  fig.suptitle(title)
  for axis, name in zip(fig.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
    for row in found:
      values = row.scores.get(name)
      if row.name not in runs.rows and values:
        axis.axvline(np.mean(values), color='.55', lw=1, ls='--' if row.name == 'raw pixels' else ':', zorder=0)
    for y, row in enumerate(mine):
      values, color = row.scores.get(name, []), 'C3' if row.name == runs.base else 'C0'
      axis.plot(values, [y] * len(values), 'o', ms=4, alpha=.5, color=color)
      if values:
        axis.plot(np.mean(values), y, '|', ms=14, mew=2, color=color)
    axis.set_title(SCORES[name], fontsize=10)
    axis.set_yticks(range(len(mine)), [r.name for r in mine])
    axis.set_ylim(len(mine) - .5, -.5)
    axis.locator_params(axis='x', nbins=4)
  fig.supxlabel('seeds and their mean; dashed: raw pixels, dotted: untrained', fontsize=9)
  out = io.BytesIO()
  fig.savefig(out, format='png', dpi=120)
  return out.getvalue()
