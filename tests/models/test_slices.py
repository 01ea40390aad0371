"""Scores and choice of planes against reference arrays; the near misses of the reference must not pass."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax.models import layers, slices


@pytest.fixture(scope='module')
def reference(fixtures):
  return np.load(fixtures / 'unimedi' / 'slice_scores.npz')


def rows_of(reference, dtype):
  """[B, L, H, 1 + P] from the queries and keys of every layer."""
  q, k = (reference[n].astype(dtype) for n in 'qk')                        # [B, L, H, 1 + P, dh]
  return jnp.stack([layers.class_row(q[:, i, :, 0], k[:, i].swapaxes(1, 2)) for i in range(q.shape[1])], 1)


@pytest.mark.parametrize('dtype, tolerance', [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_scores_equal_the_reference(reference, dtype, tolerance):
  with jax.enable_x64(dtype == np.float64):
    rows = rows_of(reference, dtype)
    v, s = slices.scores(rows, 8)
    np.testing.assert_allclose(v, reference['v_full'], rtol=0, atol=tolerance)
    np.testing.assert_allclose(s, reference['s_full'], rtol=0, atol=tolerance)
    of_patches = slices.scores(rows, 8, keys='patch')
    np.testing.assert_allclose(of_patches[0], reference['v_patch'], rtol=0, atol=tolerance)
    np.testing.assert_allclose(of_patches[1], reference['s_patch'], rtol=0, atol=tolerance)
    np.testing.assert_allclose(slices.scores(rows, 8, 'last')[1], reference['s_last_layer'], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(slices.select(s, 2), reference['top_full'])
    for near in ('s_patch', 's_last_layer', 's_rollout', 's_independent'):
      assert np.abs(s - reference[near]).max() > 1e-4, near


def test_selection():
  s = jnp.array([[.1, .5, .2, .5, .5], [.9, .1, .8, .3, .2]])
  np.testing.assert_array_equal(jax.jit(slices.select, static_argnums=1)(s, 2), [[1, 3], [0, 2]])
  valid = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]], bool)
  got = slices.select(s, 2, valid)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, [[2, 3], [2, 3]])
  with pytest.raises(ValueError, match='6 of 5 planes'):
    slices.select(s, 6)
  with pytest.raises(ValueError, match='rollout'):
    slices.scores(jnp.ones((1, 1, 1, 9)), 2, layers='rollout')


def test_slices_of_chosen_planes():
  planes = jnp.array([[0, 3], [1, 7]])
  np.testing.assert_array_equal(slices.middles(planes, 4), [[2, 14], [6, 30]])
  np.testing.assert_array_equal(slices.middles(planes, 1), planes)
  drawn = np.stack([slices.random_slices(planes, 4, jax.random.split(jax.random.key(i), 2)) for i in range(40)])
  np.testing.assert_array_equal(drawn // 4, np.broadcast_to(planes, drawn.shape))
  assert set((drawn % 4).ravel()) == {0, 1, 2, 3}
  np.testing.assert_array_equal(slices.spread(8, 2), [2, 6])
