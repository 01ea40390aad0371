"""A Transformer over the slices of a volume with deformable 1-D attention (Joint, Nguyen et al. 2023).

Two kinds of attention: 'dat', whose queries look at a few keys that all of them share, sampled at places that the data
decide (Deformable Attention Transformer, Xia et al. 2022, in one dimension); 'ddetr', where each query samples places
of its own near itself (Deformable-DETR, Zhu et al. 2021, likewise). `axis` and `sampler` are the released program's in
`reference.py`. Places, softmax and norms are never narrower than float32.
"""
from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimiss_jax.models.layers import layer_norm, linear, wide

HERE, RELEASED = 'unimiss_jax.models.deformable', 'unimiss_jax.models.reference'
AXES = {'slice': HERE, 'feature': RELEASED}          # what attends to what: `arrange` of the module
SAMPLERS = {'interp': HERE, 'collapse': RELEASED}    # how values are read between samples: `sample` of the module
EXACT = jax.lax.Precision.HIGHEST
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')     # PyTorch's default for linears


def arrange(x):
  """[B, N, D] -> [B, L, C]; its own inverse. Here: along the slices."""
  return x


def hat(at, length: int):
  """Weights of linear interpolation with zeros outside: places [...] in samples -> [..., length]."""
  return jnp.maximum(0, 1 - jnp.abs(at[..., None] - jnp.arange(length)))


def sample(x, at):
  """Linear interpolation, zeros outside: x [B, L, G, c], places [B, J, G] in samples -> [B, J, G, c]."""
  return jnp.einsum('bjgl,blgc->bjgc', hat(at, x.shape[1]), x, precision=EXACT)


def volume_feature(tokens, valid=None):
  """Unit mean of the tokens: [B, N, D] -> [B, D]; valid [B, N] bool leaves padding out."""
  tokens = tokens.astype(wide(tokens.dtype))
  share = jnp.ones(tokens.shape[:2], tokens.dtype) if valid is None else valid.astype(tokens.dtype)
  return unit(jnp.einsum('bn,bnd->bd', share, tokens, precision=EXACT))      # a mean but for its length


def unit(x):
  """x of length 1 along the last axis; zeros stay."""
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def pooled_levels(maps):
  """Maps [M, H, W, C] of a 2-D encoder's stages -> [M, E]: the unit mean of each stage, the last one twice.

  Twice as in the released code: of unit length, sqrt(number of stages + 1) in all.
  """
  pooled = [unit(m.astype(wide(m.dtype)).mean((1, 2))) for m in maps]
  return jnp.concatenate([*pooled, pooled[-1]], -1)


class GroupedLinear(nn.Module):
  """Linear of each group of channels by itself, no bias; [..., G, c] -> [..., G, features / G]."""
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    g, c = x.shape[-2:]
    w = self.param('kernel', uniform_fan_in, (1, c, self.features), wide(self.dtype))
    return jnp.einsum('...gc,cgo->...go', x, w.reshape(c, g, -1).astype(x.dtype))


class Offsets(nn.Module):
  """How far each key strays from its place: queries [B, L, G, d] -> [B, L // downsample, G] in key steps, +-scale.

  One net for all groups: depthwise convolution over the sequence, GELU, linear, tanh.
  """
  downsample: int
  kernel: int
  scale: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, q):
    d, step, stored = q.shape[-1], self.downsample, wide(self.dtype)
    taps = self.param('kernel', uniform_fan_in, (self.kernel, 1, d), stored)
    bias = self.param('bias', nn.initializers.zeros, (d,), stored)
    last = (q.shape[1] // step - 1) * step + 1
    pad = (self.kernel - step) // 2
    q = jnp.pad(q.astype(stored), ((0, 0), (pad, pad), (0, 0), (0, 0)))
    y = bias + sum(q[:, t:t + last:step] * taps[t, 0] for t in range(self.kernel))
    return self.scale * jnp.tanh(linear(1, stored, 'to_offset', bias=False)(nn.gelu(y, approximate=False))[..., 0])


class PositionBias(nn.Module):
  """Logits from the distance between query and key: distances [..., G] -> [..., G, heads of a group]."""
  hidden: int
  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, distance):
    x = (jnp.sign(distance) * jnp.log1p(jnp.abs(distance)))[..., None]
    for i in range(2):
      x = nn.relu(linear(self.hidden, wide(self.dtype), f'mlp_{i}')(x))
    return linear(self.heads, wide(self.dtype), 'mlp_2')(x)


