"""The page of a run, from files written by hand: read by Python's HTML parser, opened by Chromium where it is."""
import json
import logging
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from unimiss_jax.cli import report as cli
from unimiss_jax.report import curves, figures, live, page, run_files, sections

HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script><!--'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CHANCE = {'ct': {'train/nce_loss': 2.708}}


def make(folder, steps=400, every=20, metrics=4, name='', **config):
  """A run's folder with a sheet of each stream."""
  (folder / 'report').mkdir(parents=True)
  (folder / 'logs').mkdir()
  leaves = {'method': 'unimiss_plus', 'preset': 'phantom', 'steps': steps, 'seed': 0, 'head': {'out_dim': 256},
            'data': {'ct': name, 'manifest': ''}, 'eval': {'records': 500, 'fit': 300, 'knn': ''}} | config
  (folder / 'config.json').write_text(json.dumps(leaves))
  (folder / 'env.json').write_text(json.dumps({'devices': ['cpu cpu'], 'command': ['main.py', name]}))
  rng = np.random.default_rng(0)
  rows = [{'step': 0, 'phase': 'eval', 'eval/knn_auc_ct': .55, 'eval/raw_knn_auc_ct': .6}]
  for i in range(0, steps, every):
    rows.append({'step': i, 'phase': 'ct', 'train/loss': 3 * math.exp(-i / steps), 'train/nce_loss': 1.,
                 'train/skipped': 0., 'collapse/rankme': 5., 'collapse/feature_std': .3, 'data/wait_frac': .01}
                | {f'train/extra{k}_{name}': v for k, v in enumerate(rng.standard_normal(metrics))})
  rows.append({'step': steps, 'phase': 'eval', 'eval/knn_auc_ct': .7, 'perf/seconds': 60., 'perf/cpu_seconds': 90.})
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  (folder / 'logs' / 'host_0.txt').write_text(
      '2026-01-01 10:00:00,000 INFO unimiss_plus, preset phantom | 2 M parameters\n'
      '2026-01-01 10:00:01,000 INFO a line of no interest\n'
      '2026-01-01 10:01:00,000 INFO resumed step 200 | data index ct 1600\n'
      f'2026-01-01 10:02:00,000 WARNING {name or "odd"}\n')
  for step in (0, steps):
    for stream in ('ct', 'xray'):
      Image.fromarray(rng.integers(0, 255, (40, 60), np.uint8)).save(folder / 'report' / f'{stream}_{step:07}.png')
  return folder


def text_of(*folders, **more):
  runs = [run_files.load(f, n) for f, n in zip(folders, run_files.names(folders))]
  return page.html(runs, [sections.judged(r, CHANCE) for r in runs], CHANCE, **more)


