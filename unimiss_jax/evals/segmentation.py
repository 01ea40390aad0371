"""Label maps of whole images by a network that sees patches, and how they agree with the truth.

Sliding windows as in nnU-Net (Isensee et al. 2021): evenly spaced, weighted by a Gaussian of an eighth of the patch.
Masks are arrays of any type, inside where they are not 0.
"""
import functools
import itertools
import math

import numpy as np

from unimiss_jax.evals import surface

SIGMA = 1 / 8      # of the patch


# ---- prediction

def sliding_window(predict, volume, patch, overlap: float, mirror=(), batch: int = 1) -> np.ndarray:
  """The mean of what is predicted for every place by all windows that cover it.

  Memory: the result, one row of windows, one batch. An axis that is shorter than the patch is padded on both sides with
  the least value (air, of a CT), and cut back.

  Args:
    predict: [N, *patch, C] -> [N, *patch, K], called with N = `batch` always (rows are repeated in the last call).
    volume: [*S, C], any number of axes.
    patch: size of a window.
    overlap: the share of the patch, in [0, 1), that neighbours have in common; more where this does not divide the
      volume. Steps are of a voxel at least.
    mirror: axes of the volume; the mean is also over the flips of all their combinations.

  Returns:
    [*S, K] float32.

  Raises:
    ValueError: arguments that do not fit, or a prediction of another shape.
  """
  volume, patch, mirror = np.asarray(volume), tuple(patch), tuple(mirror)
  size, n = volume.shape[:-1], volume.ndim - 1
  if len(patch) != n or min(patch, default=0) < 1 or not volume.size:
    raise ValueError(f'patch={patch} of a volume {volume.shape}: give a size for each of its axes but the last')
  if not 0 <= overlap < 1:
    raise ValueError(f'overlap={overlap}: must lie in [0, 1)')
  if len(set(mirror)) < len(mirror) or not set(mirror) <= set(range(n)):
    raise ValueError(f'mirror={mirror}: name axes of 0 to {n - 1}, each once')
  if batch < 1:
    raise ValueError(f'batch={batch}: must be 1 or more')
  lacking = [max(p - s, 0) for p, s in zip(patch, size)]
  kept = tuple(slice(a // 2, a // 2 + s) for a, s in zip(lacking, size))
  if any(lacking):
    pads = [(a // 2, a - a // 2) for a in lacking] + [(0, 0)]
    volume = np.pad(volume, pads, constant_values=volume.min())
  axes = [_windows(*a, overlap) for a in zip(volume.shape, patch)]
  flips = [tuple(slice(None, None, -1 if a in flipped else 1) for a in range(n))
           for k in range(len(mirror) + 1) for flipped in itertools.combinations(mirror, k)]
  predicted = _predicted(predict, volume, axes, flips, batch)
  first = next(predicted)
  predicted = itertools.chain([first], predicted)
  out = np.zeros((*volume.shape[:-1], first.shape[-1]), np.float32)
  # Windows along the last axis make a strip, strips the result: few additions for each place, and few roundings.
  for lead in itertools.product(*axes[:-1]):
    strip = np.zeros((*patch[:-1], *out.shape[-2:]), np.float32)
    for at, weights in axes[-1]:
      strip[..., at, :] += weights[:, None] * next(predicted)
    strip *= functools.reduce(np.multiply.outer, [w for _, w in lead], np.float32(1))[..., None, None]
    out[tuple(at for at, _ in lead)] += strip
  return out[kept]


def _windows(length: int, patch: int, overlap: float) -> list[tuple[slice, np.ndarray]]:
  """Where windows lie along one axis, and their weights [patch], which add up to 1 at each place.

  As windows lie on a grid, the product of the weights of all axes is a Gaussian window divided by the sum of them all.
  """
  steps = math.ceil((length - patch) / max(patch * (1 - overlap), 1) - 1e-9)
  starts = np.round(np.linspace(0, length - patch, steps + 1)).astype(int)
  bell = np.exp(-.5 * ((np.arange(patch) - (patch - 1) / 2) / (SIGMA * patch))**2)
  places = [slice(int(s), int(s) + patch) for s in starts]
  total = np.zeros(length)
  for at in places:
    total[at] += bell
  return [(at, (bell / total[at]).astype(np.float32)) for at in places]


def _predicted(predict, volume, axes, flips, batch: int):
  """Yields [*patch, K] float32 of every window, the last axis running fastest; means over the flips."""
  boxes = list(itertools.product(*([at for at, _ in axis] for axis in axes)))
  for first in range(0, len(boxes), batch):
    rows = boxes[first:first + batch]
    x = np.stack([volume[box] for box in rows + rows[-1:] * (batch - len(rows))])
    y = 0.
    for flip in flips:
      made = np.asarray(predict(np.ascontiguousarray(x[:, *flip])), np.float32)
      if made.shape[:-1] != x.shape[:-1]:
        raise ValueError(f'predict made {made.shape} of {x.shape}: expected {x.shape[:-1]} and channels')
      y = y + made[:, *flip]
    yield from y[:len(rows)] / np.float32(len(flips))


# ---- overlap

def dice(pred, truth, empty: float = 1., *, smooth: float = 0., axis=None):
  """2 |A and B| / (|A| + |B| + smooth); `empty` where this is 0 / 0.

  Args:
    pred, truth: [...] masks.
    smooth: in voxels; the released code of the JSRT task has 0.01.
    axis: axes to count over, all by default. Of slices [Z, H, W], axis=(1, 2) gives one value each.

  Returns:
    float, or float64 of the axes that are left.
  """
  both, either = _count(pred, truth, axis)
  return _ratio(2 * both, both + either + smooth, empty)


def iou(pred, truth, empty: float = 1., *, smooth: float = 0., axis=None):
  """|A and B| / (|A or B| + smooth), the Jaccard index; arguments as of dice."""
  both, either = _count(pred, truth, axis)
  return _ratio(both, either + smooth, empty)


def _count(pred, truth, axis) -> tuple:
  """Voxels in both and in either."""
  a, b = (np.asarray(m).astype(bool, copy=False) for m in (pred, truth))
  if a.shape != b.shape:
    raise ValueError(f'masks of shape {a.shape} and {b.shape}: give two of one shape')
  return np.count_nonzero(a & b, axis), np.count_nonzero(a | b, axis)


def _ratio(top, bottom, empty: float):
  out = np.where(np.equal(bottom, 0), empty, np.divide(top, np.where(np.equal(bottom, 0), 1, bottom)))
  return out if out.ndim else float(out)


# ---- surfaces

def hd95(pred, truth, spacing_mm) -> float:
  """Hausdorff distance of 95 % of the surface, in mm: the larger of both directions.

  Args:
    pred, truth: masks [*S] of 2 or 3 axes. spacing_mm: of each axis.

  Returns:
    0 if both are empty, inf if one is.
  """
  return _hd95(surface.distances(pred, truth, spacing_mm))


def nsd(pred, truth, spacing_mm, tolerance_mm: float, empty: float = 1.) -> float:
  """Normalised surface Dice: the share of both surfaces within `tolerance_mm` of the other; `empty` if there is none.

  Nikolov et al. 2018. Masks as of hd95.
  """
  return _nsd(surface.distances(pred, truth, spacing_mm), tolerance_mm, empty)


def _hd95(pairs) -> float:
  return max((surface.percentile(*pair, .95) for pair in pairs if len(pair[0])), default=0.)


def _nsd(pairs, tolerance_mm, empty) -> float:
  near = sum(area[distance <= tolerance_mm].sum() for distance, area in pairs)
  return _ratio(near, sum(area.sum() for _, area in pairs), empty)


def scores(pred, truth, classes, spacing_mm, tolerance_mm: float | None = None, empty: float = 1.) -> dict:
  """A table of one case.

  Args:
    pred, truth: label maps [*S], integers.
    classes: {name: label}, or labels.
    spacing_mm: of each axis.
    tolerance_mm: of nsd, which is left out by default.
    empty: value of a class that neither has; NaN leaves it out of the means.

  Returns:
    {name: {'dice', 'iou', 'hd95' in mm, 'nsd'}} and 'mean', over the classes.
  """
  labels = classes if isinstance(classes, dict) else {c: c for c in classes}
  out = {name: measures(np.asarray(pred) == label, np.asarray(truth) == label, spacing_mm, tolerance_mm, empty)
         for name, label in labels.items()}
  known = lambda key: [row[key] for row in out.values() if not math.isnan(row[key])]
  mean = {key: float(np.mean(known(key))) if known(key) else math.nan for key in next(iter(out.values()), {})}
  return out | {'mean': mean}


def measures(pred, truth, spacing_mm, tolerance_mm: float | None = None, empty: float = 1.) -> dict:
  """{'dice', 'iou', 'hd95' in mm and, with a tolerance, 'nsd'} of one class; arguments as of `scores`, of masks."""
  pairs = surface.distances(pred, truth, spacing_mm)
  absent = not any(len(distance) for distance, _ in pairs)
  out = {'dice': dice(pred, truth, empty), 'iou': iou(pred, truth, empty),
         'hd95': math.nan if absent and math.isnan(empty) else _hd95(pairs)}
  return out if tolerance_mm is None else out | {'nsd': _nsd(pairs, tolerance_mm, empty)}
