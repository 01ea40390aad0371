"""Blocks of the input that are hidden from the network, and a reconstruction that is judged by them alone."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def blocks(key, shape, block, ratio):
  """Boolean `[*shape]`: each block is hidden with one probability, drawn from U(ratio); at least one block is.

  Args:
    key: of one view.
    shape: its axes in space.
    block: its size along them; what is left over at the far end is a smaller block.
    ratio: (lowest, highest) share.
  """
  grid = [-(-n // b) for n, b in zip(shape, block)]
  k_share, k_block = jax.random.split(key)
  share = jax.random.uniform(k_share, (), minval=ratio[0], maxval=ratio[1])
  draw = jax.random.uniform(k_block, grid)
  mask = (draw < share) | (draw == draw.min())
  for axis, (n, b) in enumerate(zip(shape, block)):
    mask = jnp.repeat(mask, b, axis, total_repeat_length=mask.shape[axis] * b)
    mask = jax.lax.slice_in_dim(mask, 0, n, axis=axis)
  return mask


def hide(x, mask):
  """[*S, C] with the hidden voxels `[*S]` at the mean of its channel."""
  return jnp.where(mask[..., None], x.mean(tuple(range(x.ndim - 1)), keepdims=True), x)


def of_cells(mask, grid):
  """[B, V, *S] -> [B, V, *grid]: the cells of a map of which at least half is hidden (the far end is left over)."""
  strides = [n // g for n, g in zip(mask.shape[2:], grid)]
  mask = mask[(..., *(slice(g * s) for g, s in zip(grid, strides)))]
  cells = mask.reshape(*mask.shape[:2], *(n for pair in zip(grid, strides) for n in pair))
  return cells.mean(tuple(range(3, cells.ndim, 2))) >= .5


def sigmoid_mse(raw, target, mask):
  """(sigmoid(raw) - target)^2, averaged over the hidden voxels of each view and then over views.

  `[B, V, *S, C]`, mask `[B, V, *S]`; a view in which nothing is hidden counts as 0.
  """
  raw = raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
  wrong = ((jax.nn.sigmoid(raw) - jax.lax.stop_gradient(target))**2).mean(-1)
  voxels = tuple(range(2, mask.ndim))
  return (jnp.where(mask, wrong, 0.).sum(voxels) / jnp.maximum(mask.sum(voxels), 1)).mean()
