"""ResNet weights of PyTorch (torchvision's names) <-> our parameters and batch statistics, strict both ways."""
from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax import models
from unimiss_jax.models.resnet import ResNet, first_statistics
from unimiss_jax.porting import torch_names
from unimiss_jax.porting.errors import PortingError

STATISTICS = {'mean': 'running_mean', 'var': 'running_var'}
LEVELS = ('state_dict', 'model', 'module.', 'backbone.', 'encoder.')
SURPLUS = ('fc.', 'projection_head.', 'prototypes')      # what stands behind the encoder in the usual files


def to_torch(params, batch_stats) -> dict:
  """Our trees -> {torchvision's name: contiguous numpy array}."""
  out = {}
  for path, x in flatten_dict(jax.device_get(params)).items():
    name = torch_names.to_torch_name(path)
    out[name] = torch_names.to_torch_layout(name, x)
  for path, x in flatten_dict(jax.device_get(batch_stats)).items():
    out[torch_names.to_torch_name((*path[:-1], STATISTICS[path[-1]]))] = np.array(x)
  return out


def from_torch(state_dict, model: ResNet) -> dict:
  """A state dict -> {'params', 'batch_stats'} of `model`, numpy arrays of the dtype given.

  Args:
    state_dict: name -> numpy array or tensor; a level 'state_dict' or 'model' is entered, prefixes 'module.',
      'backbone.' and 'encoder.' and counters of batches are taken off, classifier and projection head left.
    model: which network it must be.

  Raises:
    PortingError: lists what is missing, unexpected or mis-shaped.
  """
  for level in LEVELS[:2]:
    if isinstance(state_dict.get(level), Mapping):
      state_dict = state_dict[level]
  given = {}
  for name, x in state_dict.items():
    for prefix in LEVELS[2:]:
      name = name.removeprefix(prefix)
    if not name.startswith(SURPLUS) and not name.endswith('num_batches_tracked'):
      given[name] = np.asarray(x)
  statistics = flatten_dict(jax.eval_shape(lambda: first_statistics(model)))
  shapes = {('params', *path): s.shape for path, s in models.param_shapes(model).items()}
  shapes |= {('batch_stats', *path): s.shape for path, s in statistics.items()}
  expected = {path: torch_names.to_torch_name((*path[1:-1], STATISTICS.get(path[-1], path[-1]))) for path in shapes}
  missing, unexpected = sorted(set(expected.values()) - set(given)), sorted(set(given) - set(expected.values()))
  if missing or unexpected:
    raise PortingError(f'these are not the weights of this ResNet: missing {missing[:5]} ({len(missing)} in all), '
                       f'unexpected {unexpected[:5]} ({len(unexpected)} in all). FIX: model.depths as in the file')
  out = {path: torch_names.from_torch_layout(name, given[name]) for path, name in expected.items()}
  wrong = [f'{expected[p]} {x.shape}, expected {shapes[p]}' for p, x in out.items() if x.shape != shapes[p]]
  if wrong:
    raise PortingError(f'shapes (in our layout) differ: {"; ".join(wrong[:5])} ({len(wrong)} in all)')
  return unflatten_dict(out)
