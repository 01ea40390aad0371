"""One DICOM file -> its dataset, its stored numbers, their meaning. pydicom is imported late: it is an extra.

Stored numbers come before their meaning: byte order, sign and unused bits are put right first (DICOM PS3.5 8.1.1),
then slope and intercept or the Modality LUT (PS3.3 C.11.1), then, for radiographs alone, the VOI window or LUT
(PS3.3 C.11.2.1). What counts as lossy and which padding values are believed is chosen by us.
"""
import io
import logging
import struct
import warnings

import numpy as np
from etils import epath

from data_pipelines.errors import DataError
from data_pipelines.files import read_bytes
from data_pipelines.volume import AIR_HU, check_size, fits_int16

PIP = 'pip install "unimiss_jax[dicom]"'
START = 512                     # bytes that tell whether a file is DICOM
BONE_HU = 3071                  # padding between air and this might be tissue
LARGEST_SIDE = 1 << 13          # pixels: no detector has more
DEFLATED, RLE = b'1.2.840.10008.1.2.1.99', '1.2.840.10008.1.2.5'
LOSSY = ('1.2.840.10008.1.2.4.50', '1.2.840.10008.1.2.4.51', '1.2.840.10008.1.2.4.81')    # JPEG 8 and 12 bit, JPEG-LS
MAYBE_LOSSY = ('1.2.840.10008.1.2.4.91', '1.2.840.10008.1.2.4.203')                       # JPEG 2000, HTJ2K
LONG_VR = (b'OB', b'OD', b'OF', b'OL', b'OV', b'OW', b'SQ', b'SV', b'UC', b'UN', b'UR', b'UT', b'UV')
SHORT_VR = (b'AE', b'AS', b'AT', b'CS', b'DA', b'DS', b'DT', b'FD', b'FL', b'IS', b'LO', b'LT', b'PN', b'SH', b'SL',
            b'SS', b'ST', b'TM', b'UI', b'UL', b'US')


def looks(start: bytes) -> bool:
  """Whether the first bytes of a file are DICOM's, also without preamble and meta header."""
  return start[128:132] == b'DICM' or any(_elements(start, order) > 1 for order in '<>')


def _elements(start: bytes, order: str) -> int:
  """How many short elements with rising tags a data set begins with, the first of them in group 2 or 8."""
  at, count, last = 0, 0, (0, 0)
  while at + 12 <= len(start):
    tag, vr = struct.unpack_from(f'{order}HH', start, at), start[at + 4:at + 6]
    if tag <= last or (not count and tag[0] not in (2, 8)):
      break
    if vr in LONG_VR:
      head, length = 12, struct.unpack_from(f'{order}I', start, at + 8)[0]
    elif vr in SHORT_VR:
      head, length = 8, struct.unpack_from(f'{order}H', start, at + 6)[0]
    elif order == '<':    # implicit type
      head, length = 8, struct.unpack_from('<I', start, at + 4)[0]
    else:
      break
    if length > 1 << 12:
      break
    at, count, last = at + head + length, count + 1, tag
  return count


def required(path):
  """pydicom, or DataError DICOM that says how to get it."""
  try:
    import pydicom
    import pydicom.pixels
  except ImportError as e:
    raise DataError('DICOM', path, f'DICOM needs a package that is not installed ({e})', PIP) from e
  pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE    # odd values are judged where they matter
  logging.getLogger('pydicom').setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore', module='pydicom|pylibjpeg|openjpeg|libjpeg|rle')
  return pydicom


def parse(path, tags=None):
  """The data set of a file; only some tags, and no pixels, where tags are named.

  Raises:
    DataError: DICOM UNREADABLE ZERO_BYTES NOT_IMAGE TRANSFER_SYNTAX.
  """
  pydicom = required(path)
  try:
    with epath.Path(path).open('rb') if tags else io.BytesIO(read_bytes(path)) as f:
      start = f.read(2 * START)
      f.seek(0)
      if not start:
        raise DataError('ZERO_BYTES', path, 'file has 0 bytes', 'copy or download it again')
      if not looks(start):
        raise DataError('NOT_IMAGE', path, f'not a DICOM file (first bytes {start[:8]!r})', 'remove or convert it')
      if DEFLATED in start:    # it unpacks to any size
        raise DataError('TRANSFER_SYNTAX', path, 'deflated data set', 'store it uncompressed (dcmconv +te)')
      out = pydicom.dcmread(f, force=True, stop_before_pixels=bool(tags), specific_tags=tags)
  except DataError:
    raise
  except OSError as e:
    raise DataError('UNREADABLE', path, f'{type(e).__name__}: {e}', 'check path and permissions') from e
  except Exception as e:
    raise damaged(path, e) from e
  return out


