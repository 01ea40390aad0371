"""The chest radiograph of a phantom: a projection with a contrast, a noise and a film of its own. Chosen by us."""
import numpy as np
from scipy import ndimage

MARKS = {'L': ('10000', '10000', '10000', '10000', '10000', '10000', '11111'),
         'R': ('11110', '10001', '10001', '11110', '10100', '10010', '10001')}


def xray(phantom, seed: int, index: int, size: int = 128) -> np.ndarray:
  """A frontal radiograph, bright = dense: row 0 superior, column 0 the patient's right.

  Beam hardening, scatter, grain, percentile window, gamma, collimation and side marker are drawn from
  (seed, index) alone.

  Args:
    phantom: as `make` returns it; size: pixels per side.

  Returns:
    uint8 `[size, size]`.
  """
  rng = np.random.default_rng([seed, index, 1])
  bone, field_mm = _beam(rng)
  depth = line_integral(phantom, bone, field_mm, size)
  depth **= rng.uniform(.8, 1.)                                      # beam hardening
  signal = np.exp(-depth)
  scatter = ndimage.gaussian_filter(signal, size * rng.uniform(.05, .12))
  signal += rng.uniform(.1, .6) * scatter
  photons = 10 ** rng.uniform(3.6, 4.8)
  film = -np.log(rng.poisson(signal * photons).clip(1) / photons)
  film = ndimage.gaussian_filter(film, rng.uniform(.2, .7))
  low, high = np.percentile(film, (rng.uniform(.5, 8), rng.uniform(90, 99.5)))
  image = np.clip((film - low) / (high - low), 0, 1) ** np.exp(rng.uniform(-.5, .5))
  collimate(rng, image)
  mark(rng, image)
  return np.round(image * 255).astype(np.uint8)


def outlines(phantom, seed: int, index: int, organs, size: int = 128) -> np.ndarray:
  """Where organs lie in the radiograph that `xray` makes of the same patient.

  Args:
    organs: for each outline, the values of `phantom.organs` that belong to it.

  Returns:
    uint8 `[size, size, len(organs)]`, 1 where a ray meets the organ; outlines overlap as in any projection.
  """
  _, field_mm = _beam(np.random.default_rng([seed, index, 1]))
  out = [onto_film(np.isin(phantom.organs, values).sum(1).astype(np.float32), phantom.spacing_mm, field_mm, size)
         for values in organs]
  return (np.stack(out, -1) >= .5).astype(np.uint8)


def _beam(rng) -> tuple[float, float]:
  """Extra attenuation of bone, and width of the field in mm: the first numbers that are drawn."""
  return rng.uniform(.2, 1.0), rng.uniform(270, 320)


def line_integral(phantom, bone: float, field_mm: float, size: int) -> np.ndarray:
  """Attenuation along frontal rays, `[size, size]`; `bone` = extra attenuation of mineral (lower energies)."""
  hu = phantom.hu.astype(np.float32)
  mu = np.maximum(hu + 1000, 0)
  mu += np.float32(bone) * np.maximum(hu - 120, 0)
  path = mu.sum(1) * np.float32(2e-5 * phantom.spacing_mm[1])        # [S, R]
  return onto_film(path, phantom.spacing_mm, field_mm, size)


def onto_film(path, spacing_mm, field_mm: float, size: int) -> np.ndarray:
  """Sums along frontal rays [S, R] -> `[size, size]`, row 0 superior, column 0 the patient's right."""
  ticks = ((np.arange(size) + .5) / size - .5) * field_mm
  rows, cols = (-ticks / s + (n - 1) / 2 for s, n in zip(spacing_mm[::2], path.shape))
  return lerp(rows, path.shape[0]) @ path @ lerp(cols, path.shape[1]).T


def lerp(at, n) -> np.ndarray:
  """Matrix `[len(at), n]` of linear interpolation, zero outside."""
  return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n))).astype(np.float32)


def collimate(rng, image):
  """Dark borders of random widths; in place."""
  size = len(image)
  for edge in range(4):
    width = int(size * max(0, rng.uniform(-.05, .05)))
    np.rot90(image, edge)[:width] *= .1


def mark(rng, image):
  """A bright letter in a random upper corner: which one says nothing about the patient."""
  size = len(image)
  glyph = np.array([[int(c) for c in row] for row in MARKS[rng.choice(list(MARKS))]], float)
  glyph = np.kron(glyph, np.ones((max(1, size // 100),) * 2))
  h, w = glyph.shape
  row = int(rng.uniform(.03, .12) * size)
  column = int(rng.uniform(.03, .15) * size)
  column = column if rng.uniform() < .5 else size - column - w
  spot = image[row:row + h, column:column + w]
  np.maximum(spot, glyph * rng.uniform(.7, 1), out=spot)
