"""InfoNCE and NT-Xent against sums written out in numpy, reference gradients, and their own sharded form."""
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from unimiss_jax.losses import contrastive

RNG = np.random.default_rng(0)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_nt_xent_written_out():
  z = RNG.standard_normal((2, 5, 8))
  flat, terms = unit(z.reshape(10, 8)), []
  for i in range(10):
    scores = np.exp(flat @ flat[i] / 0.2)
    terms.append(-np.log(scores[(i + 5) % 10] / (scores.sum() - scores[i])))
  np.testing.assert_allclose(contrastive.nt_xent(z.astype(np.float32), 0.2), np.mean(terms), rtol=1e-5)


def test_chance_levels():
  same = np.ones((2, 8, 4), np.float32)
  np.testing.assert_allclose(contrastive.nt_xent(same, 0.2), np.log(15), rtol=1e-6)
  np.testing.assert_allclose(contrastive.info_nce(same[0], same[1], 1.), np.log(8), rtol=1e-6)


def test_gradients_are_finite_when_a_projection_is_zero():
  z = np.zeros((2, 4, 3), np.float32)
  assert np.isfinite(jax.grad(lambda z: contrastive.nt_xent(contrastive.standardize(z.reshape(8, 3)).reshape(z.shape),
                                                            0.2))(z)).all()


def info_nce_numpy(image, text, log_scale, valid, positive):
  """Mean over both directions; the positives of a row share its mass."""
  scores, total = np.exp(log_scale) * unit(image) @ unit(text).T, 0
  for s in (scores, scores.T):
    log_p = s - np.log(np.exp(s[:, valid]).sum(1, keepdims=True))
    total += -np.mean([log_p[i, positive[i] & valid].mean() for i in np.flatnonzero(valid)])
  return total / 2


@pytest.mark.parametrize('rows', ['all', 'valid', 'reports'])
def test_info_nce_written_out(rows):
  image, text = RNG.standard_normal((2, 6, 5))
  report = np.array([0, 1, 2, 0, 4, 1])
  valid = np.array([1, 1, 0, 1, 1, 1], bool) if rows == 'valid' else np.ones(6, bool)
  positive = report[:, None] == report if rows == 'reports' else np.eye(6, dtype=bool)
  options = {'all': {}, 'valid': {'valid': valid}, 'reports': {'report_id': report}}[rows]
  value = contrastive.info_nce(image.astype(np.float32), text.astype(np.float32), 1.5, **options)
  np.testing.assert_allclose(value, info_nce_numpy(image, text, 1.5, valid, positive), rtol=1e-5)


@pytest.mark.realdata
@pytest.mark.parametrize('case, options', [
    ('infonce', ()), ('infonce_valid', ('valid',)), ('multipos', ('report_id',))])
def test_info_nce_equals_the_torch_reference(shared, case, options):
  fixture = np.load(shared / 'fixtures' / 'unimedi' / 'contrastive.npz')
  options = {k: fixture[k] for k in options}
  with jax.enable_x64(True):
    value, grads = jax.value_and_grad(lambda *a: contrastive.info_nce(*a, **options), argnums=(0, 1))(
        fixture['img_raw'], fixture['txt_raw'], fixture['log_scale'])
  np.testing.assert_allclose(value, fixture[f'{case}_loss'], rtol=1e-10)
  for grad, name in zip(grads, ('dimg', 'dtxt')):
    np.testing.assert_allclose(grad, fixture[f'{case}_{name}'], rtol=0, atol=1e-10)


@pytest.mark.parametrize('devices', [2, 4])
def test_info_nce_over_devices_is_the_global_one(devices):
  """Loss and gradients of the gathered form equal the unsharded ones: negatives are global, no gradient is lost."""
  mesh = jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,))
  image, text = RNG.standard_normal((2, 8, 5))
  valid, report = np.arange(8) != 3, np.array([0, 1, 2, 3, 0, 5, 1, 7])
  rows = PartitionSpec('data')
  with jax.enable_x64(True):
    local = lambda i, t, s, v, r: contrastive.info_nce(i, t, s, v, r, axis_name='data')
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, PartitionSpec(), rows, rows),
                            out_specs=PartitionSpec())
    want = jax.value_and_grad(contrastive.info_nce, argnums=(0, 1, 2))(image, text, 1.5, valid, report)
    got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2)))(image, text, 1.5, valid, report)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_standardize():
  z = RNG.standard_normal((16, 4)).astype(np.float32) * [1, 10, .1, 3] + [0, 5, -2, 100]
  y = np.asarray(contrastive.standardize(z.astype(np.float32)))
  np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(y.std(0), 1, atol=1e-4)
