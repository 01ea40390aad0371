"""The table that `embed` writes: a row per sample, or per tile of it, as .npz or .csv."""
import collections
import csv
import json
import os

import numpy as np
from etils import epath

import unimiss_jax

SUFFIXES = '.npz', '.csv'


class Row:
  """What is known of one sample: the mean embedding of its tiles, or why there is none."""

  def __init__(self, sample, width: int, per_tile: bool):
    self.id, self.path, self.kind = sample.id, sample.path, sample.kind
    self.status, self.warnings = 'ok', []
    self.boxes = []              # of its tiles, in voxels of the whole scan
    self._sum = np.zeros(width)
    self._each = [] if per_tile else None

  def fail(self, error) -> None:
    """Notes a DataError."""
    self.status, self.warnings = error.code, [f'{error.reason}. FIX: {error.remedy}']

  def take(self, box, embedding: np.ndarray) -> None:
    """Adds the embedding [E] float32 of a tile."""
    self.boxes.append(box)
    self._sum += embedding
    if self._each is not None:
      self._each.append(embedding)

  def lines(self):
    """(number of tiles, box, embedding [E] float32) of each line of the table; NaN where there is none."""
    nowhere = (0, 0, 0), (0, 0, 0)
    if not self.boxes:
      return [(0, nowhere, np.full(len(self._sum), np.nan, np.float32))]
    if self._each is not None:
      return [(1, box, embedding) for box, embedding in zip(self.boxes, self._each)]
    return [(len(self.boxes), nowhere, np.float32(self._sum / len(self.boxes)))]


class Table:
  """Rows in the order of the source.

  Args:
    path: of the .npz or .csv; its folder is made, and tried, at once.
    width: of an embedding.
    per_tile: whether a tile is a line.
    about: what is known of the encoder and of how inputs are prepared.

  Raises:
    OSError: nothing can be written there.
  """

  def __init__(self, path, width: int, per_tile: bool, about: dict):
    self.path, self.width, self.per_tile, self.about = epath.Path(path), width, per_tile, about
    self.rows = []
    self._part = self.path.with_name(f'.{self.path.name}.{os.getpid()}.part')
    if self.path.is_dir():
      raise IsADirectoryError(f'{path} is a folder. FIX: name a file')
    self._part.parent.mkdir(parents=True, exist_ok=True)
    self._part.write_bytes(b'')
    self._part.unlink()

  def add(self, sample) -> Row:
    self.rows.append(Row(sample, self.width, self.per_tile))
    return self.rows[-1]

  def count(self, status: str) -> int:
    return sum(row.status == status for row in self.rows)

  def summary(self) -> str:
    """The last line."""
    lost = collections.Counter(row.status for row in self.rows if row.status != 'ok')
    told = f' ({", ".join(f"{n} {code}" for code, n in sorted(lost.items()))})' if lost else ''
    good = self.count('ok')
    warned = sum(row.status == 'ok' and bool(row.warnings) for row in self.rows)
    volumes = [row for row in self.rows if row.status == 'ok' and row.kind == 'volume']
    return (f'{len(self.rows)} samples: {good} ok, {warned} of them with warnings, {sum(lost.values())} failed{told}; '
            f'{len(volumes)} volumes of {sum(len(r.boxes) for r in volumes)} tiles; '
            + (f'wrote {self.path}, {self.width} numbers a row' if good else 'nothing was written'))

  def write(self) -> None:
    """Puts the file in its place when all of it is written."""
    try:
      if self.path.name.endswith('.npz'):
        with self._part.open('wb') as f:
          np.savez(f, **self._columns())
      else:
        with self._part.open('w') as f:
          self._csv(f)
      self._part.replace(self.path)
    except BaseException:
      self._part.unlink(missing_ok=True)
      raise

  def _lines(self):
    for row in self.rows:
      for line in row.lines():
        yield row, *line

  def _columns(self) -> dict:
    rows, counts, boxes, embeddings = zip(*self._lines())
    text = lambda name: np.array([getattr(row, name) for row in rows], str)
    out = {'id': text('id'), 'path': text('path'), 'kind': text('kind'), 'tiles': np.array(counts, np.int32),
           'status': text('status'), 'reason': np.array([_reason(row) for row in rows], str),
           'embedding': np.stack(embeddings)}
    if self.per_tile:
      corner, size = np.array(boxes, np.int32).swapaxes(0, 1)      # [N, 3]
      out |= {'z0': corner[:, 0], 'corner': corner, 'size': size}
    scalars = {k: self.about[k] for k in ('checkpoint', 'branch', 'weights_hash')}
    return out | scalars | {'config': json.dumps(self.about), 'version': unimiss_jax.__version__}

  def _csv(self, file) -> None:
    write = csv.writer(file, lineterminator='\n').writerow
    places = ['z0', 'y0', 'x0', 'depth', 'height', 'width'] * self.per_tile
    write(['id', 'path', 'kind', 'tiles', *places, 'status', 'reason', *(f'e{i}' for i in range(self.width))])
    for row, count, (corner, size), embedding in self._lines():
      numbers = [str(v) for v in embedding] if count else [''] * self.width    # the shortest text that is this float32
      write([row.id, row.path, row.kind, count, *(corner + size) * self.per_tile, row.status, _reason(row), *numbers])


def _reason(row) -> str:
  return ' | '.join(row.warnings)
