"""Label fractions: nested, by patient, every class in every share, the same on every machine."""
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import fractions

RNG = np.random.default_rng(0)
GROUPS = [f'p{i}' for i in RNG.integers(0, 120, 300)]
CLASS = {g: [('a', 'b', 'c')[i]] for g, i in zip(sorted(set(GROUPS)), RNG.choice(3, 300, p=[.8, .17, .03]))}
CLASSES = [CLASS[g] for g in GROUPS]


def test_a_smaller_share_lies_in_every_larger_one_and_patients_are_whole():
  last = set()
  for share in (.01, .05, .2, .5, 1.):
    chosen = fractions.nested(GROUPS, CLASSES, share, 0)
    mine = {GROUPS[i] for i in chosen}
    assert chosen == [i for i, g in enumerate(GROUPS) if g in mine]
    assert last <= mine
    last = mine
  assert last == set(GROUPS)


def test_every_class_is_there_in_its_proportion():
  for share in (.01, .1, .5):
    mine = {GROUPS[i] for i in fractions.nested(GROUPS, CLASSES, share, 3)}
    for name in 'abc':
      whole = [g for g in CLASS if CLASS[g] == [name] and g in GROUPS]
      kept = sum(g in mine for g in whole)
      assert kept == max(1, int(share * len(whole) + .5)), (share, name)


def test_a_patient_with_several_classes_and_one_with_none():
  groups, classes = list('abcdefgh'), [['x'], ['x', 'y'], [], [], ['x'], ['x'], ['x'], []]
  mine = {groups[i] for i in fractions.nested(groups, classes, .01, 0)}
  assert 'b' in mine and mine & set('cdh')        # the only y; one without any class


def test_another_seed_is_another_draw_and_another_process_is_not():
  chosen = fractions.nested(GROUPS, CLASSES, .2, 0)
  assert chosen != fractions.nested(GROUPS, CLASSES, .2, 1)
  code = (f'from data_pipelines import fractions; '
          f'print(fractions.nested({GROUPS}, {CLASSES}, .2, 0))')
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
  assert found.strip() == str(chosen)


def test_patients_come_in_the_order_of_their_hashes():
  """Of the program b2sum: printf '3 p9' | b2sum -l 64 is the least, then p11, p4, p6, p3."""
  groups = [f'p{i}' for i in range(12)]
  assert fractions.nested(groups, [['a']] * 12, 1 / 3, 3) == [4, 6, 9, 11]
  assert fractions.nested(groups[::-1], [['a']] * 12, 5 / 12, 3) == [0, 2, 5, 7, 8]
  assert fractions.nested(groups, [[]] * 12, .01, 3) == [9]


def test_many_findings_at_once_do_not_swell_a_share():
  """As in chest radiographs: hundreds of combinations, of which each has a patient or two."""
  rng = np.random.default_rng(0)
  groups, some = [f'p{i}' for i in range(1000)], rng.random((1000, 14)) < .3
  classes = [[f'c{k}' for k in np.flatnonzero(row)] for row in some]
  assert len({tuple(c) for c in classes}) > 700
  last = set()
  for share in (.01, .1, .5):
    mine = set(fractions.nested(groups, classes, share, 0))
    assert abs(len(mine) - 1000 * share) <= 15 and last <= mine and some[list(mine)].any(0).all()
    last = mine


@pytest.mark.parametrize('share', [0., -.1, 1.1])
def test_a_share_that_is_none(share):
  with pytest.raises(ValueError, match=r'must lie in \(0, 1\]'):
    fractions.nested(['a'], [['x']], share, 0)
