"""Where a patient lies in the scanner: voxel grid, pose, and painting with soft edges.

Anatomy is described in patient millimetres (z superior, y anterior, x to the patient's right, 0 = mid chest). The
pose (scale, shift, axial roll, coronal shear) is the inverse map from voxels to these coordinates, so nothing is ever
resampled. Edges are the clipped signed distance over one voxel: partial volume as a scanner has it. Chosen by us.
"""
import itertools
from typing import NamedTuple

import numpy as np

SHAPE = (48, 112, 112)                # [D, H, W] = [S, A, R]
SPACING_MM = (6.5, 3.4, 3.4)
EDGE_MM = (6.5, 3.4, 3.4)             # width of a soft edge across z, y, x: one voxel


class Frame(NamedTuple):
  """Voxel coordinates in patient mm, and the pose that they come from.

  The roll is about z and the shear moves x only, so y does not depend on the slice.
  """
  z: np.ndarray                       # [D, 1, 1] mm
  y: np.ndarray                       # [1, H, W] mm
  x: np.ndarray                       # [D, H, W] mm
  to_index: np.ndarray                # [3, 4]: patient (z, y, x, 1) -> voxel indices (z, y, x)

  def index(self, points) -> np.ndarray:
    """Patient mm `[..., 3]` as (z, y, x) -> voxel indices `[..., 3]`, not rounded."""
    return np.asarray(points) @ self.to_index[:, :3].T + self.to_index[:, 3]

  def box(self, low, high) -> tuple[slice, slice, slice]:
    """The voxels around the patient-mm box from `low` to `high` (z, y, x); may be empty."""
    corners = self.index(list(itertools.product(*zip(low, high))))
    first = np.clip(np.floor(corners.min(0)), 0, SHAPE).astype(int)
    last = np.clip(np.ceil(corners.max(0)) + 1, 0, SHAPE).astype(int)
    return tuple(slice(a, max(a, b)) for a, b in zip(first, last))

  def crop(self, box):
    """(z, y, x) of the voxels of a box, broadcastable."""
    return self.z[box[0]], self.y[:, box[1], box[2]], self.x[box]


def place(rng) -> Frame:
  """Draws a pose: scale U(.86, 1.06), shift +-16/12/14 mm, roll +-8 degrees, coronal shear +-.08."""
  scale = rng.uniform(.86, 1.06)
  shift = rng.uniform(-1, 1, 3) * (16., 12., 14.)
  roll, shear = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(-.08, .08)
  cos, sin = np.cos(roll), np.sin(roll)
  # patient -> scanner: (z, y, x) -> x + shear z, then the roll, then scale and shift
  pose = scale * np.array([[1, 0, 0], [sin * shear, cos, sin], [cos * shear, -sin, cos]])
  spacing, centre = np.array(SPACING_MM), (np.array(SHAPE) - 1) / 2
  to_index = np.concatenate([pose / spacing[:, None], (shift / spacing + centre)[:, None]], 1)
  axes = [((np.arange(n) - c) * s - t) / scale for n, c, s, t in zip(SHAPE, centre, spacing, shift)]
  z, y, x = (a.astype(np.float32) for a in axes)
  rolled_y = cos * y[:, None] - sin * x[None]
  rolled_x = sin * y[:, None] + cos * x[None]
  z = z[:, None, None]
  to32 = lambda a: a.astype(np.float32)
  return Frame(z, to32(rolled_y)[None], to32(rolled_x)[None] - np.float32(shear) * z, to_index)


