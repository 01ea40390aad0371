"""Bones: vertebrae with canals, ribs, sternum, clavicles, shoulder blades, arms. Sizes in mm, chosen by us."""
import numpy as np

from data_pipelines.phantom.chest import LABEL, Chest
from data_pipelines.phantom.frame import SHAPE, Canvas, soft


def paint(rng, canvas: Canvas, chest: Chest, cage: np.ndarray):
  """All bones of one patient; `cage` = mm distance to the rib cage's inside."""
  bone = rng.uniform(.85, 1.15)                                      # mineral content
  ribs(rng, canvas, chest, cage, bone)
  sternum(rng, canvas, chest, bone)
  spine(rng, canvas, chest, bone)
  for side in (-1, 1):
    clavicle(rng, canvas, chest, side, bone)
    scapula(rng, canvas, chest, side, bone)


def ribs(rng, canvas: Canvas, chest: Chest, cage: np.ndarray, bone: float):
  """Slanted stripes in the shell of the rib cage: high behind, low in front, cartilage near the sternum."""
  z, y, x = canvas.frame[:3]
  pitch, slant, phase = rng.uniform(23, 28), rng.uniform(.38, .58), rng.uniform(0, 1)
  shell = np.flatnonzero(np.abs(cage - 5) < 6)
  d, rest = np.divmod(shell, SHAPE[1] * SHAPE[2])
  z, y, x = z.ravel()[d], y.ravel()[rest], x.ravel()[shell]
  turns = (z + np.float32(slant) * y) * np.float32(1 / pitch) + np.float32(phase)
  off_centre = np.abs(turns - np.floor(turns) - np.float32(.5)) * np.float32(pitch)
  cover = soft(np.abs(cage.ravel()[shell] - 5) - 3.8) * soft(off_centre - 5.2, 5.)
  cover *= np.clip((chest.apex + 14 - z) * np.float32(.1), 0, 1)
  front = (y - chest.centre_y.ravel()[d]) / chest.half_y.ravel()[d]
  cartilage = np.clip((front - np.float32(.62)) * 12, 0, 1)          # also the gap in front, where ribs end
  value = np.float32(760 * bone) * (1 - cartilage) + 110 * cartilage
  hu = canvas.hu.ravel()
  hu[shell] += cover * (value - hu[shell])
  canvas.lung.ravel()[shell] *= 1 - cover
  canvas.organs.ravel()[shell[(cover > .5) & (cartilage < .5)]] = LABEL['ribs']


def sternum(rng, canvas: Canvas, chest: Chest, bone: float):
  """A flat plate in the front midline, in two parts."""
  width = rng.uniform(15, 20)
  for low, high, half in ((-45, 40, width), (40, chest.apex - 38, width * 1.35)):
    middle = (low + high) / 2
    (_, y, _), _ = chest.wall(np.pi / 2, middle, 5)
    (_, y_high, _), _ = chest.wall(np.pi / 2, high, 5)
    along = np.array([(high - low) / 2, y_high - y, 0])
    long = along / np.linalg.norm(along)
    axes = np.stack([long, [-long[1], long[0], 0], [0, 0, 1]])
    canvas.ellipsoid((middle, y, 0), ((high - low) / 2 * 1.1, 6, half), 260 * bone, LABEL['ribs'], axes)


def spine(rng, canvas: Canvas, chest: Chest, bone: float):
  """Vertebral bodies and discs along the lateral curve, canal, spinous and transverse processes."""
  pitch, phase, size = rng.uniform(22, 27), rng.uniform(0, 1), rng.uniform(.9, 1.1)
  back = (chest.centre_y - chest.half_y).ravel() + 20
  reach = 40 + abs(chest.curve[0])
  box = canvas.frame.box((-500, back.min() - 62, -reach), (500, back.max() + 22, reach))
  z, y, x = canvas.frame.crop(box)
  x = x - chest.spine_x(z).astype(np.float32)
  y = y - back[box[0], None, None].astype(np.float32)                # 0 = centre of the vertebral body
  turns = z / np.float32(pitch) + np.float32(phase)
  off_disc = np.abs(turns - np.floor(turns) - np.float32(.5)) * np.float32(pitch)      # mm from the disc
  solid = 1 - soft(off_disc - 3, 6.5)
  body = np.sqrt(np.square(x * np.float32(.84)) + y * y) - np.float32(15.5 * size)
  rim = soft(np.abs(body + 2) - 1.5)
  canvas.paint(box, soft(body), 85 + solid * (np.float32(170 * bone) + rim * np.float32(260 * bone)), LABEL['spine'])
  level = soft(np.abs(off_disc - pitch / 2) - 7, 6.5)                # processes leave from the middle of a vertebra
  arch = np.sqrt(x * x + np.square(y + 25)) - 13
  transverse = np.maximum(np.abs(x) - 33, np.abs(y + 27) - 5)
  spinous = np.maximum(np.abs(x) - 4, np.abs(y + 44) - 15)
  canvas.paint(box, soft(arch), np.float32(420 * bone), LABEL['spine'])
  canvas.paint(box, soft(np.minimum(transverse, spinous)) * level, np.float32(430 * bone), LABEL['spine'])
  canvas.paint(box, soft(arch + 5), 25)                              # the canal


def clavicle(rng, canvas: Canvas, chest: Chest, side: int, bone: float):
  """Two bowed pieces from the sternum outwards, rising."""
  top = chest.apex - rng.uniform(22, 34)
  inner, _ = chest.wall(np.pi / 2 - side * .22, top, 10)
  middle = inner + (rng.uniform(4, 14), rng.uniform(2, 8), side * rng.uniform(42, 52))
  outer = middle + (rng.uniform(4, 16), -rng.uniform(25, 40), side * rng.uniform(40, 50))
  canvas.capsule(inner, middle, (7.5, 5.5), 600 * bone, LABEL['ribs'])
  canvas.capsule(middle, outer, (5.5, 6), 600 * bone, LABEL['ribs'])


def scapula(rng, canvas: Canvas, chest: Chest, side: int, bone: float):
  """A thin blade lying on the back of the rib cage, its spine, and the joint end."""
  angle = -np.pi / 2 + side * rng.uniform(.85, 1.05)
  centre, out = chest.wall(angle, rng.uniform(50, 66), 17)
  tilt = rng.uniform(.15, .35)
  across = np.array([0, out[2], -out[1]]) * side                     # along the wall, outwards and forwards
  across *= np.sign(across[2] * side)
  along = np.array([np.cos(tilt), *(np.sin(tilt) * across[1:])])
  wide = np.array([-np.sin(tilt), *(np.cos(tilt) * across[1:])])
  canvas.ellipsoid(centre, (52, 34, 4.2), 380 * bone, LABEL['ribs'], np.stack([along, wide, out]))
  joint = centre + 44 * along + 26 * wide
  canvas.capsule(centre + 18 * along - 24 * wide + 6 * out, joint, (4, 7), 480 * bone, LABEL['ribs'])
