"""PNG or JPEG file -> one radiograph: one channel, upright, 8 or 16 bit, short side at most 512.

The rules (alpha on black, luminance of colour, full scale of 10-, 12- and 14-bit pictures in a 16-bit file) are
chosen by us; luminance is ITU-R 601, which leaves grey stored as RGB exactly as it is.
"""
import io
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from data_pipelines.errors import DataError
from data_pipelines.files import read_bytes

SHORT_SIDE = 512                  # pixels
ORIENTATION = 0x0112              # EXIF; from 5 on rows are columns
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of detectors; a 16-bit file is stretched from the smallest that holds its maximum


class Radiograph(NamedTuple):
  """A radiograph.

  Attributes:
    array: [H, W] uint8 or uint16, full scale = 255 or 65535.
    meta: mode and size (width, height) of the file; warnings: finished one-line texts `WARN CODE file: ...`.
  """
  array: np.ndarray
  meta: dict


def read(path) -> Radiograph:
  """Reads a PNG or JPEG of mode L, LA, RGB, RGBA, P, 1, CMYK or I;16; larger pictures are reduced (antialiased).

  Raises:
    DataError: UNREADABLE ZERO_BYTES NOT_IMAGE TRUNCATED.
  """
  data = read_bytes(path)
  try:
    image = Image.open(io.BytesIO(data))
  except Exception as e:
    raise DataError('NOT_IMAGE', path, f'not an image (first bytes {data[:8]!r})', 'remove or convert it') from e
  try:
    return _read(image, data, str(path))
  except Exception as e:    # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
    raise DataError('TRUNCATED', path, f'picture cannot be decoded ({type(e).__name__}: {e})', 'copy again') from e


def labels(path, of: Radiograph) -> np.ndarray:
  """A label map stored as a picture, on the pixels of its radiograph's file (which `read` may have reduced).

  Args:
    path: PNG, GIF, TIFF or BMP of one channel, or of equal ones; values as stored.
    of: the radiograph, as `read` returns it.

  Raises:
    DataError: UNREADABLE ZERO_BYTES NOT_IMAGE TRUNCATED, MASK_GRID (another size), MASK_VALUE (colours).
  """
  data = read_bytes(path)
  try:
    image = Image.open(io.BytesIO(data))
  except Exception as e:
    raise _not_image(path, data) from e
  try:
    image = ImageOps.exif_transpose(image)
    array = np.asarray(image if image.mode in ('L', 'P', '1', 'I;16', 'I') else image.convert('RGB'))
  except Exception as e:    # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
    raise DataError('TRUNCATED', path, f'label map cannot be decoded ({type(e).__name__}: {e})', 'copy again') from e
  if array.ndim == 3:
    if (array != array[..., :1]).any():
      raise DataError('MASK_VALUE', path, 'is coloured', 'store one number a pixel')
    array = array[..., 0]
  height, width = upright(of)
  if array.shape != (height, width):
    raise DataError('MASK_GRID', path, f'{array.shape[1]} x {array.shape[0]} pixels, its image {width} x {height}',
                    'resample it on the pixels of its image')
  return array.astype(np.int32)


def upright(of: Radiograph) -> tuple[int, int]:
  """(height, width) of the file of a radiograph, turned as EXIF says; `read` may have reduced it."""
  width, height = of.meta['size']
  turned = (height - width) * (of.array.shape[0] - of.array.shape[1]) < 0
  return (width, height) if turned else (height, width)


def check(path) -> tuple[int, int]:
  """(height, width) that `read` will give; raises what it raises for a file that is missing, empty or no picture.

  Reads the header alone, which says before the pixels how the picture is turned, or so late that it is not known here.
  """
  try:
    with epath.Path(path).open('rb') as f:
      start = f.read(8)
      f.seek(0)
      if not start:
        raise DataError('ZERO_BYTES', path, 'file has 0 bytes', 'copy or download it again')
      try:
        with Image.open(f) as image:
          turned = 'exif' in image.info and image.getexif().get(ORIENTATION, 1) > 4
          return kept(image.size if turned else image.size[::-1])
      except Exception as e:
        raise _not_image(path, start) from e
  except OSError as e:
    raise DataError('UNREADABLE', path, f'{type(e).__name__}: {e}', 'check path and permissions') from e


