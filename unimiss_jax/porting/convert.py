"""Weights of the released PyTorch code <-> our parameters, strict in both directions."""
from __future__ import annotations

import collections
import re
from collections.abc import Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiTPlus
from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import torch_names
from unimiss_jax.porting.arch import infer_arch
from unimiss_jax.porting.errors import PortingError

# The parts of a network and how their names begin; a part's name is understood in `allow`.
PARTS = {'encoder': ('backbone.transformer.', 'backbone.conv1.', 'backbone.bn1.', 'backbone.layer'),
         'decoder': tuple(f'backbone.{name}' for name in
                          ('Dec', 'DeConv', 'TransposeConv', 'recon_conv', 'norm.', 'cls_tokens')),
         'head': ('head.',),
         'inter': ('slice.', 'inter.')}
TREES = ('backbone', 'batch_stats', 'head', 'slice', 'inter')      # what a network's parameters and statistics lie in
BRANCHES = ('student', 'teacher')
IN_CHANS = ('strict', 'sum', 'repeat')
# Names below 'transformer.'.
ENCODER = re.compile(r'(cls_tokens|pos_embed|ConvBlock|patch_embed|block|final_norm|class_token|mask_token|\w+_table)')
STEM_OR_END = re.compile(r'\.(ConvBlock|recon_conv|patch_embed.D0\.)')
HEAD = re.compile(r'(mlp\.\d|last_layer)\.')
RESNET = 'layer1.0.conv1.weight'                         # what every file of a ResNet holds
SURPLUS = ('fc.', 'projection_head.', 'prototypes')      # what stands behind the encoder in the usual files of one
SPELLED = (('parametrizations.weight.original0', 'weight_g'), ('parametrizations.weight.original1', 'weight_v'))


def from_torch(state_dict, arch=None, allow=(), branch='student', in_chans='strict') -> dict:
  """Released weights -> our parameters.

  Args:
    state_dict: name -> numpy array or tensor. A level 'student' / 'teacher', 'state_dict' or 'model' is entered;
      'module.' and absent 'backbone.', 'head.' and 'transformer.' are put right; both spellings of weight norm. Of the
      usual files of a ResNet 'encoder.' is taken off and the classifier left.
    arch: dict of the fields of `MiTPlus`, `MiT`, `ViT` or `ResNet`, or a name of `models.BACKBONES` (its defaults), or
      None = inferred from the tensors.
    allow: substrings of names that may be missing (then absent from the result) or surplus; ('3D',) takes a 2D-only
      file, ('2D',) a 3D-only one, ('decoder',), ('head',) and ('inter',) stand for all names of that part.
    branch: 'student' or 'teacher', where the file has both.
    in_chans: 'strict': input channels that are not those of `arch` are an error (arch=None takes those of the file).
      Else they become those of `arch` (None: 3 of images, 1 of volumes): the stem sees the file's channels summed and
      spread evenly ('sum'), or in turn, scaled by file / model ('repeat'); the reconstruction's are the file's mean, or
      the file's in turn. Chosen by us; both keep the answer to a grey image where one number divides the other.

  Returns:
    {'backbone': params, 'head': params}, numpy arrays of the dtype given; a part that is absent stays absent. With a
    ResNet also {'batch_stats': ...}.

  Raises:
    PortingError: lists what is missing, unexpected or mis-shaped.
  """
  return load(split(state_dict, branch), arch, allow, in_chans)[0]


