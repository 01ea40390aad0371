"""Reading and writing weight files: what is whole comes back exactly, all else is refused with its reason."""
import argparse
import collections
import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from unimiss_jax.porting import PortingError, torch_files

torch = pytest.importorskip('torch')


class Payload:
  """Unpickling it would run a command."""

  def __reduce__(self):
    return os.system, (f'touch {os.environ["PAYLOAD_MARK"]}',)


def dump():
  """The shape of a released dump: two branches, counters, arguments, numpy numbers."""
  tensor = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0))
  student = collections.OrderedDict({'module.backbone.a': tensor(3, 4), 'module.head.b': tensor(5).bfloat16()})
  return {'student': student, 'teacher': {'backbone.a': tensor(3, 4) + 1}, 'epoch': 3,
          'optimizer': {'state': {0: {'exp_avg': tensor(3, 4)}}},
          'args': argparse.Namespace(lr=np.float64(.1), gpu=np.int64(3), name='x'), 'best': np.float32(.5)}


@pytest.mark.parametrize('zipped', [True, False])
def test_a_dump_is_read_without_executing_it(tmp_path, zipped):
  torch.save(dump(), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
  found = torch_files.read(tmp_path / 'a.pth')
  assert torch.equal(found['student']['module.backbone.a'], dump()['student']['module.backbone.a'])
  assert found['epoch'] == 3 and found['args'].gpu == 3 and found['best'] == np.float32(.5)


def test_a_remote_file(memory):
  from etils import epath
  torch_files.write(f'{memory}/w.safetensors', {'a': np.arange(3)})
  np.testing.assert_array_equal(torch_files.read(f'{memory}/w.safetensors')['a'], np.arange(3))
  import io
  buffer = io.BytesIO()
  torch.save(dump(), buffer)
  epath.Path(f'{memory}/w.pth').write_bytes(buffer.getvalue())
  assert torch_files.read(f'{memory}/w.pth')['epoch'] == 3


def test_safetensors_hold_arrays_that_were_not_contiguous(tmp_path):
  """The library writes memory as it lies: a transposed kernel would come back with other values."""
  from safetensors.torch import load_file
  rng = np.random.default_rng(0)
  tensors = {'turned': rng.random((4, 3, 2)).T, 'cut': rng.random((6, 6))[::2, 1::2],
             'fortran': np.asfortranarray(rng.random((3, 4))), 'half': rng.random((3, 4)).astype(ml_dtypes.bfloat16).T,
             'scalar': np.array(2.)}
  torch_files.write(tmp_path / 'w.safetensors', tensors)
  for back in (torch_files.read(tmp_path / 'w.safetensors'),
               {n: t.float().numpy() for n, t in load_file(tmp_path / 'w.safetensors').items()}):
    for name, array in tensors.items():
      np.testing.assert_array_equal(np.asarray(back[name], np.float32), np.asarray(array, np.float32))
      assert back[name].shape == array.shape


def test_the_length_of_the_header_does_not_matter(tmp_path):
  """Its lowest byte may be that of a pickle."""
  for n in range(1, 400, 3):
    torch_files.write(tmp_path / 'w.safetensors', {'a' * n: np.zeros(2, np.float32)})
    assert isinstance(torch_files.read(tmp_path / 'w.safetensors')['a' * n], np.ndarray)


def test_a_write_that_lies_is_noticed(tmp_path, monkeypatch):
  read = torch_files.read
  monkeypatch.setattr(torch_files, 'read', lambda path: {n: a + 1 for n, a in read(path).items()})
  with pytest.raises(PortingError, match='1 tensors differ when read back, the first is a. FIX: check the disk'):
    torch_files.write(tmp_path / 'w.safetensors', {'a': np.zeros(3)})


def broken(kind, path):
  """Writes the faulty file of this kind."""
  torch.save(dump(), path)
  whole = path.read_bytes()
  torch_files.write(path, {'a': np.zeros((4, 3)), 'b': np.ones(2)})
  safe = path.read_bytes()
  if kind in ('payload', 'old payload'):
    torch.save({'student': Payload()}, path, _use_new_zipfile_serialization=kind == 'payload')
  elif kind == 'module':
    torch.save(torch.nn.Linear(2, 2), path)
  elif kind == 'list':
    torch.save([torch.zeros(2)], path)
  else:
    path.write_bytes({
        'text': b'these are no weights\n' * 9, 'empty': b'', 'short': b'PK', 'truncated': whole[:len(whole) // 2],
        'pickle': pickle.dumps({'a': Payload()}), 'zip': b'PK\x03\x04' + bytes(99), 'json': b'{"a": [1, 2]}' * 9,
        'truncated safetensors': safe[:-10], 'endless header': (10**12).to_bytes(8, 'little') + safe[8:],
        'lying shape': safe.replace(b'[4,3]', b'[9,3]'), 'lying dtype': safe.replace(b'"F64"', b'"F99"'),
        'lying offset': safe.replace(b'[96,112]', b'[96,999]')}[kind])
  return path


@pytest.mark.parametrize('kind, text', [
    ('payload', 'refused: its pickle wants to call posix.system; nothing was executed. FIX'),
    ('old payload', 'refused: its pickle wants to call posix.system'),
    ('pickle', 'refused: its pickle holds more than arrays, numbers and text'),
    ('module', 'refused: its pickle wants to call torch.nn.modules.linear.Linear'),
    ('list', 'holds a list, not named tensors'), ('text', 'neither a file of torch.save nor safetensors'),
    ('json', 'neither a file'), ('short', 'neither a file'), ('empty', 'the file is empty'),
    ('truncated', 'not a whole file of torch.save'), ('zip', 'not a whole file of torch.save'),
    ('truncated safetensors', 'damaged safetensors'), ('endless header', 'damaged safetensors'),
    ('lying shape', 'damaged safetensors'), ('lying dtype', 'damaged safetensors'),
    ('lying offset', 'damaged safetensors')])
def test_what_is_no_weight_file(tmp_path, monkeypatch, kind, text):
  mark = tmp_path / 'executed'
  monkeypatch.setenv('PAYLOAD_MARK', str(mark))
  path = broken(kind, tmp_path / 'w.pth')
  with pytest.raises(PortingError, match=text) as e:
    torch_files.read(path)
  assert str(e.value).startswith(f'{path}: ') and '\n' not in str(e.value) and not mark.exists()


def test_no_file(tmp_path):
  with pytest.raises(PortingError, match='w.pth: no such file'):
    torch_files.read(tmp_path / 'w.pth')


def test_cut_at_any_place_is_refused_or_whole(tmp_path):
  """Truncated and mutated files: PortingError or the tensors, never another exception."""
  rng = np.random.default_rng(0)
  torch.save(dump(), tmp_path / 'a')
  torch_files.write(tmp_path / 'b', {'a': np.zeros((4, 3)), 'b': np.ones(2)})
  for file in ('a', 'b'):
    whole, refused = (tmp_path / file).read_bytes(), 0
    for i in range(150):
      data = bytearray(whole[:rng.integers(len(whole))] if i % 2 else whole)
      for place in rng.integers(len(data) or 1, size=0 if i % 2 else 3):
        data[place] = rng.integers(256)
      (tmp_path / 'bad').write_bytes(data)
      try:
        torch_files.read(tmp_path / 'bad')
      except PortingError:
        refused += 1
    assert refused > 80


@pytest.mark.slow
def test_a_dump_of_one_gigabyte_fits_into_three(tmp_path):
  """Peak memory of a process that reads and converts the student of a full-size dump with teacher and optimiser."""
  code = '''
import sys, torch
from unimiss_jax import weights
if sys.argv[2] == 'write':
  from unimiss_jax.porting import torch_mit
  state = lambda: torch_mit.UniMiSSPlus().state_dict()
  student = {'module.' + k: v for k, v in state().items()}
  moment = torch.zeros_like
  moments = {i: {'exp_avg': moment(v), 'exp_avg_sq': moment(v)} for i, v in enumerate(student.values())}
  torch.save({'student': student, 'teacher': state(), 'optimizer': {'state': moments}, 'epoch': 401}, sys.argv[1])
else:
  found = weights.read(sys.argv[1])
  told = open('/proc/self/status').read()      # ru_maxrss may be that of the parent
  print(told.split('VmHWM:')[1].split()[0])
'''
  path = tmp_path / 'dump.pth'
  command = [sys.executable, '-c', code, path]
  run = lambda what: subprocess.run([*command, what], check=True, capture_output=True, text=True)
  run('write')
  assert path.stat().st_size > 1e9
  assert int(run('read').stdout.split()[-1]) < 3 * 2**20
