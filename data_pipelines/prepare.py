"""Checked files -> shards that training reads at the speed of memory.

  python -m data_pipelines.prepare /data/ct --out=/data/prepared
  python -m data_pipelines.prepare manifest.jsonl --out=/data/prepared --workers=16
  srun --array=0-63: ... --num_shards=64 --shard_index=$SLURM_ARRAY_TASK_ID, then once more with --merge

The shard of a record depends on the id of its volume alone, and a shard is made by one process from beginning to end.
So any number of workers or machines, and any number of kills and restarts, gives the same bytes: what is finished
stands in a journal and is not done again.
"""
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import threading
from typing import NamedTuple

import numpy as np
from etils import epath

from data_pipelines import files, importers, manifest, readers, records, splits, tiles
from data_pipelines.command import Parser, fail
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


def run(out, made: dict, workers: int, only: int | None = None) -> None:
  """Makes the shards that are missing, each in one process.

  Args:
    out: the prepared folder.
    made: the plan.
    workers: processes; 0 = in this one.
    only: number of the one shard of each kind and split to make.

  Raises:
    DataError: WRITE or WORKER; finished shards are kept.
  """
  config = Config(**made['config'] | {'spacing_mm': tuple(made['config']['spacing_mm'])})
  todo = {u: rows for u, rows in units(made).items() if (only is None or u.shard == only) and not finished(out, u)}
  total = sum(map(len, todo.values()))
  if not todo:
    return
  files.say(f'{out}: {len(todo)} shards to make from {total} files, {max(1, min(workers, len(todo)))} workers')
  context = multiprocessing.get_context('spawn')
  count = context.Value('q', 0)
  with _watched(count, total), concurrent.futures.ProcessPoolExecutor(
      min(workers, len(todo)), context, _begin, (count,)) if workers else contextlib.nullcontext() as pool:
    try:
      if pool is None:
        for unit, rows in todo.items():
          make_shard(out, unit, rows, config, count)
        return
      # The largest first: the last one to end is then a small one.
      order = sorted(todo, key=lambda u: (-len(todo[u]), u))
      for job in concurrent.futures.as_completed([pool.submit(_work, out, u, todo[u], config) for u in order]):
        job.result()
    except concurrent.futures.process.BrokenProcessPool as e:
      raise DataError('WORKER', out, 'a worker process was killed (memory?)',
                      'use fewer --workers; the same command goes on with what is left') from e
    except DataError:
      raise
    except Exception as e:      # a full disk; array_record raises plain exceptions
      raise DataError('WRITE', out, f'{type(e).__name__}: {e}'[:300],
                      'make room; the same command goes on with what is left') from e
    finally:
      if pool is not None:
        pool.shutdown(cancel_futures=True)


_count = None


def _begin(count) -> None:
  global _count
  _count = count
  files.single_threaded_blas()


def _work(out, unit, rows, config) -> None:
  make_shard(out, unit, rows, config, _count)


@contextlib.contextmanager
def _watched(count, total: int):
  """Shows progress while processes count."""
  progress, over = files.Progress('prepare', total), threading.Event()

  def look():
    while not over.wait(.5):
      progress.reach(count.value)
  thread = threading.Thread(target=look, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


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


def summary(out, rows: list[dict]) -> str:
  """The last lines: what is there, what was left out and why."""
  kept = manifest.usable(rows)
  lost = collections.Counter(code for r in rows if r.get('status') == 'excluded' for code in r.get('findings', ('?',)))
  left = f', left out: {", ".join(f"{n} {code}" for code, n in sorted(lost.items()))}' if lost else ''
  lines = [f'{out}: {len(kept)} records{left}']
  for kind, leaf in (('subvolume', 'data.ct'), ('image', 'data.xray')):
    counts = collections.Counter(r['split'] for r in kept if r['kind'] == kind)
    if counts:
      told = ', '.join(f'{counts[s]} {s}' for s in records.SPLITS if counts[s])
      lines.append(f'  {told}: train with --config.{leaf}={out}')
  return '\n'.join(lines)


def _size(path) -> int:
  """Bytes of a file or of all files of a folder; 0 where nothing says it."""
  with contextlib.suppress(OSError, DataError):
    path = epath.Path(str(path).partition('::')[0])
    return sum(epath.Path(f).stat().length for f in files.below(str(path))) if path.is_dir() else path.stat().length
  return 0


# ---- the program

USAGE = ('python -m data_pipelines.prepare SOURCE... --out=DIR [--workers=N] [--split=1,0,0] [--num_shards=N '
         '[--shard_index=I | --merge]]')


def main(argv=None) -> int:
  p = Parser(__doc__, USAGE)
  p.add_argument('source', nargs='*', help='folders, lists, or a manifest of the doctor')
  p.add_argument('--out', required=True, help='folder to write')
  p.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes; 0 = this one')
  p.add_argument('--modality', default='ct', choices=('ct', 'other'), help='ct refuses values that are not HU')
  p.add_argument('--spacing', type=_numbers, default=(0., 0., 0.), help='z,y,x in mm to resample to; 0 = as it is')
  p.add_argument('--tile', type=int, default=tiles.TILE, help='slices of a record; 0 = whole volumes')
  p.add_argument('--compress', default='none', choices=tuple(records.OPTIONS), help='zstd: smaller and slower to read')
  p.add_argument('--split', type=_numbers, default=(1., 0., 0.), help='shares of train, val, test; a source that says '
                 'splits keeps them')
  p.add_argument('--override', default=None, help='file that says group or id -> split')
  p.add_argument('--seed', type=int, default=0, help='of the split')
  p.several('--group_by', (), (), help='columns whose value links rows')
  p.add_argument('--subject_from', default='file', help='file, folder, or a pattern with one group')
  p.add_argument('--dataset', default=None, help='name before every id')
  p.add_argument('--num_shards', type=int, default=0, help='of the largest split; 0 = about 256 MB each')
  p.add_argument('--shard_index', type=int, default=None, help='make this shard alone, on this machine')
  p.add_argument('--merge', action='store_true', help='all shards are made: check them and write the manifest')
  p.add_argument('--debug', action='store_true', help='show the traceback of an error')
  f = p.parse_args(argv)
  if f.merge == bool(f.source):
    p.error('exactly one of SOURCE and --merge is needed')
  if f.tile < 0 or f.tile % 2 or 0 < f.tile < tiles.LEAST:
    p.error(f'--tile={f.tile}: an even number from {tiles.LEAST}, or 0')
  if len(f.spacing) != 3 or min(f.spacing) < 0:
    p.error('--spacing: three numbers, z,y,x')
  try:
    if not f.merge:
      config = Config(f.modality, f.spacing, f.tile, f.compress)
      made = plan(listed(f), f.out, config, f.num_shards)
      if f.shard_index is not None and f.shard_index >= max(n for c in made['shards'].values() for n in c.values()):
        files.say(f'{f.out}: there is no shard {f.shard_index}, nothing to do')
      run(f.out, made, f.workers, f.shard_index)
    if f.shard_index is None:
      print(summary(f.out, merge(f.out)))
  except DataError as e:
    if f.debug:
      raise
    return fail(e, 1)
  return 0


def listed(f) -> list[dict]:
  """The rows of all sources, grouped and split."""
  rows = []
  for source in f.source:
    rows += importers.rows(source, subject_from=f.subject_from, dataset=f.dataset)
  return splits.assign(splits.groups(rows, group_by=f.group_by), f.split, f.seed, f.override)


def _numbers(text: str) -> tuple:
  return tuple(float(part) for part in text.split(','))


if __name__ == '__main__':
  sys.exit(main())
