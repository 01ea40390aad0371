"""Small grey pictures of volumes and radiographs, for a page that a person looks at.

Volumes are shown as radiologists hang them: seen from the feet (axial) and from the front (coronal), the patient's
right on the left of the picture; sagittal with the face to the left. 32 grey levels keep a page of a thousand small.
"""
import io

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.volume import Volume

HEIGHT, WIDTH = 112, 144    # pixels of one plane, at most
THIN = 6                    # pixels
GREYS = 32
WINDOW_HU = (-1000, 500)    # lungs, soft tissue and bone in one picture
MARKS = (('R', 'L'), ('R', 'L'), ('A', 'P'))    # left and right of the axial, coronal and sagittal plane


def planes(volume: Volume) -> list[tuple[np.ndarray, tuple[float, float]]]:
  """Middle axial, coronal and sagittal plane as they are shown, each with its (row, column) spacing in mm."""
  (z, y, x), (d, h, w) = volume.spacing_mm, volume.array.shape
  shown = volume.array[::-1, ::-1, ::-1]    # rows from the head and from the front, columns from the right: a view
  return [(shown[d - 1 - d // 2], (y, x)), (shown[:, h - 1 - h // 2], (z, x)), (shown[:, :, w - 1 - w // 2], (z, y))]


def of_volume(volume: Volume, modality: str = 'ct') -> bytes:
  """The middle planes beside each other with their marks, as PNG; but the axial one only if they are thick enough."""
  sample = volume.array[tuple(slice(None, None, max(1, n // 64)) for n in volume.array.shape)]
  low, high = WINDOW_HU if modality == 'ct' else np.percentile(sample, (1, 99))
  parts = []
  for (plane, (row_mm, column_mm)), marks in zip(planes(volume), MARKS):
    height, width = plane.shape[0] * row_mm, plane.shape[1] * column_mm
    scale = min(HEIGHT / height, WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if parts and min(size) < THIN:    # a single slice from its edge
      continue
    part = Image.new('L', (max(size[0], 24), HEIGHT))
    part.paste(_grey(plane, low, high).resize(size, Image.Resampling.BILINEAR), (0, (HEIGHT - size[1]) // 2))
    _mark(part, marks)
    parts.append(part)
  out = Image.new('L', (sum(p.width for p in parts) + 2 * (len(parts) - 1), HEIGHT), 255)
  at = 0
  for part in parts:
    out.paste(part, (at, 0))
    at += part.width + 2
  return _png(out)


def of_radiograph(array: np.ndarray) -> bytes:
  """The picture as it is [H, W], as PNG."""
  out = _grey(array, 0, np.iinfo(array.dtype).max)
  out.thumbnail((2 * WIDTH, HEIGHT), Image.Resampling.BILINEAR)
  return _png(out)


def _grey(plane: np.ndarray, low: float, high: float) -> Image.Image:
  scaled = (plane.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
  return Image.fromarray(np.clip(np.nan_to_num(scaled), 0, 255).astype(np.uint8))


def _mark(picture: Image.Image, marks: tuple[str, str]) -> None:
  draw = ImageDraw.Draw(picture)
  for mark, x in zip(marks, (2, picture.width - 9)):
    draw.text((x, picture.height // 2 - 6), mark, fill=255, stroke_width=1, stroke_fill=0)


def _png(picture: Image.Image) -> bytes:
  levels = np.rint(np.asarray(picture) / 255 * (GREYS - 1)).astype(np.uint8)
  small, out = Image.fromarray(levels), io.BytesIO()
  small.putpalette(np.rint(np.linspace(0, 255, GREYS)).astype(np.uint8).repeat(3).tobytes())
  small.save(out, 'PNG', optimize=True)
  return out.getvalue()
