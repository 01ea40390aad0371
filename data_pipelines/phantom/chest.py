"""The outer shapes of a patient: body wall, rib cage, lungs and diaphragm. All sizes in patient mm, chosen by us."""
from typing import NamedTuple

import numpy as np

from data_pipelines.phantom.frame import EDGE_MM, SHAPE, Canvas, Frame, oval_distance, soft

ORGANS = ('air', 'body', 'lung_right', 'lung_left', 'heart', 'aorta', 'trachea', 'spine', 'ribs', 'liver', 'stomach',
          'effusion', 'consolidation', 'nodule', 'distractor')
LABEL = {name: i for i, name in enumerate(ORGANS)}


class Chest(NamedTuple):
  """Drawn once per patient; everything inside the chest is placed relative to it."""
  half_x: np.ndarray                  # [D, 1, 1] half width of the rib cage's inside
  half_y: np.ndarray                  # [D, 1, 1] half depth
  centre_y: np.ndarray                # [D, 1, 1]
  square: float                       # 0 = elliptic slices
  skew: float
  muscle: float                       # mm
  fat: float                          # mm
  apex: float                         # z of the top of the lungs
  dome: tuple[float, float]           # z of the top of the diaphragm: right, left
  recess: float                       # mm from a dome's top to the deepest recess
  curve: tuple[float, float, float]   # lateral curve of the spine: height, centre, width
  z: np.ndarray                       # [D] of the slices, for `at`

  def at(self, profile, z):
    """A per-slice profile at any z."""
    return np.interp(z, self.z, profile.ravel())

  def spine_x(self, z):
    """Lateral position of the spine at height z."""
    height, centre, width = self.curve
    return height * np.exp(-((z - centre) / width) ** 2)

  def wall(self, angle, z, outside=0.):
    """Point (z, y, x) on the rib cage's inside, and its outward normal; angle 0 = right, 90 degrees = front."""
    a, b = self.at(self.half_x, z) + outside, self.at(self.half_y, z) + outside
    cos, sin = np.cos(angle), np.sin(angle)
    shape = (1 - self.square * (cos * sin) ** 2) ** -.5    # how far a squared oval reaches beyond the ellipse
    normal = np.array([0, sin / b, cos / a])
    return np.array([z, self.at(self.centre_y, z) + shape * b * sin, shape * a * cos]), normal / np.hypot(*normal[1:])


def draw(rng, frame: Frame, scoliosis: int) -> Chest:
  """Body build, inspiration, outline; a lateral curve of 20-30 mm with scoliosis, else below 4 mm."""
  z = frame.z
  width, depth = rng.uniform(112, 136), rng.uniform(76, 98)
  barrel, taper = rng.uniform(.02, .09), rng.uniform(.28, .42)
  t = (z + rng.uniform(35, 60)) / 170
  above, below = np.square(np.maximum(t, 0)), np.square(np.minimum(t, 0))
  wave = [sum(rng.normal(0, .012) * np.sin(2 * np.pi * k * z / 330 + rng.uniform(0, 6.3)) for k in (1, 2, 3))
          for _ in range(2)]
  f32 = lambda a: np.asarray(a, np.float32)
  right = rng.uniform(-88, -16)
  height = float(rng.choice((-1, 1))) * (rng.uniform(20, 30) if scoliosis else rng.uniform(0, 4))
  return Chest(half_x=f32(width * (1 - taper * above - barrel * below + wave[0])),
               half_y=f32(depth * (1 - rng.uniform(.2, .34) * above - barrel * below + wave[1])),
               centre_y=f32(-rng.uniform(4, 16) * above), square=rng.uniform(.15, .6), skew=rng.uniform(-.06, .06),
               muscle=rng.uniform(6, 22), fat=rng.uniform(3, 26), apex=rng.uniform(108, 130),
               dome=(right, right - rng.uniform(2, 22)), recess=rng.uniform(42, 66),
               curve=(height, rng.uniform(-25, 45), rng.uniform(60, 90)), z=frame.z.ravel())


