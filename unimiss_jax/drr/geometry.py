"""Source, detector and the four named views, in the patient frame.

A volume is `[S, A, R]`: index 0 grows to superior, 1 to anterior, 2 to the patient's right. Points are
`(z, y, x)` mm on those axes, the volume box is centred on 0, the isocentre. The released UniMiSS+
renderer has its source 1800 mm from the isocentre (SOD) and 2000 mm from the film (SDD); the display
conventions are those of radiology: the patient's right is on the left of the image, the head on top.
"""
import sys
from typing import NamedTuple

import numpy as np


class Detector(NamedTuple):
  """A flat film.

  Attributes:
    shape: (rows, columns), static.
    origin_mm: centre of pixel [0, 0], (z, y, x).
    row_step_mm: vector from one row to the next.
    col_step_mm: vector from one column to the next.
  """
  shape: tuple[int, int]
  origin_mm: tuple
  row_step_mm: tuple
  col_step_mm: tuple


class View(NamedTuple):
  axes: tuple[int, int, int]   # marching axis (along the beam), axis of the rows, axis of the columns
  side: int                    # on which side of the marching axis the source stands


VIEWS = {
    'axial': View((0, 1, 2), -1),     # source inferior; row 0 anterior, column 0 patient right
    'ap': View((1, 0, 2), +1),        # source anterior; row 0 superior, column 0 patient right
    'pa': View((1, 0, 2), -1),        # source posterior, shown like ap
    'lateral': View((2, 0, 1), +1),   # source on the right; row 0 superior, column 0 anterior
}


def array_namespace(*arrays):
  """jax.numpy if any of the arrays is a jax array, else numpy; never the reason that jax is imported."""
  jax = sys.modules.get('jax')
  if jax is not None and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(arrays)):
    return jax.numpy
  return np


def is_concrete(*values) -> bool:
  """Whether the numbers are known now (not traced by jit, vmap or grad)."""
  jax = sys.modules.get('jax')
  return jax is None or not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def camera(view: str, center_mm, pitch_mm, shape, sdd_mm=2000., sod_mm=1800., offset_mm=(0., 0.)):
  """Source and detector which show one window of the isocentre plane.

  Every displayed direction (down, right) runs against its patient axis, so all lengths here are in the
  directions of the display. A negative pitch mirrors the window in place. The source may be shifted
  parallel to the film; the window stays where it is on the isocentre plane.

  Args:
    view: 'axial', 'ap', 'pa' or 'lateral'.
    center_mm: (down, right), centre of the window on the isocentre plane.
    pitch_mm: (down, right), size of a pixel on the isocentre plane; its sign is the flip.
    shape: (rows, columns).
    sdd_mm: source to detector.
    sod_mm: source to isocentre.
    offset_mm: (down, right), shift of the source.

  Returns:
    (source_mm, Detector). Components that no argument can change are the Python number 0, from which
    `project` knows the axes even while the arguments are traced.
  """
  (march, *displayed), side = _view(view)
  magnification = sdd_mm / sod_mm
  source, origin, steps = [0.] * 3, [0.] * 3, ([0.] * 3, [0.] * 3)
  source[march], origin[march] = side * sod_mm, -side * (sdd_mm - sod_mm)
  for axis, n, center, pitch, offset, step in zip(displayed, shape, center_mm, pitch_mm, offset_mm, steps):
    source[axis] = -offset
    step[axis] = -pitch * magnification
    # The ray from the source through `center` on the isocentre plane meets the film here.
    on_film = -(magnification * center - (magnification - 1) * offset)
    origin[axis] = on_film - step[axis] * (n - 1) / 2
  return tuple(source), Detector(tuple(shape), tuple(origin), tuple(steps[0]), tuple(steps[1]))


def field(view: str, shape, spacing_mm, sod_mm=1800.) -> tuple[float, float]:
  """(height, width) in mm of the shadow which a volume `[D, H, W]` casts on the isocentre plane."""
  size = [n * s for n, s in zip(shape, spacing_mm)]
  march, rows, cols = _view(view).axes
  magnification = sod_mm / (sod_mm - size[march] / 2)    # of the face next to the source
  return size[rows] * magnification, size[cols] * magnification


def _view(name: str) -> View:
  if name not in VIEWS:
    raise ValueError(f'DRR view "{name}" unknown: use one of {", ".join(VIEWS)}')
  return VIEWS[name]
