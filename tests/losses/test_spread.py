"""KoLeo, coding rate and masks against closed forms and numpy."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax.losses import masking, spread

RNG = np.random.default_rng(0)


def test_koleo_is_the_log_distance_to_the_nearest():
  x = RNG.normal(size=(12, 5))
  u = x / np.linalg.norm(x, axis=1, keepdims=True)
  d = np.linalg.norm(u[:, None] - u[None], axis=-1) + 10 * np.eye(12)
  with jax.enable_x64():
    np.testing.assert_allclose(spread.koleo(jnp.asarray(x)), -np.log(d.min(1)).mean(), rtol=1e-6)
    pair = lambda angle: jnp.array([[1., 0.], [jnp.cos(angle), jnp.sin(angle)]])
    # two points at an angle: chord 2 sin(a / 2), so the slope is -cot(a / 2) / 2
    np.testing.assert_allclose(jax.grad(lambda a: spread.koleo(pair(a)))(1.), -.5 / np.tan(.5), rtol=1e-5)


@pytest.mark.parametrize('n, d', [(6, 20), (20, 6)])
def test_coding_rate(n, d):
  x = RNG.normal(size=(n, d))
  u = x / np.linalg.norm(x, axis=1, keepdims=True)
  want = .5 * np.log(1 + d / (n * .25) * np.linalg.svd(u, compute_uv=False)**2).sum()
  with jax.enable_x64():
    np.testing.assert_allclose(spread.coding_rate(jnp.asarray(x)), want, rtol=1e-6)


def test_simdino_of_views_that_fill_the_space_and_of_a_collapse():
  views = jnp.stack([jnp.eye(8)[:4]] * 2)      # 8 rows over 4 directions, both views alike
  half = .5 * 4 * np.log1p(8 / (4 * .25))
  largest = .5 * 8 * np.log1p(8 / (8 * .25))
  np.testing.assert_allclose(spread.simdino(views, views, 1.), -half / largest, rtol=1e-5)
  whole = jnp.eye(8).reshape(2, 4, 8)
  np.testing.assert_allclose(spread.simdino(whole, whole[::-1], 1.), -1., rtol=1e-5)
  collapsed = jnp.ones((2, 4, 8))
  np.testing.assert_allclose(spread.simdino(collapsed, collapsed, 1.), -.5 * np.log1p(8 / .25) / largest, rtol=1e-5)
  np.testing.assert_allclose(spread.simdino(collapsed, -collapsed, 0.), 2., rtol=1e-5)
  grad = jax.grad(lambda t: spread.simdino(whole, t, 1.))(whole)
  assert not np.asarray(grad).any()


def test_masks_hide_whole_blocks_at_the_ratio():
  shape, block = (16, 48, 40), (4, 16, 16)
  many = jax.vmap(lambda k: masking.blocks(k, shape, block, (.1, .6)))(jax.random.split(jax.random.key(0), 400))
  many = np.asarray(many)
  assert many.shape == (400, *shape) and many.any((1, 2, 3)).all()
  whole = many[..., :32].reshape(400, 4, 4, 3, 16, 2, 16)
  np.testing.assert_array_equal(whole.any((2, 4, 6)), whole.all((2, 4, 6)))
  assert many.mean() == pytest.approx(.35, abs=.02)      # the mean of U(.1, .6)


def test_the_loss_sees_hidden_voxels_alone():
  x, raw = jnp.asarray(RNG.random((2, 3, 4, 6, 1))), jnp.asarray(RNG.normal(size=(2, 3, 4, 6, 1)))
  mask = RNG.random((2, 3, 4, 6)) < .3
  wrong = (1 / (1 + np.exp(-np.asarray(raw))) - np.asarray(x))[..., 0]**2
  want = np.mean([wrong[i, j][mask[i, j]].mean() for i in range(2) for j in range(3)])      # each view weighs the same
  np.testing.assert_allclose(masking.sigmoid_mse(raw, x, mask), want, rtol=1e-5)
  grad = np.asarray(jax.grad(lambda r: masking.sigmoid_mse(r, x, mask))(raw))[..., 0]
  assert grad[mask].all() and not grad[~mask].any()
  x, mask = x[0], mask[0]
  hidden = np.asarray(masking.hide(x[0], mask[0]))[..., 0]
  np.testing.assert_array_equal(hidden[~mask[0]], np.asarray(x[0, ..., 0])[~mask[0]])
  np.testing.assert_allclose(hidden[mask[0]], np.asarray(x[0]).mean(), rtol=1e-6)
