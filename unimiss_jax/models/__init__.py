"""Backbones: (x, train, decode) -> (embedding, pyramid, reconstruction or None). `build` makes one from a config."""
from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax.models.mit import MiT, MiTPlus, MiTTiny
from unimiss_jax.models.resnet import ResNet
from unimiss_jax.models.vit import ViT

BACKBONES = {'mit_plus': MiTPlus, 'mit_small': MiT, 'mit_tiny': MiTTiny, 'resnet50': ResNet, 'vit_b16': ViT,
             'vit_tiny': ViT}
SIZES = {'vit_tiny': dict(embed_dims=(192,), num_heads=(3,))}      # of what is no default; Touvron et al. 2021


def build(config) -> nn.Module:
  """The backbone that `config.model` describes.

  Args:
    config: mapping of the leaves `name`, `dtype` and the fields of the named backbone.

  Raises:
    ValueError: unknown name or field, with the known ones.
  """
  fields = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config).items()}
  name = fields.pop('name')
  if name not in BACKBONES:
    raise ValueError(f'model.name={name!r}: known are {", ".join(BACKBONES)}')
  known = set(BACKBONES[name].__dataclass_fields__) - {'parent', 'name'}
  if unknown := set(fields) - known:
    raise ValueError(f'model.{min(unknown)} is no field of {name}; known are {", ".join(sorted(known))}')
  return BACKBONES[name](**{**SIZES.get(name, {}), **fields, 'dtype': jnp.dtype(fields.get('dtype', 'float32'))})


def encode(model, params, stats, x, keys=None):
  """A backbone with or without batch statistics, its decoder left out.

  Args:
    model: the backbone.
    params, stats: its parameters and batch statistics; {} where it has none.
    x: [B, *S, C].
    keys: [B] of the rows, for training; None = evaluation.

  Returns:
    (embedding, pyramid, None), and the batch statistics after it.
  """
  variables = {'params': params} | ({'batch_stats': stats} if stats else {})
  given = dict(train=keys is not None, decode=False, row_keys=keys)
  if stats and keys is not None:
    out, new = model.apply(variables, x, mutable=['batch_stats'], **given)
    return out, new['batch_stats']
  return model.apply(variables, x, **given), stats


def param_shapes(model: nn.Module) -> dict:
  """Path -> ShapeDtypeStruct of all parameters of a backbone, those of every input rank together."""
  init = nn.init(type(model).__call__, model)      # not model.init: that may be a field
  leaves = {}
  for shape in model.input_shapes():
    x = jax.ShapeDtypeStruct(shape, getattr(model, 'input_dtype', jnp.float32))
    leaves |= flatten_dict(jax.eval_shape(init, jax.random.key(0), x)['params'])
  return dict(sorted(leaves.items()))


def init_params(model: nn.Module, key) -> dict:
  """Parameters of a backbone as its `initial(path, shapes)` says; may be jitted.

  The whole tree is cut from one draw of normal noise: hundreds of small draws would compile for half a minute.

  Args:
    model: a backbone.
    key: a jax key.

  Returns:
    Nested dict.
  """
  leaves = param_shapes(model)
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  laws = {path: model.initial(path, shapes) for path in leaves}
  noise = jax.random.normal(key, (sum(leaf.size for path, leaf in leaves.items() if laws[path][0] != 'constant'),))
  params, start = {}, 0
  for path, leaf in leaves.items():
    law, scale = laws[path]
    if law == 'constant':
      params[path] = jnp.full(leaf.shape, scale, leaf.dtype)
    else:
      z = noise[start:start + leaf.size].reshape(leaf.shape)
      start += leaf.size
      params[path] = (scale * (z if law == 'normal' else _uniform(z))).astype(leaf.dtype)
  return unflatten_dict(params)


def _uniform(z):
  """Standard normal -> uniform in (-1, 1)."""
  return jax.lax.erf(z / 2**0.5)
