"""Elastic streams: position, shards, workers, bad records, read-ahead."""
import threading
import time

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from configs import unimiss_plus
from data_pipelines import prepare, prepared, sources, streams
from data_pipelines.errors import DataError

FILES = 10    # of each kind; every scan is one record


@pytest.fixture
def config(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(FILES):
    affine = np.diag([2., 2., 3., 1.])
    nib.save(nib.Nifti1Image(rng.integers(-1000, 1000, (24, 24, 24)).astype(np.int16), affine), tmp_path / f'{i}.nii')
    Image.fromarray(rng.integers(0, 256, (40, 30)).astype(np.uint8)).save(tmp_path / f'{i}.png')
  config = unimiss_plus.get_config('phantom')
  with config.unlocked():
    config.data.ct = config.data.xray = str(tmp_path)
    config.batch.ct = config.batch.xray = 4
    config.views.ct.size = (8, 16, 16)
    config.views.drr.size = config.views.xray.size = 16
  return config


def take(stream, n):
  return [stream.next() for _ in range(n)]


def assert_same(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second):
    assert a.keys() == b.keys()
    for k in a:
      np.testing.assert_array_equal(a[k], b[k])


def test_batches_have_the_shapes_of_the_spec(config):
  built = streams.build(config)
  assert list(built) == ['ct', 'xray']
  for name, views in (('ct', {'ct': (2, 8, 16, 16, 1), 'drr': (2, 16, 16, 3)}), ('xray', {'xray': (2, 16, 16, 3)})):
    stream = built[name]
    assert stream.records == len(stream.source) == FILES
    expected = {k: (v, np.float32) for k, v in views.items()}
    expected |= {'id': ((), np.int32), 'group': ((), np.int32), 'rng': ((2,), np.uint32), 'bad': ((), np.bool_)}
    assert stream.spec == {k: (s, np.dtype(t)) for k, (s, t) in expected.items()}
    batch = stream.next()
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: ((4, *s), t) for k, (s, t) in stream.spec.items()}
    assert not batch['bad'].any() and all(np.isfinite(v).all() for v in batch.values())
    stream.close()
  config.batch.xray = 0
  assert list(streams.build(config)) == ['ct']


def test_every_epoch_holds_every_record_once_in_another_order(config):
  for stream in streams.build(config).values():
    ids = np.concatenate([b['id'] for b in take(stream, FILES)]).reshape(4, FILES)
    assert (np.sort(ids) == np.arange(FILES)).all()
    assert len({tuple(r) for r in ids}) > 1
    stream.close()


def test_seek_is_exact_and_position_counts_rows(config):
  stream = streams.build(config)['ct']
  batches = take(stream, 6)
  assert stream.position() == 24
  for start in (2, 0, 5, 3):
    stream.seek(4 * start)
    assert stream.position() == 4 * start
    assert_same(take(stream, 6 - start), batches[start:])
  other = streams.build(config)['ct']
  other.seek(12)
  assert_same(take(other, 3), batches[3:])
  assert len({tuple(k) for b in batches for k in b['rng']}) == 24
  stream.close(), other.close()


def test_shards_share_each_global_batch(config):
  one = streams.build(config)['ct']
  batches = take(one, 4)
  for count in (2, 4):
    for index in range(count):
      stream = streams.build(config, ['ct'], index, count)['ct']
      assert_same(take(stream, 2), [{k: v[index::count] for k, v in b.items()} for b in batches[:2]])
      assert stream.position() == 8
      stream.close()
  two = [streams.build(config, ['ct'], i, 2)['ct'] for i in range(2)]
  for stream in two:
    stream.seek(one.position())    # saved by one process, continued by two
  parts, whole = [take(s, 2) for s in two], take(one, 2)
  for i in range(2):
    assert_same(parts[i], [{k: v[i::2] for k, v in b.items()} for b in whole])
  for stream in (one, *two):
    stream.close()


def test_workers_do_not_change_the_samples(config):
  none = streams.build(config)['ct']
  config.data.workers = 2
  two = streams.build(config)['ct']
  batches = take(none, 7)
  two.seek(8)
  assert_same(take(two, 5), batches[2:])
  none.seek(two.position())    # saved with two workers, continued with none
  assert_same(take(none, 1), take(two, 1))
  two.close(), none.close()