def damaged(path, error) -> DataError:
  """pydicom and its decoders fail in as many ways as a file can be damaged."""
  return DataError('NOT_IMAGE', path, f'damaged DICOM file ({type(error).__name__}: {str(error)[:300]})',
                   'copy it again or remove it')


def number(item, name: str, default=None) -> float | None:
  """The first value of an element, if it is a finite number."""
  value = item.get(name)
  if isinstance(value, (str, bytes)) or not hasattr(value, '__len__'):
    value = [value]
  try:
    return float(value[0]) if np.isfinite(float(value[0])) else default
  except (TypeError, ValueError, IndexError):
    return default


def integer(item, name: str, default: int, path) -> int:
  value = number(item, name, default)
  if value != int(value):
    raise DataError('NOT_IMAGE', path, f'{name} is {value:g}', 'copy it again or remove it')
  return int(value)


def modality(ds) -> str:
  """'CT', 'CR', ...; from the kind of object where the tag is missing."""
  of_class = {'1.2.840.10008.5.1.4.1.1.2': 'CT', '1.2.840.10008.5.1.4.1.1.1': 'CR', '1.2.840.10008.5.1.4.1.1.4': 'MR'}
  return str(ds.get('Modality') or of_class.get(str(ds.get('SOPClassUID')), '')).strip().upper()


def syntax(ds):
  """UID of the transfer syntax; without a meta header it is what the first elements look like."""
  uid = ds.file_meta.get('TransferSyntaxUID')
  if not uid:
    from pydicom import uid as known
    implicit, little = ds.original_encoding
    uid = (known.ImplicitVRLittleEndian if implicit else known.ExplicitVRLittleEndian if little
           else known.ExplicitVRBigEndian)
    ds.file_meta.TransferSyntaxUID = uid
  return uid


def check_decoder(ds, path) -> None:
  """Raises DataError TRANSFER_SYNTAX for a compression that cannot be undone here."""
  from pydicom.pixels import get_decoder
  uid = syntax(ds)
  try:
    available, remedy = get_decoder(uid).is_available, PIP
  except Exception:    # video, private, nonsense
    available, remedy = False, 'store it uncompressed (dcmdjpeg, gdcmconv --raw)'
  if not available:
    raise DataError('TRANSFER_SYNTAX', path, f'{uid.name}: there is no decoder for it', remedy)


def stored(ds, path) -> np.ndarray:
  """Numbers as they were stored, in native byte order: [frames, rows, columns], or [1, rows, columns, 3] of colours.

  Raises:
    DataError: TRANSFER_SYNTAX TRUNCATED TOO_LARGE NOT_IMAGE.
  """
  try:
    return _stored(ds, path)
  except DataError:
    raise
  except Exception as e:
    raise DataError('TRUNCATED', path, f'pixels cannot be decoded ({type(e).__name__}: {str(e)[:300]})',
                    'copy again') from e


