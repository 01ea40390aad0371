"""DICOM series -> canonical volume; DICOM file -> radiograph. Needs the extra [dicom].

Slices are sorted by ImagePositionPatient along the normal of the slice, and their distance is that of these positions:
neither file names nor InstanceNumber, SliceThickness or SpacingBetweenSlices are trusted. Geometry is that of DICOM
PS3.3 C.7.6.2 (LPS), turned to RAS; the limits on gaps and tilt are chosen by us.
"""
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipelines import dicom_file, images, volume
from data_pipelines.dicom_file import integer, number
from data_pipelines.dicom_series import ALIKE, TAGS, Series, series  # noqa: F401 (series: for callers)
from data_pipelines.errors import DataError

SAME_MM = 1e-2               # two positions closer than this are one
GAP_MM, GAP_SHARE = .1, .01  # distances differ by no more than the larger of the two
MOST_MISSING = 4             # slices in a row that are interpolated
TILT_SHARE = .01             # of the step between slices, sideways


# ---- volumes

class _Slice(NamedTuple):
  position: np.ndarray      # [3] LPS mm, centre of the first pixel
  rows: np.ndarray          # [3] unit vector along a row: rising column index
  columns: np.ndarray       # [3]
  pixel_mm: tuple           # between rows, between columns
  values: np.ndarray        # [rows, columns] int16 or float32


def read(chosen: Series, *, oblique: str = 'resample', hu: bool = True, resample_gaps: bool = False) -> volume.Volume:
  """Reads a series.

  Numbers become values by slope and intercept (or Modality LUT) of each slice. On a CT, padding that its tag names
  becomes -1024 unless it could be tissue. MONOCHROME1 only says how to show a slice, so values stay. A tilted gantry
  is corrected by linear interpolation on a straight grid.

  Args:
    chosen: of `series`; only path and files are used.
    oblique: 'resample', or 'refuse' to raise for volumes that would need it.
    hu: as of nifti.read.
    resample_gaps: slices that are missing, few in a row, are interpolated linearly, with a warning; else they are an
      error, as is any other irregular distance.

  Returns:
    Volume as of nifti.read; values are scaled but not clipped.

  Raises:
    DataError: DICOM UNREADABLE ZERO_BYTES NOT_IMAGE TRUNCATED TOO_LARGE TRANSFER_SYNTAX LOSSY_CT NO_RESCALE DTYPE_RGB
      MULTIFRAME GEOMETRY SLICE_GAP DUP_POSITION SPACING; with 'refuse' OBLIQUE SHEAR GANTRY_TILT.
  """
  if oblique not in ('resample', 'refuse'):
    raise ValueError(f"oblique={oblique!r}: expected 'resample' or 'refuse'")
  try:
    with np.errstate(all='ignore'):
      return _read(chosen, oblique, hu, resample_gaps)
  except DataError:
    raise
  except Exception as e:
    raise dicom_file.damaged(chosen.path, e) from e


def _read(chosen: Series, oblique: str, hu: bool, resample_gaps: bool) -> volume.Volume:
  path, slices, warnings, masked = chosen.path, [], [], 0
  kinds = set()
  for file in chosen.files:
    ds = dicom_file.parse(file)
    dicom_file.refuse_lossy(ds, file)
    parts, count = _slices(ds, file)
    slices += parts
    masked += count
    kinds.add((dicom_file.modality(ds), parts[0].values.shape, integer(ds, 'BitsAllocated', 16, file)))
    volume.check_size((len(slices), *parts[0].values.shape), path)
    if ds.get('LossyImageCompression') == '01' and not warnings:
      warnings.append(f'WARN LOSSY {path}: was once compressed with loss')
  if len(kinds) > 1:
    raise DataError('GEOMETRY', path, 'slices differ in kind, size or bits: '
                    + ', '.join(f'{k} {h} x {w} {b} bit' for k, (h, w), b in sorted(kinds)), 'export one series')
  (kind, (rows, columns), bits), = kinds
  affine, order, at, gantry = _geometry(slices, _thickness(ds), resample_gaps, path, warnings)
  dtype = np.int16 if all(s.values.dtype == np.int16 for s in slices) else np.float32
  stack = np.empty((len(slices), rows, columns), dtype)
  for k, source in enumerate(order):
    stack[k] = slices[source].values
    slices[source] = None    # one copy is enough
  low, high = float(stack.min()), float(stack.max())
  if dtype == np.float32 and volume.fits_int16(low, high) and all(np.array_equal(s, np.rint(s)) for s in stack):
    stack = stack.astype(np.int16)
  stack = _regular(stack, at, path)
  meta = {'shape': (columns, rows, len(slices)), 'dtype': f'{"int" if _signed(ds) else "uint"}{bits}', 'modality': kind,
          'range': (low, high), 'nonfinite': 0, 'padding': masked}
  return volume.settle(stack.transpose(2, 1, 0), affine, path, meta, warnings, oblique=oblique, hu=hu, gantry=gantry,
                       shear_limit=TILT_SHARE)


