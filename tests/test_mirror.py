"""A run's small files where its folder is an object store."""
import logging

import pytest
from etils import epath

from data_pipelines import files
from data_pipelines.errors import DataError
from unimiss_jax import mirror


def test_files_are_uploaded_whole_and_a_later_life_goes_on_with_them(memory):
  first = mirror.Mirror(f'{memory}/run')
  assert first.local.is_dir() and '://' not in str(first.local)
  (first.local / 'report').mkdir()
  (first.local / 'metrics.jsonl').write_text('{"step": 0}\n')
  (first.local / 'report' / 'ct.png').write_bytes(b'picture')
  first.push()
  first.close()
  assert not first.local.exists()
  remote = epath.Path(memory) / 'run'
  assert (remote / 'report' / 'ct.png').read_bytes() == b'picture'

  second = mirror.Mirror(f'{memory}/run', fetch=('metrics.jsonl', 'logs/host_0.txt'))
  with (second.local / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 1}\n')
  second.close()
  assert (remote / 'metrics.jsonl').read_text() == '{"step": 0}\n{"step": 1}\n'


def test_an_upload_that_fails_is_a_warning_and_is_tried_again(memory, monkeypatch, caplog):
  m = mirror.Mirror(f'{memory}/run')
  (m.local / 'metrics.jsonl').write_text('1')
  write = gone(monkeypatch, m)
  with caplog.at_level(logging.WARNING):
    m.push()
    m._last.result()
  assert 'upload to memory://bucket/run failed (OSError: network' in caplog.text
  monkeypatch.setattr(type(m.remote), 'write_bytes', write)
  m.close()
  assert (epath.Path(memory) / 'run' / 'metrics.jsonl').read_text() == '1'


def gone(monkeypatch, m):
  write = type(m.remote).write_bytes

  def refuse(self, data):
    raise OSError('network')
  monkeypatch.setattr(type(m.remote), 'write_bytes', refuse)
  return write


def test_a_local_folder_is_its_own_mirror(tmp_path):
  m = mirror.Mirror(tmp_path)
  m.push()
  m.close()
  assert m.local == tmp_path and tmp_path.exists()


@pytest.mark.parametrize('path, text', [
    ('s5://bucket/run', r'SCHEME s5://bucket/run: "s5://" is not supported.*use a local path or gs://'),
    ('http://host/x', r'"http://" is not supported'),
])
def test_a_scheme_that_nothing_reads_is_refused_in_one_line(path, text):
  with pytest.raises(DataError, match=text) as e:
    files.check_storage(path)
  assert '\n' not in str(e.value)
  files.check_storage('/tmp')
  files.check_storage('relative/folder')


def test_a_package_that_is_missing_is_named(memory, monkeypatch):
  def missing(self):
    raise ImportError('Install gcsfs to access Google Storage')
  monkeypatch.setattr(type(epath.Path(memory)), 'exists', missing)
  with pytest.raises(DataError, match=r'needs a package \(Install gcsfs.*pip install "unimiss_jax\[gcs\]"'):
    files.check_storage(memory)
