"""The bank of DeepCluster: who is written where, whose cluster is learned, on any number of devices."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax import sharding
from unimiss_jax.losses import clustering
from unimiss_jax.methods import clusters


def filled(devices):
  """Two directions per crop: samples 0..3 of crop 0 along the first axis, 4..7 along the second; crop 1 by parity."""
  mesh = sharding.make_mesh(devices, 1, jax.devices()[:devices])
  store = clusters.empty(9, 4, 3, (2, 2))
  store = jax.device_put(store, sharding.shardings(store, mesh))
  visits = np.array([[7, 2, 5, 0], [4, 1, 6, 3], [2, 8, -1, -1]])      # 2 comes twice, 8 once; the rest is padding
  for turn, ids in enumerate(visits):
    halves = np.eye(3)[np.where(ids == 8, 0, ids // 4)], np.eye(3)[ids % 2]
    z = np.stack(halves, 1)
    if turn == 2:
      z[0] = z[0, :, [1, 0, 2]].T      # the second time sample 2 looks like the others
    store = jax.jit(clusters.write)(store, jnp.asarray(z, jnp.float32), jnp.asarray(ids, jnp.int32), turn)
  return store


def test_samples_get_the_cluster_of_their_last_row_on_any_number_of_devices():
  one, four = (clusters.renewed(filled(n), jax.random.key(3), 10) for n in (1, 4))
  for store in (one, four):
    table = np.asarray(store['table'])
    first, second = table
    assert len({*first}) == 2 and len({*second}) == 2
    assert {*first[[0, 1, 3, 8]]} != {*first[[4, 5, 6, 7]]} and first[2] == first[4]
    assert all(second[i] == second[i % 2] for i in (3, 4, 5, 6, 7, 8)) and second[0] != second[1]
  np.testing.assert_array_equal(one['table'], four['table'])
  assert four['bank_rows'].sharding.shard_shape(four['bank_rows'].shape) == (2, 3, 1, 3)
  sizes = np.linalg.norm(four['centroids']['head_0'], axis=1)
  np.testing.assert_allclose(sizes, 1, atol=1e-6)


def test_the_loss_is_that_to_the_cluster_of_the_sample():
  store = clusters.empty(4, 2, 2, (2,)) | {'centroids': {'head_0': jnp.eye(2)}, 'table': jnp.int32([[0, 1, -100, 0]])}
  z = jnp.float32([[[1, 0], [0, 1]], [[1, 0], [1, 0]], [[0, 1], [0, 1]], [[0, 1], [0, 1]]])
  got = clusters.loss(store, z, jnp.int32([0, 1, 2, 77]), .5)          # 2 was not seen, 77 has no place
  log_p = lambda cosine: np.log(np.exp(cosine / .5) / (np.exp(2) + 1))
  np.testing.assert_allclose(got, -np.mean([log_p(1), log_p(0), log_p(0), log_p(0)]), rtol=1e-6)


def test_where_a_bank_has_no_room_for_a_seed_none_is_drawn_twice():
  valid = jnp.bool_([[1, 0], [1, 1]])
  memory = jnp.arange(4.).reshape(2, 2, 1)
  seeds = clustering.seed_rows(jax.random.key(0), memory, valid, 3, jnp.arange(4).reshape(2, 2))
  np.testing.assert_array_equal(np.sort(seeds[:, 0]), [0, 2, 3])


RECORDS, BATCH, WIDTH, HEADS = 30, 8, 6, (3, 4, 5)      # the fourth step of an epoch visits two records again


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def visited(devices: int):
  """A store on so many devices after an epoch of random rows, and these: {id: [2, D]}."""
  mesh = sharding.make_mesh(devices, 1, jax.devices()[:devices])
  store = clusters.empty(RECORDS, BATCH, WIDTH, HEADS)
  rng, seen = np.random.default_rng(0), {}
  order = np.concatenate([rng.permutation(RECORDS), [0, 1]]).reshape(-1, BATCH)
  for turn, ids in enumerate(order):
    z = unit(rng.normal(size=(BATCH, 2, WIDTH)))
    store = clusters.write(store, jnp.asarray(z), jnp.asarray(ids, jnp.int32), turn)
    seen |= dict(zip(ids.tolist(), z))
  return jax.device_put(store, sharding.shardings(store, mesh)), seen


@pytest.mark.parametrize('devices', (1, 2, 8))
def test_clusters_are_those_of_the_nearest_centroids_whatever_the_devices(devices):
  store, seen = visited(devices)
  assert str(store['bank_rows'].sharding.spec) == str(sharding.P(None, None, sharding.AXES))
  new = clusters.renewed(store, jax.random.key(3), 4)
  alone = clusters.renewed(visited(1)[0], jax.random.key(3), 4)
  np.testing.assert_array_equal(new['table'], alone['table'])
  assert new['table'].sharding == store['table'].sharding
  for h, k in enumerate(HEADS):
    centroids = np.asarray(new['centroids'][f'head_{h}'])
    assert centroids.shape == (k, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
    want = [np.argmax(centroids @ seen[i][h % 2]) for i in range(RECORDS)]
    np.testing.assert_array_equal(new['table'][h], want)


def test_a_queue_holds_the_rows_of_the_last_steps():
  store, want = clusters.queue(2, 3, 4), np.zeros((2, 2, 3, 4))
  for step in range(5):
    assert bool(clusters.full(store)) == (step >= 2)
    z = np.random.default_rng(step).normal(size=(3, 2, 4)).astype(np.float32)
    store = clusters.write(store, jnp.asarray(z), jnp.arange(3) + step, step % 2)
    want[:, step % 2] = z.swapaxes(0, 1)
  np.testing.assert_array_equal(store['bank_rows'], want.astype(np.float32))
  np.testing.assert_array_equal(store['bank_ids'], [[4, 5, 6], [3, 4, 5]])


def test_what_is_told_of_clusters():
  """Renamed clusters are the same ones; the index of a known pair of assignments is worked out by hand."""
  old = jnp.int32([[0, 0, 0, 1, 1, 1, -100]])
  told = lambda new, k=3: {n: float(v) for n, v in clusters.told(old, jnp.int32([new]), [k]).items()}
  same = told([2, 2, 2, 0, 0, 0, 0])
  np.testing.assert_allclose([same[k] for k in clusters.TOLD], [4 / 7, 1 / 3, 1.], rtol=1e-6)
  # pairs: 2 in both, 6 in the old ones, 3 in the new ones, 15 in all: (2 - 1.2) / (4.5 - 1.2)
  np.testing.assert_allclose(told([0, 0, 1, 1, 2, 2, 0])['kept'], .8 / 3.3, rtol=1e-5)
  assert np.isnan(clusters.told(jnp.full((1, 3), -100), jnp.int32([[0, 1, 1]]), [2])['kept'])
