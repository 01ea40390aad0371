"""Films in any position: ray tracing in float64, closed forms, and the angles of a view."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import base
from data_pipelines import draw, sample
from unimiss_jax.drr import Detector, geometry, project

ANGLES = {'tilt_20_10': (20, 10, 0), 'tilt_5_3_15': (5, 3, 15)}    # yaw, pitch, roll


def load(fixtures, name, dtype=np.float64):
  data = np.load(fixtures / 'drr' / f'{name}.npz')
  film = Detector(data['siddon64'].shape, data['det_origin'], data['det_dv'], data['det_du'])
  return data, (data['volume'].astype(dtype), data['spacing'], data['source'], film)


def error(a, b):
  return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize('kind, reference', [('box', 'siddon64_area8x8'), ('linear', 'trilinear64')])
@pytest.mark.parametrize('name', ANGLES)
def test_tilted_detectors(fixtures, name, kind, reference):
  data, args = load(fixtures, name)
  image = project(*args, kind)
  assert image.dtype == np.float64
  assert error(image, data[reference]) < 2e-2


@pytest.mark.parametrize('kind', ('box', 'linear', 'bspline'))
@pytest.mark.parametrize('name', ANGLES)
def test_host_and_device_agree(fixtures, name, kind):
  image = project(*load(fixtures, name)[1], kind)
  volume, spacing, source, film = load(fixtures, name, np.float32)[1]
  host = project(volume, spacing, source, film, kind)
  device = jax.jit(jax.vmap(lambda v: project(v, spacing, source, film, kind)))(volume[None])[0]
  assert host.dtype == device.dtype == np.float32
  assert error(host, image) < 1e-5 and error(device, image) < 1e-5
  with jax.enable_x64(True):
    wide = project(jnp.asarray(volume, jnp.float64), spacing, source, film, kind)
    assert wide.dtype == np.float64 and error(wide, image) < 1e-12
    assert project(jnp.asarray(volume), spacing, source, film, kind).dtype == np.float32


@pytest.mark.parametrize('name', ANGLES)
def test_angles(fixtures, name):
  """The stored vectors, on the axes along the beam, down and right, which are z, -y, -x of the axial view."""
  data, (_, _, source, film) = load(fixtures, name)
  pitch = np.linalg.norm(film.row_step_mm) * .9
  ours, detector = geometry.camera('axial', (0, 0), (pitch, pitch), film.shape, tilt_deg=ANGLES[name])
  for vector, expected in zip((ours, *detector[1:]), (source, *film[1:])):
    np.testing.assert_allclose(np.array(vector) * (1, -1, -1), expected, atol=1e-9)


@pytest.mark.parametrize('view', geometry.VIEWS)
def test_a_tilted_view_keeps_its_subject(view):
  """The ray to the centre of the film passes through the centre of the window; here the source is above it."""
  window = (view, (30., -50.), (1.5, -1.2), (7, 9), 2000., 1800., (30., -50.))
  flat, tilted = (geometry.camera(*window, tilt_deg=tilt) for tilt in ((0, 0, 0), (11., -23., 40.)))
  centers = [np.add(f.origin_mm, 3 * np.array(f.row_step_mm) + 4 * np.array(f.col_step_mm)) for _, f in (flat, tilted)]
  march, *displayed = geometry.VIEWS[view].axes
  subject = np.zeros(3)
  subject[displayed] = -30., 50.
  for (source, _), center in zip((flat, tilted), centers):
    np.testing.assert_allclose(np.array(source) + .9 * (center - source), subject, atol=1e-9)
  assert np.linalg.norm(subject - tilted[0]) == pytest.approx(1800)
  assert abs(tilted[0][march]) == pytest.approx(1800 * np.cos(np.deg2rad(11)) * np.cos(np.deg2rad(23)))


@pytest.mark.parametrize('start, tilt, end, shown', [
    ('axial', (0, 90, 0), 'ap', np.array), ('ap', (0, -90, 0), 'axial', np.array),
    ('pa', (90, 0, 0), 'lateral', np.array), ('lateral', (90, 0, 0), 'ap', np.fliplr),
    ('ap', (180, 0, 0), 'pa', np.fliplr), ('ap', (0, 0, 90), 'ap', lambda image: np.rot90(image, -1))])
def test_right_angles_are_other_views(start, tilt, end, shown):
  """Down from the axial beam is the back, right of the beam from behind is the left side, and so on."""
  volume, spacing = np.random.default_rng(0).random((8, 9, 10)), (1.5, 1., .8)
  a = project(volume, spacing, *geometry.camera(start, (0, 0), (.9, .9), (12, 12), tilt_deg=tilt))
  b = project(volume, spacing, *geometry.camera(end, (0, 0), (.9, .9), (12, 12)))
  np.testing.assert_allclose(a, shown(b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('view, tilt', [
    ('axial', (3, 2, 5)), ('ap', (10, -5, 10)), ('lateral', (-30, 10, 0)), ('pa', (0, 44, -100)), ('axial', (46, 0, 0)),
    ('ap', (20, -60, 170)), ('lateral', (135, 35, 30))])
def test_gaussian(view, tilt):
  """The line integral of a Gaussian falls with the distance of the ray from its centre; it lies off the centre."""
  spacing, sigma, center = np.array((2., 1., 1.2)), 9., np.array((6., -4., 3.))
  shape = (48, 90, 76)
  at = [(np.arange(n) - (n - 1) / 2) * s - c for n, s, c in zip(shape, spacing, center)]
  volume = np.exp(-sum(x ** 2 for x in np.ix_(*at)) / (2 * sigma ** 2))
  source, film = geometry.camera(view, (2., -3.), (1.3, -1.7), (40, 31), 900., 700., (20., -30.), tilt)
  pixels = (np.array(film.origin_mm) + np.arange(40)[:, None, None] * np.array(film.row_step_mm) +
            np.arange(31)[:, None] * np.array(film.col_step_mm))
  ray = (pixels - source) / np.linalg.norm(pixels - source, axis=-1, keepdims=True)
  distance = np.linalg.norm(np.cross(center - source, ray), axis=-1)
  expected = np.sqrt(2 * np.pi) * sigma * np.exp(-distance ** 2 / (2 * sigma ** 2))
  for kind in ('box', 'linear'):
    assert error(project(volume, spacing, source, film, kind), expected) < 1e-2
  thin = film._replace(shape=(1, 31))    # a single row
  np.testing.assert_allclose(project(volume, spacing, source, thin), expected[:1], atol=2e-2 * expected.max())


@pytest.mark.parametrize('tilt', [(20., 10., 5.), (-70., 0., 0.)])
def test_rays_beside_the_volume_are_zero(tilt):
  """A film much larger than the shadow, where only rays through the box see anything."""
  volume = np.ones((10, 12, 14))
  source, film = geometry.camera('axial', (0, 0), (2., 2.), (40, 40), 300., 200., tilt_deg=tilt)
  image = project(volume, (1, 1, 1), source, film, 'linear')
  pixels = (np.array(film.origin_mm) + np.arange(40)[:, None, None] * np.array(film.row_step_mm) +
            np.arange(40)[:, None] * np.array(film.col_step_mm))
  ray = pixels - source
  near, far = (np.array([s * n / 2 for n in volume.shape]) for s in (-1.3, 1.3))    # 30 percent wider
  with np.errstate(divide='ignore'):
    t = np.stack([(near - source) / ray, (far - source) / ray])
  missed = t.min(0).max(-1) > t.max(0).min(-1)
  assert missed.mean() > .5 and image.any() and not image[missed].any()


def test_gradient_through_a_tilted_view():
  volume = jnp.asarray(np.random.default_rng(1).random((8, 9, 10)), jnp.float32)
  camera = geometry.camera('pa', (0, 0), (.9, .9), (12, 12), tilt_deg=(8., 3., 20.))
  image, pull = jax.vjp(lambda v: project(v, (1., 1., 1.), *camera), volume)
  other = jnp.asarray(np.random.default_rng(2).random((12, 12)), jnp.float32)
  np.testing.assert_allclose(jnp.vdot(image, other), jnp.vdot(volume, pull(other)[0]), rtol=1e-5)


@pytest.mark.parametrize('change, message', [
    (dict(source_mm=(-3., 0., 0.)), 'inside the volume'),
    (dict(origin_mm=(3., -4., -4.)), 'not behind the volume'),
    (dict(origin_mm=(40., 60., -4.)), 'misses the volume'),
    (dict(row_step_mm=(-90., 15., 0.), origin_mm=(400., -60., -4.)), r'pixel \[8, 0\] does not cross'),
    (dict(volume=np.full((8, 9, 10), np.nan)), 'NaN'),
])
def test_refusals(change, message):
  args = dict(volume=np.ones((8, 9, 10)), source_mm=(-300., 0., 0.), origin_mm=(40., -4., -4.),
              row_step_mm=(.2, 1., 0.)) | change
  film = Detector((9, 9), args['origin_mm'], args['row_step_mm'], (0., 0., 1.))
  with pytest.raises(ValueError, match=message):
    project(args['volume'], (1, 1, 1), args['source_mm'], film)


def test_training_views_are_tilted():
  """Angles are uniform, and the image of a record is that of the tilted camera; without tilt nothing changes."""
  config = base()
  config.views.ct.size, config.views.drr.size = (8, 32, 32), 24
  config.views.drr.blur_p, config.views.drr.jitter_p = (0., 0.), 0.
  shape, spacing = (20, 70, 64), (2., 1.5, 1.2)
  still = draw.ct_pair(np.random.default_rng(0), config, shape, spacing)['drr']
  assert (still['tilt_deg'] == 0).all()
  config.drr.tilt_deg = 15.
  angles = np.array([draw.ct_pair(np.random.default_rng(i), config, shape, spacing)['drr']['tilt_deg']
                     for i in range(500)])
  assert angles.shape == (500, 2, 3) and abs(angles).max() <= 15
  assert abs(angles.mean()) < 3 * 15 / np.sqrt(3 * angles.size)
  np.testing.assert_allclose(angles.std((0, 1)), 15 / np.sqrt(3), rtol=.1)
  params = draw.ct_pair(np.random.default_rng(0), config, shape, spacing)
  for name, values in still.items():
    if name != 'tilt_deg':
      np.testing.assert_array_equal(values, params['drr'][name])
  hu = np.random.default_rng(3).integers(-1000, 1000, shape).astype(np.int16)
  images = sample.ct_sample(dict(volume=hu, spacing_mm=spacing), params, config)['drr'][..., 0]
  p_ref = sample.white('axial', shape, spacing, 'water')
  for v, image in enumerate(images):
    window = [params['drr'][name][v] for name in ('center_mm', 'pitch_mm', 'tilt_deg')]
    camera = geometry.camera('axial', *window[:2], (24, 24), tilt_deg=window[2])
    expected = project((hu + 1000.) * 2e-5, spacing, *camera) / p_ref    # wherever the film is
    np.testing.assert_allclose(image, expected.clip(0, 1), atol=1e-5)
    flat = project((hu + 1000.) * 2e-5, spacing, *geometry.camera('axial', *window[:2], (24, 24))) / p_ref
    assert error(flat, expected) > .02


@pytest.mark.parametrize('view', geometry.VIEWS)
def test_no_tilted_view_is_beside_the_volume(view):
  """Thin strips and wide volumes included."""
  config = base()
  config.views.ct.size, config.views.drr.size, config.drr.view, config.drr.tilt_deg = (8, 16, 16), 8, view, 30.
  shape, spacing = (12, 16, 20), (2., 30., 20.)
  record = dict(volume=np.full(shape, 500, np.int16), spacing_mm=spacing)
  for seed in range(60):
    params = draw.ct_pair(np.random.default_rng(seed), config, shape, spacing)
    assert sample.ct_sample(record, params, config)['drr'].any((1, 2, 3)).all()
