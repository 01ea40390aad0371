"""NIfTI file -> one canonical volume: scaled values, RAS orientation, index order [S, A, R].

Reads NIfTI-1 and -2, single files and .hdr/.img pairs, plain or gzipped, either byte order. The header maths
is that of the NIfTI-1 standard (through nibabel); the limits on tilt and shear are chosen by us. The file is
always decoded to its end: a gzip stream that was cut yields its first slices without any complaint.
"""
import gzip
import io
import zlib
from typing import NamedTuple

import nibabel as nib
import numpy as np
from etils import epath
from nibabel.arrayproxy import ArrayProxy
from scipy import ndimage

from data_pipelines.errors import DataError

try:
  from isal import igzip  # optional, twice as fast

  gunzip = igzip.decompress
except ImportError:
  gunzip = gzip.decompress

AIR_HU = -1024              # below it there is only scanner padding
STRAIGHT_DEG = 3.           # axes closer than this to the patient axes are left alone
SHEAR = 1e-3                # cosine between two array axes
UNIT_MM = {0: 1., 1: 1e3, 2: 1., 3: 1e-3}    # xyzt_units & 7: unknown, metre, millimetre, micrometre


class Volume(NamedTuple):
  """A canonical volume.

  Attributes:
    array: [D, H, W] = [S, A, R], C-contiguous; int16 where all values are integers of that range, else float32.
    spacing_mm: (z, y, x), the lengths of the affine's columns.
    affine: [4, 4], maps indices (z, y, x, 1) to RAS mm.
    meta: shape, dtype, axcodes of the file; range of its finite values (scaled, before any resampling); nonfinite
      voxels; oblique_deg; warnings: finished one-line texts `WARN CODE file: ...`.
  """
  array: np.ndarray
  spacing_mm: tuple[float, float, float]
  affine: np.ndarray
  meta: dict


def read(path, *, oblique: str = 'resample') -> Volume:
  """Reads a NIfTI file.

  Axis permutation and flips are exact. Volumes whose axes are more than 3 degrees off the patient axes, or
  sheared (gantry tilt), are interpolated linearly on a straight grid of the same spacing.

  Args:
    path: .nii, .nii.gz, or either half of a .hdr/.img pair (also gzipped); the content decides, not the name.
    oblique: 'resample', or 'refuse' to raise for volumes that would need it.

  Returns:
    Volume; values are scaled but not clipped; non-finite voxels become -1024 (see meta['nonfinite']).

  Raises:
    DataError: UNREADABLE ZERO_BYTES NOT_IMAGE TRUNCATED DTYPE_RGB DTYPE_COMPLEX NDIM SPACING OBLIQUE SHEAR.
  """
  if oblique not in ('resample', 'refuse'):
    raise ValueError(f"oblique={oblique!r}: expected 'resample' or 'refuse'")
  try:
    with np.errstate(all='ignore'):
      return _read(str(path), oblique)
  except DataError:
    raise
  except Exception as e:    # damaged headers reach every corner of a reader; the user gets one line for all of them
    raise DataError('NOT_IMAGE', path, f'damaged NIfTI file ({type(e).__name__}: {e})',
                    'copy it again or remove it') from e


def _read(path: str, oblique: str) -> Volume:
  header, data = _load(path)
  shape = _shape(header, path)
  warnings = []
  warn = lambda code, text: warnings.append(f'WARN {code} {path}: {text}')
  affine = _affine(header, path, warn)
  array, extremes, nonfinite = _values(header, data, shape, path)
  del data
  if nonfinite:
    warn('NONFINITE', f'{nonfinite} voxels ({100 * nonfinite / array.size:.2f} %) set to {AIR_HU}')
  meta = {'shape': tuple(int(n) for n in header.get_data_shape()), 'dtype': str(header.get_data_dtype()),
          'axcodes': ''.join(nib.aff2axcodes(affine)), 'range': extremes, 'nonfinite': nonfinite}
  array, affine = canonical(array, affine)
  angle, shear = tilt(affine)
  if angle > STRAIGHT_DEG or shear > SHEAR:
    code = 'SHEAR' if shear > SHEAR else 'OBLIQUE'
    text = (f'gantry tilt {angle:.1f} deg (sheared affine)' if shear > SHEAR
            else f'axes {angle:.1f} deg from the patient axes')
    if oblique == 'refuse':
      raise DataError(code, path, text, "read with oblique='resample' to interpolate it on a straight grid")
    warn(code, f"{text}; resampled. FIX: oblique='refuse' to exclude")
    if array.min() < AIR_HU:    # padding must not be averaged into tissue
      warn('HU_PADDING', f'minimum {array.min():g}: raised to {AIR_HU} before resampling')
      array = np.maximum(array, array.dtype.type(AIR_HU))
    array, affine = straighten(array, affine, path)
  spacing = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
  meta.update(oblique_deg=angle, warnings=warnings)
  return Volume(array, spacing, affine, meta)


# ---- the file

