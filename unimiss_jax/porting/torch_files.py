"""Files of PyTorch weights -> nested dict of arrays. A pickle is never executed: only names on a list are rebuilt."""
from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import warnings
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from unimiss_jax.porting.errors import PortingError

WEIGHTS, ABOUT = 'model.safetensors', 'config.json'      # what an exported folder holds
MODEL = 'unimiss_jax'                                    # key of the file's metadata
MAGIC = b'PK\x03\x04', *(b'\x80' + bytes([protocol]) for protocol in range(2, 6))    # a zip archive, a bare pickle
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
  header = int.from_bytes(start[:8], 'little')      # of a safetensors file: its length, then a JSON object
  if start[8:9] == b'{' and not (start.startswith(MAGIC) and header > 1 << 32):
    return _safetensors(path)
  if start.startswith(MAGIC):
    return _torch(path)
  raise PortingError(f'{path}: neither a file of torch.save nor safetensors (it begins with {bytes(start)!r})')


def write(path, tensors: dict, model: dict | None = None) -> None:
  """One safetensors file for PyTorch, read back and compared before it is believed.

  Args:
    path: a local or remote file.
    tensors: name -> array.
    model: what `recorded` gives back: a file that is parted from its folder still knows its architecture.

  Raises:
    PortingError: what was read back is not what was written.
  """
  # safetensors writes the memory as it lies: an array that is not contiguous would come back with other values.
  tensors = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
  metadata = {'format': 'pt'} | ({MODEL: json.dumps(model)} if model else {})
  epath.Path(path).write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
  back = read(path)
  if bad := [n for n, a in tensors.items() if n not in back or back[n].dtype != a.dtype
             or back[n].tobytes() != a.tobytes() or back[n].shape != a.shape]:
    raise PortingError(f'{path}: {len(bad)} tensors differ when read back, the first is {bad[0]}. FIX: check the disk')


def recorded(path) -> dict:
  """The keyword arguments of the PyTorch network that a safetensors file of ours carries; {} for other files."""
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    with epath.Path(path).open('rb') as f:
      length = int.from_bytes(f.read(8), 'little')
      model = json.loads(json.loads(f.read(min(length, 1 << 26)))['__metadata__'][MODEL])
    return model if isinstance(model, dict) and isinstance(model.get('arch'), dict) else {}
  return {}


def sha(path) -> str:
  """Of a file's content."""
  return hashlib.blake2b(epath.Path(path).read_bytes(), digest_size=16).hexdigest()


def about(path) -> dict:
  """The config.json beside an exported file, if it is about this very file; {} else."""
  with contextlib.suppress(OSError, ValueError):
    found = json.loads((epath.Path(path).parent / ABOUT).read_text())
    if isinstance(found, dict) and 'sha' in found and found['sha'] == sha(path):
      return found
  return {}


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
  # torch.load believes the ending of a name; what is inside decides here.
  local = '://' not in str(path) and path.suffix != '.safetensors'
  with _quiet(), torch.serialization.safe_globals(_harmless(torch)):
    try:
      with contextlib.suppress(RuntimeError, ValueError):      # files of before PyTorch 1.6 cannot be mapped
        if local:
          return _entries(path, torch.load(str(path), 'cpu', weights_only=True, mmap=True))
      with io.BytesIO(path.read_bytes()) as f:
        return _entries(path, torch.load(f, 'cpu', weights_only=True))
    except PortingError:
      raise
    except Exception as e:      # torch has many for torn files
      raise PortingError(_why(path, e)) from e


def _entries(path, found) -> dict:
  if not isinstance(found, Mapping):
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
  if 'Weights only load failed' in text or isinstance(error, (TypeError, ValueError)):
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
