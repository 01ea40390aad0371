"""Convolutions of the models, in the form that is fast where they run; kernels are always shaped as those of `nn.Conv`.

XLA's native 3-D convolutions have pathological gradients on CPU (the input gradient of a strided one is a hundred
times slower than its forward pass), so that there a 3-D convolution is made of native 2-D ones over depth slices.
Accelerators take the native form. Where the kernel is the stride (patches), a convolution is a reshape and a product,
on every platform. All forms compute the same numbers.
"""
from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def conv(x, kernel, stride=None, impl: str = 'auto'):
  """Convolution with zero padding (k - 1) // 2, no bias.

  Args:
    x: [B, *S, C], two or three spatial axes S.
    kernel: [*k, C, O], odd k.
    stride: one int per spatial axis; None = 1.
    impl: 'native' = one `lax` convolution; 'slices' = 3-D by 2-D ones; 'auto' = slices for 3-D on CPU.

  Returns:
    [B, *ceil(S / stride), O].
  """
  n = x.ndim - 2
  stride = tuple(stride or (1,) * n)
  if impl == 'auto':
    impl = 'slices' if n == 3 and jax.default_backend() == 'cpu' else 'native'
  if math.prod(kernel.shape[:n]) == math.prod(stride) == 1:
    return x @ kernel.reshape(kernel.shape[-2:])
  return _slices(x, kernel, stride) if impl == 'slices' and n == 3 else _native(x, kernel, stride)


