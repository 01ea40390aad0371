"""Clustering objectives: swapped prediction with Sinkhorn codes (SwAV, Caron et al. 2020), cross-entropy to the
clusters of the last epoch (DeepCluster-v2, the same paper), spherical k-means over a bank of embeddings.

Every function takes the rows of one device under `shard_map` (`axis_name` = mesh axis or axes; sums then run over all
devices, and losses are the global ones), or all rows without (`axis_name=None`: plain `jit`, sharded or not). Scores
are never gathered.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

UNSEEN = -100              # target of a row that has no cluster yet
SCORES = 2 ** 24           # numbers: largest block of row x cluster scores that k-means holds at a time
EXACT = jax.lax.Precision.HIGHEST


def sinkhorn(scores, eps: float, iters: int, queue=None, axis_name=None):
  """Codes: an almost even share of all rows for every prototype, in the log domain and never narrower than float32.

  Each round gives every prototype the same mass, then every row; only the rows are exact at the end.

  Args:
    scores: [B, K], products of embeddings and prototypes.
    eps: entropy; smaller is sharper.
    iters: rounds, at least 1.
    queue: [*Q, K], scores of former rows (under `shard_map`: a share of them); they take part, but get no codes.
    axis_name: see above.

  Returns:
    [B, K]; rows sum to 1.

  Raises:
    ValueError: no round.
  """
  return jnp.exp(log_sinkhorn(scores, eps, iters, queue, axis_name))


def log_sinkhorn(scores, eps: float, iters: int, queue=None, axis_name=None):
  """The logarithm of `sinkhorn`, finite where a code is smaller than any number of its type."""
  if iters < 1:
    raise ValueError(f'sinkhorn with iters={iters}: at least one round is needed')
  parts = [_wide(x) / eps for x in (scores, queue) if x is not None]      # never put together: each stays where it is

  def round_(_, parts):
    total = _logsumexp_of_rows(parts, axis_name)
    return [jax.nn.log_softmax(x - total) for x in parts]
  return jax.lax.fori_loop(0, iters, round_, parts)[0]


def _logsumexp_of_rows(parts, axis_name):
  """Arrays [..., K] -> [K], over the rows of all of them and of all devices."""
  rows = lambda x: tuple(range(x.ndim - 1))
  top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [x.max(rows(x)) for x in parts]))
  if axis_name is not None:
    top = jax.lax.pmax(top, axis_name)
  return top + jnp.log(_total(sum(jnp.exp(x - top).sum(rows(x)) for x in parts), axis_name))


def swapped_loss(logits, assign, tau: float, eps: float, iters: int, queue=None, axis_name=None):
  """The codes of every assigned crop are predicted from every other crop; codes get no gradient.

  Args:
    logits: [V, B, K], products of unit embeddings and prototypes of V crops of B samples.
    assign: the A crops that give codes.
    tau: temperature of the predictions.
    eps, iters: see `sinkhorn`.
    queue: [A, *Q, K], see `sinkhorn`.
    axis_name: see above.

  Returns:
    (loss, codes [A, B, K]): mean over the assigned crops, the V - 1 others and the samples of all devices.

  Raises:
    ValueError: fewer than two crops.
  """
  v, b, _ = logits.shape
  if v < 2:
    raise ValueError('swapped_loss of one crop: there is no other crop to predict')
  assign = np.asarray(assign)
  logits = _wide(logits)
  codes = jax.vmap(lambda s, q: sinkhorn(s, eps, iters, q, axis_name), (0, None if queue is None else 0))(
      jax.lax.stop_gradient(logits[assign]), None if queue is None else jax.lax.stop_gradient(queue))
  codes = jax.lax.stop_gradient(codes)
  fit = jnp.einsum('abk,vbk->av', codes, jax.nn.log_softmax(logits / tau), precision=EXACT) / b
  others = assign[:, None] != np.arange(v)
  return _mean(-(fit * others).sum() / others.sum(), axis_name), codes


def dc2_loss(z, prototypes, targets, tau: float, axis_name=None):
  """Cross-entropy of all crops to the clusters that their samples had in the bank; prototypes get no gradient.

  Args:
    z: [V * B, D] unit embeddings, all samples of crop 0 first.
    prototypes: H arrays [K_h, D], unit rows.
    targets: [H, B] integers; UNSEEN rows do not count.
    tau: temperature.
    axis_name: see above.

  Returns:
    Scalar: mean over the heads of the mean over the rows that count (0 where none does).
  """
  z, crops = _wide(z), len(z) // targets.shape[1]

  def head(centroids, target):
    target = jnp.tile(target, crops)
    seen = target != UNSEEN
    log_p = jax.nn.log_softmax(jnp.matmul(z, jax.lax.stop_gradient(centroids).T.astype(z.dtype), precision=EXACT) / tau)
    picked = jnp.take_along_axis(log_p, jnp.where(seen, target, 0)[:, None], 1)[:, 0]
    return -_total((picked * seen).sum(), axis_name) / jnp.maximum(_total(seen.sum(), axis_name), 1)
  return sum(map(head, prototypes, targets)) / len(prototypes)


def kmeans(memory, valid, init, iters: int, axis_name=None):
  """Spherical k-means: the cluster of a row is its largest dot product, a centroid the unit mean of its rows.

  A centroid without rows (or whose rows cancel out) stays. Scores are made block by block, so that beside the rows at
  most SCORES numbers are held.

  Args:
    memory: [N, D], unit rows.
    valid: [N] bool; other rows are padding.
    init: [K, D] unit rows, alike on all devices.
    iters: rounds of clusters and centroids; the clusters of the last centroids follow.
    axis_name: see above.

  Returns:
    (centroids [K, D], clusters [N] int32; ties go to the lowest, padding is UNSEEN).
  """
  memory, valid, init = _wide(memory), valid.astype(bool), _wide(init)
  k = len(init)
  rows = max(SCORES // k, 1)

  def clusters(centroids):
    nearest = lambda row: jnp.argmax(jnp.matmul(centroids, row, precision=EXACT)).astype(jnp.int32)
    return jax.lax.map(nearest, memory, batch_size=min(rows, len(memory)))

  def step(_, centroids):
    of = jnp.where(valid, clusters(centroids), k)          # cluster k does not exist: padding is dropped
    sums = _total(jax.ops.segment_sum(memory, of, k), axis_name)
    norm = jnp.linalg.norm(sums, axis=1, keepdims=True)
    return jnp.where(norm > 0, sums / jnp.where(norm > 0, norm, 1), centroids)

  centroids = jax.lax.fori_loop(0, iters, step, init)
  return centroids, jnp.where(valid, clusters(centroids), UNSEEN)


def seed_rows(key, memory, valid, k: int, ids):
  """k distinct valid rows of the whole bank, to start k-means from: [S, B, D], [S, B] -> [k, D].

  The draw depends on the steps S and ids [S, B] of the rows alone, so that it is the same however many devices hold
  them, and in whatever order several processes lay the rows of a step.
  """
  draw = lambda turn, i: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, turn), i))
  each = jax.vmap(lambda turn, row: jax.vmap(lambda i: draw(turn, i))(row))(jnp.arange(len(ids)), ids)
  order = jnp.where(valid, each, -1.)
  return memory[jnp.unravel_index(jax.lax.top_k(order.ravel(), k)[1], valid.shape)]


def scatter_assign(ids, clusters, size: int):
  """Table [size] int32 from sample id to the cluster of its last row; ids that have no row are UNSEEN.

  Args:
    ids, clusters: [N], the whole bank in the order of the visits; UNSEEN rows (padding) are left out.
    size: number of samples; ids are unique over all data sets.
  """
  place = jnp.where(clusters == UNSEEN, size, ids)         # beyond the table: dropped
  last = jnp.full(size, -1, jnp.int32).at[place].max(jnp.arange(len(ids), dtype=jnp.int32), mode='drop')
  return jnp.where(last < 0, UNSEEN, clusters.astype(jnp.int32)[last])


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _total(x, axis_name):
  return x if axis_name is None else jax.lax.psum(x, axis_name)


def _mean(x, axis_name):
  return x if axis_name is None else jax.lax.pmean(x, axis_name)
