"""The parts of a page that are words and tables. Every function gives HTML in which all text of the run is escaped."""
from __future__ import annotations

import json
import time
from html import escape
from typing import NamedTuple

from ml_collections import ConfigDict

import unimiss_jax
from unimiss_jax import health
from unimiss_jax.progress import clock
from unimiss_jax.report import summary
from unimiss_jax.report.run_files import RunFiles

NEEDED = health.LAST      # rows of a phase, before anything can be said
FEW = 6                   # runs that are shown one by one; more are rows of one table


class Verdict(NamedTuple):
  """line: as the log tells it. found: health.Finding of all diseases. known: whether there was enough to judge by."""
  line: str
  found: list
  known: bool


def judged(run: RunFiles, chance: dict) -> Verdict:
  """The verdict on a run's last rows, whatever its config lacks.

  Args:
    chance: {phase: {metric: value}}; phases that are not in it are judged without.
  """
  rows = [r for r in run.rows if r['phase'] not in ('', 'eval')]
  phases = {r['phase']: chance.get(r['phase'], {}) for r in rows}
  if not any(sum(r['phase'] == p for r in rows) >= NEEDED for p in phases):
    return Verdict('not known yet: too few rows', [], False)
  try:
    found = health.findings(health.kept(run.rows), ConfigDict(run.config), phases)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    return Verdict(f'not known: config.json or metrics.jsonl lacks what it needs ({e})', [], False)
  return Verdict(health.line(run.steps(), found, health.kept(run.rows)), found, True)


def levels(run: RunFiles) -> dict:
  """{score: chance or None} of the evaluations that accompany a run."""
  of = run.config.get('eval') if isinstance(run.config.get('eval'), dict) else {}
  known = not of.get('knn') and 'unimedi' not in run.config
  known = known and all(isinstance(of.get(k), int) for k in ('records', 'fit'))
  return summary.known_chance(max(of['records'] - of['fit'], 0) if known else 0)


def table(head: list, rows: list, names: int = 1) -> str:
  """Cells are text, the first `names` columns words, the rest numbers."""
  cell = lambda tag, i, text: f'<{tag}{"" if i < names else " class=n"}>{escape(str(text))}</{tag}>'
  line = lambda tag, cells: '<tr>' + ''.join(cell(tag, i, c) for i, c in enumerate(cells)) + '</tr>'
  return (f'<div class="scroll"><table>{line("th", head) if head else ""}{"".join(line("td", r) for r in rows)}</table>'
          '</div>')


def facts(runs: list[RunFiles]) -> str:
  """The few numbers that one looks for first, of the first run."""
  run = runs[0]
  seconds, total = run.last('perf/seconds'), run.config.get('steps')
  devices = run.env.get('devices') if isinstance(run.env.get('devices'), list) else []
  state = 'complete' if run.done else 'not complete'
  told = {
      'method': f'{run.config.get("method", "?")}, preset {run.config.get("preset", "?")}',
      'steps': f'{run.steps()}' + (f' of {total}' if total else '') + f', {state}',
      'time': clock(seconds) if seconds else None,
      'cost': f'{seconds * len(devices) / 3600:.3g} device hours' if seconds and devices else None,
      'devices': f'{len(devices)} x {devices[0]}' if devices else None,
      'last score': next((f'{k[5:]} {run.last(k):.3f}' for k in levels(run) if run.last(k) is not None), None)}
  tiles = ''.join(f'<div><span class="dim">{k}</span><b>{escape(v)}</b></div>' for k, v in told.items() if v)
  return (f'<p class="dim">{escape(run.name)}, the first run:</p>' if len(runs) > 1 else '') + (
      f'<div class="facts">{tiles}</div>')


