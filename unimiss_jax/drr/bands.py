"""Sums over slices of `W_row[k] @ V[k] @ W_col[k].T` with banded sampling weights, in numpy and in jax.

Row `o` of a weight matrix holds what each voxel `j` gives to output `o`, which lies at voxel coordinate
`c` and is `f` voxels wide: `box` is the mean over a finite pixel (distance-driven projection, De Man and
Basu 2004), `linear` the interpolation at a point (Joseph 1982), `bspline` that with the cubic B-spline on
the voxels as they are, which smooths them (the released UniMiSS+ renderer).
"""
from typing import NamedTuple

import numpy as np

from unimiss_jax.drr.geometry import array_namespace

KINDS = ('box', 'linear', 'bspline')
STRIP = 8            # outputs that share one run of voxels: fewer waste less work, more make larger matrix products
CHUNK = 2 ** 22      # dense weights which the jax form holds at once


class Samples(NamedTuple):
  """Where the outputs of one image axis lie on one volume axis, slice by slice."""
  coords: object       # [K, n] voxel coordinates; voxel j covers j - 1/2 .. j + 1/2
  footprint: object    # [K] width of an output in voxels


class Strips(NamedTuple):
  """The outputs of one axis in groups of STRIP, each with a run of voxels that it cannot reach beyond."""
  coords: np.ndarray       # [K, S, STRIP], the last group filled up with copies of the last output
  first: np.ndarray        # [S] first voxel of the run
  count: int               # voxels of a run


def weights(kind: str, c, f, first, j, length: int, dtype):
  """Weight of voxel `first + j` of an axis of `length` voxels for the output at `c` which is `f` wide.

  The arrays broadcast against each other, in whatever layout the caller wants; coordinates are made
  small, relative to `first`, before they are cast to `dtype`. Beyond the axis everything is zero: the
  weights of an output sum to the share of it that lies inside.
  """
  xp = array_namespace(c, f)
  if kind == 'box':    # overlap of two intervals of length f and 1 at distance |c - j|, divided by f
    inverse = 1 / f
    x = ((c - first) * inverse).astype(dtype) - (j * inverse).astype(dtype)
    inverse = inverse.astype(dtype)
    to = {'out': x} if xp is np else {}    # in place where arrays allow it
    x = xp.subtract((1 + inverse) / 2, xp.abs(x, **to), **to)
    return xp.minimum(xp.maximum(x, 0, **to), xp.minimum(inverse, 1), **to)
  inside = (c >= -.5) & (c <= length - .5)    # within half a voxel of the axis its outermost voxels continue
  if kind == 'linear':
    held = xp.clip(c, 0, length - 1) - first
    return xp.maximum(1 - xp.abs(held.astype(dtype) - j.astype(dtype)), 0) * inside
  x = (c - first).astype(dtype) - j.astype(dtype)
  below, above = (first + j == 0) * inside, (first + j == length - 1) * inside
  return (cubic(x) * inside + (cubic(x + 1) + cubic(x + 2)) * below + (cubic(x - 1) + cubic(x - 2)) * above)


def cubic(x):
  """Cubic B-spline, support -2 .. 2."""
  xp = array_namespace(x)
  return (xp.maximum(2 - xp.abs(x), 0) ** 3 - 4 * xp.maximum(1 - xp.abs(x), 0) ** 3) / 6


def touches(samples: Samples, length: int) -> bool:
  """Whether any output overlaps the axis in any slice."""
  ends, half = samples.coords[:, [0, -1]], samples.footprint / 2
  return bool(np.any((ends.max(1) + half > -.5) & (ends.min(1) - half < length - .5)))


