"""report/index.html: a run, or several beside each other, as one page that needs nothing else.

Everything that comes from files or configs is escaped; the page may load nothing (its policy says so) and runs one
script, known by its hash. It is written whole or not at all.
"""
from __future__ import annotations

import base64
import hashlib
import io
import json
import pathlib
from html import escape

from etils import epath
from PIL import Image

from unimiss_jax.report import curves, figures, sections
from unimiss_jax.report.run_files import RunFiles

STYLE, SCRIPT = ((pathlib.Path(__file__).with_name(f'page.{end}')).read_text() for end in ('css', 'js'))
MOST_STEPS, MOST_BYTES = 12, 8 << 20     # of a stream's sheets over time; of all pictures of runs together
SHEETS = ('As the network was given them: planes of each patient with left and right marked, the DRR, then the drawn '
          'views, with their reconstruction where such a loss is on. Letters stand on views that cannot be mirrored.')


def html(runs: list[RunFiles], verdicts: list, chance: dict, preset: dict | None = None, shown=(), notes=(),
         ended: str = '') -> str:
  """The page as text.

  Args:
    runs: the first one is described in full, of the others curves, verdict and scores, of few also the last pictures.
    verdicts: `sections.Verdict` of each run.
    chance: {phase: {metric: value for a network that tells nothing apart}} of the first run.
    preset: {leaf: value} of the preset that the first run started from; None = not known.
    shown: figures.Picture and figures.Map, of its network.
    notes: lines on what is left out and why.
    ended: by what the run was ended, '' = nothing.
  """
  run, several = runs[0], len(runs) > 1
  scores = sections.levels(run)
  groups = curves.charts(runs, chance, scores)
  flat = [c for cs in groups.values() for c in cs]
  maps = [s for s in shown if isinstance(s, figures.Map)]
  data = {'runs': [r.name for r in runs], 'phases': sorted({s['phase'] for c in flat for s in c.series}),
          'charts': [c.plain() for c in flat], 'maps': [m.plain() for m in maps]}
  title = f'{len(runs)} runs' if several else run.name
  parts = {
      'Verdict': sections.verdict(runs, verdicts, ended) + ''.join(f'<p class="dim">{escape(n)}</p>' for n in notes),
      'Health': sections.health_panel(runs, verdicts),
      'Curves': _curves(groups, several),
      'Pictures': _sheets(runs),
      'Network': _network(shown, maps),
      'Scores': sections.scores(runs, scores) + sections.tested(runs),
      'Data': sections.data(run),
      'History': sections.history(run),
      'Config': sections.config(runs, preset),
      'Environment': sections.environment(runs),
  }
  parts = {k: v for k, v in parts.items() if v}
  body = ''.join(f'<section id="{k.lower()}"><h2>{k}</h2>{v}</section>' for k, v in parts.items())
  links = ''.join(f'<a href="#{k.lower()}">{k}</a>' for k in parts)
  allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
  policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
  return f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>{sections.facts(runs)}<nav>{links}</nav>
{body}
<footer>{escape(sections.made())}</footer>
<script type="application/json" id="page-data">{script_json(data)}</script>
<script>{SCRIPT}</script></body></html>
'''


def write(path, text: str) -> None:
  """Whole or not at all: a reader, or a crash, meets the page of before or this one."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'{path.name}.part')
  part.write_text(text)
  part.replace(path)


def script_json(data) -> str:
  """JSON that may stand within <script>: nothing in it can end the element or start a comment."""
  text = json.dumps(data, separators=(',', ':'), allow_nan=False)
  return text.replace('<', '\\u003c').replace('>', '\\u003e').replace('&', '\\u0026')


def _curves(groups, several) -> str:
  out, n = ('<div class="tools"><button type="button" id="all-log" aria-pressed="false">all logarithmic</button>'
            '<span class="dim">Hover or touch for values; below each curve are its last ones.</span></div>', 0)
  for group, charts in groups.items():
    places = ''.join(f'<div class="chart" data-chart="{n + i}"></div>' for i in range(len(charts)))
    n += len(charts)
    inner = f'<div class="charts">{places}</div>'
    out += (f'<h3>{group}</h3>{inner}' if group in curves.OPEN else
            f'<details><summary>{group} ({len(charts)})</summary>{inner}</details>')
  return out if n else ''


def _sheets(runs) -> str:
  """The picture files of runs: of one run over time, of several the last ones."""
  out, left, lost = '', MOST_BYTES, 0
  for run in runs if len(runs) <= sections.FEW else runs[:1]:
    for stream, files in run.pictures.items():
      last = len(files) - 1
      keep = sorted({round(i * last / (MOST_STEPS - 1)) for i in range(MOST_STEPS)} if len(runs) == 1 else {last})
      made = []
      for step, path in (files[i] for i in reversed(keep)):      # the newest ones first, while there is room
        data = _small(path)
        if data is None or len(data) > left:
          lost += 1
          continue
        left -= len(data)
        made.insert(0, (f'step {step}' if step is not None else path.name, data))
      if made:
        images = ''.join(f'<img alt="{escape(alt)}" src="{figures.uri(d)}">' for alt, d in made)
        name = f'{run.name}: {stream}' if len(runs) > 1 else stream
        steer = (f'<div class="tools"><input type="range" aria-label="step" min="0" max="{len(made) - 1}" '
                 f'value="{len(made) - 1}"><output></output></div>' if len(made) > 1 else '')
        out += (f'<figure class="{"times" if steer else "still"}"><h3>{escape(name)}</h3>{steer}<div class="wide">'
                f'{images}</div></figure>')
  note = f'<p class="dim">{lost} pictures are left out: unreadable, or no room.</p>' if lost else ''
  return f'<p class="dim">{SHEETS}</p><div class="pictures">{out}</div>{note}' if out else note


def _small(path) -> bytes | None:
  """A picture file as small as it goes; None where it is none."""
  try:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
      return figures.encoded(image if image.mode in ('L', 'RGB') else image.convert('RGB'), data)
  except (OSError, ValueError, Image.DecompressionBombError, SyntaxError):
    return None


def _network(shown, maps) -> str:
  out = ''
  for s in shown:
    words = f'<h3>{escape(s.title)}</h3><figcaption>{escape(s.note)}</figcaption>'
    if isinstance(s, figures.Map):
      out += (f'<figure class="scatter" data-map="{maps.index(s)}">{words}<div class="tools">colour by '
              '<select aria-label="label"></select></div><div class="said"></div></figure>')
      continue
    image = f'<div class="wide"><img alt="{escape(s.title)}" src="{figures.uri(s.data)}"></div></figure>'
    if s.frames > 1:
      out += (f'<figure class="browser" data-frames="{s.frames}" data-zoom="{s.zoom:g}">{words}<div class="tools">'
              f'<input type="range" aria-label="slice" min="0" max="{s.frames - 1}" value="{s.frames // 2}">'
              f'<output></output></div>{image}')
    else:
      out += f'<figure>{words}{image}'
  return f'<div class="pictures">{out}</div>' if out else ''
