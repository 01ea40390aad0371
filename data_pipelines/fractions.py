"""Shares of a labelled training set: seeded, nested, by patient, every class in every share. Chosen by us."""
import collections
import hashlib
import math


def nested(groups, strata, share: float, seed: int) -> list[int]:
  """Indices of a share of the samples, in order.

  The patients of each stratum are shuffled by a hash of their name, so that the same share is drawn on every machine, a
  smaller share lies in every larger one, and other patients do not change who comes first.

  Args:
    groups: patient of each sample.
    strata: class of each sample; a patient counts as that of the first sample.
    share: of the patients, in (0, 1]; at least one patient of every stratum.
    seed: another one draws another subset.

  Raises:
    ValueError: a share that is none.
  """
  if not 0 < share <= 1:
    raise ValueError(f'data.label_fraction={share}: must lie in (0, 1]')
  stratum = {}
  for group, name in zip(groups, strata):
    stratum.setdefault(group, name)
  members = collections.defaultdict(list)
  for group in sorted(stratum, key=lambda g: _hash(g, seed)):
    members[stratum[group]].append(group)
  kept = {g for part in members.values() for g in part[:max(1, math.floor(share * len(part) + .5))]}
  return [i for i, group in enumerate(groups) if group in kept]


def _hash(name: str, seed: int) -> int:
  return int.from_bytes(hashlib.blake2b(f'{seed} {name}'.encode(), digest_size=8).digest(), 'big')
