"""MiT, the network of the pilot UniMiSS (ECCV 2022): one set of attention weights for images and volumes.

As MiT+ (models/mit.py), but: a stem of one 7^n convolution, single strided convolutions between the stages, dense
spatial reductions, and a decoder that keeps the class token: this token is the embedding, nothing is reconstructed.
Arithmetic and names are those of the released code. There is no drop-path: there it never reaches the network.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unimiss_jax.models import layers
from unimiss_jax.models.pyramid import MiTOutput, Pyramid, initial, positions

STEM = 32                    # channels of c0
STEP, DEPTH_STEP = 32, 16
MIN_SIZE = 64                # H and W; below, the instance norm of s4 would see a single position


class Trunk(Pyramid):
  """The fields that encoder and decoder share; the defaults are MiT small.

  Attributes:
    embed_dims, depths, num_heads, sr_ratios: channels, blocks, heads and spatial reduction of s1..s4.
    mlp_ratio: hidden width of the MLPs over their input width.
    decoder_dims, decoder_depths, decoder_heads, decoder_sr_ratios: of the decoder on the grids of s3, s2, s1.
    in_channels: of images, of volumes.
    image_size, volume_size: what the position tables are made for.
    pos_interp: 'grid' | 'reference', how they are laid over other sizes, as in MiT+.
    dtype: of the activations.
  """
  embed_dims: tuple = (48, 128, 256, 512)
  depths: tuple = (2, 3, 4, 3)
  num_heads: tuple = (1, 2, 4, 8)
  mlp_ratio: float = 4
  sr_ratios: tuple = (6, 4, 2, 1)
  decoder_dims: tuple = (256, 128, 48)
  decoder_depths: tuple = (3, 4, 3)
  decoder_heads: tuple = (8, 4, 2)
  decoder_sr_ratios: tuple = (2, 4, 6)
  in_channels: tuple = (3, 1)
  image_size: int = 224
  volume_size: tuple = (16, 96, 96)
  pos_interp: str = 'grid'
  dtype: Any = jnp.float32

  def strides(self, n: int) -> list[tuple]:
    """Of c0, s1, s2, s3, s4 in n dimensions."""
    return [(2, 2) if n == 2 else (1, 2, 2)] + [(2,) * n] * 4

  def embedding_dim(self) -> int:
    """Width of the embedding that a whole network gives."""
    return self.decoder_dims[-1]

  def check(self, size, channels: int):
    """Raises ValueError, naming the nearest valid size, for an input the strides do not divide or that is too small."""
    depth = (DEPTH_STEP,) * (len(size) - 2)
    self.check_input(size, channels, (*depth, MIN_SIZE, MIN_SIZE), (*depth, STEP, STEP))

  def attend(self, x, cls, table: str, native, blocks: str, depth: int, **block):
    """Class token [B, 1, C] and map [B, *S, C] through the blocks of a stage -> the same two."""
    grid, dim = x.shape[1:-1], x.shape[-1]
    tokens = jnp.concatenate([cls, x.reshape(x.shape[0], -1, dim)], 1)                    # [B, 1 + N, C]
    tokens += positions(self, table, dim, native, grid, True)
    for i in range(depth):
      tokens = layers.Block(mlp_ratio=self.mlp_ratio, index=0, dense_reduction=True, dtype=self.dtype,
                            name=f'{blocks}_{i}', **block)(tokens, grid)
    return tokens[:, :1], tokens[:, 1:].reshape(x.shape)


class Encoder(Trunk):
  """[B, *S, C] -> (class token [B, 1, E], (c0, s1, s2, s3, s4)); `transformer` in the released code."""

  @nn.compact
  def __call__(self, x):
    n, dims = x.ndim - 2, self.embed_dims
    strides, native = self.strides(n), self.grids(self.native_size(n))
    cls = self.param('cls_tokens1', layers.zeros, (1, 1, dims[0]), layers.wide(self.dtype))
    cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], *cls.shape[1:]))
    x = layers.ConvBlock(STEM, strides[0], kernel=7, dtype=self.dtype, name=f'patch_embed{n}D0')(x.astype(self.dtype))
    pyramid = [x]
    for i in range(4):
      x = PatchEmbed(dims[i], strides[i + 1], self.dtype, name=f'patch_embed{n}D{i + 1}')(x)
      if i:
        cls = layers.linear(dims[i], self.dtype, f'cls_tokens{i + 1}')(cls)
      cls, x = self.attend(x, cls, f'pos_embed{n}D{i + 1}', native[i + 1], f'block{i + 1}', self.depths[i],
                           num_heads=self.num_heads[i], sr_ratio=self.sr_ratios[i])
      pyramid.append(x)
    return cls, tuple(pyramid)


class PatchEmbed(nn.Module):
  """One strided conv block, under the name that it has in the released code."""
  features: int
  stride: tuple
  dtype: Any

  @nn.compact
  def __call__(self, x):
    return layers.ConvBlock(self.features, self.stride, dtype=self.dtype, name='proj')(x)


class UpEmbed(nn.Module):
  """Transposed convolution that doubles every axis, likewise."""
  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    return layers.TransposedConv(self.features, (2,) * (x.ndim - 2), self.dtype, name='proj')(x)


class MiT(Trunk):
  """x [B, H, W, 3] or [B, D, H, W, 1] -> MiTOutput; fields and their meaning: `Trunk`.

  H and W are multiples of 32 from 64, depth a multiple of 16; else ValueError. Parameters: `models.init_params`.
  """
  embeds_in_decoder = True       # no annotation: a fact, not a field

  @nn.compact
  def __call__(self, x, train=False, decode=True, row_keys=None) -> MiTOutput:
    """Embedding = class token of the last decoder stage; with decode=False that of s4. No reconstruction.

    train and row_keys are taken for the sake of other backbones: nothing here is random.
    """
    n = x.ndim - 2
    if n not in (2, 3):
      raise ValueError(f'input of shape {x.shape}: expected [B, H, W, C] or [B, D, H, W, C]')
    self.check(x.shape[1:-1], x.shape[-1])
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Trunk) if f.name not in ('parent', 'name')}
    cls, pyramid = Encoder(**fields, name='transformer')(x)
    if not decode:
      return MiTOutput(cls[:, 0], pyramid, None)
    native, x = self.grids(self.native_size(n)), pyramid[-1]
    for i, (dim, skip) in enumerate(zip(self.decoder_dims, pyramid[3:0:-1])):
      x = UpEmbed(dim, self.dtype, name=f'DecEmbed{n}D{i}')(x) + skip
      cls = layers.linear(dim, self.dtype, f'cls_tokens{i}')(cls)
      cls, x = self.attend(x, cls, f'DecPosEmbed{n}D{i}', native[3 - i], f'Decblock{i}', self.decoder_depths[i],
                           num_heads=self.decoder_heads[i], sr_ratio=self.decoder_sr_ratios[i], qkv_bias=False,
                           epsilon=1e-5)
    return MiTOutput(layers.layer_norm(1e-5, self.dtype, 'norm')(cls[:, 0]), pyramid, None)

  def initial(self, path: tuple, shapes: dict) -> tuple[str, float]:
    """How a parameter starts, by the laws of MiT+; arguments and result as of `pyramid.initial`."""
    return initial(path, shapes)


class MiTTiny(MiT):
  """One block in every stage."""
  depths: tuple = (1, 1, 1, 1)
  decoder_depths: tuple = (1, 1, 1)
