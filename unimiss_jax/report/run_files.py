"""What lies in a run's folder, read for a page: nothing is required, what is torn or lacks is left out."""
from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import NamedTuple

from etils import epath

from unimiss_jax.report import summary

TOLD = re.compile(r'preset .* parameters|resumed step|saved step|^HEALTH| unreadable|the run ends')    # of the log
HISTORY = 80      # lines of the log on a page
MOST_BYTES = 100 << 20   # of a manifest that is counted
LINE = re.compile(r'(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (\w+) (.*)')


class RunFiles(NamedTuple):
  """Attributes:
    name: what the run is called on the page.
    folder: epath.
    config, env, test: config.json, env.json, eval/test.json; {} where there is none.
    rows: of metrics.jsonl.
    pictures: {stream or file: [(step or None, epath)]}, by step.
    history: [(time, level, text)], what the log says of lives, health and faults.
    manifest: {'status', 'split', 'findings': {name: rows}} of the run's manifest; {} without one.
    done: whether the run is complete.
  """
  name: str
  folder: epath.Path
  config: dict
  env: dict
  test: dict
  rows: list
  pictures: dict
  history: list
  manifest: dict
  done: bool

  def steps(self) -> int:
    """Steps that were taken, as far as rows tell."""
    return max((r['step'] + (r.get('phase') != 'eval') for r in self.rows), default=0)

  def last(self, name: str):
    """The last value of a metric, or None."""
    return next((r[name] for r in reversed(self.rows) if r.get(name) is not None), None)


def load(folder, name: str = '') -> RunFiles:
  """Reads a run's folder; `name` = how it is called, '' = its last part."""
  folder = epath.Path(folder)
  config = _json(folder / 'config.json')
  return RunFiles(name or folder.name, folder, config, _json(folder / 'env.json'), _json(folder / 'eval' / 'test.json'),
                  _rows(folder), _pictures(folder), _history(folder), _manifest(config), (folder / 'DONE').exists())


def below(folder) -> list:
  """The folders of runs: the folder itself, or all below it (a sweep), in order."""
  folder = epath.Path(folder)
  if (folder / 'config.json').exists():
    return [folder]
  return sorted(p.parent for depth in range(1, 5) for p in folder.glob('*/' * depth + 'config.json'))


def names(folders) -> list[str]:
  """What tells folders apart: their paths without what all share at the start and at the end, their last part if they
  are one."""
  parts = [str(f).rstrip('/').split('/') for f in folders]
  if len(parts) < 2:
    return [p[-1] for p in parts]
  start = next((i for i, level in enumerate(zip(*parts)) if len(set(level)) > 1), min(map(len, parts)) - 1)
  return ['/'.join(p[start:]) or p[-1] for p in parts]


def _json(path) -> dict:
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _rows(folder) -> list[dict]:
  """Whole rows with a step, their finite numbers and their phase."""
  try:
    found = summary.rows(folder)
  except (OSError, ValueError):
    return []
  number = lambda v: isinstance(v, (int, float)) and math.isfinite(v)
  values = lambda r: {k: v if number(v) else None for k, v in r.items() if k not in ('step', 'phase')}
  return [{'step': int(r['step']), 'phase': str(r.get('phase', ''))} | values(r)
          for r in found if isinstance(r, dict) and number(r.get('step'))]


def _pictures(folder) -> dict:
  out = {}
  for place in ('report', 'eval'):
    for path in sorted((folder / place).glob('*.png')) if (folder / place).exists() else ():
      stream, _, step = path.stem.rpartition('_')
      key, at = (stream, int(step)) if stream and step.isdecimal() else (path.stem, None)
      out.setdefault(key, []).append((at, path))
  return {k: sorted(v, key=lambda p: (p[0] is not None, p[0])) for k, v in out.items()}


def _history(folder) -> list:
  """Of the log of process 0: lives, verdicts, warnings and errors; the first and the last ones where they are many."""
  file = folder / 'logs' / 'host_0.txt'
  if not file.exists():
    return []
  found = [m.groups() for m in map(LINE.match, file.read_bytes().decode(errors='replace').splitlines())
           if m and (m[2] in ('WARNING', 'ERROR') or TOLD.search(m[3]))]
  cut = len(found) - HISTORY
  return found if cut <= 0 else [*found[:HISTORY // 2], ('', '', f'... {cut} lines ...'), *found[-HISTORY // 2:]]


def _manifest(config) -> dict:
  """{'manifest', 'status', 'split', 'findings': {name: count}}: what the data doctor wrote into the rows."""
  listed = config.get('data', {}).get('manifest') if isinstance(config.get('data'), dict) else ''
  if not isinstance(listed, str) or not listed:
    return {}
  path = epath.Path(listed)
  path = path if path.suffix == '.jsonl' else path / 'manifest.jsonl'
  counts = {'status': Counter(), 'split': Counter(), 'findings': Counter()}
  try:
    if path.stat().length > MOST_BYTES:
      return {}
    for row in map(json.loads, path.read_text().splitlines()):
      counts['status'][str(row.get('status', 'ok'))] += 1
      counts['split'][str(row.get('split', ''))] += 1
      counts['findings'].update(map(str, row.get('findings') or ()))
  except (OSError, ValueError, AttributeError, TypeError):
    return {}
  return {'manifest': str(path)} | {k: dict(v.most_common()) for k, v in counts.items()}
