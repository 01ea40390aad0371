"""Any source, sample by sample, as an encoder is shown it: whole scans as boxes, radiographs as centre views.

Nothing here raises for a file that cannot be used: its fault takes the place of its views. Of a prepared folder the
scans are put together again from their tiles.
"""
import collections
import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from data_pipelines import cases, doctor, draw, entries, nifti, readers, records, tiles, windows
from data_pipelines.errors import DataError
from data_pipelines.windows import Box
from unimiss_jax.views.volume import SCALE

GREY = 'L', '1', 'I;16', 'MONOCHROME'      # how the modes of grey pictures begin


class Sample(NamedTuple):
  """A scan or radiograph of a source.

  Attributes:
    id, path: as in the manifest.
    kind: 'volume' or 'image'.
    item: its files, where they were found already.
    fault: why it cannot be used, where that is known already.
    paths: of all its sequences, where it has several.
    root, rows: a prepared folder and the rows of its manifest that make up this sample.
  """
  id: str
  path: str
  kind: str
  item: readers.Item | None = None
  fault: DataError | None = None
  paths: tuple[str, ...] = ()
  root: str = ''
  rows: tuple = ()


class How(NamedTuple):
  """What an encoder was trained on.

  Attributes:
    volume: leaves size, extent, resize, pad_hu, record ('tile': as tiles.read cuts them, 'scan': whole scans), clip,
      normalise; None = it knows no volumes.
    image: config with views.xray (size, ratio, resize) and task (clip, normalise); None = it knows no images.
    modality: of volumes; 'ct' asks for HU, and leaves out boxes that hold mostly air.
    spacing_mm: (z, y, x) that volumes are resampled to; 0 = as they are.
    tile: slices of a record, 0 = all.
    frame: which volume of a 4-D file; None = such files are refused.
    channels: sequences of a volume.
  """
  volume: Any
  image: Any
  modality: str = 'ct'
  spacing_mm: tuple = (0., 0., 0.)
  tile: int = tiles.TILE
  frame: int | None = None
  channels: int = 1


class Seen(NamedTuple):
  """What an encoder is shown of a sample.

  Attributes:
    boxes: at least one, in voxels of the whole canonical scan (at the spacing that it was resampled to), or in pixels.
    view: number of a box -> float32 [D, H, W, C] or [h, w, 3].
    warnings: finished one-line texts.
  """
  boxes: list[Box]
  view: Callable[[int], np.ndarray]
  warnings: list[str]


# ---- what there is

def listed(source: str, every_frame: bool = False, ends: tuple[str, ...] = ()) -> tuple[list[Sample], list[str]]:
  """All samples of whatever the doctor takes, or of a prepared folder, and lines on what cannot become one.

  Args:
    source: folder, glob pattern, list, manifest.
    every_frame: each volume of a 4-D NIfTI file is a sample.
    ends: of the names of the sequences of a scan, see sequences.py.

  Raises:
    DataError: EMPTY_DIR, and those of importers.rows.
  """
  jobs, findings, ignored = doctor.jobs_of(source, 'auto', False, entries.Options(lost=True))
  if ends:
    jobs, left = doctor.joined(jobs, ends)
    ignored = ', '.join(text for text in (ignored, left) if text)
  root = source if epath.Path(source).is_dir() else os.path.dirname(source)
  samples, scans = [], collections.defaultdict(list)
  for job in jobs:
    row = job.row
    made = Sample(row['id'], row['path'], row['kind'], job.item, job.fault or _unusable(row),
                  paths=tuple(row.get('paths', ())))
    if made.fault or 'record' not in row:
      samples.append(made)
    elif row['kind'] == 'image':
      samples.append(made._replace(root=root, rows=(row,)))
    else:
      scans[row['volume_id']].append(row)
  samples += [Sample(name, rows[0]['path'], 'volume', root=root, rows=tuple(rows)) for name, rows in scans.items()]
  if every_frame:
    samples = [part for sample in samples for part in _frames(sample)]
  return samples, [f.line for f in findings] + [f'ignored: {ignored}'] * bool(ignored)


def _unusable(row) -> DataError | None:
  if row.get('status') == 'excluded':
    code = (row.get('findings') or ['EXCLUDED'])[0]
    reason, _, remedy = row.get('reason', 'excluded in the list').partition('. FIX: ')
    return DataError(code, row['path'], reason, remedy or 'mend the file and run the doctor again')
  if row['kind'] in ('volume', 'image') or row['kind'] == 'subvolume' and 'record' in row:
    return None
  return DataError('KIND', row['path'], f'is a {row["kind"]}', 'list volumes and images')


def _frames(sample: Sample) -> list[Sample]:
  if sample.kind != 'volume' or sample.fault or sample.rows:
    return [sample]
  try:
    item = _item(sample)
  except DataError as e:
    return [sample._replace(fault=e)]
  count = math.prod(_further(item)) if _further(item) else 0
  at = lambda path, n: f'{path}::{n}'
  return [sample._replace(id=at(sample.id, n), path=at(sample.path, n), item=item._replace(path=at(item.path, n)))
          for n in range(count)] or [sample]


def _item(sample: Sample) -> readers.Item:
  return sample.item or readers.of_row({'path': sample.path, 'paths': sample.paths, 'kind': sample.kind})


def _further(item: readers.Item) -> tuple[int, ...]:
  """Lengths of the axes of a NIfTI file beyond the third, if the path does not say which volume is meant."""
  whole = item.format == 'nifti' and '::' not in item.path and not item.further
  return nifti.frames(item.path) if whole else ()


# ---- one sample