def load(parts, arch=None, allow=(), in_chans='strict', inter=None) -> tuple[dict, dict | None]:
  """What `split` gives -> (parameters, the fields of their architecture); arguments and errors as `from_torch`.

  inter: fields of the Transformer over slices, see `arch.inter_encoder`; the result has 'slice' and 'inter' then.
  """
  if in_chans not in IN_CHANS:
    raise PortingError(f'in_chans={in_chans!r}: known are {", ".join(IN_CHANS)}')
  allow = (allow,) if isinstance(allow, str) else tuple(allow)
  if '' in allow:
    raise PortingError("allow: '' would allow everything. FIX: name pieces of names")
  allow = [start for word in allow for start in PARTS.get(word, (word,))]
  params, width = {}, None
  if parts['backbone']:
    if arch is None:
      arch = inferred(parts['backbone'], in_chans)
    module = architectures.model(arch)
    if in_chans != 'strict':
      _adapt_channels(parts['backbone'], module.in_channels, in_chans)
    params['backbone'] = _convert('backbone', parts['backbone'], architectures.shapes(module), allow)
    if expected := architectures.statistics(module):
      params['batch_stats'] = _convert('batch_stats', parts['batch_stats'], expected, allow)
    width = module.embedding_dim()
    if inter:
      params |= {part: _convert(part, parts[part], expected, allow)
                 for part, expected in architectures.inter_shapes(module, inter).items()}
  if not inter and (parts['slice'] or parts['inter']) and not set(PARTS['inter']) <= set(allow):
    raise PortingError('holds a Transformer over slices and does not record its fields. FIX: take the '
                       'model.safetensors of the exported folder, or leave it out: --allow=inter, '
                       '--config.init_allow=inter')
  if parts['head']:
    params['head'] = _convert('head', parts['head'], _head_shapes(parts['head'], width), allow)
  if not params:
    raise PortingError('no tensors given')
  return params, arch


def inferred(tensors, in_chans: str) -> dict:
  """The fields that a backbone's tensors show, for the channels that they will have. Raises PortingError."""
  return infer_arch(tensors) | ({} if in_chans == 'strict' else {'in_channels': MiTPlus.in_channels})


def to_torch(params, arch=None) -> dict:
  """Our parameters -> released names.

  Args:
    params: {'backbone': ..., 'head': ...}, some of TREES, or one of the first two itself.
    arch: as in `from_torch`; if given, the backbone must be exactly this one.

  Returns:
    {'backbone....', 'head....', ...: array}, contiguous, in PyTorch's layout.

  Raises:
    PortingError: the backbone is not that of `arch`.
  """
  if not set(params) <= set(TREES):
    params = {'head' if 'mlp_0' in params else 'backbone': params}
  out = {}
  for part, tree in params.items():
    for path, leaf in flatten_dict(tree).items():
      name = torch_names.to_torch_name((_beside(part), *path))
      out[name] = torch_names.to_torch_layout(name, np.asarray(leaf))
  if arch is not None and 'backbone' in params:
    found = {path: leaf.shape for path, leaf in flatten_dict(params['backbone']).items()}
    _check('backbone', found, architectures.shapes(architectures.model(arch)), ())
  return out


def from_tensors(tensors) -> dict:
  """Names with 'backbone.', 'head.' and so on -> our trees, unchecked."""
  tree = torch_names.from_torch_tree(tensors)
  return {part: tree.get(part, {}) for part in TREES}


