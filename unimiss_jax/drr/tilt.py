"""Cone-beam projection on a film in any position, by shear-warp (Lacroute and Levoy, SIGGRAPH 1994).

Every ray also meets a plane parallel to the slices. The separable form renders on a grid of that plane,
finer than the pixels; its image is warped onto the film, which is one interpolation in 2-D. The source is
the true one, so lengths within the slices are those of the true rays.
"""
import itertools
import math

import numpy as np

from unimiss_jax.drr import slices
from unimiss_jax.drr.geometry import Detector, array_namespace, is_concrete

SUPERSAMPLING = 1.5    # pixels of the plane per pixel of the film; their mean and the warp together are one pixel wide


def marching_axis(source, film):
  """The axis along which the ray through the centre of the film advances most; an array where that is traced."""
  xp = array_namespace(source, film)
  ray = _ray(source, film, (film.shape[0] - 1) / 2, (film.shape[1] - 1) / 2)
  return abs(xp.stack([xp.asarray(r) for r in ray])).argmax()


def shear_warp(volume, spacing, source, film, kind: str, march: int, shape=None):
  """Line integrals on a film in any position.

  Args and result as `slices.line_integrals`, for the slices of axis `march`. With traced geometry the plane
  has a size that suffices for every turn of the film in its own plane.

  Raises:
    ValueError: source within the slices, film within the volume or more than 90 degrees wide, window beside it.
  """
  xp = array_namespace(spacing, source, film, shape)
  concrete = is_concrete(spacing, source, film, shape)
  (h, w), axes = film.shape, [a for a in range(3) if a != march]
  half = [n * s / 2 for n, s in zip(volume.shape if shape is None else shape, spacing)]
  if concrete:
    _check(half, source, film, march)
  # Where rays meet the plane through the isocentre. Lines stay lines: corners bound the image.
  dtype = np.float64 if xp is np else xp.promote_types(volume.dtype, np.float32)
  met = _meet(source, film, march, xp.arange(h, dtype=dtype)[:, None], xp.arange(w, dtype=dtype))
  starts, steps, counts = [], [], []
  for axis, points, size in zip(axes, (met[a] for a in axes), _pixel_size(source, film, march, axes)):
    corners, shadow = points[::max(h - 1, 1), ::max(w - 1, 1)], _shadow(half, source, march, axis)
    low, high = xp.maximum(corners.min(), shadow[0]), xp.minimum(corners.max(), shadow[1])
    step = size / SUPERSAMPLING
    if concrete:
      if low > high:
        raise ValueError('the window misses the volume: move the film (origin_mm, steps) over the shadow of the box')
      count = math.ceil((high - low) / step) + 3
    else:
      count = math.ceil(math.hypot(h, w) * SUPERSAMPLING) + 3
      step = xp.maximum(step, (high - low) / (count - 3))
    starts.append(low - step)
    steps.append(step)
    counts.append(count)
  # The same rays on a parallel plane behind the volume, at twice the distance from the source.
  far = lambda axis, x: 2 * x - source[axis]
  origin, row_step, col_step = [0.] * 3, [0.] * 3, [0.] * 3
  origin[march], (origin[axes[0]], origin[axes[1]]) = -source[march], map(far, axes, starts)
  row_step[axes[0]], col_step[axes[1]] = (2 * step for step in steps)
  plane = Detector(tuple(counts), tuple(origin), tuple(row_step), tuple(col_step))
  image = slices.line_integrals(volume, spacing, source, plane, kind, (march, *axes), shape)
  return bilinear(image, *((met[a] - start) / step for a, start, step in zip(axes, starts, steps)))


def bilinear(image, rows, cols):
  """`image [n, m]` at coordinates `[...]` of its rows and columns; zero outside."""
  xp = array_namespace(image, rows, cols)
  i, j = (xp.floor(x).astype(int) for x in (rows, cols))
  rows, cols = (x.astype(image.dtype) for x in (rows - i, cols - j))
  total = 0
  for di, dj in itertools.product((0, 1), (0, 1)):
    inside = (i + di >= 0) & (i + di < image.shape[0]) & (j + dj >= 0) & (j + dj < image.shape[1])
    taken = image[xp.clip(i + di, 0, image.shape[0] - 1), xp.clip(j + dj, 0, image.shape[1] - 1)]
    total += (1 - abs(rows - di)) * (1 - abs(cols - dj)) * inside * taken
  return total


def _ray(source, film, row, col):
  """Vectors from the source to pixels."""
  return [film.origin_mm[a] + row * film.row_step_mm[a] + col * film.col_step_mm[a] - source[a] for a in range(3)]


def _meet(source, film, march, row, col):
  """Points of the rays of pixels in the plane through the isocentre."""
  ray = _ray(source, film, row, col)
  return [source[a] - source[march] / ray[march] * ray[a] for a in range(3)]


def _pixel_size(source, film, march, axes):
  """Width along each axis of what the central pixel covers of that plane: root of the sum of squares of its sides."""
  ray = _ray(source, film, (film.shape[0] - 1) / 2, (film.shape[1] - 1) / 2)
  xp, share = array_namespace(source, film), source[march] / ray[march]
  sides = [[share * (step[a] - step[march] / ray[march] * ray[a]) for a in axes]
           for step in (film.row_step_mm, film.col_step_mm)]
  return [xp.sqrt(down ** 2 + right ** 2) for down, right in zip(*sides)]


def _shadow(half, source, march, axis):
  """(from, to) of the volume's shadow on that plane along one axis."""
  xp = array_namespace(half, source)
  edges = [source[axis] - source[march] / (z - source[march]) * (x - source[axis])
           for z in (-half[march], half[march]) for x in (-half[axis], half[axis])]
  return xp.stack([xp.asarray(e) for e in edges]).min(), xp.stack([xp.asarray(e) for e in edges]).max()


def _check(half, source, film, march) -> None:
  slices.check_order(half[march], source, -2 * source[march], march)
  normal = np.cross(film.row_step_mm, film.col_step_mm)
  to_film = lambda point: np.dot(np.subtract(film.origin_mm, point), normal)
  corners = itertools.product(*((-h, h) for h in half))
  if not all(to_film(corner) * to_film(source) > 0 for corner in corners):
    raise ValueError(f'the film at {film.origin_mm} mm is not behind the volume: expected source and volume on one '
                     'side of it; move it away from the source')
  for row, col in itertools.product((0, film.shape[0] - 1), (0, film.shape[1] - 1)):
    if not _ray(source, film, row, col)[march] * source[march] < 0:
      raise ValueError(f'the ray to pixel [{row}, {col}] does not cross the slices of axis {march}: expected a window '
                       'less than 90 degrees wide; use fewer or smaller pixels')
