"""Folders and glob patterns -> sorted lists of files, their bytes, and the lines that a user sees meanwhile."""
import glob
import hashlib
import os
import sys
import time

import fsspec
from etils import epath

from data_pipelines.errors import DataError

BLOCK = 1 << 20
PAIRS = ('.hdr.gz', '.hdr', '.img.gz', '.img')    # halves of a NIfTI sample


def check_storage(path) -> None:
  """Raises DataError for a path with a scheme that cannot be read or written here; local paths pass."""
  scheme, sep, _ = str(path).partition('://')
  if not sep:
    return
  try:
    epath.Path(path).exists()
  except KeyError as e:
    raise DataError('SCHEME', path, f'"{scheme}://" is not supported', 'use a local path or gs://') from e
  except ImportError as e:
    raise DataError('SCHEME', path, f'"{scheme}://" needs a package ({e})', 'pip install "unimiss_jax[gcs]"') from e
  except Exception as e:    # every backend has its own
    raise DataError('UNREADABLE', path, f'{type(e).__name__}: {e}', 'check name, permissions and network') from e


def read_bytes(path) -> bytes:
  """The content of a file, which is not empty; else DataError."""
  try:
    data = epath.Path(path).read_bytes()
  except Exception as e:    # every storage backend has its own
    raise DataError('UNREADABLE', path, f'{type(e).__name__}: {e}', 'check path and permissions') from e
  if not data:
    raise nothing(path)
  return data


def check_there(path) -> None:
  """Raises DataError UNREADABLE unless a file, a folder or something that a glob pattern matches is there."""
  path = os.path.expanduser(str(path))
  if '://' in path:
    there = bool(below(path)) if '*' in path else epath.Path(path).exists()
  else:
    there = os.path.exists(path) or any(glob.iglob(path, recursive=True))
  if not there:
    raise DataError('UNREADABLE', path, 'nothing is there', 'check the path; every host must see it')


def blocks(path):
  """Yields the content of a file, which may be empty, some of it at a time. Raises DataError UNREADABLE."""
  try:
    with epath.Path(path).open('rb') as file:
      while block := file.read(BLOCK):
        yield block
  except Exception as e:    # every storage backend has its own
    raise DataError('UNREADABLE', path, f'{type(e).__name__}: {e}', 'check path and permissions') from e


def nothing(path) -> DataError:
  return DataError('ZERO_BYTES', path, 'file has 0 bytes', 'copy or download it again')


def write_text(path, text: str) -> None:
  """Writes a file, and its folder where that is not there. Raises DataError WRITE."""
  try:
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except Exception as e:    # every storage backend has its own
    raise DataError('WRITE', path, f'{type(e).__name__}: {e}', 'check path, space and permissions') from e


def expand(spec: str) -> list[str]:
  """All files below folders (recursively) or matching glob patterns (`**` = any depth), sorted; no hidden ones.

  Args:
    spec: folders, patterns or files, separated by commas; local or with a scheme (gs://).
  """
  return sorted({f for part in spec.split(',') if part.strip() for f in below(part.strip())})


def below(part: str) -> list[str]:
  """Every file of a folder (hidden ones left out), or the files that match a glob pattern, in no order."""
  if '://' in part:    # epath's own walk loses the scheme
    check_storage(part.partition('*')[0])
    system, path = fsspec.core.url_to_fs(part)
    found = system.glob(path) if '*' in path else system.find(path)
    return [f'{part.partition("://")[0]}://{p.lstrip("/")}' for p in found]
  part = os.path.expanduser(part)
  out = []
  for match in [part] if os.path.exists(part) else glob.glob(part, recursive=True):
    inside = glob.glob(f'{glob.escape(match)}/**/*', recursive=True) if os.path.isdir(match) else [match]
    out += [f for f in inside if os.path.isfile(f)]
  return out


def absolute(path) -> str:
  path = os.fspath(path)
  return path.rstrip('/') if '://' in path else os.path.abspath(os.path.expanduser(path))


def sha(paths) -> str:
  """The content hash of a sample: blake2b (16 bytes, as hex) of a file, read in blocks.

  Args:
    paths: a file, a folder (a DICOM series), or a list of files. Several files, and the two halves of a .hdr/.img
      pair, are hashed one by one, and then the sorted hashes: neither names nor order count.

  Raises:
    DataError: UNREADABLE.
  """
  if isinstance(paths, str | os.PathLike):
    paths = _parts(os.fspath(paths))
  each = sorted(_sha(p) for p in paths)
  return each[0] if len(each) == 1 else hashlib.blake2b('\n'.join(each).encode(), digest_size=16).hexdigest()


def _parts(path: str) -> list[str]:
  suffix = next((s for s in PAIRS if path.lower().endswith(s)), None)
  if suffix:
    stem = path[:-len(suffix)]
    halves = [stem + s for s in PAIRS if epath.Path(stem + s).exists()]
    return halves or [path]
  inside = below(path) if epath.Path(path).is_dir() else [path]
  if not inside:
    raise DataError('UNREADABLE', path, 'folder without files', 'copy it again or remove it')
  return inside


def _sha(path) -> str:
  made = hashlib.blake2b(digest_size=16)
  for block in blocks(path):
    made.update(block)
  return made.hexdigest()


def single_threaded_blas() -> None:
  """Samples are made of many small matrix products in several threads or processes: a BLAS that starts threads of its
  own for each of them is 10 to 50 times slower."""
  try:
    from threadpoolctl import threadpool_limits
  except ImportError:    # then OPENBLAS_NUM_THREADS=1 in the environment does it
    return
  threadpool_limits(1, 'blas')


def say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def warn(error: DataError, consequence: str) -> None:
  """The one line of a file that is passed over."""
  say(f'WARN {error.code} {error.path}: {error.reason}; {consequence}. FIX: {error.remedy}')


class Progress:
  """Done, total, rate and time left on stderr, for work that takes more than 2 seconds."""

  def __init__(self, what: str, total: int):
    self.what, self.total, self.done = what, total, 0
    self.began = time.monotonic()
    self.shown = self.began    # a terminal sees one line that changes, a log file a line every half minute

  def advance(self) -> None:
    self.reach(self.done + 1)

  def reach(self, done: float) -> None:
    """Of a unit that takes long, fractions count."""
    self.done = done
    now = time.monotonic()
    every = 2 if self.shown == self.began or sys.stderr.isatty() else 30
    if now - self.shown > every and done:
      self.shown = now
      rate = self.done / (now - self.began)
      speed = f'{rate:.1f}' if rate >= 1 else f'{rate:.2g}'
      line = (f'{self.what}: {round(self.done, 1):.12g}/{self.total}, {speed}/s, '
              f'{(self.total - self.done) / rate:.0f} s left')
      print(line, end='\r' if sys.stderr.isatty() else '\n', file=sys.stderr, flush=True)

  def end(self) -> None:
    """Clears the line that changes, before others are printed."""
    if self.shown != self.began and sys.stderr.isatty():
      print('\x1b[2K', end='\r', file=sys.stderr, flush=True)
