"""Cone-beam projection on a film parallel to the slices of a volume, without a gather in 3-D.

There a ray meets slice `k` at a point whose row coordinate depends on the pixel's row alone, and likewise
its column. So the projection is a sum of separable products,

  image = obliquity * slice distance * sum_k W_row[k] @ V[k] @ W_col[k].T,

with banded weights that follow from a few scalars (the slice form of Joseph, IEEE TMI 1982, and of the
distance-driven projector, De Man and Basu, PMB 2004).
"""
import functools
from typing import NamedTuple

import numpy as np

from unimiss_jax.drr import bands
from unimiss_jax.drr.geometry import array_namespace, is_concrete


class Sampling(NamedTuple):
  """How a film parallel to the slices sees them."""
  rows: bands.Samples
  cols: bands.Samples
  obliquity: object    # [h, w] length of a ray within one unit along the marching axis


def line_integrals(volume, spacing, source, film, kind: str, axes, shape=None):
  """The separable form.

  Args:
    volume: `[D, H, W]`, any number type.
    spacing, source: tuples of three numbers.
    film: Detector of such tuples, parallel to the slices.
    kind: one of bands.KINDS.
    axes: (marching axis, axis of the rows, axis of the columns).
    shape: jax only: of the part of the volume, at the start of its axes, which counts; the rest must be zero.

  Returns:
    `[h, w]` float64 for a float64 volume, else float32.

  Raises:
    ValueError: source within the slices, film not behind the volume, window beside the volume.
  """
  shape = volume.shape if shape is None else shape
  xp = array_namespace(spacing, source, film, shape)
  dtype = np.float64 if xp is np else xp.promote_types(volume.dtype, np.float32)
  rows, cols, obliquity = sampling(shape, spacing, source, film, axes, dtype, volume.shape[axes[0]])
  lengths = tuple(shape[a] for a in axes[1:])
  if xp is np and not all(bands.touches(samples, length) for samples, length in zip((rows, cols), lengths)):
    raise ValueError('the window misses the volume: move it or the film (origin_mm, steps) over the shadow of the box')
  on_host = array_namespace(volume, rows, cols) is np
  contract = bands.banded if on_host else functools.partial(bands.dense, lengths=lengths)
  with np.errstate(invalid='ignore', over='ignore'):    # of a volume that is refused for it afterwards
    image = contract(volume.transpose(axes), rows, cols, kind)
  return image * (obliquity * spacing[axes[0]]).astype(image.dtype)


def sampling(shape, spacing, source, film, axes, dtype=np.float64, count=None) -> Sampling:
  """Voxel coordinates of all pixels in all slices, or in `count`, which go on as copies of the last one; args and
  errors as `line_integrals`."""
  march, *displayed = axes
  xp = array_namespace(spacing, source, film, shape)
  gap = film.origin_mm[march] - source[march]    # signed distance from source to film
  if is_concrete(spacing, source, gap, shape):
    check_order(shape[march] * spacing[march] / 2, source, gap, march)
  at = xp.minimum(xp.arange(count or shape[march], dtype=dtype), shape[march] - 1)
  z = (at - (shape[march] - 1) / 2) * spacing[march]
  tau = (z - source[march]) / gap                # [K] fraction of the way to the film
  samples, offsets = [], []
  for axis, step, pixels in zip(displayed, (film.row_step_mm, film.col_step_mm), film.shape):
    offset = film.origin_mm[axis] + xp.arange(pixels, dtype=dtype) * step[axis] - source[axis]    # [n] on the film
    coords = (source[axis] + tau[:, None] * offset) / spacing[axis] + (shape[axis] - 1) / 2
    samples.append(bands.Samples(coords, tau * abs(step[axis]) / spacing[axis]))
    offsets.append(offset)
  obliquity = xp.sqrt(gap ** 2 + offsets[0][:, None] ** 2 + offsets[1] ** 2) / abs(gap)
  return Sampling(*samples, obliquity)


def check_order(half, source, gap, march) -> None:
  """Source, volume (-half .. half on the marching axis) and film (`gap` from the source) come in this order.

  Raises:
    ValueError: they do not.
  """
  near, far = sorted((face - source[march]) / (gap or np.nan) for face in (-half, half))
  if not near > 0:
    raise ValueError(f'source_mm is {source}: the source is inside the volume or the film on its side; expected '
                     f'more than {half:g} mm from 0 on axis {march}, the film on the other side')
  if not far <= 1 + 1e-9:
    raise ValueError(f'the film at {source[march] + gap:g} mm on axis {march} is not behind the volume: expected '
                     f'it beyond the face at {np.sign(-source[march]) * half:g} mm')
