"""A new run from the weights of another one (`init_from`): what matches is taken, nothing else happens silently."""
import logging

import jax

from unimiss_jax import checkpoint, processes
from unimiss_jax.checkpoint import CheckpointError
from unimiss_jax.optim import leaf_name, named_leaves

SHOWN = 8      # names in a message


def read(path: str, params) -> dict:
  """Tensors of `path` that belong to `params`.

  Args:
    path: a run's folder (its newest checkpoint), or one checkpoint of it.
    params: tree of arrays or shapes.

  Returns:
    {name: numpy array}, a subset of the names of `params`. Tensors of a head that have another shape stay fresh, with
    a warning: a head belongs to its task.

  Raises:
    CheckpointError: nothing there, nothing in common, or a tensor of the backbone with another shape.
  """
  folder = processes.on_main(lambda: str(checkpoint.newest(path) or ''))
  if not folder:
    raise CheckpointError(f'init_from="{path}": no checkpoint there. FIX: name the folder of a run')
  folder = checkpoint.absolute(folder)
  found, wanted = checkpoint.read_params(folder), named_leaves(params)
  same = {n: x for n, x in found.items() if n in wanted and x.shape == wanted[n].shape}
  other = {n: f'{n} {tuple(x.shape)} -> {tuple(wanted[n].shape)}' for n, x in found.items()
           if n in wanted and n not in same}
  if wrong := [text for n, text in other.items() if n.startswith('backbone/')]:
    raise CheckpointError(f'init_from="{folder}": {len(wrong)} tensors of the backbone have another shape: '
                          f'{_some(wrong)}. FIX: use the model leaves of that run')
  if not same:
    raise CheckpointError(f'init_from="{folder}": none of its {len(found)} tensors belongs to this model')
  fresh, unused = [n for n in wanted if n not in same], [n for n in found if n not in wanted]
  logging.info('init_from %s: loaded %d/%d tensors%s%s', folder, len(same), len(wanted),
               f'; fresh: {_some(fresh)}' if fresh else '', f'; not used: {_some(unused)}' if unused else '')
  if other:
    logging.warning('init_from: other shapes, left fresh: %s', _some(list(other.values())))
  return same


def merge(params, given: dict):
  """`params` with the tensors of `given` in their places, in the dtype of the place."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: given[leaf_name(path)].astype(x.dtype) if leaf_name(path) in given else x, params)


def _some(names: list) -> str:
  more = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (f' and {more} more' if more > 0 else '')
