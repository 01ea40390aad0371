"""One of two processes that compute the clustering losses together, and their gradients: HOST:PORT N I FIXTURES OUT."""
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.losses.test_clustering import padded, read, swapped
from unimiss_jax.losses import clustering


def main(address, count, index, folder, write):
  jax.config.update('jax_enable_x64', True)
  jax.distributed.initialize(address, int(count), int(index))
  mesh = jax.make_mesh((jax.device_count(),), ('d',), axis_types=(AxisType.Auto,))
  read_ = lambda name: read(pathlib.Path(folder), name)

  def spread(tree, spec):
    place = lambda x: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda at: x[at])
    return jax.tree.map(place, tree)

  def on(f, inputs, outputs, *given):
    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs))
    return f(*map(spread, given, inputs))

  z, out = read_('sinkhorn'), {}
  out['sinkhorn'] = on(lambda s, q: clustering.sinkhorn(s, z['eps'], 3, q, 'd'), (P('d'), P('d')), P('d'), z['scores'],
                       z['queue_scores'])
  s = read_('swapped_loss')
  f = jax.value_and_grad(lambda x: swapped(s, axis_name='d')(x), has_aux=True)
  (out['loss'], out['codes']), out['dlogits'] = on(f, (P(None, 'd'),), ((P(), P(None, 'd')), P(None, 'd')),
                                                  s['logits'].reshape(6, 12, 20))
  d = read_('dc2_loss')
  prototypes = [d[f'proto{h}'] for h in range(3)]
  f = jax.value_and_grad(lambda x, p, t: clustering.dc2_loss(x.reshape(-1, 16), p, t, d['tau'], 'd'))
  out['dc2'], out['dz'] = on(f, (P(None, 'd'), P(), P(None, 'd')), (P(), P(None, 'd')), d['z'].reshape(2, 12, 16),
                             prototypes, d['targets'])
  k = read_('kmeans')
  memory = padded(k['memory'], jax.device_count())
  out['centroids'], out['clusters'] = on(
      lambda *given: clustering.kmeans(*given, k['iters'], 'd'), (P('d'), P('d'), P()), (P(), P('d')), memory,
      np.arange(len(memory)) < 400, k['memory'][k['init_rows']])
  found = {n: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for n, x in out.items()}
  if jax.process_index() == 0:
    np.savez(write, processes=jax.process_count(), devices=jax.device_count(), **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
