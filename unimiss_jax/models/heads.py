"""Heads on a backbone: projection of DINO (Caron et al., ICCV 2021), classifier, segmentation at several resolutions.

The projection: MLP, L2 norm, weight-normed prototypes of fixed length 1.
"""
from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimiss_jax.models.layers import InstanceNorm, gelu, layer_norm, wide

LINEAR_INITS = {'released': nn.initializers.normal(0.02),
                'fan_in': nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')}
KEEPING = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')      # He et al. 2015, for what a ReLU follows


class DINOHead(nn.Module):
  """[B, E] -> logits [B, out_dim], no temperature; with last_layer=False -> the projection [B, bottleneck_dim].

  Attributes:
    out_dim: prototypes.
    hidden_dim, bottleneck_dim: widths of the three-layer MLP.
    last_layer: False = the prototypes are not built.
    linear_init: 'released' = N(0, 0.02), 'fan_in' = N(0, 1 / sqrt(fan_in)).
    dtype: of the run; parameters are never narrower than float32.
  """
  out_dim: int = 65536
  hidden_dim: int = 2048
  bottleneck_dim: int = 256
  last_layer: bool = True
  linear_init: str = 'released'
  dtype: Any = jnp.float32

  def setup(self):
    stored = wide(self.dtype)
    dense = lambda features: nn.Dense(features, kernel_init=LINEAR_INITS[self.linear_init], param_dtype=stored)
    self.mlp_0, self.mlp_2, self.mlp_4 = dense(self.hidden_dim), dense(self.hidden_dim), dense(self.bottleneck_dim)
    if self.last_layer:
      self.prototypes = Prototypes(self.out_dim, stored, name='last_layer')

  def __call__(self, x):
    return self.cosines(self.unit(x)) if self.last_layer else self.project(x)

  def project(self, x):
    """[..., E] -> [..., bottleneck_dim], the output of the MLP before its L2 norm."""
    return self.mlp_4(gelu(self.mlp_2(gelu(self.mlp_0(x)))))

  def unit(self, x):
    """[..., E] -> [..., bottleneck_dim] of length 1, never narrower than float32."""
    z = widened(self.project(x))
    return z / jnp.sqrt(jnp.maximum((z * z).sum(-1, keepdims=True), 1e-24))       # z / max(|z|, 1e-12), finite at 0

  def cosines(self, z):
    """Of unit vectors [..., bottleneck_dim], or linear in them -> logits [..., out_dim]."""
    return self.prototypes(z)


class Prototypes(nn.Module):
  """Products of z [..., D] with `features` directions; weight_g is kept for porting, it stays 1 and gets no gradient.

  The length of the directions is divided out of the products: no second copy of the weights is made.
  """
  features: int
  stored: Any = jnp.float32

  @nn.compact
  def __call__(self, z):
    bound = z.shape[-1]**-0.5
    v = self.param('weight_v', lambda key, shape: jax.random.uniform(key, shape, self.stored, -bound, bound),
                   (self.features, z.shape[-1]))
    g = self.param('weight_g', nn.initializers.ones, (self.features, 1), self.stored)
    return z @ v.T * (jax.lax.stop_gradient(g[:, 0]) / jnp.linalg.norm(v, axis=-1))


class Classifier(nn.Module):
  """(embedding [B, E], map [B, *S, E]) -> logits [B, C].

  Attributes:
    classes: C.
    features: 'cls' = the embedding as it is; 'mean' = mean of the map; 'both' = one LayerNorm on the embedding and on
      every position of the map, then the mean of the logits of the embedding and of the mean position (the released
      code of the RICORD task).
    dtype: of the run; logits are never narrower than float32.
  """
  classes: int
  features: str = 'cls'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embedding, features):
    linear = nn.Dense(self.classes, kernel_init=LINEAR_INITS['released'], param_dtype=wide(self.dtype), name='linear')
    x = widened(embedding)
    tokens = widened(features.reshape(features.shape[0], -1, features.shape[-1]))
    if self.features == 'both':
      norm = layer_norm(1e-6, wide(self.dtype), 'norm')
      return (linear(norm(x)) + linear(norm(tokens).mean(1))) / 2
    return linear(x if self.features == 'cls' else tokens.mean(1))


