"""Files of PyTorch weights -> nested dict of arrays. A pickle is never executed: only names on a list are rebuilt."""
from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from unimiss_jax.porting.errors import PortingError

WEIGHTS, ABOUT = 'model.safetensors', 'config.json'      # what an exported folder holds
MAGIC = b'PK\x03\x04', b'\x80'                          # of torch.save: a zip archive, a bare pickle
DTYPES = {'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'BF16': ml_dtypes.bfloat16, 'BOOL': '?',
          **{f'{sign.upper()}{8 * n}': f'{sign}{n}' for sign in 'iu' for n in (1, 2, 4, 8)}}


def read(path) -> dict:
  """What a file holds: tensors by name, in the nesting of the file.

  Args:
    path: `.safetensors`, or a file of torch.save; the content decides, not the ending.

  Raises:
    PortingError: not such a file, truncated, or a pickle that wants more than arrays, numbers and text.
  """
  path = epath.Path(path)
  if not path.is_file():
    raise PortingError(f'{path}: no such file')
  with path.open('rb') as f:
    start = f.read(16)
  if not start:
    raise PortingError(f'{path}: the file is empty. FIX: copy it again')
  if start.startswith(MAGIC):
    return _torch(path)
  if start[8:9] == b'{':
    return _safetensors(path)
  raise PortingError(f'{path}: neither a file of torch.save nor safetensors (it begins with {bytes(start)!r})')


def write(path, tensors: dict) -> None:
  """One safetensors file for PyTorch, read back and compared before it is believed.

  Args:
    path: a local or remote file.
    tensors: name -> array.

  Raises:
    PortingError: what was read back is not what was written.
  """
  # safetensors writes the memory as it lies: an array that is not contiguous would come back with other values.
  tensors = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
  epath.Path(path).write_bytes(safetensors.numpy.save(tensors, metadata={'format': 'pt'}))
  back = read(path)
  if bad := [n for n, a in tensors.items() if n not in back or back[n].dtype != a.dtype
             or back[n].tobytes() != a.tobytes() or back[n].shape != a.shape]:
    raise PortingError(f'{path}: {len(bad)} tensors differ when read back, the first is {bad[0]}. FIX: check the disk')


def about(path) -> dict:
  """The config.json beside exported weights; {} where there is none of ours."""
  file = epath.Path(path).parent / ABOUT
  try:
    found = json.loads(file.read_text())
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) and 'torch' in found else {}


def _safetensors(path) -> dict:
  try:
    return {name: np.frombuffer(raw['data'], DTYPES[raw['dtype']]).reshape(raw['shape'])
            for name, raw in safetensors.deserialize(path.read_bytes())}
  except (safetensors.SafetensorError, ValueError, KeyError) as e:
    raise PortingError(f'{path}: damaged safetensors ({type(e).__name__}: {" ".join(str(e).split())[:200]}). FIX: copy '
                       'the file again') from e


def _torch(path) -> dict:
  try:
    import torch
  except ImportError as e:
    raise PortingError(f'{path}: PyTorch reads this file, and is not installed. FIX: pip install torch') from e
  local = '://' not in str(path)
  with _quiet(), torch.serialization.safe_globals(_harmless(torch)):
    try:
      with contextlib.suppress(RuntimeError, ValueError):      # files of before PyTorch 1.6 cannot be mapped
        if local:
          return _entries(path, torch.load(str(path), 'cpu', weights_only=True, mmap=True))
      with (path.open('rb') if local else io.BytesIO(path.read_bytes())) as f:
        return _entries(path, torch.load(f, 'cpu', weights_only=True))
    except PortingError:
      raise
    except Exception as e:      # torch has many for torn files
      raise PortingError(_why(path, e)) from e


def _entries(path, found) -> dict:
  if not hasattr(found, 'items'):
    raise PortingError(f'{path}: holds a {type(found).__name__}, not named tensors. FIX: save a state_dict()')
  return found


def _harmless(torch) -> list:
  """What the released dumps hold beside tensors: their arguments and numpy numbers."""
  import argparse

  from numpy._core import multiarray
  dtypes = [np.dtype, *{type(np.dtype(code)) for code in '?bhilqBHILQefd'}]
  old = [(multiarray.scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]
  return [argparse.Namespace, *dtypes, *old]


def _why(path, error) -> str:
  text = ' '.join(str(error).split())
  if 'Weights only load failed' in text:
    found = re.search(r'GLOBAL ([\w.]+)|Unsupported class ([\w.]+)|([\w.]+) was not an allowed', text)
    what = ('holds more than arrays, numbers and text' if not found else
            f'wants to call {next(filter(None, found.groups()))}')
    return f'{path}: refused: its pickle {what}; nothing was executed. FIX: save a plain state_dict() with torch.save'
  return f'{path}: not a whole file of torch.save ({text[:200] or type(error).__name__}). FIX: copy the file again'


@contextlib.contextmanager
def _quiet():
  """torch tells some faults on its logger and as warnings as well."""
  log = logging.getLogger('torch')
  level = log.level
  log.setLevel(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    log.setLevel(level)
