"""What prepare does, apart from who does it: the plan, one shard, the merge.

The shard of a record depends on the id of its volume alone, and a shard is made by one process from beginning to end.
So any number of workers or machines, and any number of kills and restarts, gives the same bytes: what is finished
stands in a journal and is not done again.
"""
import contextlib
import hashlib
import json
from typing import NamedTuple

import numpy as np
from etils import epath

from data_pipelines import files, manifest, readers, records, tiles
from data_pipelines.errors import DataError

SHARD_BYTES = 256 << 20
EXPANSION = 3.      # bytes of records per byte of .nii.gz, roughly: tiles overlap by half
PLAN, JOURNAL = 'plan.json', 'journal'


class Config(NamedTuple):
  """What decides the content of the records.

  Attributes:
    modality: 'ct' refuses values that are not HU.
    spacing_mm: (z, y, x) to resample to, box mean where it gets coarser, linear where it gets finer; 0 = as it is.
    tile: slices of a record; 0 = the whole volume.
    compress: of voxels, a key of records.OPTIONS.
  """
  modality: str = 'ct'
  spacing_mm: tuple = (0., 0., 0.)
  tile: int = tiles.TILE
  compress: str = 'none'


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

def ct_records(row: dict, config: Config) -> tuple[dict, list[dict], list[str]]:
  """A volume of the manifest -> (record of 'whole', records of 'ct', findings).

  Args:
    row: of the manifest; reads path, id, group, label.
    config: see Config.

  Raises:
    DataError: the file cannot be used.
  """
  scan = tiles.read(row['path'], config.modality, True, config.spacing_mm, config.tile)
  common = {'group': row['group'], 'label': json.dumps(row.get('label') or {}, sort_keys=True)}
  whole = common | {'id': row['id'], 'volume': scan.whole, 'spacing_mm': np.float32(scan.whole_spacing_mm)}
  cuts = []
  for z0 in tiles.starts(len(scan.volume), config.tile):
    tile = tiles.cut(scan, z0, config.tile)
    cuts.append(common | {'id': f'{row["id"]} z{z0}', 'volume_id': row['id'], 'z0': z0, 'volume': tile['volume'],
                          'spacing_mm': np.float32(tile['spacing_mm'])})
  return whole, cuts, scan.warnings


def xray_record(row: dict) -> tuple[dict, list[str]]:
  """A picture of the manifest -> (record of 'xray', findings). Raises DataError."""
  found = readers.image(readers.item(row['path'], 'image'))
  deep = found.array.dtype == np.uint16
  image = found.array if deep else found.array.astype(np.uint16) * records.SCALE_8BIT
  return {'id': row['id'], 'group': row['group'], 'label': json.dumps(row.get('label') or {}, sort_keys=True),
          'image': image, 'bits': 16 if deep else 8, 'view': str(row.get('view', ''))}, found.meta['warnings']


# ---- one shard

def make_shard(out: str, unit: Unit, rows: list[dict], config: Config, count=None) -> None:
  """Writes the shard, of CT volumes the one of their reduced copies beside it, and last its entry in the journal.

  Args:
    out: the prepared folder.
    unit: which shard.
    rows: of the manifest, those that belong there.
    config: see Config.
    count: a multiprocessing.Value that counts files.
  """
  done, place = [], {}
  kinds = ('ct', 'whole') if unit.kind == 'ct' else ('xray',)
  writers = {k: records.Writer(records.folder(out, k) / records.shard_name(k, unit.split, unit.shard, unit.shards), k,
                               config.compress) for k in kinds}
  for row in rows:
    try:
      row = row | {'sha': row.get('sha') or files.sha(readers.item(row['path'], row['kind']).files)}
      if unit.kind == 'ct':
        whole, cuts, warnings = ct_records(row, config)
        made = [_row(row, cut, 'subvolume', warnings) for cut in cuts]
        for cut, entry in zip(cuts, made):
          place[entry['id']] = writers['ct'].count
          writers['ct'].write(cut | {'whole': writers['whole'].count})
        writers['whole'].write(whole)
      else:
        record, warnings = xray_record(row)
        made = [_row(row, record, 'image', warnings)]
        place[row['id']] = writers['xray'].count
        writers['xray'].write(record)
    except DataError as e:
      files.warn(e, 'left out')
      made = [row | {'status': 'excluded', 'findings': [e.code], 'reason': f'{e.reason}. FIX: {e.remedy}'}]
    done += made
    if count is not None:
      with count.get_lock():
        count.value += 1
  shard = records.shard_name(unit.kind, unit.split, unit.shard, unit.shards)
  for entry in done:
    if entry['id'] in place:
      entry['record'] = [shard, place[entry['id']]]
  written = {k: w.close() for k, w in writers.items()}
  _write(epath.Path(out) / JOURNAL / f'{unit.name}.json', {'written': written, 'rows': done})


def _row(row: dict, record: dict, kind: str, warnings: list[str]) -> dict:
  """The manifest row of a record."""
  made = row | {'id': record['id'], 'kind': kind, 'status': 'warn' if warnings else row.get('status', 'ok'),
                'findings': sorted({*row.get('findings', ()), *(w.split()[1] for w in warnings)})}
  if kind == 'subvolume':
    made |= {'volume_id': row['id'], 'z0': record['z0'], 'shape': list(record['volume'].shape),
             'spacing': [float(s) for s in record['spacing_mm']],
             'z_offset_mm': float(record['z0'] * record['spacing_mm'][0])}
  else:
    made |= {'shape': list(record['image'].shape)}
  return made


