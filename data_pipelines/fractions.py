"""Shares of a labelled training set: seeded, nested, by patient, every class in every share. Chosen by us."""
import collections
import hashlib
import math


def nested(groups, classes, share: float, seed: int) -> list[int]:
  """Indices of a share of the samples, in order.

  A patient counts as one of the rarest class that any sample of it has. The patients of a class are shuffled by a hash
  of their name, so that the same share is drawn on every machine, and a smaller share lies in every larger one. The
  first patient that has a class is in every share, so none is lost.

  Args:
    groups: patient of each sample.
    classes: the classes that each sample has, any number of them; none is a class of its own.
    share: of the patients of each class, in (0, 1].
    seed: another one draws another subset.

  Raises:
    ValueError: a share that is none.
  """
  if not 0 < share <= 1:
    raise ValueError(f'data.label_fraction={share}: must lie in (0, 1]')
  found = collections.defaultdict(set)
  for group, names in zip(groups, classes):
    found[group].update(names)
  found = {group: sorted(found[group]) or [''] for group in sorted(found, key=lambda g: _hash(g, seed))}
  count = collections.Counter(name for names in found.values() for name in names)
  members, kept = collections.defaultdict(list), {}
  for group, names in found.items():
    members[min(names, key=lambda name: count[name])].append(group)
    kept |= {name: group for name in names if name not in kept}
  chosen = set(kept.values()).union(*(part[:math.floor(share * len(part) + .5)] for part in members.values()))
  return [i for i, group in enumerate(groups) if group in chosen]


def _hash(name: str, seed: int) -> int:
  return int.from_bytes(hashlib.blake2b(f'{seed} {name}'.encode(), digest_size=8).digest(), 'big')
