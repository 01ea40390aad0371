"""Contrastive losses: symmetric InfoNCE of pairs (CLIP, Radford et al. 2021), SigLIP, and NT-Xent of two views (SimCLR,
Chen et al. 2020). Under plain `jit` every row of the global batch is a negative, however the batch is sharded; with
axis_name under `shard_map` they are gathered; for batches whose logits [B / devices, B] do not fit: `ring.py`."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def standardize(z, eps: float = 1e-8):
  """[N, D] -> zero mean and unit std of every dimension over the (global) batch; removes what all samples share."""
  z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  z = z - z.mean(0)
  return z * jax.lax.rsqrt((z * z).mean(0) + eps)


def nt_xent(z, temperature: float, group=None):
  """NT-Xent: every view must find the other view of its instance among the 2B - 1 others.

  Args:
    z: [2, B, D], L2-normalised here.
    temperature: divides the cosines.
    group: integers, [B] or [2, B]; other instances of the same group (overlapping tiles of one scan) are no candidates.

  Returns:
    Mean over the 2B views; ln(2B - 1) for a model that tells nothing apart, where all groups differ.
  """
  z = _unit(z.reshape(-1, z.shape[-1]))
  n = len(z)
  positive = jnp.roll(jnp.arange(n), n // 2)
  hidden = jnp.eye(n, dtype=bool)
  if group is not None:
    group = jnp.broadcast_to(group, (2, n // 2)).ravel()
    same = group[:, None] == group
    hidden |= same & (positive[:, None] != jnp.arange(n))
  scores = jnp.where(hidden, -jnp.inf, z @ z.T / temperature)
  return -jax.nn.log_softmax(scores)[jnp.arange(n), positive].mean()


def info_nce(image, text, log_scale, valid=None, report_id=None, axis_name=None):
  """Symmetric InfoNCE: mean of image -> text and text -> image; ln(B) for a model that tells nothing apart.

  Args:
    image, text: [B, D], row i of one belongs to row i of the other; L2-normalised here.
    log_scale: logarithm of what multiplies the cosines (minus the log of a temperature).
    valid: [B] bool; rows without are neither queries nor candidates.
    report_id: [B] integers; rows of equal id are positives of each other, the mean of their log-likelihoods counts.
    axis_name: mesh axis under `shard_map`: candidates are gathered from all devices, the loss is the global one.
      None: the rows given are the whole batch (plain `jit`, sharded or not).

  Returns:
    Scalar.
  """
  image, text, valid = unit_rows(image, text, valid)
  gather, total, first = _over(axis_name, len(image))
  candidates = gather(valid)
  if report_id is None:
    positive = first + jnp.arange(len(image))[:, None] == jnp.arange(len(candidates))
  else:
    positive = report_id[:, None] == gather(report_id)
  positive &= candidates
  scale = jnp.exp(log_scale)

  def one_way(queries, keys):
    scores = scale * queries @ gather(keys).T
    scores = jnp.where(candidates, scores, jnp.finfo(scores.dtype).min)      # finite: a batch may have no valid row
    log_p = jnp.where(positive, jax.nn.log_softmax(scores), 0).sum(-1) / jnp.maximum(positive.sum(-1), 1)
    return total(-jnp.where(valid, log_p, 0).sum()) / jnp.maximum(total(valid.sum()), 1)
  return (one_way(image, text) + one_way(text, image)) / 2


def siglip(image, text, log_scale, bias, valid=None, axis_name=None):
  """SigLIP (Zhai et al. 2023): every pair of the batch is a yes-or-no question of its own.

  Args:
    image, text, log_scale, valid, axis_name: as in `info_nce`.
    bias: added to the logits; -10 at the start, so that the many negatives do not dominate.

  Returns:
    Scalar: minus the sum of log sigmoid(+-(scale * cosine + bias)) over all pairs, divided by the number of valid rows.
  """
  image, text, valid = unit_rows(image, text, valid)
  gather, total, first = _over(axis_name, len(image))
  n = len(gather(valid))
  logits = jnp.exp(log_scale) * image @ gather(text).T + bias
  own = first + jnp.arange(len(image))[:, None] == jnp.arange(n)
  log_p = jnp.where(valid[:, None] & gather(valid), jax.nn.log_sigmoid(jnp.where(own, logits, -logits)), 0)
  return -total(log_p.sum()) / jnp.maximum(total(valid.sum()), 1)


def gap(a, b):
  """[B, D], row i of one belongs to row i of the other -> mean cosine of those that belong together, less that of all
  others; 0 = nothing tells them apart. No gradient."""
  a, b = (_unit(jax.lax.stop_gradient(x)) for x in (a, b))
  own, n = (a * b).sum(-1).mean(), len(a)
  others = (n * (a.mean(0) @ b.mean(0)) - own) / max(n - 1, 1)
  return own - others


def unit_rows(image, text, valid):
  """Rows of length 1, never narrower than float32, and which are valid; the others become 0, whatever they held."""
  valid = jnp.ones(len(image), bool) if valid is None else valid.astype(bool)
  image, text = (_unit(jnp.where(valid[:, None], x, 0)) for x in (image, text))
  return image, text, valid


def _over(axis_name, rows: int):
  """(gather from all devices, sum over all devices, index of this device's first row)."""
  if axis_name is None:
    return (lambda x: x), (lambda x: x), 0
  return (lambda x: jax.lax.all_gather(x, axis_name, tiled=True), lambda x: jax.lax.psum(x, axis_name),
          jax.lax.axis_index(axis_name) * rows)


def _unit(x):
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))
