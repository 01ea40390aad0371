"""Views that the device makes are those of the host: per operation, per record, through the stream and the step."""
import contextlib
import pickle

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from configs import unimiss_plus
from data_pipelines import device, draw, manifest, prepare, prepared, sources, streams
from data_pipelines.errors import DataError
from tests.e2e import tiny
from unimiss_jax import sharding, train
from unimiss_jax.drr import geometry, project
from unimiss_jax.views import volume

TOLERANCE = 1e-4
SHAPES = (9, 20, 30), (4, 14, 26), (8, 28, 18)      # the second is smaller than a crop, in depth and in-plane
LARGEST = (9, 28, 30)


def small(**leaves):
  """Preset plain at small sizes, without noise; leaves by dotted name."""
  c = unimiss_plus.get_config('plain')
  c.unlock()
  c.views.ct.update(dict(size=(6, 16, 16), noise_std=(0., 0.)))
  c.views.drr.size, c.views.xray.size, c.data.place = 12, 16, 'device'
  return tiny.changed(c, leaves)


class Records:
  """Random records of given shapes."""

  def __init__(self, shapes, sequences: int = 0):
    rng, of = np.random.default_rng(0), (sequences,) if sequences else ()
    self.records = []
    for i, shape in enumerate(shapes):
      record = {'index': i, 'bad': False}
      if len(shape) == 2:
        dtype = (np.uint8, np.uint16)[i % 2]
        record['image'] = rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
      else:
        record |= dict(volume=rng.integers(-1200, 2000, (*of, *shape)).astype(np.int16),
                       spacing_mm=(2. + i, 1.5, 1.2 + .1 * i), whole_spacing_mm=(3., 4. + i, 4.),
                       whole=rng.integers(-1000, 1500, np.add(shape, (3, -i, 2 * i))).astype(np.int16))
      if sequences:
        record['pad'] = rng.integers(-900, 0, sequences).astype(np.float32)
      self.records.append(record)

  def __len__(self):
    return len(self.records)

  def __getitem__(self, i):
    return self.records[i]

  @property
  def largest(self):
    return sources.hull([{k: r[k].shape[-min(3, r[k].ndim):] for k in ('volume', 'whole', 'image') if k in r}
                         for r in self.records])


def both(name, config, source, seeds=range(6)):
  """(host, device) batches of views of all records in turn; the latter from one compiled call."""
  shapes, host, rows = device.frame(name, config, source), [], []
  for seed in seeds:
    record, rng = source[seed % len(source)], np.random.default_rng(seed)
    kept = {'id': np.int32(seed), 'group': np.int32(0), 'rng': np.zeros(2, np.uint32), 'bad': np.bool_(False)}
    row = device.raw(name, record, config, rng, shapes)
    twin = np.random.default_rng(seed)
    host.append(streams.views(name, record, config, twin, drr='drr/pitch_mm' in row) | kept)
    assert rng.bit_generator.state == twin.bit_generator.state, 'other draws'
    rows.append(row | kept)
  stack = lambda parts: {k: np.stack([p[k] for p in parts]) for k in parts[0]}
  return stack(host), jax.device_get(jax.jit(device.finish(name, config))(stack(rows)))


def assert_close(host, made):
  assert host.keys() == made.keys()
  for k in host:
    assert host[k].shape == made[k].shape and host[k].dtype == made[k].dtype, k
    np.testing.assert_allclose(made[k], host[k], atol=TOLERANCE, rtol=0, err_msg=k)


