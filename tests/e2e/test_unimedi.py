"""UniMedI as a whole run: stopped and continued it is the same; real radiographs with notes; what phantoms teach."""
import csv
import json
import os
import signal

import jax
import numpy as np
import pytest

from configs import unimedi
from data_pipelines import prepare
from tests.e2e import tiny
from unimiss_jax import train
from unimiss_jax.cli import report
from unimiss_jax.writers import Writer

pytestmark = pytest.mark.slow


def config(**overrides):
  c = unimedi.get_config('phantom').unlock()
  c.model.update(dict(embed_dims=(8,), num_heads=(2,), depths=(1,)))
  c.head.update(dict(out_dim=8, hidden_dim=8, bottleneck_dim=4))
  c.batch.ct = c.batch.xray = 8
  c.steps, c.data.phantom_records = 10, 40
  c.unimedi.update(dict(icl=1., pcl=1.))
  c.unimedi.text.update(dict(num_layers=1, width=8, heads=2, mlp=8))
  c.eval.update(dict(every=0, records=16, fit=8))
  c.checkpoint.every, c.log.every = 100, 1
  return tiny.changed(c, overrides)


def test_a_run_that_was_stopped_goes_on_on_another_mesh(tmp_path, monkeypatch):
  """Losses, with teacher, centres, data and random numbers behind them, are those of the undisturbed run."""
  assert train.train_and_evaluate(config(), str(tmp_path / 'a')) == 0
  write = Writer.write_scalars

  def stopping(self, step, scalars, phase=''):
    write(self, step, scalars, phase)
    if (step, phase) == (4, 'joint'):
      os.kill(os.getpid(), signal.SIGTERM)
  monkeypatch.setattr(Writer, 'write_scalars', stopping)
  assert train.train_and_evaluate(config(), str(tmp_path / 'b'), preempt_exit_code=7) == 7
  monkeypatch.undo()
  two = config(**{'mesh.data': 2, 'mesh.fsdp': 4})
  assert train.train_and_evaluate(two, str(tmp_path / 'b')) == 0
  want, got = tiny.metrics(tmp_path / 'a'), tiny.metrics(tmp_path / 'b')
  assert want.keys() == got.keys() and len([k for k in want if k[1] == 'joint']) == 10
  for at, row in want.items():
    for name in (n for n in row if n.endswith('loss')):
      assert got[at][name] == pytest.approx(row[name], rel=1e-5), (at, name)
  assert {f'eval/{n}' for n in ('xray_to_text_r1', 'ct_to_text_r1', 'xray_to_ct_r1', 'slice_recall')} <= want[
      0, 'eval'].keys()


@pytest.mark.realdata
def test_real_radiographs_with_their_notes_and_an_imported_bert(shared, fixtures, tmp_path):
  """From files and from shards of them it ends without an error, with the same losses; 24 pictures teach nothing."""
  with (shared / 'data' / 'cxr' / 'covid' / 'labels.csv').open(newline='') as f:
    found = [r for r in csv.DictReader(f) if r['clinical_notes']][:24]
  rows = [{'id': r['image'], 'path': str(shared / 'data' / r['image']), 'kind': 'image', 'split': 'train',
           'text': r['clinical_notes']} for r in found]
  (tmp_path / 'manifest.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  shards, losses = tmp_path / 'shards', []
  assert prepare.main([str(tmp_path), f'--out={shards}', '--uncut', '--num_shards=2', '--workers=0']) == 0
  for where in (tmp_path, shards):
    c = config(**{'phases.ct': 0, 'phases.unit': 'step', 'batch.ct': 0, 'steps': 3, 'data.manifest': str(where),
                  'views.xray.size': 32, 'views.xray.resize': 'bicubic', 'model.image_size': 32, 'eval.tasks': (),
                  'unimedi.text.init_from': str(fixtures / 'unimedi' / 'bert_tiny'), 'unimedi.text.length': 40,
                  'unimedi.text.vocab_size': 0, 'unimedi.text.num_layers': 2, 'unimedi.text.freeze_layers': 1})
    run = tmp_path / f'run{len(losses)}'
    assert train.train_and_evaluate(c, str(run)) == 0
    losses.append([r['train/loss'] for (_, phase), r in tiny.metrics(run).items() if phase == 'joint'])
  assert len(losses[0]) == 3 and np.isfinite(losses[0]).all() and losses[0] == losses[1]


@pytest.mark.parametrize('shuffled', [False, True])
def test_what_phantoms_teach(shuffled, tmp_path):
  """300 steps of the preset: pictures, volumes and reports find each other, and the class token finds the planes that
  reports speak of; with shuffled reports none of it."""
  c = tiny.changed(unimedi.get_config('phantom').unlock(), {
      'mesh.data': 1, 'mesh.fsdp': jax.device_count(), 'unimedi.shuffle_reports': shuffled, 'eval.every': 0})
  assert train.train_and_evaluate(c, str(tmp_path)) == 0
  assert report.main([f'--workdir={tmp_path}']) == 0
  page = (tmp_path / 'report' / 'index.html').read_text()
  assert 'Nearest neighbours: xray to ct' in page and '"ring"' in page and 'not shown (' not in page
  rows = tiny.metrics(tmp_path)
  start, end = rows[0, 'eval'], rows[300, 'eval']
  found = [end[f'eval/{n}_r1'] for n in ('xray_to_text', 'ct_to_text', 'xray_to_ct')]
  if shuffled:
    assert max(found) < .15 and end['eval/slice_recall'] <= start['eval/slice_recall'] + .1
  else:
    assert min(found) >= .5 and end['eval/slice_recall'] >= max(.7, start['eval/slice_recall'] + .2)
