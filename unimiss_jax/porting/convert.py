"""Weights of the released PyTorch code <-> our parameters, strict in both directions."""
from __future__ import annotations

import re

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiTPlus
from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import torch_names
from unimiss_jax.porting.arch import infer_arch
from unimiss_jax.porting.errors import PortingError

BRANCHES = ('student', 'teacher')
IN_CHANS = ('strict', 'sum', 'repeat')
ENCODER = re.compile(r'(cls_tokens|pos_embed|ConvBlock|patch_embed|block|final_norm)')    # below 'transformer.'
HEAD = re.compile(r'(mlp\.\d|last_layer)\.')
SPELLED = (('parametrizations.weight.original0', 'weight_g'), ('parametrizations.weight.original1', 'weight_v'))


def from_torch(state_dict, arch=None, allow=(), branch='student', in_chans='strict') -> dict:
  """Released weights -> our parameters.

  Args:
    state_dict: name -> numpy array or tensor. A level 'student' / 'teacher', 'state_dict' or 'model' is entered;
      'module.' and absent 'backbone.', 'head.' and 'transformer.' are put right; both spellings of weight norm.
    arch: dict of `MiTPlus` fields, 'mit_plus' (its defaults), or None = inferred from the tensors.
    allow: substrings of names that may be missing (then absent from the result) or surplus; ('3D',) takes a 2D-only
      file, ('2D',) a 3D-only one.
    branch: 'student' or 'teacher', where the file has both.
    in_chans: input channels that are not those of `arch` (None: 3 for images, 1 for volumes) are an error ('strict'),
      or the stem sees the file's channels summed and spread evenly ('sum'), or in turn, scaled by file / model
      ('repeat'). The reconstruction's channels are the file's mean, or the file's in turn. Chosen by us; both keep the
      answer to a grey image where one number of channels divides the other.

  Returns:
    {'backbone': params, 'head': params}, numpy arrays of the dtype given; a part that is absent stays absent.

  Raises:
    PortingError: lists what is missing, unexpected or mis-shaped.
  """
  if in_chans not in IN_CHANS:
    raise PortingError(f'in_chans={in_chans!r}: known are {", ".join(IN_CHANS)}')
  parts = split(state_dict, branch)
  params = {}
  if parts['backbone']:
    if arch is None:
      arch = infer_arch(parts['backbone'])
      if in_chans != 'strict':
        arch['in_channels'] = MiTPlus.in_channels
    module = architectures.model(arch)
    if in_chans != 'strict':
      _adapt_channels(parts['backbone'], module.in_channels, in_chans)
    params['backbone'] = _convert('backbone', parts['backbone'], architectures.shapes(module), allow)
  if parts['head']:
    params['head'] = _convert('head', parts['head'], _head_shapes(parts['head']), allow)
  if not params:
    raise PortingError('no tensors given')
  return params


def to_torch(params, arch=None) -> dict:
  """Our parameters -> released names.

  Args:
    params: {'backbone': ..., 'head': ...}, one of them or both, or one of the two trees itself.
    arch: as in `from_torch`; if given, the backbone must be exactly this one.

  Returns:
    {'backbone....' and 'head....': array}, contiguous, in PyTorch's layout.

  Raises:
    PortingError: the backbone is not that of `arch`.
  """
  if not set(params) <= {'backbone', 'head'}:
    params = {'backbone' if 'transformer' in params else 'head': params}
  out = {}
  for part, tree in params.items():
    for path, leaf in flatten_dict(tree).items():
      name = torch_names.to_torch_name((part, *path))
      out[name] = torch_names.to_torch_layout(name, np.asarray(leaf))
  if arch is not None and 'backbone' in params:
    found = {path: leaf.shape for path, leaf in flatten_dict(params['backbone']).items()}
    _check('backbone', found, architectures.shapes(architectures.model(arch)), ())
  return out


def split(state_dict, branch='student') -> dict:
  """All nestings stripped: {'backbone': {name: numpy array}, 'head': likewise}.

  Raises:
    PortingError: the branch is not there, an entry is no tensor, or two names become one.
  """
  if branch not in BRANCHES:
    raise PortingError(f'branch={branch!r}: known are {", ".join(BRANCHES)}')
  if levels := [b for b in BRANCHES if b in state_dict]:
    if branch not in levels:
      raise PortingError(f'branch={branch!r} is not in the file, only {levels[0]!r} is')
    state_dict = state_dict[branch]
  for level in ('state_dict', 'model'):
    if level in state_dict and hasattr(state_dict[level], 'items'):
      state_dict = state_dict[level]
  parts = {'backbone': {}, 'head': {}}
  for name, tensor in state_dict.items():
    part, rest = _place(name)
    if not hasattr(tensor, 'shape'):
      raise PortingError(f'{name} is a {type(tensor).__name__}, not a tensor. FIX: give the part of the file that '
                         'holds weights')
    if rest in parts[part]:
      raise PortingError(f'two tensors are called {part}.{rest}')
    parts[part][rest] = _array(tensor)
  return parts


