"""The forward pass as StableHLO: a file that runs with jax alone, on the weights of the safetensors beside it."""
from __future__ import annotations

import jax
import jax.export
import numpy as np

from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import parity

PLATFORMS = ('cpu', 'cuda', 'tpu')


def export(tensors: dict, model: dict) -> dict[str, bytes]:
  """One artefact per dimension: {'forward_2d.stablehlo': bytes}, for inputs of native size and any batch.

  Each is called as `jax.export.deserialize(bytes).call({name: array}, x)`, x channels first, and returns
  {'embedding': [B, E], 'c0': ..., 's4': ..., 'reconstruction': ..., 'logits': ...}, channels first.

  Args:
    tensors: name -> array, as exported.
    model: keyword arguments of `torch_mit.UniMiSSPlus`.
  """
  module = architectures.model(model['arch'])
  weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}
  batch, = jax.export.symbolic_shape('b')
  out = {}
  for n in model['dimensions']:
    x = jax.ShapeDtypeStruct((batch, module.in_channels[n - 2], *module.native_size(n)), np.float32)
    f = jax.export.export(jax.jit(parity.forward(model)), platforms=PLATFORMS)
    out[f'forward_{n}d.stablehlo'] = f(weights, x).serialize()
  return out
