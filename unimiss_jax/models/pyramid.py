"""What the MiT backbones share: their output, the sizes of their maps, position tables and how parameters start."""
from __future__ import annotations

import importlib
import math
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from unimiss_jax.models import layers

POS_INTERP = {'grid': 'unimiss_jax.models.layers', 'reference': 'unimiss_jax.models.reference'}


class MiTOutput(NamedTuple):
  """embedding [B, E]; pyramid, finest map first, channels last; reconstruction like the input, before the sigmoid."""
  embedding: jax.Array
  pyramid: tuple
  reconstruction: jax.Array | None


class Pyramid(nn.Module):
  """Sizes that follow from the fields `image_size`, `volume_size`, `in_channels`, `pos_interp` and from `strides`."""

  def native_size(self, n: int) -> tuple:
    return (self.image_size,) * 2 if n == 2 else tuple(self.volume_size)

  def grids(self, size) -> list[tuple]:
    """Sizes of the maps after each of `strides` for an input of this size."""
    total = np.cumprod(self.strides(len(size)), axis=0)
    return [tuple(int(s) for s in np.asarray(size) // t) for t in total]

  def input_shapes(self) -> tuple:
    """One image and one volume of native size: together they touch every parameter."""
    return tuple((1, *self.native_size(n), self.in_channels[n - 2]) for n in (2, 3))

  def check_input(self, size, channels: int, least, steps):
    """Raises ValueError, naming the nearest valid size, for an input below `least` or that `steps` do not divide.

    Args:
      size, least, steps: (H, W) or (D, H, W); H and W are alike.
      channels: of the input.
    """
    if self.pos_interp not in POS_INTERP:
      raise ValueError(f'model.pos_interp={self.pos_interp!r} unknown: use one of {", ".join(POS_INTERP)}')
    n = len(size)
    nearest = tuple(max(math.ceil(lo / m), round(s / m)) * m for s, lo, m in zip(size, least, steps))
    if tuple(size) != nearest:
      axes, depth = ('H, W', '') if n == 2 else ('D, H, W', f'D a multiple of {steps[0]} from {least[0]}, ')
      raise ValueError(f'input size ({axes}) = {tuple(size)}: expected {depth}H and W multiples of {steps[-1]} from '
                       f'{least[-1]}; the nearest valid size is {nearest}')
    if channels != self.in_channels[n - 2]:
      raise ValueError(f'input has {channels} channels: expected {self.in_channels[n - 2]} for {n}-D inputs')


def positions(module, name, dim, native, grid, cls_token):
  """The module's position table `name`, made for the native grid, on this grid."""
  table = module.param(name, layers.zeros, (1, int(cls_token) + math.prod(native), dim), layers.wide(module.dtype))
  resize = importlib.import_module(POS_INTERP[module.pos_interp]).resize_positions
  return resize(table, native, grid, cls_token).astype(module.dtype)


def initial(path: tuple, shapes: dict, init: str = 'released') -> tuple[str, float]:
  """How a parameter starts: ('constant', value), ('normal', std) or ('uniform', bound).

  Args:
    path: names from the root to the parameter.
    shapes: path -> shape of all parameters.
    init: linears 'released' N(0, 0.02) | 'fan_in' N(0, 1 / sqrt(fan_in)).
  """
  if init not in ('released', 'fan_in'):
    raise ValueError(f"model.init={init!r}: known are 'released', 'fan_in'")
  kernel = shapes.get((*path[:-1], 'kernel'), ())          # of the same layer; norms have none
  if path[-1] in ('scale', 'bias') and len(kernel) <= 2:
    return 'constant', float(path[-1] == 'scale')
  if path[-1] not in ('kernel', 'bias'):                   # class token, position tables
    return 'normal', 0.02
  *taps, fan_in, out = kernel
  taps = math.prod(taps)
  if len(kernel) == 2:
    return 'normal', 0.02 if init == 'released' else fan_in**-0.5
  if path[-2] == 'skip':
    return 'normal', fan_in**-0.5
  transposed = re.search('TransposeConv|DecEmbed.*/proj/', '/'.join(path))
  kaiming = path[0] == 'transformer' or len(kernel) == 5   # the decoder's 2-D ones keep PyTorch's default
  if path[-1] == 'kernel' and kaiming and not transposed:
    return 'normal', (2 / (taps * out))**0.5
  return 'uniform', (taps * (out if transposed else fan_in))**-0.5
