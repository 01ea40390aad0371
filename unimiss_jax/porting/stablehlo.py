"""The forward pass as StableHLO: a file that runs with jax alone, on the weights of the safetensors beside it."""
from __future__ import annotations

import jax
import jax.export
import numpy as np

from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import parity

PLATFORMS = ('cpu', 'cuda', 'tpu')


def export(folder, tensors: dict, model: dict, proof: dict) -> dict:
  """Writes one artefact per dimension, forward_2d.stablehlo and forward_3d.stablehlo, for any batch of native size.

  Each is called as `jax.export.deserialize(bytes).call({name: array}, x)`, x channels first, and returns
  {'embedding': [B, E], 'c0': ..., 's4': ..., 'reconstruction': ..., 'logits': ...}, channels first.

  Args:
    folder: a local folder.
    tensors: name -> array, as exported.
    model: keyword arguments of the PyTorch network.
    proof: what `parity.compare` gave.

  Returns:
    The proof, with the differences of the files to PyTorch among its inputs.
  """
  module = architectures.model(model['arch'])
  weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}
  batch, = jax.export.symbolic_shape('b')
  for n in model['dimensions']:
    x = jax.ShapeDtypeStruct((batch, module.in_channels[n - 2], *architectures.native_size(model, n)), np.float32)
    with jax.default_matmul_precision('highest'):
      made = jax.export.export(jax.jit(parity.forward(model)), platforms=PLATFORMS)(weights, x)
    file = folder / f'forward_{n}d.stablehlo'
    file.write_bytes(made.serialize())
    call = jax.export.deserialize(file.read_bytes()).call
    proof = parity.joined(proof, {file.name: parity.of_artefact(call, tensors, model, n)})
  return proof
