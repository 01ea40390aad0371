"""Every convolution form against XLA's native convolution: value, input gradient and kernel gradient."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax.models import conv


def native(x, kernel, stride, padding, groups=1):
  n = x.ndim - 2
  axes = 'DHW'[3 - n:]
  return jax.lax.conv_general_dilated(x, kernel, stride, padding, feature_group_count=groups,
                                      dimension_numbers=(f'N{axes}C', f'{axes}IO', f'N{axes}C'))


def agree(ours, theirs, *arguments):
  """Both functions, and their gradients for a random cotangent, to 1e-5 of the largest value."""
  cotangent = None
  results = []
  for f in (theirs, ours):
    y, backward = jax.vjp(f, *arguments)
    cotangent = draw(7, y.shape) if cotangent is None else cotangent
    results.append((y, *backward(cotangent)))
  for name, want, got in zip(('value', 'dx', 'dw'), *results):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(abs(want).max()), err_msg=name)


def draw(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('size, channels, kernel, stride', [
    ((5, 7, 6), (3, 4), (3, 3, 3), (1, 1, 1)),
    ((6, 8, 8), (3, 4), (3, 3, 3), (1, 2, 2)),
    ((6, 8, 6), (3, 4), (3, 3, 3), (2, 2, 2)),
    ((7, 9, 5), (2, 3), (3, 3, 3), (2, 1, 2)),     # odd sizes under a stride
    ((5, 6, 8), (1, 4), (3, 3, 3), (1, 1, 1)),     # one channel: columns are folded
    ((5, 6, 7), (1, 4), (3, 3, 3), (1, 1, 1)),
    ((9, 14, 14), (1, 4), (7, 7, 7), (1, 2, 2)),
    ((8, 4, 4), (2, 3), (5, 3, 3), (3, 1, 1)),
    ((3, 4, 5), (3, 2), (1, 1, 1), (1, 1, 1)),
    ((8, 7), (3, 4), (3, 3), (2, 2)),
])
def test_conv(size, channels, kernel, stride):
  x, w = draw(0, (2, *size, channels[0])), draw(1, (*kernel, *channels))
  padding = [((k - 1) // 2,) * 2 for k in kernel]
  agree(lambda x, w: conv.conv(x, w, stride, 'slices'), lambda x, w: native(x, w, stride, padding), x, w)


def test_conv_takes_the_native_form_in_two_dimensions_and_slices_in_three():
  forms = {}
  for n in (2, 3):
    x, w = jnp.zeros((1, *(4,) * n, 2)), jnp.zeros((*(3,) * n, 2, 2))
    forms[n] = str(jax.make_jaxpr(conv.conv)(x, w))
  assert 'custom_vjp' not in forms[2] and 'custom_vjp' in forms[3]


@pytest.mark.parametrize('size, k', [((8, 12, 4), (4, 4, 2)), ((6, 9), (2, 3)), ((9, 7), (4, 4))])
def test_patch_convolutions(size, k):
  x = draw(0, (2, *size, 3))
  valid = [(0, 0)] * len(k)
  agree(conv.patch_conv, lambda x, w: native(x, w, k, valid), x, draw(1, (*k, 3, 5)))
  agree(conv.depthwise_patch_conv, lambda x, w: native(x, w, k, valid, groups=3), x, draw(1, (*k, 1, 3)))
  mean = jnp.ones((*k, 1, 3)) / np.prod(k)
  np.testing.assert_allclose(conv.patch_mean(x, k), native(x, mean, k, valid, groups=3), atol=1e-6)


@pytest.mark.parametrize('size, s', [((3, 4, 2), (1, 2, 2)), ((2, 3, 2), (2, 2, 2)), ((3, 5), (2, 2))])
def test_transposed_conv_places_every_tap(size, s):
  """out[s * i + r] = x[i] . kernel[r], written out."""
  x, w = draw(0, (2, *size, 3)), draw(1, (*s, 3, 5))
  want = np.zeros((2, *(a * b for a, b in zip(size, s)), 5))
  for i in itertools.product(*map(range, size)):
    for r in itertools.product(*map(range, s)):
      place = tuple(a * b + c for a, b, c in zip(i, s, r))
      want[(slice(None), *place)] = np.asarray(x[(slice(None), *i)], np.float64) @ np.asarray(w[r], np.float64)
  np.testing.assert_allclose(conv.transposed_conv(x, w), want, atol=1e-5)


def test_transposed_conv_is_the_transpose_of_the_patch_convolution():
  x, w = draw(0, (2, 3, 4, 3)), draw(1, (2, 2, 3, 5))
  y = draw(2, (2, 6, 8, 5))
  forward = jnp.vdot(conv.transposed_conv(x, w), y)
  np.testing.assert_allclose(forward, jnp.vdot(x, conv.patch_conv(y, w.swapaxes(-1, -2))), rtol=1e-5)


def test_one_patch_that_fills_a_volume():
  """Rank-8 sums over the batch end the process with a segmentation fault in the CPU library of jaxlib 0.10."""
  rng = np.random.default_rng(0)
  x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 8, 8, 8), (8, 8, 8, 1, 8), (2, 1, 1, 1, 8)))
  got = jax.jit(jax.grad(lambda w, x, g: (conv.depthwise_patch_conv(x, w) * g).sum()))(w, x, g)
  np.testing.assert_allclose(got[..., 0, :], np.einsum('bijkc,bc->ijkc', x, g[:, 0, 0, 0]), rtol=1e-5, atol=1e-5)
