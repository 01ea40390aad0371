"""Operations on radiographs against Pillow, stored outputs and scipy."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from configs.common import base
from unimiss_jax.views import image


def test_crop_then_bicubic_as_stored(fixtures):
  data = np.load(fixtures / 'parity' / 'data_ops.npz')
  left, top, right, bottom = data['pil/box_left_top_right_bottom']
  for form in (np.asarray, jnp.asarray):
    y = image.crop_resize(form(data['pil/in_u8']), np.array([top, left]), np.array([bottom - top, right - left]),
                          np.array([False, False]), (96, 96), 'bicubic')
    assert abs(np.round(np.asarray(y) * 255) - data['pil/crop_bicubic_96']).max() <= 1


@pytest.mark.parametrize('box', [(0, 0, 200, 160), (11, 7, 190, 150), (50, 60, 55, 64)])
def test_bicubic_reduction_as_pillow(box):
  left, top, right, bottom = box
  x = np.random.default_rng(0).integers(0, 256, (160, 200)).astype(np.uint8)
  expected = np.asarray(Image.fromarray(x).crop(box).resize((48, 48), Image.BICUBIC).transpose(Image.FLIP_LEFT_RIGHT))
  y = image.crop_resize(x, np.array([top, left]), np.array([bottom - top, right - left]), (False, True), (48, 48),
                        'bicubic')
  assert abs(np.round(y * 255) - expected).max() <= 1


@pytest.mark.parametrize('dtype', (np.uint8, np.uint16, np.float32))
def test_area_and_full_range(dtype):
  white = 1 if dtype == np.float32 else np.iinfo(dtype).max
  x = (np.random.default_rng(1).random((20, 30)) * white).astype(dtype)
  y = image.crop_resize(x, np.zeros(2), np.array([20, 30]), (False, False), (10, 10), 'area')
  assert y.dtype == np.float32
  np.testing.assert_allclose(y, x.reshape(10, 2, 10, 3).mean((1, 3)) / white, rtol=1e-5)


@pytest.mark.parametrize('sigma', (.1, .6, 2.))
@pytest.mark.parametrize('shape', ((24, 40), (9, 30)))
def test_blur_is_kernel_23_mirrored(sigma, shape):
  x = np.random.default_rng(2).random(shape).astype(np.float32)
  taps = np.exp(-.5 * (np.arange(-11, 12) / sigma) ** 2)
  expected = x.astype(float)
  for axis in range(2):
    expected = scipy.ndimage.correlate1d(expected, taps / taps.sum(), axis, mode='mirror')
  for form in (np.asarray, jnp.asarray):
    np.testing.assert_allclose(image.blur(form(x), form(np.float32(sigma))), expected, atol=1e-5)


def params(**changes):
  numbers = {k: np.float32(v) for k, v in
             (dict(brightness=1, contrast=1, gamma=1, noise_std=0, blur_sigma=0) | changes).items()}
  return numbers | dict(contrast_first=bool(changes.get('contrast_first')), noise_key=np.array([3, 4], np.uint32))


def test_photometric_order():
  x = np.random.default_rng(3).random((12, 12)).astype(np.float32)
  clip = lambda y: np.clip(y, 0, 1)
  spread = lambda y: clip(y.mean() + (y - y.mean()) * 1.3)
  both = dict(brightness=1.4, contrast=1.3)
  np.testing.assert_allclose(image.photometric(x, params()), x, atol=1e-6)
  np.testing.assert_allclose(image.photometric(x, params(**both)), spread(clip(x * 1.4)), atol=1e-6)
  swapped = image.photometric(x, params(**both, contrast_first=True))
  np.testing.assert_allclose(swapped, clip(spread(x) * 1.4), atol=1e-6)
  np.testing.assert_allclose(image.photometric(x, params(gamma=.5)), np.sqrt(x), atol=1e-6)
  noisy = image.photometric(x, params(noise_std=.2, blur_sigma=1.))
  assert noisy.min() >= 0 and noisy.max() <= 1
  noise = image.noise(x, np.float32(.2), params()['noise_key'])
  np.testing.assert_allclose(noisy, clip(image.blur(noise, np.float32(1))), atol=1e-6)


def test_view_on_host_and_device():
  cfg = base().views.xray
  cfg.size = 24
  x = np.random.default_rng(4).integers(0, 65536, (50, 60)).astype(np.uint16)
  p = params(brightness=.8, contrast=1.2, contrast_first=True, gamma=1.3, blur_sigma=.9)
  p |= dict(box_start=np.array([3, 9], np.float32), box_size=np.array([40, 44], np.float32), flip=np.arange(2) > 0)
  host = image.view(x, p, cfg)
  assert host.shape == (24, 24) and host.dtype == np.float32
  np.testing.assert_allclose(host, jax.jit(lambda x, p: image.view(x, p, cfg))(jnp.asarray(x), p), atol=1e-5)
