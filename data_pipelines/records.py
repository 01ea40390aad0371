"""Shards of prepared records: ArrayRecord files in the layout of tensorflow_datasets, without TensorFlow.

A prepared folder holds up to three data sets, each readable by `tfds.builder_from_directory(FOLDER/<kind>/1.0.0)`:
  ct     tiles of volumes: of CT in HU, of other modalities as intensities.py stores them
  whole  every CT volume once more as a whole, reduced to about 3 mm, for frontal DRR
  xray   radiographs
Records are written one per group, so that any of them is one read; voxels are stored as they lie in memory (unpacking
a compressed tile costs more than training on it, see benchmarks/RESULTS.md).
"""
import bisect
import hashlib
import json
import math
import os
import platform
import threading
import time
import zlib

import numpy as np
from etils import epath

from data_pipelines.errors import DataError

KINDS = ('ct', 'whole', 'xray')
SPLITS = ('train', 'val', 'test')
VERSION = '1.0.0'
READ, OPEN = 'readahead_buffer_size:0', 64      # options of a reader; how many files are held open
RETRY_S = .1
OPTIONS = {'none': 'group_size:1,uncompressed', 'zstd': 'group_size:1,zstd:3'}
SCALE_8BIT = 257      # 255 * 257 = 65535: an 8-bit picture as 16 bit, and back, exactly


def features(kind: str, modality: str = 'ct'):
  """The tfds.features.FeaturesDict of a kind."""
  from tensorflow_datasets import features as f  # late: a second of import
  text, number = f.Text(), lambda dtype, *shape: f.Tensor(shape=shape, dtype=dtype)
  common = {'id': text, 'group': text, 'label': text}
  volume = lambda rank: f.Tensor(shape=(None,) * rank, dtype=np.int16, encoding='bytes')
  tile = {'spacing_mm': number(np.float32, 3), 'volume_id': text, 'z0': number(np.int32)}
  scales = {name: number(np.float32, None) for name in ('scale', 'offset', 'pad')}
  return f.FeaturesDict({
      'ct': common | tile | ({'volume': volume(3), 'whole': number(np.int32)} if modality == 'ct' else
                             {'volume': volume(4), **scales}),
      'whole': common | {'volume': volume(3), 'spacing_mm': number(np.float32, 3)},
      'xray': common | {'image': f.Tensor(shape=(None, None), dtype=np.uint16, encoding='zlib'),
                        'bits': number(np.int32), 'view': text},
  }[kind])


def folder(root, kind: str) -> epath.Path:
  return epath.Path(root) / kind / VERSION


def shard_name(kind: str, split: str, shard: int, shards: int) -> str:
  """The name that tensorflow_datasets expects."""
  return f'{kind}-{split}.array_record-{shard:05d}-of-{shards:05d}'


class Writer:
  """One shard; it appears under its name when it is complete, never before.

  Args:
    path: of the finished file.
    kind, modality: of its records.
    compress: a key of OPTIONS.
  """

  def __init__(self, path, kind: str, compress: str = 'none', modality: str = 'ct'):
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer
    self.path = epath.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.part = part(self.path)
    self._features = features(kind, modality)
    self._encode = example_serializer.ExampleSerializer(self._features.get_serialized_info()).get_tf_example
    self._writer = array_record_module.ArrayRecordWriter(os.fspath(self.part), OPTIONS[compress])
    self._hash = hashlib.blake2b(digest_size=16)
    self.count = self.bytes = 0

  def write(self, record: dict) -> None:
    example = self._encode(self._features.encode_example(record))
    data = example.SerializeToString(deterministic=True)      # else the order of fields changes from process to process
    self._writer.write(data)
    self._hash.update(data)
    self.count, self.bytes = self.count + 1, self.bytes + len(data)

  def close(self) -> dict:
    """Puts the shard in its place: {'records', 'bytes', 'hash'}."""
    self._writer.close()
    size = self.part.stat().length
    put(self.part, self.path)
    return {'records': self.count, 'bytes': self.bytes, 'size': size, 'hash': self._hash.hexdigest()}


def part(path) -> epath.Path:
  """Where a file is written before it is whole; no two processes have the same place."""
  return path.with_name(f'{path.name}.{platform.node()}.{os.getpid()}.part')


def put(written, path) -> None:
  """Gives a file its name when all of it is on the disk."""
  for name in (written, path.parent):
    handle = os.open(os.fspath(name), os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)
    if name == written:
      written.replace(path)


def digest(path, count: int) -> str:
  """Hash of the records of a shard, as `Writer` computes it; '' if it cannot be read."""
  from array_record.python import array_record_module
  found = hashlib.blake2b(digest_size=16)
  try:
    reader = array_record_module.ArrayRecordReader(os.fspath(path), options=READ)
    for i in range(count):
      found.update(reader.read([i])[0])
  except Exception:      # plain exceptions
    return ''
  return found.hexdigest()


def finish(root, kind: str, lengths: dict, sizes: dict, description: str, modality: str = 'ct') -> None:
  """Writes what makes a folder of shards a data set of tensorflow_datasets.

  Args:
    root: the prepared folder.
    kind: of KINDS.
    lengths: {split: [records of each shard]}.
    sizes: {split: bytes of all records}.
    description: one line.
    modality: of the volumes.
  """
  import tensorflow_datasets as tfds
  where = os.fspath(folder(root, kind))
  template = tfds.core.ShardedFileTemplate(data_dir=where, dataset_name=kind, filetype_suffix='array_record',
                                           template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}')
  splits = [tfds.core.SplitInfo(name=split, shard_lengths=lengths[split], num_bytes=sizes[split],
                                filename_template=template) for split in SPLITS if split in lengths]
  tfds.folder_dataset.write_metadata(data_dir=where, features=features(kind, modality), split_infos=splits,
                                     filename_template=template, description=description, check_data=False)


