"""Operations on CT views against scipy, stored outputs of the libraries of the released code, and closed forms."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from configs.common import base
from unimiss_jax.views import matrices, volume


@pytest.fixture(scope='module')
def ops(fixtures):
  return dict(np.load(fixtures / 'parity' / 'data_ops.npz'))


def column(value, n=4):
  return np.full(n, value, np.float32)


@pytest.mark.parametrize('as_array', (np.asarray, jnp.asarray))
def test_linear_resize(ops, as_array):
  x, expected = ops['resize/in_f64'] / 3, ops['resize/out_f64'] / 3    # within the range of HU
  y = volume.crop_resize(as_array(np.float32(x * 1024)), np.zeros(3), np.array(x.shape), np.zeros(3, bool),
                         (16, 96, 96), 'linear', -1024)
  assert y.dtype == np.float32
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize('sigma', ('0.1', '0.35', '1.3', '2.0'))
def test_blur(ops, sigma):
  for x in (ops['aug/in'], jnp.asarray(ops['aug/in'])):
    np.testing.assert_allclose(volume.blur(x, column(float(sigma)), 2.), ops[f'aug/gaussian_filter_{sigma}'], atol=1e-5)


@pytest.mark.parametrize('shape', ((3, 40, 36), (3, 5, 3)))
def test_blur_is_per_slice(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  sigma = np.array([0, .7, 2.], np.float32)
  expected = [x[0], *(scipy.ndimage.gaussian_filter(x[i], sigma[i], mode='reflect') for i in (1, 2))]
  for form in (np.asarray, jnp.asarray):
    y = volume.blur(form(x), form(sigma), 2.)
    np.testing.assert_allclose(y, expected, atol=1e-5)
  np.testing.assert_array_equal(volume.blur(x, sigma, 2.)[0], x[0])


@pytest.mark.parametrize('version, stats', [('0.19.7', 'bg0197'), ('0.25.5', 'fixed')])
def test_contrast_and_gamma(ops, version, stats):
  for x in (ops['aug/in'], jnp.asarray(ops['aug/in'])):
    np.testing.assert_allclose(volume.contrast(x, column(1.2)), ops[f'aug/bg{version}/contrast_1.2'], atol=1e-5)
    np.testing.assert_allclose(volume.gamma(x, column(1.4), 'slice', stats), ops[f'aug/bg{version}/gamma_1.4_retain'],
                               atol=1e-5)


def test_orders_of_statistics_differ(ops):
  x = ops['aug/in']
  fixed, released = (volume.gamma(x, column(1.4), 'slice', stats) for stats in ('fixed', 'bg0197'))
  difference = abs(fixed - released).max()
  np.testing.assert_allclose(difference, ops['aug/gamma_diff'], rtol=1e-3)


def test_units():
  """Per volume, all slices share mean, range and deviation."""
  x = np.random.default_rng(1).normal(size=(4, 10, 12)).astype(np.float32)
  flat = x.reshape(1, 40, 12)
  np.testing.assert_allclose(volume.contrast(x, column(1.2), 'volume').reshape(1, 40, 12),
                             volume.contrast(flat, column(1.2, 1), 'slice'), atol=1e-6)
  np.testing.assert_allclose(volume.gamma(x, column(.8), 'volume').reshape(1, 40, 12),
                             volume.gamma(flat, column(.8, 1), 'slice'), atol=1e-5)
  y = volume.gamma(x, column(.8))
  np.testing.assert_allclose(y.mean((1, 2)), x.mean((1, 2)), atol=1e-5)
  np.testing.assert_allclose(y.std((1, 2)), x.std((1, 2)), atol=1e-5)
  np.testing.assert_array_equal(volume.gamma(x, column(1.)), x)
  with pytest.raises(ValueError, match='slice or volume'):
    volume.contrast(x, column(1.), 'batch')


def test_constant_slices_stay_finite():
  x = np.full((2, 8, 8), -1, np.float32)
  np.testing.assert_allclose(volume.gamma(volume.contrast(x, column(1.2, 2)), column(1.4, 2)), x, atol=1e-6)


def test_noise_law():
  x = np.zeros((16, 40, 40), np.float32)
  key = np.array([7, 9], np.uint32)
  for form in (np.asarray, jnp.asarray):
    y = np.asarray(volume.noise(form(x), np.float32(.1), form(key)))
    np.testing.assert_allclose((y.mean(), y.std(), (y ** 4).mean()), (0, .1, 3e-4), rtol=.05, atol=2e-3)
    np.testing.assert_array_equal(y, volume.noise(form(x), np.float32(.1), form(key)))
    assert abs(y - np.asarray(volume.noise(form(x), np.float32(.1), form(key + 1)))).max() > .1


def test_area_resize_is_the_box_mean():
  x = np.random.default_rng(2).integers(-1024, 1024, (8, 12, 15)).astype(np.int16)
  y = volume.crop_resize(x, np.zeros(3), np.array(x.shape), (False,) * 3, (4, 4, 5), 'area', 0)
  np.testing.assert_allclose(y, x.reshape(4, 2, 4, 3, 5, 3).mean((1, 3, 5)) / 1024, atol=1e-6)
  # Fractional boxes: the integral of a staircase.
  edges = 1.3 + np.arange(6) * 7.7 / 5
  cumulative = np.concatenate([[0], np.cumsum(x[0, 0, :].astype(float))])
  expected = np.diff(np.interp(edges, np.arange(16), cumulative)) / np.diff(edges)
  np.testing.assert_allclose(matrices.resize('area', 1.3, 7.7, 15, 5) @ x[0, 0].astype(np.float32), expected, rtol=1e-5)


@pytest.mark.parametrize('kind', ('linear', 'area'))
@pytest.mark.parametrize('flip', [(False, True, True), (True, False, True)])
def test_crop_flip_and_padding(kind, flip):
  """Boxes beyond the volume see pad_hu; a flip mirrors the view; jax does the same."""
  rng = np.random.default_rng(3)
  x = rng.integers(-900, 900, (6, 9, 10)).astype(np.int16)
  start, size, out = np.array([-2, 3, -1], np.float32), np.array([8, 11, 9], np.float32), (4, 7, 6)
  padded = np.pad(x, ((2, 0), (0, 5), (1, 0)), constant_values=-800)
  plain = volume.crop_resize(padded, start + [2, 0, 1], size, (False,) * 3, out, kind, -1024)
  expected = np.flip(plain, np.flatnonzero(flip))
  for form in (np.asarray, jnp.asarray):
    y = volume.crop_resize(form(x), start, size, np.array(flip), out, kind, -800)
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_whole_slices_are_copied():
  x = np.random.default_rng(4).integers(-2000, 4000, (24, 40, 40)).astype(np.int16)
  y = volume.crop_resize(x, np.array([5., 4., 8.]), np.array([16., 32., 32.]), (True, False, False), (16, 32, 32),
                         'linear', -1024)
  np.testing.assert_allclose(y, np.clip(x[5:21, 4:36, 8:40], -1024, 3071)[::-1] / 1024, atol=1e-6)


def test_z_scores_are_not_clipped_and_end_in_their_own_background():
  """Stored numbers beyond the range of HU stay; with `pad` the leaf pad_hu is not asked."""
  cfg = base().views.ct
  cfg.size, cfg.pad_hu = (4, 8, 8), 0
  x = np.random.default_rng(6).integers(-9000, 9000, (4, 6, 6)).astype(np.int16)
  params = dict(box_start=np.array([0, -1, -1], np.float32), box_size=np.array([4, 8, 8], np.float32),
                flip=np.zeros(3, bool), noise_std=np.float32(0), noise_key=np.zeros(2, np.uint32), blur_sigma=column(0),
                mul=column(1), add=column(0), contrast=column(1), gamma=column(1))
  expected = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-1500) / 1024
  for form in (np.asarray, jnp.asarray):
    np.testing.assert_allclose(volume.view(form(x), params, cfg, np.float32(-1500)), expected, atol=1e-5)


def test_view_is_the_chain_on_host_and_device():
  rng, cfg = np.random.default_rng(5), base().views.ct
  cfg.size = (4, 16, 16)
  x = rng.integers(-1024, 1000, (8, 30, 28)).astype(np.int16)
  params = dict(box_start=np.array([2, 5, -3], np.float32), box_size=np.array([4, 18, 14], np.float32),
                flip=np.array([True, False, True]), noise_std=np.float32(0), noise_key=np.zeros(2, np.uint32),
                blur_sigma=np.array([0, .4, 1, 2], np.float32), mul=rng.uniform(.75, 1.25, 4).astype(np.float32),
                add=rng.normal(0, .4, 4).astype(np.float32), contrast=rng.uniform(.75, 1.25, 4).astype(np.float32),
                gamma=np.array([1, .7, 1.2, 1.5], np.float32))
  host = volume.view(x, params, cfg)
  assert host.shape == (4, 16, 16) and host.dtype == np.float32
  device = jax.jit(lambda x, p: volume.view(x, p, cfg))(jnp.asarray(x), params)
  np.testing.assert_allclose(host, device, atol=1e-5)
  y = volume.crop_resize(x, params['box_start'], params['box_size'], params['flip'], (4, 16, 16), 'linear', -1024)
  y = volume.blur(y, params['blur_sigma'], 2.) * params['mul'][:, None, None] + params['add'][:, None, None]
  np.testing.assert_allclose(host, volume.gamma(volume.contrast(y, params['contrast']), params['gamma']), atol=1e-5)


def test_unknown_resize_is_refused():
  with pytest.raises(ValueError, match='linear, area or bicubic'):
    matrices.resize('cubic', 0, 8, 8, 4)
