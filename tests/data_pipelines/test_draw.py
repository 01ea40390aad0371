"""What is drawn follows the published recipe: rates and ranges over 10^4 records, within three standard errors."""
import numpy as np
import pytest

from configs.common import base
from data_pipelines import draw
from unimiss_jax.views import volume

N = 10_000
SHAPE, SPACING = (24, 250, 250), (1., 1., 1.)


def stack(draws):
  return {g: {k: np.stack([d[g][k] for d in draws]) for k in draws[0][g]} for g in draws[0]}


@pytest.fixture(scope='module')
def pairs():
  rng, config = np.random.default_rng(0), base()
  return stack([draw.ct_pair(rng, config, SHAPE, SPACING) for _ in range(N)])


@pytest.fixture(scope='module')
def xrays():
  rng, config = np.random.default_rng(1), base()
  return stack([draw.xray_pair(rng, config, (512, 480)) for _ in range(N)])['xray']


def assert_rate(events, p):
  """Independent events along axis 0 only: the standard error is that of N records."""
  rate = np.asarray(events, float).reshape(len(events), -1).mean(1)
  assert abs(rate.mean() - p) <= 3 * max(rate.std() / np.sqrt(len(rate)), 1e-9), (rate.mean(), p)


def assert_uniform(values, low, high):
  values = np.ravel(values)
  assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
  width = high - low
  assert abs(values.mean() - (low + high) / 2) < 3 * width / np.sqrt(12 * len(values))
  assert abs(values.var() - width ** 2 / 12) < 3 * width ** 2 / np.sqrt(180 * len(values))


def test_flips(pairs, xrays):
  for axis in range(3):
    for view in range(2):
      assert_rate(pairs['ct']['flip'][:, view, axis], .8)
  assert_rate(pairs['drr']['pitch_mm'][..., 1] < 0, .5)
  assert_rate(xrays['flip'][..., 1], .5)
  assert not xrays['flip'][..., 0].any() and (pairs['drr']['pitch_mm'][..., 0] > 0).all()


@pytest.mark.parametrize('name, neutral, rates', [
    ('blur_sigma', 0, (.8 * .8, .8 * .5)), ('mul', 1, (.8, 1.)), ('add', 0, (.8 * .8, .5 * .8)),
    ('contrast', 1, (1., 1.)), ('gamma', 1, (.8, 1.))])
def test_rates_of_ct_intensities(pairs, name, neutral, rates):
  for view, p in enumerate(rates):
    assert_rate(pairs['ct'][name][:, view] != neutral, p)


def test_samples_and_slices_are_drawn_apart(pairs):
  """A blurred sample (p .8) keeps sharp slices (p .2 and .5); view 1 adds to half of the samples only."""
  blurred = pairs['ct']['blur_sigma'] > 0
  for view, p in enumerate((.8, .5)):
    some = blurred[:, view].any(-1)
    assert_rate(some, .8 * (1 - (1 - p) ** 16))
    assert_rate(blurred[some, view], p / (1 - (1 - p) ** 16))
  assert_rate((pairs['ct']['add'][:, 1] != 0).any(-1), .5)
  assert_rate((pairs['ct']['mul'][:, 0] != 1).all(-1), .8)


def test_laws_of_ct_intensities(pairs):
  ct = pairs['ct']
  assert_uniform(ct['noise_std'], 0, .1)
  assert_uniform(ct['blur_sigma'][ct['blur_sigma'] > 0], .1, 2)
  assert_uniform(ct['mul'][:, 1], .75, 1.25)
  added = ct['add'][ct['add'] != 0]
  assert abs(added.mean()) < 3 * .4 / np.sqrt(len(added)) and abs(added.std() - .4) < 3 * .4 / np.sqrt(2 * len(added))
  for name, low, high in (('contrast', .75, 1.25), ('gamma', .7, 1.5)):
    drawn = ct[name][:, 1].ravel()
    assert_rate(drawn < 1, .5)
    assert_uniform(drawn[drawn < 1], low, 1)
    assert_uniform(drawn[drawn > 1], 1, high)


