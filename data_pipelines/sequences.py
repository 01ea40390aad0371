"""Co-registered sequences of one scan (T1, FLAIR, ...) -> one sample, whose sequences become channels.

What belongs together is said by the ends of names without .nii.gz, in the order of the channels: `_T1w,_FLAIR` (BIDS),
`_0000,_0001` (nnU-Net), `/t1,/flair` (folders of DICOM series); `::0,::3` are volumes of every 4-D NIfTI file. In a row
of the manifest `paths` names them; `path` is the first of them. All lie on one grid: nothing is resampled here.
"""
import collections
import os
import re
from typing import NamedTuple

from data_pipelines import judgement, readers
from data_pipelines.errors import DataError
from data_pipelines.volume import Volume

FLAG = 'ends of the names of the sequences of a scan, which become its channels: _t1,_flair (or ::0,::3 of 4-D files)'


class Case(NamedTuple):
  paths: tuple[str, ...]      # in the order of the channels, as far as they are there
  fault: DataError | None     # why they are no sample


def parse(text: str) -> tuple[str, ...]:
  """'_t1,_flair' -> ('_t1', '_flair').

  Raises:
    DataError: SEQUENCES: an end that is given twice; volumes of a 4-D file beside ends of names.
  """
  ends = tuple(end.strip() for end in text.split(',') if end.strip())
  volumes = [end for end in ends if re.fullmatch(r'::\d+', end)]
  if len(set(ends)) < len(ends) or 0 < len(volumes) < len(ends):
    raise DataError('SEQUENCES', text, 'an end of a name twice, or volumes of a 4-D file beside ends of names',
                    'write _t1,_flair or ::0,::3')
  return ends


def cases(paths, ends: tuple[str, ...]) -> tuple[list[Case], list[str]]:
  """Which paths belong together, and those whose names end in none of `ends`; both in the order of the paths."""
  if ends[0].startswith('::'):
    return [Case(tuple(path + end for end in ends), None) for path in paths], []
  found, rest = collections.defaultdict(lambda: collections.defaultdict(list)), []
  for path in paths:
    name = readers.stem(path)
    end = max((e for e in ends if name.endswith(e)), key=len, default='')
    if end:
      found[name[:-len(end)]][end].append(path)
    else:
      rest.append(path)
  return [_case(files, ends) for files in found.values()], rest


def _case(files: dict, ends) -> Case:
  paths = tuple(path for end in ends for path in files[end][:1])
  lost, twice = [e for e in ends if not files[e]], [e for e in ends if len(files[e]) > 1]
  reason = (f'nothing beside it ends in {", ".join(lost)}' if lost else
            f'{len(files[twice[0]])} of its files end in {twice[0]}' if twice else '')
  return Case(paths, DataError('SEQUENCES', paths[0], reason, 'copy the missing sequence, or leave the case out' if lost
                               else 'keep one of them') if reason else None)


def of_items(found: readers.Found, ends: tuple[str, ...]) -> readers.Found:
  """Files of a folder as samples of several sequences."""
  items, faults = {item.path: item for item in found.items}, list(found.faults)
  made, rest = cases(items, ends)
  samples = []
  for case in made:
    try:
      if case.fault:
        raise case.fault
      first, *further = (items.get(path) or readers.item(path, 'volume') for path in case.paths)
      samples.append(first._replace(further=tuple(further)))
    except DataError as e:
      faults.append(e)
  others = ', '.join(text for text in (found.others, ignored(rest)) if text)
  return readers.Found(samples, others, faults)


def of_rows(rows: list[dict], ends: tuple[str, ...]) -> tuple[list[tuple[dict, DataError | None]], str]:
  """Volumes of a manifest as samples of several sequences, each with what is wrong with it; and what was left out.

  A sample has the fields of the row of its first sequence. Rows that name their sequences, pictures and excluded rows
  stay as they are.
  """
  mine = {r['path']: r for r in rows if r['kind'] == 'volume' and 'paths' not in r and r.get('status') != 'excluded'}
  made, rest = cases(mine, ends)
  out = [(r, None) for r in rows if mine.get(r['path']) is not r]
  for case in made:
    row = mine[case.paths[0]] if case.paths[0] in mine else mine[case.paths[0].rpartition('::')[0]]
    out.append((row | {'path': case.paths[0], 'paths': list(case.paths)}, case.fault))
  return sorted(out, key=lambda pair: pair[0]['id']), ignored(rest)


def ignored(paths) -> str:
  """'3 volumes of no sequence'; '' for none."""
  return f'{len(paths)} volumes of no sequence' if paths else ''


def read(item: readers.Item, modality: str, resample_gaps: bool = False) -> list[Volume]:
  """All sequences of a sample, on one grid.

  Raises:
    DataError: those of readers.volume; SEQUENCES (of CT there is one), SEQUENCE_GRID (names the file).
  """
  if item.further and modality == 'ct':
    raise DataError('SEQUENCES', item.path, f'{1 + len(item.further)} sequences; of CT one is taken',
                    'pass --modality=mr or --modality=other')
  out = []
  for part in (item, *item.further):
    out.append(readers.volume(part, hu=modality == 'ct', resample_gaps=resample_gaps))
    first, this = out[0], out[-1]
    text = judgement.grid_differs(this.meta['grid'], first.meta['grid'], os.path.basename(item.path))
    if not text and this.array.shape != first.array.shape:    # straightened, with a voxel more or less
      text = f'shape {this.array.shape} when straightened, {os.path.basename(item.path)} {first.array.shape}'
    if text:
      raise DataError('SEQUENCE_GRID', part.path, text, 'resample all sequences of a case on one grid')
  return out
