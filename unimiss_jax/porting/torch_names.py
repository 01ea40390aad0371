"""Names and layouts of the released PyTorch weights against ours. numpy only.

Ours keep the released module names, so that a name differs in three mechanical ways: '/' for '.', 'block1_0' for
'block1.0', and the leaf ('kernel' or 'scale' for 'weight'). Layouts, PyTorch -> ours:
  linear                 (O, I)        -> (I, O)
  convolution            (O, I, *k)    -> (*k, I, O)      depthwise: (C, 1, *k) -> (*k, 1, C), the same rule
  transposed convolution (I, O, *k)    -> (*k, I, O)
  everything else is copied, the prototypes of the head too.
Statistics of batch norms lie in a tree of their own, 'batch_stats', and beside the parameters in PyTorch.
"""
from __future__ import annotations

import re

import numpy as np

LEAVES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}      # ours: PyTorch's
STATISTICS = {'running_mean': 'mean', 'running_var': 'var'}
TRANSPOSED = re.compile(r'TransposeConv|DecEmbed\w+[./]proj[./]')


def to_torch_name(path: tuple) -> str:
  """('transformer', 'block1_0', 'attn', 'q', 'kernel') -> 'transformer.block1.0.attn.q.weight'."""
  parts = [re.sub(r'_(\d+)$', r'.\1', part) for part in path[:-1]]
  return '.'.join([*parts, LEAVES.get(path[-1], path[-1])])


def from_torch_name(name: str, ndim: int) -> tuple:
  """The inverse; `ndim` of the tensor tells a norm's scale from a kernel."""
  parts = re.sub(r'\.(\d+)\.', r'_\1.', name).split('.')
  if parts[-1] == 'weight':
    parts[-1] = 'scale' if ndim == 1 else 'kernel'
  parts[-1] = STATISTICS.get(parts[-1], parts[-1])
  return tuple(parts)


def to_torch_layout(name: str, array) -> np.ndarray:
  """Our array -> contiguous PyTorch layout; `name` in PyTorch's or our spelling."""
  return np.ascontiguousarray(np.transpose(array, _axes(name, np.ndim(array))))


def from_torch_layout(name: str, array) -> np.ndarray:
  """PyTorch's array -> our layout, contiguous."""
  return np.ascontiguousarray(np.transpose(array, np.argsort(_axes(name, np.ndim(array)))))


def _axes(name, ndim):
  """Order in which our axes are read to give PyTorch's."""
  if not re.search(r'(^|[./])(weight|kernel)$', name) or ndim < 2:
    return tuple(range(ndim))
  io = (ndim - 2, ndim - 1) if TRANSPOSED.search(name) else (ndim - 1, ndim - 2)
  return io + tuple(range(ndim - 2))


def from_torch_tree(tensors: dict) -> dict:
  """{'backbone....': array} -> our nested trees, {'backbone': ..., 'batch_stats': ..., ...}; works on traced arrays."""
  tree = {}
  for name, array in tensors.items():
    *path, leaf = from_torch_name(name, array.ndim)
    if name.endswith(tuple(STATISTICS)):
      path[0] = 'batch_stats'
    place = tree
    for part in path:
      place = place.setdefault(part, {})
    place[leaf] = array.transpose(tuple(int(i) for i in np.argsort(_axes(name, array.ndim))))
  return tree
