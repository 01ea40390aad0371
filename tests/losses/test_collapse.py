"""Known spectra and entropies."""
import jax.numpy as jnp
import numpy as np

from unimiss_jax.losses import collapse


def test_rankme_counts_equal_directions():
  q = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 6)))[0]
  for n in (1, 3, 6):
    np.testing.assert_allclose(collapse.rankme(jnp.asarray(q[:, :n])), n, rtol=2e-2)
  np.testing.assert_allclose(collapse.rankme(jnp.asarray(q[:, :3].T)), 3, rtol=2e-2)     # fewer rows than columns


def test_feature_std_of_isotropic_and_collapsed_features():
  x = np.random.default_rng(1).normal(size=(4000, 32)).astype(np.float32)
  np.testing.assert_allclose(collapse.feature_std(jnp.asarray(x)), 1., rtol=2e-2)
  assert collapse.feature_std(jnp.ones((8, 4))) < 1e-6


def test_teacher_entropy_is_ln_k_when_uniform_and_zero_on_one_prototype():
  k, center = 128, jnp.zeros((1, 128))
  uniform = collapse.teacher(jnp.zeros((2, 6, k)), center, 0.04)
  np.testing.assert_allclose(uniform['collapse/teacher_entropy'], np.log(k), rtol=1e-5)
  one = collapse.teacher(jnp.eye(k)[jnp.full((2, 6), 3)] * 10, center, 0.04)
  assert one['collapse/teacher_entropy'] < 1e-3 and one['collapse/batch_entropy'] < 1e-3
  spread = collapse.teacher(jnp.eye(k)[jnp.arange(k)] * 10, center, 0.04)
  assert spread['collapse/teacher_entropy'] < 1e-3
  np.testing.assert_allclose(spread['collapse/batch_entropy'], np.log(k), rtol=1e-3)
