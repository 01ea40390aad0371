"""The losses of `contrastive.py` for very large batches under `shard_map`: the texts travel from device to device in a
ring, so that no device ever holds more than [B / devices, B / devices] logits (SigLIP, Zhai et al. 2023, section 3.3).

InfoNCE needs sums over whole rows and whole columns: those of the rows stay at home, those of the columns travel with
their texts. After as many hops as there are devices everything is at home again. A block is computed again in the
backward pass instead of being kept.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from unimiss_jax.losses.contrastive import unit_rows


def info_nce(image, text, log_scale, axis_name, valid=None, report_id=None):
  """As `contrastive.info_nce`, by a ring over the mesh axis `axis_name`."""
  row = _rows(axis_name, len(image))
  image, text, valid = unit_rows(image, text, row >= 0 if valid is None else valid)
  scale, none = jnp.exp(log_scale), jnp.finfo(image.dtype).min
  mine = row if report_id is None else report_id

  @jax.checkpoint
  def block(image, keys):
    """For the rows and for the columns of one block of logits: logarithm of the sum of exp, sum of the positives'
    logits, number of positives."""
    scores = scale * image @ keys['text'].T
    positive = (mine[:, None] == keys['row']) & valid[:, None] & keys['valid']
    return [{'lse': jax.nn.logsumexp(jnp.where(there, scores, none), axis),
             'of_positives': jnp.where(positive, scores, 0).sum(axis), 'count': positive.sum(axis)}
            for axis, there in ((1, keys['valid'][None]), (0, valid[:, None]))]

  def merge(a, b):
    return {k: jnp.logaddexp(a[k], b[k]) if k == 'lse' else a[k] + b[k] for k in a}

  def hop(_, carry):
    rows, columns, keys = carry
    columns, keys = _passed_on((columns, keys), axis_name)
    of_rows, of_columns = block(image, keys)
    return merge(rows, of_rows), merge(columns, of_columns), keys

  keys = {'text': text, 'valid': valid, 'row': mine}
  rows, columns, _ = jax.lax.fori_loop(1, jax.lax.axis_size(axis_name), hop, (*block(image, keys), keys))
  columns = _passed_on(columns, axis_name)      # home

  def total(sums):
    each = sums['lse'] - sums['of_positives'] / jnp.maximum(sums['count'], 1)
    return jax.lax.psum(jnp.where(valid, each, 0).sum(), axis_name)
  return (total(rows) + total(columns)) / 2 / jnp.maximum(jax.lax.psum(valid.sum(), axis_name), 1)


def siglip(image, text, log_scale, bias, axis_name, valid=None):
  """As `contrastive.siglip`, by a ring over the mesh axis `axis_name`."""
  row = _rows(axis_name, len(image))
  image, text, valid = unit_rows(image, text, row >= 0 if valid is None else valid)

  @jax.checkpoint
  def block(image, keys):
    logits = jnp.exp(log_scale) * image @ keys['text'].T + bias
    log_p = jax.nn.log_sigmoid(jnp.where(row[:, None] == keys['row'], logits, -logits))
    return jnp.where(valid[:, None] & keys['valid'], log_p, 0).sum()

  def hop(_, carry):
    total, keys = carry
    keys = _passed_on(keys, axis_name)
    return total + block(image, keys), keys

  keys = {'text': text, 'valid': valid, 'row': row}
  total, _ = jax.lax.fori_loop(1, jax.lax.axis_size(axis_name), hop, (block(image, keys), keys))
  return -jax.lax.psum(total, axis_name) / jnp.maximum(jax.lax.psum(valid.sum(), axis_name), 1)


def _rows(axis_name, b: int):
  """[b] numbers of this device's rows in the global batch."""
  return jax.lax.axis_index(axis_name) * b + jnp.arange(b)


def _passed_on(tree, axis_name):
  """What the device before holds."""
  n = jax.lax.axis_size(axis_name)
  return jax.lax.ppermute(tree, axis_name, [(i, (i + 1) % n) for i in range(n)])