def _signed(ds) -> bool:
  return number(ds, 'PixelRepresentation') == 1


def _thickness(ds) -> float:
  """Depth of a single slice, which no position tells."""
  return number(ds, 'SliceThickness') or number(ds, 'SpacingBetweenSlices') or 1.


def _slices(ds, path: str) -> tuple[list[_Slice], int]:
  """The slices of a file, and how many of their voxels were padding."""
  if integer(ds, 'SamplesPerPixel', 1, path) != 1 or 'PALETTE' in str(ds.get('PhotometricInterpretation')):
    raise DataError('DTYPE_RGB', path, 'colour pixels, not HU', 'use the grey series')
  kind, groups = dicom_file.modality(ds), _groups(ds, path)
  frames = dicom_file.stored(ds, path)
  if len(groups) != len(frames):
    raise DataError('MULTIFRAME', path, f'{len(frames)} frames, {len(groups)} of them described',
                    'export one file per slice')
  out, masked = [], 0
  for group, array in zip(groups, frames):
    place, turn, pixel_mm = (np.array([float(v) for v in group.get(name) or ()]) for name in (
        'ImagePositionPatient', 'ImageOrientationPatient', 'PixelSpacing'))
    for name, value, n in (('ImagePositionPatient', place, 3), ('ImageOrientationPatient', turn, 6),
                           ('PixelSpacing', pixel_mm, 2)):
      if len(value) != n or not np.isfinite(value).all():
        raise DataError('GEOMETRY', path, f'{name} is missing or damaged: it is {value.tolist()}',
                        'export the original series')
    size = np.linalg.norm(turn.reshape(2, 3), axis=1)
    rows, columns = turn.reshape(2, 3) / size[:, None]
    if not np.allclose(size, 1, atol=ALIKE) or abs(rows @ columns) > ALIKE:
      raise DataError('GEOMETRY', path, f'ImageOrientationPatient {turn.tolist()}: not two directions at a right angle',
                      'export the original series')
    if pixel_mm.min() < 1e-3:
      raise DataError('SPACING', path, f'pixel size {pixel_mm[0]:.3f} x {pixel_mm[1]:.3f} mm', 'correct PixelSpacing')
    values, padded = _values(ds, group, array, kind, path)
    masked += padded
    out.append(_Slice(place, rows, columns, tuple(pixel_mm), values))
  return out, masked


def _values(ds, group, array: np.ndarray, kind: str, path: str) -> tuple[np.ndarray, int]:
  if ds.get('ModalityLUTSequence'):
    table, _ = dicom_file.through_table(ds.ModalityLUTSequence[0], array, ds, path)
    return dicom_file.scaled(table, 1, 0), 0
  slope, intercept = dicom_file.rescale(group, kind, path)
  values = dicom_file.scaled(array, slope, intercept)
  mask = dicom_file.padding(ds, array, slope, intercept) if kind == 'CT' else None
  if mask is not None and mask.any():
    rest = array[~mask]    # the padding may not have fitted into int16
    values = dicom_file.scaled(np.where(mask, rest.min() if rest.size else 0, array), slope, intercept)
    values[mask] = volume.AIR_HU
  return values, 0 if mask is None else int(np.count_nonzero(mask))


