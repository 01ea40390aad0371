"""What prepare does, apart from who does it: the plan, one shard, the merge.

The shard of a record depends on the id of its volume alone, and a shard is made by one process from beginning to end.
So any number of workers or machines, and any number of kills and restarts, gives the same bytes: what is finished
stands in a journal and is not done again.
"""
import collections
import contextlib
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np
from etils import epath

from data_pipelines import files, manifest, readers, records, tiles
from data_pipelines.errors import DataError

SHARD_BYTES = 256 << 20
EXPANSION = 3.      # bytes of records per byte of .nii.gz, roughly: tiles overlap by half
PLAN, JOURNAL = 'plan.json', 'journal'
KINDS = {'volume': 'ct', 'image': 'xray'}      # kind of a row -> kind of its records


class Config(NamedTuple):
  """What decides the content of the records.

  Attributes:
    modality: 'ct' refuses values that are not HU; 'mr' and 'other' store z-scores (intensities.py).
    spacing_mm: (z, y, x) to resample to, box mean where it gets coarser, linear where it gets finer; 0 = as it is.
    tile: slices of a record; 0 = the whole volume.
    compress: of voxels, a key of records.OPTIONS.
    sequences: ends of the names of what belongs together (sequences.py).
    resample_gaps: whether missing DICOM slices are interpolated.
    uncut: whether wide planes stay whole, instead of their central 80 %.
  """
  modality: str = 'ct'
  spacing_mm: tuple = (0., 0., 0.)
  tile: int = tiles.TILE
  compress: str = 'none'
  sequences: tuple = ()
  resample_gaps: bool = False
  uncut: bool = False


class Unit(NamedTuple):
  """One shard: the work of one process."""
  kind: str
  split: str
  shard: int
  shards: int

  @property
  def name(self) -> str:
    return f'{self.kind}-{self.split}-{self.shard:05d}-of-{self.shards:05d}'


def shard_of(volume_id: str, shards: int) -> int:
  """Stable: blake2b, not Python's hash."""
  return int.from_bytes(hashlib.blake2b(volume_id.encode(), digest_size=8).digest(), 'big') % shards


# ---- one file: pure

def ct_records(row: dict, item: readers.Item, config: Config) -> tuple[dict | None, list[dict], tiles.Scan]:
  """A volume of the manifest -> (record of 'whole', of CT alone; records of 'ct'; the scan).

  Args:
    row: of the manifest; reads id, group, label.
    item: its files.
    config: see Config.

  Raises:
    DataError: the file cannot be used.
  """
  hu = config.modality == 'ct'
  scan = tiles.read(item, config.modality, hu, config.spacing_mm, config.tile, config.resample_gaps,
                    config.uncut)
  common = {'group': row['group'], 'label': json.dumps(row.get('label') or {}, sort_keys=True)}
  whole = None
  if hu:
    whole = common | {'id': row['id'], 'volume': scan.whole, 'spacing_mm': np.float32(scan.whole_spacing_mm)}
  cuts = []
  for z0 in tiles.starts(scan.volume.shape[-3], config.tile):
    tile = tiles.cut(scan, z0, config.tile)
    cuts.append(common | scan.intensity | {
        'id': f'{row["id"]} z{z0}', 'volume_id': row['id'], 'z0': z0, 'volume': tile['volume'],
        'spacing_mm': np.float32(tile['spacing_mm'])})
  return whole, cuts, scan


def xray_record(row: dict, item: readers.Item) -> tuple[dict, list[str]]:
  """A picture of the manifest -> (record of 'xray', findings). Raises DataError."""
  found = readers.image(item)
  deep = found.array.dtype == np.uint16
  image = found.array if deep else found.array.astype(np.uint16) * records.SCALE_8BIT
  return {'id': row['id'], 'group': row['group'], 'label': json.dumps(row.get('label') or {}, sort_keys=True),
          'image': image, 'bits': 16 if deep else 8, 'view': str(row.get('view', ''))}, found.meta['warnings']


# ---- one shard

def make_shard(out: str, unit: Unit, rows: list[dict], config: Config) -> None:
  """Writes the shard, of CT volumes the one of their reduced copies beside it, and last its entry in the journal.

  Args:
    out: the prepared folder.
    unit: which shard.
    rows: of the manifest, those that belong there.
    config: see Config.
  """
  done, place = [], {}
  kinds = ('ct', 'whole') if unit.kind == 'ct' and config.modality == 'ct' else (unit.kind,)
  writers = {k: records.Writer(file_of(out, k, unit), k, config.compress, config.modality) for k in kinds}
  for row in rows:
    made, lost = _tried(row, unit.kind, config)
    done += lost
    record = None
    for kind, record, entry in made:
      if entry:
        place[entry['id']] = writers[kind].count
        done.append(entry)
      if 'whole' in writers and kind == 'ct':
        record['whole'] = writers['whole'].count
      writers[kind].write(record)
    del made, record      # two files at a time would be too much
  shard = records.shard_name(unit.kind, unit.split, unit.shard, unit.shards)
  for entry in done:
    if entry['id'] in place:
      entry['record'] = [shard, place[entry['id']]]
  written = {k: w.close() for k, w in writers.items()}
  _write(epath.Path(out) / JOURNAL / f'{unit.name}.json', {'written': written, 'rows': done})


