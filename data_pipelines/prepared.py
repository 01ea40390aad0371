"""Record sources over prepared shards, and the mixture of several sources; see sources.py for what a record is."""
import functools
import hashlib
import json
import re

import numpy as np

from data_pipelines import files, manifest, records, sources
from data_pipelines.errors import DataError

WEIGHT = re.compile(r'@(\d+(?:\.\d+)?)$')      # '/data/a@2'


def is_prepared(root: str, kind: str) -> bool:
  """Whether a folder was made by prepare."""
  return '*' not in root and (records.folder(root, kind) / 'dataset_info.json').exists()


def weights(spec: str) -> dict[str, float]:
  """'/a@2,/b' -> {'/a': 2., '/b': 1.}: how often a record of each comes for one of the others'."""
  out = {}
  for part in (p.strip() for p in spec.split(',') if p.strip()):
    found = WEIGHT.search(part)
    out[WEIGHT.sub('', part)] = float(found[1]) if found else 1.
  if bad := [p for p, w in out.items() if w <= 0]:
    raise DataError('WEIGHT', bad[0], 'weight 0', 'leave it out, or give it a positive weight')
  return out


class _Prepared:
  """Records of one kind and split; one that cannot be read is replaced by the next good one."""
  kind = leaf = array = ''

  def __init__(self, root: str, *, split='train', on_bad_file='skip', rows=None):
    self.root, self.split, self.on_bad_file = root, split, on_bad_file
    self.shards = records.Shards(root, self.kind, split)
    self.failed = {}
    self.about = manifest.meta(root)
    if not isinstance(self.about.get('shards'), dict):
      raise DataError('SHARDS', root, 'no manifest beside the shards', 'run prepare --merge')
    # Which records of the shards these are, in the order of the shards.
    self.rows = rows and [manifest.brief(row) for row in rows]
    if rows is not None:
      self.largest = self._hull(rows)
    self.which = np.array(range(len(self.shards)) if rows is None else sorted(map(self._number, rows)), np.int64)
    leaf = self.leaf if rows is None else f'data.manifest, {self.kind}'
    files.say(f'{leaf}: {len(self)} records of {len(self.shards.lengths)} shards in {root} ({split})')
    if not len(self):
      raise DataError('SPLIT_EMPTY', root, f'no records of {self.kind} in split {split}',
                      'prepare it with such a split')

  def __len__(self):
    return len(self.which)

  def _number(self, row: dict) -> int:
    try:
      return self.shards.number(*row['record'])
    except KeyError as e:
      raise DataError('MANIFEST', self.root, f'{row["id"]} is said to be {row.get("record", "in no shard")}, which is '
                      f'no record of {self.kind} in split {self.split}', 'prepare the files anew') from e

  def place(self, row: dict) -> int:
    """The index of the record that a row of its manifest names."""
    return int(np.searchsorted(self.which, self._number(row)))

  @functools.cached_property
  def digest(self) -> str:
    """Of the content and order of all shards of the split, and of the choice: what decides which record an index is."""
    mine = sorted((k, v) for k, v in self.about['shards'].items() if f'-{self.split}.' in k)
    return hashlib.blake2b(json.dumps(mine).encode() + self.which.tobytes(), digest_size=8).hexdigest()

  def listing(self) -> list[dict]:
    """Its rows of the manifest, as far as they make its hash."""
    if self.rows is not None:
      return self.rows
    return [manifest.brief(r) for r in manifest.usable(manifest.read(self.root, labelled=False)) if 'record' in r
            and r['record'][0].startswith(f'{self.kind}-{self.split}.')]

  @functools.cached_property
  def largest(self) -> dict:
    """As of sources.py; what the manifest says, where it says it of all records."""
    return self._hull(manifest.usable(manifest.read(self.root, labelled=False)))

  def _hull(self, rows) -> dict:
    mine = [r for r in rows if 'record' in r and r['record'][0].startswith(f'{self.kind}-{self.split}.')]
    names = {'shape': self.array, 'whole_shape': 'whole'}
    return sources.hull([{name: r[field] for field, name in names.items() if field in r} for r in mine])

  def __getitem__(self, i: int) -> dict:
    for shift in range(len(self)):
      at = (i + shift) % len(self)
      if at not in self.failed:
        try:
          return self.read(at) | {'index': i, 'bad': shift > 0}
        except DataError as e:
          if self.failed.setdefault(at, e) is e and self.on_bad_file == 'skip':
            files.warn(e, 'replaced by the next good record')
      if self.on_bad_file == 'stop':
        raise self.failed[at]
    raise DataError('SHARDS', self.root, 'not one record can be read any more', 'check the disk, then start again')

  def labels(self, i: int) -> dict:
    """{finding: 0 or 1} of record i."""
    return json.loads(self.shards[int(self.which[i])]['label'])


