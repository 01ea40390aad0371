"""Duplicates against brute force, and against pairs that are known."""
import itertools

import numpy as np
import pytest

from data_pipelines import duplicates, judgement, readers


def pictures(n, seed=0):
  """Smooth pictures that are far from each other."""
  coarse = np.random.default_rng(seed).normal(size=(n, 8, 8))
  return [p.repeat(4, 0).repeat(4, 1).astype(np.float32) for p in coarse]


def brute(stack):
  """Correlation of every pair in the nearest of the 8 forms, by np.corrcoef."""
  out = np.eye(len(stack))
  for i, j in itertools.combinations(range(len(stack)), 2):
    turned = [np.rot90(m, k) for m in (stack[i], stack[i].T) for k in range(4)]
    out[i, j] = max(np.corrcoef(t.ravel(), stack[j].ravel())[0, 1] for t in turned)
  return out


@pytest.mark.parametrize('form', range(8))
def test_a_turned_or_mirrored_copy_is_found(form):
  stack = pictures(6)
  turned = duplicates.forms(stack[2][None])[form][0]
  noise = np.random.default_rng(1).normal(scale=.05, size=turned.shape)
  found = duplicates.images([*stack, (3 * turned + 7 + noise).astype(np.float32)])
  assert [(p.first, p.second) for p in found] == [(2, 6)]
  assert found[0].how == '1.000' + (f', {duplicates.FORMS[form]}' if form else '')


def test_the_forms_are_those_that_they_are_called():
  picture = np.arange(9).reshape(1, 3, 3)
  made = {name: form[0] for name, form in zip(duplicates.FORMS, duplicates.forms(picture))}
  np.testing.assert_array_equal(made['mirrored'], picture[0, :, ::-1])
  np.testing.assert_array_equal(made['turned by 180 deg'], picture[0, ::-1, ::-1])
  assert len({form.tobytes() for form in made.values()}) == 8


def test_no_pair_is_missed_or_made_up(monkeypatch):
  rng = np.random.default_rng(3)
  stack = pictures(20, 4)
  for scale in (.05, .1, .12, .15, .2, .3):    # on both sides of the limit
    stack += [p + rng.normal(scale=scale, size=p.shape).astype(np.float32) for p in stack[:10]]
    stack[-1] = np.rot90(stack[-1], 3)
  expected = brute(stack)
  monkeypatch.setattr(duplicates, 'BLOCK', 16)
  found = {(p.first, p.second): float(p.how.split(',')[0]) for p in duplicates.images(stack)}
  assert found.keys() == {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(expected, 1) > duplicates.ALIKE))}
  assert len(found) > 10
  assert all(value == pytest.approx(expected[pair], abs=6e-4) for pair, value in found.items())


def test_flat_pictures_and_few_pictures_are_like_no_other():
  flat = np.full((32, 32), 7, np.float32)
  assert duplicates.images([flat, flat, pictures(1)[0]]) == []
  assert duplicates.images([]) == [] and duplicates.images(pictures(1)) == []


def test_equal_bytes_are_paired_with_the_first():
  assert duplicates.equal(['a', 'b', None, 'a', None, 'a']) == [(0, 3, 'equal bytes'), (0, 5, 'equal bytes')]


def test_volumes_that_share_slices():
  rng = np.random.default_rng(0)
  whole = rng.integers(-1000, 1000, (60, 12, 10)).astype(np.int16)
  air = np.full((30, 12, 10), -1024, np.int16)
  parts = {'whole': whole, 'eight': np.concatenate([air, whole[20:28], -whole[:30]]), 'seven': whole[:7] * 2,
           'few': np.concatenate([whole[50:57], -whole[30:60]]), 'mirrored': whole[:, :, ::-1], 'air': air,
           'float': whole[4:14].astype(np.float32) + .25, 'other shape': whole.reshape(60, 10, 12)}
  names = list(parts)
  found = duplicates.volumes([duplicates.slice_hashes(v) for v in parts.values()])
  assert [(names[p.first], names[p.second], p.how) for p in found] == [
      ('whole', 'eight', '8 equal slices'), ('whole', 'float', '10 equal slices')]


def test_of_tiles_a_quarter_is_enough():
  whole = np.random.default_rng(0).integers(-1000, 1000, (60, 12, 10)).astype(np.int16)
  tile = lambda z: duplicates.slice_hashes(whole[z:z + 24])
  assert [p[:2] for p in duplicates.volumes([tile(0), tile(18), tile(36)])] == [(0, 1), (1, 2)]
  assert duplicates.volumes([tile(0), tile(19)]) == []


def test_a_slice_that_many_volumes_hold_does_not_cost_all_pairs():
  crowd = [tuple(bytes([0, k]) for k in range(10))] * 300
  found = duplicates.volumes(crowd)
  assert [p[:2] for p in found] == [(i, i + 1) for i in range(299)]


def test_places_in_a_list_of_all_kinds():
  one, two = pictures(2)
  hashes = duplicates.slice_hashes(np.random.default_rng(0).integers(0, 9, (16, 8, 8)).astype(np.int16))
  found = duplicates.pairs(['a', 'b', 'c', 'd', 'a', None], [None, one, two, one, None, None],
                           [hashes, None, None, None, hashes, None])
  assert found == [(0, 4, 'equal bytes'), (1, 3, '1.000')]


@pytest.mark.realdata
def test_the_turned_radiographs_are_found_among_all(shared):
  files = sorted((shared / 'data/cxr/nih').glob('*.png')) + sorted((shared / 'data/odd/cxr_rotated').glob('*.png'))
  found = duplicates.images([judgement.small(readers.image(f).array) for f in files])
  assert [(files[p.first].name, files[p.second].name) for p in found] == [('00000061_025.png',) * 2,
                                                                         ('00001880_006.png',) * 2]
  assert all('turned' in p.how for p in found)


@pytest.mark.realdata
def test_overlapping_tiles_and_a_crop_are_found(shared):
  files = sorted((shared / 'data/ct').glob('deeplesion/*')) + sorted((shared / 'data/ct').glob('totalseg_*'))
  found = duplicates.volumes([duplicates.slice_hashes(readers.volume(f).array) for f in files])
  assert [(files[p.first].name, files[p.second].name, p.how) for p in found] == [
      ('000001_01_01_103-115_dep2.nii.gz', '000001_01_01_103-115_dep4.nii.gz', '7 equal slices'),
      ('totalseg_example_ct.nii.gz', 'totalseg_example_ct_sm.nii.gz', '30 equal slices')]
