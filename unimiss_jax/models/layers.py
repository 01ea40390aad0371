"""Building blocks of the MiT encoders (UniMiSS, ECCV 2022; UniMiSS+, TPAMI 2024), arithmetic as in the released code.

Parameter names are those of the released PyTorch modules, so that porting is a renaming. Statistics, softmax and
norms run in `promote_types(dtype, float32)`: never narrower than float32. Modules only declare their parameters
(zeros); a backbone's `initial` says how they start.
"""
from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unimiss_jax.models import conv

zeros = nn.initializers.zeros


def wide(dtype) -> Any:
  """The dtype of statistics and of parameters."""
  return jnp.promote_types(dtype, jnp.float32)


class Conv(nn.Module):
  """Convolution with an odd kernel and the padding that keeps the size."""
  features: int
  kernel: tuple
  stride: tuple | None = None
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def weights(self, channels: int) -> tuple:
    """Kernel and bias (or None) for an input of so many channels, as they are stored."""
    w = self.param('kernel', zeros, (*self.kernel, channels, self.features), wide(self.dtype))
    return w, self.param('bias', zeros, (self.features,), wide(self.dtype)) if self.use_bias else None

  def __call__(self, x):
    w, b = self.weights(x.shape[-1])
    y = conv.conv(x.astype(self.dtype), w.astype(self.dtype), self.stride)
    return y if b is None else y + b.astype(self.dtype)


class TransposedConv(nn.Module):
  """Transposed convolution with kernel = stride and a bias."""
  features: int
  stride: tuple
  dtype: Any = jnp.float32

  @nn.compact
  def weights(self, channels: int) -> tuple:
    """Kernel and bias for an input of so many channels, as they are stored."""
    return (self.param('kernel', zeros, (*self.stride, channels, self.features), wide(self.dtype)),
            self.param('bias', zeros, (self.features,), wide(self.dtype)))

  def __call__(self, x):
    w, b = self.weights(x.shape[-1])
    return conv.transposed_conv(x.astype(self.dtype), w.astype(self.dtype)) + b.astype(self.dtype)


class Reduce(nn.Module):
  """Convolution with kernel = stride = ratio on every axis and a bias: the spatial reduction of attention.

  Depthwise, or `dense`: over all channels.
  """
  ratio: int
  dense: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    n, c = x.ndim - 2, x.shape[-1]
    w = self.param('kernel', zeros, (*(self.ratio,) * n, c if self.dense else 1, c), wide(self.dtype))
    b = self.param('bias', zeros, (c,), wide(self.dtype))
    reduced = conv.patch_conv if self.dense else conv.depthwise_patch_conv
    return reduced(x.astype(self.dtype), w.astype(self.dtype)) + b.astype(self.dtype)


class InstanceNorm(nn.Module):
  """Affine, biased variance, no running statistics; one pass: E[x^2] - E[x]^2."""
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), wide(self.dtype))
    bias = self.param('bias', zeros, (x.shape[-1],), wide(self.dtype))
    wide_x, axes = x.astype(wide(self.dtype)), tuple(range(1, x.ndim - 1))
    mean = wide_x.mean(axes, keepdims=True)
    var = jnp.maximum((wide_x * wide_x).mean(axes, keepdims=True) - mean * mean, 0)
    gain = scale * jax.lax.rsqrt(var + self.epsilon)
    return (wide_x * gain + (bias - mean * gain)).astype(self.dtype)


class ConvBlock(nn.Module):
  """Convolution of odd width -> InstanceNorm -> LeakyReLU 0.01; `residual` adds the input (pooled, projected)."""
  features: int
  stride: tuple
  residual: bool = False
  kernel: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):                                     # [B, *S, C]
    n = x.ndim - 2
    y = Conv(self.features, (self.kernel,) * n, self.stride, dtype=self.dtype, name='conv')(x)
    y = nn.leaky_relu(InstanceNorm(dtype=self.dtype, name='norm')(y), 0.01)
    if not self.residual:
      return y
    if math.prod(self.stride) > 1:
      x = conv.patch_mean(x, self.stride)
    if x.shape[-1] != self.features:
      x = Conv(self.features, (1,) * n, dtype=self.dtype, name='skip')(x)
    return y + x


def linear(features: int, dtype, name: str, bias: bool = True) -> nn.Dense:
  return nn.Dense(features, bias, dtype, wide(dtype), name=name)


def layer_norm(epsilon: float, dtype, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon, dtype=dtype, param_dtype=wide(dtype), use_fast_variance=False, name=name)


def drop_path(x, rate: float, keys):
  """Drops whole rows: x * mask / keep, one draw per row.

  Args:
    x: [B, ...].
    rate: probability that a row is dropped.
    keys: [B] keys of this layer.
  """
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(keys)
  return x * (keep / (1 - rate)).astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def class_row(q, k):
  """What the first token looks at: q [B, H, D], k [B, N, H, D] -> softmax of q . k / sqrt(D), [B, H, N]."""
  scores = jnp.einsum('bhd,bkhd->bhk', q * q.shape[-1]**-0.5, k, preferred_element_type=wide(q.dtype))
  return nn.softmax(scores)


