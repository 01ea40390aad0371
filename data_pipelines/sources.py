"""Random access to training records: a source has a length, and source[i] gives record i, always the same.

CT record: volume int16 [D, H, W] = [S, A, R] HU, spacing_mm (z, y, x), index, name, bad; with whole=True also
whole (the whole scan, reduced to about 3 mm) and whole_spacing_mm. Of data.modality=mr or other: volume int16
[C, D, H, W] of C sequences, with their scale, offset and pad float32 [C] (intensities.py). X-ray record: image uint8
or uint16 [H, W], index, group, name, bad. Records of one scan, or of one group of a manifest, share their group.
`bad`: the file of record `index` failed after the start, and this is the next good one. Decoded files stay in a
bounded cache. `largest`: {'volume', 'whole' or 'image': shape that holds this array of every record, [D, H, W] or
[H, W]}, as far as a source knows it.
"""
import collections
import functools
import hashlib
import os
import threading
from concurrent import futures

import numpy as np

from data_pipelines import files, manifest, phantom, readers, sequences, tiles
from data_pipelines.errors import DataError

SHOWN = 3                # warnings of one kind; further ones are only counted
CACHE_BYTES = 1 << 30    # per process: 768 phantoms, or some forty scans


def _digest(text: str) -> str:
  """Tells lists of records apart: a run can go on only with the records that it began with."""
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Cache:
  """Least recently used values up to a sum of bytes (or one value, if that is larger); one maker per key at a time."""

  def __init__(self, limit: int = CACHE_BYTES):
    self.limit = limit
    self.bytes = 0
    self._values = collections.OrderedDict()    # key -> (value, bytes)
    self._making = {}                           # key -> lock
    self._lock = threading.Lock()

  def __reduce__(self):    # a worker process starts with an empty one
    return type(self), (self.limit,)

  def __len__(self):
    return len(self._values)

  def get(self, key, make):
    """The value of a key; make() -> tuple with arrays, or records of arrays, in it."""
    found = self._find(key)
    if found:
      return found[0]
    with self._lock:
      making = self._making.setdefault(key, threading.Lock())
    with making:
      found = self._find(key)
      if found:
        return found[0]
      try:
        value = make()
        self._put(key, value)
      finally:
        with self._lock:
          self._making.pop(key, None)
    return value

  def _find(self, key):
    with self._lock:
      if key in self._values:
        self._values.move_to_end(key)
        return self._values[key]

  def _put(self, key, value):
    inside = [a for v in value for a in (v.values() if isinstance(v, dict) else (v,))]
    arrays = [a for a in inside if isinstance(a, np.ndarray)]
    for a in arrays:    # records are views of them
      a.flags.writeable = False
    size = sum(a.nbytes for a in arrays)
    with self._lock:
      self._values[key] = value, size
      self.bytes += size
      while self.bytes > self.limit and len(self._values) > 1:
        self.bytes -= self._values.popitem(last=False)[1][1]


def hull(shapes: list[dict]) -> dict:
  """{name: shape that holds those of all}, of the names that all have."""
  names = set.intersection(*map(set, shapes)) if shapes else ()
  return {name: tuple(max(sizes) for sizes in zip(*(s[name] for s in shapes))) for name in names}


# ---- phantoms

