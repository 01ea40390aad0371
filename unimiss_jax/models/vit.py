"""ViT (Dosovitskiy et al. 2021) for images, volumes, and volumes together with some of their slices.

One tokenizer for images and one for volumes; blocks, class token and the position table of a plane are shared. A
volume becomes planes of tokens, each of `patch_depth` slices; a slice of it may enter as an image would, at the depth
of its plane. Names with '2D' / '3D' belong to one of the two alone, as in MiT+.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unimiss_jax.models import conv, layers, slices
from unimiss_jax.models.mit import MiTOutput

BLOCK_STATIC = 2, 3      # grid and train, behind self and x
REMAT = ('', 'blocks', 'all')


class Encoded(NamedTuple):
  """cls [B, C]; patches [B, P, C], behind the last norm: those of the volume, depth first, then those of the slices."""
  cls: jax.Array
  patches: jax.Array


class Fields(nn.Module):
  """What encoder and backbone share; names as MiT+ has them, lengths 1.

  Attributes:
    embed_dims, depths, num_heads: (width,), (blocks,), (heads,).
    mlp_ratio: hidden width of the MLPs over the width.
    patch, patch_depth: pixels of a token in-plane, slices of a token of a volume.
    in_channels: of images, of volumes.
    image_size, volume_size: what the tables of positions are made for: the plane of an image, the depth of a volume.
    encoder_drop_path: rate of the last block; the first one has 0, linear between.
    init: linears, tables and tokens 'released' N(0, 0.02) | 'fan_in' N(0, 1 / sqrt(fan_in)), tables and tokens
      1 / sqrt(width), so that places are heard in narrow networks, too.
    dtype: of the activations.
    remat: what backward passes compute again instead of keeping it: '' nothing | 'blocks' or 'all'.
  """
  embed_dims: tuple = (768,)
  depths: tuple = (12,)
  num_heads: tuple = (12,)
  mlp_ratio: float = 4
  patch: int = 16
  patch_depth: int = 4
  in_channels: tuple = (3, 1)
  image_size: int = 224
  volume_size: tuple = (32, 128, 128)
  encoder_drop_path: float = 0.
  init: str = 'released'
  dtype: Any = jnp.float32
  remat: str = ''

  def kernel(self, n: int) -> tuple:
    """Pixels of a token in n dimensions."""
    return (self.patch_depth,)[:n - 2] + (self.patch, self.patch)

  def grid(self, size) -> tuple:
    """Tokens per axis of an input of this size."""
    return tuple(s // k for s, k in zip(size, self.kernel(len(size))))

  def check(self, size, channels: int):
    """Raises ValueError, naming the nearest valid size, for an input that patches do not fill."""
    for name in ('embed_dims', 'depths', 'num_heads'):
      if len(getattr(self, name)) != 1:
        raise ValueError(f'model.{name}={tuple(getattr(self, name))}: a ViT has one stage, use one number')
    if self.embed_dims[0] % self.num_heads[0]:
      raise ValueError(f'model.num_heads={tuple(self.num_heads)}: they do not divide the width {self.embed_dims[0]}')
    if self.remat not in REMAT:
      raise ValueError(f'model.remat={self.remat!r} unknown: use one of {", ".join(map(repr, REMAT))}')
    kernel = self.kernel(len(size))
    nearest = tuple(max(1, round(s / k)) * k for s, k in zip(size, kernel))
    if tuple(size) != nearest:
      raise ValueError(f'input size {tuple(size)}: expected multiples of {kernel}; the nearest valid size is {nearest}')
    if channels != self.in_channels[len(size) - 2]:
      raise ValueError(f'input has {channels} channels: expected {self.in_channels[len(size) - 2]} for {len(size)}-D '
                       'inputs')


class Encoder(Fields):
  """Arguments and result: `ViT.encode`."""

  @nn.compact
  def __call__(self, image=None, volume=None, slices=None, hidden=None, train=False, row_keys=None,
               kept=None) -> Encoded:
    (width,), (depth,) = self.embed_dims, self.depths
    table = lambda name, *shape: self.param(name, layers.zeros, (1, *shape, width), layers.wide(self.dtype))
    native = self.grid((self.image_size,) * 2)
    plane_table, modality = table('plane_table', math.prod(native)), table('modality_table', 2)
    of_plane = lambda grid: layers.resize_positions(plane_table, native, tuple(grid), False)      # [1, Np, C]
    contents, places = [], []                                # [B, P, C] each, and [B or 1, P, C]
    if volume is not None:
      x = Patches(width, self.kernel(3), self.dtype, name='patch_embed3D')(volume)
      planes, *grid = x.shape[1:-1]
      deep = layers.resize_positions(table('depth_table3D', self.grid(self.volume_size)[0]),
                                     self.grid(self.volume_size)[:1], (planes,), False)
      place = of_plane(grid)[:, None] + deep[:, :, None] + modality[:, 1:, None]
      contents.append(x.reshape(x.shape[0], -1, width))
      places.append(place.reshape(1, -1, width))
    if image is not None:
      image = 2 * image - 1                                  # as volumes: air is about -1
    if slices is not None:
      image = jnp.take_along_axis(volume, slices[:, :, None, None, None], 1)               # [B, k, H, W, 1]
      image = jnp.repeat(image.reshape(-1, *image.shape[2:]), self.in_channels[0], -1)
    if image is not None:
      x = Patches(width, self.kernel(2), self.dtype, name='patch_embed2D')(image)
      place = of_plane(x.shape[1:-1]) + modality[:, :1]
      if slices is not None:                                 # at the depth of their planes
        place = (place[:, None] + deep[0][slices // self.patch_depth][:, :, None]).reshape(len(slices), -1, width)
      contents.append(x.reshape(len(place) if slices is not None else x.shape[0], -1, width))
      places.append(place)
    x = jnp.concatenate(contents, 1)
    mask_token = table('mask_token', 1).astype(self.dtype)   # declared without a mask, too
    if hidden is not None:
      x = jnp.where(hidden[..., None], mask_token, x)
    x += jnp.concatenate([jnp.broadcast_to(p, (x.shape[0], *p.shape[1:])) for p in places], 1).astype(self.dtype)
    if kept is not None:
      x = jnp.take_along_axis(x, kept[..., None], 1)
    cls = jnp.broadcast_to(table('class_token', 1).astype(self.dtype), (x.shape[0], 1, width))
    x = jnp.concatenate([cls, x], 1)
    block = nn.remat(layers.Block, static_argnums=BLOCK_STATIC) if self.remat else layers.Block
    for i, rate in enumerate(np.linspace(0, self.encoder_drop_path, depth)):
      x = block(self.num_heads[0], self.mlp_ratio, 1, i, drop_path=float(rate), dtype=self.dtype,
                name=f'block1_{i}')(x, (), train, row_keys)
    x = layers.layer_norm(1e-6, self.dtype, 'final_norm')(x)
    return Encoded(x[:, 0], x[:, 1:])


class Patches(nn.Module):
  """Convolution whose kernel is its stride, with a bias: [B, *S, C] -> [B, *S // kernel, features]."""
  features: int
  kernel: tuple
  dtype: Any

  @nn.compact
  def __call__(self, x):
    w = self.param('kernel', layers.zeros, (*self.kernel, x.shape[-1], self.features), layers.wide(self.dtype))
    b = self.param('bias', layers.zeros, (self.features,), layers.wide(self.dtype))
    return conv.patch_conv(x.astype(self.dtype), w.astype(self.dtype)) + b.astype(self.dtype)


class ViT(Fields):
  """x [B, H, W, 3] or [B, D, H, W, 1] -> MiTOutput: class token, the map of patches, and no reconstruction.

  Parameters come from `models.init_params`: the field `init` hides Linen's method of that name. H and W are multiples
  of `patch`, depth of `patch_depth`; else ValueError. Drop-path needs `row_keys` [B] or an rng named 'drop_path' where
  `train` is set.
  """
  embeds_in_decoder = False      # no annotation: a fact, not a field

  def setup(self):
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Fields) if f.name not in ('parent', 'name')}
    self.transformer = Encoder(**fields)

  def __call__(self, x, train=False, decode=True, row_keys=None) -> MiTOutput:
    """The contract of a backbone; there is nothing to decode."""
    out = self.encode(**{'image' if x.ndim == 4 else 'volume': x}, train=train, row_keys=row_keys)
    return MiTOutput(out.cls, (out.patches.reshape(x.shape[0], *self.grid(x.shape[1:-1]), -1),), None)

  def encode(self, image=None, volume=None, slices=None, hidden=None, train=False, row_keys=None,
             kept=None) -> Encoded:
    """One sequence: class token, tokens of a volume, tokens of an image or of slices of the volume.

    Every block leaves what the class token looks at, [B, heads, 1 + P], as 'class_row' in the collection
    'intermediates', where that is mutable: see `class_rows`.

    Args:
      image: [B, H, W, 3] in [0, 1], which the tokenizer sees in [-1, 1]; or None.
      volume: [B, D, H, W, 1] in HU / 1024, or None.
      slices: [B, k] integers, which slices of the volume enter as images do, too.
      hidden: [B, P] bool, tokens that are replaced by the mask token; their positions stay.
      train, row_keys: of drop-path.
      kept: [B, K] integers, the tokens that enter the sequence, with their positions; None = all.
    """
    for x in (image, volume):
      if x is not None:
        self.check(x.shape[1:-1], x.shape[-1])
    return self.transformer(image, volume, slices, hidden, train, row_keys, kept)

  def embedding_dim(self) -> int:
    return self.embed_dims[-1]

  def input_shapes(self) -> tuple:
    """One image and one volume of native size: together they touch every parameter."""
    return ((1, self.image_size, self.image_size, self.in_channels[0]), (1, *self.volume_size, self.in_channels[1]))

  def native_size(self, n: int) -> tuple:
    return (self.image_size,) * 2 if n == 2 else tuple(self.volume_size)

  def initial(self, path: tuple, shapes: dict) -> tuple[str, float]:
    """How a parameter starts: ('constant', value) or ('normal', std)."""
    if self.init not in ('released', 'fan_in'):
      raise ValueError(f"model.init={self.init!r}: known are 'released', 'fan_in'")
    if path[-1] in ('scale', 'bias'):
      return 'constant', float(path[-1] == 'scale')
    table = path[-1] != 'kernel'                             # of positions, and single tokens
    if self.init == 'released' and (table or len(shapes[path]) == 2):
      return 'normal', 0.02
    return 'normal', (self.embed_dims[0] if table else math.prod(shapes[path][:-1]))**-0.5


def class_rows(model: ViT, params, **inputs) -> tuple[Encoded, jax.Array]:
  """`encode` of a backbone's parameters, and what its class token looks at, [B, blocks, heads, 1 + P].

  One row of each attention, beside the ordinary path: no [P, P] matrix is handed out.
  """
  out, kept = model.apply({'params': params}, **inputs, method='encode', mutable=['intermediates'])
  rows = kept['intermediates']['transformer']
  return out, jnp.stack([rows[f'block1_{i}']['attn']['class_row'][0] for i in range(model.depths[0])], 1)


def with_slices(model: ViT, params, volume, k: int) -> Encoded:
  """Volumes [B, D, H, W, 1] together with the middle slices of the k planes that their class tokens look at most."""
  planes = volume.shape[1] // model.patch_depth
  chosen = slices.select(slices.scores(class_rows(model, params, volume=volume)[1], planes)[1], k)
  return model.apply({'params': params}, volume=volume, slices=slices.middles(chosen, model.patch_depth),
                     method='encode')