class DATAttention(nn.Module):
  """Attention of all L samples to J = L // downsample keys, sampled at places that depend on the queries.

  [B, L, C] -> [B, L, C]; each of `groups` groups of channels has places of its own.
  """
  heads: int = 8
  head_dim: int = 64
  groups: int = 8
  downsample: int = 4
  offset_scale: float = 2.
  offset_kernel: int = 6
  sampler: str = 'interp'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    b, length, c = x.shape
    if length % self.downsample or c % self.groups or self.heads % self.groups:
      raise ValueError(f'attention over {length} samples of {c} channels with {self.heads} heads: samples must be a '
                       f'multiple of the downsampling {self.downsample}, channels and heads of {self.groups} groups')
    inner, keys = self.heads * self.head_dim, length // self.downsample
    project = lambda name: GroupedLinear(inner, self.dtype, name=name)
    split = lambda y: y.reshape(b, -1, self.heads, self.head_dim)
    x = x.astype(self.dtype).reshape(b, length, self.groups, -1)
    q = project('to_q')(x)
    strays = Offsets(self.downsample, self.offset_kernel, self.offset_scale, self.dtype, name='to_offsets')(q)
    place = spread(jnp.arange(keys)[:, None] + strays, keys)                        # [B, J, G], -1..1 inside
    read = importlib.import_module(SAMPLERS[self.sampler]).sample
    kv = read(x, ((place + 1) * length - 1) / 2).astype(self.dtype)
    k, v = project('to_k')(kv), project('to_v')(kv)
    distance = spread(jnp.arange(length, dtype=place.dtype), length)[:, None, None] - place[:, None]      # [B, L, J, G]
    bias = PositionBias(c // 4, self.heads // self.groups, self.dtype, name='rel_pos_bias')(distance)
    logits = jnp.einsum('bihd,bjhd->bijh', split(q), split(k)).astype(wide(self.dtype)) / math.sqrt(self.head_dim)
    share = jax.nn.softmax(logits + bias.reshape(logits.shape), 2)
    y = jnp.einsum('bijh,bjhd->bihd', share.astype(self.dtype), split(v)).reshape(b, length, inner)
    return linear(c, self.dtype, 'to_out')(y)


def spread(i, n: int):
  """0 .. n - 1 -> -1 .. 1."""
  return 2 * i / max(n - 1, 1) - 1


class DDETRAttention(nn.Module):
  """Every sample reads `points` places beside itself in each head: [B, L, C] -> [B, L, C]."""
  heads: int = 8
  points: int = 4
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    b, length, c = x.shape
    if c % self.heads:
      raise ValueError(f'{c} channels are no multiple of {self.heads} heads')
    stored, fan = wide(self.dtype), (b, length, self.heads, self.points)
    v = linear(c, self.dtype, 'value_proj')(x).reshape(b, length, self.heads, -1)
    strays = linear(self.heads * self.points, stored, 'sampling_offsets')(x).reshape(fan)
    share = jax.nn.softmax(linear(self.heads * self.points, stored, 'attention_weights')(x).reshape(fan))
    at = jnp.arange(length)[:, None, None] + strays
    mix = jnp.einsum('bihp,bihpl->bihl', share, hat(at, length), precision=EXACT)
    y = jnp.einsum('bihl,blhd->bihd', mix.astype(self.dtype), v).reshape(b, length, c)
    return linear(c, self.dtype, 'output_proj')(y)


class Layer(nn.Module):
  """Post-norm: x = LN1(attention(x) + x), x = LN2(MLP(x) + x), dropout after each norm. [B, N, D] -> [B, N, D].

  attention: makes the module; turn: what it sees of x, and its inverse; final: rate of the second dropout.
  """
  attention: Callable
  turn: Callable
  hidden: int
  dropout: float
  final: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool = False):
    stored = wide(self.dtype)
    y = self.turn(self.attention(name='attn')(self.turn(x)))
    x = nn.Dropout(self.dropout, deterministic=not train)(layer_norm(1e-5, stored, 'norm1')(y + x))
    y = nn.gelu(linear(self.hidden, self.dtype, 'linear1')(x), approximate=False)
    y = linear(x.shape[-1], self.dtype, 'linear2')(y)
    return nn.Dropout(self.final, deterministic=not train)(layer_norm(1e-5, stored, 'norm2')(y + x))


