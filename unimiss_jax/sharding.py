"""Who holds what: one mesh ('data', 'fsdp'), rules from parameter names to PartitionSpecs.

The batch is split over both axes, large tensors over 'fsdp', everything else is replicated.
Axes are Auto: the compiler places the collectives.
"""
import logging
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from unimiss_jax.optim import leaf_name

AXES = ('data', 'fsdp')
SMALL = 2 ** 16     # numbers; below this a tensor is not worth splitting (chosen by us)


def make_mesh(data: int, fsdp: int, devices=None) -> jax.sharding.Mesh:
  """Mesh of data x fsdp devices; -1 (one of the two) fills with what is left.

  Of several slices (TPU pods, GPU hosts) each is one block of the 'data' axis: only sums of gradients cross the slow
  network between them.

  Raises:
    ValueError: data * fsdp is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  sizes = [n // -(data * fsdp) if s == -1 else s for s in (data, fsdp)]
  if (data, fsdp).count(-1) > 1 or min(sizes) < 1 or sizes[0] * sizes[1] != n:
    raise ValueError(f'mesh of {data} x {fsdp} does not fit {n} devices')
  auto = (AxisType.Auto,) * 2
  if (slices := count_slices(devices)) == 1:
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)
  return jax.sharding.Mesh(over_slices(*sizes, slices, devices), AXES, axis_types=auto)


def count_slices(devices) -> int:
  """Groups of devices with a fast network of their own."""
  return len({getattr(d, 'slice_index', 0) for d in devices})


def over_slices(data: int, fsdp: int, slices: int, devices):
  """[data, fsdp] devices, 'fsdp' within a slice where the sizes allow it."""
  if data % slices:
    logging.warning('WARN mesh of %d x %d over %d slices: tensors are gathered over the network between slices. '
                    'FIX: make mesh.data a multiple of %d', data, fsdp, slices, slices)
    return np.array(sorted(devices, key=lambda d: (d.slice_index, d.id)), dtype=object).reshape(data, fsdp)
  return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp), (slices, 1), devices)


def fsdp(x, mesh) -> P:
  """The largest dimension that the 'fsdp' axis divides."""
  n = mesh.shape['fsdp']
  if n > 1 and x.size >= SMALL:
    for d in sorted(range(x.ndim), key=lambda d: -x.shape[d]):
      if x.shape[d] % n == 0:
        return P(*('fsdp' if i == d else None for i in range(x.ndim)))
  return P()


RULES = (                                   # first match wins; moments and teacher end like their parameter
    (r'(^|/)(step|count|skipped|bad)$', P()),
    (r'(^|/)(scale|bias|weight_g|log_scale|logit_bias)$', P()),
    (r'(^|/)(kernel|weight_v|embedding)$', fsdp),
    (r'(pos_embed|PosEmbed|cls_tokens|_table|class_token|mask_token)', fsdp),
    (r'(^|/)(center|center_patch|token|mean|var|table)$', P()),
    (r'(^|/)(centroids|told)/', P()),
    (r'(^|/)bank_rows$', P(None, None, AXES)),        # [crops, steps, rows of a batch, width]
    (r'(^|/)bank_ids$', P(None, AXES)),               # [steps, rows of a batch]
)


def shardings(tree, mesh, rules=RULES):
  """NamedSharding of every leaf; raises ValueError on a leaf that no rule names."""
  def one(path, x):
    name = leaf_name(path)
    for pattern, rule in rules:
      if re.search(pattern, name):
        return NamedSharding(mesh, rule(x, mesh) if callable(rule) else rule)
    raise ValueError(f'no sharding rule matches {name} {x.shape}: add one to unimiss_jax/sharding.py')
  return jax.tree_util.tree_map_with_path(one, tree)


def gathered(tree, mesh):
  """In a step: tensors that are split over 'fsdp' as one. Rows stay where they are and weights come to them; left to
  itself the compiler splits activations by their channels, which costs more than half the traffic again."""
  if mesh.shape['fsdp'] == 1:
    return tree
  whole = replicated(mesh)
  return jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, whole) if 'fsdp' in s.spec else x,
                      tree, shardings(tree, mesh))


def batch_sharding(mesh) -> NamedSharding:
  return NamedSharding(mesh, P(AXES))


def replicated(mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def to_devices(batch, mesh):
  """This process's rows of a numpy batch -> global arrays, rows split over all devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)


def from_whole(x, mesh):
  """[N, ...] that every process holds alike -> global array, rows split over all devices."""
  return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def bytes_per_device(tree) -> int:
  """Of the fullest device; leaves have a sharding."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
