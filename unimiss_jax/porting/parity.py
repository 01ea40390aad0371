"""The proof of an export: our network and its PyTorch twin on the same inputs, stage by stage."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unimiss_jax.models import slicewise
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import torch_names

SIZES = ((96, 96), (128, 160), (16, 96, 96), (32, 64, 96))
TOLERANCE = 1e-4      # of the largest value of a stage, float32
STAGES = {6: ('c0', 'c1', 's1', 's2', 's3', 's4'), 5: ('c0', 's1', 's2', 's3', 's4'), 1: ('patches',),
          2: ('slices', 'tokens')}      # of MiT+; MiT and ResNet; ViT; volumes of Joint


def compare(tensors: dict, model: dict) -> dict:
  """Runs both networks on the same weights.

  Args:
    tensors: name -> array, as exported; computed in float32, whatever their dtype.
    model: keyword arguments of the PyTorch network, `arch.torch_network`.

  Returns:
    {'passed', 'tolerance', 'worst': {input: stage}, 'inputs': {'96x96': {stage: {'max_abs', 'max_rel'}}}, ...}; max_rel
    is the largest difference over the largest value of that stage in PyTorch.

  Raises:
    RuntimeError: PyTorch's own words, if the tensors are not exactly those of the module.
  """
  import torch
  wide = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
  net = architectures.torch_network(model).eval()
  net.load_state_dict({name: torch.tensor(array) for name, array in wide.items()}, strict=True)
  ours, inputs, channels = forward(model), {}, architectures.model(model['arch']).in_channels
  for size in sizes(model):
    if len(size) in model['dimensions']:
      x = images(size, channels[len(size) - 2])
      with jax.default_matmul_precision('highest'):      # accelerators would round the factors
        mine = jax.jit(ours)(wide, x)
      inputs['x'.join(map(str, size))] = _differences(mine, net, x)
  return joined({'tolerance': TOLERANCE, 'inputs': {}, 'jax': jax.__version__, 'torch': torch.__version__,
                 'computed_in': f'float32 on {jax.devices()[0].device_kind}'}, inputs)


def sizes(model: dict) -> list:
  """SIZES, the native one where the patches of a network do not fill them."""
  module, out = architectures.model(model['arch']), []
  for size in SIZES:
    try:
      module.check(size, module.in_channels[len(size) - 2])
      out.append(size)
    except ValueError:
      out.append(architectures.native_size(model, len(size)))
  return list(dict.fromkeys(out))


def joined(proof: dict, more: dict) -> dict:
  """A proof with more inputs {input: {stage: difference}}."""
  inputs = proof['inputs'] | more
  worst = {size: max(stages, key=lambda s: stages[s]['max_rel']) for size, stages in inputs.items()}
  most = max(inputs[size][stage]['max_rel'] for size, stage in worst.items())
  return proof | {'passed': most <= TOLERANCE, 'worst_max_rel': most, 'worst': worst, 'inputs': inputs}


def of_artefact(call, tensors: dict, model: dict, n: int) -> dict:
  """{stage: difference} of an exported StableHLO function against PyTorch, two samples of native size, n dimensions."""
  import torch
  net = architectures.torch_network(model).eval()
  net.load_state_dict({name: torch.tensor(np.asarray(array, np.float32)) for name, array in tensors.items()})
  x = images(architectures.native_size(model, n), architectures.model(model['arch']).in_channels[n - 2])
  x = np.concatenate([x, x[..., ::-1]])
  return _differences(call(tensors, x), net, x)


def _differences(mine, net, x) -> dict:
  import torch
  with torch.no_grad():
    output, logits = net(torch.from_numpy(x))
  theirs = _stages(output.embedding, output.pyramid, output.reconstruction, logits)
  return {stage: difference(np.asarray(mine[stage], np.float32), value.numpy()) for stage, value in theirs.items()}


def forward(model: dict):
  """The function ({PyTorch name: array}, x channels first) -> {stage: array channels first}, of jax alone.

  Args:
    model: keyword arguments of the PyTorch network.
  """
  module = architectures.model(model['arch'])
  head = model['head'] and DINOHead(**{k: v for k, v in model['head'].items() if k != 'in_dim'})
  first = lambda a: None if a is None else jnp.moveaxis(a, -1, 1)

  def run(tensors, x):
    params = torch_names.from_torch_tree({n: jnp.asarray(t, jnp.float32) for n, t in tensors.items()})
    x = jnp.moveaxis(x, 1, -1)
    if x.ndim == 5 and model.get('inter'):
      out = slicewise.embed(module, architectures.inter_encoder(model['inter']), params, x)
      return _stages(out.embedding, [first(out.slices), first(out.tokens)], None, None)
    stats = {k: v for k, v in params.items() if k == 'batch_stats'}
    out = module.apply({'params': params['backbone']} | stats, x, decode=model['decoder'])
    logits = head and head.apply({'params': params['head']}, out.embedding)
    return _stages(out.embedding, [first(c) for c in out.pyramid], first(out.reconstruction), logits)
  return run


def images(size, channels: int) -> np.ndarray:
  """A fixed input: [1, channels, *size] float32, uniform in [0, 1] for images, in [-1, 1] for volumes (HU / 1024)."""
  x = np.random.default_rng(len(size)).random((1, channels, *size), np.float32)
  return x if len(size) == 2 else 2 * x - 1


def _stages(embedding, pyramid, reconstruction, logits) -> dict:
  found = {'embedding': embedding, **dict(zip(STAGES[len(pyramid)], pyramid)), 'reconstruction': reconstruction,
           'logits': logits}
  return {name: value for name, value in found.items() if value is not None}


def difference(ours, theirs) -> dict:
  """{'max_abs', 'max_rel'} of two arrays. NaN counts as infinitely far."""
  if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
    return {'max_abs': 1e30, 'max_rel': 1e30}      # JSON has no infinity
  gap = np.abs(ours - theirs).max()
  return {'max_abs': float(gap), 'max_rel': float(gap / max(np.abs(theirs).max(), 1e-30))}
