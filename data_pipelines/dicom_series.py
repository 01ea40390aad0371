"""DICOM files -> the series that they belong to, from their headers alone. Needs the extra [dicom].

Files are grouped by SeriesInstanceUID, then by orientation and size: names and folders only tell copies apart.
"""
import collections
import os
from concurrent import futures
from typing import NamedTuple

import numpy as np

from data_pipelines import dicom_file, files
from data_pipelines.dicom_file import integer
from data_pipelines.errors import DataError

RADIOGRAPHS = ('CR', 'DX', 'RG')
VOLUMES = ('CT', 'MR', 'PT')
ALIKE = 1e-2                 # between direction cosines of slices of one orientation
TAGS = ['SOPClassUID', 'SOPInstanceUID', 'SeriesInstanceUID', 'Modality', 'ImageType', 'Rows', 'Columns',
        'NumberOfFrames', 'ImageOrientationPatient']


class Series(NamedTuple):
  path: str                # what messages name: its folder (with ::uid beside other series), or its only file
  uid: str
  files: tuple[str, ...]   # in order of names


class Listing(NamedTuple):
  series: list[Series]            # that could be volumes
  radiographs: list[str]          # files
  others: collections.Counter     # what else there was: {'DICOM localizer': 3}
  faults: list[DataError]         # files that cannot be read


class _Head(NamedTuple):
  path: str
  uid: str
  instance: str
  size: tuple[int, int]
  orientation: tuple[float, ...]


def series(paths) -> Listing:
  """Sorts DICOM files into series; reads their headers alone.

  Of each series the images of the most frequent orientation and size are kept; localizers, reformats and the rest
  are counted. Copies of a series in several folders are several series.

  Args:
    paths: DICOM files.
  """
  out = Listing([], [], collections.Counter(), [])
  paths = sorted(map(str, paths))
  if not paths:
    return out
  try:
    dicom_file.required(_common(paths))
  except DataError as e:
    missing = DataError(e.code, e.path, f'{len(paths)} DICOM files: {e.reason}', e.remedy)
    return out._replace(faults=[missing])
  heads = collections.defaultdict(list)
  progress = files.Progress('reading DICOM headers', len(paths))
  with futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
    for path, found in zip(paths, pool.map(_head, paths)):
      progress.advance()
      if isinstance(found, DataError):
        out.faults.append(found)
      elif isinstance(found, _Head):
        heads[found.uid or os.path.dirname(path)].append(found)
      elif found == 'radiograph':
        out.radiographs.append(path)
      else:
        out.others[found] += 1
  groups = []
  for uid in heads:
    for part in _copies(heads[uid]):
      kept = _majority(part)
      if len(kept) < len(part):
        out.others['DICOM of another orientation or size'] += len(part) - len(kept)
      groups.append(kept)
  beside = collections.Counter(folder for group in groups for folder in _above(group))
  for group in groups:
    names = tuple(h.path for h in group)
    path = names[0] if len(names) == 1 else _common(names)
    if len(names) > 1 and beside[path] > 1:
      path += f'::{group[0].uid}'
    out.series.append(Series(path, group[0].uid, names))
  return out


def _head(path: str):
  """-> _Head of a slice, 'radiograph', what else it is, or the DataError."""
  try:
    ds = dicom_file.parse(path, TAGS)
    kind, kinds = dicom_file.modality(ds), str(ds.get('ImageType')).upper()
    if not ds.get('Rows') or kind not in RADIOGRAPHS + VOLUMES:
      return f'DICOM {kind or "without image"}'
    if kind in RADIOGRAPHS:
      return 'radiograph'
    if 'LOCALIZER' in kinds or 'REFORMATTED' in kinds:
      return f'DICOM {"localizer" if "LOCALIZER" in kinds else "reformat"}'
    turn = tuple(float(v) for v in ds.get('ImageOrientationPatient') or ())
    return _Head(path, str(ds.get('SeriesInstanceUID') or ''), str(ds.get('SOPInstanceUID') or path),
                 (integer(ds, 'Rows', 0, path), integer(ds, 'Columns', 0, path)), turn if len(turn) == 6 else ())
  except DataError as e:
    return e
  except Exception as e:
    return dicom_file.damaged(path, e)


def _copies(heads) -> list[list[_Head]]:
  """One series may lie in several folders; if these hold the same images, each folder is a series."""
  folders = collections.defaultdict(list)
  for h in heads:
    folders[os.path.dirname(h.path)].append(h)
  in_folders = collections.Counter(i for part in folders.values() for i in {h.instance for h in part})
  return list(folders.values()) if max(in_folders.values()) > 1 else [heads]


def _majority(heads) -> list[_Head]:
  """The images of the most frequent orientation and size; of two equally frequent ones that nearest to axial."""
  groups = []
  for h in heads:
    for group in groups:
      first = group[0]
      if (first.size == h.size and len(first.orientation) == len(h.orientation)
          and all(abs(a - b) < ALIKE for a, b in zip(first.orientation, h.orientation))):
        group.append(h)
        break
    else:
      groups.append([h])
  axial = lambda o: abs(np.cross(o[:3], o[3:])[2]) if o else 0.
  return max(groups, key=lambda g: (len(g), axial(g[0].orientation)))


def _above(group) -> set[str]:
  """All folders that hold images of a series at some depth."""
  out = set()
  for folder in {os.path.dirname(h.path) or '.' for h in group}:
    while folder not in out:
      out.add(folder)
      folder = os.path.dirname(folder) or '.'
  return out


def _common(paths) -> str:
  """The folder of all files."""
  scheme, sep, _ = str(paths[0]).rpartition('://')
  folders = {os.path.dirname(str(p)[len(scheme + sep):]) for p in paths}
  return scheme + sep + ((folders.pop() if len(folders) == 1 else os.path.commonpath(list(folders))) or '.')