CT = {
    'plain': {'drr.source_jitter_mm': 20.},
    'demo': {'views.ct.extent': 'record', 'views.ct.scale': (.7, 1.), 'views.ct.resize': 'area', 'drr.view': 'pa',
             'views.ct.aug_unit': 'volume', 'drr.scope': 'volume', 'views.drr.gamma': (.7, 1.4),
             'views.drr.gamma_p': (1., 1.),
             'views.ct.gamma_stats': 'bg0197'},      # of constant slices, as of padding, it hangs on rounding errors
    'tilted': {'drr.tilt_deg': 12., 'drr.kind': 'linear', 'drr.view': 'lateral', 'drr.mu': 'bone_soft',
               'drr.image': 'transmission', 'drr.source_jitter_mm': 20.},
    'paired': {'drr.paired_window': True, 'drr.kind': 'bspline', 'drr.mu': 'minmax', 'drr.p_ref': 9.,
               'views.ct.precrop': (0., 0.), 'views.ct.pad_hu': 0, 'views.ct.pad_to': (24, 24)},
}
MORE = {
    'centre': {'views.ct.extent': 'centre'},
    'tilted box': {'drr.tilt_deg': 15., 'drr.view': 'ap', 'drr.p_ref': 1.5},
    'tilted bspline': {'drr.tilt_deg': 15., 'drr.kind': 'bspline', 'drr.scope': 'volume', 'drr.image': 'minmax',
                       'views.drr.scale': (.1, .3)},      # off the rim, on which rounding says what a point ray meets
    'linear': {'drr.kind': 'linear', 'drr.view': 'pa', 'drr.image': 'minmax', 'drr.mu': 'minmax'},
    'paired record': {'drr.paired_window': True, 'views.ct.extent': 'record', 'views.ct.scale': (.8, 1.),
                      'drr.view': 'lateral', 'drr.mu': 'bone_soft'},
}


