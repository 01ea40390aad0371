"""What DeepCluster-v2 learns from: the cluster that a sample had in a bank of embeddings when the epoch began.

Its store is part of `extra`, so of the state and of a checkpoint; the first two are also the queue of SwAV, whose codes
are shared out over the samples of the last steps too:
  bank_rows   [C, S, B, D]  embeddings of C crops, step by step of the last epoch, or of the queue
  bank_ids    [S, B]        whose they are; EMPTY where nobody was yet
  centroids   {head: [K, D]}
  table       [H, records]  cluster of every sample in every head; UNSEEN without one
  told        see `told`
The rows of a step lie as the batch does: a device writes and clusters its own, whatever the number of devices.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from unimiss_jax.losses import clustering
from unimiss_jax.sharding import AXES, replicated

CROPS = 2      # of a sample that are kept; head h clusters crop h mod CROPS
EMPTY = -1
TOLD = 'largest', 'empty', 'kept'
MOST = 4096    # clusters of a head whose moves are counted: that takes a table of all pairs of them


def turns(records: int, batch: int) -> int:
  """Steps of an epoch: all records fit into a bank of so many batches."""
  return math.ceil(records / batch)


def queue(steps: int, batch: int, width: int) -> dict:
  """Room for the embeddings of so many steps, in which nobody was."""
  return {'bank_rows': jnp.zeros((CROPS, steps, batch, width)),
          'bank_ids': jnp.full((steps, batch), EMPTY, jnp.int32)}


def full(store):
  return (store['bank_ids'] != EMPTY).all()


def empty(records: int, batch: int, width: int, clusters) -> dict:
  """A store in which nobody was; clusters: their number in each head."""
  return queue(turns(records, batch), batch, width) | {
          'centroids': {f'head_{h}': jnp.zeros((k, width)) for h, k in enumerate(clusters)},
          'table': jnp.full((len(clusters), records), clustering.UNSEEN, jnp.int32),
          'told': {k: jnp.full((), jnp.nan) for k in TOLD}}


def write(store, z, ids, turn):
  """The store with unit rows z [B, CROPS, D] of samples ids [B] in the place of step `turn`."""
  at = lambda x, new, axis: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), turn, axis)
  return store | {'bank_rows': at(store['bank_rows'], z.swapaxes(0, 1), 1), 'bank_ids': at(store['bank_ids'], ids, 0)}


def loss(store, z, ids, temperature: float):
  """Cross-entropy of unit rows z [B, V, D] to the clusters of samples ids [B]; those without one do not count."""
  centroids = [store['centroids'][f'head_{h}'] for h in range(len(store['table']))]
  targets = store['table'].at[:, ids].get(mode='fill', fill_value=clustering.UNSEEN)
  return clustering.dc2_loss(z.swapaxes(0, 1).reshape(-1, z.shape[-1]), centroids, targets, temperature)


def renewed(store, key, rounds: int):
  """The store with the clusters of what its bank holds, by all devices of its mesh; leaves stay where they are."""
  found = _program(store['bank_ids'].sharding.mesh, rounds)(store, key)
  return store | jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), found,
                              {k: store[k] for k in found})


def told(old, new, clusters) -> dict:
  """What the clusters of an epoch, [H, records], are like beside those of the one before; `clusters`: of each head.

  Returns:
    largest: share of the samples in the largest cluster, of the worst head.
    empty: share of the clusters that nobody is in, mean over the heads.
    kept: whether those who were together still are: the adjusted Rand index (Hubert and Arabie 1985), mean over the
      heads: 1 = all, 0 = no more than chance has it, whatever the clusters are called now. NaN where there was no
      epoch before, and for more than MOST clusters.
  """
  sizes = [_counts(n, k) for n, k in zip(new, clusters)]
  kept = [_rand(o, n, k) if k <= MOST else jnp.nan for o, n, k in zip(old, new, clusters)]
  found = {'largest': jnp.stack([s.max() / jnp.maximum(s.sum(), 1) for s in sizes]).max(),
           'empty': sum((s == 0).mean() for s in sizes) / len(sizes), 'kept': sum(kept) / len(kept)}
  return {k: jnp.asarray(v, float) for k, v in found.items()}


def _counts(of, k: int):
  """[N] numbers below k, others do not count -> [k]."""
  return jnp.zeros(k).at[jnp.where(of < 0, k, of)].add(1., mode='drop')


def _rand(old, new, k: int):
  """Adjusted Rand index of two assignments [N] to k clusters, of those who are in one both times."""
  both = (old >= 0) & (new >= 0)
  pairs = lambda n: (n * (n - 1) / 2).sum()
  table = _counts(jnp.where(both, old * k + new, -1), k * k).reshape(k, k)
  a, b, n = pairs(table.sum(1)), pairs(table.sum(0)), both.sum()
  by_chance = a * b / (n * (n - 1) / 2)
  return (pairs(table) - by_chance) / ((a + b) / 2 - by_chance)


@functools.lru_cache(maxsize=8)
def _program(mesh, rounds: int):
  """(store, key) -> its new centroids and table."""
  def share(memory, valid, init):      # of one device: [S, b, D], [S, b], [K, D]
    centroids, of = clustering.kmeans(memory.reshape(-1, memory.shape[-1]), valid.ravel(), init, rounds, AXES)
    return centroids, of.reshape(valid.shape)
  rows = P(None, AXES)
  everywhere = jax.shard_map(share, mesh=mesh, in_specs=(rows, rows, P()), out_specs=(P(), rows))

  def program(store, key):
    ids, centroids, table = store['bank_ids'], {}, []
    for h, old in enumerate(store['centroids'].values()):
      memory = store['bank_rows'][h % CROPS]
      init = clustering.seed_rows(jax.random.fold_in(key, h), memory, ids != EMPTY, len(old), ids)
      centroids[f'head_{h}'], of = everywhere(memory, ids != EMPTY, init)
      table.append(clustering.scatter_assign(ids.ravel(), of.ravel(), store['table'].shape[1]))
    return {'centroids': centroids, 'table': jnp.stack(table),
            'told': told(store['table'], table, [len(c) for c in centroids.values()])}
  return jax.jit(program, out_shardings=replicated(mesh))
