"""The released renderer and what follows it: its images, and ours of the same volumes.

`march` is a second oracle, ray by ray in float64 with scipy's interpolation. It reproduces every stored image
to the last digit of its format, with the cameras of `reference.pose`: so those, the step rule and the axes of
the images are the released ones, and what remains between `reference.line_sums` and the images is the slice form.
"""
import numpy as np
import pytest
from scipy.ndimage import map_coordinates, zoom

from unimiss_jax.drr import Detector, bands, project, reference, xray

KINDS = {'linear': 'linear', 'cubic': 'bspline'}    # name in the fixtures: ours
SYNTH = dict(shape=(72, 72), pixel_mm=(1.6, 1.6))
REAL = dict(shape=(160, 160), pixel_mm=(2.296, 2.296))
TURNED = dict(SYNTH, volume_turn_deg=(0., 0., 0.), volume_shift_mm=(3., -4., 5.))
VIEWS = {f'{kind}/view{i}': (turn, {}) for kind in KINDS for i, turn in enumerate(reference.CAMERAS)}
# key: (turn of the camera, what differs from the usual detector, step, spacing)
SYNTH_CASES = {key: (turn, SYNTH, 1., None) for key, (turn, _) in VIEWS.items()} | {
    'linear/view1/det_72x40': (reference.CAMERAS[1], dict(shape=(72, 40), pixel_mm=(1.3, 2.)), .7, None),
    'linear/view0/SDD1500_SOD1000': (reference.CAMERAS[0], dict(SYNTH, sdd_mm=1500., sod_mm=1000.), 1., None)}
REAL_CASES = {key: (turn, REAL, 1., None) for key, (turn, _) in VIEWS.items()} | {
    'linear/view1/step0.5': (reference.CAMERAS[1], REAL, .5, None),
    'linear/view1/nonsquare_detector': (reference.CAMERAS[1], dict(shape=(96, 64), pixel_mm=(3., 2.5)), 1., None),
    'linear/view1/aniso_spacing': (reference.CAMERAS[1], dict(shape=(64, 64), pixel_mm=(5., 5.)), 1., (3., .8, .7))}


def read(path):
  """(fixture, sub-volume scaled by its range, spacing); in storage order."""
  data = np.load(path)
  return data, xray.minmax(data['volume_int16'].astype(float)), tuple(data['spacing_zyx'])


@pytest.fixture(scope='module')
def synth(fixtures):
  return read(fixtures / 'parity' / 'drr_synth.npz')


@pytest.fixture(scope='module')
def real(shared):
  return {name: read(shared / 'fixtures' / 'parity' / f'drr_{name}.npz') for name in 'ab'}


def error(a, b):
  return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def interior(image, rim=2):
  """Without the pixels next to the border of the shadow."""
  return tuple(slice(on[0] + rim, on[-1] + 1 - rim) for on in (np.flatnonzero(image.any(i)) for i in (1, 0)))


def march(volume, spacing, source, film: Detector, kind, step, every=1):
  """Samples from the face next to the film on, while they are less than the chord away; each with a full step."""
  spacing, half = np.array(spacing), np.multiply(volume.shape, spacing) / 2
  x, y = (np.arange(0, n, every) for n in film.shape)
  pixels = film.origin_mm + x[:, None, None] * film.row_step_mm + y[:, None] * film.col_step_mm
  ray = (source - pixels) / np.linalg.norm(source - pixels, axis=-1, keepdims=True)
  with np.errstate(divide='ignore'):
    ends = np.sort([(-half - pixels) / ray, (half - pixels) / ray], 0)
  near, far = ends[0].max(-1), ends[1].min(-1)
  edges = np.pad(volume, 3, mode='edge')    # a texture repeats its edges
  sums = np.zeros(near.shape)
  for sample in range(int((far - near).max() / step) + 1):
    on = sample * step < far - near
    at = (pixels[on] + (near[on] + sample * step)[:, None] * ray[on]) / spacing + np.array(volume.shape) / 2 - .5
    sums[on] += map_coordinates(edges, at.T + 3, order={'linear': 1, 'bspline': 3}[kind], prefilter=False)
  return sums * step


def line_sums(volume, spacing, case, kind):
  turn, detector, step, other = case
  return reference.line_sums(volume, other or spacing, *reference.pose(turn, **detector), kind, step)


# ---- interpolation at points ----