def _native(x, kernel, stride):
  n = x.ndim - 2
  axes = 'DHW'[3 - n:]
  return jax.lax.conv_general_dilated(
      x, kernel, stride, [((k - 1) // 2,) * 2 for k in kernel.shape[:n]],
      dimension_numbers=(f'N{axes}C', f'{axes}IO', f'N{axes}C'))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _slices(x, kernel, stride):
  """3-D by 2-D. Two forms of the same sum: one is fast forwards and for dX, the other for the kernel's gradient."""
  return _shift_outputs(x, kernel, stride)


def _slices_forward(x, kernel, stride):
  return _shift_outputs(x, kernel, stride), (x, kernel)


def _slices_backward(stride, saved, g):
  x, kernel = saved
  dx = jax.vjp(lambda x: _shift_outputs(x, kernel, stride), x)[1](g)[0]
  dw = jax.vjp(lambda w: _shift_inputs(x, w, stride), kernel)[1](g)[0]
  return dx, dw


_slices.defvjp(_slices_forward, _slices_backward)


def _shift_outputs(x, kernel, stride):
  """Every slice once, through all depth taps that meet it; the results are shifted along the depth and added."""
  (b, d), (step, *plane) = x.shape[:2], stride
  pad, depth, y = (kernel.shape[0] - 1) // 2, (d - 1) // step + 1, 0
  for phase in range(step):                                  # slices phase, phase + step, ...
    taps = [t for t in range(kernel.shape[0]) if (t - pad - phase) % step == 0]
    slices = x[:, phase::step]
    z = _plane(slices.reshape(-1, *x.shape[2:]), jnp.concatenate([kernel[t] for t in taps], -1), plane)
    z = z.reshape(b, slices.shape[1], *z.shape[1:])
    for t, part in zip(taps, jnp.split(z, len(taps), -1)):
      shift = (t - pad - phase) // step                      # output j takes slice j + shift
      zero = jnp.zeros((), z.dtype)
      y += jax.lax.pad(part, zero, [(0, 0, 0), (-shift, depth - part.shape[1] + shift, 0), *[(0, 0, 0)] * 3])
  return y


def _shift_inputs(x, kernel, stride):
  """One 2-D convolution per depth tap over the slices that it meets, added."""
  (b, d), (step, *plane) = x.shape[:2], stride
  pad, depth = (kernel.shape[0] - 1) // 2, (d - 1) // step + 1
  x = jnp.pad(x, ((0, 0), (pad, pad), (0, 0), (0, 0), (0, 0)))
  y = sum(_native(x[:, t:t + (depth - 1) * step + 1:step].reshape(b * depth, *x.shape[2:]), kernel[t], plane)
          for t in range(kernel.shape[0]))
  return y.reshape(b, depth, *y.shape[1:])


def _plane(x, kernel, stride):
  """2-D convolution [B, H, W, C]; of a single channel with two columns folded into the channels, a better matrix."""
  (kw, c, o), w = kernel.shape[1:], x.shape[2]
  if c > 1 or stride[1] > 1 or kw != 3 or w % 2:
    return _native(x, kernel, stride)
  # Output column j = 0, 1 of a pair sees columns j - 1 .. j + 1 of the six columns in three pairs.
  place = np.zeros((6, 2, 3), x.dtype)
  for j in range(2):
    place[j + 1 + np.arange(3), j, np.arange(3)] = 1
  folded = jnp.einsum('pjt,hto->hpjo', place, kernel[:, :, 0]).reshape(-1, 3, 2, 2 * o)
  y = _native(x.reshape(*x.shape[:2], w // 2, 2), folded, stride)
  return y.reshape(*y.shape[:2], w, o)


def patch_conv(x, kernel):
  """Convolution whose kernel is its stride, sizes floor-divided: [B, *S, C], [*k, C, O] -> [B, *S // k, O]."""
  k = kernel.shape[:-2]
  x = _blocks(x, k)                                          # [B, g, k, g, k, ..., C]
  n = len(k)
  x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
  return x.reshape(*x.shape[:n + 1], -1) @ kernel.reshape(-1, kernel.shape[-1])


def depthwise_patch_conv(x, kernel):
  """`patch_conv` of each channel by itself: [B, *S, C], [*k, 1, C] -> [B, *S // k, C]."""
  k = kernel.shape[:-2]
  n = len(k)
  x = _blocks(x, k)                                          # [B, g, k, g, k, ..., C]
  out = *x.shape[:2], *x.shape[3:-1:2], x.shape[-1]
  x = x.reshape(-1, *x.shape[2:])                            # rank 8 crashes the CPU library of jaxlib 0.10
  kernel = kernel.reshape(*(s for q in k for s in (1, q)), -1)[0]   # [k, 1, k, ..., C]
  return (x * kernel).sum(tuple(range(1, 2 * n, 2))).reshape(out)


def patch_mean(x, size):
  """Average over patches: [B, *S, C] -> [B, *S // size, C]."""
  return _blocks(x, size).mean(tuple(range(2, 2 * len(size) + 1, 2)))


def transposed_conv(x, kernel):
  """Transposed convolution whose kernel is its stride: out[s * i + r] = x[i] . kernel[r].

  Args:
    x: [B, *S, I].
    kernel: [*s, I, O] in the orientation of PyTorch, i.e. not flipped.

  Returns:
    [B, *(S * s), O].
  """
  s = kernel.shape[:-2]
  n = len(s)
  y = x @ jnp.moveaxis(kernel, -2, 0).reshape(kernel.shape[-2], -1)       # [B, *S, prod(s) * O]
  y = y.reshape(*x.shape[:-1], *s, -1)
  y = y.transpose(0, *(a for i in range(n) for a in (1 + i, 1 + n + i)), 2 * n + 1)
  return y.reshape(x.shape[0], *(a * b for a, b in zip(x.shape[1:-1], s)), -1)


def _blocks(x, k):
  """[B, *S, C] -> [B, S0 // k0, k0, S1 // k1, k1, ..., C]; what does not fill a block is cut off."""
  grid = [s // q for s, q in zip(x.shape[1:-1], k)]
  x = x[(slice(None), *(slice(g * q) for g, q in zip(grid, k)))]
  return x.reshape(x.shape[0], *(s for pair in zip(grid, k) for s in pair), x.shape[-1])
