"""Layers against formulas written out in numpy, and scipy's interpolation."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special

from unimiss_jax.models import layers

RNG = np.random.default_rng(0)


def test_instance_norm_is_biased_per_sample_and_channel():
  x = RNG.standard_normal((2, 3, 4, 5, 2)).astype(np.float32) * 3 + 1
  params = {'scale': jnp.array([2., .5]), 'bias': jnp.array([1., -1.])}
  wide = x.astype(np.float64)
  mean, var = wide.mean((1, 2, 3), keepdims=True), wide.var((1, 2, 3), keepdims=True)
  want = (wide - mean) / np.sqrt(var + 1e-5) * [2, .5] + [1, -1]
  np.testing.assert_allclose(layers.InstanceNorm().apply({'params': params}, x), want, atol=1e-5)


def test_instance_norm_of_a_constant_is_its_bias():
  x = np.full((1, 4, 4, 1), -3.02, np.float32)
  params = {'scale': jnp.ones(1), 'bias': jnp.full(1, .25)}
  y, grad = jax.value_and_grad(lambda x: layers.InstanceNorm().apply({'params': params}, x).mean())(x)
  np.testing.assert_allclose(y, .25, atol=1e-3)
  assert np.isfinite(grad).all()


def silent_block(features, channels, stride, **extra):
  """A residual block whose own branch is zero: what remains is the shortcut."""
  block = layers.ConvBlock(features, stride, residual=True)
  params = {'conv': {'kernel': jnp.zeros((*(3,) * len(stride), channels, features))},
            'norm': {'scale': jnp.ones(features), 'bias': jnp.zeros(features)}, **extra}
  return lambda x: block.apply({'params': params}, x)


def test_residual_block_passes_its_input():
  x = RNG.standard_normal((2, 4, 4, 4, 3)).astype(np.float32)
  np.testing.assert_array_equal(silent_block(3, 3, (1, 1, 1))(x), x)


def test_strided_residual_block_pools_and_projects():
  x = RNG.standard_normal((2, 4, 6, 8, 3)).astype(np.float32)
  w = RNG.standard_normal((1, 1, 1, 3, 5)).astype(np.float32)
  y = silent_block(5, 3, (1, 2, 2), skip={'kernel': w})(x)
  pooled = x.reshape(2, 4, 3, 2, 4, 2, 3).mean((3, 5))
  np.testing.assert_allclose(y, pooled @ w[0, 0, 0], atol=1e-5)


def test_gelu_is_exact():
  x = np.linspace(-6, 6, 101)
  want = x * scipy.special.ndtr(x)
  np.testing.assert_allclose(layers.gelu(jnp.asarray(x, jnp.float32)), want, atol=2e-6)


def test_drop_path_drops_rows_and_keeps_the_mean():
  keys = jax.random.split(jax.random.key(0), 4000)
  y = np.asarray(layers.drop_path(jnp.ones((4000, 2, 3)), 0.3, keys))
  rows = y[:, 0, 0]
  np.testing.assert_array_equal(y, np.broadcast_to(rows[:, None, None], y.shape))
  np.testing.assert_allclose(np.unique(rows), [0, 1 / 0.7], rtol=1e-6)
  assert abs((rows > 0).mean() - 0.7) < 4 * (0.3 * 0.7 / 4000)**0.5


def test_drop_path_follows_the_row_not_its_place():
  block = layers.Block(num_heads=1, mlp_ratio=2, sr_ratio=1, index=3, cls_token=False, drop_path=0.5)
  x = jnp.asarray(RNG.standard_normal((8, 4, 4)), jnp.float32)
  params = jax.tree.map(lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape), leaf.dtype),
                        jax.eval_shape(lambda: block.init(jax.random.key(0), x, (2, 2))['params']))
  keys = jax.random.split(jax.random.key(1), 8)
  run = lambda x, keys: np.asarray(block.apply({'params': params}, x, (2, 2), True, keys))
  y, order = run(x, keys), np.array([3, 1, 4, 0, 5, 7, 6, 2])
  np.testing.assert_allclose(run(x[order], keys[order]), y[order], rtol=1e-5)
  assert 0 < (abs(y - x).max((1, 2)) == 0).sum() < 8         # rows that lost both branches, and rows that did not


def keys_cubic(t, a=-0.75):
  """Cubic convolution as published: two polynomials in |t|."""
  t = abs(t)
  if t <= 1:
    return (a + 2) * t**3 - (a + 3) * t**2 + 1
  return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.


@pytest.mark.parametrize('native, grid', [((4, 4), (8, 6)), ((6, 6), (3, 4)), ((4, 4), (4, 7))])
def test_bicubic_positions(native, grid):
  """Every output as the 4 x 4 sum over its neighbours, edges repeated, height before width."""
  table = RNG.standard_normal((1, 1 + native[0] * native[1], 3))
  maps, want = table[0, 1:].reshape(*native, 3), np.zeros((*grid, 3))
  for i in range(grid[0]):
    for j in range(grid[1]):
      y, x = ((k + .5) * n / g - .5 for k, n, g in zip((i, j), native, grid))
      for p in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
        for q in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
          pixel = maps[min(max(p, 0), native[0] - 1), min(max(q, 0), native[1] - 1)]
          want[i, j] += keys_cubic(y - p) * keys_cubic(x - q) * pixel
  got = layers.resize_positions(jnp.asarray(table, jnp.float32), native, grid, True)
  np.testing.assert_allclose(got[0, 1:].reshape(*grid, 3), want, atol=1e-5)
  np.testing.assert_array_equal(got[0, 0], table[0, 0].astype(np.float32))


@pytest.mark.parametrize('native, grid', [((2, 4, 4), (4, 6, 5)), ((4, 3, 3), (2, 4, 6))])
def test_trilinear_positions(native, grid):
  table = RNG.standard_normal((1, np.prod(native), 2))
  points = np.meshgrid(*((np.arange(g) + .5) * n / g - .5 for n, g in zip(native, grid)), indexing='ij')
  want = np.stack([scipy.ndimage.map_coordinates(c, points, order=1, mode='nearest')
                   for c in table[0].reshape(*native, 2).transpose(3, 0, 1, 2)], -1)
  got = layers.resize_positions(jnp.asarray(table, jnp.float32), native, grid, False)
  np.testing.assert_allclose(got.reshape(*grid, 2), want, atol=1e-5)


def test_positions_of_the_native_grid_are_untouched():
  table = jnp.asarray(RNG.standard_normal((1, 17, 3)), jnp.float32)
  assert layers.resize_positions(table, (4, 4), (4, 4), True) is table
