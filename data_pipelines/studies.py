"""Records of studies: a picture or a volume with the ids of its report, for training against text.

A run whose config has `unimedi` reads these. Without data.manifest they are the phantoms of `phantom.studies`; with it,
the rows of split train that have a report (see reports.py), from their files, or from the shards where it is the list
of a prepared folder. All reports are tokenised once at the start, so a worker process needs no tokenizer. A prepared
folder keeps their text, not ids: these are soon made, and another vocabulary, casing or length needs no other shards.
"""
import functools
import os
from concurrent import futures

import numpy as np

from data_pipelines import draw, files, manifest, prepared, readers, reports, sample, tiles, wordpiece
from data_pipelines.errors import DataError
from data_pipelines.phantom import studies as world
from data_pipelines.sources import Cache, _digest

KINDS = {'ct': 'volume', 'xray': 'image'}
SHARDS = {'ct': prepared.PreparedCT, 'xray': prepared.PreparedXray}
FIELDS = ('id', 'path', 'paths', 'kind', 'group', 'format', 'sha', 'record')      # of a row, that reading needs
TEXT = ('ids', 'mask', 'report')
TEST_REPORTS = 1_000_000      # number of the first phantom that is kept for evaluation


def source(name: str, config, listed=None):
  """The records of stream `name` ('ct' or 'xray'); listed: of data.manifest, None = phantoms. Raises DataError."""
  text = config.unimedi.text
  if config.data[name]:
    raise DataError('REPORT', config.data[name], f'data.{name} has no reports', 'name a data.manifest whose rows have '
                    'a text, or a study with a row of kind report')
  if listed is None:
    return Phantoms(name, config.seed, config.data.phantom_records, vocabulary(config, text.length))
  if not text.vocab and not text.init_from:
    raise DataError('VOCABULARY', 'unimedi.text', 'neither vocab nor init_from is set, and reports of files need word '
                    'pieces', 'set unimedi.text.vocab=/path/vocab.txt')
  rows = listed.training(name)
  if any('record' in row for row in rows):
    rows = _whole(name, rows, listed.path)
  rows, texts = reports.of_rows(rows, manifest.usable(listed.rows))
  if not rows:
    raise DataError('REPORT', listed.path, f'no row of kind {KINDS[name]} in split train has a report',
                    'give rows (of a prepared folder: those that it is made of) a text, or a study with a row of kind '
                    'report')
  kept, tokens = reports.tokenised([r['id'] for r in rows], texts, vocabulary(config, text.length), listed.path)
  kept = set(kept)
  return Rows(name, config, listed.path, [r for r in rows if r['id'] in kept], tokens)


def _whole(name: str, rows: list[dict], path) -> list[dict]:
  """Rows of a prepared folder under the names of their files, in that order.

  Raises:
    DataError: TILES: it holds parts of scans.
  """
  made = manifest.meta(path).get('config', {})
  if name == 'ct' and not made.get('uncut'):
    raise DataError('TILES', path, f'its shards hold parts of scans (--tile={made.get("tile")}, wide planes cut), and '
                    'a report is of all of one', 'prepare it with --uncut, or name the manifest of the files')
  return sorted((row | {'id': row.get('volume_id', row['id'])} for row in rows), key=lambda row: row['id'])


def vocabulary(config, length: int) -> wordpiece.Tokenizer:
  """The tokenizer of a run: unimedi.text.vocab, or vocab.txt beside unimedi.text.init_from, or the phantoms' words."""
  text = config.unimedi.text
  if not text.vocab and not text.init_from:
    return wordpiece.Tokenizer(world.VOCABULARY, length, fast=False)
  path = text.vocab or os.path.join(text.init_from, 'vocab.txt')
  return wordpiece.read(path, length, text.lowercase, text.vocab_size or None)


def view(name: str, record: dict, config, rng) -> dict:
  """One random view of a record, and its report: {'ct': [1, D, H, W, 1] or 'xray': [1, h, w, 3], ids, mask, report}."""
  if name == 'xray':
    made = sample.xray_sample(record, draw.xray_view(rng, config, record['image'].shape), config)
  else:
    params = draw.ct_view(rng, config, record['volume'].shape[-3:])
    made = {'ct': sample.volumes(record, params['ct'], config)}
  return made | {k: record[k] for k in TEXT}


def centre(name: str, record: dict, config):
  """The plain view of a record, [1, ...]."""
  if name == 'xray':
    return sample.xray_sample(record, draw.xray_centre(config, record['image'].shape), config)['xray']
  params = draw.ct_centre(config, record['volume'].shape[-3:], record['spacing_mm'])
  return sample.volumes(record, params['ct'], config)


