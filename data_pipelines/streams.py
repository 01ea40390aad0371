"""Endless, seeded, elastic streams of training batches; the only file that knows Grain.

A stream's position is one integer, the number of rows that all shards together have handed out. Rows depend on
(seed, stream, position) alone, so that a run continues with the same samples on another number of hosts or worker
processes. Nothing is filtered here: a record that cannot be read has been replaced by its source.
"""
import functools
import math
import os
import zlib
from concurrent import futures

import grain
import numpy as np

from data_pipelines import (
    cases,
    device,
    draw,
    files,
    labelled,
    manifest,
    prepared,
    sample,
    sequences,
    sources,
    studies,
)
from data_pipelines.errors import DataError

STREAMS = ('ct', 'xray')
THREADS, BUFFER = 4, 4    # per process; without a bound Grain reads hundreds of batches ahead
LAST_BYTES = 64 << 20     # records that wait for their further views
PAD_ID = -1               # id of the rows that fill up the last batch of a finite pass


def build(config, names=None, shard_index: int = 0, shard_count: int = 1) -> dict:
  """{name: Stream} of this shard.

  Args:
    config: the run config; reads seed, epochs, batch, data, views, drr.
    names: which of 'ct' and 'xray'; None = those with a non-zero batch.
    shard_index, shard_count: this process among those that share every global batch.

  Raises:
    DataError: nothing to read at data.ct, data.xray or data.manifest.
    ValueError: a global batch that the shards cannot share evenly.
  """
  files.single_threaded_blas()    # sources reduce scans with it
  names = [n for n in STREAMS if config.batch[n]] if names is None else names
  listed = manifest.load(config.data.manifest) if config.data.manifest else None
  return {n: Stream(n, config, _source(n, config, listed), shard_index, shard_count, listed) for n in names}


def views(name: str, record: dict, config, rng, drr: bool = True) -> dict:
  """Two random views of a record of stream `name`: {field: [2, ...] float32}; `drr` as of sample.ct_sample.

  For a task, one view and its label or mask: see cases.view; with reports, one view and its text: see studies.view.
  """
  if 'task' in config:
    return cases.view(name, record, config, rng)
  if 'unimedi' in config:
    return studies.view(name, record, config, rng)
  if name == 'xray':
    return sample.xray_sample(record, draw.xray_pair(rng, config, record['image'].shape), config)
  return sample.ct_sample(record, draw.ct_pair(rng, config, *sample.sizes(record)), config, drr)


class Stream:
  """Batches of one modality.

  Attributes:
    records: number of records of the source.
    spec: {field: (shape, dtype)} of one row, as `next` gives it.
    finish: jittable, batch of such rows -> the batch of views that the losses see: itself, with data.place='host'.
    fields: {field: (shape, dtype)} of one row of that.
    source: the record source.
    manifest: manifest.Listed that names its records, or None.
  """

  def __init__(self, name, config, source, shard_index=0, shard_count=1, listed=None):
    self.name, self.source, self.records, self.manifest = name, source, len(source), listed
    self.batch = config.batch[name]
    self._shard = shard_index, shard_count
    if not self.records:
      raise ValueError(f'data.{name} has no records')
    if name == 'ct' and config.views.ct.extent == 'centre' and (depth := _depth(source)) < config.views.ct.size[0]:
      files.say(f'data.ct: records have {depth} slices at most, views.ct.size={tuple(config.views.ct.size)} is filled '
                f'up around them. FIX: data.tile={config.views.ct.size[0]}, of shards prepare --tile, or fewer slices')
    self._rows(self.batch)
    seed = np.random.SeedSequence([config.seed, zlib.crc32(name.encode())]).generate_state(1)[0]
    records = grain.MapDataset.source(source).seed(int(seed))
    self._ordered = records.random_map(_Views(name, config))
    shapes = device.frame(name, config, source) if config.data.place == 'device' else None
    rows = _Views(name, config, shapes)
    self.finish = device.finish(name, config) if shapes else lambda batch: batch
    self.fields = _spec(self._ordered[0])
    self.spec = _spec(records.random_map(rows)[0]) if shapes else self.fields
    workers = self._workers = config.data.workers
    if workers:
      _parse_flags()
    options = grain.MultiprocessingOptions(num_workers=workers) if workers else None
    if name == 'xray' and not config.data.reshuffle:    # as the released code: one shuffle of a list for all epochs
      records = records.repeat(max(config.epochs, 1))
    records = records.shuffle()
    if config.data.views_per_read > 1:
      records = _SeveralTimes(records, config.data.views_per_read)
    self._iterator = iter(grain.experimental.ElasticIterator(
        records.repeat(None).random_map(rows), self.batch,
        grain.sharding.ShardOptions(shard_index=shard_index, shard_count=shard_count),
        read_options=grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BUFFER),
        multiprocessing_options=options))

  @property
  def digest(self) -> str:
    """Hash of the list of records."""
    return self.source.digest

  @property
  def read_ahead(self) -> int:
    """Bytes of the batches that this shard holds ready, at most."""
    row = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.spec.values())
    return row * self._rows(self.batch) * (BUFFER + THREADS + 2) * max(self._workers, 1)

  def listing(self) -> list[dict]:
    """The list, as rows of a manifest."""
    return self.source.listing()

  def next(self) -> dict:
    """This shard's rows of the next global batch, {field: [batch / shard_count, ...]}.

    Never catch what it raises and go on: after an error the position is behind for ever.
    """
    try:
      return next(self._iterator)
    except StopIteration as e:
      raise RuntimeError(f'data stream "{self.name}" ended at position {self.position()}, it must be endless: '
                         'a worker process has died, see the lines above') from e

  def position(self) -> int:
    """Rows handed out so far by all shards together."""
    return self._iterator.get_state()['global_next_index']

  def seek(self, position: int) -> None:
    """The next batch begins at this position."""
    self._iterator.set_state({'global_next_index': int(position)})

  def fresh(self, batch: int):
    """One pass over all records in order, as this shard's rows of batches of `batch` rows; next() is not disturbed.

    Views are random but always the same. The last batch is filled up with copies of the last record, whose id is -1.
    """
    mine = self._rows(batch)
    with futures.ThreadPoolExecutor(THREADS) as pool:
      for start in range(0, self.records, batch):
        at = np.arange(start, start + batch)[self._shard[0]::self._shard[1]][:mine]
        rows = list(pool.map(self._ordered.__getitem__, np.minimum(at, self.records - 1).tolist()))
        out = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
        out['id'][at >= self.records] = PAD_ID
        yield out

  def close(self) -> None:
    """Ends threads and worker processes."""
    self._iterator.close()

  def _rows(self, batch: int) -> int:
    count = self._shard[1]
    if batch % count:
      near = batch // count * count
      use = f'{near} or {near + count}' if near else f'{count}'
      raise ValueError(f'global batch {batch} of "{self.name}" not divisible by {count} shards: use {use}')
    return batch // count


