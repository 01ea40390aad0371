"""Volumes as sequences of slice embeddings: a 2-D encoder, a linear, a Transformer over the slices (Joint)."""
from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimiss_jax import models
from unimiss_jax.models import deformable


class VolumeOutput(NamedTuple):
  """embedding [B, width], the unit mean of the tokens; slices [B, D, width], their embeddings; tokens [B, D, width]."""
  embedding: jax.Array
  slices: jax.Array
  tokens: jax.Array


def levels_width(model) -> int:
  """Numbers of a slice that `levels` gives."""
  return sum(model.embed_dims[-4:]) + model.embed_dims[-1]


def levels(model, params, stats, x, keys=None, parts: int = 1):
  """Grey slices through a 2-D encoder, in parts one after the other whose activations the backward pass computes again.

  The parts are dealt out with this stride, so each device keeps its own rows and each part has slices of all volumes.
  Values and gradients are those of one part, but for rounding; batch statistics of training are those of each part, and
  their mean over the parts is kept.

  Args:
    model, params, stats, keys: as of `models.encode`.
    x: [M, H, W, 1].
    parts: their number, a divisor of M.

  Returns:
    Pooled levels [M, E], and the batch statistics after them.
  """
  def part(given):
    x, keys = given
    out, new = models.encode(model, params, stats, jnp.repeat(x, model.in_channels[0], -1), keys)
    return deformable.pooled_levels(out.pyramid[-4:]), new
  if parts == 1:
    return part((x, keys))
  deal = lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)
  found, new = jax.lax.map(jax.checkpoint(part), jax.tree.map(deal, (x, keys)))
  new = stats if keys is None else jax.tree.map(lambda a: a.mean(0), new)
  return found.swapaxes(0, 1).reshape(x.shape[0], -1), new


def embed(model, inter, params, x, parts: int = 1) -> VolumeOutput:
  """Volumes of any number of slices, in evaluation mode.

  Args:
    model: the 2-D encoder.
    inter: `deformable.InterEncoder`.
    params: {'backbone', 'slice', 'inter'}, and 'batch_stats' where the encoder has them.
    x: [B, D, H, W, 1].
    parts: as of `levels`.
  """
  b, d = x.shape[:2]
  x = x.reshape(b * d, *x.shape[2:])
  found, _ = levels(model, params['backbone'], params.get('batch_stats', {}), x, None, parts)
  width = params['slice']['bias'].shape[0]
  z = nn.Dense(width).apply({'params': params['slice']}, found).reshape(b, d, width)
  tokens = inter.apply({'params': params['inter']}, z)
  return VolumeOutput(deformable.volume_feature(tokens), z, tokens)
