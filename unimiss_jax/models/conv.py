"""Convolutions of the models, in the form that is fast where they run; kernels are always shaped as those of `nn.Conv`.

XLA's native 3-D convolutions have pathological gradients on CPU (the input gradient of a strided one is a hundred
times slower than its forward pass), so that there a 3-D convolution is written as a 2-D one whose channels are the
neighbouring depth slices, or as a sum of 2-D ones. Accelerators take the native form. Where the kernel is the
stride (patches), a convolution is a reshape and a product, on every platform. All forms compute the same numbers.
"""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Below this many input channels one 2-D convolution over stacked slices beats three separate ones (measured on CPU).
STACK_BELOW = 32


def conv(x, kernel, stride=None, impl: str = 'auto'):
  """Convolution with zero padding (k - 1) // 2, no bias.

  Args:
    x: [B, *S, C], two or three spatial axes S.
    kernel: [*k, C, O], odd k.
    stride: one int per spatial axis; None = 1.
    impl: 'native' = one `lax` convolution; 'slices' = 3-D through 2-D ones; 'auto' = slices for 3-D on CPU.

  Returns:
    [B, *ceil(S / stride), O].
  """
  n = x.ndim - 2
  stride = tuple(stride or (1,) * n)
  if impl == 'auto':
    impl = 'slices' if n == 3 and jax.default_backend() == 'cpu' else 'native'
  if math.prod(kernel.shape[:n]) == 1 and math.prod(stride) == 1:
    return x @ kernel.reshape(kernel.shape[-2:])
  return _slices(x, kernel, stride) if impl == 'slices' and n == 3 else _native(x, kernel, stride)


def _native(x, kernel, stride):
  n = x.ndim - 2
  axes = 'DHW'[3 - n:]
  return jax.lax.conv_general_dilated(
      x, kernel, stride, [((k - 1) // 2,) * 2 for k in kernel.shape[:n]],
      dimension_numbers=(f'N{axes}C', f'{axes}IO', f'N{axes}C'))


def _slices(x, kernel, stride):
  """3-D as 2-D over depth slices: stacked in the channels where these are few, else summed."""
  taps, (b, d, h, w, c) = kernel.shape[0], x.shape
  pad = (taps - 1) // 2
  x = jnp.pad(x, ((0, 0), (pad, pad), (0, 0), (0, 0), (0, 0)))
  depth = (d - 1) // stride[0] + 1
  shifted = [x[:, t:t + (depth - 1) * stride[0] + 1:stride[0]].reshape(b * depth, h, w, c) for t in range(taps)]
  if c < STACK_BELOW:
    stacked = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], taps * c, -1)   # [kh, kw, kd * C, O]
    y = _native(jnp.concatenate(shifted, -1), stacked, stride[1:])
  else:
    y = sum(_native(s, kernel[t], stride[1:]) for t, s in enumerate(shifted))
  return y.reshape(b, depth, *y.shape[1:])


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
  x = _blocks(x, k)
  kernel = kernel.reshape(*(s for q in k for s in (1, q)), -1)   # [1, k, 1, k, ..., C]
  return (x * kernel).sum(tuple(range(2, 2 * n + 1, 2)))


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
