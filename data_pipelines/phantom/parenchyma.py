"""What fills the lungs: air, texture, vessel trees, and the findings. Sizes in mm, chosen by us.

The amount of every finding is drawn independently of its label, and side-dependent amounts are shares of the smaller
lung: mean intensity must not tell what only shape, place or texture should.
"""
from functools import cache

import numpy as np
from scipy import ndimage

from data_pipelines.phantom.chest import LABEL, Chest
from data_pipelines.phantom.frame import SHAPE, SPACING_MM, Canvas, random_axes, soft

MARGIN = (16, 40, 40)                 # how much larger than a volume the banks are: windows are cut at random


@cache
def bank(name: str) -> np.ndarray:
  """A Gaussian random field of mean 0 and standard deviation 1, made once: textures and scanner noises."""
  sigma_mm = dict(reticular=(2.2, 2.2, 2.2), smooth=(7., 7., 7.),                # correlation about 4.5 and 14 mm
                  fine=(0, 0, 0), medium=(0, 2.2, 2.2), thick=(4., 2.6, 2.6),    # reconstruction kernels
                  sharp=(0, 2.2, 2.2))[name]
  white = np.random.default_rng([sum(name.encode()), 1958]).standard_normal(np.add(SHAPE, MARGIN), np.float32)
  field = ndimage.gaussian_filter(white, np.divide(sigma_mm, SPACING_MM), mode='wrap')
  if name == 'sharp':                 # an edge-enhancing kernel: what the smooth ones suppress
    field = white - .9 * field / field.max() * white.max()
  return ((field - field.mean()) / field.std()).astype(np.float32)


KERNELS = {'train': ('fine', 'medium', 'thick'), 'heldout': ('sharp',)}


def window(rng, name: str) -> np.ndarray:
  """A random window of a bank `[D, H, W]`, randomly mirrored."""
  start = [rng.integers(0, m + 1) for m in MARGIN]
  cut = bank(name)[tuple(slice(a, a + n) for a, n in zip(start, SHAPE))]
  return cut[tuple(slice(None, None, int(s)) for s in rng.choice((-1, 1), 3))]


def fill_lungs(rng, canvas: Canvas, labels: dict, right: np.ndarray, hila):
  """Aerated lung with its vessels, effusion and consolidation.

  Args:
    right: `[D, H, W]` bool, the patient's right side.
    hila: the (z, y, x) of the two lung roots.
  """
  frame = canvas.frame
  voxels = np.flatnonzero(canvas.lung > .02)
  d, rest = np.divmod(voxels, SHAPE[1] * SHAPE[2])
  z, y, x = frame.z.ravel()[d], frame.y.ravel()[rest], frame.x.ravel()[voxels]
  share, right = canvas.lung.ravel()[voxels], right.ravel()[voxels]
  texture = window(rng, 'reticular' if labels['reticular'] else 'smooth').ravel()[voxels]
  content = np.float32(rng.uniform(-885, -745)) - np.float32(rng.uniform(.1, .6)) * y
  content += np.float32(rng.uniform(45, 65)) * texture
  vessels = np.minimum(vessel_trees(rng, canvas, hila).ravel()[voxels], 1)
  content += vessels * (np.float32(rng.uniform(20, 90)) - content)

  solid = share > .5
  smaller = min(np.sum(share[right]), np.sum(share[~right]))
  fluid = effusion(rng, z, y, x, solid & (right == labels['effusion_side']), smaller)
  fluid *= right == labels['effusion_side']
  lobe = (right == labels['consolidation_side'])
  airless = consolidation(rng, z, y, x, texture, solid & lobe, fluid, labels['consolidation_lobe'], smaller)
  airless *= lobe * (1 - fluid)
  content += airless * (np.float32(rng.uniform(-70, 30)) + 12 * texture - content)
  content += fluid * (np.float32(rng.uniform(-5, 25)) - content)
  hu = canvas.hu.ravel()
  hu[voxels] += share * (content - hu[voxels])
  organs, free = canvas.organs.ravel(), canvas.lung.ravel()
  organs[voxels[solid & (airless > .5)]] = LABEL['consolidation']
  organs[voxels[solid & (fluid > .5)]] = LABEL['effusion']
  free[voxels] *= (1 - airless) * (1 - fluid)


def effusion(rng, z, y, x, side, smaller) -> np.ndarray:
  """Fluid in the lowest, rearmost and outermost 10-24 % of a lung: coverage of each voxel."""
  depth = z + np.float32(rng.uniform(.25, .6)) * y - np.float32(rng.uniform(.1, .35)) * np.abs(x)
  amount = rng.uniform(.10, .24) * smaller
  return soft(depth - lowest(depth[side], amount), 6.)


def consolidation(rng, z, y, x, texture, side, fluid, upper, smaller) -> np.ndarray:
  """An airless 13-22 % around a random point of the upper or the lower lobe, bounded by the oblique fissure."""
  oblique = z + np.float32(rng.uniform(.7, 1.1)) * y                 # the upper lobe lies above and in front
  fissure = oblique - np.quantile(oblique[side], rng.uniform(.46, .54)).astype(np.float32)
  beyond = -fissure * np.float32(.7) if upper else fissure * np.float32(.7)
  lobe = np.flatnonzero(side & (beyond < 0) & (fluid < .5))
  amount = rng.uniform(.13, .22) * smaller
  if not lobe.size:
    return np.zeros_like(z)
  seed = lobe[rng.integers(lobe.size)]
  stretch = rng.uniform(.7, 1.4, 3).astype(np.float32)
  distance = np.sqrt(np.square((z - z[seed]) * stretch[0]) + np.square((y - y[seed]) * stretch[1])
                     + np.square((x - x[seed]) * stretch[2]))
  distance += 2 * texture
  return soft(distance - lowest(distance[lobe], amount), 9.) * soft(beyond)