# ---- reading

ARRAYS = {'volume': (np.int16, None), 'image': (np.uint16, zlib.decompressobj)}      # dtype, how bytes are unpacked


def decode(data: bytes) -> dict:
  """A serialised record -> arrays, numbers and texts, as tensorflow_datasets gives them; volumes are views of `data`.

  Walks the message (tf.train.Example in the wire format of protocol buffers) instead of building it: building copies
  the voxels twice, which takes as long as cutting a view out of them.

  Raises:
    ValueError: it is no such message.
  """
  view, raw = memoryview(data), {}
  for _, a, b in _fields(view, 0, len(view)):                   # Example.features
    for _, c, d in _fields(view, a, b):                         # one entry of its map
      (_, e, f), (_, g, h) = _fields(view, c, d)                # name, Feature
      (kind, i, j), = _fields(view, g, h)                       # 1 bytes, 2 floats, 3 whole numbers
      (_, k, l), = _fields(view, i, j)
      raw[bytes(view[e:f]).decode()] = (kind, view[k:l])
  out = {}
  for name, (kind, value) in raw.items():
    field, _, part = name.partition('/')
    if part == 'value':
      dtype, unpack = ARRAYS[field]
      shape = _numbers(raw[f'{field}/shape'][1])
      if unpack:
        value = unpack().decompress(value, math.prod(shape) * np.dtype(dtype).itemsize)
      out[field] = np.frombuffer(value, dtype).reshape(shape)
    elif not part:
      numbers = kind == 3 and _numbers(value)
      out[field] = (bytes(value).decode() if kind == 1 else np.frombuffer(value, np.float32) if kind == 2 else
                    numbers[0])
  return out


def _fields(view, at: int, end: int):
  """(number, start, end) of the length-delimited fields of a message."""
  while at < end:
    tag, at = _varint(view, at)
    size, at = _varint(view, at)
    if tag & 7 != 2 or at + size > end:
      raise ValueError('damaged record')
    yield tag >> 3, at, at + size
    at += size


def _varint(view, at: int) -> tuple[int, int]:
  value = shift = 0
  while shift < 64:
    byte = view[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at
  raise ValueError('damaged record')


def _numbers(view) -> list[int]:
  """Packed 64-bit integers, two's complement."""
  out, at = [], 0
  while at < len(view):
    value, at = _varint(view, at)
    out.append(value - (1 << 64) if value >> 63 else value)
  return out


class Shards:
  """Random access to the records of one kind and split; threads may share it, processes open their own files.

  Args:
    root: a prepared folder.
    kind: of KINDS.
    split: of SPLITS.

  Raises:
    DataError: SHARDS, if the folder is not complete.
  """

  def __init__(self, root, kind: str, split: str = 'train'):
    self.root, self.kind, self.split = os.fspath(root), kind, split
    info = folder(root, kind) / 'dataset_info.json'
    try:
      splits = {s['name']: s for s in json.loads(info.read_text())['splits']}
      self.lengths = [int(n) for n in splits[split]['shardLengths']] if split in splits else []
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise DataError('SHARDS', info, f'no list of shards ({type(e).__name__}: {e})',
                      'prepare the folder again; the same command goes on where it stopped') from e
    self.files = [os.fspath(folder(root, kind) / shard_name(kind, split, i, len(self.lengths)))
                  for i in range(len(self.lengths))]
    if lost := [f for f, n in zip(self.files, self.lengths) if n and not epath.Path(f).exists()]:
      raise DataError('SHARDS', lost[0], f'{len(lost)} of {len(self.files)} shards are not there',
                      'copy them again, or prepare the folder again')
    self._names = {os.path.basename(f): i for i, f in enumerate(self.files)}
    self._starts = np.cumsum([0, *self.lengths]).tolist()
    self._lock, self._readers = threading.Lock(), {}

  def __reduce__(self):      # a worker process opens its own
    return type(self), (self.root, self.kind, self.split)

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, i: int) -> dict:
    """Record i as numpy arrays and strings.

    Raises:
      DataError: RECORD, if it cannot be read.
    """
    return self.at(*self.place(i))

  def place(self, i: int) -> tuple[int, int]:
    """(shard, number in the shard) of record i."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    shard = bisect.bisect_right(self._starts, i) - 1
    return shard, i - self._starts[shard]

  def number(self, file: str, i: int) -> int:
    """Number of record i of the shard of this name, as the manifest has them: the way back of `place`.

    Raises:
      KeyError: there is no such record.
    """
    shard = self._names[file]
    if not 0 <= i < self.lengths[shard]:
      raise KeyError(i)
    return self._starts[shard] + i

  def at(self, shard: int, i: int) -> dict:
    """Record i of one shard."""
    try:
      try:
        data, = self._reader(shard).read([i])
      except Exception:      # a network file system hiccups; too many files are open
        time.sleep(RETRY_S)
        data, = self._reader(shard, anew=True).read([i])
      return decode(data)
    except Exception as e:      # the reader of array_record raises plain exceptions
      raise DataError('RECORD', f'{self.files[shard]} record {i}', f'{type(e).__name__}: {e}'[:200],
                      'copy the shard again, or prepare the folder again') from e

  def _reader(self, shard: int, anew: bool = False):
    with self._lock:
      if anew:
        self._readers.pop(shard, None)
      if shard not in self._readers:
        from array_record.python import array_record_module
        while len(self._readers) >= OPEN:      # the one that was not used for longest; it closes when nobody reads it
          self._readers.pop(next(iter(self._readers)))
        self._readers[shard] = array_record_module.ArrayRecordReader(self.files[shard], options=READ)
      self._readers[shard] = self._readers.pop(shard)
      return self._readers[shard]
