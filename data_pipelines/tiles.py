"""A scan -> clipped HU or z-scores, judged fit for training -> overlapping tiles, 24 slices each by default.

The tiling (24 slices, stride 12, last tile shifted back, central 80 % of wide planes) is that of the released
code. Clipping to [-1024, 3071], z-scores (intensities.py) and the reduced copy of the whole scan are chosen by us.
"""
from typing import NamedTuple

import numpy as np

from data_pipelines import intensities, judgement, readers, sequences
from data_pipelines.errors import DataError
from data_pipelines.judgement import HU_RANGE
from data_pipelines.volume import Volume
from unimiss_jax.views import matrices

TILE = 24                         # slices; the stride is half of it
WIDE = 320                        # voxels
WHOLE_MM, WHOLE_BYTES = 3., 4 << 20
SLAB = 8                          # slices that are resampled at a time


class Scan(NamedTuple):
  """A decoded scan.

  Attributes:
    volume: int16 [D, H, W] = [S, A, R] HU, at least as deep as a tile (short scans lie in the middle of air), wide
      planes cut; of other modalities than CT [C, D, H, W] of C sequences, stored as intensities.py says.
    spacing_mm: (z, y, x).
    whole, whole_spacing_mm: the complete scan, reduced to about 3 mm and at most 4 MB; or None.
    warnings: finished one-line texts.
    corner: index of the first voxel of `volume` in the whole scan (at the new spacing); negative where air was added.
    intensity: {'scale', 'offset', 'pad': float32 [C]} of intensities.py; {} of HU.
  """
  volume: np.ndarray
  spacing_mm: tuple[float, float, float]
  whole: np.ndarray | None
  whole_spacing_mm: tuple[float, float, float] | None
  warnings: list[str]
  corner: tuple[int, int, int] = (0, 0, 0)
  intensity: dict = {}


