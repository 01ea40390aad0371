"""NIfTI file -> one canonical volume: scaled values, RAS orientation, index order [S, A, R].

Reads NIfTI-1 and -2, single files and .hdr/.img pairs, plain or gzipped, either byte order. The header maths
is that of the NIfTI-1 standard (through nibabel); the limits on tilt and shear are chosen by us. The file is
always decoded to its end: a gzip stream that was cut yields its first slices without any complaint.
"""
import gzip
import itertools

import nibabel as nib
import numpy as np
from etils import epath
from nibabel.volumeutils import apply_read_scaling

from data_pipelines import files, volume
from data_pipelines.errors import DataError
from data_pipelines.volume import AIR_HU, Volume, fits_int16

try:
  from isal.isal_zlib import decompressobj  # optional, twice as fast
except ImportError:
  from zlib import decompressobj

SURPLUS = 1 << 20           # bytes behind the last voxel that are passed over
CHUNK = 1 << 18             # voxels that are scaled at a time
PIECE = 1 << 22             # bytes that are unpacked at a time
UNIT_MM = {0: 1., 1: 1e3, 2: 1., 3: 1e-3}    # xyzt_units & 7: unknown, metre, millimetre, micrometre


def read(path, *, oblique: str = 'resample', frame: int | tuple[int, ...] | None = None, hu: bool = True) -> Volume:
  """Reads a NIfTI file.

  Axis permutation and flips are exact. Volumes whose axes are more than 3 degrees off the patient axes, or
  sheared (gantry tilt), are interpolated linearly on a straight grid of the same spacing.

  Args:
    path: .nii, .nii.gz, or either half of a .hdr/.img pair (also gzipped); the content decides, not the name.
    oblique: 'resample', or 'refuse' to raise for volumes that would need it.
    frame: of a file with more than 3 axes, the index of each further axis, or one number where only one of them
      is longer than 1.
    hu: values are HU: non-finite voxels become -1024; else 0.

  Returns:
    Volume; values are scaled but not clipped (see meta['nonfinite']).

  Raises:
    DataError: UNREADABLE ZERO_BYTES NOT_IMAGE TRUNCATED SURPLUS TOO_LARGE DTYPE_RGB DTYPE_COMPLEX NDIM SPACING
      OBLIQUE SHEAR.
  """
  if oblique not in ('resample', 'refuse'):
    raise ValueError(f"oblique={oblique!r}: expected 'resample' or 'refuse'")
  try:
    with np.errstate(all='ignore'):
      return _read(str(path), oblique, frame, hu)
  except DataError:
    raise
  except Exception as e:    # damaged headers reach every corner of a reader; the user gets one line for all of them
    raise DataError('NOT_IMAGE', path, f'damaged NIfTI file ({type(e).__name__}: {e})',
                    'copy it again or remove it') from e


def _read(path: str, oblique: str, frame, hu: bool) -> Volume:
  header, data = _load(path)
  shape = _shape(header, path)
  number = _frame(shape, frame, path)
  warnings = []
  warn = lambda code, text: warnings.append(f'WARN {code} {path}: {text}')
  affine = _affine(header, path, warn)
  nothing = AIR_HU if hu else 0
  array, extremes, nonfinite = _values(header, data, shape, number, nothing, path)
  del data
  if nonfinite:
    warn('NONFINITE', f'{nonfinite} voxels ({100 * nonfinite / array.size:.2f} %) set to {nothing}')
  meta = {'shape': tuple(int(n) for n in header.get_data_shape()), 'dtype': str(header.get_data_dtype()),
          'range': extremes, 'nonfinite': nonfinite}
  return volume.settle(array, affine, path, meta, warnings, oblique=oblique, hu=hu)


def frames(path) -> tuple[int, ...]:
  """Lengths of the axes beyond the third; () of a plain volume, and of a file whose fault `read` will tell.

  Only the beginning of the file is read.
  """
  try:
    name = parts(path)[0]
    with epath.Path(name).open('rb') as f:
      data = f.read(1 << 16)
    return _shape(_header(_inflate([data], 1024)[0] if data[:2] == b'\x1f\x8b' else data, name), name)[3:]
  except Exception:    # as many kinds as in `read`
    return ()


