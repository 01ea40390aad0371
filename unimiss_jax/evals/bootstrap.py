"""Intervals from test cases: the percentile bootstrap over groups, i.e. patients with all their images."""
import numpy as np

DRAWS = 1000
LEVEL = (.025, .975)


def draws(groups, n: int, seed: int):
  """Yields n index arrays [about N]: groups drawn with replacement, each with all its cases."""
  _, group = np.unique(groups, return_inverse=True)
  members = np.split(np.argsort(group, kind='stable'), np.cumsum(np.bincount(group))[:-1])
  rng = np.random.default_rng(seed)
  for _ in range(n):
    yield np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])


def interval(metric, *arrays, groups=None, n: int = DRAWS, seed: int = 0) -> tuple[float, float]:
  """95 % interval of metric(*arrays).

  Args:
    arrays: [N, ...] of the same cases. groups: [N]; None = every case by itself. n: draws.
  """
  groups = np.arange(len(arrays[0])) if groups is None else groups
  found = [metric(*(a[i] for a in arrays)) for i in draws(groups, n, seed)]
  return tuple(map(float, np.nanquantile(found, LEVEL))) if np.isfinite(found).any() else (float('nan'),) * 2


def paired(metric, a, b, truth, groups, n: int = DRAWS, seed: int = 0) -> tuple[float, float, float]:
  """metric(a, truth) - metric(b, truth) with its 95 % interval; both see the same draws.

  Args:
    a, b, truth: [N, ...] of the same cases. groups: [N]. n: draws.
  """
  gap = lambda a, b, truth: metric(a, truth) - metric(b, truth)
  return float(gap(a, b, truth)), *interval(gap, a, b, truth, groups=groups, n=n, seed=seed)