def lowest(field, amount) -> np.float32:
  """The level below which `amount` voxels of a field lie."""
  rank = int(np.clip(amount, 0, field.size - 1))
  return np.partition(field, rank)[rank] if field.size else np.float32(-np.inf)


def vessel_trees(rng, canvas: Canvas, hila) -> np.ndarray:
  """Branching random walks from the two lung roots, as coverage `[D, H, W]` (may exceed 1).

  Every step deposits its own volume, spread over the voxels around points of its cross-section: partial volume
  without painting a thousand tubes.
  """
  start = np.repeat(np.asarray(hila), 9, 0)                                      # [2 sides x 9 trees, 3]
  outwards = np.repeat(np.sign([h[2] for h in hila]), 9)
  heading = rng.normal(size=(18, 3)) * (1, .8, .5) + np.stack([0 * outwards, 0 * outwards, .8 * outwards], 1)
  radius = rng.uniform(3.2, 4.6, 18)
  points, amounts = [], []
  for level in range(4):
    for _ in range((4, 4, 4, 3)[level]):
      heading /= np.linalg.norm(heading, axis=1, keepdims=True)
      along = rng.uniform(0, 7, (5, len(start), 1)) * heading
      points.append((start + along + rng.normal(0, .5, (5, len(start), 3)) * radius[:, None]).reshape(-1, 3))
      amounts.append(np.tile(np.pi * radius ** 2 * 7 / 5, 5))
      start = start + 7 * heading
      heading = heading + rng.normal(0, .22, heading.shape)
    start, radius = np.repeat(start, 2, 0), np.repeat(radius, 2) * rng.uniform(.62, .85, 2 * len(radius))
    heading = np.repeat(heading, 2, 0) + rng.normal(0, .55, (len(start), 3))
  index = canvas.frame.index(np.concatenate(points))
  voxel_mm3 = np.prod(SPACING_MM) / np.linalg.det(canvas.frame.to_index[:, :3] * np.array(SPACING_MM)[:, None])
  return splat(index, np.concatenate(amounts) / voxel_mm3)


def splat(index, amounts) -> np.ndarray:
  """Spreads amounts over the 8 voxels around each point (trilinear weights)."""
  keep = np.all((index >= 0) & (index < np.array(SHAPE) - 1), 1)
  index, amounts = index[keep], amounts[keep]
  first = np.floor(index).astype(np.int64)
  part = index - first
  flat = np.ravel_multi_index(first.T, SHAPE)
  total = np.zeros(int(np.prod(SHAPE)))
  for corner in np.ndindex(2, 2, 2):
    weight = amounts * np.prod(np.where(corner, part, 1 - part), 1)
    total += np.bincount(flat + np.ravel_multi_index(corner, SHAPE), weight, total.size)
  return total.astype(np.float32).reshape(SHAPE)


def blob(rng, round_: bool):
  """Radii (3) and orientation of an opacity: a sphere, or a rod or a plate of the same volume."""
  radius = rng.uniform(9, 12.5)
  rod, stretch = rng.uniform() < .5, rng.uniform(2.6, 3.4)
  longest = np.array([stretch ** (2 / 3), stretch ** (-1 / 3), stretch ** (-1 / 3)])
  shape = np.ones(3) if round_ else (longest if rod else 1 / longest)
  return radius * shape, random_axes(rng)


def paint_nodule(rng, canvas: Canvas, round_: bool):
  """The nodule, where the lung leaves room for either shape."""
  cells = canvas.lung.reshape(SHAPE[0] // 2, 2, SHAPE[1] // 4, 4, SHAPE[2] // 4, 4).mean((1, 3, 5))
  room = ndimage.minimum_filter(cells, 3)
  choice = np.flatnonzero(room > .9)
  cell = choice[rng.integers(choice.size)] if choice.size else np.argmax(room + .1 * cells)
  i, j, k = np.array(np.unravel_index(cell, cells.shape)) * (2, 4, 4) + rng.integers(0, (2, 4, 4))
  centre = canvas.frame.z[i, 0, 0], canvas.frame.y[0, j, k], canvas.frame.x[i, j, k]
  radii, axes = blob(rng, round_)
  canvas.ellipsoid(centre, radii, rng.uniform(20, 110), LABEL['nodule'], axes)


def paint_distractor(rng, canvas: Canvas, chest: Chest):
  """A calcified or implanted object in soft tissue: stands out as much as the nodule, tells nothing."""
  radii, axes = blob(rng, rng.uniform() < .5)
  in_wall, angle, height = rng.uniform() < .7, rng.uniform(0, 2 * np.pi), rng.uniform(-60, 95)
  if in_wall:
    centre, _ = chest.wall(angle, height, 9 + (chest.muscle + chest.fat) / 2)
  else:
    centre = min(chest.dome) - rng.uniform(45, 70), rng.uniform(-20, 40), rng.uniform(-70, 70)
  canvas.ellipsoid(centre, radii, rng.uniform(850, 1000), LABEL['distractor'], axes)
