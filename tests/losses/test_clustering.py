"""Clustering losses against arrays of an independent float64 reference, on one device and on several."""
import re
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from unimiss_jax.losses import clustering

DEVICES = (3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 6)))
IGNORED = -100


@pytest.fixture(params=['float64', pytest.param('float32', marks=pytest.mark.slow)])
def precise(request):
  """Both precisions: the tolerance of float64 is 1e-9 everywhere, that of float32 is the test's own."""
  with jax.enable_x64(True) if request.param == 'float64' else nullcontext():
    yield lambda tolerance: 1e-9 if request.param == 'float64' else tolerance


def read(fixtures, name):
  """Floats as wide as the precision of the test allows."""
  z = np.load(fixtures / 'joint' / f'{name}.npz')
  wide = jnp.zeros((), float).dtype
  return {k: z[k].item() if not z[k].ndim else z[k].astype(wide) if z[k].dtype.kind == 'f' else z[k] for k in z}


def close(x, y, tolerance):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def on(devices, f, inputs, outputs):
  mesh = jax.make_mesh((devices,), ('d',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs))


def test_sinkhorn_gives_the_codes_of_the_reference(fixtures, precise):
  z, tolerance = read(fixtures, 'sinkhorn'), precise(2e-6)
  sinkhorn = jax.jit(clustering.sinkhorn, static_argnums=2)
  for iters in (1, 3, 50):
    codes = sinkhorn(z['scores'], z['eps'], iters)
    close(codes, z[f'codes_it{iters}'], tolerance)
    close(codes.sum(1), 1, 1e-6)
  close(codes.sum(0), 12 / 20, 1e-4)
  close(clustering.sinkhorn(z['scores'], z['eps'], 3, z['queue_scores']), z['codes_queue_it3'], tolerance)
  close(sinkhorn(z['hard_scores'], z['eps'], 3), z['hard_codes_it3'], tolerance)
  with pytest.raises(ValueError, match='iters=0'):
    clustering.sinkhorn(z['scores'], z['eps'], 0)


def test_sinkhorn_does_not_overflow_in_float32(fixtures):
  z = read(fixtures, 'sinkhorn')
  close(clustering.sinkhorn(z['hard_scores'], z['eps'], 3), z['hard_codes_it3'], 2e-6)


@pytest.mark.parametrize('devices', DEVICES)
def test_sinkhorn_of_all_devices(fixtures, precise, devices):
  z = read(fixtures, 'sinkhorn')
  f = lambda s, q: clustering.sinkhorn(s, z['eps'], 3, q, 'd')
  codes = on(devices, f, (P('d'), P('d')), P('d'))(z['scores'], z['queue_scores'])
  close(codes, z['codes_queue_it3'], precise(2e-6))


def swapped(z, queue=None, axis_name=None):
  return partial(clustering.swapped_loss, assign=z['assign'], tau=z['tau'], eps=z['eps'], iters=z['iters'], queue=queue,
                 axis_name=axis_name)


def test_swapped_loss_and_its_gradient(fixtures, precise):
  z = read(fixtures, 'swapped_loss')
  logits = z['logits'].reshape(6, 12, 20)
  (loss, codes), grad = jax.jit(jax.value_and_grad(swapped(z), has_aux=True))(logits)
  close(loss, z['loss'], precise(1e-5))
  close(codes, z['codes'], precise(2e-6))
  close(grad.reshape(72, 20), z['dlogits'], precise(1e-6))
  close(swapped(z, z['queue_scores'])(logits)[0], z['loss_queue'], precise(1e-5))


@pytest.mark.parametrize('devices', DEVICES)
def test_swapped_loss_of_all_devices(fixtures, precise, devices):
  z = read(fixtures, 'swapped_loss')
  logits = z['logits'].reshape(6, 12, 20)
  f = on(devices, lambda x: swapped(z, axis_name='d')(x), P(None, 'd'), (P(), P(None, 'd')))
  outside = jax.jit(jax.value_and_grad(f, has_aux=True))
  (loss, codes), grad = outside(logits)
  inside = on(devices, jax.grad(lambda x: swapped(z, axis_name='d')(x)[0]), P(None, 'd'), P(None, 'd'))(logits)
  close(loss, z['loss'], precise(2e-6))
  close(codes, z['codes'], precise(2e-6))
  for g in (grad, inside):
    close(g.reshape(72, 20), z['dlogits'], precise(1e-6))
  assert not re.search('all-gather|all-to-all|collective-permute', f.lower(logits).compile().as_text())


def test_swapped_loss_by_hand():
  """Three crops, the last one gives no codes: mean over the two that do, then over the two others of each."""
  logits = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  codes = [np.asarray(clustering.sinkhorn(jnp.asarray(logits[a]), .5, 2)) for a in (0, 1)]
  log_p = np.log(np.exp(logits / .2) / np.exp(logits / .2).sum(-1, keepdims=True))
  pairs = [-(codes[a] * log_p[v]).sum(-1).mean() for a in (0, 1) for v in range(3) if v != a]
  loss, _ = clustering.swapped_loss(jnp.asarray(logits), (0, 1), .2, .5, 2)
  assert float(loss) == pytest.approx(np.mean(pairs), 1e-5)
  with pytest.raises(ValueError, match='one crop'):
    clustering.swapped_loss(jnp.asarray(logits[:1]), (0,), .2, .5, 2)