def _stored(ds, path) -> np.ndarray:
  from pydicom.pixels import pixel_array
  rows, columns, frames = (integer(ds, n, d, path) for n, d in (('Rows', 0), ('Columns', 0), ('NumberOfFrames', 1)))
  allocated, samples = integer(ds, 'BitsAllocated', 0, path), integer(ds, 'SamplesPerPixel', 1, path)
  bits = integer(ds, 'BitsStored', allocated, path)
  if (min(rows, columns, frames) < 1 or allocated not in (8, 16, 32) or not 0 < bits <= allocated
      or samples not in (1, 3)):
    raise DataError('NOT_IMAGE', path, f'{frames} frames of {rows} x {columns} pixels, {bits} of {allocated} bits, '
                    f'{samples} samples', 'copy it again or remove it')
  check_size((frames, rows, columns), path)
  if max(rows, columns) > LARGEST_SIDE:
    raise DataError('TOO_LARGE', path, f'{rows} x {columns} pixels, at most {LARGEST_SIDE} a side',
                    'reduce it; if it is smaller than that, its header is damaged: copy it again')
  if 'PixelData' not in ds:
    raise DataError('TRUNCATED', path, 'no pixels (the file ends early, or they are floats)', 'copy again')
  check_decoder(ds, path)
  native = not syntax(ds).is_encapsulated
  if native:
    need = frames * rows * columns * samples * allocated // 8
    if len(ds.PixelData) < need:
      raise DataError('TRUNCATED', path, 'file ends early (about '
                      f'{100 * len(ds.PixelData) / need:.0f} % of the pixels readable)', 'copy again')
  else:
    from pydicom.encaps import get_frame
    for i in range(frames):
      _check_code(get_frame(ds.PixelData, i, number_of_frames=frames), (rows, columns), path)
  options = {'correct_unused_bits': False} if native else {}
  if syntax(ds) == RLE:    # the other decoder panics on damage, which no `except Exception` sees
    options['decoding_plugin'] = 'pydicom'
  out = np.stack([pixel_array(ds, index=i, raw=samples == 1, **options) for i in range(frames)])
  out = out.astype(out.dtype.newbyteorder('='), copy=False)
  high = integer(ds, 'HighBit', bits - 1, path)
  if native and samples == 1 and bits < allocated and bits - 1 <= high < allocated:
    out = out << (allocated - 1 - high) >> (allocated - bits)    # neither overlays nor a sign that was cut off
  return out


def _check_code(data: bytes, size: tuple[int, int], path) -> None:
  """Compressed pixels say their size themselves, and a decoder would believe it: it must be rows x columns."""
  if data[:3] == b'\xff\xd8\xff':    # JPEG and JPEG-LS: segments up to the start of the frame
    at = 2
    while at + 9 <= len(data) and data[at] == 0xff:
      marker, length = data[at + 1], struct.unpack_from('>H', data, at + 2)[0]
      if marker == 0xf7 or (0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc)):
        found = struct.unpack_from('>HH', data, at + 5)
        break
      at += 1 if marker == 0xff else 2 + length
    else:
      found = None
  else:                                 # JPEG 2000: SIZ, right behind the start of the code
    at = data.find(b'\xff\x4f\xff\x51', 0, 1 << 10)
    if at < 0:
      return    # RLE; of others the decoder will not find the start either
    width, height, left, top = struct.unpack_from('>4I', data, at + 8)
    components, = struct.unpack_from('>H', data, at + 40)
    found = (height - top, width - left) if components <= 4 else None
  if found != size:
    raise DataError('TRUNCATED', path, f'compressed pixels are {found[0]} x {found[1]}, expected {size[0]} x {size[1]}'
                    if found else 'compressed pixels have no valid header', 'copy again')


def refuse_lossy(ds, path) -> None:
  """Raises DataError LOSSY_CT: 8 bits do not hold HU, and a lossy code makes up texture."""
  uid, bits = syntax(ds), integer(ds, 'BitsStored', 16, path)
  lossy = uid in LOSSY or (uid in MAYBE_LOSSY and ds.get('LossyImageCompression') != '00')
  if modality(ds) == 'CT' and (lossy or bits <= 8):
    step = number(ds, 'RescaleSlope', 1.)
    raise DataError('LOSSY_CT', path, f'{bits}-bit {"lossy " if lossy else ""}{uid.name}'
                    + (f', steps of {step:.0f} HU' if step > 1 else ''), 'export the original series')


def rescale(item, kind: str, path) -> tuple[float, float]:
  """Slope and intercept of a slice; a CT must say them."""
  slope, intercept = number(item, 'RescaleSlope'), number(item, 'RescaleIntercept')
  if kind == 'CT' and (not slope or intercept is None):
    raise DataError('NO_RESCALE', path, 'CT without rescale slope and intercept: stored numbers, not HU',
                    'export the original series')
  return slope or 1., intercept or 0.


