"""How the released UniMiSS+ code lays the position tables of its encoder over other grids, with all its oddities.

Bicubic (a = -0.75) or trilinear as ours, but the table is laid over 0.1 tokens more than there are (PyTorch's
trilinear kernel leaves axes alone whose length stays); and width and height are exchanged, so that a grid that is not
square gets its positions transposed.
"""
from __future__ import annotations

import math

import jax.numpy as jnp

from unimiss_jax.models.layers import cubic_matrix, linear_matrix, wide

SURPLUS = 0.1


def resize_positions(table, native, grid, cls_token: bool):
  """Position table of another grid; arguments and result as of `layers.resize_positions`.

  Raises:
    ValueError: where the released code crashes: tables without class token (all those of the decoder), another
      depth, tables that are not square.
  """
  *depth, height, width = grid
  if math.prod(grid) == math.prod(native) and height == width:
    return table
  fault = ('the decoder' if not cls_token else 'another depth' if depth != list(native[:-2]) else
           'a table that is not square' if native[-1] != native[-2] else '')
  if fault:
    raise ValueError(f"position table made for {tuple(native)} on {tuple(grid)}: model.pos_interp='reference' cannot "
                     f"interpolate {fault}, as the released code; use pos_interp='grid' or the native input size")
  maps = table[0, 1:].reshape(*native, -1)
  for axis, (old, new) in enumerate(zip(native, (*depth, width, height))):    # released code: W before H
    if old == new and depth:
      continue
    weights = jnp.asarray((linear_matrix if depth else cubic_matrix)(old, new, new + SURPLUS), wide(table.dtype))
    maps = jnp.moveaxis(jnp.tensordot(weights, maps, (1, axis)), 0, axis)
  maps = maps.reshape(1, math.prod(grid), -1).astype(table.dtype)
  return jnp.concatenate([table[:, :1], maps], 1)


def arrange(x):
  """[B, N, D] -> [B, D, N]: the released Joint attends along the features of a slice, slices are its channels."""
  return x.swapaxes(1, 2)


def sample(x, at):
  """As `deformable.sample`, but every key is the middle of the sequence, smaller the further its place is from there.

  The package that the released Joint pins (deformable-attention 0.0.18) pads its 1-D grid on the wrong side.
  """
  length = x.shape[1]
  middle = (x[:, (length - 1) // 2] + x[:, length // 2]) / 2                      # [B, G, c]
  away = jnp.abs((2 * at + 1) / length - 1)
  return middle[:, None] * jnp.maximum(0, 1 - away / 2)[..., None]
