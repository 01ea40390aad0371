"""Folders and files of any format -> samples, and a sample -> its volume or radiograph: all formats meet here.

NIfTI files and pictures are known by the ends of their names, DICOM by its content among the files that have none of
these.
"""
import collections
import hashlib
import os
from concurrent import futures
from typing import NamedTuple

from etils import epath

from data_pipelines import dicom, dicom_file, files, images, nifti
from data_pipelines.errors import DataError
from data_pipelines.volume import Volume

SUFFIXES = {'nifti': ('.nii.gz', '.nii', '.hdr.gz', '.hdr', '.img.gz', '.img'), 'image': ('.png', '.jpg', '.jpeg')}
BY_NAME = {'volume': 'nifti', 'image': 'image'}    # kind of a sample -> the format that names tell
FORMATS = ('auto', 'nifti', 'dicom', 'image')


class Item(NamedTuple):
  """A sample: one volume or one radiograph.

  Attributes:
    path: what messages name; `item(path, kind)` finds it again. A file, with `::<number>` one volume of a 4-D NIfTI
      file; or the folder of a DICOM series, with `::<SeriesInstanceUID>` where it holds several.
    kind: 'volume' or 'image'.
    format: 'nifti', 'dicom' or 'image' (PNG, JPEG).
    files: all files that it is made of.
    further: items of its other sequences, see sequences.py.
  """
  path: str
  kind: str
  format: str
  files: tuple[str, ...]
  further: tuple = ()


class Found(NamedTuple):
  items: list[Item]           # sorted by path
  others: str                 # what else lies there: '3 *.csv, 12 DICOM reformat'
  faults: list[DataError]     # what looks like a sample and cannot be read


def discover(spec: str, kind: str | None, format: str = 'auto') -> Found:
  """All samples below folders (recursively) or matching glob patterns (`**` = any depth); hidden files are left out.

  Of files that names do not tell, the first 512 bytes are read; of DICOM files, the header.

  Args:
    spec: folders, patterns or files, separated by commas; local or with a scheme (gs://).
    kind: 'volume', 'image', or None for both.
    format: 'auto', or the only one that is looked for; 'dicom' also asks files whose names tell another format.
  """
  for known in (kind,) if kind else BY_NAME:
    _known(known, format)
  others, pairs, unnamed = collections.Counter(), {}, []
  kind_of = {format: known for known, format in BY_NAME.items() if kind in (None, known)}
  for path in files.expand(spec):
    suffix, owner = _by_name(path)
    if format == 'dicom' or not owner:
      unnamed.append(path)
    elif owner not in kind_of or format not in ('auto', owner):
      others[_end(path)] += 1
    elif suffix[:4] in ('.hdr', '.img'):    # 'x.hdr' sorts before 'x.img'
      pairs.setdefault(path[:-len(suffix)] + '.hdr', []).append(path)
    else:
      pairs[path] = [path]
  items = []
  for parts in pairs.values():
    owner = _by_name(parts[0])[1]
    items.append(Item(parts[0], kind_of[owner], owner, tuple(parts)))
  asked = unnamed if format in ('auto', 'dicom') else []
  with futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
    told = list(pool.map(is_dicom, asked))
  listing = dicom.series([path for path, yes in zip(asked, told) if yes])
  others.update(_end(path) for path, yes in zip(asked, told) if not yes)
  others.update(_end(path) for path in unnamed[len(asked):])
  others.update(listing.others)
  if kind != 'image':
    items += [Item(s.path, 'volume', 'dicom', s.files) for s in listing.series]
  else:
    others['DICOM slice'] += sum(len(s.files) for s in listing.series)
  if kind != 'volume':
    items += [Item(path, 'image', 'dicom', (path,)) for path in listing.radiographs]
  else:
    others['DICOM radiograph'] += len(listing.radiographs)
  return Found(sorted(items), ', '.join(f'{n} {name}' for name, n in sorted(others.items()) if n), listing.faults)


def item(path, kind: str, format: str = 'auto') -> Item:
  """The sample at a path, as `Item.path` names it.

  Raises:
    DataError: EMPTY_DIR (a folder without DICOM series), SERIES (with several), and those of DICOM headers.
  """
  _known(kind, format)
  path = os.path.expanduser(str(path))
  file, number = _one_of(path)
  if number is not None:
    return Item(path, kind, 'nifti', nifti.parts(file))
  folder, several, uid = path.rpartition('::')
  if several:
    return _series_in(folder, kind, uid)
  if format in ('nifti', 'image') or (format == 'auto' and _by_name(path)[1]):
    return Item(path, kind, BY_NAME[kind], nifti.parts(path) if kind == 'volume' else (path,))
  if format == 'dicom' or is_dicom(path):
    return _series_in(path, kind) if epath.Path(path).is_dir() else Item(path, kind, 'dicom', (path,))
  if epath.Path(path).is_dir():
    return _series_in(path, kind)
  return Item(path, kind, BY_NAME[kind], (path,))


def of_row(row: dict, format: str = 'auto') -> Item:
  """The sample of a row of the manifest, with all sequences that its `paths` name. Raises what `item` raises."""
  first, *further = (item(path, row['kind'], format) for path in row.get('paths') or [row['path']])
  return first._replace(further=tuple(further))


