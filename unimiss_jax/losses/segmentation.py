"""Dice and cross-entropy of label maps, at several resolutions.

Soft Dice over the whole batch with smoothing 1e-5 and without background, plus cross-entropy, as the released code of
the abdominal task (after nnU-Net, Isensee et al. 2021). Arrays in, scalar out; the global batch counts as one.
"""
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, log_softmax, one_hot, sigmoid, softmax

from unimiss_jax.losses.collapse import wide

SMOOTH = 1e-5


def targets(mask, classes: int, exclusive: bool):
  """Mask of a batch -> [B, *S, K] float32: with background first where classes exclude each other."""
  return one_hot(mask, classes + 1) if exclusive else mask.astype(jnp.float32)


def at_stride(mask, stride):
  """Every stride-th voxel of [B, *S, ...], the one that holds the centre of the block: nearest neighbour."""
  return mask[(slice(None), *(slice(s // 2, None, s) for s in stride))]


def cross_entropy(logits, target, exclusive: bool):
  """Mean over voxels (and classes, where each is for itself). logits, target [B, *S, K]."""
  z = wide(logits)
  if exclusive:
    return -(target * log_softmax(z, -1)).sum(-1).mean()
  return -(target * log_sigmoid(z) + (1 - target) * log_sigmoid(-z)).mean()


def soft_dice(logits, target, exclusive: bool, hard: bool = False):
  """1 - mean over classes of the Dice of the batch; background does not count.

  Args:
    logits, target: [B, *S, K].
    exclusive: softmax, class 0 is background; else sigmoid, and every class counts.
    hard: of thresholded predictions, as the released code of the JSRT task: a number without a gradient.
  """
  p = softmax(wide(logits), -1) if exclusive else sigmoid(wide(logits))
  if hard:
    p = jax.lax.stop_gradient(one_hot(p.argmax(-1), p.shape[-1]) if exclusive else (p > .5).astype(p.dtype))
  if exclusive:
    p, target = p[..., 1:], target[..., 1:]
  axes = tuple(range(p.ndim - 1))
  overlap, size = (p * target).sum(axes), p.sum(axes) + target.sum(axes)
  return 1 - ((2 * overlap + SMOOTH) / (size + SMOOTH)).mean()


def weights(levels: int) -> list[float]:
  """Of outputs from the finest to the coarsest: halved at each, 0 for the last, sum 1; [8, 4, 2, 1, 0] / 15 of five."""
  if levels == 1:
    return [1.]
  raw = [2.**-i for i in range(levels - 1)] + [0.]
  return [w / sum(raw) for w in raw]
