"""From a folder of real scans, over the doctor and prepare, to runs that stop and go on."""
import collections
import hashlib
import json
import os
import signal

import pytest

from data_pipelines import doctor, manifest, prepare, streams
from tests.e2e import tiny
from unimiss_jax import train
from unimiss_jax.writers import Writer

pytestmark = [pytest.mark.slow, pytest.mark.realdata]


@pytest.fixture(scope='module')
def configs(shared, tmp_path_factory):
  """{way: config of 4 steps} over the same files: the folders, the doctor's list of them, its prepared shards."""
  ct, xray, where = shared / 'data/ct', shared / 'data/cxr/nih', tmp_path_factory.mktemp('lists')
  assert doctor.main([f'{ct},{xray}', f'--manifest={where / "list"}', '--split=1,0,0', '--workers=0']) == 1
  assert prepare.main([str(where / 'list'), f'--out={where / "shards"}', '--workers=0', '--num_shards=3']) == 0
  data = {'folder': {'data.ct': str(ct), 'data.xray': str(xray)}, 'list': {'data.manifest': str(where / 'list')},
          'shards': {'data.manifest': str(where / 'shards')}}
  short = {'steps': 4, 'eval.tasks': (), 'eval.select': ''}
  return {way: tiny.config(**short | leaves) for way, leaves in data.items()}


def seen(config) -> dict:
  """{stream: how often it holds which voxels, of the tile and of the whole scan}."""
  out = {}
  for name, stream in streams.build(config).items():
    records = (stream.source[i] for i in range(stream.records))
    out[name] = collections.Counter(tuple(hashlib.blake2b(r[k]).hexdigest() for k in ('volume', 'whole', 'image')
                                          if k in r) for r in records)
    stream.close()
  return out


def test_folder_list_and_shards_hold_the_same_volumes(configs):
  """All 23 CT and 91 X-rays of the folders, each tile as often."""
  found = {way: seen(config) for way, config in configs.items()}
  assert found['folder'] == found['list'] == found['shards']
  rows = manifest.usable(manifest.read(configs['list'].data.manifest, labelled=False))
  kinds = collections.Counter(r['kind'] for r in rows)
  assert kinds == {'volume': 23, 'image': 91} and sum(found['list']['xray'].values()) == 91


@pytest.mark.parametrize('way', ['folder', 'shards'])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(configs, tmp_path, monkeypatch, way):
  config, run, whole = configs[way], tmp_path / 'run', tmp_path / 'undisturbed'
  assert train.train_and_evaluate(config, str(whole)) == 0
  write = Writer.write_scalars

  def stopping(self, step, scalars, phase=''):
    write(self, step, scalars, phase)
    if (step, phase) == (0, 'ct'):
      os.kill(os.getpid(), signal.SIGTERM)
  monkeypatch.setattr(Writer, 'write_scalars', stopping)
  assert train.train_and_evaluate(config, str(run), preempt_exit_code=7) == 7
  assert [p.name for p in (run / 'checkpoints').iterdir()] == ['2'] and not (run / 'DONE').exists()
  monkeypatch.undo()
  assert train.train_and_evaluate(config, str(run)) == 0
  got = tiny.metrics(run)
  assert got == tiny.metrics(whole) and set(got) == {(0, 'ct'), (1, 'xray'), (2, 'ct'), (3, 'xray')}
  assert all(row['train/skipped'] == 0 and row['data/bad_records'] == 0 for row in got.values())
  if way == 'shards':
    meta = json.loads((run / 'checkpoints' / '4' / 'meta' / 'metadata').read_text())
    assert meta['records']['manifest']['hash'] == manifest.meta(config.data.manifest)['hash']
