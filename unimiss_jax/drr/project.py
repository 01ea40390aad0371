"""Cone-beam projection of a volume, slice by slice, without a gather in 3-D.

Where the film is parallel to the slices, a ray meets slice `k` at a point whose row coordinate depends on
the pixel's row alone, and likewise its column. So the projection is a sum of separable products,

  image = obliquity * slice distance * sum_k W_row[k] @ V[k] @ W_col[k].T,

with banded weights that follow from a few scalars (the slice form of Joseph, IEEE TMI 1982, and of the
distance-driven projector, De Man and Basu, PMB 2004). A crop, flip or zoom of the image is a choice of
film, so that each view is computed once, at its final size.
"""
import itertools

import numpy as np

from unimiss_jax.drr import bands
from unimiss_jax.drr.geometry import Detector, array_namespace, is_concrete


def project(volume, spacing_mm, source_mm, detector: Detector, kind: str = 'box'):
  """Line integrals from a point source to every pixel of a film parallel to two axes of the volume.

  Args:
    volume: `[D, H, W]`, attenuation in 1/mm, or in any unit and type (integers are cast while they are used) with
      line integrals in that unit times mm; the box is centred on 0. numpy in, numpy out; jax in, jax out.
    spacing_mm: (z, y, x) voxel size.
    source_mm: (z, y, x) of the source, outside the slices.
    detector: the film; its steps may be negative, and its rows may run along any axis.
    kind: 'box', mean over the finite pixel; 'linear', point ray through the trilinear interpolant.

  Returns:
    `[h, w]`, no unit, obliquity included: float64 for a float64 volume, else float32.
    Under jit all numbers of the geometry may be traced (one compilation for all views). Where the steps
    are traced too, components that are the Python number 0 (as `geometry.camera` gives them) fix the axes;
    from steps that are traced altogether the axes are found at run time, and a tilted film gives NaN.

  Raises:
    ValueError: spacing, shape, kind or values unusable, film tilted, source within the slices, film
      not behind the volume, window beside the volume. Traced numbers cannot be refused.
  """
  if kind not in bands.KINDS:
    raise ValueError(f'kind "{kind}" unknown: use one of {", ".join(bands.KINDS)}')
  xp = array_namespace(volume, spacing_mm, source_mm, detector)
  volume = xp.asarray(volume)
  if volume.ndim != 3 or 0 in volume.shape:
    raise ValueError(f'volume has shape {volume.shape}: expected a non-empty [D, H, W]')
  spacing = _vector('spacing_mm', spacing_mm)
  if any(is_concrete(s) and s <= 0 for s in spacing):
    raise ValueError(f'spacing_mm is {spacing}: expected three positive lengths in mm')
  source = _vector('source_mm', source_mm)
  film = Detector(detector.shape, *(_vector(f'detector.{name}', getattr(detector, name))
                                    for name in ('origin_mm', 'row_step_mm', 'col_step_mm')))
  axes = _axes(film)
  if axes is None:
    return _project_any(volume, spacing, source, film, kind)
  image = _project_along(volume, spacing, source, film, kind, axes)
  if xp is np and not np.isfinite(image).all():
    raise ValueError('the projection is not finite: the volume holds NaN or infinite values')
  return image


