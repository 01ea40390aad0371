"""Reconstruction of what the network was given: an image in [0, 1] (UniMiSS+), hidden slice embeddings (Joint)."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def minmax(x, eps: float, axes):
  """(x - min) / max(max - min, eps) over `axes`, per sample: a constant crop gives zeros (NaN with eps = 0)."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
  return (x - low) / jnp.maximum(high - low, eps)


def blurred_mse(target, block: int = 4):
  """MSE of the means over block x block pixels against [..., H, W, C]: what a network reaches that knows only these.
  What is left over at the lower and right edge is not looked at."""
  (h, w), c = (n // block for n in target.shape[-3:-1]), target.shape[-1]
  blocks = target[..., :h * block, :w * block, :].reshape(*target.shape[:-3], h, block, w, block, c)
  return jnp.mean((blocks - blocks.mean((-4, -2), keepdims=True))**2)


def baselines(kind: str, target) -> dict:
  """What a reconstruction of this kind is held against: its loss for one that shows blocks of pixels only, and for one
  grey per picture (of a volume: per slice), which tells nothing."""
  grey = jnp.var(target, (-3, -2)).mean()
  return {f'collapse/blur_recon_{kind}': blurred_mse(target), f'collapse/grey_recon_{kind}': grey}


def sigmoid_mse(raw, target):
  """Mean over all elements of (sigmoid(raw) - target)^2; no gradient reaches the target."""
  raw = raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
  return jnp.mean((jax.nn.sigmoid(raw) - jax.lax.stop_gradient(target))**2)


def masked_slices(pred, target, mask):
  """Mean squared error of the hidden slices alone, summed over the views; no gradient reaches the target.

  Args:
    pred, target: [V, B, N, D].
    mask: [B, N] bool, True = hidden; the same in all views.
  """
  pred = pred.astype(jnp.promote_types(pred.dtype, jnp.float32))
  error = ((pred - jax.lax.stop_gradient(target))**2).mean(-1)
  return jnp.where(mask, error, 0).sum() / jnp.maximum(mask.sum(), 1)