def read_bytes(path) -> bytes:
  """The content of a file, which is not empty; else DataError."""
  try:
    data = epath.Path(path).read_bytes()
  except Exception as e:    # every storage backend has its own
    raise DataError('UNREADABLE', path, f'{type(e).__name__}: {e}', 'check path and permissions') from e
  if not data:
    raise DataError('ZERO_BYTES', path, 'file has 0 bytes', 'copy or download it again')
  return data


def _load(path: str):
  """-> (nibabel header, the bytes that its data offset refers to)."""
  suffix = next((s for s in ('.hdr.gz', '.img.gz', '.hdr', '.img') if path.lower().endswith(s)), '')
  if not suffix:
    data = _decode(path)
    header = _header(data, path)
    return header, data
  stem = path[:-len(suffix)]
  half = {}
  for kind in ('hdr', 'img'):
    names = [f'{stem}.{k}{gz}' for k in (kind, kind.upper()) for gz in ('', '.gz')]
    found = [n for n in names if epath.Path(n).exists()]
    if not found:
      raise DataError('NOT_IMAGE', path, f'its other half is missing (no {names[0]} or {names[1]})',
                      'copy both files of the pair')
    half[kind] = _decode(found[0])
  return _header(half['hdr'], path), half['img']


def _decode(path: str) -> bytes:
  data = read_bytes(path)
  if data[:2] != b'\x1f\x8b':
    return data
  try:
    return gunzip(data)
  except Exception as e:
    raise DataError('TRUNCATED', path, _damage(data, e), 'copy again') from e


def _damage(data: bytes, error: Exception) -> str:
  """How much of a broken gzip stream can be read."""
  stream, parts = zlib.decompressobj(31), []
  try:
    for i in range(0, len(data), 1 << 16):
      parts.append(stream.decompress(data[i:i + (1 << 16)]))
  except zlib.error:
    pass
  start = b''.join(parts)
  if stream.eof or not isinstance(error, EOFError):
    return f'gzip stream is damaged ({error})'
  try:
    header = _header(start, '')
    need = int(np.prod(header.get_data_shape(), dtype=float)) * header.get_data_dtype().itemsize
    share = max(0., (len(start) - header.get_data_offset()) / need)
    return f'gzip stream ends early (about {100 * share:.0f} % of the voxels readable)'
  except Exception:    # not even a header
    return 'gzip stream ends early'


def _header(data: bytes, path: str):
  for size, kind, at in ((348, nib.Nifti1Header, 344), (540, nib.Nifti2Header, 4)):
    for order in '<>':
      if data[:4] == np.array(size, f'{order}i4').tobytes() and data[at:at + 3] in (b'n+1', b'ni1', b'n+2', b'ni2'):
        if len(data) < size:
          raise DataError('TRUNCATED', path, f'{len(data)} bytes, less than a header', 'copy again')
        header = kind(data[:size], endianness=order, check=False)
        if data[at:at + 2] == b'n+':    # single file: the voxels cannot start inside the header
          header['vox_offset'] = max(float(header['vox_offset']), size + 4)
        return header
  raise DataError('NOT_IMAGE', path, f'not a NIfTI file (first bytes {data[:8]!r})', 'remove or convert it')


# ---- header -> shape, affine

def _shape(header, path: str) -> tuple[int, int, int]:
  full = tuple(int(n) for n in header.get_data_shape())
  shape = full
  while len(shape) > 3 and shape[-1] == 1:
    shape = shape[:-1]
  if len(shape) > 3:
    raise DataError('NDIM', path, f'shape {full} has more than 3 axes', 'choose one index of the further axes and '
                    'export one 3-D volume')
  shape += (1,) * (3 - len(shape))
  if min(shape) < 1:
    raise DataError('NDIM', path, f'shape {full} has an empty axis', 'copy it again or remove it')
  return shape


def _affine(header, path: str, warn) -> np.ndarray:
  """[4, 4] float64: file indices (i, j, k, 1) -> RAS mm."""
  zooms = np.abs(np.asarray(header['pixdim'][1:4], np.float64))
  header['pixdim'][1:4] = zooms
  if header['pixdim'][0] not in (-1, 1):    # qfac: 0 means 1
    header['pixdim'][0] = 1
  sform = header.get_sform() if header['sform_code'] > 0 else None
  qform = None
  if header['qform_code'] > 0:
    try:
      qform = header.get_qform()
    except Exception:    # an impossible quaternion does not matter beside a good sform
      if sform is None:
        raise
  if sform is not None and qform is not None:
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]).T
    corners[:3] *= np.maximum(np.array(_shape(header, path))[:, None] - 1, 0)
    gap = np.linalg.norm(((sform - qform) @ corners)[:3], axis=0).max()
    if gap > 1e-3:
      warn('FORM_MISMATCH', f'sform and qform differ by {gap:.3g} mm; sform used')
  affine = sform if sform is not None else qform
  if affine is None:
    warn('NO_AFFINE', 'no orientation stored; assumed RAS. Left and right may be swapped')
    affine = np.diag([*zooms, 1.])
  unit = int(header['xyzt_units']) & 7
  if unit not in UNIT_MM or unit == 0:
    warn('UNITS', 'unit of length unknown; millimetre assumed')
  affine = affine * np.array([[UNIT_MM.get(unit, 1.)]] * 3 + [[1.]])
  size = np.linalg.norm(affine[:3, :3], axis=0)
  if not (np.isfinite(affine).all() and size.min() > 1e-6):
    raise DataError('SPACING', path, f'voxel size {" x ".join(f"{s:.2f}" for s in size)} mm',
                    'correct the affine in the header')
  if abs(np.linalg.det(affine[:3, :3] / size)) < 1e-2:
    raise DataError('SHEAR', path, 'two array axes point the same way', 'correct the affine in the header')
  return affine