def test_rows_depend_on_seed_and_position_only(config):
  first = streams.build(config)
  keys = {n: s.next()['rng'] for n, s in first.items()}
  assert not np.array_equal(keys['ct'], keys['xray'])
  config.views.ct.size = (16, 16, 16)    # other views, same keys: they are drawn first
  assert np.array_equal(streams.build(config)['ct'].next()['rng'], keys['ct'])
  config.seed = 1
  assert not np.array_equal(streams.build(config)['ct'].next()['rng'], keys['ct'])


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_record_is_replaced_and_the_position_stays_exact(config, tmp_path, workers, capfd):
  undisturbed = take(streams.build(config)['ct'], 8)
  config.data.workers = workers
  stream = streams.build(config)['ct']
  stream.source.cache = type(stream.source.cache)(1)    # so that the damage is seen
  (tmp_path / '5.nii').write_bytes(b'damaged')
  (tmp_path / '6.nii').unlink()
  batches = take(stream, 4)
  position = stream.position()
  assert position == 16
  live = take(stream, 4)
  for ours, theirs in zip(batches + live, undisturbed):
    assert (ours['bad'] == np.isin(ours['id'], (5, 6))).all()
    good = ~ours['bad']
    assert_same([{k: v[good] for k, v in ours.items()}], [{k: v[good] for k, v in theirs.items()}])
    np.testing.assert_array_equal(ours['rng'], theirs['rng'])
    np.testing.assert_array_equal(ours['id'], theirs['id'])
  assert sum(b['bad'].sum() for b in batches + live) >= 4
  if not workers:    # a worker process speaks for itself, and there may be a new one after seek
    said = capfd.readouterr().err
    assert said.count('replaced by') == said.count('5.nii: not a NIfTI') + said.count('6.nii: FileNotFoundError') == 2
  stream.seek(position)
  assert_same(take(stream, 4), live)
  stream.close()


@pytest.mark.parametrize('workers', [0, 1])
def test_stop_ends_the_stream_with_the_fault_of_the_file(config, tmp_path, workers):
  config.data.on_bad_file, config.data.workers = 'stop', workers
  stream = streams.build(config)['ct']
  stream.source.cache = type(stream.source.cache)(1)
  (tmp_path / '5.nii').unlink()
  with pytest.raises(DataError, match='UNREADABLE .*5.nii'):
    take(stream, 5)
  stream.close()


@pytest.mark.parametrize('workers', [0, 2])
def test_read_ahead_is_bounded(config, tmp_path, workers):
  log = tmp_path / 'reads'
  log.touch()

  class Counted:    # defined here, so that worker processes get it by value
    def __len__(self):
      return 1000

    def __getitem__(self, i):
      with open(log, 'a') as f:
        f.write('x')
      return {'image': np.zeros((20, 20), np.uint8), 'index': i, 'bad': False}

  config.data.workers = workers
  stream = streams.Stream('xray', config, Counted())
  first = stream.next()
  time.sleep(1 if workers else .3)
  batches = (log.stat().st_size - 1) / 4    # one record was read for the spec
  assert 1 <= batches <= (streams.BUFFER + streams.THREADS + 2) * max(workers, 1)
  assert batches <= stream.read_ahead / sum(x.nbytes for x in first.values()) <= 10 * max(workers, 1)
  stream.close()


def test_fresh_pass_is_ordered_padded_and_leaves_the_position_alone(config):
  stream, twin = streams.build(config)['ct'], streams.build(config)['ct']
  first = take(stream, 2)
  rows = list(stream.fresh(4))
  np.testing.assert_array_equal(np.concatenate([b['id'] for b in rows]), [*range(FILES), -1, -1])
  assert all({k: (v.shape[1:], v.dtype) for k, v in b.items()} == stream.spec for b in rows)
  assert_same(list(stream.fresh(4)), rows)
  assert_same(first + take(stream, 3), take(twin, 5))
  halves = [list(streams.build(config, ['ct'], i, 2)['ct'].fresh(4)) for i in range(2)]
  for i in range(2):
    assert_same(halves[i], [{k: v[i::2] for k, v in b.items()} for b in rows])
  with pytest.raises(ValueError, match='not divisible by 2 shards'):
    next(streams.build(config, ['ct'], 0, 2)['ct'].fresh(3))
  stream.close(), twin.close()


def test_an_ended_or_empty_stream_is_an_error(config):
  stream = streams.build(config)['ct']
  real, stream._iterator = stream._iterator, Ended()
  with pytest.raises(RuntimeError, match='data stream "ct" ended at position 12'):
    stream.next()
  real.close()
  with pytest.raises(ValueError, match='data.ct has no records'):
    streams.Stream('ct', config, [])


