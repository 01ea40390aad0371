"""The table of a comparison: what rows of one recipe score over seeds, beside chance, raw pixels and random features.

Scores are means over seeds with the standard deviation between them (n - 1). A row's difference to the base row is the
mean over the seeds that both have; its interval comes from the test cases alone (percentile bootstrap over groups, i.e.
patients, drawn alike for both rows and all seeds), so it says nothing of other trainings or other data.
"""
from __future__ import annotations

import csv
import io
from typing import NamedTuple

import numpy as np
from etils import epath

from unimiss_jax.evals.bootstrap import DRAWS, paired
from unimiss_jax.evals.knn import auroc
from unimiss_jax.report.results import CONTROLS, ComparisonError, Runs, lacking, same_cases

SHOWN = 4      # faults in a message
NOT = 'not reportable'
HOW = ('Mean ± standard deviation over seeds. Differences: over the seeds that both rows have; the interval comes from '
       f'{DRAWS} draws of the groups of test cases and says nothing of the spread between trainings.')
FILES = ('results.md', 'results.csv', 'results.png')


class Row(NamedTuple):
  """One row of the table: a row of the grid, or a control that was trained on the same cases.

  Attributes:
    scores: {score: [value of every seed]}. difference: (value, low, high) to the base row, or None.
    cost: {'seconds' | 'cpu_seconds' | 'step': mean over seeds}. loaded: 'n/N' tensors.
  """
  name: str
  seeds: list
  scores: dict
  difference: tuple | None = None
  cost: dict = {}
  loaded: str = ''
  weights: str = ''


def write(folder, grid: str, parts: list[Runs], draft: bool = False) -> list[str]:
  """results.md, results.csv and, where matplotlib is installed, results.png in the folder of a grid.

  Args:
    parts: the runs of each fraction.
    draft: write what is no result too, and say so in the title.

  Returns:
    Lines for the user: the table, and where it lies.

  Raises:
    ComparisonError: what lacks; results.* of an earlier call are gone then.
  """
  folder = epath.Path(folder)
  for name in FILES:
    (folder / name).unlink(missing_ok=True)
  faults = [f'f{p.fraction:g}: {fault}' for p in parts for fault in lacking(p)]
  if faults and not draft:
    told = '; '.join(faults[:SHOWN]) + (f' and {len(faults) - SHOWN} more' if len(faults) > SHOWN else '')
    raise ComparisonError(f'results of {grid} refused: {told}. FIX: run what lacks, or --draft to see it')
  tables = [(p, rows(p)) for p in parts if p.main() or p.failed]
  if not tables:
    raise ComparisonError(f'results of {grid}: {"; ".join(faults)}')
  title = grid + (f' ({NOT})' if faults else '')
  text = markdown(title, tables, faults)
  (folder / 'results.md').write_text(text)
  (folder / 'results.csv').write_text(table(grid, tables, not faults))
  lines = [text.partition('\n## All scores')[0].strip()]
  try:
    if any(found for _, found in tables):
      (folder / 'results.png').write_bytes(picture(title, tables))
  except ImportError:
    lines += ['results.png needs matplotlib. FIX: pip install -e ".[report]"']
  return lines + [f'{folder}: {", ".join(f for f in FILES if (folder / f).exists())}']


def rows(runs: Runs) -> list[Row]:
  """Controls, then the rows of the grid in its order."""
  base = runs.rows.get(runs.base, {})
  controlled = base or next((r for r in runs.rows.values() if r), {})
  out = []
  for control, name in CONTROLS.items():
    scores = _by_score([{k.partition('/')[2]: v for k, v in r.about['control'].items()
                         if k.startswith(f'{control}/')} for _, r in sorted(controlled.items())])
    if scores:
      out.append(Row(name, sorted(controlled), scores))
  for name, seeds in runs.rows.items():
    found = [seeds[s] for s in sorted(seeds)]
    if found:
      about = [r.about for r in found]
      out.append(Row(name, sorted(seeds), _by_score([a['scores'] for a in about]),
                     difference(seeds, base) if name != runs.base else None,
                     {k: float(np.mean([a[k] for a in about])) for k in ('seconds', 'cpu_seconds', 'step')},
                     ' '.join(sorted({'/'.join(map(str, a['loaded'])) for a in about})),
                     ' '.join(sorted({a['init_from'] for a in about}))))
  return out