def write(path, array: np.ndarray, like: Volume) -> None:
  """Writes a result that lies on a canonical grid into the axis order and affine of the file that the grid came from.

  Args:
    path: ends in .nii or .nii.gz; the folder exists.
    array: [D, H, W] of like.array's shape. Booleans become uint8, long integers int32, floats float32.
    like: what `read` gave; where it had been straightened, integers are brought back by nearest neighbour and
      floats linearly, else the way back is exact.

  Raises:
    DataError: SUFFIX, UNWRITABLE. ValueError: another shape or type than those above.
  """
  path = str(path)
  if not path.endswith(('.nii', '.nii.gz')):
    raise DataError('SUFFIX', path, 'is not the name of a NIfTI file', 'let it end in .nii.gz or .nii')
  array, affine = volume.to_grid(_storable(np.asarray(array)), like)
  image = (nib.Nifti1Image if max(array.shape) < 2**15 else nib.Nifti2Image)(array, affine)
  image.header.set_xyzt_units('mm')
  image.set_sform(affine, code=1)
  image.set_qform(affine, code=1)
  corner = np.append(np.array(array.shape) - 1, 1)
  if np.abs((image.get_qform() - affine) @ np.abs(corner)).max() > 1e-3:    # a quaternion cannot hold a shear
    image.set_qform(None, code=0)
  data = image.to_bytes()
  try:
    epath.Path(path).write_bytes(gzip.compress(data, 6, mtime=0) if path.endswith('.gz') else data)
  except Exception as e:    # every storage backend has its own
    raise DataError('UNWRITABLE', path, f'{type(e).__name__}: {e}', 'check folder, permissions and space') from e


def _storable(array: np.ndarray) -> np.ndarray:
  """In a type that every NIfTI reader knows."""
  if array.dtype == bool:
    return array.astype(np.uint8)
  if array.dtype.kind == 'f':
    return array.astype(np.float32)
  if array.dtype.kind in 'iu' and array.dtype.itemsize == 8:
    if array.size and not (array.min() >= -2**31 and array.max() < 2**31):
      raise ValueError(f'values {array.min()} ... {array.max()} do not fit int32')
    return array.astype(np.int32)
  if array.dtype.kind not in 'iu':
    raise ValueError(f'cannot write {array.dtype}: expected integers, booleans or floats')
  return array


# ---- the file

def _load(path: str):
  """-> (nibabel header, the bytes that its data offset refers to)."""
  names = parts(path)
  if len(names) == 1:
    data = _decode(path, lambda start: _span(_header(start, path), path))
    return _header(data, path), data
  header = _header(_decode(names[0], lambda start: (0, 0)), path)
  return header, _decode(names[1], lambda start: _span(header, path))


def parts(path) -> tuple[str, ...]:
  """The files that a volume is made of: header and voxels of a pair, else the file itself. Raises DataError."""
  path = str(path)
  suffix = next((s for s in ('.hdr.gz', '.img.gz', '.hdr', '.img') if path.lower().endswith(s)), '')
  if not suffix:
    return path,
  stem, out = path[:-len(suffix)], []
  for kind in ('hdr', 'img'):
    names = [f'{stem}.{k}{gz}' for k in (kind, kind.upper()) for gz in ('', '.gz')]
    found = [n for n in names if epath.Path(n).exists()]
    if not found:
      raise DataError('NOT_IMAGE', path, f'its other half is missing (no {names[0]} or {names[1]})',
                      'copy both files of the pair')
    out.append(found[0])
  return tuple(out)


def _span(header, path: str) -> tuple[int, int]:
  """Where the voxels begin, and how many bytes they are."""
  shape = _shape(header, path)
  return int(header.get_data_offset()), int(np.prod(shape, dtype=object)) * header.get_data_dtype().itemsize


