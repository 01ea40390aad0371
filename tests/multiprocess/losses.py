"""One of several processes that compute the contrastive losses together, and their gradients: HOST:PORT N I IN OUT."""
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unimiss_jax.losses import contrastive, ring

OPTIONS = {'infonce': (), 'infonce_valid': ('valid',), 'multipos': ('report_id',), 'siglip': ()}
SPLIT, WHOLE = PartitionSpec('data'), PartitionSpec()


def scalars(case):
  return (np.log(10.), -10.) if case == 'siglip' else (np.log(1 / .07),)


def loss(form, case, rows, given, **more):
  options = {k: rows[k] for k in OPTIONS[case]} | more
  f = form.siglip if case == 'siglip' else form.info_nce
  return f(rows['img_raw'], rows['txt_raw'], *given, **options)


def main(address, count, index, read, write):
  jax.config.update('jax_enable_x64', True)
  jax.distributed.initialize(address, int(count), int(index))
  mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
  known = np.load(read)
  rows = {k: jax.make_array_from_callback(known[k].shape, NamedSharding(mesh, SPLIT), lambda at, x=known[k]: x[at])
          for k in ('img_raw', 'txt_raw', 'valid', 'report_id')}

  def of(form, case, rows):
    """Loss and its gradients, by rows and by scalars."""
    if form == 'jit':
      f = lambda r, *s: loss(contrastive, case, r, s)
    else:
      how = ring if form == 'ring' else contrastive
      f = jax.shard_map(lambda r, *s: loss(how, case, r, s, axis_name='data'), mesh=mesh,
                        in_specs=(SPLIT, *[WHOLE] * len(scalars(case))), out_specs=WHOLE)
    whole = lambda i, t, *s: f(rows | {'img_raw': i, 'txt_raw': t}, *s)
    given = rows['img_raw'], rows['txt_raw'], *scalars(case)
    return jax.value_and_grad(whole, argnums=tuple(range(len(given))))(*given)
  every = [(form, case) for form in ('jit', 'gathered', 'ring') for case in OPTIONS]
  run = jax.jit(of, static_argnums=(0, 1))      # rows as an argument: no process holds all of them
  found = {f'{form} {case}': run(form, case, rows) for form, case in every}
  out = {}
  for name, (value, grads) in found.items():
    out[f'{name}/loss'] = np.asarray(value)
    for i, g in enumerate(grads):
      out[f'{name}/{i}'] = np.asarray(multihost_utils.process_allgather(g, tiled=True))
  out['processes'], out['devices'] = jax.process_count(), jax.device_count()
  if jax.process_index() == 0:
    np.savez(write, **out)


if __name__ == '__main__':
  main(*sys.argv[1:])
