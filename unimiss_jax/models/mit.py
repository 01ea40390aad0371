"""MiT+: the U-shaped encoder-decoder of UniMiSS+ (TPAMI 2024), one set of attention weights for images and volumes.

Convolutions, position tables and spatial reductions exist once for 2-D and once for 3-D (names with '2D' / '3D'), all
linears and norms are shared. Arithmetic and names are those of the released code; `conv_residual`, `last_stride`,
`final_norm` and `init` change the trunk for small data and default to it.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from unimiss_jax.models import conv, layers
from unimiss_jax.models.mit_pilot import MiT, MiTTiny
from unimiss_jax.models.pyramid import MiTOutput, Pyramid, initial, positions

__all__ = ['MiT', 'MiTOutput', 'MiTPlus', 'MiTTiny']

MIN_SIZE_2D, MIN_SIZE_3D, MIN_DEPTH, DEPTH_STEP = 64, 32, 16, 4
BLOCK_STATIC = 2, 3      # grid and train, behind self and x
REMAT = ('', 'convs', 'blocks', 'all')


class Trunk(Pyramid):
  """The fields that encoder and decoder share, and the sizes that follow from them.

  Attributes:
    embed_dims: channels of c0, c1, s1..s4.
    depths, num_heads, sr_ratios: blocks, heads and spatial reduction of s1..s4.
    mlp_ratio: hidden width of the MLPs over their input width.
    decoder_dims: channels after each up-sampling: s3, s2, s1, c1, c0.
    decoder_depths, decoder_heads, decoder_sr_ratios: of the three decoder stages.
    in_channels: of images, of volumes.
    image_size, volume_size: what the position tables are made for.
    pos_interp: 'grid' = tables are interpolated to other sizes, 2-D and 3-D, encoder and decoder; 'reference' = the
      arithmetic of the released code, which can do less.
    encoder_drop_path, decoder_drop_path: rate of the last block; the first one has 0, linear between.
    conv_residual: every 3^n block of the encoder but the first adds its input.
    last_stride: in-plane stride of s4 (and of the decoder's first up-sampling).
    final_norm: the embedding is the LayerNorm of class token + mean token of s4.
    init: linears 'released' N(0, 0.02) | 'fan_in' N(0, 1 / sqrt(fan_in)).
    cls_token: False = position tables without the class slot; the embedding is the mean token of s4.
    dtype: of the activations.
    remat: what backward passes compute again instead of keeping it: '' nothing | 'convs' | 'blocks' | 'all'.
    fold: the reconstruction is made of the last transposed convolution and the finest map of the encoder in one linear
      step, without the decoder's finest map; exact but for rounding.
  """
  embed_dims: tuple = (32, 64, 128, 256, 320, 320)
  depths: tuple = (1, 2, 4, 2)
  num_heads: tuple = (1, 2, 4, 8)
  mlp_ratio: float = 4
  sr_ratios: tuple = (8, 4, 2, 1)
  decoder_dims: tuple = (320, 256, 128, 64, 32)
  decoder_depths: tuple = (1, 1, 1)
  decoder_heads: tuple = (4, 2, 1)
  decoder_sr_ratios: tuple = (2, 4, 8)
  in_channels: tuple = (3, 1)
  image_size: int = 96
  volume_size: tuple = (16, 96, 96)
  pos_interp: str = 'grid'
  encoder_drop_path: float = 0.
  decoder_drop_path: float = 0.1
  conv_residual: bool = False
  last_stride: int = 2
  final_norm: bool = False
  init: str = 'released'
  cls_token: bool = True
  dtype: Any = jnp.float32
  remat: str = ''
  fold: bool = True

  def strides(self, n: int) -> list[tuple]:
    """Of c1, s1, s2, s3, s4 in n dimensions."""
    if n == 2:
      return [(2, 2)] * 4 + [(self.last_stride,) * 2]
    return [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, self.last_stride, self.last_stride)]

  def embedding_dim(self) -> int:
    """Width of the embedding."""
    return self.embed_dims[-1]

  def kept(self, module, kind: str, static: tuple = ()):
    """`module`, or the same that keeps nothing but its inputs for the backward pass; static: places of arguments."""
    if self.remat not in REMAT:
      raise ValueError(f'model.remat={self.remat!r} unknown: use one of {", ".join(map(repr, REMAT))}')
    return nn.remat(module, static_argnums=static) if self.remat in (kind, 'all') else module

  def check(self, size, channels: int):
    """Raises ValueError, naming the nearest valid size, for an input the strides do not divide or that is too small."""
    n, step = len(size), 16 * self.last_stride
    if n == 2:
      self.check_input(size, channels, (MIN_SIZE_2D,) * 2, (step,) * 2)
    else:
      self.check_input(size, channels, (MIN_DEPTH, MIN_SIZE_3D, MIN_SIZE_3D), (DEPTH_STEP, step, step))


class Encoder(Trunk):
  """[B, *S, C] -> (embedding [B, E], (c0, c1, s1, s2, s3, s4)); `transformer` in the released code."""

  @nn.compact
  def __call__(self, x, train=False, row_keys=None):
    n, first, depths = x.ndim - 2, int(self.cls_token), np.cumsum([0, *self.depths])
    rates = np.linspace(0, self.encoder_drop_path, depths[-1])
    strides, grids = self.strides(n), self.grids(x.shape[1:-1])
    native = self.grids(self.native_size(n))

    def unit(x, features, stride, name, residual=self.conv_residual):
      return self.kept(layers.ConvBlock, 'convs')(features, stride, residual, dtype=self.dtype, name=name)(x)

    if self.cls_token:
      cls = self.param('cls_tokens1', layers.zeros, (1, 1, self.embed_dims[2]), layers.wide(self.dtype))
      cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], *cls.shape[1:]))
    plain = (1,) * n
    x = unit(x.astype(self.dtype), self.embed_dims[0], plain, f'ConvBlock{n}D0_0', False)
    pyramid = [x]
    x = unit(x, self.embed_dims[1], strides[0], f'ConvBlock{n}D1_0')
    x = unit(x, self.embed_dims[1], plain, f'ConvBlock{n}D1_1')
    pyramid.append(x)
    for stage in range(1, 5):
      dim = self.embed_dims[stage + 1]
      x = self.kept(PatchEmbed, 'convs')(
          dim, strides[stage], self.conv_residual, self.dtype, name=f'patch_embed{n}D{stage}')(x)
      tokens = x.reshape(x.shape[0], -1, dim)                    # [B, N, C]
      if self.cls_token:
        if stage > 1:
          cls = layers.linear(dim, self.dtype, f'cls_tokens{stage}')(cls)
        tokens = jnp.concatenate([cls, tokens], 1)
      tokens += positions(self, f'pos_embed{n}D{stage}', dim, native[stage], grids[stage], self.cls_token)
      for i in range(self.depths[stage - 1]):
        index = int(depths[stage - 1]) + i
        tokens = self.kept(layers.Block, 'blocks', BLOCK_STATIC)(
            self.num_heads[stage - 1], self.mlp_ratio, self.sr_ratios[stage - 1], index, self.cls_token,
            drop_path=float(rates[index]), dtype=self.dtype,
            name=f'block{stage}_{i}')(tokens, grids[stage], train, row_keys)
      cls, x = tokens[:, :first], tokens[:, first:]
      mean = x.mean(1)
      x = x.reshape(x.shape[0], *grids[stage], dim)
      pyramid.append(x)
    embedding = cls[:, 0] if self.cls_token else mean
    if self.final_norm:
      embedding = layers.layer_norm(1e-6, self.dtype, 'final_norm')(embedding + mean if self.cls_token else mean)
    return embedding, tuple(pyramid)


class PatchEmbed(nn.Module):
  """Two conv blocks, the first strided."""
  features: int
  stride: tuple
  residual: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = layers.ConvBlock(self.features, self.stride, self.residual, dtype=self.dtype, name='proj')(x)
    return layers.ConvBlock(self.features, (1,) * len(self.stride), self.residual, dtype=self.dtype, name='proj1')(x)


class UpEmbed(nn.Module):
  """Transposed convolution, then a conv block."""
  features: int
  stride: tuple
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = layers.TransposedConv(self.features, self.stride, self.dtype, name='proj')(x)
    return layers.ConvBlock(self.features, (1,) * len(self.stride), dtype=self.dtype, name='proj1')(x)


class MiTPlus(Trunk):
  """x [B, H, W, 3] or [B, D, H, W, 1] -> MiTOutput; fields and their meaning: `Trunk`.

  Parameters come from `models.init_params`: the field `init` hides Linen's method of that name.
  H and W are multiples of 32 (16 with `last_stride=1`), at least 64 in 2-D; depth a multiple of 4, at least 16; else
  ValueError. Drop-path needs `row_keys` [B] or an rng named 'drop_path' where `train` is set.
  """
  embeds_in_decoder = False      # no annotation: a fact, not a field

  def __call__(self, x, train=False, decode=True, row_keys=None) -> MiTOutput:
    """Embedding and pyramid; the reconstruction (None with decode=False) is raw: its sigmoid is compared with x.

    decode=(n, m): the first n of every m rows alone are reconstructed, [B * n / m, ...].
    """
    embedding, pyramid, maps, reconstruction = self._run(x, train, decode, row_keys, maps=not self.fold)
    return MiTOutput(embedding, pyramid, reconstruction)

  def decoder_maps(self, x, train=False, row_keys=None) -> tuple:
    """The decoder's five maps, coarsest first, `decoder_dims` channels: what segmentation heads use."""
    return self._run(x, train, True, row_keys)[2]

  def initial(self, path: tuple, shapes: dict) -> tuple[str, float]:
    """How a parameter starts; arguments and result as of `pyramid.initial`."""
    return initial(path, shapes, self.init)

  @nn.compact
  def _run(self, x, train, decode, row_keys, maps=True):
    n = x.ndim - 2
    if n not in (2, 3):
      raise ValueError(f'input of shape {x.shape}: expected [B, H, W, C] or [B, D, H, W, C]')
    self.check(x.shape[1:-1], x.shape[-1])
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Trunk) if f.name not in ('parent', 'name')}
    embedding, pyramid = Encoder(**fields, name='transformer')(x, train, row_keys)
    if not decode:
      return embedding, pyramid, None, None

    skips = pyramid
    if decode is not True:
      of = lambda a: a.reshape(-1, decode[1], *a.shape[1:])[:, :decode[0]].reshape(-1, *a.shape[1:])
      skips, row_keys = [of(a) for a in pyramid], None if row_keys is None else of(row_keys)
    native, strides = self.grids(self.native_size(n)), self.strides(n)
    rates, index = np.linspace(0, self.decoder_drop_path, sum(self.decoder_depths)), 0
    x, made = skips[-1], []
    for stage, skip, stride in zip((1, 2, 3), skips[4:1:-1], strides[:1:-1]):
      dim = self.decoder_dims[stage - 1]
      x = self.kept(UpEmbed, 'convs')(dim, stride, self.dtype, name=f'DecEmbed{n}D{stage}')(x) + skip
      grid, tokens = x.shape[1:-1], x.reshape(x.shape[0], -1, dim)
      tokens += positions(self, f'DecPosEmbed{n}D{stage}', dim, native[4 - stage], grid, False)
      for i in range(self.decoder_depths[stage - 1]):
        tokens = self.kept(layers.Block, 'blocks', BLOCK_STATIC)(
            self.decoder_heads[stage - 1], self.mlp_ratio, self.decoder_sr_ratios[stage - 1],
            sum(self.depths) + index, False, qkv_bias=False, drop_path=float(rates[index]), epsilon=1e-5,
            dtype=self.dtype, name=f'Decblock{stage}_{i}')(tokens, grid, train, row_keys)
        index += 1
      if stage == 3:
        tokens = layers.layer_norm(1e-5, self.dtype, 'norm')(tokens)
      x = tokens.reshape(x.shape[0], *grid, dim)
      made.append(x)
    up = [layers.TransposedConv(self.decoder_dims[2 + i], strides[2 - i], self.dtype, name=f'TransposeConv{n}D{i}')
          for i in (1, 2)]
    x = up[0](x) + skips[1]
    x = self.kept(layers.ConvBlock, 'convs')(self.decoder_dims[3], (1,) * n, dtype=self.dtype,
                                             name=f'DeConvBlock{n}D1')(x)
    made.append(x)
    last = layers.Conv(self.in_channels[n - 2], (1,) * n, use_bias=True, dtype=self.dtype, name=f'recon_conv{n}D')
    if maps:
      x = up[1](x) + skips[0]
      return embedding, pyramid, (*made, x), last(x)
    (kernel, bias), (w, b) = up[1].weights(x.shape[-1]), last.weights(self.decoder_dims[4])
    w = w.reshape(w.shape[-2:])                              # last(up(x) + skip) = x . (kernel . w) + skip . w + ...
    folded = [a.astype(self.dtype) for a in (kernel @ w, w, bias @ w + b)]
    return embedding, pyramid, None, conv.transposed_conv(x, folded[0]) + skips[0] @ folded[1] + folded[2]