def _decode(path: str, span) -> bytearray:
  """The content of a file, unpacked if it is a gzip stream: to its end, checksum included.

  Args:
    span: function of the first bytes -> (begin, length) of the voxels. A stream that holds far more is refused, as
      1 MB of it could fill the memory.
  """
  stored = files.blocks(path)    # never all of it beside what is unpacked
  first = next(stored, b'')
  if not first:
    raise files.nothing(path)
  if first[:2] != b'\x1f\x8b':
    out = bytearray(first)
    for block in stored:
      out += block
    return out
  start, _, fault = _inflate([first], 1024)
  if fault and len(start) < 352:
    raise DataError('TRUNCATED', path, f'gzip stream is damaged ({fault})', 'copy again')
  begin, length = span(start)
  most = max(begin + length, 0) + SURPLUS
  out, complete, fault = _inflate(itertools.chain([first], stored), most + 1)
  if len(out) > most:
    raise DataError('SURPLUS', path, f'gzip stream holds more than the {begin + length} bytes that its header '
                    'describes', 'export it again or remove it')
  if fault:
    raise DataError('TRUNCATED', path, f'gzip stream is damaged ({fault})', 'copy again')
  if not complete:
    share = f' (about {100 * max(0., (len(out) - begin) / length):.0f} % of the voxels readable)' if length else ''
    raise DataError('TRUNCATED', path, f'gzip stream ends early{share}', 'copy again')
  return out


def _inflate(blocks, most: int) -> tuple[bytearray, bool, str]:
  """Blocks of a gzip stream (of one or several members) -> (at most `most` bytes of what they hold, whether it came to
  its end, damage)."""
  out, stream = bytearray(), decompressobj(31)    # gzip format
  try:
    for data in blocks:
      while data and len(out) < most:
        if stream.eof:
          data = data.lstrip(b'\0')    # padding is allowed
          stream = decompressobj(31) if data else stream
        else:
          out += stream.decompress(data, min(PIECE, most - len(out)))
          data = stream.unused_data if stream.eof else stream.unconsumed_tail
      if len(out) >= most:
        break
  except DataError:
    raise
  except Exception as e:    # zlib and isal have their own
    return out, False, str(e)
  return out, stream.eof, ''


def _header(data: bytes | bytearray, path: str):
  for size, kind, at in ((348, nib.Nifti1Header, 344), (540, nib.Nifti2Header, 4)):
    for order in '<>':
      if data[:4] == np.array(size, f'{order}i4').tobytes() and data[at:at + 3] in (b'n+1', b'ni1', b'n+2', b'ni2'):
        if len(data) < size:
          raise DataError('TRUNCATED', path, f'{len(data)} bytes, less than a header', 'copy again')
        header = kind(bytes(data[:size]), endianness=order, check=False)
        if data[at:at + 2] == b'n+':    # single file: the voxels cannot start inside the header
          header['vox_offset'] = max(float(header['vox_offset']), size + 4)
        return header
  raise DataError('NOT_IMAGE', path, f'not a NIfTI file (first bytes {bytes(data[:8])!r})', 'remove or convert it')


# ---- header -> shape, affine

def _shape(header, path: str) -> tuple[int, ...]:
  """Three axes, and the further ones that are not all of length 1."""
  full = tuple(int(n) for n in header.get_data_shape())
  if not full or min(full) < 1:
    raise DataError('NDIM', path, f'shape {full} has an empty axis', 'copy it again or remove it')
  volume.check_size(full, path)
  shape = full + (1,) * (3 - len(full))
  while len(shape) > 3 and shape[-1] == 1:
    shape = shape[:-1]
  return shape


