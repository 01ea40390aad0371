"""The finished views: shapes, reproducibility, and geometry seen through a bright voxel."""
import nibabel
import numpy as np
import pytest

from configs.common import base
from data_pipelines import draw, sample
from unimiss_jax import drr
from unimiss_jax.drr import geometry


def small():
  config = base()
  config.views.ct.size, config.views.drr.size, config.views.xray.size = (8, 32, 32), 24, 40
  return config


def ct_record(seed=0, shape=(20, 70, 64), spacing=(2., 1.5, 1.2)):
  volume = np.random.default_rng(seed).integers(-1024, 1200, shape).astype(np.int16)
  return dict(volume=volume, spacing_mm=spacing, index=3, bad=False, name='noise')


def ct_views(record, config, seed=None):
  args = (config, record['volume'].shape, record['spacing_mm'])
  params = draw.ct_centre(*args) if seed is None else draw.ct_pair(np.random.default_rng(seed), *args)
  return sample.ct_sample(record, params, config)


def test_shapes_and_ranges():
  config, record = small(), ct_record()
  for seed, views in ((0, 2), (None, 1)):
    out = ct_views(record, config, seed)
    assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
        'ct': ((views, 8, 32, 32, 1), np.float32), 'drr': ((views, 24, 24, 3), np.float32)}
    assert np.isfinite(out['ct']).all() and abs(out['ct']).max() < 6
    assert out['drr'].min() >= 0 and out['drr'].max() <= 1 and out['drr'].std() > 0
    assert (out['drr'] == out['drr'][..., :1]).all()
  image = np.random.default_rng(1).integers(0, 256, (90, 100)).astype(np.uint8)
  out = sample.xray_sample(dict(image=image), draw.xray_pair(np.random.default_rng(2), config, image.shape), config)
  assert out['xray'].shape == (2, 40, 40, 3) and out['xray'].dtype == np.float32
  assert out['xray'].min() >= 0 and out['xray'].max() <= 1


def test_same_seed_same_sample():
  config, record = small(), ct_record()
  config.views.drr.noise_std, config.drr.source_jitter_mm = (0., .1), 10.
  a, b, c = (ct_views(record, config, seed) for seed in (5, 5, 6))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
    assert abs(a[name] - c[name]).max() > .01
  assert abs(a['ct'][0] - a['ct'][1]).max() > .01 and abs(a['drr'][0] - a['drr'][1]).max() > .01


def test_centre_view_is_the_plain_record():
  config, record = small(), ct_record()
  out = ct_views(record, config)
  np.testing.assert_allclose(out['ct'][0, ..., 0], record['volume'][6:14, 19:51, 16:48] / 1024, atol=1e-6)
  height, width = geometry.field('axial', (20, 70, 64), (2., 1.5, 1.2))    # 105 x 76.8 mm: aspect 3/4 is cut from it
  source, film = geometry.camera('axial', (0, 0), (width / .75 / 24, width / 24), (24, 24))
  expected = drr.project(drr.hu_to_mu(record['volume'].astype(float)), record['spacing_mm'], source, film)
  np.testing.assert_allclose(out['drr'][0, ..., 0], expected / (1.25 * .02 * 40), atol=1e-5)
  assert height > width / .75
  image = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40
  out = sample.xray_sample(dict(image=image), draw.xray_centre(config, image.shape), config)
  np.testing.assert_allclose(out['xray'][0, ..., 2], image / 65535, atol=1e-6)


def bright(at, shape=(20, 70, 64)):
  volume = np.full(shape, -1000, np.int16)
  volume[tuple(slice(i - 1, i + 2) for i in at)] = 2000
  volume[at] = 3000
  return dict(volume=volume, spacing_mm=(2., 1.5, 1.2))


def plain(config):
  """Geometry alone: no intensity changes."""
  ct = config.views.ct
  ct.noise_std, ct.add_std, ct.mul, ct.contrast, ct.gamma = (0., 0.), 0., (1., 1.), (1., 1.), (1., 1.)
  ct.blur_p, config.views.drr.blur_p, config.views.drr.jitter_p = (0., 0.), (0., 0.), 0.
  return config


