"""The linear part of a view, one axis at a time: crop + flip + resize, and Gaussian blur, as small matrices.

Half-pixel centres throughout. `bicubic` (a = -1/2) widens with the reduction, as Pillow does; `linear`
does not (torch `align_corners=False`); `area` is the exact mean over the output pixel.
"""
import functools

import numpy as np

from unimiss_jax.drr.geometry import array_namespace

STRIP = 16    # outputs that share one run of columns of a banded matrix; smaller products cost more than they save


def resize(kind: str, start, size, length: int, out: int, flip=False):
  """Matrix `[out, length]` which shows the box start .. start + size of an axis as `out` samples.

  Args:
    kind: 'linear', 'area' or 'bicubic'.
    start, size: in samples of the axis; may reach beyond it (those columns are missing: the rest counts
      as zero) and, for 'linear' and 'area', may be fractions.
    length: number of samples of the axis.
    out: number of samples of the view.
    flip: whether the view is mirrored.

  Raises:
    ValueError: unknown kind.
  """
  xp = array_namespace(start, size, flip)
  start, size = xp.asarray(start, np.float32), xp.asarray(size, np.float32)
  step = size / np.float32(out)
  center = (xp.arange(out, dtype=np.float32) + .5) * step    # [out] from the start of the box
  center = xp.where(flip, size - center, center)[:, None]
  sample = xp.arange(length, dtype=np.float32) + (np.float32(.5) - start)    # centres of the samples, likewise
  if kind == 'linear':    # beyond the outermost centres of the box their values are held
    return xp.maximum(1 - xp.abs(xp.clip(center, .5, size - .5) - sample), 0)
  if kind == 'area':
    return xp.clip((step + 1) / 2 - xp.abs(center - sample), 0, xp.minimum(step, 1)) / step
  if kind == 'bicubic':
    t = xp.abs(center - sample) / xp.maximum(step, 1)
    matrix = xp.where(t < 1, (1.5 * t - 2.5) * t * t + 1, xp.where(t < 2, ((2.5 - .5 * t) * t - 4) * t + 2, 0))
    matrix = xp.where((sample > 0) & (sample < size), matrix, 0)
    return matrix / matrix.sum(1, keepdims=True)
  raise ValueError(f'resize "{kind}" unknown: use linear, area or bicubic')


def nearest(start, size, length: int, out: int, flip=False) -> np.ndarray:
  """Index `[out]` of the sample in which the centre of each output of `resize` lies, -1 beyond the axis; for labels."""
  center = (np.arange(out) + .5) * (size / out)
  at = np.floor(start + (size - center if flip else center)).astype(int)
  return np.where((at >= 0) & (at < length), at, -1)


def blur(sigma, length: int, radius: int, edge: str, truncate: float = np.inf):
  """Matrices `[n, length, length]` of normalised Gaussian filters.

  Args:
    sigma: `[n]` in samples; 0 gives the identity.
    length: number of samples of the axis.
    radius: of the longest filter.
    edge: 'half' mirrors about the edge of the outermost sample (scipy `reflect`), 'whole' about its
      centre (torch `reflect`).
    truncate: filters end at truncate * sigma, rounded.
  """
  xp = array_namespace(sigma)
  offset = np.abs(np.arange(-radius, radius + 1, dtype=np.float32))
  sigma = sigma[:, None]
  taps = xp.exp(-.5 * (offset / xp.maximum(sigma, 1e-3)) ** 2)    # [n, 2 radius + 1]
  taps = xp.where(offset <= xp.floor(truncate * sigma + .5), taps, 0) if np.isfinite(truncate) else taps
  taps = taps / taps.sum(1, keepdims=True)
  return (taps @ _shifts(length, radius, edge)).reshape(-1, length, length)


def left(matrix, x):
  """`matrix @ x` for a banded matrix `[..., n, m]` and `[..., m, k]`; numpy skips what is all zero."""
  xp = array_namespace(matrix, x)
  if xp is not np:
    return xp.matmul(matrix, x)
  n = matrix.shape[-2]
  y = np.empty((*x.shape[:-2], n, x.shape[-1]), np.result_type(matrix, x))
  for start in range(0, n, STRIP):
    strip = matrix[..., start:start + STRIP, :]
    used = np.flatnonzero(strip.any(tuple(range(strip.ndim - 1))))
    run = slice(used[0], used[-1] + 1) if len(used) else slice(0)
    np.matmul(strip[..., run], x[..., run, :], out=y[..., start:start + STRIP, :])
  return y


def right(x, matrix):
  """`x @ matrix.T` for a banded matrix `[n, m]` and `[..., m]`; numpy skips what is all zero."""
  xp = array_namespace(x, matrix)
  if xp is not np:
    return xp.matmul(x, matrix.T)
  y = np.empty((*x.shape[:-1], len(matrix)), np.result_type(matrix, x))
  columns = np.ascontiguousarray(matrix.T)
  for start in range(0, len(matrix), STRIP):
    strip = columns[:, start:start + STRIP]
    used = np.flatnonzero(strip.any(1))
    run = slice(used[0], used[-1] + 1) if len(used) else slice(0)
    np.matmul(x[..., run], strip[run], out=y[..., start:start + STRIP])
  return y


@functools.lru_cache(maxsize=16)
def _shifts(length: int, radius: int, edge: str):
  """`[2 radius + 1, length * length]`: row t shifts by t - radius, with mirrored edges."""
  period = 2 * length if edge == 'half' else max(2 * length - 2, 1)
  offset = np.arange(-radius, radius + 1)[:, None]
  source = (np.arange(length) + offset) % period
  source = np.minimum(source, period - source - (edge == 'half'))
  return (source[..., None] == np.arange(length)).reshape(2 * radius + 1, -1).astype(np.float32)