class Parsed(HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.tags, self.words, self.scripts, self._inside = [], [], [], None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self._inside = tag

  def handle_endtag(self, tag):
    self._inside = None

  def handle_data(self, data):
    (self.scripts if self._inside == 'script' else self.words).append(data)


def data_of(text):
  return json.loads(Parsed(text).scripts[0])


def test_the_parts_of_a_page(tmp_path):
  text = text_of(make(tmp_path / 'run'))
  found = Parsed(text)
  assert [a['id'] for t, a in found.tags if t == 'section'] == [
      'verdict', 'health', 'curves', 'pictures', 'scores', 'data', 'history', 'config', 'environment']
  said = ' '.join(found.words)
  assert 'healthy' in said and '1 life; resumed step 200' in said and 'no interest' not in said
  assert '0.0167 device hours' in said and 'knn_auc_ct 0.700' in said and 'built-in phantoms' in said
  assert len([t for t, _ in found.tags if t == 'img']) == 4
  charts = {c['title']: c for c in data_of(text)['charts']}
  assert charts['train/nce_loss']['levels'] == {'chance': 2.708}
  assert charts['eval/knn_auc_ct']['levels'] == {'chance': .5, 'raw pixels': .6}
  assert charts['train/loss']['series'][0]['x'] == list(range(0, 400, 20)) and 'eval/raw_knn_auc_ct' not in charts


def test_a_page_asks_the_network_for_nothing(tmp_path):
  found = Parsed(text_of(make(tmp_path / 'run')))
  named = [a[k] for _, a in found.tags for k in ('src', 'href', 'srcset', 'data', 'action') if k in a]
  assert named and all(n.startswith(('data:', '#')) for n in named)
  policy = next(a['content'] for _, a in found.tags if a.get('http-equiv'))
  assert "default-src 'none'" in policy and 'http' not in policy
  assert not re.search(r'@import|url\(', page.STYLE) and not re.search(r'fetch|XMLHttp|import\(', page.SCRIPT)


def test_names_that_are_markup_stay_text(tmp_path):
  folder = make(tmp_path / 'run', name=HOSTILE, preset=HOSTILE, method=HOSTILE, task={'kind': HOSTILE})
  (folder / 'eval').mkdir()
  (folder / 'eval' / 'test.json').write_text(json.dumps({'cases': HOSTILE, 'scores': {HOSTILE: .5}}))
  shown = [figures.Picture(HOSTILE, HOSTILE, figures.encoded(Image.new('L', (8, 8))), 2),
           figures.Map(HOSTILE, HOSTILE, [[0., 1.]], [HOSTILE], [HOSTILE], {HOSTILE: [1.]})]
  run = run_files.load(folder, HOSTILE)
  text = page.html([run, run], [sections.judged(run, CHANCE)] * 2, {'ct': {}}, {HOSTILE: HOSTILE}, shown, [HOSTILE],
                   HOSTILE)
  found = Parsed(text)
  assert len([t for t, _ in found.tags if t == 'script']) == 2 and len(found.scripts) == 2
  assert not [a for _, a in found.tags if any(k.startswith('on') for k in a)]
  assert not [a for t, a in found.tags if t == 'img' and not a['src'].startswith('data:')]
  assert ' '.join(found.words).count(HOSTILE) > 10      # shown as it is
  data = json.loads(found.scripts[0])
  assert data['runs'] == [HOSTILE] * 2 and data['maps'][0]['title'] == HOSTILE
  assert any(HOSTILE in c['title'] for c in data['charts']) and found.scripts[1] == page.SCRIPT


def test_ten_thousand_steps_stay_small_and_quick(tmp_path):
  folder = make(tmp_path / 'run', steps=10000, every=1, metrics=30)
  began = time.monotonic()
  text = text_of(folder)
  assert time.monotonic() - began < 20 and len(text.encode()) < 15e6


def test_torn_and_missing_files_cost_their_part_alone(tmp_path):
  folder = make(tmp_path / 'run')
  for name in ('env.json', 'logs/host_0.txt'):
    (folder / name).unlink()
  (folder / 'config.json').write_text('{"method": "x", "da')
  (folder / 'report' / 'ct_0000400.png').write_bytes(b'no picture')
  with (folder / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 1, "ph')
  text = text_of(folder)
  found = Parsed(text)
  assert 'not known' in ' '.join(found.words) and '1 pictures are left out' in text
  assert len([t for t, _ in found.tags if t == 'img']) == 3
  assert 'history' not in [a.get('id') for _, a in found.tags]


def test_thinning_keeps_ends_order_and_spikes():
  x = list(range(5000))
  y = [math.sin(i / 300) for i in x]
  y[1234], y[4321] = 50., -50.
  out = curves.thinned(x, y, 800)
  assert len(out['x']) < 900 and out['x'] == sorted(out['x']) and {0, 1234, 4321, 4999} <= set(out['x'])
  assert all(abs(v - y[i]) < 1e-3 for i, v in zip(out['x'], out['y']))
  assert curves.thinned([3, 1, 2], [1., None, 2.], 800) == {'x': [1, 2, 3], 'y': [None, 2., 1.]}


def test_several_runs_and_a_sweep_stand_side_by_side(tmp_path, capsys):
  for seed in (0, 1):
    make(tmp_path / 'grid' / 'base' / f's{seed}', seed=seed)
  assert cli.main([f'--workdir={tmp_path / "grid"}', '--no_model', '--debug']) == 0
  text = (tmp_path / 'grid' / 'report' / 'index.html').read_text()
  data = data_of(text)
  assert data['runs'] == ['s0', 's1']
  assert {s['run'] for s in next(c for c in data['charts'] if c['title'] == 'train/loss')['series']} == {0, 1}
  assert 'Differences between the runs' in text and 's1: HEALTH' in capsys.readouterr().out
  both = [f'--workdir={tmp_path / "grid" / "base" / s}' for s in ('s1', 's0')]
  assert cli.main([*both, '--no_model']) == 0
  assert (tmp_path / 'grid' / 'base' / 's1' / 'report' / 'compared.html').exists()


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
  assert cli.main([f'--workdir={tmp_path}']) == 1
  assert capsys.readouterr().err.startswith(f'ERROR {tmp_path}: no run there')


def test_what_differs_from_the_preset(tmp_path):
  from configs import unimiss_plus
  preset = json.loads(json.dumps(unimiss_plus.get_config('phantom').to_dict()))
  folder = make(tmp_path / 'run')
  (folder / 'config.json').write_text(json.dumps(preset | {'seed': 7}))
  run = run_files.load(folder)
  assert cli.preset_of(run) == preset
  rows = sections.config([run], sections.flat(preset)).partition('<details>')[0]
  assert re.findall(r'<td>([^<]*)</td>', rows) == ['seed', '0', '7']


def test_no_file_that_a_run_names_is_executed(tmp_path):
  evil = tmp_path / 'unimiss_plus.py'
  evil.write_text(f'open({str(tmp_path / "executed")!r}, "w")\ndef get_config(arg=None): 1 / 0\n')
  folder = make(tmp_path / 'run')
  (folder / 'env.json').write_text(json.dumps({'command': ['main.py', f'--config={evil}']}))
  assert cli.preset_of(run_files.load(folder))['preset'] == 'phantom'
  assert not (tmp_path / 'executed').exists()


# ---- while a run goes on

def test_the_page_is_refreshed_only_where_it_costs_little(tmp_path, monkeypatch):
  folder, now = make(tmp_path / 'run'), [0.]
  monkeypatch.setattr(live.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(live.page, 'html', lambda *a, **k: now.__setitem__(0, now[0] + 3) or 'page')
  page_of = live.Live(folder, CHANCE)
  times = []
  for at in range(0, 2000, 10):
    now[0] = max(now[0], at)
    spent = page_of.spent
    page_of.refresh()
    times += [now[0]] if page_of.spent > spent else []
  assert 2 <= len(times) <= 6 and page_of.spent <= .01 * now[0]


def test_the_end_of_a_run_is_told_and_its_cause(tmp_path):
  folder = make(tmp_path / 'run')
  page_of = live.Live(folder, CHANCE)
  try:
    raise ValueError('step 5: <bad>')
  except ValueError:
    page_of.finish()
  assert 'ValueError: step 5: &lt;bad&gt;' in live.place(folder).read_text()
  page_of.finish()
  assert 'ended by a fault' not in live.place(folder).read_text()


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, caplog):
  folder = make(tmp_path / 'run')
  page_of = live.Live(folder, CHANCE)
  page_of.finish()
  before = live.place(folder).read_text()
  monkeypatch.setattr(live.page, 'html', lambda *a, **k: 1 / 0)
  with caplog.at_level(logging.WARNING):
    page_of.finish()
  assert 'is not written (ZeroDivisionError' in caplog.text and live.place(folder).read_text() == before


def test_a_killed_writer_leaves_a_whole_page(tmp_path):
  code = ('import sys; from unimiss_jax.report import page\n'
          'i = 0\n'
          'while True:\n'
          '  i += 1; page.write(sys.argv[1], f"<{i % 10}" * 2000000 + "END"); print(i, flush=True)\n')
  path = tmp_path / 'report' / 'index.html'
  with subprocess.Popen([sys.executable, '-c', code, str(path)], stdout=subprocess.PIPE) as writer:
    for _ in range(3):
      writer.stdout.readline()
    time.sleep(.013)      # in the midst of one
    writer.send_signal(signal.SIGKILL)
  text = path.read_text()
  assert text.endswith('END') and len(text) == 4000003 and len(set(text[:-3])) == 2


# ---- in a browser

PROBE = '''
const told = {errors: [], decoded: 0, broken: 0};
addEventListener('error', e => told.errors.push(String(e.message)));
addEventListener('load', async () => {
  try {
    for (const d of document.querySelectorAll('details')) d.open = true;
    for (const e of document.images) await e.decode().then(() => told.decoded++, () => told.broken++);
    told.seen = document.querySelectorAll('.series').length;
    dispatchEvent(new Event('beforeprint'));
    const chart = document.querySelector('.chart'), area = chart.querySelector('svg');
    const said = chart.querySelector('.said');
    const box = area.getBoundingClientRect(), last = said.textContent;
    area.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + LEFT, clientY: box.top + 20}));
    told.hover = said.textContent; told.last = last;
    const path = chart.querySelector('.series').getAttribute('d');
    chart.querySelector('button').click();
    told.log = chart.querySelector('.series').getAttribute('d') !== path;
    const range = document.querySelector('.times input');
    const shown = () => document.querySelector('.times img:not([hidden])').alt;
    told.before = shown(); range.value = 0; range.dispatchEvent(new Event('input')); told.after = shown();
    const slices = document.querySelector('.browser input'), canvas = document.querySelector('.browser canvas');
    const picture = () => canvas.toDataURL();
    slices.value = 0; slices.dispatchEvent(new Event('input')); const first = picture();
    slices.value = 2; slices.dispatchEvent(new Event('input')); told.sliced = picture() !== first;
    told.dots = document.querySelectorAll('.scatter path').length;
    told.drawn = [...document.querySelectorAll('.chart')].filter(c => c.querySelector('.series')).length;
    told.wide = document.documentElement.scrollWidth - innerWidth;
    told.ready = document.documentElement.dataset.ready;
  } catch (e) { told.errors.push(String(e)); }
  const out = document.createElement('pre');
  out.id = 'told'; out.textContent = JSON.stringify(told); document.body.append(out);
});
'''


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason='no Chromium: install it to open the page')
@pytest.mark.parametrize('width', (1280, 400))
def test_in_a_browser(width, tmp_path):
  """The page as it is: no complaint, no request. With a probe in it: what a hand would do."""
  volume = np.random.default_rng(0).integers(0, 255, (5, 20, 60), np.uint8)
  shown = [figures.Picture('slices', 'note', figures.encoded(figures.strip(volume)), 5),
           figures.Map('map', 'note', [[0, 0], [1, 2], [2, 1]], ['ct', 'drr', 'xray'], ['0', '1', '2'],
                       {'a': [0., 1., None]})]
  text = text_of(make(tmp_path / 'run', name=HOSTILE), shown=shown)
  file, log = tmp_path / 'page.html', tmp_path / 'net.json'
  file.write_text(text)
  run = [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', f'--window-size={width},900',
         f'--user-data-dir={tmp_path / "profile"}', '--enable-logging=stderr', '--virtual-time-budget=8000',
         '--dump-dom', f'--log-net-log={log}', file.as_uri()]
  opened = subprocess.run(run, capture_output=True, text=True, timeout=120)
  assert 'data-ready="yes"' in opened.stdout and 'CONSOLE' not in opened.stderr
  asked = '"initiator":"null"'      # by a page of file://; what Chromium asks for itself has another initiator
  assert asked not in log.read_text()
  probe = f'<script>{PROBE}</script>'
  file.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: probe, text))
  opened = subprocess.run(run, capture_output=True, text=True, timeout=120)
  told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', opened.stdout)[1].replace('&gt;', '>').replace('&lt;', '<')
                    .replace('&amp;', '&'))
  assert told['errors'] == [] and told['broken'] == 0 and told['decoded'] == 5
  assert told['hover'].startswith('step 0') and told['hover'] != told['last'] and told['log'] and told['sliced']
  assert (told['before'], told['after']) == ('step 400', 'step 0') and told['dots'] == 3
  file.write_text('<img src="http://127.0.0.1:9/x.png">')
  subprocess.run(run, capture_output=True, timeout=120)
  assert asked in log.read_text()      # the log does tell
  assert told['drawn'] == len(data_of(text)['charts']) and told['wide'] <= 0