class Phantoms:
  """Studies of `phantom.studies` of one kind; `report` is the class: reports of one class say the same."""

  def __init__(self, name: str, seed: int, records: int, tokenizer, first: int = 0):
    self.name, self.seed, self.first = name, seed, first
    self.records = records
    said = {(c, t): tokenizer(world.report(c, t)) for c in range(world.CLASSES) for t in range(len(world.TEMPLATES))}
    self.said = {k: {'ids': ids, 'mask': mask, 'report': np.int32(k[0])} for k, (ids, mask) in said.items()}

  def __len__(self):
    return self.records

  @property
  def digest(self) -> str:
    return _digest(f'studies {self.name} {self.seed} {self.first} {self.records}')

  def listing(self) -> list[dict]:
    return [{'id': f'{self.name} study {self.first + i} of seed {self.seed}'} for i in range(self.records)]

  def study(self, i: int) -> world.Study:
    return world.make(self.seed, self.first + i, self.name == 'ct')

  def __getitem__(self, i: int) -> dict:
    made = self.study(i)
    record = {'index': i, 'group': i, 'name': f'study {self.first + i}', 'bad': False}
    record |= self.said[made.label, made.template]
    if self.name == 'ct':
      return record | {'volume': np.rint(made.image * 1024).astype(np.int16), 'spacing_mm': (1., 1., 1.)}
    white = np.iinfo(np.uint16).max
    return record | {'image': np.clip((made.image + 1) / 4 * white, 0, white).astype(np.uint16)}


class Rows:
  """Rows of a manifest that have a report. Of volumes every file is read once at the start, of pictures its header, of
  shards nothing; one that fails later is replaced by the next good record.

  The order is that of their names, so that a run from shards sees the batches of one from files.

  Raises:
    DataError: EMPTY_DIR: none is usable; the fault of the first bad file with data.on_bad_file='stop'; of shards, those
      of `prepared`.
  """

  def __init__(self, name: str, config, path, rows, tokens):
    self.name, self.path, self.tokens = name, path, tokens
    self.modality, self.stop = config.data.modality, config.data.on_bad_file == 'stop'
    self.cache, self.failed, self.shards = Cache(), set(), None
    if any('record' in row for row in rows):
      more = {'modality': self.modality} if name == 'ct' else {}
      self.shards = SHARDS[name](os.path.dirname(path), rows=rows, **more)
    kept = rows if self.shards else self._checked(rows)
    self.rows = [{k: row[k] for k in FIELDS if k in row} for row in kept]
    self.tokens = {r['id']: tokens[r['id']] for r in self.rows}

  def _checked(self, rows) -> list[dict]:
    good = []
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      for row, fault in zip(rows, pool.map(self._fault, rows)):
        if fault and self.stop:
          raise fault
        if fault:
          files.warn(fault, 'left out')
        else:
          good.append(row)
    if not good:
      raise DataError('EMPTY_DIR', self.path, f'none of {len(rows)} {KINDS[self.name]}s with a report is usable',
                      'see the lines above')
    return good

  def __len__(self):
    return len(self.rows)

  @functools.cached_property
  def digest(self) -> str:
    said = (f'{r["id"]} {self.tokens[r["id"]]["ids"].tolist()}' for r in self.rows)
    return _digest('\n'.join(said))

  def listing(self) -> list[dict]:
    return [{k: r[k] for k in ('id', 'sha') if k in r} for r in self.rows]

  def __getitem__(self, i: int) -> dict:
    for shift in range(len(self)):
      row = self.rows[(i + shift) % len(self)]
      try:
        record, = (self.make(row),) if self.shards else self.cache.get(row['id'], lambda row=row: (self.make(row),))
        return record | self.tokens[row['id']] | {
            'index': i, 'group': manifest.number(row.get('group', row['id'])), 'name': row['id'], 'bad': shift > 0}
      except DataError as e:
        if self.stop:
          raise
        if row['id'] not in self.failed:
          files.warn(e, 'replaced by the next good record')
          self.failed.add(row['id'])
    raise DataError('EMPTY_DIR', self.path, 'not one record can be read any more', 'check the disk, then start again')

  def make(self, row) -> dict:
    """A whole picture, or a whole scan."""
    if self.shards:
      return self.shards.read(self.shards.place(row))
    if self.name == 'xray':
      return {'image': readers.image(readers.of_row(row)).array}
    found, arrays, intensity, _ = tiles.opened(readers.of_row(row), self.modality)
    volume = np.stack(arrays) if intensity else arrays[0]
    return {'volume': volume, 'spacing_mm': found[0].spacing_mm, **intensity}

  def _fault(self, row) -> DataError | None:
    try:
      if self.name == 'xray':
        readers.check_image(readers.of_row(row))
      else:
        self.make(row)
    except DataError as e:
      return e


# ---- evaluation

def tests(config, n: int) -> dict:
  """Phantom studies that training never sees.

  Returns:
    {'views': {stream: [n, 1, ...]}, 'labels': {stream: [n]}, 'planes': [n, 2] that hold the lesion,
    'reports': {'ids' [32, T], 'mask' [32, T]} one of each class, in order, 'attributes': [32, 10] of 0 and 1,
    'named': [10] what those are}.
  """
  tokenizer = vocabulary(config, config.unimedi.text.length)
  of = {s: Phantoms(s, config.seed, n, tokenizer, TEST_REPORTS) for s in KINDS}
  made = {s: [p.study(i) for i in range(n)] for s, p in of.items()}
  said = [tokenizer(world.report(c, 0)) for c in range(world.CLASSES)]
  return {'views': {s: np.stack([centre(s, p[i], config) for i in range(n)]) for s, p in of.items()},
          'labels': {s: np.array([m.label for m in ms]) for s, ms in made.items()},
          'attributes': np.array([world.attributes(c) for c in range(world.CLASSES)]),
          'named': (*world.SHAPES, *world.QUADRANTS, *world.SIZES),
          'planes': np.array([m.planes for m in made['ct']]),
          'reports': {'ids': np.stack([ids for ids, _ in said]), 'mask': np.stack([mask for _, mask in said])}}