@pytest.mark.parametrize('dtype, limit', [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize('kind', KINDS)
def test_points(synth, kind, dtype, limit):
  """Texture coordinates: voxel i is centred at i + 1/2. Beyond the box rays have no samples: there weights are zero."""
  data, volume, _ = synth
  points = data['points']
  weights = [bands.weights(KINDS[kind], points[:, a, None] - .5, 1., 0, np.arange(n), n, dtype)
             for a, n in enumerate(volume.shape)]
  ours = np.einsum('pz,py,px,zyx->p', *weights, volume.astype(dtype), optimize=True)
  inside = ((points >= 0) & (points <= volume.shape)).all(1)
  assert 150 < inside.sum() < 200
  np.testing.assert_allclose(ours[inside], data[f'points/{kind}'][inside], rtol=0, atol=limit)
  assert not ours[~inside].any()


@pytest.mark.parametrize('kind', KINDS)
def test_the_oracle_interpolates_like_the_textures(synth, kind):
  data, volume, _ = synth
  values = map_coordinates(np.pad(volume, 3, mode='edge'), data['points'].T - .5 + 3,
                           order={'linear': 1, 'cubic': 3}[kind], prefilter=False)
  np.testing.assert_allclose(values, data[f'points/{kind}'], rtol=0, atol=1e-12)


# ---- cameras ----

@pytest.mark.parametrize('camera', range(3))
def test_cameras(synth, camera):
  data = synth[0]
  source, film = reference.pose(reference.CAMERAS[camera], **SYNTH)
  inverse = data[f'geom/view{camera}/invM']    # its columns are those of rays which lead away from the volume
  np.testing.assert_allclose(source, data[f'geom/view{camera}/source'], atol=1e-9)
  np.testing.assert_allclose([film.row_step_mm, film.col_step_mm], -2000 * inverse[:, :2].T, atol=1e-9)
  np.testing.assert_allclose(film.origin_mm, source - 2000 * inverse @ (.5, .5, 1), atol=1e-9)


@pytest.mark.parametrize('case', SYNTH_CASES)
def test_rays_of_the_synthetic_volume(synth, case):
  data, volume, spacing = synth
  turn, detector, step, _ = SYNTH_CASES[case]
  image = march(volume, spacing, *reference.pose(turn, **detector), KINDS[case.split('/')[0]], step)
  assert error(image, data[case]) < 1e-12


def test_rays_of_a_turned_volume(synth):
  data, volume, spacing = synth
  camera = reference.pose((30., 20., 10.), **TURNED)
  assert error(march(volume, spacing, *camera, 'linear', 1.), data['linear/rot_30_20_10']) < 1e-12
  # Our projector tilts too. Its line integrals are those of a short step; a millimetre's full first steps are 1 % more.
  assert error(project(volume, spacing, *camera, 'linear'), data['linear/rot_30_20_10']) < 2e-2


@pytest.mark.realdata
@pytest.mark.parametrize('case', REAL_CASES)
@pytest.mark.parametrize('name', 'ab')
def test_rays_of_real_volumes(real, name, case):
  data, volume, spacing = real[name]
  turn, detector, step, other = REAL_CASES[case]
  camera = reference.pose(turn, **detector)
  image = march(volume, other or spacing, *camera, KINDS[case.split('/')[0]], step, every=4)
  assert error(image, data[case][::4, ::4]) < 1e-6


# ---- the slice form ----

def test_slices_of_the_synthetic_volume(synth):
  data, volume, spacing = synth
  assert error(line_sums(volume, spacing, SYNTH_CASES['cubic/view1'], 'bspline'), data['cubic/view1']) < 6e-5


@pytest.mark.parametrize('case', SYNTH_CASES)
def test_slices_of_every_camera(synth, case):
  data, volume, spacing = synth
  image = line_sums(volume, spacing, SYNTH_CASES[case], KINDS[case.split('/')[0]])
  inner = interior(data[case])
  assert error(image[inner], data[case][inner]) < 1e-3


@pytest.mark.realdata
@pytest.mark.parametrize('case', REAL_CASES)
@pytest.mark.parametrize('name', 'ab')
def test_slices_of_real_volumes(real, name, case):
  data, volume, spacing = real[name]
  image = line_sums(volume, spacing, REAL_CASES[case], KINDS[case.split('/')[0]])
  inner = interior(data[case])
  assert error(image[inner], data[case][inner]) < 1e-3
  if (name, case) == ('b', 'cubic/view1'):
    assert error(image, data[case]) < 1e-3


# ---- from the sums to the file ----

def assert_levels(ours, theirs):
  """Within one level, and that for a few values which lie on the border between two."""
  assert ours.dtype == theirs.dtype == np.uint8 and ours.shape == theirs.shape
  apart = abs(ours.astype(int) - theirs)
  assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


def test_post_chain(synth):
  data = synth[0]
  cropped = reference.crop(data['cubic/view1'])
  np.testing.assert_array_equal(cropped.shape, data['post/cropped_shape'])
  resized = reference.resize(cropped)
  np.testing.assert_allclose(resized, data['post/resized'], rtol=0, atol=1e-4)
  assert_levels(reference.quantize(resized), data['post/uint8'])


@pytest.mark.parametrize('shape, out', [((628, 700), (223, 249)), ((974, 974), (224, 224)), ((60, 100), (224, 373))])
def test_sizes_and_resampling(shape, out):
  """628 * (224 / 628) is less than 224. Reduction does not average; enlargement is as in scipy."""
  image = np.random.default_rng(0).random(shape)
  resized = reference.resize(image)
  assert resized.shape == out
  expected = zoom(image, np.divide(out, shape), order=1, mode='nearest', grid_mode=True)
  np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-9)


def test_render(synth):
  """The whole chain with the released detector, from HU to the file, against the rays."""
  data, volume, spacing = synth
  file = reference.render(data['volume_int16'], spacing)
  sums = march(volume, spacing, *reference.pose(reference.CAMERAS[1]), 'bspline', 1.)
  expected = reference.quantize(reference.resize(reference.crop(sums)))
  assert file.dtype == np.uint8 and file.shape == expected.shape and min(file.shape) == 224
  inner = (slice(4, -4),) * 2
  assert abs(file[inner].astype(int) - expected[inner]).max() <= 1


def test_a_constant_sub_volume_is_refused():
  with pytest.raises(ValueError, match='no shadow'):
    reference.render(np.full((4, 5, 6), -1024), (1., 1., 1.))


@pytest.mark.realdata
@pytest.mark.parametrize('name', 'ab')
def test_post_chain_of_real_volumes(real, name):
  data = real[name][0]
  np.testing.assert_array_equal(reference.crop(data['cubic/view1']), data['post/cropped'])
  resized = reference.resize(data['post/cropped'].astype(float))
  np.testing.assert_allclose(resized, data['post/resized'], rtol=0, atol=1e-4)
  assert_levels(reference.quantize(resized), data['post/uint8'])


@pytest.mark.realdata
def test_the_file_of_223_pixels(shared, real):
  """The released size, 1280 x 1280 at .287 mm: the shadow of 628 pixels becomes 223, not 224."""
  data, (volume_data, volume, spacing) = np.load(shared / 'fixtures' / 'parity' / 'drr_b_full1280.npz'), real['b']
  sums = reference.line_sums(volume, spacing, *reference.pose(reference.CAMERAS[1]))
  assert error(sums[::40, ::40], data['render_sample']) < 1e-3
  np.testing.assert_allclose([sums.mean(), sums.std(), np.linalg.norm(sums)], data['render_summary'][:3], rtol=1e-3)
  cropped = reference.crop(sums)
  np.testing.assert_array_equal(cropped.shape, data['cropped_shape'])
  resized, file = reference.resize(cropped), reference.render(volume_data['volume_int16'], spacing)
  assert resized.shape == file.shape == (223, 223)
  assert error(resized[2:-2, 2:-2], data['resized'][2:-2, 2:-2]) < 1e-3
  inner = (slice(4, -4),) * 2
  assert abs(file[inner].astype(int) - data['uint8'][inner]).max() <= 1


@pytest.mark.realdata
def test_the_file_of_223_pixels_ray_by_ray(shared, real):
  data, (_, volume, spacing) = np.load(shared / 'fixtures' / 'parity' / 'drr_b_full1280.npz'), real['b']
  sums = march(volume, spacing, *reference.pose(reference.CAMERAS[1]), 'bspline', 1.)
  assert error(sums[::40, ::40], data['render_sample']) < 1e-6
  resized = reference.resize(reference.crop(sums))
  np.testing.assert_allclose(resized, data['resized'], rtol=0, atol=1e-4)
  assert_levels(reference.quantize(resized), data['uint8'])
