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


@pytest.mark.parametrize('share', [0., -.1, 1.1])
def test_a_share_that_is_none(share):
  with pytest.raises(ValueError, match=r'must lie in \(0, 1\]'):
    fractions.nested(['a'], [['x']], share, 0)
