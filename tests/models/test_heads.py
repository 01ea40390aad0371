"""The DINO head against its formula in numpy."""
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from unimiss_jax.models.heads import DINOHead

X = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)


def build(**options):
  head = DINOHead(out_dim=7, hidden_dim=5, bottleneck_dim=4, **options)
  params = head.init(jax.random.key(0), X)['params']
  return head, jax.tree.map(lambda leaf: leaf + 0.1, params)


def project(params, x):
  for name in ('mlp_0', 'mlp_2', 'mlp_4'):
    x = x @ np.asarray(params[name]['kernel'], np.float64) + np.asarray(params[name]['bias'])
    x = x if name == 'mlp_4' else x * scipy.special.ndtr(x)
  return x


def test_logits_are_scaled_cosines():
  head, params = build()
  z = project(params, X)
  g, v = (np.asarray(params['last_layer'][k], np.float64) for k in ('weight_g', 'weight_v'))
  want = z / np.linalg.norm(z, axis=1, keepdims=True) @ (g * v / np.linalg.norm(v, axis=1, keepdims=True)).T
  np.testing.assert_allclose(head.apply({'params': params}, X), want, atol=1e-5)
  np.testing.assert_allclose(head.apply({'params': params}, X, method='project'), z, atol=1e-5)


def test_without_last_layer_the_head_is_the_projection():
  head, params = build(last_layer=False)
  assert set(params) == {'mlp_0', 'mlp_2', 'mlp_4'}
  np.testing.assert_allclose(head.apply({'params': params}, X), project(params, X), atol=1e-5)


def test_lengths_of_the_prototypes_are_not_trained_and_zero_input_is_finite():
  head, params = build()
  grad = jax.grad(lambda p: head.apply({'params': p}, X)[:, 0].sum())(params)
  assert not grad['last_layer']['weight_g'].any() and grad['last_layer']['weight_v'].any()
  zero = jax.tree.map(jnp.zeros_like, params) | {'last_layer': params['last_layer']}
  value, grad = jax.value_and_grad(lambda p: head.apply({'params': p}, X).sum())(zero)
  assert value == 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


def test_initial_widths():
  params = DINOHead(512, 256, 64, linear_init='fan_in').init(jax.random.key(0), jnp.zeros((1, 80)))['params']
  assert abs(params['mlp_2']['kernel'].std() * 16 - 1) < 0.03
  assert abs(params['last_layer']['weight_v']).max() <= 1 / 8
  params = DINOHead(512, 256, 64).init(jax.random.key(0), jnp.zeros((1, 80)))['params']
  assert abs(params['mlp_2']['kernel'].std() / 0.02 - 1) < 0.03
  assert (params['last_layer']['weight_g'] == 1).all() and not params['mlp_0']['bias'].any()
