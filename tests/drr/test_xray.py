"""Attenuation models and image formation against their formulas."""
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax.drr import hu_to_mu, xray


@pytest.mark.parametrize('as_array', (np.asarray, jnp.asarray))
def test_hu_to_mu(as_array):
  hu = as_array(np.array([-3024, -1024, -1000, -500, 0, 500, 3000, 9000], np.int16))
  water = hu_to_mu(hu)
  assert water.dtype == np.float32 and isinstance(water, np.ndarray) == isinstance(hu, np.ndarray)
  np.testing.assert_allclose(water, [0, 0, 0, .01, .02, .03, .08, .08], rtol=1e-6)
  bone = hu_to_mu(hu, 'bone_soft')
  np.testing.assert_allclose(bone, [0, 0, 0, .0096, .0192, .03825, .1335, .1335], rtol=1e-5, atol=1e-9)
  assert float(bone.min()) >= 0
  low, high = -3024, 9000
  np.testing.assert_allclose(hu_to_mu(hu, 'minmax'), (np.asarray(hu, float) - low) / (high - low), rtol=1e-6)


@pytest.mark.parametrize('dtype', (np.uint8, np.int8, np.uint16, np.int32, np.float16))
def test_any_number_type(dtype):
  hu = np.array([0, 50, 100], dtype)
  np.testing.assert_allclose(hu_to_mu(hu), [.02, .021, .022], rtol=1e-6)
  array, unit = xray.attenuation(hu)
  np.testing.assert_allclose(array * np.float32(unit), [.02, .021, .022], rtol=1e-6)


@pytest.mark.parametrize('model', xray.MODELS)
def test_attenuation_is_array_times_unit(model):
  hu = np.array([[-2000, -1000, -300, 0, 700, 3000, 9000]], np.int16)
  array, unit = xray.attenuation(hu, model)
  assert array.dtype == (np.int16 if model == 'water' else np.float32)
  np.testing.assert_allclose(array * np.float32(unit), hu_to_mu(hu, model), rtol=1e-6)


def test_hu_to_mu_keeps_float64():
  assert hu_to_mu(np.zeros(3)).dtype == np.float64
  np.testing.assert_allclose(hu_to_mu(np.array([[0., 250.]]), mu_water=.02683), [[.02683, .0335375]], rtol=1e-12)


def test_half_value_layer():
  """ln 2 stops half of the photons: 34.66 mm of water at 0.02 per mm."""
  assert abs(xray.transmission(np.log(2)) - .5) < 1e-6
  depth = np.full(1, np.log(2) / .02) * hu_to_mu(np.zeros(1))
  np.testing.assert_allclose(xray.to_image(depth, 'transmission'), .5, rtol=1e-6)


def test_images():
  p = np.array([[0., .24], [.48, .96]], np.float32)
  np.testing.assert_allclose(xray.to_image(p, 'line', .48), [[0, .5], [1, 1]])
  np.testing.assert_allclose(xray.to_image(p, 'minmax'), [[0, .25], [.5, 1]], rtol=1e-6)
  np.testing.assert_allclose(xray.to_image(p, 'transmission'), 1 - np.exp(-p), rtol=1e-6)
  np.testing.assert_allclose(xray.to_image(p, 'line', .96, quantize=True) * 255, [[0, 64], [127, 255]], rtol=1e-6)


@pytest.mark.parametrize('as_array', (np.asarray, jnp.asarray))
def test_constant_image_has_no_nan(as_array):
  np.testing.assert_array_equal(xray.to_image(as_array(np.full((3, 4), .7, np.float32)), 'minmax'), 0)
  np.testing.assert_array_equal(hu_to_mu(as_array(np.full((2, 3, 4), -7, np.int16)), 'minmax'), 0)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match='water, bone_soft, minmax'):
    hu_to_mu(np.zeros(3), 'iron')
  with pytest.raises(ValueError, match='line, transmission, minmax'):
    xray.to_image(np.zeros((2, 2)), 'negative')


def test_workers_stay_light():
  """What a data worker imports brings neither jax nor torch."""
  code = ('import sys, unimiss_jax.drr, unimiss_jax.views.volume, unimiss_jax.views.image, data_pipelines.draw, '
          'data_pipelines.sample; print([m for m in ("jax", "flax", "torch", "scipy") if m in sys.modules])')
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