class Attention(nn.Module):
  """Multi-head attention whose keys and values come from spatially reduced tokens.

  The class token, if any, is the first token; it is a query as all others and joins the keys unreduced.
  """
  num_heads: int
  sr_ratio: int
  cls_token: bool
  qkv_bias: bool = True
  dense_reduction: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, grid):                               # [B, N, C], N = cls + prod(grid)
    b, _, c = x.shape
    heads, depth = self.num_heads, c // self.num_heads
    dense = lambda features, name, bias=self.qkv_bias: linear(features, self.dtype, name, bias)
    q = dense(c, 'q')(x).reshape(b, -1, heads, depth)
    if self.sr_ratio > 1:
      first = int(self.cls_token)
      maps = x[:, first:].reshape(b, *grid, c)
      maps = Reduce(self.sr_ratio, self.dense_reduction, self.dtype, name=f'sr{len(grid)}D')(maps)
      x = jnp.concatenate([x[:, :first], maps.reshape(b, -1, c)], 1)
      x = layer_norm(1e-5, self.dtype, 'norm')(x)
    k, v = jnp.moveaxis(dense(2 * c, 'kv')(x).reshape(b, -1, 2, heads, depth), 2, 0)
    if self.is_mutable_collection('intermediates') and not self.is_initializing():
      self.sow('intermediates', 'class_row', class_row(q[:, 0], k))
    scores = jnp.einsum('bqhd,bkhd->bhqk', q * depth**-0.5, k, preferred_element_type=wide(self.dtype))
    y = jnp.einsum('bhqk,bkhd->bqhd', nn.softmax(scores).astype(self.dtype), v)
    return dense(c, 'proj', True)(y.reshape(b, -1, c))


def gelu(x):
  """Exact GELU by erf, as in PyTorch; `nn.gelu(approximate=False)` takes erfc, which is far slower on CPU."""
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class Mlp(nn.Module):
  """Linear, exact (erf) GELU, Linear."""
  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    return linear(x.shape[-1], self.dtype, 'fc2')(gelu(linear(self.hidden, self.dtype, 'fc1')(x)))


class Block(nn.Module):
  """Pre-norm transformer block with drop-path; `index` counts the blocks of the network (keys of the drop-path)."""
  num_heads: int
  mlp_ratio: float
  sr_ratio: int
  index: int
  cls_token: bool = True
  qkv_bias: bool = True
  drop_path: float = 0.
  epsilon: float = 1e-6
  dense_reduction: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, grid, train=False, row_keys=None):   # [B, N, C]
    def drop(y, branch):
      if not train or self.drop_path == 0:
        return y
      if row_keys is None:
        keys = jax.random.split(self.make_rng('drop_path'), len(y))
      else:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 2 * self.index + branch))(row_keys)
      return drop_path(y, self.drop_path, keys)
    attention = Attention(self.num_heads, self.sr_ratio, self.cls_token, self.qkv_bias, self.dense_reduction,
                          self.dtype, name='attn')
    x = x + drop(attention(layer_norm(self.epsilon, self.dtype, 'norm1')(x), grid), 0)
    mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name='mlp')
    return x + drop(mlp(layer_norm(self.epsilon, self.dtype, 'norm2')(x)), 1)


def resize_positions(table, native, grid, cls_token: bool):
  """Position table of another grid: bicubic (a = -0.75) in 2-D, trilinear in 3-D, half-pixel centres, no antialias.

  Args:
    table: [1, cls + prod(native), C], row-major tokens.
    native: grid that the table was made for, (H, W) or (D, H, W).
    grid: grid wanted.
    cls_token: whether the first row is the class token's; it is kept as it is.

  Returns:
    [1, cls + prod(grid), C]; the table itself where the grid is the native one.
  """
  native, grid = tuple(native), tuple(grid)
  if grid == native:
    return table
  first = int(cls_token)
  weights = cubic_matrix if len(grid) == 2 else linear_matrix
  maps = table[0, first:].reshape(*native, -1)
  for axis, (old, new) in enumerate(zip(native, grid)):
    matrix = jnp.asarray(weights(old, new), wide(table.dtype))
    maps = jnp.moveaxis(jnp.tensordot(matrix, maps, (1, axis)), 0, axis)
  maps = maps.reshape(1, math.prod(grid), -1).astype(table.dtype)
  return jnp.concatenate([table[:, :first], maps], 1)


def linear_matrix(old: int, new: int, extent: float | None = None) -> np.ndarray:
  """[new, old] weights of linear interpolation, half-pixel centres, edges repeated; `extent` as in `cubic_matrix`."""
  return _matrix(old, new, extent, lambda t: np.maximum(1 - abs(t), 0), (0, 1))


def cubic_matrix(old: int, new: int, extent: float | None = None) -> np.ndarray:
  """[new, old] weights of cubic convolution (Keys 1981) with a = -0.75, half-pixel centres, edges repeated.

  The old axis is laid over `extent` new pixels, of which the first `new` are kept; None: all of them.
  """
  a = -0.75

  def kernel(t):
    t = abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((t - 5) * t + 8) * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))
  return _matrix(old, new, extent, kernel, (-1, 0, 1, 2))


def _matrix(old, new, extent, kernel, taps):
  source = (np.arange(new) + 0.5) * old / (extent or new) - 0.5
  matrix = np.zeros((new, old))
  for tap in taps:
    index = np.floor(source).astype(int) + tap
    np.add.at(matrix, (np.arange(new), index.clip(0, old - 1)), kernel(source - index))
  return matrix
