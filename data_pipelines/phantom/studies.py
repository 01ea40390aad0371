"""Tiny studies of patients who never have both images: a picture or a volume, and the report that tells its lesion.

The class of a patient is the lesion's shape, quadrant and size, 4 x 4 x 2 = 32 of them. In a volume it fills two
neighbouring planes of eight, 2m and 2m + 1; two other planes hold an equally bright square which no report mentions.
So the only bridge between pictures and volumes is what reports say, and brightness alone does not tell which planes
they speak of. Chosen by us; nothing is derived from patients.
"""
from typing import NamedTuple

import numpy as np

SIDE, PLANES = 16, 8                      # pixels; planes of a volume
SHAPES = ('ring', 'cross', 'bar', 'wedge')
QUADRANTS = ('right upper', 'left upper', 'right lower', 'left lower')
SIZES = {'small': 5, 'large': 7}          # pixels
CLASSES = len(SHAPES) * len(QUADRANTS) * len(SIZES)
NOISE, BRIGHT = .25, 1.6
DISTRACTOR = 4                            # pixels of the square
TEMPLATES = ('there is a {size} {shape} shaped opacity in the {quadrant} zone',
             '{size} lesion of {shape} form seen {quadrant} quadrant otherwise clear')
SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
VOCABULARY = (*SPECIAL, *sorted({w for t in TEMPLATES for w in t.split() if '{' not in w} | set(SHAPES) | set(SIZES)
                                | {w for q in QUADRANTS for w in q.split()}))


class Study(NamedTuple):
  image: np.ndarray       # float32 [16, 16], or [8, 16, 16] of a volume; the noise is about 0
  label: int              # its class
  planes: tuple           # that hold the lesion, of a volume
  template: int           # which of TEMPLATES its report uses


def make(seed: int, index: int, volume: bool) -> Study:
  """Patient number `index` of the world `seed`: the same in any order and any process."""
  rng = np.random.default_rng([seed, index, 3 + volume])
  label, template = int(rng.integers(CLASSES)), int(rng.integers(len(TEMPLATES)))
  picture = _lesion(label)
  x = rng.normal(0, NOISE, (PLANES, SIDE, SIDE)[not volume:])
  if not volume:
    return Study((x + picture).astype(np.float32), label, (), template)
  first = 2 * int(rng.integers(PLANES // 2))
  x[first:first + 2] += picture
  others = [p for p in range(PLANES) if p // 2 != first // 2]
  y, z = rng.integers(0, SIDE - DISTRACTOR + 1, 2)
  x[rng.choice(others, 2, replace=False), y:y + DISTRACTOR, z:z + DISTRACTOR] += BRIGHT
  return Study(x.astype(np.float32), label, (first, first + 1), template)


def report(label: int, template: int) -> str:
  shape, quadrant, size = named(label)
  return TEMPLATES[template].format(shape=shape, quadrant=quadrant, size=size)


def named(label: int) -> tuple[str, str, str]:
  """(shape, quadrant, size) of a class."""
  rest, size = divmod(label, len(SIZES))
  shape, quadrant = divmod(rest, len(QUADRANTS))
  return SHAPES[shape], QUADRANTS[quadrant], list(SIZES)[size]


def attributes(label: int) -> list[int]:
  """Which shape, quadrant and size a class has, 0 or 1 for each of the 4 + 4 + 2."""
  return [int(name == one) for name, names in zip(named(label), (SHAPES, QUADRANTS, SIZES)) for one in names]


def _lesion(label: int) -> np.ndarray:
  """[16, 16] the lesion in the middle of its quadrant."""
  shape, quadrant, size = named(label)
  n, half = SIZES[size], SIDE // 2
  y, x = np.mgrid[:n, :n]
  middle = n // 2
  drawn = {'ring': (y == 0) | (y == n - 1) | (x == 0) | (x == n - 1), 'cross': (y == middle) | (x == middle),
           'bar': abs(y - middle) <= 1, 'wedge': x <= y}[shape]
  top, left = (half * i + (half - n) // 2 for i in divmod(QUADRANTS.index(quadrant), 2))
  out = np.zeros((SIDE, SIDE))
  out[top:top + n, left:left + n][drawn] = BRIGHT
  return out