def sha(sample: Item, said: str | None = None) -> str:
  """The content hash of a sample; of several sequences the order counts.

  Raises:
    DataError: UNREADABLE; CHANGED, if a manifest said another one.
  """
  if not sample.further:
    found = files.sha(sample.files)
  else:
    each = [f'{files.sha(s.files)} {_one_of(s.path)[1]}' for s in (sample, *sample.further)]
    found = hashlib.blake2b('\n'.join(each).encode(), digest_size=16).hexdigest()
  if said not in (None, found):
    raise DataError('CHANGED', sample.path, f'its content has the hash {found}, the manifest says {said}',
                    'bring the file back, or let the doctor write the manifest anew')
  return found


def volume(source, *, oblique: str = 'resample', frame=None, hu: bool = True, resample_gaps: bool = False) -> Volume:
  """The volume of an Item (of several sequences the first one), or of a path.

  Args:
    source: Item, or what `item` takes.
    oblique, frame, hu: as of nifti.read.
    resample_gaps: as of dicom.read.

  Raises:
    DataError: those of item, nifti.read and dicom.read.
  """
  source = source if isinstance(source, Item) else item(source, 'volume')
  if source.format == 'dicom':
    return dicom.read(dicom.Series(source.path, '', source.files), oblique=oblique, hu=hu, resample_gaps=resample_gaps)
  path, number = _one_of(source.path)
  return nifti.read(path, oblique=oblique, frame=frame if number is None else number, hu=hu)


def image(source) -> images.Radiograph:
  """The radiograph of an Item, or of a path.

  Raises:
    DataError: those of item, images.read and dicom.read_image.
  """
  source = source if isinstance(source, Item) else item(source, 'image')
  return dicom.read_image(source.path) if source.format == 'dicom' else images.read(source.path)


def check_image(source: Item) -> tuple[int, int]:
  """(height, width) that `image` will give; raises what it raises for a file that is missing, empty or no picture.
  Reads the header alone."""
  return (dicom.check_image if source.format == 'dicom' else images.check)(source.path)


def empty(spec: str, kind: str, found: Found, leaf: str) -> DataError:
  """The error of a place without samples.

  Args:
    leaf: the setting that holds spec, for the message.
  """
  return DataError('EMPTY_DIR', spec, f'no readable {kind} (found {found.others or "nothing"}; {kind}s end in '
                   f'{", ".join(SUFFIXES[BY_NAME[kind]])}, or are DICOM)', f'point {leaf} at a folder with {kind}s')


def _known(kind: str, format: str) -> None:
  for value, known in ((kind, BY_NAME), (format, FORMATS)):
    if value not in known:
      raise ValueError(f'{value!r}: expected one of {", ".join(known)}')


def stem(path: str) -> str:
  """The path without the end that tells its format: 'a/x.nii.gz' -> 'a/x'."""
  return path[:len(path) - len(_by_name(path)[0])]


def _by_name(path: str) -> tuple[str, str]:
  """-> (end of the name, format that it tells); both empty for other names."""
  low = path.lower()
  return next(((s, format) for format, ends in SUFFIXES.items() for s in ends if low.endswith(s)), ('', ''))


def _one_of(path: str) -> tuple[str, int | None]:
  """'x.nii.gz::3' -> the file and the number of its volume; None where the path names no number."""
  file, _, number = path.rpartition('::')
  return (file, int(number)) if number.isdecimal() and _by_name(file)[1] == 'nifti' else (path, None)


def _end(path: str) -> str:
  return '*' + os.path.splitext(path)[1].lower()


def is_dicom(path: str) -> bool:
  """Whether the first bytes of a file are DICOM's."""
  try:
    with epath.Path(path).open('rb') if '://' in path else open(path, 'rb') as f:
      return dicom_file.looks(f.read(dicom_file.START))
  except Exception:    # a folder, no permission, or what a storage backend raises: the reader will say it
    return False


def _series_in(folder: str, kind: str, uid: str | None = None) -> Item:
  if kind != 'volume':
    raise DataError('NOT_IMAGE', folder, 'is a folder', 'name one picture')
  listing = dicom.series([p for p in files.expand(folder) if not _by_name(p)[1] and is_dicom(p)])
  chosen = [s for s in listing.series if uid is None or s.uid == uid]
  path = folder if uid is None else f'{folder}::{uid}'
  if len(chosen) > 1:    # a copy in a folder below has a path of its own
    chosen = [s for s in chosen if s.path == path] or chosen
  if len(chosen) == 1:
    return Item(path, kind, 'dicom', chosen[0].files)
  if chosen:
    raise DataError('SERIES', folder, f'holds {len(chosen)} DICOM series: {", ".join(s.uid for s in chosen[:5])}'
                    + ' ...' * (len(chosen) > 5), 'append ::<SeriesInstanceUID>')
  if listing.faults:
    raise listing.faults[0]
  what = f'no DICOM series {uid}' if uid else 'no DICOM series'
  found = ', '.join(f'{n} {name}' for name, n in sorted(listing.others.items()))
  raise DataError('EMPTY_DIR', folder, f'{what} (found {found or "nothing"})', 'name a folder that holds one')