def test_boxes_share_a_block(pairs):
  start, size = pairs['ct']['box_start'], pairs['ct']['box_size']
  assert (start == np.floor(start)).all() and (size == np.floor(size)).all()
  assert (start >= 0).all() and (start + size <= SHAPE).all()
  assert (size[..., 0] == 16).all()
  assert_rate(start[..., 0] == 0, 1 / 9)
  assert sorted(np.unique(start[..., 0])) == list(range(9))
  in_plane = size[..., 1:]
  assert in_plane.min() >= int(96 * .8) and in_plane.max() < 96 * 1.2
  assert abs((in_plane / 96).mean() - (1 - .5 / 96)) < 1e-3    # U(.8, 1.2), cut to whole pixels
  union = (start + size).max(1) - start.min(1)
  assert union[:, 1:].max() <= int(96 * 1.8)


def test_photometry_rates(pairs, xrays):
  for views in (pairs['drr'], xrays):
    assert_rate(views['brightness'] != 1, .8)
    assert ((views['brightness'] != 1) == (views['contrast'] != 1)).all()    # one draw decides on both
    for name in ('brightness', 'contrast'):
      assert_uniform(views[name][views[name] != 1], .6, 1.4)
    assert_rate(views['contrast_first'], .5)
    for view, p in enumerate((.5, 1.)):
      assert_rate(views['blur_sigma'][:, view] > 0, p)
    assert_uniform(views['blur_sigma'][views['blur_sigma'] > 0], .1, 2)
    assert (views['gamma'] == 1).all() and (views['noise_std'] == 0).all()


def test_windows(pairs, xrays):
  size = abs(pairs['drr']['pitch_mm']) * 96
  field = 250 * 1800 / 1788
  check_crops(size, np.array([field, field]), .3, 1e-9)
  assert (abs(pairs['drr']['center_mm']) + size / 2 <= field / 2 + 1e-9).all()
  check_crops(xrays['box_size'], np.array([512, 480]), .14, .02)
  assert (xrays['box_start'] >= 0).all() and (xrays['box_start'] + xrays['box_size'] <= (512, 480)).all()


def check_crops(size, field, smallest, rounding):
  share, aspect = size.prod(-1) / field.prod(), size[..., 1] / size[..., 0]
  assert smallest * (1 - rounding) <= share.min() and share.max() <= 1
  assert 3 / 4 * (1 - rounding) <= aspect.min() and aspect.max() <= 4 / 3 * (1 + rounding)
  # Where every aspect fits, nothing is rejected: shares are uniform and aspects log-uniform.
  small = share < .5
  middle = (smallest + .5) / 2
  assert_rate(share[small].ravel() < middle, .5)
  log = np.log(aspect[small]) / np.log(4 / 3)
  assert abs(log.mean()) < 3 / np.sqrt(3 * len(log)) + rounding and abs(log.std() - 1 / np.sqrt(3)) < .02


def test_record_extent():
  rng, config = np.random.default_rng(2), base()
  config.views.ct.extent, config.views.ct.scale = 'record', (.7, 1.)
  ct = stack([draw.ct_pair(rng, config, (40, 112, 100), (3., 2., 2.)) for _ in range(2000)])['ct']
  share = ct['box_size'] / (40, 112, 100)
  for axis in range(3):
    assert_uniform(share[..., axis], .7, 1)
  assert (ct['box_start'] >= 0).all() and (ct['box_start'] + ct['box_size'] <= np.array((40, 112, 100)) + 1e-3).all()


def test_volume_unit_shares_one_draw():
  rng, config = np.random.default_rng(3), base()
  config.views.ct.aug_unit = 'volume'
  ct = stack([draw.ct_pair(rng, config, SHAPE, SPACING) for _ in range(500)])['ct']
  for name in ('blur_sigma', 'mul', 'add', 'contrast', 'gamma'):
    assert ct[name].shape == (500, 2, 16)
    assert (ct[name] == ct[name][..., :1]).all()
  assert_rate(ct['mul'][:, 0, 0] != 1, .8)


def test_small_volumes_are_padded():
  """In-plane at the end, in depth on both sides."""
  rng, config = np.random.default_rng(4), base()
  ct = stack([draw.ct_pair(rng, config, (11, 60, 80), SPACING) for _ in range(50)])['ct']
  assert (ct['box_start'][..., 0] == -2).all() and (ct['box_size'][..., 0] == 16).all()
  assert (ct['box_start'][..., 1:] >= 0).all()
  end = (ct['box_start'] + ct['box_size'])[..., 1:]
  assert end.max() == 96 and ct['box_size'][..., 1:].min() >= int(.8 * 96)


