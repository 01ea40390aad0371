"""Stored z-scores against NumPy's percentiles, and the way back to the values."""
import numpy as np
import pytest

from data_pipelines import intensities
from data_pipelines.errors import DataError


def scan(seed=0, dtype=np.int16):
  """A third of background zeros, the rest skewed, with a few voxels far out."""
  rng = np.random.default_rng(seed)
  values = rng.gamma(3., 150., (18, 30, 28)) + 1
  values[rng.random(values.shape) < 1 / 3] = 0
  values[0, 0, :3] = 30000
  return values.astype(dtype)


@pytest.mark.parametrize('dtype', [np.int16, np.float32])
@pytest.mark.parametrize('modality', ['mr', 'other'])
def test_stored_numbers_are_z_scores_of_what_the_percentiles_leave(modality, dtype):
  array = scan(dtype=dtype)
  values = array.astype(np.float64)
  foreground = values[values != 0] if modality == 'mr' else values
  low, high = np.percentile(foreground, [.5, 99.5])
  clipped = np.clip(foreground, low, high)
  stored, found = intensities.standardised(array, modality, 'x')
  assert stored.dtype == np.int16 and stored.shape == array.shape
  z = (np.clip(values, low, high) - clipped.mean()) / clipped.std()
  np.testing.assert_allclose(stored / 1024, z, rtol=0, atol=.5 / 1024 + 1e-5)
  inside = (stored / 1024)[values != 0] if modality == 'mr' else stored / 1024
  half = .5 / 1024    # what rounding may do to both
  assert inside.mean() == pytest.approx(0, abs=half) and inside.std() == pytest.approx(1, abs=half)
  assert found['pad'] == stored.min() == np.rint(1024 * (low - clipped.mean()) / clipped.std())


def test_the_way_back():
  array = scan(dtype=np.float32)
  low, high = np.percentile(array[array != 0], [.5, 99.5])
  stored, found = intensities.standardised(array, 'mr', 'x')
  back = stored * float(found['scale']) + float(found['offset'])
  np.testing.assert_allclose(back, np.clip(array, low, high), rtol=0, atol=float(found['scale']) * .5001)


def test_another_unit_and_another_zero_give_the_same_numbers():
  """Of 'other' an offset does not matter; of MR a factor does not."""
  array = scan(dtype=np.float32)
  for modality, same in (('mr', 7.5 * array), ('other', 7.5 * array - 400)):
    stored = [intensities.standardised(a, modality, 'x')[0].astype(int) for a in (array, same)]
    assert abs(stored[0] - stored[1]).max() <= 1


def test_int16_holds_the_worst_case():
  """All but half a percent have one value: the rest is sqrt(199) deviations away."""
  array = np.ones((10, 40, 50), np.int16)
  array.flat[:101] = 30000
  stored, _ = intensities.standardised(array, 'other', 'x')
  assert stored.max() == pytest.approx(1024 * np.sqrt(199), rel=.01)


@pytest.mark.parametrize('modality, array', [
    ('mr', np.zeros((3, 4, 5), np.int16)), ('mr', np.tile(np.int16([0, 7]), (3, 4, 3))),
    ('other', np.full((3, 4, 5), 2.5, np.float32)), ('mr', np.where(np.arange(4000) < 5, 9, 4).reshape(10, 20, 20))])
def test_what_cannot_be_scaled_is_refused(modality, array):
  with pytest.raises(DataError, match='CONSTANT x.nii: 99 % of its foreground have the value'):
    intensities.standardised(array, modality, 'x.nii')