@pytest.mark.parametrize('devices', (None, *DEVICES))
def test_dc2_loss_and_its_gradient(fixtures, precise, devices):
  z = read(fixtures, 'dc2_loss')
  prototypes = [z[f'proto{h}'] for h in range(3)]
  crops = z['z'].reshape(2, 12, 16)
  f = lambda x, p, t: clustering.dc2_loss(x.reshape(-1, 16), p, t, z['tau'], devices and 'd')
  if devices:
    f = on(devices, f, (P(None, 'd'), P(), P(None, 'd')), P())
  loss, (dz, dp) = jax.jit(jax.value_and_grad(f, (0, 1)))(crops, prototypes, z['targets'])
  close(loss, z['loss'], precise(1e-5))
  close(dz.reshape(24, 16), z['dz'], precise(1e-5))
  assert not any(np.any(g) for g in dp)


def test_dc2_loss_of_samples_that_nobody_has_seen_is_nothing():
  z = jnp.ones((4, 3)) / 3**.5
  f = lambda z: clustering.dc2_loss(z, [jnp.eye(3)], jnp.full((1, 2), IGNORED), .1)
  loss, grad = jax.jit(jax.value_and_grad(f))(z)
  assert loss == 0 and not np.any(grad)


def padded(x, devices):
  return np.concatenate([x, np.full((-len(x) % devices, *x.shape[1:]), 7, x.dtype)])


@pytest.mark.parametrize('devices', (None, *DEVICES))
def test_kmeans_of_the_reference(fixtures, precise, devices):
  z, n = read(fixtures, 'kmeans'), devices or 1
  memory, ids = padded(z['memory'], n), padded(z['memory_index'], n)
  valid = np.arange(len(memory)) < 400
  f = lambda *given: clustering.kmeans(*given, z['iters'], devices and 'd')
  if devices:
    f = on(devices, f, (P('d'), P('d'), P()), (P(), P('d')))
  centroids, clusters = f(memory, valid, z['memory'][z['init_rows']])
  close(centroids, z['centroids'], precise(1e-5))
  np.testing.assert_array_equal(clusters[:400], z['local_assign'])
  assert np.all(clusters[400:] == IGNORED)
  np.testing.assert_array_equal(np.bincount(clusters[:400]), z['counts'])
  np.testing.assert_array_equal(clustering.scatter_assign(ids, clusters, 405), z['assignments'])


@pytest.mark.parametrize('iters', (0, 1, 2))
def test_kmeans_counts_its_rounds(fixtures, monkeypatch, iters):
  """Against a loop in numpy, in blocks of rows that do not divide them."""
  monkeypatch.setattr(clustering, 'SCORES', 7 * 33)
  z = read(fixtures, 'kmeans')
  memory, c = z['memory'].astype(np.float64), z['memory'][z['init_rows']].astype(np.float64)
  for _ in range(iters):
    of = (memory @ c.T).argmax(1)
    for k in range(7):
      if (of == k).any():
        mean = memory[of == k].mean(0)
        c[k] = mean / np.linalg.norm(mean)
  centroids, clusters = clustering.kmeans(z['memory'], np.ones(400, bool), z['memory'][z['init_rows']], iters)
  close(centroids, c, 1e-5)
  np.testing.assert_array_equal(clusters, (memory @ c.T).argmax(1))


def test_seeds_are_distinct_valid_rows_wherever_they_lie():
  """On one device, on four, and with the rows of each step in another order, as several processes lay them."""
  ids = np.arange(24).reshape(3, 8)
  memory, valid = ids[..., None].astype(np.float32), ids % 2 == 0
  f = jax.jit(partial(clustering.seed_rows, k=8))
  rows = np.asarray(f(jax.random.key(3), memory, valid, ids=ids))[:, 0]
  assert len(set(rows)) == 8 and np.all(rows % 2 == 0) and not np.array_equal(rows, np.sort(rows))
  mesh = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  order = np.random.default_rng(0).permutation(8)
  for given in ((memory, valid, ids), (memory[:, order], valid[:, order], ids[:, order])):
    m, v, i = jax.device_put(given, jax.NamedSharding(mesh, P(None, 'd')))
    np.testing.assert_array_equal(f(jax.random.key(3), m, v, ids=i)[:, 0], rows)
  assert not np.array_equal(f(jax.random.key(4), memory, valid, ids=ids)[:, 0], rows)


def test_two_data_sets_do_not_share_rows_of_the_table():
  """Ids are unique over all sets: the second set's first sample is not the first's."""
  table = clustering.scatter_assign(np.array([3, 0, 4, 1]), np.array([2, 0, 1, 1]), 6)
  np.testing.assert_array_equal(table, [0, 1, IGNORED, 2, 1, IGNORED])