def _tried(row, kind, config) -> tuple[list, list]:
  """-> (what `_records` gives, []), or ([], [the row as excluded])."""
  try:
    item = readers.of_row(row)
    row = row | {'sha': readers.sha(item, row.get('sha'))}
    return _records(row, item, kind, config), []
  except Exception as e:      # one file must not end the work of days
    e = e if isinstance(e, DataError) else DataError('READER', row['path'], f'{type(e).__name__}: {e}', 'report it')
    files.warn(e, 'left out')
    return [], [excluded(row, e)]


def _records(row, item, kind, config) -> list:
  """(kind, record, its row of the manifest or None) in the order of writing; a volume's reduced copy comes last."""
  if kind == 'xray':
    record, warnings = xray_record(row, item)
    return [('xray', record, _row(row, record, 'image', warnings) | {'shape': list(record['image'].shape)})]
  whole, cuts, scan = ct_records(row, item, config)
  out, of_whole = [], {'whole_shape': list(whole['volume'].shape)} if whole else {}
  for cut in cuts:
    low = [cut['z0'] + scan.corner[0], *scan.corner[1:]]
    shape = cut['volume'].shape[-3:]
    out.append(('ct', cut, _row(row, cut, 'subvolume', scan.warnings) | of_whole | {
        'volume_id': row['id'], 'z0': cut['z0'], 'shape': list(shape), 'spacing': [float(s) for s in cut['spacing_mm']],
        'crop_box': [*low, *(a + n for a, n in zip(low, shape))],      # in voxels of the whole scan at this spacing
        'z_offset_mm': float(low[0] * cut['spacing_mm'][0])}))
  return out + [('whole', whole, None)] * bool(whole)


def _row(row: dict, record: dict, kind: str, warnings: list[str]) -> dict:
  return row | {'id': record['id'], 'kind': kind, 'status': 'warn' if warnings else row.get('status', 'ok'),
                'findings': sorted({*row.get('findings', ()), *(w.split()[1] for w in warnings)})}


def excluded(row: dict, e: DataError) -> dict:
  """The row of a sample that cannot be used."""
  return row | {'status': 'excluded', 'findings': [e.code], 'reason': f'{e.reason}. FIX: {e.remedy}'}


def _write(path, tree) -> None:
  """JSON, complete or not at all, and on the disk when this returns."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = records.part(path)
  part.write_text(json.dumps(tree, sort_keys=True))
  records.put(part, path)


# ---- all shards

def plan(rows: list[dict], out, config: Config, shards: int = 0) -> dict:
  """Writes plan.json, or finds that it is there and the same.

  Args:
    rows: of the manifest, with group and split; excluded ones are kept as they are.
    out: the prepared folder.
    config: see Config.
    shards: of the training split of each kind; 0 = about 256 MB each.

  Returns:
    {'config', 'digest', 'shards': {kind: {split: n}}, 'asked', 'rows'}.

  Raises:
    DataError: PLAN, if the folder was begun with another config, other files or another number of shards.
  """
  other = collections.Counter(r['kind'] for r in rows if r['kind'] not in KINDS)
  if other:
    files.say(f'{out}: {", ".join(f"{n} rows of kind {k}" for k, n in other.items())} are not prepared')
  rows = sorted(({'bytes': sum(map(_size, r.get('paths') or [r['path']]))} | r for r in rows if r['kind'] in KINDS),
                key=lambda r: r['id'])
  if twice := next((a['id'] for a, b in zip(rows, rows[1:]) if a['id'] == b['id']), None):
    raise DataError('PLAN', out, f'two files are called {twice}', 'prepare each source with a --dataset of its own')
  counts = collections.Counter(len(r.get('paths') or [r['path']]) for r in manifest.usable(rows)
                               if r['kind'] == 'volume')
  if len(counts) > 1:
    raise DataError('SEQUENCES', out, 'some scans have ' + ', some '.join(f'{n} ({counts[n]})' for n in sorted(counts))
                    + ' sequences', 'prepare them apart')
  counts = {kind: {s: n for s in records.SPLITS if (n := sum(r['split'] == s for r in manifest.usable(rows)
                                                             if r['kind'] == sort))} for sort, kind in KINDS.items()}
  counts = {kind: splits for kind, splits in counts.items() if splits}
  if not counts:
    raise DataError('EMPTY_DIR', out, 'every file is excluded', 'see what the doctor says of them')
  as_json = {k: list(v) if isinstance(v, tuple) else v for k, v in config._asdict().items()}
  made = {'config': as_json, 'digest': manifest.digest(_seen(rows)), 'shards': {}, 'asked': shards, 'rows': rows}
  for sort, kind in KINDS.items():
    if kind in counts:
      most, size = max(counts[kind].values()), sum(r['bytes'] for r in rows if r['kind'] == sort)
      needed = shards or EXPANSION * size / SHARD_BYTES * most / sum(counts[kind].values())
      made['shards'][kind] = {s: max(1, round(needed * n / most)) for s, n in counts[kind].items()}
  if not (epath.Path(out) / PLAN).exists():
    _write(epath.Path(out) / PLAN, made)
  old = read_plan(out)      # another machine may have been first
  for what, theirs, mine in (('config', old['config'], made['config']), ('num_shards', old['asked'], shards)):
    if theirs != mine:
      raise DataError('PLAN', out, f'was begun with other {what}: {theirs}, now {mine}', 'use another --out')
  if old['digest'] != made['digest']:
    raise DataError('PLAN', out, f'was begun with other files: {manifest.changes(_seen(old["rows"]), _seen(rows))}',
                    'use another --out')
  return old


def read_plan(out) -> dict:
  """What `plan` wrote. Raises DataError: SHARDS or PLAN."""
  file = epath.Path(out) / PLAN
  if not file.exists():
    raise DataError('SHARDS', out, f'no {PLAN} there', 'run prepare without --merge first')
  try:
    return json.loads(file.read_text())
  except ValueError as e:
    raise DataError('PLAN', file, f'not JSON ({e})', 'remove the folder and prepare it again') from e


def _seen(rows) -> list[dict]:
  """Rows whose size stands for the content, where nobody has hashed it; their reports are content as well."""
  said = lambda r: f' {manifest.number(r["text"])}' if 'text' in r else ''
  return [r | {'sha': (r.get('sha') or f'{r["bytes"]} bytes') + said(r)} for r in rows]


def units(made: dict) -> dict[Unit, list[dict]]:
  """Every shard of a plan with the rows that belong there."""
  out = {Unit(kind, split, i, n): [] for kind, counts in made['shards'].items() for split, n in counts.items()
         for i in range(n)}
  for row in manifest.usable(made['rows']):
    kind = KINDS[row['kind']]
    n = made['shards'][kind][row['split']]
    out[Unit(kind, row['split'], shard_of(row['id'], n), n)].append(row)
  return out


def finished(out, unit: Unit) -> dict | None:
  """The journal's entry of a shard, if its files are there with the sizes that it says."""
  try:
    entry = json.loads((epath.Path(out) / JOURNAL / f'{unit.name}.json').read_text())
    there = all(file_of(out, k, unit).stat().length == w['size'] for k, w in entry['written'].items())
    return entry if there else None
  except (OSError, ValueError, KeyError):
    return None