def verdict(runs, verdicts, ended: str) -> str:
  """What is wrong, its evidence and the knob to turn; of each run."""
  out = f'<div class="verdict bad"><b>ended by a fault</b><p>{escape(ended)}</p></div>' if ended else ''
  if len(runs) > FEW:
    return out + table(['run', 'steps', 'complete', 'verdict'], [
        [r.name, r.steps(), 'yes' if r.done else 'no', v.line.partition(': ')[2] or v.line]
        for r, v in zip(runs, verdicts)], 4)
  for run, v in zip(runs, verdicts):
    kind = 'bad' if v.found else 'good' if v.known else ''
    word = v.found[0].disease if v.found else 'healthy' if v.known else 'not known'
    told = ''.join(f'<p>{escape(f.evidence)}. <b>FIX</b> {escape(f.remedy)}</p>' for f in v.found) or (
        f'<p>{escape(v.line.partition(": ")[2] or v.line)}</p>')
    name = f'{escape(run.name)}: ' if len(runs) > 1 else ''
    out += f'<div class="verdict {kind}"><b>{name}{escape(word)}</b>{told}</div>'
  return out


def health_panel(runs, verdicts) -> str:
  """Every disease that is looked for, and what was found of it; of few runs."""
  if len(runs) > FEW:
    return ''
  head, rows = ['disease', *(r.name if len(runs) > 1 else 'found' for r in runs), 'told by'], []
  for disease, (_, names) in health.CHECKS.items():
    reads = (names,) if isinstance(names, str) else names
    cells = []
    for run, v in zip(runs, verdicts):
      mine = [f for f in v.found if f.disease == disease]
      if mine:
        cells.append(f'<td class="bad">{escape("; ".join(f.evidence for f in mine))}</td>')
      else:
        known = v.known and any(run.last(k) is not None for k in reads)      # no rows, no opinion
        cells.append('<td>no sign</td>' if known else '<td class="dim">not measured</td>')
    cells = [f'<td class="key">{escape(disease)}</td>', *cells, f'<td class="dim name">{escape(", ".join(reads))}</td>']
    rows.append(f'<tr>{"".join(cells)}</tr>')
  title = ''.join(f'<th>{escape(h)}</th>' for h in head[:-1]) + f'<th class="name">{head[-1]}</th>'
  return f'<div class="scroll"><table><tr>{title}</tr>{"".join(rows)}</table></div>'


def scores(runs, known: dict) -> str:
  """Evaluations at the start and at the end beside chance and raw pixels; of many runs the last values."""
  if len(runs) > FEW:
    names = sorted({k for r in runs for row in r.rows for k in row if k.startswith('eval/') and k.count('/') == 1
                    and not k.startswith('eval/raw_')})
    return table(['last evaluation', *(k[5:] for k in names)],
                 [[r.name, *(number(r.last(k)) for k in names)] for r in runs]) if names else ''
  out = ''
  for run in runs:
    evals = [r for r in run.rows if r['phase'] == 'eval']
    if not evals:
      continue
    first, last, rows = evals[0], evals[-1], []
    for k in last:
      if k.startswith('eval/') and not k.startswith('eval/raw_'):
        chance = known.get(k, .5 if k.startswith('eval/knn_auc') else None)
        rows.append([k[5:], number(first.get(k)), number(last[k]), number(chance),
                     number(first.get(k.replace('eval/', 'eval/raw_', 1)))])
    if rows:
      name = f'{run.name}: ' if len(runs) > 1 else ''
      out += (f'<h3>{escape(name)}evaluations, step {first["step"]} to {last["step"]}</h3>'
              + table(['score', 'start', 'end', 'chance', 'raw pixels'], rows))
  return out


def tested(runs) -> str:
  """eval/test.json of runs that have one; of many runs what stands for all classes."""
  if len(runs) > FEW:
    names = sorted({k for r in runs for k in r.test.get('scores') or () if '/' not in k})
    value = lambda r, k: number((r.test.get('scores') or {}).get(k))
    return table(['test', *names], [[r.name, *(value(r, k) for k in names)] for r in runs]) if names else ''
  out = ''
  for run in runs:
    found = run.test.get('scores')
    if isinstance(found, dict) and found:
      control, between = run.test.get('control') or {}, run.test.get('interval') or {}
      rows = [[k, number(v), ' – '.join(map(number, between.get(k) or ())), number(control.get(f'chance/{k}')),
               number(control.get(f'raw/{k}'))] for k, v in found.items()]
      out += (f'<h3>{escape(run.name)}: {escape(str(run.test.get("cases", "?")))} test cases</h3>'
              + table(['score', 'test', '95 % interval', 'chance', 'raw pixels'], rows))
  return out