class InterEncoder(nn.Module):
  """The Transformer over slice embeddings: [B, N, D] -> tokens [B, N, D].

  Any number of slices: what is missing to a multiple of `downsample` is filled with zeros and cut off again. Padding
  is an ordinary slice in attention; `volume_feature` leaves it out of the mean.

  Attributes:
    layers: their number.
    hidden: width of their MLPs.
    kind: 'dat' | 'ddetr'.
    axis: 'slice' | 'feature', as the released code: features attend to features, for `slices` slices only.
    sampler: 'interp' | 'collapse', as the released code: of 'dat'.
    heads, head_dim, groups, downsample, offset_scale, offset_kernel: of 'dat', see DATAttention.
    points: of 'ddetr'.
    dropout: rate, after each norm.
    final_dropout: also after the last one, as the released code.
    slices: what axis='feature' is made for.
  """
  layers: int = 4
  hidden: int = 720
  kind: str = 'dat'
  axis: str = 'slice'
  sampler: str = 'interp'
  heads: int = 8
  head_dim: int = 64
  groups: int = 8
  downsample: int = 4
  offset_scale: float = 2.
  offset_kernel: int = 6
  points: int = 4
  dropout: float = 0.1
  final_dropout: bool = True
  slices: int = 64
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z, train: bool = False):
    n = z.shape[1]
    for field, known in (('kind', ('dat', 'ddetr')), ('axis', AXES), ('sampler', SAMPLERS)):
      if getattr(self, field) not in known:
        raise ValueError(f'{field}={getattr(self, field)!r} of the inter encoder: known are {", ".join(known)}')
    if self.axis == 'feature' and (n != self.slices or self.kind != 'dat'):
      raise ValueError(f"axis='feature' is made for kind='dat' and {self.slices} slices, given {self.kind!r} and {n}: "
                       "use axis='slice', which takes any number")
    missing = -n % self.downsample if self.axis == 'slice' and self.kind == 'dat' else 0
    x = jnp.pad(z, ((0, 0), (0, missing), (0, 0)))
    attention = partial(DDETRAttention, self.heads, self.points, self.dtype) if self.kind == 'ddetr' else partial(
        DATAttention, self.heads, self.head_dim, self.groups, self.downsample, self.offset_scale, self.offset_kernel,
        self.sampler, self.dtype)
    turn = importlib.import_module(AXES[self.axis]).arrange
    for i in range(self.layers):
      final = self.dropout if i < self.layers - 1 or self.final_dropout else 0.
      x = Layer(attention, turn, self.hidden, self.dropout, final, self.dtype, name=f'layer_{i}')(x, train)
    return x[:, :n]


class MaskedSlices(nn.Module):
  """What predicts hidden slice embeddings: a learned token in their place, and a linear after the Transformer."""
  width: int = 640
  dtype: Any = jnp.float32

  def setup(self):
    self.token = self.param('token', nn.initializers.normal(1.), (self.width,), wide(self.dtype))
    self.decoder = nn.Dense(self.width, dtype=self.dtype, param_dtype=wide(self.dtype))

  def hide(self, z, mask):
    """z [B, N, D] with the token where mask [B, N] is true."""
    return jnp.where(mask[..., None], self.token.astype(z.dtype), z)

  def __call__(self, tokens):
    """Tokens [B, N, D] -> predicted embeddings [B, N, D]."""
    return self.decoder(tokens)


def draw_mask(key, valid, ratio: float):
  """Which slices of one volume are hidden: ceil(ratio * N) of N valid ones. valid [N] bool -> [N] bool; vmap it."""
  rank = jnp.argsort(jnp.argsort(jnp.where(valid, jax.random.uniform(key, valid.shape), 2.)))
  return (rank < jnp.ceil(ratio * valid.sum() - 1e-6)) & valid       # 0.1 * 70 is 7, not 8
