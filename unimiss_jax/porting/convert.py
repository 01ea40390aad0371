"""Weights of the released PyTorch code <-> our parameters, strict in both directions."""
from __future__ import annotations

import re

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax import models
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiTPlus
from unimiss_jax.porting import torch_names


class PortingError(Exception):
  """Tensors that are missing, unexpected or mis-shaped, each named."""


def from_torch(state_dict, arch=None, allow=(), branch='student', in_chans='strict') -> dict:
  """Released weights -> our parameters.

  Args:
    state_dict: name -> numpy array or tensor. A 'student' / 'teacher' level and a leading 'module.' are stripped; names
      with neither 'backbone.' nor 'head.' in front belong to the backbone. Both spellings of weight norm are read.
    arch: dict of `MiTPlus` fields, 'mit_plus' (its defaults), or None = inferred from the tensors.
    allow: substrings of names that may be missing (then absent from the result) or surplus.
    branch: 'student' or 'teacher', where the file has both.
    in_chans: 'strict': the input channels must agree.

  Returns:
    {'backbone': params, 'head': params}, numpy arrays of the dtype given; a part that is absent stays absent.

  Raises:
    PortingError: lists what is missing, unexpected or mis-shaped.
  """
  if in_chans != 'strict':
    raise PortingError(f"in_chans={in_chans!r}: known is 'strict'")
  parts = {'backbone': {}, 'head': {}}
  for name, array in _flat(state_dict, branch).items():
    part, _, rest = name.partition('.')
    parts[part][rest] = array
  params = {}
  if parts['backbone']:
    shapes = _shapes(_model(infer_arch(parts['backbone']) if arch is None else arch))
    params['backbone'] = _convert('backbone', parts['backbone'], shapes, allow)
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
    _check('backbone', found, _shapes(_model(arch)), ())
  return out


def infer_arch(tensors) -> dict:
  """The `MiTPlus` fields that a backbone's tensors show: all but the heads and what has no weights.

  The depth of volumes shows nowhere in the tables: it is taken to be the default 16.

  Args:
    tensors: name -> array in PyTorch's layout, without 'backbone.'.

  Raises:
    PortingError: a tensor that is needed is absent.
  """
  shapes = {name: tuple(array.shape) for name, array in tensors.items()}

  def find(name, default=None):
    """Shape of the 2-D tensor of this name ('?D'), else of the 3-D one."""
    for rank in ('2D', '3D'):
      if shape := shapes.get(name.replace('?D', rank)):
        return shape
    if default is None:
      raise PortingError(f'architecture not inferred: no tensor {name.replace("?D", "2D")}; pass arch=')
    return default
  depth = lambda prefix: len([k for k in shapes if re.fullmatch(prefix + r'\.\d+\.norm1\.weight', k)])
  stages, first = range(1, 5), int('transformer.cls_tokens1' in shapes)
  embed_dims = [find(f'transformer.ConvBlock?D{i}.0.conv.weight')[0] for i in range(2)]
  embed_dims += [find(f'transformer.patch_embed?D{i}.proj.conv.weight')[0] for i in stages]
  tokens = lambda stage, rank: find(f'transformer.pos_embed{rank}{stage}', (0, 0))[1] - first
  arch = dict(
      embed_dims=tuple(embed_dims),
      depths=tuple(depth(f'transformer.block{i}') for i in stages),
      sr_ratios=tuple(find(f'transformer.block{i}.0.attn.sr?D.weight', (1,) * 3)[-1] for i in stages),
      mlp_ratio=find('transformer.block1.0.mlp.fc1.weight')[0] / embed_dims[2],
      cls_token=bool(first),
      last_stride=round((tokens(3, '?D') / tokens(4, '?D'))**0.5),
      conv_residual='transformer.patch_embed2D1.proj.skip.weight' in shapes
      or 'transformer.patch_embed3D1.proj.skip.weight' in shapes,
      final_norm='transformer.final_norm.weight' in shapes,
      in_channels=tuple(shapes.get(f'transformer.ConvBlock{rank}0.0.conv.weight', (0, c))[1]
                        for rank, c in zip(('2D', '3D'), MiTPlus.in_channels)))
  if tokens(1, '2D') > 0:
    arch['image_size'] = 4 * round(tokens(1, '2D')**0.5)
  if tokens(1, '3D') > 0:
    depth_3d = MiTPlus.volume_size[0]
    arch['volume_size'] = (depth_3d, *(4 * round((2 * tokens(1, '3D') / depth_3d)**0.5),) * 2)
  if depth('Decblock1'):
    ups = [f'DecEmbed?D{i}.proj.weight' for i in (1, 2, 3)] + [f'TransposeConv?D{i}.weight' for i in (1, 2)]
    arch |= dict(decoder_dims=tuple(find(name)[1] for name in ups),
                 decoder_depths=tuple(depth(f'Decblock{i}') for i in (1, 2, 3)),
                 decoder_sr_ratios=tuple(find(f'Decblock{i}.0.attn.sr?D.weight')[-1] for i in (1, 2, 3)))
  return arch


def _flat(state_dict, branch):
  """Names 'backbone....' and 'head....' -> numpy arrays, all nestings stripped."""
  if branch in state_dict:
    state_dict = state_dict[branch]
  out = {}
  for name, tensor in state_dict.items():
    name = re.sub(r'^(module\.)+', '', name)
    if not name.startswith(('backbone.', 'head.')):
      name = 'backbone.' + name
    for i, leaf in enumerate(('weight_g', 'weight_v')):
      name = name.replace(f'parametrizations.weight.original{i}', leaf)
    out[name] = tensor.detach().cpu().numpy() if hasattr(tensor, 'detach') else np.asarray(tensor)
  return out


def _model(arch):
  return MiTPlus(**({} if arch == 'mit_plus' else arch))


def _shapes(model):
  return {path: leaf.shape for path, leaf in models.param_shapes(model).items()}


def _head_shapes(tensors):
  """Shapes of the head whose widths its own tensors tell."""
  width = lambda name, axis: tensors[name].shape[axis] if name in tensors else 1
  head = DINOHead(width('last_layer.weight_v', 0), width('mlp.0.weight', 0), width('mlp.4.weight', 0))
  x = jax.ShapeDtypeStruct((1, width('mlp.0.weight', -1)), np.float32)
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
    raise PortingError('; '.join(f'{len(names)} {kind}: {", ".join(names)}' for kind, names in faults.items() if names))