def file_of(out, kind: str, unit: Unit) -> epath.Path:
  return records.folder(out, kind) / records.shard_name(kind, unit.split, unit.shard, unit.shards)


def merge(out, verify: bool = False) -> list[dict]:
  """Checks that every shard is there and writes manifest and data set descriptions; returns the manifest's rows.

  Args:
    out: the prepared folder.
    verify: read every record once more and compare the hashes of the shards.

  Raises:
    DataError: SHARDS, naming those that are missing or damaged; SPLIT_EMPTY, if no file could be used.
  """
  made = read_plan(out)
  entries = {u: finished(out, u) for u in units(made)}
  if lost := [u.name for u, entry in entries.items() if entry is None]:
    raise DataError('SHARDS', out, f'{len(lost)} of {len(entries)} shards are missing: {", ".join(lost[:8])}',
                    'run prepare for them, then --merge again')
  if verify:
    progress = files.Progress('verify', len(entries))
    for unit, entry in entries.items():
      progress.advance()
      for kind, written in entry['written'].items():
        if records.digest(file_of(out, kind, unit), written['records']) != written['hash']:
          raise DataError('SHARDS', file_of(out, kind, unit), 'its records are not those that were written',
                          f'remove {JOURNAL}/{unit.name}.json and run prepare again')
  rows = [r for r in made['rows'] if r.get('status') == 'excluded']
  lengths, sizes, hashes = {}, {}, {}
  for unit, entry in entries.items():
    rows += entry['rows']
    for kind, written in entry['written'].items():
      lengths.setdefault(kind, {}).setdefault(unit.split, []).append(written['records'])
      sizes.setdefault(kind, {}).setdefault(unit.split, 0)
      sizes[kind][unit.split] += written['bytes']
      hashes[records.shard_name(kind, unit.split, unit.shard, unit.shards)] = written['hash']
  if not manifest.usable(rows):
    raise DataError('SPLIT_EMPTY', out, f'none of {len(rows)} files could be used',
                    'see the lines above, or the doctor')
  for kind in lengths:
    records.finish(out, kind, lengths[kind], sizes[kind], f'{kind} of {len(made["rows"])} files',
                   made['config']['modality'])
  manifest.write(out, rows, config=made['config'], shards=hashes)
  for stale in pathlib.Path(out).rglob('*.part'):      # of processes that were killed
    stale.unlink(missing_ok=True)
  return sorted(rows, key=lambda r: r['id'])


def _size(path) -> int:
  """Bytes of a file, or of all files of the folder of a DICOM series; 0 where nothing says it."""
  with contextlib.suppress(OSError, DataError):
    path = epath.Path(str(path).partition('::')[0])
    return sum(epath.Path(f).stat().length for f in files.below(str(path))) if path.is_dir() else path.stat().length
  return 0