class PhantomCT:
  """Phantoms of one index range, depth pooled in pairs: volume [24, 112, 112], spacing (13, 3.4, 3.4) mm."""

  def __init__(self, seed: int, records: int, *, part: str = 'ct', whole: bool = False, cache_bytes: int = CACHE_BYTES):
    self.seed, self.whole = seed, whole
    self.indices = _indices(part, records)
    self.cache = Cache(cache_bytes)

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, i: int) -> dict:
    volume, spacing, _ = self._get(i)
    record = {'volume': volume, 'spacing_mm': spacing, 'index': i, 'group': i, 'name': f'phantom {self.indices[i]}',
              'bad': False}
    return record | ({'whole': volume, 'whole_spacing_mm': spacing} if self.whole else {})

  @property
  def digest(self) -> str:
    return _digest(f'phantoms {self.seed} {self.indices}')

  def listing(self) -> list[dict]:
    return [{'id': f'phantom {i} of seed {self.seed}'} for i in self.indices]

  @property
  def largest(self) -> dict:
    return dict.fromkeys(('volume', 'whole'), self._get(0)[0].shape)    # all are of one shape

  def labels(self, i: int) -> dict:
    """{finding: 0 or 1} of record i."""
    return self._get(i)[2]

  def _get(self, i):
    return self.cache.get(i, lambda: self._make(self.indices[i]))

  def _make(self, index):
    made = _phantom(self.seed, index)
    d, h, w = made.hu.shape
    volume = np.rint(made.hu.reshape(d // 2, 2, h, w).mean(1)).astype(np.int16)
    z, y, x = made.spacing_mm
    return volume, (2. * z, float(y), float(x)), made.labels


class PhantomXray:
  """X-ray pictures of phantoms of one index range: image uint8 [128, 128]."""

  def __init__(self, seed: int, records: int, *, part: str = 'xray', cache_bytes: int = CACHE_BYTES):
    self.seed = seed
    self.indices = _indices(part, records)
    self.cache = Cache(cache_bytes)

  def __len__(self):
    return len(self.indices)

  @property
  def digest(self) -> str:
    return _digest(f'phantom radiographs {self.seed} {self.indices}')

  def listing(self) -> list[dict]:
    return [{'id': f'phantom {i} of seed {self.seed}'} for i in self.indices]

  @property
  def largest(self) -> dict:
    return {'image': self[0]['image'].shape}

  def __getitem__(self, i: int) -> dict:
    index = self.indices[i]
    image, = self.cache.get(i, lambda: (phantom.xray(_phantom(self.seed, index), self.seed, index),))
    return {'image': image, 'index': i, 'group': i, 'name': f'phantom {index}', 'bad': False}


@functools.lru_cache(maxsize=16)    # evaluation asks for the CT and the X-ray of a phantom in turn, in 8 threads
def _phantom(seed: int, index: int):
  return phantom.make(seed, index)


def _indices(part: str, records: int) -> range:
  known = phantom.INDICES[part]
  if not 0 < records <= len(known):
    raise ValueError(f'{records} phantoms of part "{part}": must be between 1 and {len(known)}')
  return known[:records]


# ---- files

class _Folder:
  """Samples of a folder, or those that rows of a manifest name, checked once at the start; one that fails later is
  replaced by the next good record."""

  def __init__(self, spec: str, on_bad_file: str, cache_bytes: int, rows: list[dict] | None):
    self.spec, self.on_bad_file = spec, on_bad_file
    self.cache = Cache(cache_bytes)
    self.failed = {}    # index of an item -> DataError
    self.sizes = []     # of the checked files, {array: shape}, in any order
    if rows is None:
      found = self.discover(spec)
      rows = [{}] * len(found.items)
    else:
      self.leaf = f'data.manifest, {self.kind}s'
      found, rows = _named(rows, self.kind)
    if found.faults and (on_bad_file == 'stop' or len(found.faults) == 1 and not found.items):
      raise found.faults[0]
    total = len(found.items) + len(found.faults)
    if not total:
      raise readers.empty(spec, self.kind, found, self.leaf)
    self.items, self.rows, self.parts = [], [], []    # rows: {} in a folder; parts: (index of an item, its part)
    warned = collections.Counter()
    refused = collections.Counter(fault.code for fault in found.faults)
    for fault in found.faults:
      files.warn(fault, 'skipped')
    for item, row, (parts, warnings) in zip(found.items, rows, self._check_all(found.items, rows)):
      if isinstance(parts, DataError):
        refused[parts.code] += 1
        continue
      self.parts += [(len(self.items), part) for part in parts]
      self.items.append(item)
      self.rows.append(row)
      for warning in warnings:
        code = warning.split()[1]
        warned[code] += 1
        if warned[code] <= SHOWN:
          files.say(warning)
    count = lambda c: ', '.join(f'{n} {code}' for code, n in sorted(c.items()))
    files.say(f'{self.leaf}: {total} files, {len(self.items)} usable, {len(self.parts)} records'
        + (f'; refused: {count(refused)}' if refused else '') + (f'; warnings: {count(warned)}' if warned else '')
        + (f'; ignored: {found.others}' if found.others else ''))
    if not self.items:
      raise DataError('EMPTY_DIR', spec, f'none of {total} files is usable ({count(refused)})', 'see the lines above')

  def __len__(self):
    return len(self.parts)

  @property
  def largest(self) -> dict:
    return hull(self.sizes)

  @functools.cached_property
  def root(self) -> str:
    return os.path.commonpath([os.path.dirname(item.path) for item in self.items])

  @functools.cached_property
  def digest(self) -> str:
    return _digest('\n'.join(self.name(*part) for part in self.parts))

  def listing(self) -> list[dict]:
    """Its records as rows of a manifest."""
    return [{'id': self.name(*part)} for part in self.parts]

  def __getitem__(self, i: int) -> dict:
    for shift in range(len(self)):
      file, part = self.parts[(i + shift) % len(self)]
      if file not in self.failed:
        try:
          row = self.rows[file]
          group = manifest.number(row['group']) if row else file
          record = self.record(self.decoded(self.items[file], row), part)
          return record | {'index': i, 'name': self.name(file, part), 'group': group, 'bad': shift > 0}
        except DataError as e:
          if self.failed.setdefault(file, e) is e and self.on_bad_file == 'skip':
            files.warn(e, 'replaced by the next good record')
      if self.on_bad_file == 'stop':
        raise self.failed[file]
    raise DataError('EMPTY_DIR', self.spec, 'not one record can be read any more', 'check the disk, then start again')

  def discover(self, spec: str) -> readers.Found:
    return readers.discover(spec, self.kind)

  def name(self, file: int, part: int | None) -> str:
    name = self.rows[file].get('id') or os.path.relpath(self.items[file].path, self.root)
    return name + (f' z{part}' if part is not None else '')

  def decoded(self, item: readers.Item, row: dict) -> tuple:
    """decode(item), or what the cache has of it. Raises DataError CHANGED, if it is not the content that row says."""
    def make():
      if 'sha' in row:
        readers.sha(item, row['sha'])
      return self.decode(item)
    return self.cache.get(item.path, make)

  def _check_all(self, items, rows):
    """check(item, row) of all in order, in threads; yields (parts or DataError, warnings)."""
    def one(item, row):
      try:
        return self.check(item, row)
      except DataError as e:
        return e, ()
    progress = files.Progress(f'{self.leaf}: checking files', len(items))
    pool = futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
      for result in pool.map(one, items, rows):
        progress.advance()
        if isinstance(result[0], DataError):
          if self.on_bad_file == 'stop':
            raise result[0]
          files.warn(result[0], 'skipped')
        yield result
    finally:
      pool.shutdown(cancel_futures=True)


class CTFolder(_Folder):
  """Tiles of the scans (NIfTI, DICOM series) of a folder. Every scan is decoded once at the start.

  Args:
    spec: folder or glob pattern, several of them separated by commas.
    modality: 'ct' refuses files whose values are not HU; 'mr' and 'other' store z-scores.
    sequences: ends of the names of what belongs together, see sequences.py; () = every file is a scan.
    whole: records carry the whole scan, reduced to about 3 mm; of CT alone.
    on_bad_file: 'skip' (one line per bad file) or 'stop' (DataError).
    cache_bytes: of decoded scans kept in memory.
    rows: of the manifest at `spec`: the files that they name, in their order, instead of all that lie there.
    tile: slices of a record; 0 = whole scans.

  Raises:
    DataError: EMPTY_DIR, or the fault of the first bad file with on_bad_file='stop'.
  """
  leaf, kind = 'data.ct', 'volume'

  def __init__(self, spec, *, modality='ct', sequences=(), whole=False, on_bad_file='skip', cache_bytes=CACHE_BYTES,
               rows=None, tile=tiles.TILE):
    self.modality, self.sequences, self.whole, self.tile = modality, sequences, whole, tile
    self.depth = {}
    super().__init__(spec, on_bad_file, cache_bytes, rows)

  def discover(self, spec):
    found = super().discover(spec)
    return sequences.of_items(found, self.sequences) if self.sequences else found

  def decode(self, item) -> tiles.Scan:
    scan = tiles.read(item, self.modality, self.whole, tile=self.tile)
    depth, now = self.depth.setdefault(item.path, scan.volume.shape[-3]), scan.volume.shape[-3]
    if depth != now:
      raise DataError('CHANGED', item.path, f'has {now} slices, had {depth} at the start',
                      'leave the files alone during a run')
    return scan

  def check(self, item, row):
    scan = self.decoded(item, row)
    depth, *plane = scan.volume.shape[-3:]
    shape = (self.tile or depth, *plane)
    self.sizes.append({'volume': shape} | ({'whole': scan.whole.shape} if self.whole else {}))
    return tiles.starts(depth, self.tile), scan.warnings

  def record(self, scan: tiles.Scan, start: int) -> dict:
    return tiles.cut(scan, start, self.tile)


class XrayFolder(_Folder):
  """Pictures of a folder; only their headers are read at the start. Arguments and errors as CTFolder's."""
  leaf, kind = 'data.xray', 'image'

  def __init__(self, spec, *, on_bad_file='skip', cache_bytes=CACHE_BYTES, rows=None):
    super().__init__(spec, on_bad_file, cache_bytes, rows)

  def decode(self, item):
    return (readers.image(item).array,)

  def check(self, item, row):
    self.sizes.append({'image': readers.check_image(item)})
    return (None,), ()

  def record(self, decoded, part) -> dict:
    return {'image': decoded[0]}


def _named(rows, kind: str) -> tuple[readers.Found, list[dict]]:
  """What rows of a manifest name, as `readers.discover` gives it, and the row of each item."""
  items, mine, faults = [], [], []
  for row in rows:
    try:
      items.append(readers.of_row(row | {'kind': kind}))
      mine.append({k: row[k] for k in ('id', 'group', 'sha') if k in row})    # worker processes get them, too
    except DataError as e:
      faults.append(e)
  return readers.Found(items, '', faults), mine


def one_ct(item, config) -> dict:
  """The middle tile of one scan (readers.Item, or a path) as a record, for evaluation. Raises DataError."""
  item = item if isinstance(item, readers.Item) else readers.item(item, 'volume')
  tile = config.data.tile
  scan = tiles.read(item, config.data.modality, needs_whole(config), tile=tile)
  middle = (scan.volume.shape[-3] - tile) // 2
  return tiles.cut(scan, middle, tile) | {'index': 0, 'name': os.path.basename(item.path), 'bad': False}


def needs_whole(config) -> bool:
  """Whether records carry the whole scan: it is only there to be rendered."""
  return config.drr.scope == 'volume' and config.data.modality == 'ct'
