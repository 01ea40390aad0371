"""Backbones: (x, train, decode) -> (embedding, pyramid, reconstruction or None). `build` makes one from a config."""
from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

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
  """All parameters of a backbone, those of every input rank together; may be jitted.

  The whole tree is cut from one draw of normal noise: hundreds of small draws would compile for half a minute.

  Args:
    model: a backbone with `input_shapes()` and `initial(path, shapes)`.
    key: a jax key.
  """
  init = nn.init(type(model).__call__, model)      # not model.init: that may be a field
  leaves = {}
  for shape in model.input_shapes():
    leaves |= flatten_dict(jax.eval_shape(init, key, jnp.zeros(shape))['params'])
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  laws = {path: model.initial(path, shapes) for path in sorted(leaves)}
  drawn = [path for path, (law, _) in laws.items() if law != 'constant']
  ends = np.cumsum([leaves[path].size for path in drawn])
  noise = jax.random.normal(key, (int(ends[-1]),))
  params = {path: jnp.full(leaves[path].shape, laws[path][1], leaves[path].dtype) for path in laws}
  for path, end in zip(drawn, ends):
    law, scale = laws[path]
    z = noise[end - leaves[path].size:end].reshape(leaves[path].shape).astype(leaves[path].dtype)
    params[path] = scale * (z if law == 'normal' else jax.lax.erf(z / 2**0.5))    # erf: normal -> uniform in (-1, 1)
  return unflatten_dict(params)
