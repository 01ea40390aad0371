"""Which samples show the same: by content hash, by look (also turned and mirrored), by slices.

The limits (correlation 0.985 of 32 x 32 box means; 8 equal slices, fewer of short volumes) are chosen by us.
"""
import collections
import functools
import hashlib
from typing import NamedTuple

import numpy as np

ALIKE = .985     # correlation of pictures
SLICES, SHARE, FEWEST = 8, 1 / 4, 4    # equal slices of volumes: 8, or a quarter of the shorter one, 4 at least
BLOCK = 512      # pictures that are compared with all others at a time
CROWD = 16       # volumes that hold one and the same slice: beyond that each is compared with the next alone
FORMS = ('', 'turned by 90 deg', 'turned by 180 deg', 'turned by 270 deg', 'mirrored',
         'mirrored and turned by 90 deg', 'mirrored and turned by 180 deg', 'mirrored and turned by 270 deg')


class Pair(NamedTuple):
  first: int
  second: int    # > first
  how: str       # 'equal bytes', '0.991, mirrored', '30 equal slices'


def pairs(shas, pictures, slices) -> list[Pair]:
  """Every duplicate of a list of samples, once, in order; None stands for what a sample does not have.

  Args:
    shas: content hashes.
    pictures: [n, n] float32 each, as of judgement.small.
    slices: as of `slice_hashes`.
  """
  found = {}
  for some in (equal(shas), _of(images, pictures), _of(volumes, slices)):
    for pair in some:
      found.setdefault(pair[:2], pair)
  return [found[key] for key in sorted(found)]


def _of(compare, values):
  """The pairs among those that have a value, by their place in the whole list."""
  there = [i for i, v in enumerate(values) if v is not None]
  return [p._replace(first=there[p.first], second=there[p.second]) for p in compare([values[i] for i in there])]


def equal(shas) -> list[Pair]:
  """Samples of the same bytes, each paired with the first of them."""
  first, out = {}, []
  for i, sha in enumerate(shas):
    if sha and first.setdefault(sha, i) != i:
      out.append(Pair(first[sha], i, 'equal bytes'))
  return out


# ---- pictures

def images(pictures, limit: float = ALIKE) -> list[Pair]:
  """Pictures that correlate above `limit` in one of their 8 turned and mirrored forms.

  First all are compared by their means over the 8 forms (136 numbers instead of 8 x 1024): these cannot be further
  apart than the nearest forms are, so nothing is missed. Only the few that are that near are compared in full.

  Args:
    pictures: [n, n] each; those of one value are like no other.
  """
  if len(pictures) < 2:
    return []
  stack = np.stack(pictures).astype(np.float32)
  stack -= stack.mean((1, 2), keepdims=True)
  power = np.linalg.norm(stack, axis=(1, 2), keepdims=True)
  flat = power[:, 0, 0] < 1e-6
  stack /= np.maximum(power, 1e-6)
  means, size = _means(stack), stack.shape[1]
  square, reach = (means ** 2).sum(1), 2 * (1 - limit) + 1e-5    # |a - b|^2 = 2 - 2 corr(a, b)
  everything, out = stack.reshape(len(stack), -1), []
  for start in range(0, len(stack), BLOCK):
    stop = min(start + BLOCK, len(stack))
    near = square[start:stop, None] + square[None, start:] - 2 * means[start:stop] @ means[start:].T < reach
    near &= np.arange(start, stop)[:, None] < np.arange(start, len(stack))
    near &= ~flat[start:stop, None] & ~flat[start:]
    rows, columns = np.flatnonzero(near.any(1)) + start, np.flatnonzero(near.any(0)) + start
    if not rows.size:
      continue
    by_form = np.stack([form.reshape(len(rows), size * size) @ everything[columns].T for form in forms(stack[rows])])
    best = by_form.argmax(0)
    value = np.where(near[np.ix_(rows - start, columns - start)], by_form.max(0), -1)
    for i, j in zip(*np.nonzero(value > limit)):
      form = FORMS[best[i, j]]
      out.append(Pair(int(rows[i]), int(columns[j]), f'{value[i, j]:.3f}' + (f', {form}' if form else '')))
  return sorted(out)


def forms(stack: np.ndarray) -> list[np.ndarray]:
  """[N, n, n] -> its 8 turned and mirrored forms, as FORMS names them."""
  return [np.rot90(m, k, (1, 2)) for m in (stack, stack[:, :, ::-1]) for k in range(4)]


def _means(stack: np.ndarray) -> np.ndarray:
  """[N, n, n] -> [N, orbits]: means over the 8 forms, weighted so that distances are those of the mean pictures."""
  orbit, weight = _orbits(stack.shape[1])
  mean = sum(forms(stack)) / 8
  return mean.reshape(len(stack), -1)[:, orbit] * weight


@functools.lru_cache
def _orbits(size: int) -> tuple[np.ndarray, np.ndarray]:
  """One pixel of each set that the 8 forms exchange, and the root of the number of pixels in that set."""
  numbers = np.arange(size * size).reshape(1, size, size)
  lowest = np.min(forms(numbers), 0).ravel()
  orbit, count = np.unique(lowest, return_counts=True)
  return orbit, np.sqrt(count).astype(np.float32)


# ---- volumes

def slice_hashes(array: np.ndarray) -> tuple[bytes, ...]:
  """8 bytes for every axial slice of [D, H, W] that is not of one value; what int16 does not hold is rounded."""
  out = []
  for plane in array:
    if plane.min() != plane.max():
      if plane.dtype != np.int16:
        plane = np.clip(np.rint(plane), -2**15, 2**15 - 1).astype(np.int16)
      out.append(hashlib.blake2b(np.ascontiguousarray(plane), digest_size=8, salt=_salt(plane.shape)).digest())
  return tuple(out)


def _salt(shape) -> bytes:
  return b''.join(int(n).to_bytes(4, 'little') for n in shape)


def volumes(slices) -> list[Pair]:
  """Volumes that share at least 8 slices; of short ones (tiles of 24) a quarter of the shorter one is enough.

  Args:
    slices: slice_hashes of each.
  """
  holders = collections.defaultdict(list)
  for i, hashes in enumerate(slices):
    for h in set(hashes):
      holders[h].append(i)
  shared = collections.Counter()
  for held in holders.values():
    if len(held) > CROWD:
      shared.update(zip(held, held[1:]))
    else:
      shared.update((a, b) for k, a in enumerate(held) for b in held[k + 1:])
  enough = lambda a, b: min(SLICES, max(FEWEST, int(SHARE * min(len(set(slices[a])), len(set(slices[b]))))))
  return sorted(Pair(a, b, f'{n} equal slices') for (a, b), n in shared.items() if n >= enough(a, b))