def read(item, modality: str = 'ct', whole: bool = False, spacing_mm=(0., 0., 0.), tile: int = TILE,
         resample_gaps: bool = False, uncut: bool = False) -> Scan:
  """Reads, judges and clips one scan.

  Args:
    item: readers.Item, or a path.
    modality: 'ct', 'mr' or 'other'.
    whole: also the complete scan, reduced; of CT alone.
    spacing_mm: (z, y, x) to resample to; 0 = as it is.
    tile: slices that a volume must have, else it is filled up with air; 0 = as many as it has.
    resample_gaps: as of dicom.read.
    uncut: wide planes stay whole.

  Raises:
    DataError: those of sequences.read, of judge, and of intensities.standardised.
  """
  if not isinstance(item, readers.Item):
    item = readers.item(item, 'volume')
  (first, *_), arrays, intensity, warnings = opened(item, modality, resample_gaps)
  pads, given_mm = intensity.get('pad', HU_RANGE[:1]), first.spacing_mm
  del first, _      # their voxels
  small, small_mm = reduced(arrays[0], given_mm) if whole else (None, None)
  arrays, (spacing_mm, *_) = zip(*(resampled(array, given_mm, spacing_mm) for array in arrays))
  depth, *plane = arrays[0].shape
  if depth < judgement.LEAST:
    raise DataError('TOO_SMALL', item.path, f'{depth} slices at {spacing_mm[0]:g} mm, need >= {judgement.LEAST}',
                    'resample to thinner slices, or remove it')
  corner, box, missing = [0, 0, 0], [slice(None)] * 3, max(0, tile - depth)
  if max(plane) > WIDE and not uncut:
    corner[1:] = (int(.1 * n) for n in plane)
    box[1:] = (slice(int(.1 * n), int(.9 * n)) for n in plane)
  corner[0] = -(missing // 2)
  arrays = [np.pad(array[tuple(box)], ((missing // 2, missing - missing // 2), (0, 0), (0, 0)), constant_values=pad)
            if missing else array[tuple(box)] for array, pad in zip(arrays, pads)]
  volume = np.ascontiguousarray(arrays[0]) if modality == 'ct' else np.stack(arrays)
  return Scan(volume, spacing_mm, small, small_mm, warnings, tuple(corner), intensity)


def whole(item: readers.Item, modality: str, spacing_mm=(0., 0., 0.)) -> Scan:
  """One scan, read, judged and scaled as by `read`, but neither cut nor filled up."""
  (first, *_), arrays, intensity, warnings = opened(item, modality)
  arrays, (spacing_mm, *_) = zip(*(resampled(array, first.spacing_mm, spacing_mm) for array in arrays))
  volume = np.stack(arrays) if intensity else arrays[0]
  return Scan(volume, spacing_mm, None, None, warnings, (0, 0, 0), intensity)


def opened(item: readers.Item, modality: str, resample_gaps: bool = False) -> tuple:
  """All sequences of one scan, judged and scaled.

  Returns:
    Their Volumes; int16 [D, H, W] of each: HU, or z-scores; what those mean (intensities.py), {} of HU; warnings.

  Raises:
    DataError: those of sequences.read, of judge, and of intensities.standardised.
  """
  sources, paths = sequences.read(item, modality, resample_gaps), [part.path for part in (item, *item.further)]
  warnings = [line for source, path in zip(sources, paths)
              for line in source.meta['warnings'] + judge(source, path, modality)]
  if modality == 'ct':
    return sources, [hounsfield(sources[0].array)], {}, warnings
  arrays, found = zip(*(intensities.standardised(source.array, modality, path) for source, path in zip(sources, paths)))
  return sources, list(arrays), {name: np.stack([f[name] for f in found]) for name in found[0]}, warnings


def hounsfield(array: np.ndarray) -> np.ndarray:
  """Scaled values [D, H, W] -> int16, rounded and clipped."""
  hu = np.empty(array.shape, np.int16)
  for out, plane in zip(hu, array):    # slice by slice: copies of all of it would be many times its size
    out[:] = np.clip(np.rint(plane) if plane.dtype == np.float32 else plane, *HU_RANGE)
  return hu


def judge(volume: Volume, path, modality: str = 'ct') -> list[str]:
  """Whether a readable volume can be trained on; returns warnings.

  Raises:
    DataError: the first error of judgement.fit.
  """
  findings = judgement.fit(volume, path, modality)
  for finding in findings:
    if finding.severity == 'ERROR':
      raise finding.error
  return [finding.line for finding in findings]


def starts(depth: int, tile: int = TILE) -> list[int]:
  """First slices of the tiles of a scan, each half a tile after the other; the last tile ends at its last slice.

  tile=0: one that holds all slices.
  """
  if not tile:
    return [0]
  stride = tile // 2
  count = max(0, -(-(depth - tile) // stride)) + 1
  return [max(0, min(stride * i, depth - tile)) for i in range(count)]


def cut(scan: Scan, start: int, tile: int = TILE) -> dict:
  """The tile that begins at a slice, as the fields of a record."""
  record = {'volume': scan.volume[..., start:start + tile, :, :] if tile else scan.volume,
            'spacing_mm': scan.spacing_mm} | scan.intensity
  if scan.whole is not None:
    record |= {'whole': scan.whole, 'whole_spacing_mm': scan.whole_spacing_mm}
  return record


def reduced(volume: np.ndarray, spacing_mm, target_mm: float = WHOLE_MM) -> tuple[np.ndarray, tuple]:
  """Box mean of finer axes to about `target_mm` (coarser if that would need more than 4 MB); the extent stays.

  Args:
    volume: int16 [D, H, W].
    spacing_mm: (z, y, x).

  Returns:
    int16 [d, h, w] and its exact spacing.
  """
  shape = lambda mm: [max(1, round(n * s / mm)) if s < mm else n for n, s in zip(volume.shape, spacing_mm)]
  while np.prod(shape(target_mm)) * 2 > WHOLE_BYTES:
    target_mm *= 1.1
  return _resized(volume, spacing_mm, shape(target_mm))


def resampled(volume: np.ndarray, spacing_mm, target_mm) -> tuple[np.ndarray, tuple]:
  """Another spacing over the same extent: box mean where it gets coarser (antialiased), linear where it gets finer.

  Args:
    volume: int16 [D, H, W].
    spacing_mm, target_mm: (z, y, x); an axis with target 0 stays as it is.

  Returns:
    int16 [d, h, w] and its exact spacing: a whole number of samples fills the extent.
  """
  shape = [max(1, round(n * s / t)) if t else n for n, s, t in zip(volume.shape, spacing_mm, target_mm)]
  return _resized(volume, spacing_mm, shape)


def _resized(volume: np.ndarray, spacing_mm, shape) -> tuple[np.ndarray, tuple]:
  """int16 [D, H, W] -> int16 of `shape` (the same array where that is its own), and its spacing.

  A slab after the other, as floats of all of it would be many times its size.
  """
  if tuple(shape) == volume.shape:
    return volume, tuple(spacing_mm)
  d, h, w = (matrices.resize('area' if m < n else 'linear', 0, n, n, m) for n, m in zip(volume.shape, shape))
  out, planes = np.empty(shape, np.int16), {}    # planes: index of a slice -> float32 [h, w]
  for k in range(0, len(out), SLAB):
    used = np.flatnonzero(d[k:k + SLAB].any(0))
    planes = {i: planes[i] if i in planes else matrices.right(matrices.left(h, volume[i].astype(np.float32)), w)
              for i in used}
    out[k:k + SLAB] = np.rint(np.tensordot(d[k:k + SLAB, used], np.stack([planes[i] for i in used]), 1))
  return out, tuple(s * n / m for s, n, m in zip(spacing_mm, volume.shape, shape))
