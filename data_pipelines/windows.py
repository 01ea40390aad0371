"""The boxes of a whole scan that an encoder is shown one by one: the views it was trained on, without their chance.

extent='output': training cuts boxes of the view's size anywhere from a scan; here as few of them as cover it, spread
evenly. extent='record': training shrinks whole records; here every record that training would cut from the scan: tiles,
each beginning half a tile after the other; extent='centre': the middle of each. What is mostly air says nothing of the
patient (limit chosen by us).
"""
import itertools
from typing import NamedTuple

import numpy as np

from data_pipelines import tiles
from unimiss_jax.views import volume

BODY_HU, BODY_SHARE = -500, .1      # a box counts if this share of its voxels is denser


class Box(NamedTuple):
  """A part of a scan, in voxels (z, y, x); `corner` may be negative and the box reach beyond the scan."""
  corner: tuple[int, int, int]
  size: tuple[int, int, int]


def cover(shape, cfg, tile: int = tiles.TILE) -> list[Box]:
  """The boxes of a scan.

  Args:
    shape: [D, H, W] of the scan.
    cfg: the leaves views.ct (size, extent).
    tile: slices of a record; 0 = all.
  """
  if cfg.extent == 'output':
    axes = [spread(n, m, m) for n, m in zip(shape, cfg.size)]
    return [Box(corner, tuple(cfg.size)) for corner in itertools.product(*axes)]
  record = tile or shape[0], *shape[1:]
  records = [Box((z, 0, 0), record) for z in tiles.starts(shape[0], tile)]
  if cfg.extent == 'record':
    return records
  low = [-((m - n) // 2) for n, m in zip(record, cfg.size)]
  return [Box((r.corner[0] + low[0], *low[1:]), tuple(cfg.size)) for r in records]


def spread(length: int, window: int, stride: int) -> list[int]:
  """First voxels of the fewest windows, at most `stride` apart, that cover an axis; of a shorter one, in its middle."""
  if length <= window:
    return [-((window - length) // 2)]
  count = -(-(length - window) // stride) + 1
  return [round(i * (length - window) / (count - 1)) for i in range(count)]


def holds_body(scan: np.ndarray, box: Box) -> bool:
  """Whether a tenth of what a box shows of a CT [D, H, W] in HU is denser than lung."""
  part = scan[tuple(slice(max(a, 0), a + n) for a, n in zip(*box))]
  return np.count_nonzero(part > BODY_HU) >= BODY_SHARE * part.size


def view(scan: tiles.Scan, box: Box, cfg) -> np.ndarray:
  """A box as the network is given it, `[*cfg.size, C]` float32: HU / 1024, or z-scores of each sequence.

  Args:
    scan: its volume [D, H, W] in HU, or [C, D, H, W] with the `pad` of each sequence.
    cfg: the leaves views.ct (size, resize, pad_hu).
  """
  place = np.float32(box.corner), np.float32(box.size), np.zeros(3, bool), cfg.size, cfg.resize
  if 'pad' not in scan.intensity:
    return volume.crop_resize(scan.volume, *place, cfg.pad_hu)[..., None]
  return np.stack([volume.crop_resize(x, *place, pad, None)
                   for x, pad in zip(scan.volume, scan.intensity['pad'])], -1)
