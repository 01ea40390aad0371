"""Projections against closed forms, ray tracing in float64 and properties of the line integral."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from unimiss_jax.drr import Detector, geometry, hu_to_mu, project

NAMES = ('box_ax0', 'box_ax1', 'box_ax2', 'ellipsoid', 'smooth_ax0', 'smooth_ax1', 'smooth_ax2', 'chest_slab_ax0',
         'chest_slab_ax1', 'wide_cone_box', 'wide_cone_smooth', 'bead')
# (fixture, kind, reference of that signal model, limit)
CASES = [(f'box_ax{i}', 'linear', 'analytic', 5e-3) for i in range(3)] + [
    (f'box_ax{i}', 'box', 'siddon64_area8x8', 1.5e-2) for i in range(3)] + [
    ('ellipsoid', 'linear', 'trilinear64', 1e-4), ('ellipsoid', 'box', 'siddon64_area8x8', 5e-3)] + [
    (f'smooth_ax{i}', 'linear', 'trilinear64', 6e-3) for i in range(3)] + [
    (f'smooth_ax{i}', 'box', 'siddon64_area8x8', 1.2e-2) for i in range(3)] + [
    (f'chest_slab_ax{i}', 'linear', 'trilinear64', 3e-3) for i in range(2)] + [
    (f'chest_slab_ax{i}', 'box', 'siddon64_area8x8', 7e-3) for i in range(2)] + [
    (f'wide_cone_{name}', 'box', 'siddon64_area8x8', 2e-3) for name in ('box', 'smooth')] + [
    (f'wide_cone_{name}', 'linear', 'trilinear64', 1e-2) for name in ('box', 'smooth')]
AFFINES = ('RAS', 'LPS', 'LAS', 'PLI', 'SRP', 'ILA')
DISPLAYS = {'AP': 'ap', 'AX': 'axial', 'LAT': 'lateral'}


def load(fixtures, name, dtype=np.float64):
  data = dict(np.load(fixtures / 'drr' / f'{name}.npz'))
  volume = hu_to_mu(data['volume'], mu_water=float(data['mu_water'])) if data['is_hu'] else data['volume']
  film = Detector(data['siddon64'].shape, data['det_origin'], data['det_dv'], data['det_du'])
  return data, (volume.astype(dtype), data['spacing'], data['source'], film)


def error(a, b):
  return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def on_device(volume, spacing, source, film, kind='box'):
  return np.asarray(jax.jit(lambda v: project(v, spacing, source, film, kind))(volume))


@pytest.mark.parametrize('name, kind, reference, limit', CASES)
def test_signal_models(fixtures, name, kind, reference, limit):
  data, args = load(fixtures, name)
  image = project(*args, kind)
  assert image.dtype == np.float64
  assert error(image, data[reference]) < limit
  narrow = load(fixtures, name, np.float32)[1]
  host, device = project(*narrow, kind), on_device(*narrow, kind)
  assert host.dtype == device.dtype == np.float32
  assert error(host, image) < 1e-5 and error(device, image) < 1e-5
  assert error(device, data[reference]) < limit


def test_bead_lies_where_the_central_projection_puts_it(fixtures):
  data, args = load(fixtures, 'bead')
  image = project(*args)
  centroid = [np.average(np.arange(n), weights=image.sum(1 - i)) for i, n in enumerate(image.shape)]
  np.testing.assert_allclose(centroid, data['expected_rc'], atol=.02)


def display(data, code, view):
  """The scene as stored with one affine, in [S, A, R] order, on the film of a named view."""
  volume, affine = data[f'arr_{code}'], data[f'aff_{code}']
  axes = np.argmax(abs(affine[:3, :3]), 0)    # patient axis (R, A, S) of each array axis
  volume = np.transpose(volume, np.argsort(axes))
  signs = np.sign(affine[:3, :3].sum(1))
  volume = volume[tuple(slice(None, None, int(s)) for s in signs)].transpose(2, 1, 0)
  spacing = abs(affine[:3, :3]).sum(1)[::-1]
  n, pitch = int(data['n']), float(data['fov_iso_mm'] / data['n'])
  source, film = geometry.camera(DISPLAYS[view], (0, 0), (pitch, pitch), (n, n), float(data['sdd']), float(data['sod']))
  return project(hu_to_mu(volume, mu_water=float(data['mu_water'])), spacing, source, film)


@pytest.mark.parametrize('view', DISPLAYS)
def test_orientation(fixtures, view):
  data = np.load(fixtures / 'drr' / 'orientation.npz')
  images = [display(data, code, view) for code in AFFINES]
  assert error(images[0], data[f'area_{view}']) < 3e-3
  for image in images[1:]:
    assert error(image, images[0].astype(float)) < 1e-6
  # The marker sits right, anterior and superior: always the upper left quadrant.
  peak = np.unravel_index(np.argmax(images[0]), images[0].shape)
  assert peak == {'AP': (18, 15), 'AX': (17, 15), 'LAT': (18, 16)}[view]


def test_pa_is_displayed_like_ap():
  """From far away the beam's sense does not matter."""
  volume = np.random.default_rng(11).random((8, 9, 10))
  pa, ap = (project(volume, (1, 1, 1), *geometry.camera(view, (1, 2), (1, .8), (8, 9), 2e7, 1e7))
            for view in ('pa', 'ap'))
  assert error(pa, ap) < 1e-5


