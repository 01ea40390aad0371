"""Checked files -> shards that training reads at the speed of memory.

  python -m data_pipelines.prepare /data/ct --out=/data/prepared
  python -m data_pipelines.prepare manifest.jsonl --out=/data/prepared --workers=16
  srun --array=0-63: ... --num_shards=64 --shard_index=$SLURM_ARRAY_TASK_ID, then once more with --merge

The shard of a record depends on the id of its volume alone, and a shard is made by one process from beginning to end.
So any number of workers or machines, and any number of kills and restarts, gives the same bytes: what is finished
stands in a journal and is not done again.
"""
import collections
import os
import sys

from data_pipelines import (
  engines,
  files,
  importers,
  judgement,
  manifest,
  preparation,
  records,
  reports,
  sequences,
  splits,
  tiles,
)
from data_pipelines.command import Parser, fail
from data_pipelines.errors import DataError

USAGE = ('python -m data_pipelines.prepare SOURCE... --out=DIR [--workers=N] [--split=1,0,0] [--num_shards=N '
         '[--shard_index=I | --merge]]')


def main(argv=None) -> int:
  p = Parser(__doc__, USAGE)
  p.add_argument('source', nargs='*', help='folders, lists, or a manifest of the doctor')
  p.add_argument('--out', required=True, help='folder to write')
  p.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes; 0 = this one')
  p.add_argument('--modality', default='ct', choices=judgement.MODALITIES, help='ct refuses values that are not HU; mr '
                 'and other are stored as z-scores')
  p.add_argument('--sequences', default='', help=sequences.FLAG)
  p.add_argument('--resample_gaps', action='store_true', help='interpolate missing slices of DICOM series')
  p.add_argument('--spacing', type=_numbers, default=(0., 0., 0.), help='z,y,x in mm to resample to; 0 = as it is')
  p.add_argument('--tile', type=int, default=tiles.TILE, help='slices of a record; 0 = whole volumes')
  p.add_argument('--uncut', action='store_true', help='whole scans as they are, wide planes too: for studies with '
                 'reports; sets --tile=0')
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
  p.add_argument('--engine', default='pool', choices=('pool', 'beam'), help='beam: Apache Beam, for clusters')
  p.add_argument('--beam_options', default='', help='flags of its runner, in one text')
  p.add_argument('--merge', action='store_true', help='all shards are made: check them and write the manifest')
  p.add_argument('--debug', action='store_true', help='show the traceback of an error')
  f = p.parse_args(argv)
  if f.merge == bool(f.source):
    p.error('exactly one of SOURCE and --merge is needed')
  if f.shard_index is not None and (f.merge or not f.num_shards or not 0 <= f.shard_index < f.num_shards):
    p.error(f'--shard_index={f.shard_index}: with --num_shards, from 0 to one less, and without --merge')
  if '://' in f.out:
    p.error(f'--out={f.out}: a local folder, to be copied afterwards')
  if f.tile < 0 or f.tile % 2 or 0 < f.tile < judgement.LEAST:
    p.error(f'--tile={f.tile}: an even number from {judgement.LEAST}, or 0')
  if len(f.spacing) != 3 or min(f.spacing) < 0:
    p.error('--spacing: three numbers, z,y,x')
  try:
    if not f.merge:
      ends = sequences.parse(f.sequences)
      tile = 0 if f.uncut else f.tile
      config = preparation.Config(f.modality, f.spacing, tile, f.compress, ends, f.resample_gaps, f.uncut)
      rows = listed(f, ends)
      with engines.writing(f.out):
        made = preparation.plan(rows, f.out, config, f.num_shards)
      jobs = engines.todo(f.out, made, f.shard_index)
      if jobs and f.engine == 'beam':
        engines.beam(f.out, jobs, config, f.beam_options.split())
      elif jobs:
        engines.pool(f.out, jobs, config, f.workers)
    if f.shard_index is None:
      with engines.writing(f.out):
        rows = preparation.merge(f.out, verify=f.merge)
      print(summary(f.out, rows))
  except DataError as e:
    if f.debug:
      raise
    return fail(e, 1)
  return 0


def listed(f, ends: tuple[str, ...]) -> list[dict]:
  """The rows of all sources, with their reports, sequences joined, grouped and split."""
  rows = []
  for source in f.source:
    rows += importers.rows(source, subject_from=f.subject_from, dataset=f.dataset)
  if ends:
    found, ignored = sequences.of_rows(rows, ends)
    rows = [preparation.excluded(row, fault) if fault else row for row, fault in found]
    for _, fault in found:
      if fault:
        files.warn(fault, 'left out')
    if ignored:
      files.say(f'ignored: {ignored}')
  return splits.assign(splits.groups(reports.joined(rows), group_by=f.group_by), f.split, f.seed, f.override)


def _numbers(text: str) -> tuple:
  return tuple(float(part) for part in text.split(','))


def summary(out, rows: list[dict]) -> str:
  """The last lines: what is there, what was left out and why."""
  kept = manifest.usable(rows)
  # The first finding of a row is its worst.
  lost = collections.Counter((r.get('findings') or ['?'])[0] for r in rows if r.get('status') == 'excluded')
  left = f', left out: {", ".join(f"{n} {code}" for code, n in sorted(lost.items()))}' if lost else ''
  lines = [f'{out}: {len(kept)} records{left}']
  for kind, leaf in (('subvolume', 'data.ct'), ('image', 'data.xray')):
    counts = collections.Counter(r['split'] for r in kept if r['kind'] == kind)
    if counts:
      told = ', '.join(f'{counts[s]} {s}' for s in records.SPLITS if counts[s])
      said = sum('text' in r for r in kept if r['kind'] == kind)
      reports_of = f'; {said} with a report: configs/unimedi.py --config.data.manifest={out}' if said else ''
      lines.append(f'  {told}: train with --config.{leaf}={out}{reports_of}')
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main())