# ---- voxels

def _values(header, data: bytes, shape, path: str) -> tuple[np.ndarray, tuple[float, float], int]:
  """-> scaled voxels [i, j, k] (int16 or float32, native byte order), (minimum, maximum) and number of non-finite ones.

  Non-finite voxels are set to -1024 and do not count for the extremes.
  """
  dtype = header.get_data_dtype()
  if dtype.fields:
    raise DataError('DTYPE_RGB', path, f'colour voxels ({",".join(dtype.names)}), not HU', 'use the grey series')
  if dtype.kind == 'c':
    raise DataError('DTYPE_COMPLEX', path, f'complex voxels ({dtype})', 'export magnitude')
  offset = header.get_data_offset()
  need = int(np.prod(shape, dtype=object)) * dtype.itemsize
  if offset < 0 or offset + need > len(data):
    share = max(0., (len(data) - offset) / need)
    raise DataError('TRUNCATED', path, f'file ends early (about {100 * share:.0f} % of the voxels readable)',
                    'copy again')
  slope, inter = (default if v is None else v for v, default in zip(header.get_slope_inter(), (1., 0.)))
  proxy = ArrayProxy(io.BytesIO(data), (shape, dtype, offset, slope, inter))
  fits = lambda low, high: low >= -2**15 and high < 2**15
  if dtype.kind in 'iu' and (slope, inter) == (1, 0):
    array = np.asanyarray(proxy)
    low, high = float(array.min()), float(array.max())
    return array.astype(np.int16 if fits(low, high) else np.float32, copy=False), (low, high), 0
  array, whole = np.empty(shape, np.float32, order='F'), True
  low, high, nonfinite = np.inf, -np.inf, 0
  for k in range(shape[2]):    # slice by slice: nibabel scales in float64
    part = np.array(proxy[..., k], np.float32)
    bad = ~np.isfinite(part)
    if bad.any():
      nonfinite += int(np.count_nonzero(bad))
      part[bad] = AIR_HU
    low = min(low, float(part.min(where=~bad, initial=np.inf)))
    high = max(high, float(part.max(where=~bad, initial=-np.inf)))
    whole = whole and np.array_equal(part, np.rint(part))
    array[..., k] = part
  if nonfinite == array.size:
    low = high = float(AIR_HU)
  return array.astype(np.int16) if whole and fits(low, high) else array, (low, high), nonfinite


# ---- geometry

def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[i, j, k] in any orientation -> [S, A, R] by flips and axis permutation alone, with its affine."""
  orientation = nib.io_orientation(affine)
  affine = affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)
  array = nib.apply_orientation(array, orientation)
  return np.ascontiguousarray(array.transpose(2, 1, 0)), affine[:, [2, 1, 0, 3]]


def tilt(affine: np.ndarray) -> tuple[float, float]:
  """Canonical affine -> (largest angle between an array axis and its patient axis in degrees, largest cosine
  between two array axes)."""
  axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
  angle = np.degrees(np.arccos(np.clip(np.diag(axes[::-1]), -1, 1))).max()
  return float(angle), float(np.abs(axes.T @ axes - np.eye(3)).max())


def straighten(array: np.ndarray, affine: np.ndarray, path='') -> tuple[np.ndarray, np.ndarray]:
  """Linear interpolation of a canonical volume on the smallest axis-aligned grid that holds it.

  The grid keeps the spacing of each axis, so nothing is reduced and no low-pass is needed. Outside of the
  volume stands its minimum. Returns float32 [D, H, W] and its affine.
  """
  size = np.linalg.norm(affine[:3, :3], axis=0)    # (z, y, x)
  corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
  corners[:, :3] *= np.array(array.shape) - 1
  world = (corners @ affine.T)[:, :3]              # RAS = (x, y, z)
  low, high = world.min(0), world.max(0)
  count = np.ceil((high - low)[::-1] / size - 1e-3) + 1
  if count.prod() > 64 * max(array.size, 1 << 20):
    raise DataError('SPACING', path, f'a straight grid would have {count.prod():.3g} voxels, the file has {array.size}',
                    'correct the affine in the header')
  grid = np.eye(4)
  grid[:3, :3], grid[:3, 3] = np.diag(size)[::-1], low    # rows (x, y, z), columns (z, y, x)
  to_source = np.linalg.inv(affine) @ grid
  out = ndimage.affine_transform(array.astype(np.float32), to_source[:3, :3], to_source[:3, 3],
                                 output_shape=tuple(int(n) for n in count), order=1, mode='constant',
                                 cval=float(array.min()))
  return out, grid