class Canvas(NamedTuple):
  """What is painted on: HU, the label map, and the share of each voxel that is air-filled lung."""
  frame: Frame
  hu: np.ndarray                      # [D, H, W] float32
  organs: np.ndarray                  # [D, H, W] uint8
  lung: np.ndarray                    # [D, H, W] float32 in [0, 1]

  def paint(self, box, cover, value, organ=None):
    """Blends `value` in with weight `cover` `[box]`; whatever is painted takes its room from the lung."""
    hu = self.hu[box]
    hu += cover * (np.float32(value) - hu)
    self.lung[box] *= 1 - cover
    if organ is not None:
      self.organs[box][cover > .5] = organ

  def ellipsoid(self, centre, radii, value, organ=None, axes=None):
    """An ellipsoid with rows of `axes` `[3, 3]` (z, y, x unit vectors) along `radii`; empty boxes paint nothing."""
    axes = np.eye(3) if axes is None else axes
    reach = np.sqrt((axes.T ** 2) @ np.square(radii)) + 4
    box = self.frame.box(np.asarray(centre) - reach, np.asarray(centre) + reach)
    self.paint(box, ellipsoid_cover(*self.frame.crop(box), centre, radii, axes), value, organ)

  def capsule(self, start, end, radius, value, organ=None):
    """A round-ended tube between two points; `radius` may be (at the start, at the end)."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    r0, r1 = np.broadcast_to(radius, 2)
    reach = max(r0, r1) + 4
    box = self.frame.box(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
    z, y, x = (c - o for c, o in zip(self.frame.crop(box), start.astype(np.float32)))
    dz, dy, dx = (end - start).astype(np.float32)
    along = np.clip((z * dz + y * dy + x * dx) / (dz * dz + dy * dy + dx * dx), 0, 1)
    distance = np.sqrt((z - along * dz) ** 2 + (y - along * dy) ** 2 + (x - along * dx) ** 2)
    self.paint(box, soft(distance - np.float32(r0) - np.float32(r1 - r0) * along), value, organ)


def soft(distance_mm, width_mm=EDGE_MM[1]):
  """Coverage of a voxel whose centre lies at this signed distance (negative inside) from a surface."""
  return np.clip(np.float32(.5) - distance_mm * np.float32(1 / width_mm), 0, 1)


def ellipsoid_cover(z, y, x, centre, radii, axes):
  """Coverage by an ellipsoid; the distance is the first-order one, (f - 1) / |grad f|."""
  z, y, x = (c - np.float32(o) for c, o in zip((z, y, x), centre))
  value, slope = 0, 0
  for axis, radius in zip(np.asarray(axes, np.float32), radii):
    q = (axis[0] * z + axis[1] * y + axis[2] * x) * np.float32(1 / radius)
    value = value + q * q
    slope = slope + (q * np.float32(1 / radius)) ** 2
  return soft((value - 1) / (2 * np.sqrt(slope) + np.float32(1e-6)))


def oval_distance(x, y, half_x, half_y, square=0., skew=0.):
  """Signed mm distance to the rounded oval u^2 + v^2 - square u^2 v^2 + skew u v = 1 in every slice, first order.

  Args:
    x, y: `[D, H, W]` (or broadcastable) mm; half_x, half_y: `[D, 1, 1]` half axes in mm.
    square: 0 = ellipse, towards 1 = rectangle; skew: turns the long axis.
  """
  u, v = x * (1 / half_x), y * (1 / half_y)
  uu, vv = u * u, v * v
  slope = np.sqrt(uu * (1 / half_x ** 2) + vv * (1 / half_y ** 2))
  slope += np.float32(1e-5)
  value = uu + vv
  value -= np.float32(1)
  uu *= vv
  uu *= np.float32(square)
  value -= uu
  u *= v
  u *= np.float32(skew)
  value += u
  slope *= 2
  value /= slope
  return value


def random_axes(rng) -> np.ndarray:
  """A rotation `[3, 3]` uniform over all orientations (normalised Gaussian quaternion)."""
  w, i, j, k = (q := rng.normal(size=4)) / np.linalg.norm(q)
  return np.array([[1 - 2 * (j * j + k * k), 2 * (i * j - k * w), 2 * (i * k + j * w)],
                   [2 * (i * j + k * w), 1 - 2 * (i * i + k * k), 2 * (j * k - i * w)],
                   [2 * (i * k - j * w), 2 * (j * k + i * w), 1 - 2 * (i * i + j * j)]])