@pytest.mark.parametrize('view', geometry.VIEWS)
def test_window_is_a_crop_of_the_finer_image(view):
  volume = np.random.default_rng(0).random((14, 18, 20))
  spacing, camera = (1.5, 1.1, .9), dict(offset_mm=(5., -3.))
  full = project(volume, spacing, *geometry.camera(view, (0, 0), (.25, .25), (96, 96), **camera))
  # Rows 16..63 and columns 32..79 of the fine image, four to a pixel.
  center = ((16 + 24 - 48) * .25, (32 + 24 - 48) * .25)
  window = project(volume, spacing, *geometry.camera(view, center, (1., 1.), (12, 12), **camera))
  np.testing.assert_allclose(window, full[16:64, 32:80].reshape(12, 4, 12, 4).mean((1, 3)), rtol=1e-5)


@pytest.mark.parametrize('view', geometry.VIEWS)
def test_negative_pitch_mirrors(view):
  volume = np.random.default_rng(1).random((9, 12, 11)).astype(np.float32)
  image, mirrored = (project(volume, (1, 1, 1), *geometry.camera(view, (1., -2.), pitch, (10, 7), offset_mm=(3., 4.)))
                     for pitch in ((.8, .9), (-.8, -.9)))
  np.testing.assert_allclose(mirrored, image[::-1, ::-1], rtol=1e-6)


def test_the_film_distance_does_not_change_a_window():
  volume = np.random.default_rng(2).random((8, 9, 10))
  near, far = (project(volume, (1, 1, 1), *geometry.camera('ap', (1, 2), (.7, .7), (8, 8), sdd, 900., (20., -9.)))
               for sdd in (1000., 1500.))
  np.testing.assert_allclose(near, far, rtol=1e-12)


@pytest.mark.parametrize('kind', ('box', 'linear', 'bspline'))
@pytest.mark.parametrize('name', NAMES)
def test_banded_and_dense_forms_agree(fixtures, name, kind):
  args = load(fixtures, name, np.float32)[1]
  assert error(on_device(*args, kind), project(*args, kind).astype(float)) < 1e-5


@pytest.mark.parametrize('shape, out', [((24, 61, 57), (40, 44)), ((3, 40, 1), (8, 64)), ((1, 1, 1), (5, 5)),
                                        ((30, 5, 50), (64, 9))])