def _groups(ds, path: str) -> list:
  """What describes each frame: the data set itself, or the functional groups of an enhanced object as one dict each."""
  frames = integer(ds, 'NumberOfFrames', 1, path)
  each, shared = ds.get('PerFrameFunctionalGroupsSequence'), ds.get('SharedFunctionalGroupsSequence') or [{}]
  if not each:
    if frames > 1:
      name = getattr(ds.get('SOPClassUID'), 'name', 'object')
      raise DataError('MULTIFRAME', path, f'{name} with {frames} frames and no word on where they lie',
                      'export one file per slice')
    return [ds]
  macros = {'PlanePositionSequence': ('ImagePositionPatient',),
            'PlaneOrientationSequence': ('ImageOrientationPatient',),
            'PixelMeasuresSequence': ('PixelSpacing',),
            'PixelValueTransformationSequence': ('RescaleSlope', 'RescaleIntercept')}
  out = []
  for frame in each:
    found = {}
    for macro, names in macros.items():
      item = (frame.get(macro) or shared[0].get(macro) or [{}])[0]
      found |= {name: item.get(name) for name in names}
    out.append(found)
  return out


def _geometry(slices, thickness: float, resample_gaps: bool, path: str, warnings: list
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
  """-> affine from (column, row, slice, 1) to RAS mm, the order of the slices, their places in units of the affine's
  step, and the tilt of the gantry in words.

  Raises:
    DataError: GEOMETRY DUP_POSITION SLICE_GAP.
  """
  first = slices[0]
  for s in slices:
    if (np.abs(s.rows - first.rows).max() > ALIKE or np.abs(s.columns - first.columns).max() > ALIKE
        or not np.allclose(s.pixel_mm, first.pixel_mm, rtol=1e-3, atol=0)):
      raise DataError('GEOMETRY', path, 'slices differ in orientation or pixel size', 'export one series')
  normal = np.cross(first.rows, first.columns)
  normal /= np.linalg.norm(normal)
  places = np.array([s.position for s in slices])
  along = places @ normal
  order = np.argsort(along, kind='stable')
  places, along = places[order], along[order]
  step, gantry, at = normal * thickness, '', np.zeros(1)
  if len(slices) > 1:
    at = _places(along, resample_gaps, path, warnings)
    step = (places[-1] - places[0]) / at[-1]
    line = places[0] + step * at[:, None]
    off = (places - line) - np.outer((places - line) @ normal, normal)
    aside = np.linalg.norm(off, axis=1).max()
    if aside > max(GAP_MM, GAP_SHARE * np.linalg.norm(step)):
      raise DataError('GEOMETRY', path, f'slices are shifted sideways by up to {aside:.1f} mm', 'export one series')
    sideways = np.linalg.norm(step - step @ normal * normal)
    if sideways > TILT_SHARE * np.linalg.norm(step):
      angle = np.degrees(np.arcsin(min(1, sideways / np.linalg.norm(step))))
      gantry = f'{angle:.1f} deg; in-plane shift {sideways:.2f} mm per slice'
  lps = np.eye(4)
  lps[:3, 0], lps[:3, 1] = first.rows * first.pixel_mm[1], first.columns * first.pixel_mm[0]
  lps[:3, 2], lps[:3, 3] = step, places[0]
  return np.diag([-1., -1, 1, 1]) @ lps, order, at, gantry


def _places(along: np.ndarray, resample_gaps: bool, path: str, warnings: list) -> np.ndarray:
  """Sorted positions in mm -> in steps from the first one: 0, 1, 2, ... where all distances are equal.

  Else, with resample_gaps, in steps of nearly the regular distance of which a whole number leads to the last slice.
  A slice that is no farther from a whole number than those of a regular series may be counts as lying there.

  Raises:
    DataError: DUP_POSITION SLICE_GAP.
  """
  distances = np.diff(along)
  if distances.min() < SAME_MM:
    at = along[distances.argmin()]
    count = np.count_nonzero(np.abs(along - at) < SAME_MM)
    raise DataError('DUP_POSITION', path, f'{count} images at position {at:.1f} mm (several time points, or copies?)',
                    'keep one image per position')
  usual = np.sort(distances)[(len(distances) - 1) // 2]
  slack = max(GAP_MM, GAP_SHARE * usual)
  wrong = np.abs(distances - usual) > slack
  if not wrong.any():
    return np.arange(len(along), dtype=float)
  first = int(wrong.argmax())
  missing = distances[first] / usual - 1
  whole = round(missing)
  text = (f'{whole} slice{"s" * (whole > 1)} missing' if whole > 0 and abs(missing - whole) < .1 else 'irregular')
  shown = distances if len(distances) <= 6 else np.unique(np.round(distances, 1))[:6]
  text = f'distances {", ".join(f"{d:.4g}" for d in shown)} mm: {text} after position {along[first]:.1f}'
  regular, extent = distances[~wrong].mean(), along[-1] - along[0]
  if not resample_gaps:
    raise DataError('SLICE_GAP', path, text, 'copy the missing slices, or interpolate them: --resample_gaps of doctor '
                    'and prepare')
  if distances.max() > (MOST_MISSING + 1) * regular + slack:
    raise DataError('SLICE_GAP', path, f'{text}; the largest gap is {distances.max():.4g} mm',
                    f'copy the missing slices (no more than {MOST_MISSING} in a row are interpolated)')
  steps = round(extent / regular)
  at = (along - along[0]) / extent * steps
  there = np.abs(at - np.rint(at)) * extent / steps <= slack
  at[there] = np.rint(at[there])
  made = steps + 1 - len(np.unique(at[there]))
  warnings.append(f'WARN SLICE_GAP {path}: {text}; {made} of {steps + 1} slices interpolated. FIX: copy the missing '
                  'slices')
  return at


def _regular(stack: np.ndarray, at: np.ndarray, path: str) -> np.ndarray:
  """Slices [N, rows, columns] at places `at` -> slices at 0, 1, 2, ...; where there is none, linear between its
  neighbours."""
  if np.array_equal(at, np.arange(len(stack))):
    return stack
  shape = int(at[-1]) + 1, *stack.shape[1:]
  volume.check_size(shape, path)
  out = np.empty(shape, stack.dtype)
  for k in range(len(out)):
    j = int(np.searchsorted(at, k))
    if at[j] == k:
      out[k] = stack[j]
      continue
    share = float((k - at[j - 1]) / (at[j] - at[j - 1]))
    mixed = (1 - share) * stack[j - 1] + share * stack[j]
    out[k] = np.rint(mixed) if stack.dtype == np.int16 else mixed
  return out


# ---- radiographs

def read_image(path) -> images.Radiograph:
  """Reads a radiograph (or any single grey or RGB image) as its VOI window or LUT shows it.

  Returns:
    Radiograph; uint16 with full scale 65535, MONOCHROME1 inverted, short side at most 512.

  Raises:
    DataError: DICOM UNREADABLE ZERO_BYTES NOT_IMAGE TRUNCATED TOO_LARGE TRANSFER_SYNTAX MULTIFRAME DTYPE_RGB.
  """
  try:
    with np.errstate(all='ignore'):
      return _read_image(str(path))
  except DataError:
    raise
  except Exception as e:
    raise dicom_file.damaged(path, e) from e


def _read_image(path: str) -> images.Radiograph:
  ds = dicom_file.parse(path)
  _check_single(ds, path)
  look = str(ds.get('PhotometricInterpretation')).strip()
  stored = dicom_file.stored(ds, path)[0]
  meta = {'mode': f'{look} {integer(ds, "BitsStored", 16, path)} bit', 'size': stored.shape[1::-1], 'warnings': []}
  warn = lambda code, text: meta['warnings'].append(f'WARN {code} {path}: {text}')
  if stored.ndim == 3:
    grey = images.grey(Image.fromarray(stored), warn).astype(np.uint16) * 257
  else:
    grey = np.rint(dicom_file.display(ds, stored, path, warn) * 65535).astype(np.uint16)
  return images.finish(grey, meta, warn)


def check_image(path) -> tuple[int, int]:
  """(height, width) that `read_image` will give; raises what it raises for a file without a picture that could be
  decoded. Reads the header alone."""
  try:
    ds = dicom_file.parse(path, TAGS + ['PhotometricInterpretation'])
    _check_single(ds, path)
    dicom_file.check_decoder(ds, path)
    return images.kept((int(ds.Rows), int(ds.Columns)))
  except DataError:
    raise
  except Exception as e:
    raise dicom_file.damaged(path, e) from e


def _check_single(ds, path) -> None:
  if not ds.get('Rows'):
    raise DataError('NOT_IMAGE', path, f'DICOM object without picture ({dicom_file.modality(ds) or "unknown"})',
                    'remove it')
  if integer(ds, 'NumberOfFrames', 1, path) != 1:
    raise DataError('MULTIFRAME', path, f'{integer(ds, "NumberOfFrames", 1, path)} frames, expected one picture',
                    'export one of them')
  if 'PALETTE' in str(ds.get('PhotometricInterpretation')):
    raise DataError('DTYPE_RGB', path, 'palette colours', 'export it in grey')