class PreparedCT(_Prepared):
  """Tiles of a prepared folder.

  Args:
    root: the folder that prepare made.
    modality: of the run; another one is refused.
    split: 'train', 'val' or 'test'.
    whole: records carry the reduced copy of their volume; of CT alone.
    on_bad_file: 'skip' or 'stop', as CTFolder's.
    rows: of a manifest of that folder: only the records that they name.

  Raises:
    DataError: SHARDS, SPLIT_EMPTY, MODALITY; MANIFEST (a row names no record of the split).
  """
  kind, leaf, array = 'ct', 'data.ct', 'volume'

  def __init__(self, root, *, modality='ct', split='train', whole=False, on_bad_file='skip', rows=None):
    super().__init__(root, split=split, on_bad_file=on_bad_file, rows=rows)
    made_for = self.about.get('config', {}).get('modality', modality)
    if made_for != modality:
      raise DataError('MODALITY', root, f'was prepared with --modality={made_for}, the run has data.modality='
                      f'{modality}', 'prepare it again')
    self.wholes = records.Shards(root, 'whole', split) if whole else None

  def read(self, i: int) -> dict:
    shard, place = self.shards.place(int(self.which[i]))
    found = self.shards.at(shard, place)
    record = {'volume': found['volume'], 'spacing_mm': _mm(found), 'group': manifest.number(found['group']),
              'name': found['id']}
    if 'pad' in found:
      record |= {name: found[name] for name in ('scale', 'offset', 'pad')}
    if self.wholes:
      whole = self.wholes.at(shard, int(found['whole']))
      record |= {'whole': whole['volume'], 'whole_spacing_mm': _mm(whole)}
    return record


class PreparedXray(_Prepared):
  """Radiographs of a prepared folder. Arguments as PreparedCT's."""
  kind, leaf, array = 'xray', 'data.xray', 'image'

  def read(self, i: int) -> dict:
    found = self.shards[int(self.which[i])]
    image = found['image'] if found['bits'] == 16 else (found['image'] // records.SCALE_8BIT).astype(np.uint8)
    return {'image': image, 'group': manifest.number(found['group']), 'name': found['id']}


class Mixture:
  """Several sources as one; a record of source k comes weights[k] times in a pass, or once more where that is a
  fraction. The smallest weight counts as one. Records keep names of their own; `index` counts through all sources.
  """

  def __init__(self, parts: list, factors: list[float]):
    self.parts = parts
    least = min(factors)
    self._times = [round(len(p) * f / least) for p, f in zip(parts, factors)]
    self._ends = np.cumsum(self._times).tolist()
    self._first = np.cumsum([0, *map(len, parts)]).tolist()
    self._mixed = [np.random.default_rng(k).permutation(len(p)) for k, p in enumerate(parts)]

  def __len__(self):
    return self._ends[-1]

  @property
  def digest(self) -> str:
    text = '\n'.join(f'{p.digest} {n}' for p, n in zip(self.parts, self._times))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  @property
  def largest(self) -> dict:
    return sources.hull([p.largest for p in self.parts])

  def listing(self) -> list[dict]:
    return [row | {'id': f'{k} {row["id"]}'} for k, p in enumerate(self.parts) for row in p.listing()]

  def __getitem__(self, i: int) -> dict:
    k = int(np.searchsorted(self._ends, i, side='right'))
    turn, j = divmod(i - (self._ends[k] - self._times[k]), len(self.parts[k]))
    if (turn + 1) * len(self.parts[k]) > self._times[k]:      # a part of a pass: not the first patients once more
      j = int(self._mixed[k][j])
    record = self.parts[k][j]
    return record | {'index': self._first[k] + record['index'], 'group': manifest.number(f'{k} {record["group"]}')}


def _mm(record) -> tuple[float, float, float]:
  return tuple(float(s) for s in record['spacing_mm'])