@pytest.mark.parametrize('view', geometry.VIEWS)
def test_both_orders_and_thin_axes(view, shape, out):
  """Whichever axis is contracted first, the sum is the one of dense float64 matrices."""
  rng = np.random.default_rng(3)
  volume, spacing = rng.random(shape), (2., 1., 1.5)
  source, film = geometry.camera(view, (1., 2.), (3., -1.3), out, offset_mm=(9., 2.))
  march, row, col = geometry.VIEWS[view].axes
  v, gap = volume.transpose(march, row, col), film.origin_mm[march] - source[march]
  expected = np.zeros(out)
  for k in range(v.shape[0]):
    tau = ((k - (v.shape[0] - 1) / 2) * spacing[march] - source[march]) / gap
    mats = []
    for axis, n, start, step, length in ((row, out[0], film.origin_mm, film.row_step_mm, v.shape[1]),
                                         (col, out[1], film.origin_mm, film.col_step_mm, v.shape[2])):
      at = source[axis] + tau * (start[axis] + np.arange(n) * step[axis] - source[axis])
      half = tau * abs(step[axis]) / 2
      low = (np.arange(length) - length / 2) * spacing[axis]
      overlap = np.minimum(at[:, None] + half, low + spacing[axis]) - np.maximum(at[:, None] - half, low)
      mats.append(np.maximum(overlap, 0) / (2 * half))
    expected += mats[0] @ v[k] @ mats[1].T
  dr = film.origin_mm[row] + np.arange(out[0]) * film.row_step_mm[row] - source[row]
  dc = film.origin_mm[col] + np.arange(out[1]) * film.col_step_mm[col] - source[col]
  expected *= np.sqrt(1 + (dr[:, None] ** 2 + dc ** 2) / gap ** 2) * spacing[march]
  np.testing.assert_allclose(project(volume, spacing, source, film), expected, rtol=1e-9, atol=1e-12)
  for form in (project, on_device):
    assert error(form(volume.astype(np.float32), spacing, source, film), expected) < 1e-5


