"""A new run from other weights (`init_from`): what matches is taken, nothing else happens silently."""
import logging

import jax

from unimiss_jax import weights
from unimiss_jax.checkpoint import CheckpointError
from unimiss_jax.optim import leaf_name, named_leaves
from unimiss_jax.porting import PortingError, positions
from unimiss_jax.porting import arch as architectures

SHOWN = 8      # names in a message


def read(config, params) -> dict:
  """Tensors of `config.init_from` that belong to `params`.

  Args:
    config: of the new run; reads init_from, init_branch, init_allow, pos_resize and model.
    params: tree of arrays or shapes, 'batch_stats' among them where the network has such.

  Returns:
    {name: numpy array}, a subset of the names of `params`; position tables have the sizes of the new run. Tensors of a
    head that have another shape stay fresh, with a warning: a head belongs to its task.

  Raises:
    CheckpointError: nothing there, damaged, nothing in common, or a tensor of the backbone with another shape.
  """
  try:
    given = weights.read(config.init_from, config.init_branch, [a for a in config.init_allow.split(',') if a])
    what = f'init_from="{given.source}"'
    arch = architectures.of_config(config.model.to_dict())
    tree = given.params
    kind = lambda fields: [field in fields for field in ('patch', 'width')]
    if given.arch and kind(given.arch) != kind(arch):      # a few names and shapes may agree by chance
      known = architectures.twin(given.arch).architecture
      raise CheckpointError(f'init_from="{given.source}": holds a {known}, and this run has model.name='
                            f'{config.model.name}. FIX: use the model leaves of those weights')
    if given.arch and 'backbone' in tree:
      table = positions.resize(tree['backbone'], given.arch, arch, config.pos_resize, given.recorded)
      tree = tree | {'backbone': table}
  except PortingError as e:
    raise CheckpointError(f'init_from: {e}') from e
  found, wanted = named_leaves(tree), named_leaves(params)
  found = {n: x for n, x in found.items() if part_of(n) in config.init_parts}
  same = {n: x for n, x in found.items() if n in wanted and x.shape == wanted[n].shape}
  other = {n: f'{n} {tuple(x.shape)} -> {tuple(wanted[n].shape)}' for n, x in found.items()
           if n in wanted and n not in same}
  if wrong := [text for n, text in other.items() if n.startswith(('backbone/', 'batch_stats/'))]:
    raise CheckpointError(f'{what}: {len(wrong)} tensors of the backbone have another shape: {_some(wrong)}. FIX: use '
                          'the model leaves of those weights')
  if not same:
    raise CheckpointError(f'{what}: none of its {len(found)} tensors ({", ".join(config.init_parts)}) belongs to this '
                          'model')
  fresh, unused = [n for n in wanted if n not in same], [n for n in found if n not in wanted]
  logging.info('%s: loaded %d/%d tensors%s%s', what, len(same), len(wanted),
               f'; fresh: {_some(fresh)}' if fresh else '', f'; not used: {_some(unused)}' if unused else '')
  if other:
    logging.warning('%s: other shapes, left fresh: %s', what, _some(list(other.values())))
  if resized := _resized(given, tree):
    logging.info('%s: %d position tables resized (pos_resize=%s)', what, resized, config.pos_resize)
  _tell_of_heads(what, given, arch)
  return same


def part_of(name: str) -> str:
  """'backbone/DecEmbed2D1/...' -> 'decoder'; encoder, decoder or head."""
  part, *path = name.split('/')
  if part == 'backbone':
    return 'encoder' if architectures.in_encoder(path) else 'decoder'
  return 'encoder' if part == 'batch_stats' else 'head'


def encoder_hash(given: dict) -> str:
  """`weights.digest` of the tensors of the encoder, that of embed; '' where there are none."""
  encoder = {n: x for n, x in given.items() if part_of(n) == 'encoder'}
  return weights.digest(encoder) if encoder else ''


def merge(params, given: dict):
  """`params` with the tensors of `given` in their places, in the dtype of the place."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: given[leaf_name(path)].astype(x.dtype) if leaf_name(path) in given else x, params)


def _resized(given, tree) -> int:
  old = named_leaves(given.params)
  return sum(x.shape != old[n].shape for n, x in named_leaves(tree).items())


def _tell_of_heads(what, given, ours):
  """Numbers of attention heads change what a network computes, but no shape."""
  if not given.recorded and 'num_heads' in ours:
    logging.info('%s does not record its heads: those of this run are taken, model.num_heads=%s', what,
                 tuple(ours['num_heads']))
    return
  for name in architectures.SHAPELESS:
    if name in given.arch and tuple(given.arch[name]) != tuple(ours[name]):
      logging.warning('%s was trained with model.%s=%s, this run has %s', what, name, tuple(given.arch[name]),
                      tuple(ours[name]))


def _some(names: list) -> str:
  more = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (f' and {more} more' if more > 0 else '')
