"""The small files of a run (metrics, logs, pictures) as local files, whatever its folder is.

An object store cannot append: there they are written to a temporary folder and uploaded whole whenever asked, in a
thread. Checkpoints do not pass through here.
"""
import logging
import pathlib
import shutil
import tempfile
from concurrent import futures

from etils import epath


class Mirror:
  """`local` holds the small files of `folder`: the folder itself, or a copy that push() uploads."""

  def __init__(self, folder, fetch=()):
    """fetch: files of a former life that this one goes on with."""
    remote = '://' in str(folder)
    self.remote = epath.Path(folder) if remote else None
    self.local = pathlib.Path(tempfile.mkdtemp(prefix='unimiss_jax_')) if remote else pathlib.Path(folder)
    self._pushed = {}
    self._thread = futures.ThreadPoolExecutor(1) if remote else None
    self._last = None
    for name in fetch if remote else ():
      if (self.remote / name).exists():
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.remote / name).read_bytes())

  def push(self) -> None:
    """Uploads what has changed, unless an upload is under way."""
    if self._thread and (self._last is None or self._last.done()):
      self._last = self._thread.submit(self._upload)

  def _upload(self):
    try:
      for file in sorted(p for p in self.local.rglob('*') if p.is_file()):
        stat = file.stat()
        stamp = stat.st_mtime_ns, stat.st_size
        if self._pushed.get(file) != stamp:
          target = self.remote / file.relative_to(self.local).as_posix()
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(file.read_bytes())
          self._pushed[file] = stamp
    except Exception as e:     # tried again at the next push: the run matters more than its log
      logging.warning('upload to %s failed (%s: %s); tried again later', self.remote, type(e).__name__, e)

  def flush(self) -> None:
    """As push, and waits for it: before a checkpoint is written that goes on from these files."""
    if self._thread:
      self._thread.submit(self._upload).result()

  def close(self) -> None:
    """The last upload; the temporary copy goes."""
    if self._thread:
      self.flush()
      self._thread.shutdown()
      shutil.rmtree(self.local, ignore_errors=True)
