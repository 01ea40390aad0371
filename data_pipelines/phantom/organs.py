"""Heart, great vessels, airways and the upper abdomen. Sizes in mm, chosen by us."""
import numpy as np

from data_pipelines.phantom.chest import LABEL, Chest
from data_pipelines.phantom.frame import Canvas, soft


def paint_abdomen(rng, canvas: Canvas, chest: Chest, cage: np.ndarray, dome: np.ndarray):
  """Liver under the right dome and across the midline, spleen, stomach with an air bubble (p = .8), fat between."""
  frame = canvas.frame
  box = (slice(0, int(np.searchsorted(chest.z, max(chest.dome) + 8))), slice(None), slice(None))
  z, y, x = frame.crop(box)
  below = np.maximum(cage[box] + 1, (z - dome) * np.float32(.6))
  canvas.paint(box, soft(below), rng.uniform(-70, 20))
  edge = rng.uniform(-45, -5) + np.float32(.35) * (chest.dome[0] - z) - np.float32(.25) * y    # the left lobe's tip
  canvas.paint(box, soft(np.maximum(below + 4, edge - x)), rng.uniform(50, 115), LABEL['liver'])
  side, top = -chest.at(chest.half_x, chest.dome[1]), chest.dome[1]
  canvas.ellipsoid((top - rng.uniform(36, 50), -rng.uniform(38, 52), .66 * side), (40, 24, 26), rng.uniform(50, 120))
  belly = np.array([top - rng.uniform(32, 44), rng.uniform(5, 25), .5 * side])
  canvas.ellipsoid(belly, (27, 34, 32), rng.uniform(5, 45), LABEL['stomach'])
  bubble, lift = rng.uniform(.45, .85), rng.uniform(2, 9)
  if rng.uniform() < .8:
    canvas.ellipsoid(belly + (lift, 6, 0), np.array([22, 27, 26]) * bubble, -920, LABEL['stomach'])


def paint_heart(rng, canvas: Canvas, chest: Chest, enlarged: int) -> np.ndarray:
  """Two ventricles, the right atrium and a fat cushion; the apex points left, forwards and down.

  The heart rests on the diaphragm: its size (1.28-1.45 when enlarged, else .90-1.05) moves its top.
  Returns its centre.
  """
  size = rng.uniform(1.28, 1.45) if enlarged else rng.uniform(.90, 1.05)
  blood, fat = rng.uniform(20, 75), rng.uniform(2, 6)
  left = np.array([-rng.uniform(.35, .6), rng.uniform(.35, .6), -rng.uniform(.7, .9)])
  left /= np.linalg.norm(left)
  right = np.cross(left, (1, 0, 0))
  right /= np.linalg.norm(right)
  axes = np.stack([left, right, np.cross(left, right)])
  radii = size * rng.uniform((47, 34, 34), (54, 39, 39))
  floor = np.mean(chest.dome) - rng.uniform(12, 20)
  centre = np.array([floor + size * 44, rng.uniform(10, 20), -size * rng.uniform(12, 20)])
  atrium = centre + size * np.array([6, -2, rng.uniform(28, 34)])
  atrium_radii = size * rng.uniform((32, 28, 24), (38, 34, 29))
  for margin, value, organ in ((fat, -85, None), (0, blood, LABEL['heart'])):
    canvas.ellipsoid(centre, radii + margin, value, organ, axes)
    canvas.ellipsoid(atrium, atrium_radii + margin, value, organ)
  return centre


def paint_vessels(rng, canvas: Canvas, chest: Chest, heart: np.ndarray):
  """Aorta as a cane (ascending, arch, descending left of the spine), pulmonary trunk, vena cava, airways."""
  blood, radius = rng.uniform(40, 170), rng.uniform(11.5, 16)
  arch = chest.apex - rng.uniform(70, 84)                            # height of the arch's centre
  foot = chest.at(chest.centre_y - chest.half_y, arch) + 32
  front, back = np.array([6., rng.uniform(8, 16)]), np.array([foot, -rng.uniform(20, 28)])    # (y, x)
  back[0], front[0] = foot, min(front[0] + 8, foot + 80)
  cane(canvas, chest, arch, front, back, heart[0], radius, blood)
  carina = np.array([arch + rng.uniform(-14, -4), (front[0] + foot) / 2 - 4, rng.uniform(2, 8)])
  canvas.capsule((heart[0] + 20, carina[1] + 18, 22), (arch + 45, carina[1] + 14, 24), 9, blood)      # upper vena cava
  tube = rng.uniform(7, 9.5)
  hila = [carina + (-rng.uniform(18, 26), -6, side * rng.uniform(36, 44)) for side in (1, -1)]
  for hilum in hila:
    canvas.capsule(carina + (-14, 12, 0), hilum + (2, 8, 0), (12, 8), blood)                    # pulmonary arteries
  for hilum in hila:
    canvas.capsule(carina, hilum, tube * .7 + 3, 20)
  throat = (chest.apex + 60, carina[1] - 6, 0)
  canvas.capsule(carina, throat, tube + 2.5, 20)
  for hilum in hila:
    canvas.capsule(carina, hilum, tube * .7, -950, LABEL['trachea'])
  canvas.capsule(carina, throat, tube, -980, LABEL['trachea'])
  return hila


def cane(canvas: Canvas, chest: Chest, arch, front, back, foot, radius, value):
  """Half a torus on two pillars: from the heart's top at `foot` up to `arch`, over, and down along the spine."""
  middle, bend = (front + back) / 2, np.linalg.norm(back - front) / 2
  direction = (back - front) / (2 * bend)
  reach = radius + 6 + abs(chest.curve[0])
  low = np.array([-500, *(np.minimum(front, back) - reach)])
  box = canvas.frame.box(low, np.array([arch + bend + reach, *(np.maximum(front, back) + reach)]))
  z, y, x = canvas.frame.crop(box)
  y, x = y - np.float32(middle[0]), x - np.float32(middle[1])
  along, across = direction[0] * y + direction[1] * x, direction[0] * x - direction[1] * y
  shift = (chest.spine_x(z) * (.5 + along / (2 * bend)))             # only the descending part follows the spine
  drift = np.clip((arch - z) / 160, 0, 1) * np.clip(along / bend, 0, 1) * 10               # towards the midline
  shift += drift
  along, across = along - direction[1] * shift, across - direction[0] * shift
  up = np.maximum(z - np.float32(arch), 0)
  ring = np.hypot(along, up) - np.float32(bend)
  distance = np.hypot(np.where(z > arch, ring, np.abs(along) - np.float32(bend)), across) - np.float32(radius)
  distance = np.where(along < 0, np.maximum(distance, foot - z), distance)
  canvas.paint(box, soft(distance.astype(np.float32)), value, LABEL['aorta'])