def banded(volume, rows: Samples, cols: Samples, kind: str):
  """numpy form: strips of outputs against the runs of voxels which they see, in few matrix products.

  Args:
    volume: `[K, nr, nc]`, any strides.
    rows, cols: samples in float64.
    kind: one of KINDS.

  Returns:
    `[h, w]` float64 for a float64 volume, else float32.
  """
  dtype = np.float64 if volume.dtype == np.float64 else np.float32
  (depth, nr, nc), h, w = volume.shape, rows.coords.shape[1], cols.coords.shape[1]
  row, col = _strips(rows, nr, kind), _strips(cols, nc, kind)
  (j0, j1), (i0, i1) = ((s.first.min(), s.first.max() + s.count) for s in (row, col))
  rows_first, cols_first = h * (row.count * (i1 - i0) + w * col.count), w * (col.count * (j1 - j0) + h * row.count)
  if rows_first > 2 * cols_first:    # not for less: the strided rows of an image cost as much again
    return banded(volume.transpose(0, 2, 1), cols, rows, kind).T
  volume = volume[:, j0:j1, i0:i1]
  if volume.itemsize not in volume.strides[1:]:    # neither axis of a slice is contiguous: products would crawl
    volume = np.ascontiguousarray(volume)
  volume = volume.transpose(0, 2, 1)                                     # [K, nc, nr]
  voxel = np.arange(row.count)
  bands = weights(kind, row.coords[..., None], rows.footprint[:, None, None, None], row.first[:, None, None],
                  voxel, nr, dtype)                                      # [K, S, STRIP, voxel]
  half = np.empty((i1 - i0, depth, bands.shape[1] * STRIP), dtype)       # [nc, K, h]
  for s, lo in enumerate(row.first - j0):
    seen = volume[..., lo:lo + row.count].astype(dtype, copy=False)      # cast in the cache
    out = half[..., s * STRIP:(s + 1) * STRIP].transpose(1, 0, 2)
    np.matmul(seen, bands[:, s].transpose(0, 2, 1), out=out)
  voxel = np.arange(col.count)[:, None]
  bands = weights(kind, col.coords.transpose(1, 2, 0)[:, :, None], cols.footprint, col.first[:, None, None, None],
                  voxel, nc, dtype)                                      # [S, STRIP, voxel, K]
  bands = bands.reshape(-1, STRIP, col.count * depth)
  image = np.empty((bands.shape[0], STRIP, half.shape[2]), dtype)        # [w, h]
  for s, lo in enumerate(col.first - i0):    # voxels and slices are summed in one product
    np.matmul(bands[s], half[lo:lo + col.count].reshape(col.count * depth, -1), out=image[s])
  return image.reshape(-1, half.shape[2])[:w, :h].T


def dense(volume, rows: Samples, cols: Samples, kind: str, lengths=None):
  """jax form of the same sum: a scan over chunks of slices which builds its weights inside.

  Args and result as `banded`; `CHUNK` bounds the memory of the weights. Products of bfloat16 volumes
  accumulate in float32. `lengths`: voxels of the two axes which count, where zeros fill them up; may be traced.
  """
  import jax
  import jax.numpy as jnp
  (depth, nr, nc), h, w = volume.shape, rows.coords.shape[1], cols.coords.shape[1]
  wide = jnp.float64 if volume.dtype == jnp.float64 else jnp.float32
  narrow = volume.dtype if jnp.issubdtype(volume.dtype, jnp.floating) else wide
  rows_first = h * nr * nc + h * nc * w <= nr * nc * w + h * nr * w
  size = max(1, min(depth, CHUNK // (h * nr + w * nc)))
  chunks = -(-depth // size)

  def split(x, mode):    # [K, ...] -> [chunks, size, ...]; the slices that fill up are empty
    x = jnp.pad(jnp.asarray(x), [(0, chunks * size - depth)] + [(0, 0)] * (x.ndim - 1), mode=mode)
    return x.reshape(chunks, size, *x.shape[1:])

  def add(image, chunk):
    slices, *samples = chunk
    w_row, w_col = (weights(kind, s.coords[..., None], s.footprint[:, None, None], 0, jnp.arange(n), length, wide)
                    for s, n, length in zip(samples, (nr, nc), lengths or (nr, nc)))
    einsum = lambda *args: jnp.einsum(*args, precision='highest', preferred_element_type=wide)
    if rows_first:
      half = einsum('khj,kji->khi', w_row.astype(narrow), slices.astype(narrow))
      return image + einsum('khi,kwi->hw', half, w_col), None
    half = einsum('kwi,kji->kjw', w_col.astype(narrow), slices.astype(narrow))
    return image + einsum('khj,kjw->hw', w_row, half), None

  stack = (split(volume, 'constant'), *(Samples(*(split(x, 'edge') for x in s)) for s in (rows, cols)))
  return jax.lax.scan(add, jnp.zeros((h, w), wide), stack)[0]


def _strips(samples: Samples, length: int, kind: str) -> Strips:
  fill = -samples.coords.shape[1] % STRIP
  coords = np.pad(samples.coords, ((0, 0), (0, fill)), mode='edge') if fill else samples.coords
  coords = coords.reshape(len(coords), -1, STRIP)
  outer = coords[[0, -1]]    # coordinates are linear in the slice and in the output
  reach = {'box': samples.footprint.max() / 2 + .5, 'linear': 1, 'bspline': 2}[kind]
  first, end = np.floor(outer.min((0, 2)) - reach) + 1, np.ceil(outer.max((0, 2)) + reach)
  first, end = (np.clip(x, 0, length).astype(int) for x in (first, end))
  count = max(1, (end - first).max())
  return Strips(coords, np.minimum(first, length - count), count)