@pytest.mark.parametrize('kind, order', [('linear', 1), ('bspline', 3)])
@pytest.mark.parametrize('shape', [(9, 14, 17), (4, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize('view', geometry.VIEWS)
def test_point_rays_sample_the_slice_planes(view, shape, kind, order):
  """Interpolation within each slice is that of scipy, on voxels as they are, with the edges continued half a voxel."""
  volume, spacing = np.random.default_rng(12).random(shape), np.array((1.5, 1., .8))
  source, film = geometry.camera(view, (1., -.5), (1.1, -.7), (15, 16), 260., 200., (30., 20.))
  march, row, col = geometry.VIEWS[view].axes
  pixels = (np.array(film.origin_mm) + np.arange(15)[:, None, None] * np.array(film.row_step_mm) +
            np.arange(16)[:, None] * np.array(film.col_step_mm))
  ray, expected = pixels - source, 0
  for k, z in enumerate((np.arange(shape[march]) - (shape[march] - 1) / 2) * spacing[march]):
    at = source + ((z - source[march]) / ray[..., march])[..., None] * ray
    at = (at / spacing + (np.array(shape) - 1) / 2)[..., [row, col]]
    inside = ((at >= -.5) & (at <= np.array(shape)[[row, col]] - .5)).all(-1)
    edges = np.pad(volume.take(k, march), 4, mode='edge')
    expected = expected + inside * map_coordinates(edges, np.moveaxis(at, -1, 0) + 4, order=order, prefilter=False)
  expected = expected * spacing[march] * np.linalg.norm(ray, axis=-1) / abs(ray[..., march])
  assert expected.any()
  np.testing.assert_allclose(project(volume, spacing, source, film, kind), expected, rtol=1e-11, atol=1e-12)
  assert error(on_device(volume.astype(np.float32), spacing, source, film, kind), expected) < 1e-5


def test_linear_in_the_volume():
  rng = np.random.default_rng(4)
  a, b = rng.random((2, 8, 12, 14)).astype(np.float32)
  run = lambda v: project(v, (1, 1, 1), *geometry.camera('axial', (0, 1), (.9, .9), (12, 12)))
  assert error(run(2 * a + 3 * b), 2. * run(a) + 3. * run(b)) < 1e-6


def test_adjoint():
  rng = np.random.default_rng(5)
  with jax.enable_x64(True):
    x, y = jnp.asarray(rng.random((6, 9, 8))), jnp.asarray(rng.random((7, 10)))
    run = lambda v: project(v, (1, 1.2, .8), *geometry.camera('pa', (0, 1), (.9, .9), (7, 10)))
    image, pull = jax.vjp(run, x)
    assert image.dtype == jnp.float64
    np.testing.assert_allclose(jnp.vdot(image, y), jnp.vdot(x, pull(y)[0]), rtol=1e-9)
    assert error(image, run(np.asarray(x))) < 1e-12


@pytest.mark.parametrize('view', geometry.VIEWS)
def test_box_ignores_zero_padding(view):
  volume = np.random.default_rng(6).random((8, 12, 14)).astype(np.float32)
  camera = geometry.camera(view, (0, 1), (.9, .9), (20, 20))
  assert error(project(np.pad(volume, 3), (1, 1, 1), *camera), project(volume, (1, 1, 1), *camera).astype(float)) < 1e-6


def test_box_ignores_finer_voxels():
  volume = np.random.default_rng(7).random((8, 12, 14)).astype(np.float32)
  camera = geometry.camera('axial', (0, 1), (.9, .9), (20, 20))
  fine = volume.repeat(2, 1).repeat(2, 2)
  assert error(project(fine, (1, .5, .5), *camera), project(volume, (1, 1, 1), *camera).astype(float)) < 1e-5


@pytest.mark.parametrize('view', geometry.VIEWS)
def test_parallel_limit_keeps_the_mass(view):
  volume, spacing = np.random.default_rng(8).random((8, 12, 14)), (1.5, 1., .8)
  image = project(volume, spacing, *geometry.camera(view, (0, 0), (.7, .6), (40, 40), 2e6, 1e6))
  np.testing.assert_allclose(image.sum() * .7 * .6, volume.sum() * np.prod(spacing), rtol=1e-4)


def test_bfloat16_volumes_accumulate_in_float32(fixtures):
  for name in ('chest_slab_ax0', 'smooth_ax0'):
    args = load(fixtures, name)[1]
    image = on_device(jnp.asarray(args[0], jnp.bfloat16), *args[1:], 'linear')
    assert image.dtype == np.float32
    assert error(image, project(*args, 'linear')) < 1e-3


def test_one_trace_serves_all_views():
  volume = jnp.asarray(np.random.default_rng(9).random((10, 12, 14)), jnp.float32)
  traces = []

  @jax.jit
  def windows(center, pitch, offset, sod):    # named view: the axes are static
    traces.append('view')
    return jax.vmap(lambda c, p, o: project(volume, (1., 1., 1.), *geometry.camera('ap', c, p, (9, 9), sod + 200, sod,
                                                                                   o)))(center, pitch, offset)

  @jax.jit
  def any_film(spacing, source, origin, row, col):    # nothing is known but shapes
    traces.append('film')
    return project(volume, spacing, source, Detector((9, 9), origin, row, col))

  rng = np.random.default_rng(10)
  for sod in (1000., 1800.):
    center, pitch, offset = rng.uniform(-2, 2, (2, 2)), rng.uniform(.5, 1, (2, 2)) * [1, -1], rng.uniform(-9, 9, (2, 2))
    images = windows(center, pitch, offset, sod)
    for i in range(2):
      camera = geometry.camera('ap', center[i], pitch[i], (9, 9), sod + 200, sod, offset[i])
      assert error(images[i], project(np.asarray(volume), (1, 1, 1), *camera).astype(float)) < 1e-5
  for view in geometry.VIEWS:
    source, film = geometry.camera(view, (1, 2), (.8, -.9), (9, 9))
    vectors = [np.array(x) for x in ((1., 1.1, .9), source, *film[1:])]
    expected = project(np.asarray(volume), vectors[0], source, film)
    assert error(any_film(*vectors), expected.astype(float)) < 1e-5
  swapped = (vectors[0], vectors[1], vectors[2], vectors[4], vectors[3])    # rows and columns exchanged
  film = Detector((9, 9), *swapped[2:])
  assert error(any_film(*swapped), project(np.asarray(volume), *swapped[:2], film).astype(float)) < 1e-5
  for tilt in ((12., -7., 30.), (-50., 10., 0.)):    # the second one changes the marching axis
    source, film = geometry.camera('axial', (0, 0), (.8, .9), (9, 9), tilt_deg=tilt)
    expected = project(np.asarray(volume), vectors[0], source, film)
    assert error(any_film(vectors[0], *map(np.array, (source, *film[1:]))), expected.astype(float)) < 1e-4
  assert traces == ['view', 'film']


def test_source_gradient_is_the_slope(fixtures):
  _, (volume, spacing, source, film) = load(fixtures, 'smooth_ax0')
  with jax.enable_x64(True):
    total = jax.jit(lambda s: (project(jnp.asarray(volume), spacing, s, film) ** 2).sum())
    slope = jax.grad(total)(jnp.asarray(source))
    for axis in range(3):
      step = 1e-3 * np.eye(3)[axis]
      np.testing.assert_allclose(slope[axis], (total(source + step) - total(source - step)) / 2e-3, rtol=2e-3)


@pytest.mark.parametrize('change, message', [
    (dict(spacing_mm=None), 'spacing_mm is None'),
    (dict(spacing_mm=(1, 0, 1)), 'positive'),
    (dict(spacing_mm=(1, np.nan, 1)), 'finite'),
    (dict(source_mm=(0, 0, 0)), 'inside the volume'),
    (dict(source_mm=(-3.9, 500, 0)), 'inside the volume'),
    (dict(source_mm=(300, 0, 0)), 'not behind the volume'),
    (dict(origin_mm=(3., 0, 0)), 'not behind the volume'),
    (dict(origin_mm=(200, 50, -4)), 'misses the volume'),
    (dict(row_step_mm=(0, 0, -2)), 'degenerate'),
    (dict(col_step_mm=(0, 0, 0)), 'degenerate'),
    (dict(kind='siddon'), 'box, linear, bspline'),
    (dict(volume=np.full((8, 9, 10), np.nan)), 'NaN'),
    (dict(volume=np.full((8, 9, 10), np.inf)), 'infinite'),
    (dict(volume=np.zeros((9, 10))), r'\[D, H, W\]'),
])
def test_refusals(change, message):
  args = dict(volume=np.ones((8, 9, 10)), spacing_mm=(1, 1, 1), source_mm=(-1800, 0, 0), origin_mm=(200, -4, -4),
              row_step_mm=(0, 1, 0), col_step_mm=(0, 0, 1), kind='box') | change
  film = Detector((9, 9), args['origin_mm'], args['row_step_mm'], args['col_step_mm'])
  with pytest.raises(ValueError, match=message):
    project(args['volume'], args['spacing_mm'], args['source_mm'], film, args['kind'])


def test_unknown_view_is_refused():
  with pytest.raises(ValueError, match='axial, ap, pa, lateral'):
    geometry.camera('oblique', (0, 0), (1, 1), (8, 8))


def test_field_is_the_shadow():
  """A point on the edge of the face next to the source falls on the edge of the field."""
  height, width = geometry.field('axial', (24, 250, 161), (1., .8, 1.2))
  near = 1800 - 12
  np.testing.assert_allclose((height, width), (200 / near * 1800, 193.2 / near * 1800), rtol=1e-12)