def scaled(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
  """Stored integers -> values, int16 where they fit, else float32."""
  if slope == int(slope) and intercept == int(intercept):
    out = array.astype(np.int64) * int(slope) + int(intercept)
    return out.astype(np.int16 if fits_int16(out.min(), out.max()) else np.float32)
  return (array.astype(np.float64) * slope + intercept).astype(np.float32)


def through_table(item, array: np.ndarray, ds, path) -> tuple[np.ndarray, int]:
  """Integers through a lookup table (an item of a Modality or VOI LUT sequence) -> values and their bits."""
  entries, first, bits = (int(v) for v in item.LUTDescriptor)
  entries = entries or 1 << 16
  if first >= 1 << 15 and array.min() < 0:    # written as unsigned
    first -= 1 << 16
  data = item.LUTData
  if isinstance(data, bytes):
    wide = len(data) >= 2 * entries
    data = np.frombuffer(data, ('<u2' if ds.original_encoding[1] else '>u2') if wide else np.uint8)
  data = np.asarray(data).astype(np.int64)[:entries]
  if len(data) < entries or not 8 <= bits <= 16:
    raise DataError('NOT_IMAGE', path, f'lookup table of {len(data)} entries and {bits} bits, expected {entries}',
                    'copy it again or remove it')
  return data[np.clip(array.astype(np.int64) - first, 0, entries - 1)], bits


def padding(ds, array: np.ndarray, slope: float, intercept: float) -> np.ndarray | None:
  """Which stored numbers are padding by their tag; None where the tag is absent or names what could be tissue."""
  low = number(ds, 'PixelPaddingValue')
  if low is None:
    return None
  high = number(ds, 'PixelPaddingRangeLimit', low)
  bits = 8 * array.dtype.itemsize
  low, high = sorted(v - (1 << bits) if array.dtype.kind == 'i' and v >= 1 << (bits - 1) else    # the other sign
                     v + (1 << bits) if array.dtype.kind == 'u' and v < 0 else v for v in (low, high))
  ends = sorted((low * slope + intercept, high * slope + intercept))
  if ends[1] >= AIR_HU and ends[0] <= BONE_HU:
    return None
  return (array >= low) & (array <= high)


def display(ds, array: np.ndarray, path, warn) -> np.ndarray:
  """Stored numbers of a radiograph [H, W] -> brightness as its author meant it, 0 ... 1, MONOCHROME1 inverted."""
  bits, signed = integer(ds, 'BitsStored', 16, path), array.dtype.kind == 'i'
  if bits == 16 and not signed:    # often only the size of the word
    bits = next(b for b in (8, 10, 12, 14, 16) if array.max() < 1 << b)
  low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
  if ds.get('ModalityLUTSequence'):
    values, bits = through_table(ds.ModalityLUTSequence[0], array, ds, path)
    low, high = 0, (1 << bits) - 1
  else:
    slope, intercept = rescale(ds, '', path)
    values = array.astype(np.float64) * slope + intercept
    low, high = low * slope + intercept, high * slope + intercept
  out = None
  if ds.get('VOILUTSequence'):
    table, bits = through_table(ds.VOILUTSequence[0], np.rint(values), ds, path)
    out = table / ((1 << bits) - 1)
  elif number(ds, 'WindowWidth') is not None and number(ds, 'WindowCenter') is not None:
    out = _window(values, number(ds, 'WindowCenter'), number(ds, 'WindowWidth'), str(ds.get('VOILUTFunction') or ''))
  if out is None or (out.min() == out.max() and values.min() != values.max()):
    if out is not None:
      warn('WINDOW', 'window or lookup table leaves one grey level; full range kept')
    out = (values - low) / (high - low)
  out = np.clip(out, 0, 1)
  return 1 - out if str(ds.get('PhotometricInterpretation')).strip() == 'MONOCHROME1' else out


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
  """PS3.3 C.11.2.1.2 and C.11.2.1.3, scaled to 0 ... 1."""
  if function == 'SIGMOID' and width > 0:
    return 1 / (1 + np.exp(-4 * (values - centre) / width))
  if function == 'LINEAR_EXACT' and width > 0:
    return np.clip((values - centre) / width + .5, 0, 1)
  if width <= 1:
    return (values > centre - .5).astype(np.float64)
  return np.clip((values - centre + .5) / (width - 1) + .5, 0, 1)