def test_source_jitter():
  rng, config = np.random.default_rng(5), base()
  config.drr.source_jitter_mm = 20.
  offset = stack([draw.ct_pair(rng, config, SHAPE, SPACING) for _ in range(2000)])['drr']['offset_mm']
  assert_uniform(offset, -20, 20)


def test_thin_fields_take_the_largest_central_window():
  rng, config = np.random.default_rng(6), base()
  config.drr.view = 'ap'    # 24 mm x 250 mm
  drr = draw.ct_pair(rng, config, SHAPE, SPACING)['drr']
  size = abs(drr['pitch_mm']) * 96
  height = 24 * 1800 / (1800 - 125)
  np.testing.assert_allclose(size, [[height, height * 4 / 3]] * 2, rtol=1e-9)
  np.testing.assert_allclose(drr['center_mm'], 0, atol=1e-9)


def test_the_central_voxels_as_they_are():
  """Cut where there are more, filled up where there are fewer, as NumPy does it."""
  config, truth = base(), np.random.default_rng(0).integers(-1024, 3000, (11, 60, 130)).astype(np.int16)
  config.views.ct.extent = 'centre'
  expected = np.pad(truth[..., 17:113], ((2, 3), (18, 18), (0, 0)), constant_values=-1024) / 1024
  for params in (draw.ct_pair(np.random.default_rng(1), config, truth.shape, SPACING),
                 draw.ct_centre(config, truth.shape, SPACING)):
    for start, size in zip(params['ct']['box_start'], params['ct']['box_size']):
      got = volume.crop_resize(truth, start, size, np.zeros(3, bool), (16, 96, 96), 'linear', -1024)
      np.testing.assert_array_equal(got, expected.astype(np.float32))
  assert draw.reach(config.views.ct, truth.shape) == (11, 60, 96)


@pytest.mark.parametrize('extent', ('output', 'record', 'centre'))
def test_centre_views_have_the_same_fields(extent):
  config = base()
  config.views.ct.extent = extent
  layout = lambda groups: {g: {k: (v.shape[1:], v.dtype) for k, v in d.items()} for g, d in groups.items()}
  centre = draw.ct_centre(config, SHAPE, SPACING)
  assert layout(centre) == layout(draw.ct_pair(np.random.default_rng(0), config, SHAPE, SPACING))
  box = (4, 77, 77, 16, 96, 96) if extent != 'record' else (0, 0, 0, *SHAPE)
  np.testing.assert_array_equal(np.ravel([centre['ct']['box_start'], centre['ct']['box_size']]), box)
  centre = draw.xray_centre(config, (300, 200))
  assert layout(centre) == layout(draw.xray_pair(np.random.default_rng(0), config, (300, 200)))
  np.testing.assert_array_equal(np.ravel([centre['xray']['box_start'], centre['xray']['box_size']]), (16, 0, 267, 200))


def test_the_generator_decides_alone():
  config = base()
  a, b, c = (draw.ct_pair(np.random.default_rng(seed), config, SHAPE, SPACING) for seed in (7, 7, 8))
  for group in a:
    for name in a[group]:
      np.testing.assert_array_equal(a[group][name], b[group][name])
  assert (a['ct']['noise_key'] != c['ct']['noise_key']).any()


@pytest.mark.parametrize('change, message', [
    ({'drr.scope': 'volume'}, 'no whole scan'), ({'drr.scope': 'patient'}, 'subvolume or volume'),
    ({'drr.view': 'oblique'}, 'axial, ap'), ({'views.ct.extent': 'box'}, 'output, record or centre')])
def test_refusals(change, message):
  config = base()
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    draw.ct_pair(np.random.default_rng(0), config, SHAPE, SPACING)


def test_paired_windows_refuse_a_tile_of_unknown_place():
  config = base()
  config.drr.scope, config.drr.paired_window = 'volume', True
  with pytest.raises(ValueError, match='where the tile lies'):
    draw.ct_pair(np.random.default_rng(0), config, SHAPE, SPACING, (100, 125, 125), (2., 2., 2.))