class Ended:
  def __next__(self):
    raise StopIteration

  def get_state(self):
    return {'global_next_index': 12}


def test_indivisible_batches_name_the_nearest_ones(config):
  config.batch.ct = 100
  with pytest.raises(ValueError, match='global batch 100 of "ct" not divisible by 16 shards: use 96 or 112'):
    streams.build(config, ['ct'], 0, 16)


def test_close_ends_all_threads(config):
  before = set(threading.enumerate())
  built = streams.build(config)
  for stream in built.values():
    take(stream, 2), next(stream.fresh(2))
    stream.close()
  for _ in range(100):
    if set(threading.enumerate()) <= before:
      return
    time.sleep(.05)
  raise AssertionError(set(threading.enumerate()) - before)


@pytest.mark.parametrize('workers', [0, 1])
def test_blas_starts_no_threads_of_its_own(config, workers):
  pytest.importorskip('threadpoolctl').threadpool_limits(2, 'blas')

  class Source:
    def __len__(self):
      return 100

    def __getitem__(self, i):
      import threadpoolctl
      most = max(p['num_threads'] for p in threadpoolctl.threadpool_info() if p['user_api'] == 'blas')
      return {'image': np.zeros((20, 20), np.uint8), 'index': most, 'bad': False}

  config.data.workers = workers
  stream = streams.Stream('xray', config, Source())
  assert (stream.next()['id'] == 1).all()
  stream.close()


def test_phantom_streams(config):
  config.data.ct = config.data.xray = ''
  config.data.phantom_records = 3
  built = streams.build(config)
  assert {n: s.records for n, s in built.items()} == {'ct': 3, 'xray': 3}
  for stream in built.values():
    assert all(np.isfinite(v).all() for v in stream.next().values())
    stream.close()


def test_drr_that_no_loss_looks_at_are_not_rendered(config):
  """Everything else is drawn as before."""
  stream = streams.build(config, ['ct'])['ct']
  config.loss.update(dict(drr=0., recon_drr=0., pair_nce=0.))
  without = streams.build(config, ['ct'])['ct']
  assert without.spec == {k: v for k, v in stream.spec.items() if k != 'drr'}
  assert_same(take(without, 2), [{k: v for k, v in b.items() if k != 'drr'} for b in take(stream, 2)])
  stream.close()
  without.close()


def test_several_views_from_one_read(config, monkeypatch):
  """A record's rows follow each other, with draws of their own; it is read once; the position stays one integer."""
  config.data.views_per_read = 2
  reads, get = [], sources.CTFolder.__getitem__
  monkeypatch.setattr(sources.CTFolder, '__getitem__', lambda self, i: (reads.append(i), get(self, i))[1])
  stream = streams.build(config, ['ct'])['ct']
  reads.clear()
  got = take(stream, 5)      # 20 rows: one pass
  ids = np.concatenate([b['id'] for b in got])
  assert (ids[::2] == ids[1::2]).all() and sorted(ids[::2]) == list(range(FILES))
  first, second = (np.concatenate([b['ct'] for b in got])[k::2] for k in (0, 1))
  assert not any(np.array_equal(a, b) for a, b in zip(first, second))
  assert len(reads) <= FILES + 2 * streams.THREADS + 4 * streams.BUFFER and stream.position() == 20
  other = streams.build(config, ['ct'])['ct']
  other.seek(8)
  assert_same(take(other, 3), got[2:])
  stream.close()
  other.close()


def test_prepared_shards_and_mixtures_are_named_by_the_same_leaf(config, tmp_path):
  out = tmp_path / 'out'
  assert prepare.main([config.data.ct, f'--out={out}', '--workers=0']) == 0
  folder = config.data.ct
  config.data.ct = config.data.xray = str(out)
  built = streams.build(config)
  assert isinstance(built['ct'].source, prepared.PreparedCT) and isinstance(built['xray'].source, prepared.PreparedXray)
  rows = take(built['ct'], 2)
  config.data.ct = f'{out}@2,{folder}'      # the folder holds the shards too, as files that are no scans
  mixed = streams.build(config, ['ct'])['ct']
  assert mixed.records == 3 * FILES and np.isfinite(mixed.next()['ct']).all()
  config.data.workers = 1
  config.data.ct = str(out)
  worker = streams.build(config, ['ct'])['ct']
  assert_same(take(worker, 2), rows)
  for stream in (*built.values(), mixed, worker):
    stream.close()