def _by_score(each: list[dict]) -> dict[str, list]:
  """[{score: value} of every seed] -> {score: [values]}, scores that all have."""
  return {k: [float(e[k]) for e in each] for k in (each[0] if each else ()) if all(k in e for e in each)}


def difference(a: dict, b: dict) -> tuple[float, float, float] | None:
  """Main score of row `a` over row `b`, {seed: Result} each, on the seeds that both have: (value, low, high)."""
  seeds = sorted(s for s in a.keys() & b.keys() if same_cases(a[s], b[s]))
  seeds = [s for s in seeds if same_cases(a[s], a[seeds[0]])]
  if not seeds:
    return None
  first = a[seeds[0]]
  column, metric = ('probability', _auroc) if first.about['kind'] == 'cls' else ('dice', _dice)
  values = [np.stack([row[s].cases[column] for s in seeds]).swapaxes(0, 1) for row in (a, b)]      # [N, seeds, C]
  over_seeds = lambda x, truth: np.mean([metric(x[:, i], truth) for i in range(len(seeds))])
  truth = first.cases.get('truth', np.zeros(len(first.cases['id'])))
  return paired(over_seeds, *values, truth, first.cases['group'], DRAWS, 0)


def _auroc(probability, truth) -> float:
  """[N, C], [N, C] with NaN = not known; mean of the classes that have both kinds of cases."""
  known = np.isfinite(truth)
  each = [auroc(p[k], t[k]) for p, t, k in zip(probability.T, truth.T, known.T)]
  return float(np.mean([v for v in each if np.isfinite(v)] or [np.nan]))


def _dice(dice, truth) -> float:
  """Mean over cases of the mean over classes. [N, C], NaN = the class does not count in this case."""
  known = np.isfinite(dice)
  each = np.where(known, dice, 0).sum(1)[known.any(1)] / known.sum(1)[known.any(1)]
  return float(each.mean()) if len(each) else float('nan')


def markdown(title: str, tables, faults=()) -> str:
  """The page: one table of the main score per fraction, all scores behind."""
  lines, details = [f'# {title}', ''], ['## All scores', '']
  if faults:
    lines += [f'**{NOT.capitalize()}**: {"; ".join(faults)}.', '']
  for runs, found in tables:
    heading, main = f'{100 * runs.fraction:g} % of the labels', runs.main()
    lines += [f'## {heading}', '']
    if found:
      head = ['row', 'seeds', main, 'single values', f'difference to {runs.base} [95 %]', 's', 'CPU s',
              'tested step', 'loaded']
      lines += grid_of(head, [_cells(row, main) for row in found])
      names = list(dict.fromkeys(k for row in found for k in row.scores))
      details += [f'### {heading}', '']
      details += grid_of(['score', *(row.name for row in found)],
                       [[k, *(spread(row.scores.get(k, ())) for row in found)] for k in names]) + ['']
    lines += ['', *(f'- {line}' for line in runs.failed), *[''] * bool(runs.failed), *_notes(runs, found)]
  return '\n'.join(lines + [HOW, ''] + details)


def grid_of(head, body) -> list[str]:
  return ['| ' + ' | '.join(cells) + ' |' for cells in (head, ['---'] * len(head), *body)]


def _cells(row: Row, main: str) -> list[str]:
  values = row.scores.get(main, [])
  cost = [f'{row.cost[k]:.0f}' if k in row.cost else '' for k in ('seconds', 'cpu_seconds', 'step')]
  return [row.name, str(len(row.seeds)), spread(values), ' '.join(f'{v:.3f}' for v in values),
          '{:+.3f} [{:+.3f}, {:+.3f}]'.format(*row.difference) if row.difference else '', *cost, row.loaded]


def spread(values) -> str:
  """'mean ± sd'."""
  if not len(values):
    return ''
  return f'{np.mean(values):.3f}' + (f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else '')