def _place(name: str) -> tuple[str, str]:
  """'module.backbone.transformer.x' -> ('backbone', 'transformer.x'), whatever of it is left out."""
  name = re.sub(r'^(module\.)+', '', str(name))
  for spelled, ours in SPELLED:
    name = name.replace(spelled, ours)
  if name.startswith('head.') or HEAD.match(name):
    return 'head', name.removeprefix('head.')
  name = name.removeprefix('backbone.')
  return 'backbone', f'transformer.{name}' if ENCODER.match(name) else name


def _array(tensor) -> np.ndarray:
  """Array or tensor -> numpy; bfloat16 stays what it is."""
  if not hasattr(tensor, 'detach'):
    return np.asarray(tensor)
  tensor = tensor.detach().cpu()
  if str(tensor.dtype) == 'torch.bfloat16':
    import torch
    return tensor.contiguous().view(torch.int16).numpy().view(jax.numpy.bfloat16)
  return tensor.numpy()


def _adapt_channels(tensors, wanted, how):
  """Gives stem and reconstruction `wanted` (2-D, 3-D) channels, in place."""
  def turn(array, axis, new):      # channel j of the file's, in turn
    return np.take(array, np.arange(new) % array.shape[axis], axis)

  for rank, new in zip(('2D', '3D'), wanted):
    stem = f'transformer.ConvBlock{rank}0.0.conv.weight'
    for name in (stem, f'recon_conv{rank}.weight', f'recon_conv{rank}.bias'):
      array = tensors.get(name)
      axis = int(name == stem)
      if array is None or array.shape[axis] == new:
        continue
      old, wide = array.shape[axis], array.astype(np.promote_types(array.dtype, np.float32))
      if how == 'repeat':
        wide = turn(wide, axis, new) * (old / new if name == stem else 1)
      else:
        wide = wide.sum(axis, keepdims=True) / (new if name == stem else old)
        wide = np.repeat(wide, new, axis)
      tensors[name] = wide.astype(array.dtype)


def _head_shapes(tensors):
  """Shapes of the head whose widths its own tensors tell; one without any prototypes is a projection alone."""
  def width(places, default=1):
    """places: (name, axis) pairs that show the same width."""
    return next((tensors[name].shape[axis] for name, axis in places
                 if name in tensors and tensors[name].ndim > axis), default)
  last_layer = any(name.startswith('last_layer.') for name in tensors)
  head = DINOHead(width([('last_layer.weight_v', 0), ('last_layer.weight_g', 0)]),
                  width([('mlp.0.weight', 0), ('mlp.0.bias', 0), ('mlp.2.weight', 0)]),
                  width([('mlp.4.weight', 0), ('mlp.4.bias', 0), ('last_layer.weight_v', 1)]), last_layer)
  x = jax.ShapeDtypeStruct((1, width([('mlp.0.weight', 1)])), np.float32)
  tree = jax.eval_shape(head.init, jax.random.key(0), x)['params']
  return {path: leaf.shape for path, leaf in flatten_dict(tree).items()}


def _convert(part, tensors, shapes, allow):
  """Tensors of one part -> nested parameters; raises PortingError unless they are those of `shapes`."""
  leaves = {}
  for name, array in tensors.items():
    leaves[torch_names.from_torch_name(name, array.ndim)] = torch_names.from_torch_layout(name, array)
  _check(part, {path: leaf.shape for path, leaf in leaves.items()}, shapes, allow)
  return unflatten_dict({path: leaf for path, leaf in leaves.items() if path in shapes})


def _check(part, found, expected, allow):
  """Compares path -> shape of our layout and names the differences as PyTorch does."""
  spell = lambda path: f'{part}.{torch_names.to_torch_name(path)}'
  strict = lambda paths: sorted(n for n in map(spell, paths) if not any(a in n for a in allow))
  faults = {
      'missing': strict(expected.keys() - found.keys()),
      'unexpected': strict(found.keys() - expected.keys()),
      'mis-shaped': sorted(f'{spell(p)} {tuple(found[p])} expected {tuple(expected[p])}'
                           for p in found.keys() & expected.keys() if tuple(found[p]) != tuple(expected[p]))}
  if any(faults.values()):
    raise PortingError('; '.join(f'{len(names)} {kind}: {", ".join(names)}' for kind, names in faults.items() if names)
                       + _remedy(faults, found))


def _remedy(faults, found) -> str:
  """What would help, where it can be seen."""
  missing = faults['missing']
  for rank, other in (('2D', '3D'), ('3D', '2D')):
    if missing and not faults['unexpected'] and all(other in name for name in missing) and not any(
        other in part for path in found for part in path):
      return f". FIX: this is a {rank}-only file: allow=('{other}',), or --allow={other} on a command line, takes it"
  if faults['mis-shaped'] and all('.ConvBlock' in t or '.recon_conv' in t for t in faults['mis-shaped']):
    return ". FIX: other input channels: in_chans='sum' or 'repeat' adapts them"
  return ''