def split(state_dict, branch='student') -> dict:
  """All nestings stripped: {'backbone': {name: numpy array}, and so on for TREES}.

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
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get(level), Mapping):
      state_dict = state_dict[level]
  if not isinstance(state_dict, Mapping):
    raise PortingError(f'holds a {type(state_dict).__name__} where names and tensors were expected')
  parts, bare = {part: {} for part in TREES}, not any('transformer.' in str(name) for name in state_dict)
  resnet = any(str(name).endswith(RESNET) for name in state_dict)
  for name, tensor in state_dict.items():
    part, rest = _place(name, bare, resnet)
    if resnet and part == 'backbone' and (rest.startswith(SURPLUS) or rest.endswith('num_batches_tracked')):
      continue
    if not hasattr(tensor, 'shape'):
      raise PortingError(f'{name} is a {type(tensor).__name__}, not a tensor. FIX: give the part of the file that '
                         'holds weights')
    if rest in parts[part]:
      raise PortingError(f'two tensors are called {part}.{rest}')
    parts[part][rest] = _array(name, tensor)
  return parts


def _place(name: str, bare: bool, resnet: bool) -> tuple[str, str]:
  """'module.backbone.transformer.x' -> ('backbone', 'transformer.x'), whatever of it is left out.

  bare: 'transformer.' is left out of all names of the file; resnet: it holds a ResNet.
  """
  name = re.sub(r'^(module\.)+', '', str(name))
  for spelled, ours in SPELLED:
    name = name.replace(spelled, ours)
  if name.startswith('head.') or HEAD.match(name):
    return 'head', name.removeprefix('head.')
  if name.startswith(PARTS['inter']):
    part, _, rest = name.partition('.')
    return part, rest
  name = name.removeprefix('backbone.')
  if resnet:
    name = name.removeprefix('encoder.')
    return 'batch_stats' if name.endswith(tuple(torch_names.STATISTICS)) else 'backbone', name
  return 'backbone', f'transformer.{name}' if bare and ENCODER.match(name) else name


def _array(name, tensor) -> np.ndarray:
  """Array or tensor of floats -> numpy; bfloat16 stays what it is."""
  try:
    if hasattr(tensor, 'detach'):
      tensor = tensor.detach().cpu()
      if str(tensor.dtype) == 'torch.bfloat16':
        import torch
        return tensor.contiguous().view(torch.int16).numpy().view(jax.numpy.bfloat16)
      tensor = tensor.numpy()
    array = np.asarray(tensor)
  except Exception as e:      # sparse, quantised, on no device: torch has an exception for each
    raise PortingError(f'{name} cannot be read ({" ".join(str(e).split())[:100]}). FIX: save dense tensors') from e
  if not jax.numpy.issubdtype(array.dtype, np.floating):
    raise PortingError(f'{name} is of type {array.dtype}, weights are floating-point numbers')
  return array


def _adapt_channels(tensors, wanted, how):
  """Gives stem and reconstruction `wanted` (2-D, 3-D) channels, in place."""
  def turn(array, axis, new):      # channel j of the file's, in turn
    return np.take(array, np.arange(new) % array.shape[axis], axis)

  for rank, new in zip(('2D', '3D'), wanted):
    stems = [f'transformer.ConvBlock{rank}0.0.conv.weight', f'transformer.patch_embed{rank}0.conv.weight']
    stems += ['conv1.weight'] * (rank == '2D')      # of a ResNet
    for name in (*stems, f'recon_conv{rank}.weight', f'recon_conv{rank}.bias'):
      array = tensors.get(name)
      axis = int(name in stems)
      if array is None or array.shape[axis] == new:
        continue
      old, wide = array.shape[axis], array.astype(np.promote_types(array.dtype, np.float32))
      if how == 'repeat':
        wide = turn(wide, axis, new) * (old / new if axis else 1)
      else:
        wide = wide.sum(axis, keepdims=True) / (new if axis else old)
        wide = np.repeat(wide, new, axis)
      tensors[name] = wide.astype(array.dtype)


def _head_shapes(tensors, in_dim=None):
  """Shapes of the head whose widths most of its own tensors tell; one without any prototypes is a projection alone.

  in_dim: width of the embedding that it belongs to, if that is known.
  """
  def width(*places):
    """places: (name, axis) that show the same width."""
    votes = collections.Counter(tensors[name].shape[axis] for name, axis in places
                                if name in tensors and tensors[name].ndim > axis)
    return votes.most_common(1)[0][0] if votes else 1
  w, b = ([f'mlp.{i}.{leaf}' for i in (0, 2, 4)] for leaf in ('weight', 'bias'))
  v, g = 'last_layer.weight_v', 'last_layer.weight_g'
  head = DINOHead(width((v, 0), (g, 0)), width((w[0], 0), (b[0], 0), (w[1], 0), (w[1], 1), (b[1], 0), (w[2], 1)),
                  width((w[2], 0), (b[2], 0), (v, 1)), any(name.startswith('last_layer.') for name in tensors))
  x = jax.ShapeDtypeStruct((1, in_dim or width((w[0], 1))), np.float32)
  tree = jax.eval_shape(head.init, jax.random.key(0), x)['params']
  return {path: leaf.shape for path, leaf in flatten_dict(tree).items()}


def check(params, arch, dimensions, inter=None) -> None:
  """Raises PortingError unless the trees hold every tensor of their parts, of these dimensions, and no others."""
  if 'backbone' in params:
    found = {path: leaf.shape for path, leaf in flatten_dict(params['backbone']).items()}
    decoder = not all(map(architectures.in_encoder, found))
    module = architectures.model(arch)
    whole = architectures.shapes(module)
    _check('backbone', found, architectures.select(whole, decoder, dimensions), ())
    more = architectures.inter_shapes(module, inter) if inter else {}
    more |= {'batch_stats': architectures.statistics(module)}
    for part, expected in more.items():
      _check(part, {path: leaf.shape for path, leaf in flatten_dict(params.get(part, {})).items()}, expected, ())
  if 'head' in params:
    tree = split(to_torch(params['head']))['head']
    found = {path: leaf.shape for path, leaf in flatten_dict(params['head']).items()}
    _check('head', found, _head_shapes(tree, architectures.model(arch).embedding_dim()), ())


def _convert(part, tensors, shapes, allow):
  """Tensors of one part -> nested parameters; raises PortingError unless they are those of `shapes`."""
  leaves = {}
  for name, array in tensors.items():
    leaves[torch_names.from_torch_name(name, array.ndim)] = torch_names.from_torch_layout(name, array)
  _check(part, {path: leaf.shape for path, leaf in leaves.items()}, shapes, allow)
  return unflatten_dict({path: leaf for path, leaf in leaves.items() if path in shapes})


def _check(part, found, expected, allow):
  """Compares path -> shape of our layout and names the differences as PyTorch does."""
  spell = lambda path: f'{_beside(part)}.{torch_names.to_torch_name(path)}'
  strict = lambda paths: sorted(n for n in map(spell, paths) if not any(a in n for a in allow))
  faults = {
      'missing': strict(expected.keys() - found.keys()),
      'unexpected': strict(found.keys() - expected.keys()),
      'mis-shaped': sorted(f'{spell(p)} {tuple(found[p])} expected {tuple(expected[p])}'
                           for p in found.keys() & expected.keys() if tuple(found[p]) != tuple(expected[p]))}
  if any(faults.values()):
    raise PortingError('; '.join(f'{len(names)} {kind}: {", ".join(names)}' for kind, names in faults.items() if names)
                       + _remedy(faults, found))


def _beside(part: str) -> str:
  """PyTorch has batch statistics beside the parameters."""
  return 'backbone' if part == 'batch_stats' else part


def _remedy(faults, found) -> str:
  """What would help, where it can be seen."""
  missing = faults['missing']
  says = ". FIX: this is {}: allow=('{}',), --allow={} or --config.init_allow={} takes it"
  if missing and not faults['unexpected']:
    for rank, other in (('2D', '3D'), ('3D', '2D')):
      if all(other in n for n in missing) and not any(other in part for path in found for part in path):
        return says.format(f'a {rank}-only file', *(other,) * 3)
    if found and all(path[0] == 'transformer' for path in found) and not any('transformer' in n for n in missing):
      return says.format('an encoder alone', *('decoder',) * 3)
  if faults['mis-shaped'] and all(STEM_OR_END.search(t) for t in faults['mis-shaped']):
    return ". FIX: other input channels: in_chans='sum' or 'repeat' adapts them (--in_chans of cli.export)"
  return ''