def _notes(runs, found) -> list[str]:
  first = next((r for seeds in runs.rows.values() for r in seeds.values()), None)
  if first is None:
    return []
  n, groups = len(first.cases['id']), len(np.unique(first.cases['group']))
  weights = [f'{row.name} `{row.weights}`' for row in found if row.weights]
  about = first.about
  return [f'{n} test cases of {groups} groups; split {about["split_hash"]}, recipe {about["recipe_hash"]}.'
          + (f' Weights: {", ".join(weights)}.' if weights else ''), '']


def table(grid: str, tables, reportable: bool) -> str:
  """CSV: a line for each fraction, row and score; difference and interval stand with the main score."""
  out = io.StringIO()
  w = csv.writer(out, lineterminator='\n')
  w.writerow(['grid', 'reportable', 'fraction', 'row', 'score', 'n', 'mean', 'sd', 'values', 'seeds', 'difference',
              'low', 'high', 'seconds', 'cpu_seconds', 'step', 'loaded', 'weights'])
  for runs, found in tables:
    for row in found:
      for name, values in row.scores.items():
        delta = row.difference if row.difference and name == runs.main() else ('',) * 3
        w.writerow([grid, 'yes' if reportable else 'no', f'{runs.fraction:g}', row.name, name, len(values),
                    np.mean(values), np.std(values, ddof=1) if len(values) > 1 else '', ' '.join(map(repr, values)),
                    ' '.join(map(str, row.seeds)), *delta,
                    *(row.cost.get(k, '') for k in ('seconds', 'cpu_seconds', 'step')), row.loaded, row.weights])
    for line in runs.failed:
      w.writerow([grid, 'no', f'{runs.fraction:g}', line] + [''] * 14)
  return out.getvalue()


def picture(title: str, tables) -> bytes:
  """PNG: for each fraction every seed of every row beside its controls, and the differences to the base row.

  Raises:
    ImportError: no matplotlib.
  """
  from matplotlib.figure import Figure
  tables = [(runs, found) for runs, found in tables if found]
  height = sum(len(found) + 2 for _, found in tables)
  fig = Figure((10, max(.36 * height, 2.5)), layout='constrained')
  axes = fig.subplots(len(tables), 2, sharex='col', squeeze=False, gridspec_kw={
      'height_ratios': [len(found) + 1 for _, found in tables], 'width_ratios': (3, 2)})
  fig.suptitle(title)
  for (runs, found), (left, right) in zip(tables, axes):
    main = runs.main()
    for y, row in enumerate(found):
      values = row.scores.get(main, [])
      control = row.name in CONTROLS.values()
      color = '.55' if control else 'C3' if row.name == runs.base else 'C0'
      if not values:
        continue
      if control:
        left.axvline(np.mean(values), color=color, lw=1, ls=':' if row.name == 'chance' else '--', zorder=0)
      left.errorbar(np.mean(values), y, xerr=np.std(values, ddof=1) if len(values) > 1 else 0, fmt='|', ms=14, mew=2,
                    color=color, lw=1)
      left.plot(values, [y] * len(values), 'o', ms=4, alpha=.5, color=color)
      if row.difference:
        d, low, high = row.difference
        right.plot([low, high], [y, y], '|-', ms=10, color=color)
        right.plot(d, y, 'o', ms=5, color=color)
    right.axvline(0, color='C3', lw=1, zorder=0)
    left.set_yticks(range(len(found)), [f'{row.name} (n {len(row.seeds)})' for row in found])
    left.set_ylim(len(found) - .5, -.5)
    right.sharey(left)
    right.tick_params(labelleft=False)
    right.locator_params(axis='x', nbins=5)
    left.set_title(f'{100 * runs.fraction:g} % of the labels', loc='left', fontsize=10)
    left.set_xlabel(f'{main}: seeds, mean ± sd')
    right.set_xlabel(f'difference to {runs.base}, 95 % of the test cases')
  out = io.BytesIO()
  fig.savefig(out, format='png', dpi=120)
  return out.getvalue()
