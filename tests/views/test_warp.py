"""Turned and deformed views against closed forms: quarter turns, linear functions, the law of the displacement."""
import numpy as np
import pytest
from scipy import ndimage

from data_pipelines import cases, draw
from tests.data_pipelines.test_cases import CALM, config, squares
from unimiss_jax.views import image, volume, warp


def plain(size, start, extent, n):
  return {'box_start': np.array(start, np.float32), 'box_size': np.array(extent, np.float32), 'flip': np.zeros(n, bool)}


def test_a_quarter_turn_is_that_of_the_array():
  x = np.random.default_rng(0).random((6, 8, 8)).astype(np.float32)
  cut = lambda start, size, out: volume.crop_resize(x * 1024, start, size, (0, 0, 0), out, 'linear', 0, None)
  for degrees, axes in (((90, 0, 0), (2, 1)), ((-90, 0, 0), (1, 2))):
    p = plain(x.shape, (0, 0, 0), x.shape, 3) | {'grid': warp.grid(warp.rotation(degrees), x.shape)}
    np.testing.assert_allclose(warp.view(cut, p, np.array(x.shape)), np.rot90(x, 1, axes), atol=1e-5)
    np.testing.assert_array_equal(warp.labels(x, p, x.shape), np.rot90(x, 1, axes))
  p = plain((8, 8), (0, 0), (8, 8), 2) | {'grid': warp.grid(warp.rotation([90]), (8, 8))}
  cut = lambda start, size, out: image.crop_resize(x[0], start, size, (0, 0), out, 'area')
  np.testing.assert_allclose(warp.view(cut, p, np.array((8, 8))), np.rot90(x[0], -1), atol=1e-5)


def test_rotations_turn_millimetres_and_keep_lengths():
  turn = warp.rotation((20, -35, 50))
  np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
  assert np.linalg.det(turn) == pytest.approx(1)
  # about x alone: what lies in front (z) moves in the plane (z, y), x stays
  np.testing.assert_allclose(warp.rotation((0, 0, 90)) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_a_linear_volume_is_linear_along_the_turned_axes():
  """Slices of 5 mm, pixels of 1.5 mm: a function of millimetres is shown where the turned grid lies, corners too."""
  spacing, shape, size = np.array([5., 1.5, 1.5]), (40, 120, 120), (12, 32, 32)
  slope = np.array([2., -3., 1.])      # HU / mm
  mm = np.stack(np.meshgrid(*((np.arange(n) + .5) * s for n, s in zip(shape, spacing)), indexing='ij'))
  x = np.tensordot(slope, mm, 1).astype(np.float32)
  task = config('seg3d', **{'task.rotate': (25., 25., 25.)}).task
  p = {k: v[None] for k, v in plain(size, (14, 30, 40), (12, 40, 36), 3).items()}
  got = draw.warped(np.random.default_rng(3), task, p, size, spacing)
  one = {k: v[0] for k, v in got.items()}
  cut = lambda start, extent, out: volume.crop_resize(x, start, extent, (0, 0, 0), out, 'linear', 0, None) * 1024
  rng = np.random.default_rng(3)
  turn = warp.rotation(rng.uniform(-1, 1, 3) * 25)
  pixel = one['box_size'] * spacing / size
  centre = (one['box_start'] + one['box_size'] / 2) * spacing
  places = np.stack(np.meshgrid(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, pixel)), indexing='ij'))
  want = np.tensordot(slope, np.tensordot(turn, places, 1) + centre.reshape(3, 1, 1, 1), 1)
  np.testing.assert_allclose(warp.view(cut, one, np.array(size)), want, atol=.02)


def test_shear_moves_rows_by_their_height():
  task = config('seg2d', **{'task.shear': 45.}).task
  p = {k: v[None] for k, v in plain((16, 16), (8, 8), (16, 16), 2).items()}
  one = {k: v[0] for k, v in draw.warped(np.random.default_rng(1), task, p, (16, 16), (1., 1.)).items()}
  y, x = one['grid'] - warp.grid(np.eye(2), (16, 16))
  assert abs(x).max() == 0 < abs(y).max()
  across = np.arange(16) - 7.5
  np.testing.assert_allclose(y, np.broadcast_to(y[0, -1] / 7.5 * across, (16, 16)), atol=1e-5)


def test_elastic_displacement_has_the_law_of_smoothed_noise():
  """Variance of white noise in [-1, 1] behind a Gaussian in the plane: alpha^2 / 3 / (4 pi sigma^2)."""
  field = warp.elastic(np.random.default_rng(0), (512, 512), 100., 4.)[:, 20:-20, 20:-20]
  assert field.shape[0] == 2 and field.std() == pytest.approx(100 / np.sqrt(3 * 4 * np.pi * 16), rel=.05)
  assert abs(field.mean()) < .5


def test_nothing_drawn_is_nothing_changed():
  task, p = config('seg3d').task, {k: v[None] for k, v in plain((8,) * 3, (0,) * 3, (8,) * 3, 3).items()}
  rng = np.random.default_rng(0)
  assert draw.warped(rng, task, p, (8, 8, 8), (1., 1., 1.)) is p
  assert rng.random() == np.random.default_rng(0).random()      # runs without it see the numbers that they saw


@pytest.mark.parametrize('preset', ['phantom_seg3d', 'phantom_seg2d'])
def test_image_and_mask_stay_together(preset):
  calm = {f'views.ct.{k}': v for k, v in CALM.items()} if '3d' in preset else {
      'views.xray.updown_p': .5, 'views.xray.jitter_p': 0., 'views.xray.blur_p': (0., 0.),
      'views.xray.noise_std': (0., 0.), 'views.xray.gamma_p': (0., 0.)}
  name = 'ct' if '3d' in preset else 'xray'
  c = config(preset, **calm, **{f'views.{name}.flip_p': .5, 'task.rotate': (25., 15., 15.), 'task.shear': 5.,
                                'task.elastic': (100., 200.), 'task.elastic_p': .7, 'task.classes': ('square',),
                                'task.exclusive': True})
  mask = squares((40, 96, 96), 10) if name == 'ct' else squares((160, 150), 20)
  record = {'volume': mask.astype(np.int16) * 1000, 'image': mask * np.uint8(255), 'mask': mask,
            'spacing_mm': (2., 1., 1.)}
  rng, shown = np.random.default_rng(0), []
  for _ in range(8):
    made = cases.view(name, record, c, rng)
    x = made['ct'][0, ..., 0] * 1.024 if name == 'ct' else made['xray'][0, ..., 0]
    assert x.shape == made['mask'].shape
    label = made['mask']
    inner = ndimage.minimum_filter(label, 3) == ndimage.maximum_filter(label, 3)      # no edge beside it, nor the
    inner &= ndimage.minimum_filter(x, 3) > -.2                                       # padding, which is -1
    inner &= np.pad(np.ones(np.subtract(x.shape, 2), bool), 1)                        # what is beyond is not seen
    shown.append(inner.mean())
    np.testing.assert_array_equal(label[inner], x[inner] > .5)
  assert min(shown) > .1
