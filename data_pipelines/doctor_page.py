"""What the doctor found, as one HTML page that needs nothing else: counts, findings with remedies, pictures."""
import base64
import os
from html import escape

from data_pipelines import doctor_report

MOST_BYTES = 12 << 20     # of pictures in a page
MOST_LINES = 5000         # of the table of findings
STYLE = '''
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 78rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.lead { font-size: 1.1rem; margin: .3rem 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.number, th.number { text-align: right; } td.code { white-space: nowrap; }
.findings { width: 100%; } .findings td:nth-child(3) { min-width: 12rem; }
.findings td:nth-child(4) { min-width: 14rem; }
.tag { display: inline-block; white-space: nowrap; font-size: .75rem; font-weight: 600;
  padding: 0 .4rem; border-radius: .3rem; color: #fff; }
.ERROR, .excluded { background: #b3261e; } .WARN, .warn { background: #8a5a00; } .INFO { background: #476a8a; }
.ok { background: #2e6b3a; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .8rem; }
figure { margin: 0; padding: .5rem; background: var(--soft); border-radius: .4rem; }
figure img { display: block; max-width: 100%; background: #000; }
figcaption { font-size: .85rem; margin-top: .35rem; overflow-wrap: anywhere; } .none { opacity: .7; }
'''


def html(report) -> str:
  """The page as text. Pictures stop at 12 MB, errors and warnings come first."""
  title = f'Data check of {report.source}'
  counts = ''.join(f'<tr><td class="code">{escape(c)}</td><td>{_tag(s)}</td><td class="number">{n}</td></tr>'
                   for c, s, n in doctor_report.by_code(report))
  ignored = f'<p>Ignored: {escape(report.ignored)}</p>' if report.ignored else ''
  return f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(doctor_report.summary(report))}</p>
{ignored}
<h2>Codes</h2>
<table><tr><th>code</th><th>severity</th><th class="number">findings</th></tr>{counts}</table>
<h2>Findings</h2>
<div class="scroll"><table class="findings">
<tr><th></th><th>code</th><th>file</th><th>what was found</th><th>remedy</th></tr>{_findings(report)}</table></div>
<h2>Pictures</h2>
<p>Volumes: middle axial, coronal and sagittal plane, the patient's right on the left of the picture (R). Radiographs
as they are.</p>
<div class="pictures">{_pictures(report)}</div>
</body></html>
'''


def _tag(text: str) -> str:
  return f'<span class="tag {escape(text)}">{escape(text)}</span>'


def _findings(report) -> str:
  folder = _folder(report)
  found = report.all_findings
  lines = [f'<tr><td>{_tag(f.severity)}</td><td class="code">{escape(f.code)}</td>'
           f'<td>{escape(f.path.replace(folder, ""))}</td><td>{escape(f.text)}</td><td>{escape(f.remedy)}</td></tr>'
           for f in sorted(found, key=lambda f: ('ERROR', 'WARN', 'INFO').index(f.severity))[:MOST_LINES]]
  if len(found) > MOST_LINES:
    lines.append(f'<tr><td colspan="5">and {len(found) - MOST_LINES} more, see --json</td></tr>')
  return '\n'.join(lines)


def _folder(report) -> str:
  """What all paths begin with, for a table that can be read."""
  base = report.source.rstrip('/') + '/'
  return base if os.path.isdir(base) else '\0'


def _pictures(report) -> str:
  folder, left, out, missing = _folder(report), MOST_BYTES, {}, 0
  order = sorted(range(len(report.rows)), key=lambda i: ('excluded', 'warn', 'ok').index(report.rows[i]['status']))
  for i in order:
    row, result = report.rows[i], report.results[i]
    if result.picture is None:
      missing += 1
      continue
    data = base64.b64encode(result.picture).decode()
    left -= len(data)
    if left < 0:
      missing += 1
      continue
    codes = ' '.join(dict.fromkeys(f.code for f in result.findings))
    name = row['path'].replace(os.path.abspath(folder.strip('\0')) + '/', '') if folder != '\0' else row['path']
    size = ' x '.join(map(str, result.facts.get('shape', ())))
    mm = ' x '.join(f'{s:.3g}' for s in result.facts.get('spacing', ()))
    about = f'{size}{f" @ {mm} mm" if mm else ""} {result.facts.get("orient", "")}'.strip()
    out[i] = (f'<figure><img src="data:image/png;base64,{data}" alt="{escape(name)}"><figcaption>'
              f'{_tag(row["status"])} {escape(name)}<br>{escape(about)}<br>{escape(codes)}</figcaption></figure>')
  shown = [out[i] for i in order if i in out]
  if missing:
    shown.append(f'<p class="none">{missing} files without picture: they cannot be read, or there are too many</p>')
  return '\n'.join(shown)
