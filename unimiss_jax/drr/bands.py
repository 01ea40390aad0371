"""Sums over slices of `W_row[k] @ V[k] @ W_col[k].T` with banded sampling weights, in numpy and in jax.

Row `o` of a weight matrix holds what each voxel `j` gives to output `o`, which lies at voxel coordinate
`c` and is `f` voxels wide: `box` is the mean over a finite pixel (distance-driven projection, De Man and
Basu 2004), `linear` the interpolation at a point (Joseph 1982).
"""
from typing import NamedTuple

import numpy as np

from unimiss_jax.drr.geometry import array_namespace

KINDS = ('box', 'linear')
STRIP = 8            # outputs that share one run of voxels: fewer waste less work, more make larger matrix products
CHUNK = 2 ** 22      # dense weights which the jax form holds at once


class Samples(NamedTuple):
  """Where the outputs of one image axis lie on one volume axis, slice by slice."""
  coords: object       # [K, n] voxel coordinates; voxel j covers j - 1/2 .. j + 1/2
  footprint: object    # [K] width of an output in voxels


def weights(kind: str, samples: Samples, first: int, count: int, length: int, dtype):
  """Dense weights `[K, n, count]` of the voxels first .. first + count - 1 of an axis of `length` voxels.

  Beyond the axis everything is zero: a row sums to the share of its output that lies inside.
  """
  xp = array_namespace(*samples)
  c = (samples.coords - first).astype(dtype)[..., None]    # small numbers before float32
  j = xp.arange(count, dtype=dtype)
  if kind == 'box':    # overlap of two intervals of length f and 1 at distance |c - j|, divided by f
    inverse = (1 / samples.footprint).astype(dtype)[:, None, None]
    overlap = (1 + inverse) / 2 - xp.abs(c * inverse - j * inverse)
    return xp.clip(overlap, 0, xp.minimum(inverse, 1))
  low, high = -first, length - 1 - first
  hat = xp.maximum(1 - xp.abs(xp.clip(c, low, high) - j), 0)    # edge clamp within half a voxel
  return xp.where((c >= low - .5) & (c <= high + .5), hat, 0)


def touches(samples: Samples, length: int) -> bool:
  """Whether any output overlaps the axis in any slice."""
  half = samples.footprint[:, None] / 2
  return bool(np.any((samples.coords + half > -.5) & (samples.coords - half < length - .5)))


def contract_numpy(volume, rows: Samples, cols: Samples, kind: str):
  """Banded form: a strip of outputs against the run of voxels which it sees, one matrix product per slice.

  Args:
    volume: `[K, nr, nc]`, any strides.
    rows, cols: samples in float64.
    kind: 'box' or 'linear'.

  Returns:
    `[h, w]` float64 for a float64 volume, else float32.
  """
  dtype = np.float64 if volume.dtype == np.float64 else np.float32
  (_, nr, nc), h, w = volume.shape, rows.coords.shape[1], cols.coords.shape[1]
  row_strips, col_strips = _strips(rows, nr), _strips(cols, nc)
  if not row_strips or not col_strips:
    return np.zeros((h, w), dtype)
  row_band, (j0, j1) = _extent(row_strips)
  col_band, (i0, i1) = _extent(col_strips)
  if row_band * (i1 - i0) + col_band * h > col_band * (j1 - j0) + row_band * w:    # columns first is less work
    return contract_numpy(volume.transpose(0, 2, 1), cols, rows, kind).T
  volume = _for_blas(volume[:, j0:j1, i0:i1], dtype)
  half = np.zeros((h, len(volume), i1 - i0), dtype)    # [h, K, nc]
  for outputs, lo, hi in row_strips:
    band = weights(kind, _part(rows, outputs), lo, hi - lo, nr, dtype)
    np.matmul(band, volume[:, lo - j0:hi - j0], out=half[outputs].transpose(1, 0, 2))
  image = np.zeros((w, h), dtype)
  for outputs, lo, hi in col_strips:
    band = weights(kind, _part(cols, outputs), lo, hi - lo, nc, dtype)
    band = band.transpose(1, 0, 2).reshape(band.shape[1], -1)    # slices and voxels are summed in one product
    image[outputs] = band @ half[:, :, lo - i0:hi - i0].reshape(h, -1).T
  return image.T


def contract_jax(volume, rows: Samples, cols: Samples, kind: str):
  """Dense form of the same sum: a scan over chunks of slices which builds its weights inside.

  Args and result as `contract_numpy`; `CHUNK` bounds the memory of the weights. Products of bfloat16
  volumes accumulate in float32.
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
    slices, rows, cols = chunk
    w_row, w_col = weights(kind, rows, 0, nr, nr, wide), weights(kind, cols, 0, nc, nc, wide)
    einsum = lambda *args: jnp.einsum(*args, precision='highest', preferred_element_type=wide)
    if rows_first:
      half = einsum('khj,kji->khi', w_row.astype(narrow), slices.astype(narrow))
      return image + einsum('khi,kwi->hw', half, w_col), None
    half = einsum('kwi,kji->kjw', w_col.astype(narrow), slices.astype(narrow))
    return image + einsum('khj,kjw->hw', w_row, half), None

  stack = (split(volume, 'constant'), *(Samples(*(split(x, 'edge') for x in s)) for s in (rows, cols)))
  return jax.lax.scan(add, jnp.zeros((h, w), wide), stack)[0]


def _strips(samples: Samples, length: int) -> list[tuple[slice, int, int]]:
  """[(outputs, first voxel, end)]: short runs of outputs with all voxels that they may touch in any slice."""
  reach = np.maximum(samples.footprint / 2 + .5, 1.)[:, None]
  lowest = np.floor((samples.coords - reach).min(0))
  highest = np.ceil((samples.coords + reach).max(0)) + 1
  strips = []
  for start in range(0, len(lowest), STRIP):
    outputs = slice(start, start + STRIP)
    lo, hi = max(0, int(lowest[outputs].min())), min(length, int(highest[outputs].max()))
    if lo < hi:
      strips.append((outputs, lo, hi))
  return strips


def _extent(strips) -> tuple[int, tuple[int, int]]:
  """(area of the band, (first voxel, end) of all strips)."""
  area = sum(STRIP * (hi - lo) for _, lo, hi in strips)
  return area, (min(lo for _, lo, _ in strips), max(hi for _, _, hi in strips))


def _part(samples: Samples, outputs: slice) -> Samples:
  return Samples(samples.coords[:, outputs], samples.footprint)


def _for_blas(volume, dtype):
  """Casts, and copies where neither axis of a slice is contiguous: matrix products would crawl."""
  if volume.dtype != dtype or volume.itemsize not in volume.strides[1:]:
    return np.ascontiguousarray(volume, dtype)
  return volume
