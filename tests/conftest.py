"""Shared by all tests: 8 virtual CPU devices, the compilation cache, the folders of fixtures and real data."""
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
DEVICES = '--xla_force_host_platform_device_count'
if DEVICES not in os.environ.get('XLA_FLAGS', ''):      # beside those of launch.env
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {DEVICES}=8'.strip()
ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import fsspec  # noqa: E402
import pytest  # noqa: E402
from etils.epath import backend, gpath, register  # noqa: E402


@pytest.fixture(scope='session')
def fixtures() -> pathlib.Path:
  """Synthetic reference arrays shipped with the tests."""
  return ROOT / 'tests' / 'fixtures'


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """The folder with real images and large fixtures ($UNIMISS_SHARED, else ../shared); skips where it is absent."""
  path = pathlib.Path(os.environ.get('UNIMISS_SHARED', ROOT.parent / 'shared'))
  if not (path / 'data').is_dir():
    pytest.skip(f'no shared data at {path}: set UNIMISS_SHARED to run this test')
  return path


class _Memory(type(backend.fsspec_backend)):
  def fs(self, path):
    return fsspec.filesystem('memory')


@pytest.fixture
def memory(monkeypatch) -> str:
  """'memory://<name>', an empty remote folder that epath can read and write: stands for gs://."""
  monkeypatch.setattr(gpath, '_URI_PREFIXES', (*gpath._URI_PREFIXES, 'memory://'))
  monkeypatch.setattr(gpath, '_URI_SCHEMES', gpath._URI_SCHEMES | {'memory'})
  monkeypatch.setitem(gpath._URI_MAP_ROOT, 'memory://', '/memory/')
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, 'memory', _Memory())
  monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, 'memory://', gpath.PosixGPath)
  fsspec.filesystem('memory').store.clear()
  return 'memory://bucket'