@pytest.mark.parametrize('name', [*CT, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_views_of_ct_are_those_of_the_host(name):
  """Records of three sizes in one call; boxes beyond the volume; the filling is never seen."""
  source, config = Records(SHAPES), small(**(CT | MORE)[name])
  assert source.largest['volume'] == LARGEST
  if config.views.ct.extent == 'output':
    boxes = draw.ct_view(np.random.default_rng(1), config, SHAPES[1])['ct']
    assert boxes['box_start'][0, 0] < 0 and (boxes['box_start'] + boxes['box_size'] > SHAPES[1]).any()
  assert_close(*both('ct', config, source))


def test_levels_of_grey_differ_in_rounding_alone():
  """With drr.quantize a value beside a step may fall on its other side: one level of 256."""
  config = small(**{'drr.quantize': True, 'views.drr.jitter_p': 0., 'views.drr.blur_p': (0., 0.)})
  host, made = both('ct', config, Records(SHAPES))
  levels = np.abs(made['drr'] - host['drr']) * 255
  np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
  assert levels.max() < 1.5 and (levels > .5).mean() < .01


def test_views_of_other_modalities():
  config = small(**{'data.modality': 'mr'})
  host, made = both('ct', config, Records(SHAPES, sequences=2))
  assert host['ct'].shape[-1] == 2 and 'drr' not in host
  assert_close(host, made)


@pytest.mark.parametrize('resize', ['bicubic', 'area'])
def test_views_of_radiographs_are_those_of_the_host(resize):
  config = small(**{'views.xray.resize': resize, 'views.xray.updown_p': .5})
  assert_close(*both('xray', config, Records([(40, 30), (33, 52), (20, 24), (64, 17)])))


@pytest.mark.parametrize('kind', ['box', 'linear', 'bspline'])
def test_a_filled_volume_is_projected_as_itself(kind):
  """Content of the filling, place of the centre and the rim; shape known or traced."""
  rng = np.random.default_rng(0)
  part, filled = rng.random((5, 9, 8), np.float32), rng.random((7, 12, 13), np.float32)
  filled[:5, :9, :8] = part
  source, film = geometry.camera('ap', (.4, -.6), (1.1, -1.3), (8, 9), offset_mm=(3., 5.))
  expected = project(part, (2., 1., 1.5), source, film, kind)
  of = lambda v, shape: project(v, (2., 1., 1.5), source, film, kind, shape)
  np.testing.assert_array_equal(of(filled, part.shape), expected)
  np.testing.assert_allclose(jax.jit(of)(filled, np.array(part.shape)), expected, atol=2e-5 * expected.max())


def test_a_filled_volume_is_cropped_as_itself():
  rng = np.random.default_rng(0)
  part, filled = (rng.integers(-900, 900, s).astype(np.int16) for s in ((5, 9, 8), (7, 12, 13)))
  filled[:5, :9, :8] = part
  args = np.array([-1., 2., 3.]), np.array([7., 9., 8.]), np.zeros(3, bool), (6, 7, 8), 'area', -800
  expected = volume.crop_resize(part, *args)
  of = lambda v, shape: volume.crop_resize(v, *args, shape=shape)
  np.testing.assert_array_equal(of(filled, part.shape), expected)
  np.testing.assert_allclose(jax.jit(of)(filled, np.array(part.shape)), expected, atol=2e-6)


def test_noise_has_the_same_law():
  keys = np.random.default_rng(0).integers(0, 2**32, (8, 2), np.uint32)
  x = jnp.zeros((8, 6, 40, 40))
  made = np.array(jax.jit(jax.vmap(lambda x, key: volume.noise(x, .05, key)))(x, keys))
  host = np.stack([volume.noise(np.zeros((6, 40, 40), np.float32), np.float32(.05), key) for key in keys])
  for noise in (made, host):
    assert stats.kstest(noise.ravel() / .05, 'norm').pvalue > .01
    assert abs(np.corrcoef(noise.reshape(8, -1)) - np.eye(8)).max() < .05
  again = jax.vmap(lambda x, key: volume.noise(x, .05, key))(x[:2], keys[:2])
  np.testing.assert_allclose(made[:2], again, atol=1e-7)      # of the key alone


# ---- through the stream

def quiet(**leaves):
  """The smallest run without noise and drop-path, whose draws differ between host and device or not at all."""
  none = {f'views.{v}.noise_std': (0., 0.) for v in ('ct', 'xray', 'drr')}
  return tiny.config(**none | {'model.decoder_drop_path': 0., 'eval.tasks': ()} | leaves)


@pytest.mark.parametrize('name', ['ct', 'xray'])
def test_streams_ship_raw_rows_and_every_device_finishes_its_own(name):
  with contextlib.closing(streams.build(quiet(), [name])[name]) as host, \
       contextlib.closing(streams.build(quiet(**{'data.place': 'device'}), [name])[name]) as stream:
    raw, mesh = stream.next(), sharding.make_mesh(4, 2)
    assert {k: (v.shape[1:], v.dtype) for k, v in raw.items()} == stream.spec and stream.fields == host.spec
    rows = sharding.to_devices(raw, mesh)
    finish = jax.jit(stream.finish).lower(rows).compile()
    for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
      assert collective not in finish.as_text()
    assert_close(host.next(), jax.device_get(finish(rows)))
    second = stream.next()
    assert stream.position() == host.position() + 8 == 16
    stream.seek(8)
    for k, v in stream.next().items():
      np.testing.assert_array_equal(v, second[k])
    fresh, mine = next(host.fresh(8)), next(stream.fresh(8))
    assert all(np.array_equal(fresh[k], mine[k]) for k in fresh)
    bytes_of = lambda s: s.read_ahead / sum(np.prod(shape) * dtype.itemsize for shape, dtype in s.spec.values())
    np.testing.assert_allclose(bytes_of(stream), bytes_of(host))


def test_what_makes_rows_travels_to_worker_processes():
  config, source = small(), Records(SHAPES)
  views = pickle.loads(pickle.dumps(streams._Views('ct', config, device.frame('ct', config, source))))
  made = views.random_map(source[1], np.random.default_rng(0))
  assert made['volume'].shape == LARGEST and tuple(made['shape']) == SHAPES[1] and made['volume'].dtype == np.int16


# ---- one shape

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  where, rng = tmp_path_factory.mktemp('files'), np.random.default_rng(0)
  for i, (d, h, w) in enumerate([(30, 20, 34), (24, 28, 18), (26, 22, 20)]):
    hu = rng.integers(-1000, 1000, (w, h, d)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([2., 2., 3., 1.])), where / f'{i}.nii')
  for i, size in enumerate([(40, 30), (30, 45)]):
    Image.fromarray(rng.integers(0, 256, size).astype(np.uint8)).save(where / f'{i}.png')
  turned = Image.Exif()
  turned[0x0112] = 6
  Image.fromarray(np.zeros((800, 600), np.uint8)).save(where / 'large.jpg', exif=turned)
  return where


def test_sources_know_their_largest_records(folder, tmp_path):
  scans = sources.CTFolder(str(folder), whole=True)
  assert scans.largest == {'volume': (24, 28, 34), 'whole': sources.hull(
      [{'x': scans[i]['whole'].shape} for i in range(len(scans))])['x']}
  assert sources.CTFolder(str(folder)).largest == {'volume': (24, 28, 34)}
  radiographs = sources.XrayFolder(str(folder))
  assert radiographs.largest == {'image': (512, 683)}
  assert max(radiographs[i]['image'].shape for i in range(len(radiographs))) == (512, 683)
  assert sources.PhantomCT(0, 2).largest['volume'] == (24, 112, 112)
  assert prepare.main([str(folder), f'--out={tmp_path}', '--num_shards=1', '--workers=0']) == 0
  cut, pictures = prepared.PreparedCT(str(tmp_path), whole=True), prepared.PreparedXray(str(tmp_path))
  listed = prepared.PreparedCT(str(tmp_path), whole=True, rows=manifest.load(str(tmp_path)).training('ct'))
  assert cut.largest == listed.largest == scans.largest and pictures.largest == radiographs.largest
  assert prepared.Mixture([cut, sources.PhantomCT(0, 2)], [1., 1.]).largest == {
      'volume': (24, 112, 112), 'whole': (scans.largest['whole'][0], 112, 112)}


def test_the_frame_is_what_the_views_need():
  """All of the tile for its DRR, else what two crops of one block can see."""
  source = Records([(24, 60, 70), (24, 64, 20)])
  assert device.frame('ct', small(), source) == {'volume': (24, 64, 70)}
  assert device.frame('ct', small(**{'drr.scope': 'volume'}), source) == {
      'volume': (24, 28, 28), 'whole': source.largest['whole']}
  no_drr = {f'loss.{term}': 0. for term in ('drr', 'recon_drr', 'pair_nce')}
  assert device.frame('ct', small(**no_drr), source) == {'volume': (24, 28, 28)}
  assert device.frame('ct', small(**no_drr, **{'views.ct.precrop': (0., 0.)}), source) == {'volume': (24, 64, 70)}
  assert device.frame('ct', small(**{'data.device_shape.ct': (0, 96, 0)}), source) == {'volume': (24, 96, 70)}
  with pytest.raises(DataError, match=r'DEVICE_SHAPE data.ct: data.device_shape.ct=\(0, 0, 64\), but the largest '
                     r'record needs \(24, 64, 70\). FIX: give it that shape, or 0'):
    device.frame('ct', small(**{'data.device_shape.ct': (0, 0, 64)}), source)


def test_sizes_that_nobody_knows_must_be_given():
  class Silent(Records):
    largest = {}
  source = Silent([(40, 30), (30, 45)])
  with pytest.raises(DataError, match=r'DEVICE_SHAPE data.xray: .*set data.device_shape.xray to a shape that holds'):
    device.frame('xray', small(), source)
  config = small(**{'data.device_shape.xray': (40, 32), 'views.xray.scale': (1., 1.), 'views.xray.ratio': (.5, 2.)})
  shapes = device.frame('xray', config, source)
  assert device.raw('xray', source[0], config, np.random.default_rng(0), shapes)['image'].shape == (40, 32)
  with pytest.raises(DataError, match=r'DEVICE_SHAPE a record with image .* is larger than \(40, 32\). FIX: set '
                     'data.device_shape.xray'):
    for seed in range(9):
      device.raw('xray', source[1], config, np.random.default_rng(seed), shapes)


@pytest.mark.slow
def test_a_run_is_the_same_run(tmp_path):
  """Four steps; the losses are those of views made on the host."""
  rows = []
  for place in ('host', 'device'):
    config = quiet(**{'data.place': place, 'steps': 4})
    assert train.train_and_evaluate(config, str(tmp_path / place)) == 0
    rows.append(tiny.metrics(tmp_path / place))
  assert rows[0].keys() == rows[1].keys() and len(rows[0]) >= 4
  for at, host in rows[0].items():
    for k, value in host.items():
      if k.endswith('loss'):
        assert abs(rows[1][at][k] - value) < TOLERANCE, (at, k)
