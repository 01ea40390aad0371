"""Position tables of one backbone laid out for another one of other native sizes."""
from __future__ import annotations

import importlib
import math

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax.models import layers
from unimiss_jax.models.mit import MiT
from unimiss_jax.models.resnet import ResNet
from unimiss_jax.models.vit import ViT
from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting.errors import PortingError

# Where `resize_table` of each way lives: 'grid' interpolates on the grid, 'flat_zoom' is the released 1-D stretch.
POS_RESIZE = {'grid': 'unimiss_jax.porting.positions', 'flat_zoom': 'unimiss_jax.porting.reference'}


def tables(module) -> dict:
  """Path of every position table -> (native grid, has a class slot)."""
  if isinstance(module, ResNet):
    return {}
  if isinstance(module, ViT):
    plane, volume = (module.grid(module.native_size(n)) for n in (2, 3))
    return {('transformer', 'plane_table'): (plane, False), ('transformer', 'depth_table3D'): (volume[:1], False)}
  pilot, out = isinstance(module, MiT), {}
  first = int(not pilot)                                     # number of the decoder's first stage, on the grid of s3
  for n in (2, 3):
    grids = module.grids(module.native_size(n))
    out |= {('transformer', f'pos_embed{n}D{i}'): (grids[i], pilot or module.cls_token) for i in range(1, 5)}
    out |= {(f'DecPosEmbed{n}D{first + i}',): (grids[3 - i], pilot) for i in range(3)}
  return out


def resize(backbone: dict, old, new, how: str = 'grid', sure: bool = True) -> dict:
  """Parameters whose position tables have the native sizes of another architecture.

  Args:
    backbone: nested dict of numpy arrays.
    old, new: architectures as `porting.from_torch` takes them.
    how: a key of POS_RESIZE.
    sure: False = `old` was inferred, so a table with the right number of tokens is taken as it is.

  Returns:
    A tree like `backbone`; tables of the right size are the same arrays, and so are those that lack a class slot which
    `new` has.

  Raises:
    PortingError: unknown way.
  """
  if how not in POS_RESIZE:
    raise PortingError(f'pos_resize={how!r}: known are {", ".join(POS_RESIZE)}')
  change = importlib.import_module(POS_RESIZE[how]).resize_table
  leaves = flatten_dict(backbone)
  wanted = tables(architectures.model(new))
  for path, (grid, cls_token) in tables(architectures.model(old)).items():
    new_grid, new_token = wanted.get(path, (grid, cls_token))
    if path not in leaves or (new_grid, new_token) == (grid, cls_token) or new_token and not cls_token:
      continue
    table = np.asarray(leaves[path])
    if sure or math.prod(new_grid) + new_token != math.prod(grid) + cls_token:
      leaves[path] = change(table, grid, new_grid, new_token).astype(table.dtype)
  return unflatten_dict(leaves)


def resize_table(table, native, grid, cls_token: bool) -> np.ndarray:
  """[1, N, C] -> [1, cls_token + prod(grid), C], each axis for itself; the class slot is copied, or left out."""
  table = table if cls_token else table[:, -math.prod(native):]
  wide = jax.dtypes.canonicalize_dtype(np.promote_types(table.dtype, np.float32))
  return np.asarray(layers.resize_positions(table.astype(wide), native, grid, cls_token))
