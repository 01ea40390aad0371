"""What a check says about a file: one line, `SEVERITY CODE path: reason; consequence. FIX: remedy`."""
from typing import NamedTuple

from data_pipelines.errors import DataError

SEVERITIES = ('ERROR', 'WARN', 'INFO')


class Finding(NamedTuple):
  """One remark.

  Attributes:
    severity: 'ERROR' (excluded), 'WARN' (used, but look at it) or 'INFO'.
    code: short upper-case name, e.g. 'HU_PADDING'.
    path: what it is about.
    reason: what was found and what was expected.
    consequence: what is done about it; may be empty, as remedy.
    remedy: what the user can do.
  """
  severity: str
  code: str
  path: str
  reason: str
  consequence: str = ''
  remedy: str = ''

  @property
  def text(self) -> str:
    return _flat(self.reason) + (f'; {_flat(self.consequence)}' if self.consequence else '')

  @property
  def line(self) -> str:
    path = ' '.join(str(self.path).splitlines())    # one line, whatever a file is called
    remedy = f'. FIX: {_flat(self.remedy)}' if self.remedy else ''
    return f'{self.severity} {self.code}{" " * bool(path)}{path}: {self.text}{remedy}'

  @property
  def error(self) -> DataError:
    return DataError(self.code, self.path, self.reason, self.remedy)


def of_error(error: DataError) -> Finding:
  return Finding('ERROR', error.code, error.path, error.reason, 'excluded', error.remedy)


def of_warning(text: str, path) -> Finding:
  """A reader's finished text `WARN CODE path: reason[; consequence][. FIX: remedy]` -> its parts."""
  severity, code, rest = text.split(' ', 2)
  told = rest[len(f'{path}: '):] if rest.startswith(f'{path}: ') else rest
  reason, _, remedy = told.partition('. FIX: ')
  return Finding(severity, code, str(path), reason, '', remedy)


def worst_of_each_code(findings) -> list[Finding]:
  """One finding per code, the most severe; of equally severe ones the last: a closer look made it. Errors first."""
  kept = {}
  for f in findings:
    if f.code not in kept or SEVERITIES.index(f.severity) <= SEVERITIES.index(kept[f.code].severity):
      kept[f.code] = f
  return sorted(kept.values(), key=lambda f: SEVERITIES.index(f.severity))


def status(findings) -> str:
  """'excluded', 'warn' or 'ok', as the manifest has it."""
  found = {f.severity for f in findings}
  return 'excluded' if 'ERROR' in found else 'warn' if 'WARN' in found else 'ok'


def _flat(text) -> str:
  return ' '.join(str(text).split())