def _project_along(volume, spacing, source, film, kind, axes):
  """The separable form; `axes` = (marching axis, axis of the rows, axis of the columns)."""
  march, row, col = axes
  depth, nr, nc = (volume.shape[a] for a in axes)
  xp = array_namespace(spacing, source, film)
  dtype = np.float64 if xp is np else xp.promote_types(volume.dtype, np.float32)
  gap = film.origin_mm[march] - source[march]    # signed distance from source to film
  half = depth * spacing[march] / 2
  if is_concrete(spacing, source, gap):
    near, far = sorted((face - source[march]) / (gap or np.nan) for face in (-half, half))
    if not near > 0:
      raise ValueError(f'source_mm is {source}: the source is inside the volume or the film on its side; expected '
                       f'more than {half:g} mm from 0 on axis {march}, the film on the other side')
    if not far <= 1 + 1e-9:
      raise ValueError(f'the film at {film.origin_mm[march]:g} mm on axis {march} is not behind the volume: expected '
                       f'it beyond the face at {np.sign(-source[march]) * half:g} mm')
  z = (xp.arange(depth, dtype=dtype) - (depth - 1) / 2) * spacing[march]
  tau = (z - source[march]) / gap                # [K] fraction of the way to the film

  def along(axis, start, step, pixels, length):
    offset = start + xp.arange(pixels, dtype=dtype) * step - source[axis]    # [n] on the film, from the source
    coords = (source[axis] + tau[:, None] * offset) / spacing[axis] + (length - 1) / 2
    return bands.Samples(coords, tau * abs(step) / spacing[axis]), offset

  rows, dr = along(row, film.origin_mm[row], film.row_step_mm[row], film.shape[0], nr)
  cols, dc = along(col, film.origin_mm[col], film.col_step_mm[col], film.shape[1], nc)
  if xp is np and not (bands.touches(rows, nr) and bands.touches(cols, nc)):
    raise ValueError('the window misses the volume: move it or the film (origin_mm, steps) over the shadow of the box')
  contract = bands.banded if array_namespace(volume, rows, cols) is np else bands.dense
  with np.errstate(invalid='ignore', over='ignore'):    # of a volume that is refused for it afterwards
    image = contract(volume.transpose(axes), rows, cols, kind)
  length = xp.sqrt(gap ** 2 + dr[:, None] ** 2 + dc ** 2) / abs(gap) * spacing[march]    # of a ray in one slice
  return image * length.astype(image.dtype)


def _project_any(volume, spacing, source, film, kind):
  """For traced steps: all six ways to lay the film, one of which runs."""
  import jax
  import jax.numpy as jnp
  steps = abs(jnp.stack([jnp.stack([jnp.asarray(x, jnp.float32) for x in step])
                         for step in (film.row_step_mm, film.col_step_mm)]))    # [2, 3]
  row, col = jnp.argmax(steps[0]), jnp.argmax(steps[1])
  orders = list(itertools.permutations(range(3)))
  which = jnp.zeros((3, 3), int).at[tuple(zip(*(o[1:] for o in orders)))].set(jnp.arange(6))[row, col]
  branches = [lambda axes=axes: _project_along(volume, spacing, source, film, kind, axes) for axes in orders]
  parallel = (row != col) & (steps.sum(1) <= steps.max(1) * (1 + 1e-5)).all()
  return jnp.where(parallel, jax.lax.switch(which, branches), jnp.nan)


def _vector(name: str, value) -> tuple:
  """Three numbers, Python floats unless traced."""
  if value is None or len(value) != 3:
    raise ValueError(f'{name} is {value}: expected three numbers (z, y, x) in mm')
  parts = tuple(float(p) if is_concrete(p) else p for p in (value[0], value[1], value[2]))
  if any(is_concrete(p) and not np.isfinite(p) for p in parts):
    raise ValueError(f'{name} is {parts}: expected finite numbers (z, y, x) in mm')
  return parts


def _axes(film: Detector):
  """(marching axis, row axis, column axis), or None where traced steps hide them."""
  def along(step):
    largest = max((abs(p) for p in step if is_concrete(p)), default=0.)
    return [i for i, p in enumerate(step) if not is_concrete(p) or abs(p) > 1e-9 * largest]
  row, col = along(film.row_step_mm), along(film.col_step_mm)
  if len(row) == len(col) == 1 and row != col:
    return 3 - row[0] - col[0], row[0], col[0]
  if is_concrete(film.row_step_mm, film.col_step_mm):
    raise ValueError(f'the detector is tilted or degenerate (row step {film.row_step_mm}, column step '
                     f'{film.col_step_mm} mm): each step must run along one axis of the volume, and not the same; '
                     f'tilted films are not supported yet')
  return None
