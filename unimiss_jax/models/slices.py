"""Which planes of a volume its class token looks at: scores from attention, and the planes with the highest ones
(UniMedI, He et al. 2024; the softmax over all tokens and the mean over layers as in A-CLIP, Yang et al. 2023).
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

LAYERS, KEYS = ('mean', 'last'), ('full', 'patch')


def scores(rows, planes: int, layers: str = 'mean', keys: str = 'full'):
  """Attention of the class token over one volume -> a score for each patch and plane.

  The softmax must have run over all planes together: one for each plane would give every plane the same score.

  Args:
    rows: [B, L, H, 1 + P], softmax over the class token (first) and all P patches, depth first.
    planes: of the volume; P = planes * patches of a plane.
    layers: 'mean' over all layers, or 'last'.
    keys: 'full' = weights as they are; 'patch' = of a softmax over the patches alone.

  Returns:
    (v [B, P], s [B, planes]), means over layers and heads; s is the mean of v over each plane.
  """
  if layers not in LAYERS or keys not in KEYS:
    raise ValueError(f'layers={layers!r}, keys={keys!r}: known are {LAYERS} and {KEYS}')
  rows = rows[:, -1:] if layers == 'last' else rows
  v = rows[..., 1:]
  if keys == 'patch':
    v = v / v.sum(-1, keepdims=True)
  v = v.mean((1, 2))
  return v, v.reshape(len(v), planes, -1).mean(-1)


def select(s, k: int, valid=None):
  """The k planes with the highest scores, in ascending order; of equal ones the first.

  Args:
    s: [B, planes].
    k: at most as many as there are planes (and, in each row, as are valid).
    valid: [B, planes] bool, planes that are not padding.

  Returns:
    [B, k] int32.
  """
  if k > s.shape[1]:
    raise ValueError(f'{k} of {s.shape[1]} planes are to be chosen')
  s = s if valid is None else jnp.where(valid, s, -jnp.inf)
  return jnp.sort(jax.lax.top_k(s, k)[1], -1).astype(jnp.int32)


def spread(planes: int, k: int):
  """[k] planes at equal distances: what is chosen before there is anything to go by."""
  return ((jnp.arange(k) + 0.5) * planes / k).astype(jnp.int32)


def middles(planes, patch_depth: int):
  """Chosen planes -> their middle slices."""
  return planes * patch_depth + patch_depth // 2


def random_slices(planes, patch_depth: int, keys):
  """Chosen planes [B, k] -> one of the slices of each, by the keys [B] of the rows."""
  draw = lambda key, p: p * patch_depth + jax.random.randint(key, p.shape, 0, patch_depth, p.dtype)
  return jax.vmap(draw)(keys, planes)
