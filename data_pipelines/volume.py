"""A canonical volume, [S, A, R] = [z, y, x] in memory: flips, axis permutation, straightening, and the way back.

Whatever format a volume comes from, it passes through `settle`. Permutation and flips are exact (nibabel's
orientation maths); volumes that are tilted or sheared are interpolated linearly. Limits are chosen by us.
"""
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from data_pipelines.errors import DataError

AIR_HU = -1024              # below it there is only scanner padding
STRAIGHT_DEG = 3.           # axes closer than this to the patient axes are left alone
SHEAR = 1e-3                # cosine between two array axes
LARGEST = 1 << 30           # voxels: 512 x 512 x 4096; a damaged header asks for more


class Volume(NamedTuple):
  """A canonical volume.

  Attributes:
    array: [D, H, W] = [S, A, R], C-contiguous; int16 where all stored values are integers of that range (straightened
      ones are rounded), else float32.
    spacing_mm: (z, y, x), the lengths of the affine's columns.
    affine: [4, 4], maps indices (z, y, x, 1) to RAS mm.
    meta: shape, dtype, axcodes of the file; grid: shape (i, j, k) and affine [4, 4] (to RAS mm) of the voxels as
      they were stored; shape_canon: [D, H, W] before any resampling; range of the finite values (scaled, before any
      resampling); nonfinite voxels; oblique_deg; warnings: finished one-line texts `WARN CODE file: ...`.
  """
  array: np.ndarray
  spacing_mm: tuple[float, float, float]
  affine: np.ndarray
  meta: dict


def settle(array: np.ndarray, affine: np.ndarray, path, meta: dict, warnings: list[str], *, oblique: str = 'resample',
           hu: bool = True, gantry: str = '', shear_limit: float = SHEAR) -> Volume:
  """Stored voxels -> Volume.

  Args:
    array: [i, j, k] scaled values, int16 or float32; belongs to the volume from now on.
    affine: [4, 4], maps (i, j, k, 1) to RAS mm.
    path: what messages name.
    meta: of the Volume, as far as the reader knows it.
    warnings: texts so far; further ones are added.
    oblique: 'resample', or 'refuse' to raise for volumes that would need it.
    hu: values are HU: what lies below -1024 is padding.
    gantry: a tilt of the gantry that the reader measured, in words; it is corrected like any shear.
    shear_limit: cosine between two array axes that is left alone.

  Raises:
    DataError: OBLIQUE SHEAR GANTRY_TILT (with 'refuse'), SPACING.
  """
  meta |= {'axcodes': ''.join(nib.aff2axcodes(affine)), 'grid': (array.shape, affine)}
  array, affine = canonical(array, affine)
  meta['shape_canon'] = array.shape
  angle, shear = tilt(affine)
  if gantry or angle > STRAIGHT_DEG or shear > shear_limit:
    code, text, done = (('GANTRY_TILT', gantry, 'corrected') if gantry else
                        ('SHEAR', f'gantry tilt {angle:.1f} deg (sheared affine)', 'resampled') if shear > shear_limit
                        else ('OBLIQUE', f'axes {angle:.1f} deg from the patient axes', 'resampled'))
    if oblique == 'refuse':
      raise DataError(code, path, text, "read with oblique='resample' to interpolate it on a straight grid")
    warnings.append(f"WARN {code} {path}: {text}; {done}. FIX: oblique='refuse' to exclude")
    if hu and array.min() < AIR_HU:    # padding must not be averaged into tissue
      warnings.append(f'WARN HU_PADDING {path}: minimum {array.min():g}: raised to {AIR_HU} before resampling')
      np.maximum(array, array.dtype.type(AIR_HU), out=array)
    array, affine = straighten(array, affine, path)
  array = np.ascontiguousarray(array)
  spacing = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
  return Volume(array, spacing, affine, meta | {'oblique_deg': angle, 'warnings': warnings})


def check_size(shape, path) -> None:
  """Raises DataError TOO_LARGE before memory is asked for."""
  count = int(np.prod([int(n) for n in shape], dtype=object))
  if count > LARGEST:
    raise DataError('TOO_LARGE', path, f'{" x ".join(map(str, shape))} = {count:.3g} voxels, at most {LARGEST:.3g}',
                    'crop or reduce it; if it is smaller than that, its header is damaged: copy it again')


