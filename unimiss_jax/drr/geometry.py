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


def camera(view: str, center_mm, pitch_mm, shape, sdd_mm=2000., sod_mm=1800., offset_mm=(0., 0.),
           tilt_deg=(0., 0., 0.)):
  """Source and detector which show one window of the isocentre plane.

  Every displayed direction (down, right) runs against its patient axis, so all lengths here are in the
  directions of the display. A negative pitch mirrors the window in place. The source may be shifted
  parallel to the film; the window stays where it is on the isocentre plane. Tilt turns source and film
  about the centre of the window, so that the view keeps its subject.

  Args:
    view: 'axial', 'ap', 'pa' or 'lateral'.
    center_mm: (down, right), centre of the window on the isocentre plane.
    pitch_mm: (down, right), size of a pixel on the isocentre plane; its sign is the flip.
    shape: (rows, columns).
    sdd_mm: source to detector.
    sod_mm: source to isocentre.
    offset_mm: (down, right), shift of the source.
    tilt_deg: (yaw, pitch, roll), see `rotation`.

  Returns:
    (source_mm, Detector). Without tilt, components that no argument can change are the Python number 0,
    from which `project` knows the axes even while the arguments are traced.
  """
  (march, *displayed), side = _view(view)
  magnification = sdd_mm / sod_mm
  # The ray from the source through `center` on the isocentre plane meets the film at `on_film`.
  on_film = [magnification * c - (magnification - 1) * o for c, o in zip(center_mm, offset_mm)]
  step = [p * magnification for p in pitch_mm]
  corner = [c - s * (n - 1) / 2 for c, s, n in zip(on_film, step, shape)]
  # Along the beam, down, right:
  points, steps = [(-sod_mm, *offset_mm), (sdd_mm - sod_mm, *corner)], [(0., step[0], 0.), (0., 0., step[1])]
  if not (is_concrete(tilt_deg) and all(angle == 0 for angle in tilt_deg)):
    matrix, pivot = rotation(*tilt_deg), (0., *center_mm)
    turn = lambda vector: [sum(m * v for m, v in zip(row, vector)) for row in matrix]
    points = [[p + x for p, x in zip(pivot, turn([x - p for p, x in zip(pivot, point)]))] for point in points]
    steps = [turn(vector) for vector in steps]
  signs = dict(zip((march, *displayed), (-side, -1, -1)))
  order = sorted(range(3), key=(march, *displayed).__getitem__)
  source, *film = (tuple(signs[axis] * v[i] for axis, i in enumerate(order)) for v in (*points, *steps))
  return source, Detector(tuple(shape), *film)


def rotation(yaw, pitch, roll):
  """Rows of the matrix yaw @ pitch @ roll on vectors (along the beam, down, right), angles in degrees.

  Yaw turns the beam to the right, pitch turns it down, and roll, which comes first, turns the film in its
  plane, down to right.
  """
  xp = array_namespace(yaw, pitch, roll)
  (cy, sy), (cp, sp), (cr, sr) = ((xp.cos(a), xp.sin(a)) for a in (xp.deg2rad(angle) for angle in (yaw, pitch, roll)))
  return ((cy * cp, -cy * sp * cr - sy * sr, cy * sp * sr - sy * cr),
          (sp, cp * cr, -cp * sr),
          (sy * cp, -sy * sp * cr + cy * sr, sy * sp * sr + cy * cr))


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
