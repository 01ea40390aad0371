"""Backbones: (x, train, decode) -> (embedding, pyramid, reconstruction or None). `build` makes one from a config."""
from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimiss_jax.models.mit import MiTPlus

BACKBONES = {'mit_plus': MiTPlus}


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
  return BACKBONES[name](**{**fields, 'dtype': jnp.dtype(fields.get('dtype', 'float32'))})


def init_params(model: nn.Module, key) -> dict:
  """All parameters, those of every input rank together.

  Meant for `jax.jit` or `jax.eval_shape`: the forward passes that name the parameters are then never computed.

  Args:
    model: a backbone with `input_shapes()`.
    key: a jax key.
  """
  init = nn.init(type(model).__call__, model)                # MiTPlus.init is a field, not Linen's method
  params = {}
  for shape in model.input_shapes():
    params = _merge(params, init(key, jnp.zeros(shape))['params'])
  return params


def _merge(a, b):
  return {**a, **{k: _merge(a[k], v) if isinstance(v, dict) and k in a else v for k, v in b.items()}}
