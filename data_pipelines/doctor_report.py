"""What the doctor found, as lines for a terminal and as JSON lines."""
import collections
import json

from data_pipelines.finding import SEVERITIES


def terminal(report, said=()) -> list[str]:
  """A line per finding, a table of the codes, what was left out and written, and the counts last."""
  lines = [f.line for f in report.all_findings]
  lines += table(report)
  if report.ignored:
    lines.append(f'ignored: {report.ignored}')
  return [*lines, *said, summary(report)]


def by_code(report) -> list[tuple[str, str, int]]:
  """(code, severity, number of findings), errors first, then the most frequent."""
  found = collections.Counter((f.code, f.severity) for f in report.all_findings)
  order = sorted(found.items(), key=lambda x: (SEVERITIES.index(x[0][1]), -x[1], x[0][0]))
  return [(code, severity, n) for (code, severity), n in order]


def table(report) -> list[str]:
  counted = by_code(report)
  if not counted:
    return []
  width = max(len(code) for code, _, _ in counted)
  return [f'{"code":{width}}  severity  findings'] + [f'{c:{width}}  {s:8}  {n:8}' for c, s, n in counted]


def summary(report) -> str:
  status = collections.Counter(row['status'] for row in report.rows)
  return f'{len(report.rows)} files: {status["ok"]} ok, {status["warn"]} warn, {status["excluded"]} excluded'


def json_lines(report) -> str:
  """A row per file: id, path, kind, status, findings, and all that was measured; what concerns no single file comes
  last, in rows without path."""
  lines = []
  for row, result in zip(report.rows, report.results):
    about = {k: row[k] for k in ('id', 'path', 'kind', 'status', 'subject', 'group', 'split') if k in row}
    lines.append(about | {'findings': [_plain(f) for f in result.findings]} | result.facts)
  lines += [{'path': None, 'findings': [_plain(f)]} for f in report.findings]
  return ''.join(json.dumps(line, ensure_ascii=False, allow_nan=False) + '\n' for line in lines)


def _plain(f) -> dict:
  return {'severity': f.severity, 'code': f.code, 'text': f.text, 'fix': f.remedy, 'line': f.line}
