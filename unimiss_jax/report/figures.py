"""What a page shows beside numbers, and pictures as bytes: JPEG or PNG, whichever is smaller. Pillow only."""
from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

QUALITY = 84      # of JPEG


class Picture(NamedTuple):
  """A picture, or a strip of frames under each other of which a slider shows one.

  Attributes:
    title, note: text. data: of `encoded`. frames: in the strip. zoom: how much larger a frame is shown.
  """
  title: str
  note: str
  data: bytes
  frames: int = 1
  zoom: float = 1.


class Map(NamedTuple):
  """Points in a plane, coloured by label.

  Attributes:
    points: [[x, y]]. kind, names: of each point. labels: {name: [0, 1 or None]}.
  """
  title: str
  note: str
  points: list
  kind: list
  names: list
  labels: dict

  def plain(self) -> dict:
    """As JSON takes it."""
    return self._asdict() | {'kinds': list(dict.fromkeys(self.kind))}


def encoded(image: Image.Image, png: bytes = b'') -> bytes:
  """JPEG or PNG, the smaller one; png: the picture as PNG, where it is one already."""
  jpeg = _saved(image, format='JPEG', quality=QUALITY)
  return min(jpeg, png or _saved(image, format='PNG'), key=len)


def _saved(image, **how) -> bytes:
  file = io.BytesIO()
  image.save(file, **how)
  return file.getvalue()


def uri(data: bytes) -> str:
  """data: URI of a JPEG or a PNG."""
  kind = 'png' if data.startswith(b'\x89PNG') else 'jpeg'
  return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'


def strip(frames) -> Image.Image:
  """[N, H, W(, 3)] uint8 -> the frames under each other."""
  frames = np.asarray(frames)
  return Image.fromarray(frames.reshape(-1, *frames.shape[2:]))


def heat(x) -> np.ndarray:
  """[..., ] in [0, 1] -> [..., 3] uint8: black, purple, orange, light yellow."""
  at = [0., .25, .5, .75, 1.]
  colours = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], float)
  x = np.clip(np.nan_to_num(np.asarray(x, float)), 0, 1)
  return np.stack([np.interp(x, at, colours[:, c]) for c in range(3)], -1).astype(np.uint8)


def large(image, size: tuple, smooth: bool = True) -> np.ndarray:
  """uint8 [H, W(, 3)] at another size (height, width)."""
  how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
  return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size[1], size[0]), how))