def data(run: RunFiles) -> str:
  """What was trained on, and what the data doctor says of it."""
  of = run.config.get('data') if isinstance(run.config.get('data'), dict) else {}
  named = [(k, of[k]) for k in ('manifest', 'ct', 'xray', 'modality') if of.get(k)]
  if of and not any(of.get(k) for k in ('manifest', 'ct', 'xray')):
    named.append(('records', f'{of.get("phantom_records", "?")} built-in phantoms a stream'))
  wait, bad = run.last('data/wait_frac'), run.last('data/bad_records')
  named += [('wait for data', f'{wait:.1%} of the time')] if wait is not None else []
  named += [('bad records', f'{bad:g}')] if bad is not None else []
  out = table([], named, 2) if named else ''
  for what, counts in run.manifest.items():
    if isinstance(counts, dict) and counts:
      out += f'<h3>manifest: {escape(what)}</h3>' + table(['', 'rows'], list(counts.items()))
  return out


def history(run: RunFiles) -> str:
  """Lives, verdicts, warnings and errors, from the log."""
  if not run.history:
    return ''
  lives = sum('parameters' in text and 'preset' in text for _, _, text in run.history)
  resumed = [text.partition(' | ')[0] for _, _, text in run.history if text.startswith('resumed step')]
  told = f'{lives} {"life" if lives == 1 else "lives"}; ' + (', '.join(resumed) if resumed else 'never resumed')
  return f'<p>{escape(told)}</p>' + table(['time', 'level', 'what'], run.history, 3)


def config(runs, preset: dict | None) -> str:
  """What differs from the preset, and between runs; then all leaves."""
  leaves = [flat(r.config) for r in runs]
  out = ''
  if preset is None:
    out += '<p class="dim">The preset is not at hand here, so differences from it are not shown.</p>'
  elif leaves[0]:
    changed = [[k, plain(preset.get(k, '(none)')), plain(leaves[0].get(k, '(none)'))]
               for k in sorted({*preset, *leaves[0]}) if plain(preset.get(k)) != plain(leaves[0].get(k))]
    out += '<h3>Differences from the preset</h3>' + (table(['leaf', 'preset', 'run'], changed, 3) if changed else
                                                     '<p>none</p>')
  if len(runs) > 1:
    unlike = [k for k in sorted(set().union(*leaves)) if len({plain(c.get(k)) for c in leaves}) > 1]
    rows = [[r.name, *(plain(c.get(k, '(none)')) for k in unlike)] for r, c in zip(runs, leaves)]
    out += '<h3>Differences between the runs</h3>' + (table(['run', *unlike], rows, len(unlike) + 1) if unlike else
                                                      '<p>none</p>')
  rows = [[k, plain(v)] for k, v in sorted(leaves[0].items())]
  return out + (f'<details><summary>all {len(rows)} leaves</summary>{table([], rows, 2)}</details>' if rows else '')


def environment(runs) -> str:
  """Command, versions, devices; of many runs those of the first."""
  out = ''
  for run in runs if len(runs) <= FEW else runs[:1]:
    rows = [[k, ' '.join(map(str, v)) if k == 'command' and isinstance(v, list) else plain(v)]
            for k, v in flat(run.env).items()]
    cost = [[k.removeprefix('perf/'), f'{v:.0f}'] for k in ('perf/seconds', 'perf/cpu_seconds')
            if (v := run.last(k)) is not None]
    if rows or cost:
      out += (f'<h3>{escape(run.name)}</h3>' if len(runs) > 1 else '') + table([], rows + cost, 2)
  return out


def made() -> str:
  """When and by what."""
  return (f'unimiss_jax {unimiss_jax.__version__}, {time.strftime("%Y-%m-%d %H:%M:%S")}. Research use only; not a '
          'medical device.')


def flat(tree, prefix='') -> dict:
  """Nested dict -> {'a.b': value}."""
  out = {}
  for k, v in tree.items():
    out |= flat(v, f'{prefix}{k}.') if isinstance(v, dict) else {f'{prefix}{k}': v}
  return out


def plain(value) -> str:
  """A leaf as text: tuples and lists alike."""
  return value if isinstance(value, str) else json.dumps(value, default=str)


def number(value) -> str:
  return f'{value:.3f}' if isinstance(value, (int, float)) else ''