@pytest.mark.parametrize('view', geometry.VIEWS)
@pytest.mark.parametrize('extent', ('output', 'record'))
def test_paired_windows_show_the_place_of_the_ct_view(view, extent):
  """A bright voxel lies at the same place in both, where the display runs against the patient axes."""
  config = plain(small())
  config.drr.view, config.drr.paired_window, config.views.ct.extent = view, True, extent
  config.views.ct.scale, config.views.ct.resize = (.8, 1.), 'area'
  at = (10, 35, 32)
  record, seen = bright(at), 0
  for seed in range(40):
    params = draw.ct_pair(np.random.default_rng(seed), config, record['volume'].shape, record['spacing_mm'])
    out = sample.ct_sample(record, params, config)
    for v in range(2):
      box = params['ct']['box_start'][v], params['ct']['box_size'][v]
      if not all(s + 1 < p < s + n - 2 for p, s, n in zip(at, *box)):
        continue
      seen += 1
      where = np.unravel_index(np.argmax(out['ct'][v, ..., 0]), config.views.ct.size)
      share = (np.array(where) + .5) / config.views.ct.size
      row, col = np.unravel_index(np.argmax(out['drr'][v, ..., 0]), (24, 24))
      expected = 1 - share[list(geometry.VIEWS[view].axes[1:])]
      np.testing.assert_allclose((np.array((row, col)) + .5) / 24, expected, atol=.12)
  assert seen > 4


def test_flipped_views_are_mirrored():
  config = plain(small())
  record = ct_record(4)
  params = draw.ct_pair(np.random.default_rng(0), config, record['volume'].shape, record['spacing_mm'])
  mirrored = dict(ct=dict(params['ct'], flip=~params['ct']['flip']),
                  drr=dict(params['drr'], pitch_mm=params['drr']['pitch_mm'] * [1, -1]))
  a, b = (sample.ct_sample(record, p, config) for p in (params, mirrored))
  np.testing.assert_allclose(a['ct'][:, ::-1, ::-1, ::-1], b['ct'], atol=1e-5)
  np.testing.assert_allclose(a['drr'][:, :, ::-1], b['drr'], atol=1e-5)


def test_whole_scans_are_projected():
  config, tile = small(), ct_record()
  config.drr.scope, config.drr.view = 'volume', 'pa'
  whole = np.full((30, 40, 50), 0, np.int16)
  record = dict(tile, whole=whole, whole_spacing_mm=(3., 5., 4.))
  params = draw.ct_centre(config, tile['volume'].shape, tile['spacing_mm'], whole.shape, (3., 5., 4.))
  image = sample.ct_sample(record, params, config)['drr'][0, ..., 0]
  np.testing.assert_allclose(image[12, 12], 1, atol=.01)    # 200 mm of water fill the path
  assert image[12].std() < .05


def test_wide_scans_fit_before_the_film():
  """A field of view of 500 mm reaches beyond the usual place of the film."""
  config, record = small(), ct_record(spacing=(2., 8., 8.))
  config.drr.view = 'lateral'
  assert np.isfinite(ct_views(record, config)['drr']).all()


@pytest.mark.parametrize('mu, mode', [
    ('water', 'line'), ('water', 'transmission'), ('water', 'minmax'), ('bone_soft', 'line'),
    ('bone_soft', 'transmission'), ('minmax', 'line'), ('minmax', 'minmax')])
def test_every_image_model_runs(mu, mode):
  config = small()
  config.drr.mu, config.drr.image, config.drr.quantize = mu, mode, True
  image = ct_views(ct_record(), config)['drr'][0, ..., 0]
  assert image.min() >= 0 and image.max() <= 1 and image.std() > 0
  np.testing.assert_allclose(image * 255, np.round(image * 255), atol=1e-3)


@pytest.mark.realdata
@pytest.mark.parametrize('name, lungs', [('ct/nsclcrg_R01-001.nii.gz', True), ('ct/totalseg_example_ct.nii.gz', False)])
def test_real_scans(shared, name, lungs):
  image = nibabel.as_closest_canonical(nibabel.load(shared / 'data' / name))
  volume = np.clip(image.get_fdata(), -1024, 3071).astype(np.int16).transpose(2, 1, 0)
  spacing = np.linalg.norm(image.affine[:3, :3], axis=0)[::-1]
  record = dict(volume=volume, spacing_mm=spacing)
  config = base()
  for view in ('pa', 'lateral'):
    config.drr.view = view
    picture = ct_views(record, config)['drr'][0, ..., 0]
    assert picture.shape == (96, 96) and np.isfinite(picture).all()
    body = picture[20:76, 20:76]
    assert .15 < np.median(body) < .99 and (picture >= 1).mean() < .1
    if lungs and view == 'pa':    # lungs above, abdomen below
      assert picture[40, 30:66].min() < .75 * picture[85, 48]