class _SeveralTimes(grain.MapDataset):
  """Each element k times in a row, so that one read serves k rows; what is random differs, as it hangs on the place."""

  def __init__(self, parent, times: int):
    super().__init__(parent)
    self._times = times
    self._last = sources.Cache(LAST_BYTES)

  def __len__(self):
    return len(self._parent) * self._times

  def __getitem__(self, i):
    if isinstance(i, slice):
      return self.slice(i)
    found, = self._last.get(i // self._times, lambda: (self._parent[i // self._times],))
    return found


class _Views(grain.transforms.RandomMap):
  """Record -> row; `rng` (key of whatever the device draws for this row) comes first from the row's generator.

  shapes: of device.frame; the rows are then what the device makes the views of.
  """

  def __init__(self, name, config, shapes=None):
    self.name, self.config, self.shapes, self.drr = name, config, shapes, sample.needs_drr(config)
    files.single_threaded_blas()

  def __reduce__(self):    # so that a worker process passes through __init__ too
    return type(self), (self.name, self.config, self.shapes)

  def random_map(self, record, rng: np.random.Generator):
    key = rng.integers(0, 2**32, 2, np.uint32)
    row = (device.raw(self.name, record, self.config, rng, self.shapes) if self.shapes else
           views(self.name, record, self.config, rng, self.drr))
    return row | {
        'id': np.int32(record['index']), 'group': np.int32(record.get('group', record['index'])), 'rng': key,
        'bad': np.bool_(record['bad'])}


def _spec(row: dict) -> dict:
  return {k: (v.shape, v.dtype) for k, v in row.items()}


def _parse_flags() -> None:
  """Grain's worker processes read absl flags; outside of absl's app nobody has parsed them."""
  from absl import flags
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def _depth(source) -> float:
  """Slices of the largest record, infinite where the source does not know it."""
  return getattr(source, 'largest', {}).get('volume', (np.inf,))[0]


def _source(name: str, config, listed=None):
  """Records of data.manifest (its files, or their shards beside it), or of data.ct or data.xray: phantoms, folders,
  prepared shards, or several of them mixed."""
  if 'task' in config:
    return labelled.source(name, config)
  if 'unimedi' in config:
    return studies.source(name, config, listed)
  data, whole = config.data, sources.needs_whole(config)
  spec = data[name]
  if not spec and not listed:
    return (sources.PhantomCT(config.seed, data.phantom_records, whole=whole) if name == 'ct' else
            sources.PhantomXray(config.seed, data.phantom_records))
  more = {'ct': {'whole': whole, 'modality': data.modality}, 'xray': {}}[name] | {'on_bad_file': data.on_bad_file}
  scans = functools.partial(sources.CTFolder, sequences=sequences.parse(data.sequences), tile=data.tile)
  folder = {'ct': scans, 'xray': sources.XrayFolder}[name]
  shards = {'ct': prepared.PreparedCT, 'xray': prepared.PreparedXray}[name]
  if listed:
    rows = listed.training(name)
    if any('record' in row for row in rows):
      return shards(os.path.dirname(listed.path), rows=rows, **more)
    return folder(listed.path, rows=rows, **more)
  shares = prepared.weights(spec)
  ready = {p: w for p, w in shares.items() if prepared.is_prepared(p, name)}
  if not ready and set(shares.values()) == {1.}:
    return folder(spec, **more)
  parts = [shards(p, **more) if p in ready else folder(p, **more) for p in shares]
  if name == 'ct' and len(counts := {len(p[0].get('pad', '1')) for p in parts}) > 1:
    raise DataError('SEQUENCES', spec, f'sources of {" and ".join(map(str, sorted(counts)))} sequences',
                    'mix sets with the same sequences')
  return parts[0] if len(parts) == 1 else prepared.Mixture(parts, list(shares.values()))
