"""ResNet of bottlenecks (He et al. 2016; stride at the 3x3 convolution, as in torchvision) behind the encoder contract.

Names are those of torchvision. Batch statistics lie in the collection 'batch_stats', so that `train=True` needs
`mutable=['batch_stats']`; under plain `jit` they are those of the global batch, however it is sharded.
"""
from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimiss_jax.models.layers import Conv, wide
from unimiss_jax.models.mit import MiTOutput

REMAT = ('', 'blocks')


class Bottleneck(nn.Module):
  """1x1, 3x3 (stride), 1x1 to four times the channels, plus the input (projected where its shape differs)."""
  features: int
  stride: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool):                        # [B, H, W, C]
    norm = partial(batch_norm, train=train, dtype=self.dtype)
    out, stride = 4 * self.features, (self.stride,) * 2
    y = nn.relu(norm('bn1')(Conv(self.features, (1, 1), dtype=self.dtype, name='conv1')(x)))
    y = nn.relu(norm('bn2')(Conv(self.features, (3, 3), stride, dtype=self.dtype, name='conv2')(y)))
    y = norm('bn3')(Conv(out, (1, 1), dtype=self.dtype, name='conv3')(y))
    if x.shape[-1] != out or self.stride > 1:
      x = norm('downsample_1')(Conv(out, (1, 1), stride, dtype=self.dtype, name='downsample_0')(x))
    return nn.relu(x + y)


def batch_norm(name: str, train: bool, dtype) -> nn.BatchNorm:
  return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, param_dtype=wide(dtype),
                      use_fast_variance=False, name=name)


class ResNet(nn.Module):
  """Images [B, H, W, 3] -> MiTOutput: the mean of the last map, the maps of stem and stages, no reconstruction.

  Attributes:
    depths: bottlenecks of the four stages; the default is ResNet-50.
    width: channels of the stem; the stages put out 4, 8, 16 and 32 times as many.
    in_channels: of the images; the other number, of volumes, is not looked at.
    image_size: for which `input_shapes` answers; any size of at least 32 works.
    dtype: of the activations.
    remat: what the backward pass computes again instead of keeping it: '' nothing | 'blocks'.
  """
  depths: tuple = (3, 4, 6, 3)
  width: int = 64
  in_channels: tuple = (3, 1)
  image_size: int = 224
  dtype: Any = jnp.float32
  remat: str = ''
  embeds_in_decoder = False      # no annotation: a fact, not a field

  @nn.compact
  def __call__(self, x, train: bool = False, decode: bool = False, row_keys=None):      # nothing is drawn
    if x.ndim != 4 or min(x.shape[1:3]) < 32 or x.shape[-1] != self.in_channels[0]:
      raise ValueError(f'input of shape {x.shape}: a ResNet takes images [B, H, W, {self.in_channels[0]}] of at least '
                       '32 x 32; volumes go through it slice by slice')
    if self.remat not in REMAT:
      raise ValueError(f'model.remat={self.remat!r} of a ResNet: known are {", ".join(map(repr, REMAT))}')
    block = nn.remat(Bottleneck, static_argnums=2) if self.remat else Bottleneck
    x = Conv(self.width, (7, 7), (2, 2), dtype=self.dtype, name='conv1')(x)
    x = nn.relu(batch_norm('bn1', train, self.dtype)(x))
    maps = [x]
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, depth in enumerate(self.depths):
      for i in range(depth):
        stride = 2 if stage and not i else 1
        x = block(self.width * 2**stage, stride, self.dtype, name=f'layer{stage + 1}_{i}')(x, train)
      maps.append(x)
    return MiTOutput(x.astype(wide(self.dtype)).mean((1, 2)), tuple(maps), None)

  @property
  def embed_dims(self) -> tuple:
    """Channels of the maps."""
    return (self.width, *(4 * self.width * 2**i for i in range(len(self.depths))))

  def embedding_dim(self) -> int:
    return self.embed_dims[-1]

  def native_size(self, n: int) -> tuple:
    """Of images; of volumes it says nothing."""
    return (self.image_size,) * 2

  def check(self, size, channels: int):
    """Raises ValueError for slices or images that are too small."""
    if min(size[-2:]) < 32:
      raise ValueError(f'input size {tuple(size)}: a ResNet takes images of at least 32 x 32')

  def input_shapes(self) -> tuple:
    return ((1, self.image_size, self.image_size, self.in_channels[0]),)

  def initial(self, path: tuple, shapes: dict) -> tuple[str, float]:
    """How a parameter starts, see `models.init_params`: He et al. 2015, by the outputs, as in torchvision."""
    if path[-1] != 'kernel':
      return 'constant', float(path[-1] == 'scale')
    *taps, _, out = shapes[path]
    return 'normal', (2 / (math.prod(taps) * out))**0.5


def first_statistics(model: ResNet) -> dict:
  """The batch statistics that a new model starts from: mean 0, variance 1."""
  x = jax.ShapeDtypeStruct(model.input_shapes()[0], jnp.float32)
  shapes = jax.eval_shape(nn.init(type(model).__call__, model), jax.random.key(0), x)['batch_stats']
  return jax.tree_util.tree_map_with_path(
      lambda path, s: jnp.full(s.shape, float(path[-1].key == 'var'), s.dtype), shapes)