def _not_image(path, data: bytes) -> DataError:
  return DataError('NOT_IMAGE', path, f'not a PNG or JPEG picture (first bytes {data[:8]!r})', 'remove or convert it')


def _read(image: Image.Image, data: bytes, path: str) -> Radiograph:
  meta = {'mode': image.mode, 'size': image.size, 'warnings': []}
  warn = lambda code, text: meta['warnings'].append(f'WARN {code} {path}: {text}')
  if data[:4] == b'\x89PNG' and data[24] == 16 and image.mode != 'I;16':    # Pillow has no 16-bit colour
    warn('MODE', f'16-bit {image.mode} cut to 8 bits')
  image = ImageOps.exif_transpose(image)
  return finish(_full_scale(np.asarray(image)) if image.mode == 'I;16' else grey(image, warn), meta, warn)


def finish(array: np.ndarray, meta: dict, warn) -> Radiograph:
  """Decoded picture [H, W] -> Radiograph: the size that is kept, and a look at it."""
  array = _reduce(array)
  if _looks_inverted(array):
    warn('INVERTED?', 'border brighter than the centre; not changed')
  return Radiograph(array, meta)


def _full_scale(array: np.ndarray) -> np.ndarray:
  """uint16 of unknown depth -> uint16 with full scale 65535."""
  bits = next(b for b in BIT_DEPTHS if array.max() < 1 << b)
  return np.rint(array * (65535 / ((1 << bits) - 1))).astype(np.uint16)


def grey(image: Image.Image, warn) -> np.ndarray:
  """Picture of any 8-bit mode -> uint8 [H, W]."""
  alpha = None
  if image.has_transparency_data:
    image = image.convert('RGBA')
    alpha = np.asarray(image)[..., 3]
  if image.mode not in ('L', '1'):
    image = image.convert('RGB')
    rgb = np.asarray(image)
    coloured = (rgb[..., :1] != rgb[..., 1:]).any(-1).mean()
    if coloured:
      warn('MODE', f'{100 * coloured:.1f} % of the pixels are coloured; luminance kept')
  out = np.asarray(image.convert('L'))
  if alpha is not None and alpha.min() < 255:
    warn('MODE', f'{100 * (alpha < 255).mean():.1f} % of the pixels are transparent; put on black')
    out = np.rint(out * (alpha / 255)).astype(np.uint8)
  return out


def kept(shape) -> tuple[int, int]:
  """The size at which a picture of this (height, width) is kept: short side at most 512."""
  short = min(shape)
  return tuple(shape) if short <= SHORT_SIDE else tuple(round(n * SHORT_SIDE / short) for n in shape)


def _reduce(array: np.ndarray) -> np.ndarray:
  """[H, W] -> the size that is kept, bicubic with antialiasing."""
  height, width = kept(array.shape)
  if (height, width) == array.shape:
    return array
  if array.dtype == np.uint8:
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC))
  out = Image.fromarray(array.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
  return np.rint(np.clip(np.asarray(out), 0, 65535)).astype(np.uint16)


def _looks_inverted(array: np.ndarray) -> bool:
  """Air round the patient is white: only a hint, as tightly cropped pictures have bright borders too."""
  h, w = (max(1, n // 20) for n in array.shape)
  border = np.concatenate([array[:h].ravel(), array[-h:].ravel(), array[:, :w].ravel(), array[:, -w:].ravel()])
  centre = array[array.shape[0] // 4:-(array.shape[0] // 4) or None, array.shape[1] // 4:-(array.shape[1] // 4) or None]
  return border.mean() - centre.mean() > 0.2 * np.iinfo(array.dtype).max