def _write(path, tree) -> None:
  """JSON, complete or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'{path.name}.part')
  part.write_text(json.dumps(tree, sort_keys=True))
  with contextlib.suppress(FileNotFoundError):      # of the plan, which several machines may write: it is there
    part.replace(path)


# ---- all shards

def plan(rows: list[dict], out, config: Config, shards: int = 0) -> dict:
  """Writes plan.json, or finds that it is there and the same.

  Args:
    rows: of the manifest, with group and split; excluded ones are kept as they are.
    out: the prepared folder.
    config: see Config.
    shards: of the training split of each kind; 0 = about 256 MB each.

  Returns:
    {'config', 'digest', 'shards': {kind: {split: n}}, 'rows'}.

  Raises:
    DataError: PLAN, if the folder was begun with another config, other files or another number of shards.
  """
  rows = sorted(rows, key=lambda r: r['id'])
  made = {'config': config._asdict() | {'spacing_mm': list(config.spacing_mm)}, 'digest': manifest.digest(rows),
          'shards': {}, 'rows': rows}
  for kind, sort in (('ct', 'volume'), ('xray', 'image')):
    mine = [r for r in manifest.usable(rows) if r['kind'] == sort]
    counts = {s: n for s in records.SPLITS if (n := sum(r['split'] == s for r in mine))}
    if mine:
      most = max(counts.values())
      needed = shards or EXPANSION * sum(_size(r['path']) for r in mine) / SHARD_BYTES * most / len(mine)
      made['shards'][kind] = {s: max(1, round(needed * n / most)) for s, n in counts.items()}
  if not made['shards']:
    raise DataError('EMPTY_DIR', out, 'every file is excluded', 'see what the doctor says of them')
  file = epath.Path(out) / PLAN
  if not file.exists():
    _write(file, made)
    return made
  old = json.loads(file.read_text())
  for what in ('config', 'shards'):
    if old[what] != made[what]:
      raise DataError('PLAN', out, f'was begun with other {what}: {old[what]}, now {made[what]}', 'use another --out')
  if old['digest'] != made['digest']:
    raise DataError('PLAN', out, f'was begun with other files: {manifest.changes(old["rows"], rows)}',
                    'use another --out')
  return old


def units(made: dict) -> dict[Unit, list[dict]]:
  """Every shard of a plan with the rows that belong there."""
  out = {Unit(kind, split, i, n): [] for kind, counts in made['shards'].items() for split, n in counts.items()
         for i in range(n)}
  for row in manifest.usable(made['rows']):
    kind = 'ct' if row['kind'] == 'volume' else 'xray'
    n = made['shards'][kind][row['split']]
    out[Unit(kind, row['split'], shard_of(row['id'], n), n)].append(row)
  return out


def finished(out, unit: Unit) -> dict | None:
  """The journal's entry of a shard, if its files are there too."""
  try:
    entry = json.loads((epath.Path(out) / JOURNAL / f'{unit.name}.json').read_text())
    there = all((records.folder(out, k) / records.shard_name(k, unit.split, unit.shard, unit.shards)).exists()
                for k in entry['written'])
    return entry if there else None
  except (OSError, ValueError, KeyError):
    return None


def merge(out) -> list[dict]:
  """Checks that every shard is there and writes manifest and data set descriptions; returns the manifest's rows.

  Raises:
    DataError: SHARDS, naming those that are missing.
  """
  file = epath.Path(out) / PLAN
  if not file.exists():
    raise DataError('SHARDS', out, f'no {PLAN} there', 'run prepare without --merge first')
  made = json.loads(file.read_text())
  entries = {u: finished(out, u) for u in units(made)}
  if lost := [u.name for u, entry in entries.items() if entry is None]:
    raise DataError('SHARDS', out, f'{len(lost)} of {len(entries)} shards are missing: {", ".join(lost[:8])}',
                    'run prepare for them, then --merge again')
  rows = [r for r in made['rows'] if r.get('status') == 'excluded']
  lengths, sizes, hashes = {}, {}, {}
  for unit, entry in entries.items():
    rows += entry['rows']
    for kind, written in entry['written'].items():
      lengths.setdefault(kind, {}).setdefault(unit.split, []).append(written['records'])
      sizes.setdefault(kind, {}).setdefault(unit.split, 0)
      sizes[kind][unit.split] += written['bytes']
      hashes[records.shard_name(kind, unit.split, unit.shard, unit.shards)] = written['hash']
  for kind in lengths:
    records.finish(out, kind, lengths[kind], sizes[kind], f'{kind} of {len(made["rows"])} files')
  manifest.write(out, rows, config=made['config'], shards=hashes)
  return sorted(rows, key=lambda r: r['id'])


def _size(path) -> int:
  """Bytes of a file or of all files of a folder; 0 where nothing says it."""
  with contextlib.suppress(OSError, DataError):
    path = epath.Path(str(path).partition('::')[0])
    return sum(epath.Path(f).stat().length for f in files.below(str(path))) if path.is_dir() else path.stat().length
  return 0
