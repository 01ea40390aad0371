"""Line integrals from a point source through a volume, on a film in any position.

A film parallel to two axes of the volume takes the separable form of `slices`, any other one the warp of
`tilt`. A crop, flip or zoom of the image is a choice of film, so that each view is computed once, at its
final size.
"""
import itertools

import numpy as np

from unimiss_jax.drr import bands, slices, tilt
from unimiss_jax.drr.geometry import Detector, array_namespace, is_concrete


def project(volume, spacing_mm, source_mm, detector: Detector, kind: str = 'box', shape=None, march=None):
  """Line integrals from a point source to every pixel of a flat film.

  Args:
    volume: `[D, H, W]`, attenuation in 1/mm, or in any unit and type (integers are cast while they are used) with
      line integrals in that unit times mm; the box is centred on 0. numpy in, numpy out; jax in, jax out.
    spacing_mm: (z, y, x) voxel size.
    source_mm: (z, y, x) of the source, outside the slices.
    detector: the film, in any position; its steps may be negative, and its rows may run along any axis.
    kind: 'box', mean over the finite pixel; 'linear', point ray through the trilinear interpolant; 'bspline',
      point ray through voxels which are smoothed by the cubic B-spline within their slices.
    shape: `[3]` of the part of `volume`, at the start of its axes, which is the volume; may be traced. What fills up
      the rest is not looked at. None = all of it.
    march: marching axis of a tilted film whose geometry is traced: the one along which the ray through its centre
      advances most. None = found at run time, at the cost of a form for each axis.

  Returns:
    `[h, w]`, no unit, obliquity included: float64 for a float64 volume, else float32.
    Under jit all numbers of the geometry may be traced (one compilation for all views). Where the steps
    are traced too, components that are the Python number 0 (as `geometry.camera` gives them) fix the axes;
    from steps that are traced altogether the form and its axes are found at run time.

  Raises:
    ValueError: spacing, shape, kind or values unusable, film degenerate, source within the slices, film
      not behind the volume, window beside the volume. Traced numbers cannot be refused.
  """
  if kind not in bands.KINDS:
    raise ValueError(f'kind "{kind}" unknown: use one of {", ".join(bands.KINDS)}')
  xp = array_namespace(volume, spacing_mm, source_mm, detector, shape)
  volume = xp.asarray(volume)
  if volume.ndim != 3 or 0 in volume.shape:
    raise ValueError(f'volume has shape {volume.shape}: expected a non-empty [D, H, W]')
  spacing = _vector('spacing_mm', spacing_mm)
  if any(is_concrete(s) and s <= 0 for s in spacing):
    raise ValueError(f'spacing_mm is {spacing}: expected three positive lengths in mm')
  source = _vector('source_mm', source_mm)
  film = Detector(detector.shape, *(_vector(f'detector.{name}', getattr(detector, name))
                                    for name in ('origin_mm', 'row_step_mm', 'col_step_mm')))
  if shape is not None:
    volume, shape = _part(volume, shape)
  axes = _axes(film)
  if axes is not None:
    image = slices.line_integrals(volume, spacing, source, film, kind, axes, shape)
  elif march is not None and not is_concrete(spacing, source, film, shape):
    image = tilt.shear_warp(volume, spacing, source, film, kind, march, shape)
  elif is_concrete(spacing, source, film):
    image = tilt.shear_warp(volume, spacing, source, film, kind, int(tilt.marching_axis(source, film)), shape)
  else:
    return _project_any(volume, spacing, source, film, kind, shape)
  if xp is np and not np.isfinite(image).all():
    raise ValueError('the projection is not finite: the volume holds NaN or infinite values')
  return image


def _project_any(volume, spacing, source, film, kind, shape):
  """For traced steps: all ways to lay the film, one of which runs."""
  import jax
  import jax.numpy as jnp
  steps = abs(jnp.stack([jnp.stack([jnp.asarray(x, jnp.float32) for x in step])
                         for step in (film.row_step_mm, film.col_step_mm)]))    # [2, 3]
  row, col = jnp.argmax(steps[0]), jnp.argmax(steps[1])
  orders = list(itertools.permutations(range(3)))
  which = jnp.zeros((3, 3), int).at[tuple(zip(*(o[1:] for o in orders)))].set(jnp.arange(6))[row, col]
  parallel = (row != col) & (steps.sum(1) <= steps.max(1) * (1 + 1e-5)).all()
  which = jnp.where(parallel, which, 6 + tilt.marching_axis(source, film))
  args = volume, spacing, source, film, kind
  return jax.lax.switch(which, [lambda axes=axes: slices.line_integrals(*args, axes, shape) for axes in orders] +
                        [lambda march=march: tilt.shear_warp(*args, march, shape) for march in range(3)])


def _part(volume, shape):
  """(volume, None) cut to its part, or (with zeros beyond the part, shape) where that is of jax."""
  xp = array_namespace(volume, shape)
  if xp is np:
    return volume[tuple(map(slice, shape))], None
  d, h, w = (xp.arange(n) < m for n, m in zip(volume.shape, shape))
  return xp.where(d[:, None, None] & h[:, None] & w, volume, 0), shape


def _vector(name: str, value) -> tuple:
  """Three numbers, Python floats unless traced."""
  if value is None or len(value) != 3:
    raise ValueError(f'{name} is {value}: expected three numbers (z, y, x) in mm')
  parts = tuple(float(p) if is_concrete(p) else p for p in (value[0], value[1], value[2]))
  if any(is_concrete(p) and not np.isfinite(p) for p in parts):
    raise ValueError(f'{name} is {parts}: expected finite numbers (z, y, x) in mm')
  return parts


def _axes(film: Detector):
  """(marching axis, row axis, column axis) of a film known to be parallel to the slices, else None."""
  if is_concrete(film.row_step_mm, film.col_step_mm):
    steps = np.array([film.row_step_mm, film.col_step_mm])
    if np.linalg.norm(np.cross(*steps)) <= 1e-9 * np.prod(np.linalg.norm(steps, axis=1)):
      raise ValueError(f'the detector is degenerate (row step {film.row_step_mm}, column step {film.col_step_mm} mm): '
                       'expected two directions')

  def along(step):
    largest = max((abs(p) for p in step if is_concrete(p)), default=0.)
    return [i for i, p in enumerate(step) if not is_concrete(p) or abs(p) > 1e-9 * largest]
  row, col = along(film.row_step_mm), along(film.col_step_mm)
  return (3 - row[0] - col[0], row[0], col[0]) if len(row) == len(col) == 1 and row != col else None