def paint_body(rng, frame: Frame, chest: Chest) -> tuple[Canvas, np.ndarray]:
  """Air, skin, fat, muscle, breasts (p = .5) and the soft filling of the rib cage.

  Returns:
    The canvas, and the mm distance `[D, H, W]` to the rib cage's inside (negative inside).
  """
  z = frame.z
  wall = 9 + chest.muscle + chest.fat                                # ribs, muscle, fat
  neck = np.clip((z - chest.apex) / 60, 0, 1) ** 2                   # above the shoulders the body narrows
  width = chest.half_x.max() * .35 + chest.half_x * .65              # shoulders: the wall is thicker at the top
  half_x = (width + wall) * (1 - .45 * neck)
  half_y = (chest.half_y + wall) * (1 - .25 * neck)
  depth = oval_distance(frame.x, frame.y - chest.centre_y, half_x, half_y, chest.square, chest.skew)
  hu = soft(depth) * 1020 - np.float32(1000)                         # skin
  hu -= soft(depth + 2.5) * np.float32(20 + rng.uniform(90, 115))
  hu += soft(depth + (2.5 + chest.fat)) * np.float32(rng.uniform(140, 165))
  canvas = Canvas(frame, hu, (depth < 0).view(np.uint8), np.zeros(SHAPE, np.float32))

  has_breasts, radii = rng.uniform() < .5, rng.uniform((28, 30, 40), (45, 52, 58))
  for side in (-1, 1) if has_breasts else ():
    angle = np.pi / 2 - side * rng.uniform(.5, .62)
    centre, _ = chest.wall(angle, rng.uniform(-22, -4), wall - 12)
    breast(canvas, centre, radii, rng.uniform(-80, 0))

  cage = oval_distance(frame.x, frame.y - chest.centre_y, chest.half_x, chest.half_y, chest.square, chest.skew)
  filling = soft(cage)
  filling *= z < chest.apex + 8
  hu += filling * (np.float32(rng.uniform(-30, 30)) - hu)
  return canvas, cage


def breast(canvas: Canvas, centre, radii, value):
  """Tissue added outside the wall only."""
  box = canvas.frame.box(centre - radii - 4, centre + radii + 4)
  z, y, x = (c - np.float32(o) for c, o in zip(canvas.frame.crop(box), centre))
  distance = (np.sqrt((z / radii[0]) ** 2 + (y / radii[1]) ** 2 + (x / radii[2]) ** 2) - 1) * radii.mean()
  tissue = np.where(distance < -4, np.float32(value), np.float32(-100))
  hu = canvas.hu[box]
  np.maximum(hu, soft(distance) * (tissue + 1000) - 1000, out=hu)
  canvas.organs[box][(distance < 0) & (canvas.organs[box] == 0)] = LABEL['body']


def diaphragm(chest: Chest, frame: Frame) -> np.ndarray:
  """Height z `[1, H, W]` of the two domes; each falls to its posterior and lateral recess."""
  lower = np.argmin(np.abs(chest.z - np.mean(chest.dome)))
  x, y = frame.x[lower][None], frame.y
  half_x, half_y = chest.half_x[lower], chest.half_y[lower]
  domes = [top - chest.recess * (((x - side * .52 * half_x) / (.62 * half_x)) ** 2 * .8
                                 + ((y - .18 * half_y) / (1.05 * half_y)) ** 2)
           for top, side in zip(chest.dome, (1, -1))]
  return np.maximum(np.maximum(*domes), min(chest.dome) - 1.25 * chest.recess).astype(np.float32)


def lungs(chest: Chest, canvas: Canvas, cage: np.ndarray, dome: np.ndarray, mediastinum: float) -> np.ndarray:
  """Fills `canvas.lung` and the lung labels: rib cage minus mediastinum, above the diaphragm, below the apices.

  Args:
    mediastinum: scale of the mediastinum's half width (about 26 mm behind the heart).

  Returns:
    `[D, H, W]` bool: the patient's right side of the mediastinum.
  """
  frame, (z, y, x) = canvas.frame, canvas.frame[:3]
  upper = np.argmin(np.abs(chest.z - chest.apex))
  middle = chest.at(chest.centre_y, 0.)
  reach = chest.at(chest.half_y, 0.)
  v = (y - middle) / reach                                           # -1 back, 1 front
  half = mediastinum * (12 + 14 * np.exp(-(v / .45) ** 2) + 10 * np.exp(-((v + 1) / .3) ** 2))
  half = half.astype(np.float32) * (1 + .25 * np.clip((z - 40) / 50, 0, 1))
  lean = np.clip(.65 - .35 * v, .3, 1).astype(np.float32)            # the back of the mediastinum follows the spine
  lateral = x - chest.spine_x(z).astype(np.float32) * lean
  half -= np.abs(lateral)
  top = chest.apex - 32 * (((np.abs(frame.x[upper]) - 46) / 44) ** 2 + ((frame.y[0] + 12) / 60) ** 2)
  half *= np.float32(1 / EDGE_MM[1])
  outside = np.maximum(half, (cage + np.float32(1)) * np.float32(1 / EDGE_MM[1]))
  np.maximum(outside, (dome - z) * np.float32(1 / EDGE_MM[0]), out=outside)
  np.maximum(outside, (z - top[None].astype(np.float32)) * np.float32(1 / EDGE_MM[0]), out=outside)
  np.clip(np.float32(.5) - outside, 0, 1, out=canvas.lung)
  inside = canvas.lung > .5
  right = lateral > 0
  canvas.organs[inside] = np.where(right[inside], LABEL['lung_right'], LABEL['lung_left'])
  return right