def ahead(samples, how: How, held: int) -> Iterator[tuple[Sample, Seen | DataError]]:
  """Every sample with what is seen of it, in order; at most `held` of them are in memory: the one that was handed out,
  the others being read meanwhile."""
  with futures.ThreadPoolExecutor(held) as pool:
    waiting = collections.deque()
    try:
      for sample in samples:
        waiting.append((sample, pool.submit(seen, sample, how)))
        if len(waiting) == held:
          yield _handed_out(waiting)
      while waiting:
        yield _handed_out(waiting)
    finally:
      pool.shutdown(cancel_futures=True)


def _handed_out(waiting):
  sample, future = waiting.popleft()
  return sample, future.result()


def seen(sample: Sample, how: How) -> Seen | DataError:
  """Reads one sample to its end; a pure function, never raises."""
  try:
    if sample.fault:
      raise sample.fault
    if sample.kind == 'image':
      return _image(sample, how.image)
    return _volume(sample, how)
  except DataError as e:
    return e
  except Exception as e:    # whatever a reader did not foresee is this file's fault alone
    return DataError('READER', sample.path, f'unforeseen {type(e).__name__}: {str(e)[:300]}',
                     'leave the file out, and report this line')


def _image(sample: Sample, config) -> Seen:
  if config is None:
    raise DataError('DIMENSION', sample.path, '2D image given to a 3D-only encoder',
                    'take weights that know 2D images, or give volumes alone')
  if sample.rows:
    found = _record(sample.root, sample.rows[0])
    array, warnings = found['image'], []
  else:
    found = readers.image(_item(sample))
    array, warnings, mode = found.array, list(found.meta['warnings']), found.meta['mode']
    if not mode.startswith(GREY):
      warnings.append(f'WARN MODE {sample.path}: {mode} X-ray converted to gray')
  params = draw.xray_centre(config, array.shape)['xray']
  view = cases.pictures({'image': array}, params, config)[0]
  (row, column), (height, width) = params['box_start'][0].astype(int), params['box_size'][0].astype(int)
  box = Box((0, int(row), int(column)), (1, int(height), int(width)))
  return Seen([box], lambda _: view, warnings)


def _volume(sample: Sample, how: How) -> Seen:
  cfg = how.volume
  if cfg is None:
    raise DataError('DIMENSION', sample.path, 'volume given to a 2D-only encoder',
                    'take weights that know 3D volumes, or give images alone')
  scan = _together(sample) if sample.rows else _read(sample, how)
  count = scan.volume.shape[0] if scan.volume.ndim == 4 else 1
  if count != how.channels:
    raise DataError('SEQUENCES', sample.path, f'{count} sequences of a scan, the encoder was trained on {how.channels}',
                    'say by --sequences which files belong together')
  boxes = windows.cover(scan.volume.shape[-3:], cfg, _tile(how))
  kept = boxes if how.modality != 'ct' else [b for b in boxes if windows.holds_body(scan.volume, b)]
  if not kept:
    raise DataError('NO_BODY', sample.path, f'in each of its {len(boxes)} tiles less than '
                    f'{100 * windows.BODY_SHARE:g} % of the voxels are above {windows.BODY_HU} HU',
                    'look at it; if it is no CT, pass --modality=other')
  places = [Box(tuple(a + b for a, b in zip(box.corner, scan.corner)), box.size) for box in kept]
  view = lambda k: cases.normalised(windows.view(scan, kept[k], cfg), cfg, SCALE)
  return Seen(places, view, scan.warnings)


def _tile(how: How) -> int:
  """Slices of the records that a scan is cut into; boxes of the view's size need none."""
  return how.tile if how.volume.extent != 'output' and how.volume.record == 'tile' else 0


def _read(sample: Sample, how: How) -> tiles.Scan:
  item = _item(sample)
  if further := _further(item):
    if how.frame is None:
      raise DataError('NDIM', item.path, f'{3 + len(further)}-D NIfTI with {math.prod(further)} volumes',
                      '--frame=0 or --frame=all')
    item = item._replace(path=f'{item.path}::{how.frame}')
  if how.volume.record == 'tile':
    return tiles.read(item, how.modality, False, how.spacing_mm, _tile(how))
  return tiles.whole(item, how.modality, how.spacing_mm)      # as records of a task


# ---- prepared folders

def _together(sample: Sample) -> tiles.Scan:
  """The scan that the tiles of a prepared folder were cut from."""
  rows = sorted(sample.rows, key=lambda row: row['z0'])
  found = [_record(sample.root, row) for row in rows]
  *channels, _, height, width = found[0]['volume'].shape
  volume = np.empty((*channels, rows[-1]['z0'] + found[-1]['volume'].shape[-3], height, width), np.int16)
  for row, tile in zip(rows, found):
    volume[..., row['z0']:row['z0'] + tile['volume'].shape[-3], :, :] = tile['volume']
  low, intensity = rows[0]['crop_box'][:3], {'pad': found[0]['pad']} if 'pad' in found[0] else {}
  return tiles.Scan(volume, tuple(rows[0]['spacing']), None, None, [], (low[0] - rows[0]['z0'], *low[1:]), intensity)


def _record(root: str, row: dict) -> dict:
  """The record that a row of a prepared folder's manifest names."""
  name, index = row['record']
  shards = _shards(root, name.partition('-')[0], row['split'])
  known = [os.path.basename(file) for file in shards.files]
  if name not in known:
    raise DataError('SHARDS', root, f'{name} is not one of its shards', 'prepare the folder again')
  return shards.at(known.index(name), index)


_shards = functools.lru_cache(maxsize=8)(records.Shards)