def _frame(shape: tuple[int, ...], frame, path: str) -> int:
  """Which volume of the file is meant."""
  further = shape[3:]
  if frame is None:
    if further:
      first = f'({", ".join("0" * len(further))}{"," * (len(further) == 1)})'
      raise DataError('NDIM', path, f'shape {shape} has more than 3 axes', f'read it with frame={first} for the first '
                      f'of its {np.prod(further)} volumes, or export one 3-D volume')
    return 0
  further = further or (1,)
  index = tuple(int(i) for i in np.atleast_1d(frame))
  if len(index) == 1 and sum(n > 1 for n in further) == 1:
    index = tuple(index[0] if n > 1 else 0 for n in further)
  if len(index) != len(further) or any(not 0 <= i < n for i, n in zip(index, further)):
    raise DataError('NDIM', path, f'there is no frame {frame}: the further axes have lengths {further}',
                    'choose an index below each length')
  return int(np.ravel_multi_index(index, further, order='F'))


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
    corners[:3] *= np.array(_shape(header, path)[:3])[:, None] - 1
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
    flat = size[2] < 1e-6 < size[:2].min()
    raise DataError('SPACING', path, f'slice distance {size[2]:.2f} mm' if flat else
                    f'voxel size {" x ".join(f"{s:.2f}" for s in size)} mm', 'correct the affine in the header')
  if abs(np.linalg.det(affine[:3, :3] / size)) < 1e-2:
    raise DataError('SHEAR', path, 'two array axes point the same way', 'correct the affine in the header')
  return affine


# ---- voxels

def _values(header, data: bytearray, shape, number: int, nothing: int, path: str
            ) -> tuple[np.ndarray, tuple[float, float], int]:
  """-> scaled voxels [i, j, k] (int16 or float32, native byte order), (minimum, maximum) and number of non-finite ones.

  Non-finite voxels are set to `nothing` and do not count for the extremes. Of `data`, what has been read is given back.
  """
  dtype = header.get_data_dtype()
  if dtype.fields:
    raise DataError('DTYPE_RGB', path, f'colour voxels ({",".join(dtype.names)}), not HU', 'use the grey series')
  if dtype.kind == 'c':
    raise DataError('DTYPE_COMPLEX', path, f'complex voxels ({dtype})', 'export magnitude')
  offset, need = _span(header, path)
  if offset < 0 or offset + need > len(data):
    share = max(0., (len(data) - offset) / need)
    raise DataError('TRUNCATED', path, f'file ends early (about {100 * share:.0f} % of the voxels readable)',
                    'copy again')
  shape = shape[:3]
  offset += number * int(np.prod(shape)) * dtype.itemsize
  slope, inter = (default if v is None else v for v, default in zip(header.get_slope_inter(), (1., 0.)))
  scaling = np.asanyarray(slope), np.asanyarray(inter)
  plane = shape[0] * shape[1]
  stored = lambda k, n: np.frombuffer(data, dtype, n * plane, offset + k * plane * dtype.itemsize).reshape(
      *shape[:2], n, order='F')
  if dtype.kind in 'iu' and (slope, inter) == (1, 0):
    array = stored(0, shape[2])
    low, high = float(array.min()), float(array.max())
    return array.astype(np.int16 if fits_int16(low, high) else np.float32), (low, high), 0
  array, whole = np.empty(shape, np.int16, order='F'), True    # until a voxel is found that does not fit
  low, high, nonfinite = np.inf, -np.inf, 0
  step = max(1, CHUNK // plane)
  for k in reversed(range(0, shape[2], step)):    # some slices at a time, the last ones first: see below
    part = apply_read_scaling(stored(k, min(step, shape[2] - k)), *scaling).astype(np.float32)
    bad = ~np.isfinite(part)
    if bad.any():
      nonfinite += int(np.count_nonzero(bad))
      part[bad] = nothing
    low = min(low, float(part.min(where=~bad, initial=np.inf)))
    high = max(high, float(part.max(where=~bad, initial=-np.inf)))
    if whole and not (np.array_equal(part, np.rint(part)) and fits_int16(part.min(), part.max())):
      before, array, whole = array, np.empty(shape, np.float32, order='F'), False
      array[..., k + step:] = before[..., k + step:]
      del before
    array[..., k:k + step] = part
    del data[offset + k * plane * dtype.itemsize:]    # float64 is large beside what it becomes
  if nonfinite == array.size:
    low = high = float(nothing)
  return array, (low, high), nonfinite
