"""Overlapping tiles of one scan are not each other's negatives."""
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax.losses import contrastive


def test_nt_xent_with_distinct_groups_is_plain_nt_xent():
  z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5)))
  assert float(contrastive.nt_xent(z, .2, jnp.arange(6))) == pytest.approx(float(contrastive.nt_xent(z, .2)), rel=1e-6)


def test_nt_xent_leaves_rows_of_the_own_group_out():
  """By hand: each view against its partner and the views of the other groups."""
  z = np.random.default_rng(1).normal(size=(2, 4, 5))
  group = np.array([7, 7, 3, 5])
  u = (z / np.linalg.norm(z, axis=-1, keepdims=True)).reshape(8, 5)
  total = 0.
  for i in range(8):
    partner = (i + 4) % 8
    others = [j for j in range(8) if group[j % 4] != group[i % 4]] + [partner]
    scores = np.array([u[i] @ u[j] / .2 for j in others])
    total += np.log(np.exp(scores).sum()) - u[i] @ u[partner] / .2
  np.testing.assert_allclose(contrastive.nt_xent(jnp.asarray(z), .2, jnp.asarray(group)), total / 8, rtol=1e-5)
