"""How far two surfaces are apart, each element weighted by its area.

A surface element sits where 2 x 2 (x 2) neighbouring voxels are not all inside or all outside: its place is the corner
that they share, its area that of the marching-cubes surface between their centres. This is what the library
surface-distance measures (Nikolov et al. 2018, arXiv:1809.04430); the areas are derived here.
"""
import functools
import itertools
import math

import numpy as np
from scipy.spatial import cKDTree

ROUNDING = 1e-12      # a share that is reached but for the last digit is reached


def distances(pred, truth, spacing_mm) -> list[tuple[np.ndarray, np.ndarray]]:
  """Of the elements of `pred`, then of `truth`: distances to the nearest element of the other, and areas.

  Args:
    pred, truth: masks [*S] of 2 or 3 axes; outside of the array is outside of the object.
    spacing_mm: of each axis.

  Returns:
    [([N] mm, [N] mm^2 or, of contours, mm), likewise [M]]; the distances are inf where the other has no element.

  Raises:
    ValueError: shapes or spacings that do not fit.
  """
  masks = [np.asarray(m).astype(bool, copy=False) for m in (pred, truth)]
  spacing = np.asarray(spacing_mm, np.float64)
  shape = masks[0].shape
  if shape != masks[1].shape or len(shape) not in (2, 3):
    raise ValueError(f'masks of shape {shape} and {masks[1].shape}: give two of one shape, 2-D or 3-D')
  if spacing.shape != (len(shape),) or not (np.isfinite(spacing) & (spacing > 0)).all():
    raise ValueError(f'spacing_mm={spacing_mm}: give {len(shape)} positive numbers for masks of shape {shape}')
  box = _box(masks[0] | masks[1])
  codes = [_codes(m[box]) for m in masks]
  on = [(c > 0) & (c < 2**2**len(shape) - 1) for c in codes]
  shared, table = on[0] & on[1], areas(tuple(spacing.tolist()))
  places = [np.argwhere(o) for o in on]
  out = []
  for a, b in ((0, 1), (1, 0)):
    apart = ~shared[on[a]]
    distance = np.zeros(len(apart))
    distance[apart] = _nearest(places[a][apart], places[b], spacing)
    out.append((distance, table[codes[a][on[a]]]))
  return out


def percentile(distance, area, share: float) -> float:
  """The distance within which `share` of the area lies. [N], [N], N > 0."""
  order = np.lexsort((area, distance))
  reached = np.cumsum(area[order]) / np.sum(area[order])
  return float(distance[order[min(np.searchsorted(reached, share - ROUNDING), len(order) - 1)]])


def _box(mask) -> tuple:
  """Slices of the smallest box that holds all of a mask; empty ones if there is nothing."""
  out = []
  for axis in range(mask.ndim):
    at = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
    out.append(slice(at[0], at[-1] + 1) if len(at) else slice(0, 0))
  return tuple(out)


def _codes(mask) -> np.ndarray:
  """[*S] -> [*S + 1] uint8: bit i0 + 2 i1 + 4 i2 of a code is the voxel (i0, i1, i2) of the 2 x 2 (x 2) ones."""
  code = np.pad(mask, 1).view(np.uint8)
  for axis in range(mask.ndim):
    lower, upper = (np.moveaxis(code, axis, 0)[s] for s in (slice(None, -1), slice(1, None)))
    code = np.moveaxis(lower | upper << 2**axis, 0, axis)
  return code


def _nearest(a, b, spacing) -> np.ndarray:
  """[N, n] and [M, n] indices -> [N] mm to the nearest of `b`."""
  if not len(b):
    return np.full(len(a), np.inf)
  tree = cKDTree(b * spacing, balanced_tree=False, compact_nodes=False)      # places of a grid: this builds faster
  nearest = tree.query(a * spacing)[1]
  return np.sqrt((((a - b[nearest]) * spacing)**2).sum(1))      # of whole steps: equal steps are equal distances


# ---- areas of the elements

@functools.lru_cache(8)
def areas(spacing_mm: tuple) -> np.ndarray:
  """Area of every code, [16] of contours in mm, [256] of surfaces in mm^2."""
  n, scale = len(spacing_mm), np.prod(spacing_mm) / np.array(spacing_mm)
  corners = np.array([c[::-1] for c in itertools.product((0, 1), repeat=n)])    # [2^n, n], in the order of the bits
  out = np.zeros(2**2**n)
  for code in range(len(out)):
    inside = np.array([bool(code >> k & 1) for k in range(len(corners))])
    few = inside if inside.sum() <= len(inside) / 2 else ~inside
    out[code] = sum(np.linalg.norm(piece * scale) for group in _groups(corners[few]) for piece in _pieces(group))
  return out


def _groups(corners) -> list[np.ndarray]:
  """Corners [m, n] of the cube, taken apart into those that edges of the cube join."""
  left, out = list(range(len(corners))), []
  while left:
    group = [left.pop()]
    for i in group:
      near = [j for j in left if abs(corners[i] - corners[j]).sum() == 1]
      group += near
      left = [j for j in left if j not in near]
    out.append(corners[group])
  return out


def _pieces(group) -> list[np.ndarray]:
  """Normals, as long as the areas, of the flat pieces which cut a group of corners off a cube of side 1.

  The surface halves every edge between a corner of the group and another one. Where no plane holds all of these
  points, it is folded so that the fewest planes do.

  Args:
    group: [m, n] corners that edges join, m at most half of all.
  """
  m, n = group.shape
  one, across = np.ones(n), 1. - np.ptp(group, 0)      # `across`: axes along which the group does not extend
  if m <= 2:      # a corner of the cube, or (an edge) of the face across, drawn along the edge
    k = n - m
    return [across * .5**k / math.factorial(k)]
  if m == 3:      # a triangle of half a face, and a half hexagon
    return [across / 2, one * 3 / 8]
  if across.any():      # a face
    return [across]
  steps = abs(group[:, None] - group)      # [4, 4, 3]
  joined = steps.sum(-1) == 1
  if joined.sum(1).max() == 3:      # a corner and its three neighbours: a hexagon
    return [one * 3 / 4]
  ends = [steps[i][joined[i]][0] for i in np.flatnonzero(joined.sum(1) == 1)]
  return [one / 2, *((1 - end) / 4 for end in ends)]      # a chain along three axes