def fits_int16(low: float, high: float) -> bool:
  return low >= -2**15 and high < 2**15


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[i, j, k] in any orientation -> a view as [S, A, R], by flips and axis permutation alone, with its affine."""
  orientation = nib.io_orientation(affine)
  affine = affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)
  array = nib.apply_orientation(array, orientation)
  return array.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]


def tilt(affine: np.ndarray) -> tuple[float, float]:
  """Canonical affine -> (largest angle between an array axis and its patient axis in degrees, largest cosine
  between two array axes)."""
  axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
  angle = np.degrees(np.arccos(np.clip(np.diag(axes[::-1]), -1, 1))).max()
  return float(angle), float(np.abs(axes.T @ axes - np.eye(3)).max())


def straighten(array: np.ndarray, affine: np.ndarray, path='') -> tuple[np.ndarray, np.ndarray]:
  """Linear interpolation of a canonical volume on the smallest axis-aligned grid that holds it.

  The grid keeps the spacing of each axis, so nothing is reduced and no low-pass is needed. Outside of the
  volume stands its minimum. Returns [D, H, W] of the type of `array` (integers are rounded) and its affine.
  """
  size = np.linalg.norm(affine[:3, :3], axis=0)    # (z, y, x)
  corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
  corners[:, :3] *= np.array(array.shape) - 1
  world = (corners @ affine.T)[:, :3]              # RAS = (x, y, z)
  low, high = world.min(0), world.max(0)
  count = np.ceil((high - low)[::-1] / size - 1e-3) + 1
  if count.prod() > 16 * max(array.size, 1 << 20):
    raise DataError('SPACING', path, f'a straight grid would have {count.prod():.3g} voxels, the file has {array.size}',
                    'correct the affine in the header')
  grid = np.eye(4)
  grid[:3, :3], grid[:3, 3] = np.diag(size)[::-1], low    # rows (x, y, z), columns (z, y, x)
  to_source = np.linalg.inv(affine) @ grid
  out = np.empty(tuple(int(n) for n in count), array.dtype)
  plane, air = np.empty((1, *out.shape[1:]), np.float32), float(array.min())
  for z in range(len(out)):    # slice by slice: a float copy of all would be twice as large as the volume
    ndimage.affine_transform(array, to_source[:3, :3], to_source[:3, 3] + z * to_source[:3, 0], output=plane, order=1,
                             mode='constant', cval=air)
    out[z] = plane[0] if out.dtype == plane.dtype else np.rint(plane[0])
  return out, grid


def to_grid(array: np.ndarray, like: Volume) -> tuple[np.ndarray, np.ndarray]:
  """A result on the canonical grid -> the same on the grid that the source was stored on, and that grid's affine.

  Exact for sources that were only permuted and flipped. Where the source had been straightened: nearest neighbour
  for integers (labels), linear for floats.

  Args:
    array: [D, H, W] of like.array's shape; integer, boolean or float.
    like: the volume that the result belongs to.

  Returns:
    [i, j, k] of array's type and [4, 4] (to RAS mm).
  """
  if array.shape != like.array.shape:
    raise ValueError(f'array has shape {array.shape}, its volume {like.array.shape}')
  default = array.shape[::-1], like.affine[:, [2, 1, 0, 3]]    # a volume that no file stands behind
  shape, affine = like.meta.get('grid', default)
  to_canonical = nib.io_orientation(affine)
  back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], to_canonical)
  straight = affine @ nib.orientations.inv_ornt_aff(to_canonical, shape)
  if np.allclose(straight[:, [2, 1, 0, 3]], like.affine, rtol=0, atol=1e-9):
    return np.ascontiguousarray(nib.apply_orientation(array.transpose(2, 1, 0), back)), affine
  at = np.linalg.inv(like.affine) @ affine
  floats = np.issubdtype(array.dtype, np.floating)
  out = ndimage.affine_transform(array, at[:3, :3], at[:3, 3], output_shape=tuple(shape), order=1 if floats else 0,
                                 mode='nearest')
  return out, affine
