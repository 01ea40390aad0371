"""Input of the reference preset: padding, DRR cut from the released renderer's file, X-rays without reshuffling."""
import numpy as np
import pytest
from PIL import Image

from configs import unimiss_plus
from data_pipelines import draw, sample, streams
from data_pipelines.sources import PhantomCT
from unimiss_jax.drr import reference
from unimiss_jax.views import volume


@pytest.fixture(scope='module')
def config():
  return unimiss_plus.get_config('reference')


def record(shape=(24, 120, 150), spacing=(1., 1.5, 1.2)):
  """A body that is bright at the front and at the patient's right, in air; the smallest value stands alone, for the
  renderer cuts off what has it only."""
  z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij')    # [S, A, R]
  hu = np.where(y**2 + x**2 < .8, 300 * y + 500 * x, -1000).astype(np.int16)
  hu[0, shape[1] // 2, shape[2] // 2] = -1100
  return {'volume': hu, 'spacing_mm': spacing}


def test_views_are_cut_from_the_file_as_pillow_does(config):
  """A window without photometry is Pillow's bicubic reduction of whole pixels of the 8-bit file."""
  rec = record()
  file = reference.render(rec['volume'][::-1, ::-1, ::-1].transpose(0, 2, 1), (1., 1.2, 1.5))
  assert min(file.shape) in (223, 224)
  neutral = draw.ct_centre(config, rec['volume'].shape, rec['spacing_mm'])
  drawn = draw.ct_pair(np.random.default_rng(3), config, rec['volume'].shape, rec['spacing_mm'])['drr']
  for i in range(2):
    p = {k: v[:1] for k, v in neutral['drr'].items()} | {k: drawn[k][i:i + 1] for k in ('center_mm', 'pitch_mm')}
    got = sample.ct_sample(rec, {'ct': neutral['ct'], 'drr': p}, config)['drr']
    assert got.shape == (1, 96, 96, 3)
    field = np.array((120 * 1.5, 150 * 1.2)) * 1800 / (1800 - 12)
    size = np.abs(p['pitch_mm'][0]) * 96 / field * file.shape
    start = (p['center_mm'][0] / field + .5) * file.shape - size / 2
    top, left, height, width = (int(v) for v in (*np.round(start), *np.round(size)))
    want = np.asarray(Image.fromarray(file[top:top + height, left:left + width]).resize((96, 96), Image.BICUBIC))
    want = want[:, ::-1] if p['pitch_mm'][0, 1] < 0 else want
    assert abs(np.round(got[0, ..., 0] * 255) - want).max() <= 1


def test_the_file_lies_as_our_own_axial_view(config):
  """Front of the patient up, right side left, as in a radiological display."""
  rec = record()
  params = draw.ct_centre(config, rec['volume'].shape, rec['spacing_mm'])
  theirs = sample.ct_sample(rec, params, config)['drr'][0, ..., 0]
  ours = unimiss_plus.get_config('plain').unlock()
  ours.drr.update(dict(mu='minmax', image='minmax'))
  ours = sample.ct_sample(rec, params, ours)['drr'][0, ..., 0]
  assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > .99
  assert theirs[:48].mean() > theirs[48:].mean() and theirs[:, :48].mean() > theirs[:, 48:].mean()


def test_another_direction_is_refused(config):
  other = config.copy_and_resolve_references().unlock()
  other.drr.view = 'pa'
  rec = record()
  with pytest.raises(ValueError, match='drr.view=pa'):
    sample.ct_sample(rec, draw.ct_centre(other, rec['volume'].shape, rec['spacing_mm']), other)


def test_small_volumes_are_padded_with_water_to_256_pixels(config):
  """At the far end in-plane: the block that crops come from may lie anywhere in 256 x 256, and what is beyond is 0."""
  rng, shape = np.random.default_rng(0), (12, 100, 110)
  boxes = [draw.ct_pair(rng, config, shape, (1., 1., 1.))['ct'] for _ in range(300)]
  start, size = (np.stack([b[k] for b in boxes]) for k in ('box_start', 'box_size'))
  assert start[..., 1:].min() >= 0 and (start + size)[..., 1:].max() <= 256
  assert (start[..., 1:].max((0, 1)) > 110).all()                              # views that see nothing but padding
  assert (start[..., 0] == -2).all()                                           # 12 slices in the middle of 16
  params = {k: v[0] for k, v in draw.ct_centre(config, shape, (1., 1., 1.))['ct'].items()}
  params |= {'box_start': np.array([-2., 60, 60]), 'box_size': np.array([16., 96, 96])}
  view = volume.view(np.full(shape, 500, np.int16), params, config.views.ct)
  assert (view[:2] == 0).all() and (view[14:] == 0).all() and (view[:, 40:] == 0).all() and (view[:, :, 50:] == 0).all()
  np.testing.assert_allclose(view[2:14, :40, :50], 500 / 1024)


def test_xrays_are_one_shuffle_of_a_list_for_all_epochs(config):
  """Every radiograph comes `epochs` times in as many passes, but not once in each of them, as it does by default."""
  seen = {}
  for reshuffle in (False, True):
    c = config.copy_and_resolve_references().unlock()
    c.epochs, c.data.phantom_records, c.data.reshuffle, c.batch.xray = 4, 8, reshuffle, 8
    c.views.xray.size = 8
    stream = streams.build(c, ['xray'])['xray']
    seen[reshuffle] = np.stack([stream.next()['id'] for _ in range(8)])
    stream.close()
  every_pass_whole = lambda ids: (np.sort(ids, 1) == np.arange(8)).all()
  assert every_pass_whole(seen[True]) and not every_pass_whole(seen[False])
  for rounds in (seen[False][:4], seen[False][4:]):
    np.testing.assert_array_equal(np.bincount(rounds.ravel()), 4)


def test_a_phantom_goes_through_the_whole_chain(config):
  rec = PhantomCT(0, 1, whole=False)[0]
  shape, spacing = rec['volume'].shape, rec['spacing_mm']
  out = sample.ct_sample(rec, draw.ct_pair(np.random.default_rng(0), config, shape, spacing), config)
  assert out['ct'].shape == (2, 16, 96, 96, 1) and out['drr'].shape == (2, 96, 96, 3)
  assert np.isfinite(out['ct']).all() and 0 <= out['drr'].min() < out['drr'].max() <= 1