class Segmenter(nn.Module):
  """Decoder maps, coarsest first -> logits [B, *S, K] of each, finest first; those that no loss looks at are not built.

  Attributes:
    outputs: K.
    levels: how many of the finest maps have a head of their own.
    dtype: of the run; logits are never narrower than float32.
  """
  outputs: int
  levels: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps):
    return [nn.Dense(self.outputs, kernel_init=LINEAR_INITS['fan_in'], param_dtype=wide(self.dtype),
                     name=f'level_{i}')(widened(x)) for i, x in enumerate(maps[::-1][:self.levels])]


class GrowingSegmenter(nn.Module):
  """The map of a ViT -> logits as `Segmenter` gives them: convolution, norm, ReLU and doubling, step by step, until a
  patch is as many pixels as it shows (SETR-PUP, Zheng et al. 2021).

  Attributes:
    steps: of `doublings`.
    outputs, levels, dtype: as of `Segmenter`.
    widest: channels of the first step; each has half of those of the one before.
  """
  steps: tuple
  outputs: int
  levels: int = 1
  dtype: Any = jnp.float32
  widest: int = 256

  @nn.compact
  def __call__(self, maps):
    x, grown = maps[-1], []
    for i, step in enumerate(self.steps):
      x = nn.Conv(max(self.widest >> i, 16), (3,) * len(step), use_bias=False, kernel_init=KEEPING, dtype=self.dtype,
                  param_dtype=wide(self.dtype), name=f'grow_{i}')(x)
      x = nn.relu(InstanceNorm(dtype=self.dtype, name=f'norm_{i}')(x))
      for axis, factor in enumerate(step, 1):
        x = jnp.repeat(x, factor, axis)
      grown.append(x)
    return Segmenter(self.outputs, self.levels, self.dtype, name='out')(grown)


class UNet(nn.Module):
  """Maps [B, h, w, C] of a pyramid, each half as large as the one before, the first half as large as the image ->
  logits as `Segmenter` gives them: doubled, beside the next finer map, two convolutions with norm and ReLU
  (Ronneberger et al. 2015).

  Attributes:
    widths: channels of the steps from the coarsest map to full size, as many as there are maps.
    outputs, levels, dtype: as of `Segmenter`.
  """
  widths: tuple
  outputs: int
  levels: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps):
    x, grown = maps[-1].astype(self.dtype), []
    for i, (width, beside) in enumerate(zip(self.widths, [*maps[-2::-1], None])):
      for axis in (1, 2):
        x = jnp.repeat(x, 2, axis)
      if beside is not None:
        x = jnp.concatenate([x, beside.astype(self.dtype)], -1)
      for j in range(2):
        x = nn.Conv(width, (3, 3), use_bias=False, kernel_init=KEEPING, dtype=self.dtype, param_dtype=wide(self.dtype),
                    name=f'conv_{i}{"ab"[j]}')(x)
        x = nn.relu(InstanceNorm(dtype=self.dtype, name=f'norm_{i}{"ab"[j]}')(x))
      grown.append(x)
    return Segmenter(self.outputs, self.levels, self.dtype, name='out')(grown)


def doublings(kernel) -> tuple:
  """Pixels of a patch -> by how much each axis grows in each step, 1 or 2; the longest first, all together at the end.

  Raises:
    ValueError: an axis that is no power of two.
  """
  if any(k & (k - 1) for k in kernel) or max(kernel) < 2:
    raise ValueError(f'model.patch, model.patch_depth: patches of {tuple(kernel)} pixels cannot be doubled up to, use '
                     'powers of two')
  most = max(kernel).bit_length() - 1
  return tuple(tuple(2 if k.bit_length() - 1 >= most - i else 1 for k in kernel) for i in range(most))


def widened(x):
  return x.astype(wide(x.dtype))
