"""Slices through a 2-D encoder in parts: values, gradients and statistics against all of them at once."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax import models
from unimiss_jax.models import deformable, slicewise
from unimiss_jax.models.resnet import ResNet, first_statistics

MIT = dict(name='mit_plus', embed_dims=(4, 4, 8, 8, 8, 8), decoder_dims=(8, 8, 8, 4, 4), num_heads=(1, 1, 1, 1),
           decoder_heads=(1, 1, 1), depths=(1, 1, 1, 1), image_size=64, encoder_drop_path=0.5, dtype='float64')


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def slices(n, side):
  return jnp.asarray(np.random.default_rng(0).standard_normal((n, side, side, 1)))


def value_and_grad(model, params, stats, x, keys, parts):
  """-> (value, new statistics), gradients: of a function that weighs every number of every slice differently."""
  weights = np.random.default_rng(1).standard_normal((x.shape[0], slicewise.levels_width(model)))

  def f(params, x):
    found, new = slicewise.levels(model, params, stats, x, keys, parts)
    return (found * weights).sum(), new
  return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(params, x)


def close(a, b):
  jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=0, atol=1e-9 * max(1., float(abs(v).max()))), a, b)


@pytest.mark.parametrize('training', [False, True])
def test_a_resnet_without_training_and_its_statistics_in_training(x64, training):
  """Of an untrained normalisation the parts are equal; in training their means average to the mean of all."""
  model = ResNet(depths=(1, 1), width=4, dtype=jnp.float64)
  params, stats = models.init_params(model, jax.random.key(0)), first_statistics(model)
  x = slices(8, 32)
  keys = jax.random.split(jax.random.key(1), 8) if training else None
  one, four = (value_and_grad(model, params, stats, x, keys, parts) for parts in (1, 4))
  if not training:
    return close(four, one)
  close(four[0][1]['bn1']['mean'], one[0][1]['bn1']['mean'])
  assert jax.tree.structure(four) == jax.tree.structure(one)
  assert float(jnp.abs(four[0][1]['bn1']['var'] - one[0][1]['bn1']['var']).max()) > 0


@pytest.mark.slow
def test_a_mit_in_training_draws_the_same_paths_whatever_the_parts(x64):
  model = models.build(MIT)
  params = jax.tree.map(lambda x: x.astype(jnp.float64), models.init_params(model, jax.random.key(0)))
  x, keys = slices(8, 64), jax.random.split(jax.random.key(1), 8)
  one, parts = (value_and_grad(model, params, {}, x, keys, n) for n in (1, 4))
  close(parts, one)
  other = value_and_grad(model, params, {}, x, jax.random.split(jax.random.key(2), 8), 4)
  assert abs(float(other[0][0] - one[0][0])) > 1e-3      # paths are drawn


def test_volumes_are_the_mean_of_their_tokens_and_of_any_length(x64):
  model, inter = ResNet(depths=(1, 1), width=4, dtype=jnp.float64), deformable.InterEncoder(
      layers=1, hidden=8, heads=2, head_dim=4, groups=2, dtype=jnp.float64)
  width = 8
  rng = np.random.default_rng(0)
  draw = lambda tree: jax.tree.map(lambda s: jnp.asarray(.3 * rng.standard_normal(s.shape)), tree)
  params = {'backbone': models.init_params(model, jax.random.key(0)), 'batch_stats': first_statistics(model),
            'slice': draw({'kernel': jnp.zeros((slicewise.levels_width(model), width)), 'bias': jnp.zeros(width)}),
            'inter': draw(jax.eval_shape(inter.init, jax.random.key(0), jnp.zeros((1, 4, width)))['params'])}
  x = slices(12, 32).reshape(2, 6, 32, 32, 1)
  run = jax.jit(slicewise.embed, static_argnums=(0, 1, 4))
  whole, parts = run(model, inter, params, x, 1), run(model, inter, params, x, 3)
  close(parts, whole)
  mean = np.asarray(whole.tokens).mean(1)
  close(whole.embedding, mean / np.linalg.norm(mean, axis=1, keepdims=True))
  assert whole.slices.shape == (2, 6, width)
