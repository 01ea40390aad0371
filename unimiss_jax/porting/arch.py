"""Which MiT+, MiT of the pilot UniMiSS, ViT or ResNet a set of tensors is."""
from __future__ import annotations

import collections
import functools
import importlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from unimiss_jax import models
from unimiss_jax.models import slicewise
from unimiss_jax.models.deformable import InterEncoder
from unimiss_jax.models.mit import MiT, MiTPlus
from unimiss_jax.models.resnet import ResNet, first_statistics
from unimiss_jax.models.vit import ViT
from unimiss_jax.porting.errors import PortingError

# Fields that leave no trace in the weights and change no result of a trained model.
TRAINING = ('encoder_drop_path', 'decoder_drop_path', 'init', 'dtype', 'remat', 'fold')
ENCODER = re.compile(r'transformer|conv1|bn1|layer\d+_\d+')      # how the paths of an encoder begin
SHAPELESS = ('num_heads', 'decoder_heads')      # change results, but not shapes


def model(arch) -> MiTPlus | MiT | ViT | ResNet:
  """The module of `arch`: a name for its defaults, or a dict of fields: `patch` makes a ViT, `width` a ResNet, four
  widths a MiT."""
  if isinstance(arch, str):
    if arch not in models.BACKBONES:
      raise PortingError(f'arch={arch!r}: known are {", ".join(models.BACKBONES)}, or a dict of fields')
    return models.BACKBONES[arch]()
  made = ViT if 'patch' in arch else ResNet if 'width' in arch else (
      MiT if len(arch.get('embed_dims', ())) == 4 else MiTPlus)
  try:
    return made(**{k: tuple(v) if isinstance(v, list) else v for k, v in arch.items()})
  except TypeError as e:
    raise PortingError(f'arch: {" ".join(str(e).split())}. FIX: use the fields of {made.__name__}') from e


class Twin(NamedTuple):
  """What a network is called, and where it is in PyTorch."""
  architecture: str
  model_type: str
  file: str           # module of this package that a PyTorch user copies
  network: str        # its class of backbone and head


def twin(arch) -> Twin:
  """The PyTorch twin of an architecture."""
  made = model(arch)
  if isinstance(made, MiT):
    return Twin('MiT', 'mit', 'torch_mit_pilot', 'UniMiSS')
  if isinstance(made, ViT):
    return Twin('ViT', 'vit_2d_3d', 'torch_vit', 'UniMedI')
  if isinstance(made, ResNet):
    return Twin('ResNet', 'resnet', 'torch_resnet', 'Joint')
  return Twin('MiT+', 'mit_plus', 'torch_mit', 'UniMiSSPlus')


def torch_network(description: dict):
  """The PyTorch network of the keyword arguments that an export describes. Needs torch."""
  found = twin(description['arch'])
  return getattr(importlib.import_module(f'unimiss_jax.porting.{found.file}'), found.network)(**description)


def of_config(leaves: dict) -> dict:
  """The leaves `model.*` of a run -> fields of the architecture, without what only matters in training."""
  known = {'width': ResNet.width} if leaves.get('name') == 'resnet50' else {}
  return known | {k: tuple(v) if isinstance(v, list) else v for k, v in leaves.items() if k not in ('name', *TRAINING)}


def fields(arch) -> dict:
  """Every field of `arch` that matters, defaults filled in, as JSON writes it."""
  module = model(arch)
  names = [n for n in type(module).__dataclass_fields__ if n not in ('parent', 'name', *TRAINING)]
  return {n: list(v) if isinstance(v := getattr(module, n), tuple) else v for n in names}


@functools.lru_cache(maxsize=8)      # a second of tracing
def shapes(module) -> dict:
  """Path -> shape of all parameters."""
  try:
    return {path: leaf.shape for path, leaf in models.param_shapes(module).items()}
  except (TypeError, ValueError, ZeroDivisionError) as e:
    told = {n: getattr(module, n) for n in ('embed_dims', 'depths', 'sr_ratios', 'image_size', 'volume_size')}
    raise PortingError(f'these fields make no {type(module).__name__} ({" ".join(str(e).split())[:200]}): {told}. '
                       'FIX: give those that were inferred wrongly (arch=, or --arch)') from e


def statistics(module) -> dict:
  """Path -> shape of its batch statistics."""
  if not isinstance(module, ResNet):
    return {}
  return {path: s.shape for path, s in flatten_dict(jax.eval_shape(lambda: first_statistics(module))).items()}


def inter_encoder(fields: dict) -> InterEncoder:
  """The Transformer over slices of {'width': of the slice embeddings, and fields of the module}."""
  return InterEncoder(**{k: v for k, v in fields.items() if k != 'width'})


def inter_fields(leaves: dict, width: int) -> dict:
  """The leaves `joint.inter` of a run and the width of its slice embeddings -> what `inter_encoder` takes."""
  names = [n for n in InterEncoder.__dataclass_fields__ if n not in ('parent', 'name', 'dtype')]
  return {'width': width, **{n: leaves.get(n, getattr(InterEncoder, n)) for n in names}}


def inter_shapes(module, fields: dict) -> dict:
  """{'slice': {path: shape}, 'inter': likewise} of what stands on the 2-D encoder `module`."""
  width, inter = fields['width'], inter_encoder(fields)
  z = jax.ShapeDtypeStruct((1, fields['slices'] if fields['axis'] == 'feature' else fields['downsample'], width),
                           jnp.float32)
  tree = jax.eval_shape(inter.init, jax.random.key(0), z)['params']
  return {'slice': {('kernel',): (slicewise.levels_width(module), width), ('bias',): (width,)},
          'inter': {path: s.shape for path, s in flatten_dict(tree).items()}}


def native_size(description: dict, n: int) -> tuple:
  """Sizes that the network of an export is made for, n dimensions."""
  module, inter = model(description['arch']), description.get('inter')
  size = module.native_size(n)
  return (inter['slices'], *module.native_size(2)) if inter and n == 3 else size


def in_encoder(path: tuple) -> bool:
  """Whether a parameter of a backbone belongs to its encoder."""
  return bool(ENCODER.fullmatch(path[0]))


def dimensions(backbone: dict) -> tuple:
  """Of (2, 3), those that a backbone's parameters are for."""
  names = backbone.get('transformer', ('2D',))
  return tuple(n for n in (2, 3) if any(f'{n}D' in name for name in names))


def select(shapes_of: dict, decoder: bool, dimensions) -> dict:
  """Those of the paths of a whole model that are left without the decoder or without 2-D or 3-D."""
  gone = [f'{n}D' for n in (2, 3) if n not in dimensions]
  return {path: shape for path, shape in shapes_of.items()
          if (decoder or in_encoder(path)) and not any(g in part for g in gone for part in path)}


class Votes:
  """What the shapes of tensors say about a field: the commonest answer counts."""

  def __init__(self, tensors):
    self.found = {name: tuple(array.shape) for name, array in tensors.items()}

  def sizes(self, pattern, axis) -> list:
    """Lengths of this axis of all tensors of such names."""
    return [shape[axis] for name, shape in self.found.items()
            if re.fullmatch(pattern, name) and -len(shape) <= axis < len(shape)]

  def vote(self, *places, default=None) -> int:
    """The commonest length of (pattern of names, axis)."""
    ballots = collections.Counter(n for place in places for n in self.sizes(*place))
    if not ballots and default is None:
      raise PortingError(f'architecture not inferred: nothing is called {places[0][0]}. FIX: is this a MiT+ or a MiT? '
                         'else pass arch=')
    return ballots.most_common(1)[0][0] if ballots else default

  def depth(self, prefix) -> int:
    """Blocks; a stray name makes none."""
    members = collections.Counter(m[1] for name in self.found if (m := re.match(prefix + r'\.(\d+)\.', name)))
    return sum(n > 4 for n in members.values())

  def ratio(self, prefix) -> int:
    """Spatial reduction of the attention of these blocks."""
    name = rf'{prefix}\.\d+\.attn\.sr.D\.weight'
    return self.vote((name, -1), (name, 2), default=1)

  def hidden(self) -> int:
    """Hidden width of the MLP of the first stage."""
    return self.vote((r'transformer\.block1\.\d+\.mlp\.fc1\.(weight|bias)', 0),
                     (r'transformer\.block1\.\d+\.mlp\.fc2\.weight', 1))


def unit(name) -> tuple:
  """Places that show the width of a conv block."""
  return (rf'{name}\.conv\.weight', 0), (rf'{name}\.norm\.(weight|bias)', 0)


def block(name) -> tuple:
  """A place that shows the width of the blocks of a stage."""
  return rf'{name}\.\d+\.(norm\d|attn\.norm|mlp\.fc2)\.(weight|bias)', 0


def most(values):
  return collections.Counter(values).most_common(1)[0][0]


def infer_arch(tensors) -> dict:
  """The fields of `MiTPlus`, `MiT`, `ViT` or `ResNet` that a backbone's tensors show: all but the heads and what has
  no weights.

  Each is what most of the tensors that show it say, so that one that is missing or mis-shaped can be named. The depth
  of volumes and sizes that are not square show nowhere: 16 and squares are assumed.

  Args:
    tensors: name -> array in PyTorch's layout, without 'backbone.'.

  Raises:
    PortingError: no tensor shows a field.
  """
  votes = Votes(tensors)
  if 'transformer.plane_table' in votes.found:
    return _vit(votes)
  if 'layer1.0.conv1.weight' in votes.found:
    return _resnet(votes)
  pilot = any(re.match(r'transformer\.patch_embed.D0\.', name) for name in votes.found)
  return _mit(votes) if pilot else _mit_plus(votes)


def _mit(votes: Votes) -> dict:
  stages = range(1, 5)
  embed_dims = tuple(votes.vote(*unit(rf'transformer\.patch_embed.D{i}\.proj'), (rf'transformer\.pos_embed.D{i}', 2),
                                block(rf'transformer\.block{i}')) for i in stages)
  arch = dict(
      embed_dims=embed_dims,
      decoder_dims=embed_dims[-2::-1],      # it adds maps of the encoder
      depths=tuple(votes.depth(rf'transformer\.block{i}') for i in stages),
      sr_ratios=tuple(votes.ratio(rf'transformer\.block{i}') for i in stages),
      mlp_ratio=votes.hidden() / embed_dims[0],
      in_channels=tuple(votes.vote((rf'transformer\.patch_embed{n}D0\.conv\.weight', 1), default=default)
                        for n, default in zip((2, 3), MiT.in_channels)))
  depth = MiT.volume_size[0]
  widths = {n: [2**(i + 1) * round((max(rows - 1, 1) / (depth // 2**i if n == 3 else 1))**.5)
                for i in stages for rows in votes.sizes(rf'transformer\.pos_embed{n}D{i}', 1)] for n in (2, 3)}
  if widths[2]:
    arch['image_size'] = most(widths[2])
  if widths[3]:
    arch['volume_size'] = (depth, most(widths[3]), most(widths[3]))
  if votes.depth('Decblock0'):
    arch |= dict(
        decoder_depths=tuple(votes.depth(f'Decblock{i}') for i in range(3)),
        decoder_sr_ratios=tuple(votes.ratio(f'Decblock{i}') for i in range(3)))
  return arch


def _mit_plus(votes: Votes) -> dict:
  stages, first = range(1, 5), int(any(re.match(r'transformer\.cls_tokens\d', name) for name in votes.found))
  vote, sizes = votes.vote, votes.sizes
  embed_dims = [vote(*unit(r'transformer\.ConvBlock.D0\.0')), vote(*unit(r'transformer\.ConvBlock.D1\.\d'))]
  embed_dims += [vote(*unit(rf'transformer\.patch_embed.D{i}\.proj1?'), (rf'transformer\.pos_embed.D{i}', 2),
                      block(rf'transformer\.block{i}')) for i in stages]
  arch = dict(
      embed_dims=tuple(embed_dims),
      depths=tuple(votes.depth(rf'transformer\.block{i}') for i in stages),
      sr_ratios=tuple(votes.ratio(rf'transformer\.block{i}') for i in stages),
      mlp_ratio=votes.hidden() / embed_dims[2],
      cls_token=bool(first),
      conv_residual=bool(sizes(r'transformer\.patch_embed.D1\.proj\.skip\.weight', 0)),
      final_norm=bool(sizes(r'transformer\.final_norm\..*', 0)),
      in_channels=tuple(vote((rf'transformer\.ConvBlock{n}D0\.0\.conv\.weight', 1),
                             (rf'recon_conv{n}D\.(weight|bias)', 0), default=default)
                        for n, default in zip((2, 3), MiTPlus.in_channels)))
  planes = MiTPlus.volume_size[0] // 2      # of the tables of s1; the others have half as many
  widths, ratios = {2: [], 3: []}, []
  for n, widths_of in widths.items():
    sides = {i: round((max(rows - first, 1) / (1 if n == 2 else planes if i == 1 else planes // 2))**.5)
             for i in stages for rows in sizes(rf'transformer\.pos_embed{n}D{i}', 1)}
    widths_of += [4 * side * 2**(i - 1) for i, side in sides.items() if i < 4]
    if {3, 4} <= sides.keys():
      ratios.append(round(sides[3] / max(sides[4], 1)))
  if ratios:
    arch['last_stride'] = min(max(most(ratios), 1), 2)
  if widths[2]:
    arch['image_size'] = most(widths[2])
  if widths[3]:
    arch['volume_size'] = (2 * planes, most(widths[3]), most(widths[3]))
  if votes.depth('Decblock1'):
    arch |= dict(
        decoder_dims=tuple(vote((rf'DecEmbed.D{i}\.proj\.bias', 0), (rf'DecEmbed.D{i}\.proj\.weight', 1),
                                *unit(rf'DecEmbed.D{i}\.proj1'), block(f'Decblock{i}')) for i in (1, 2, 3))
        + (vote((r'TransposeConv.D1\.bias', 0), (r'TransposeConv.D1\.weight', 1), *unit(r'DeConvBlock.D1')),
           vote((r'TransposeConv.D2\.bias', 0), (r'TransposeConv.D2\.weight', 1), (r'recon_conv.D\.weight', 1))),
        decoder_depths=tuple(votes.depth(f'Decblock{i}') for i in (1, 2, 3)),
        decoder_sr_ratios=tuple(votes.ratio(f'Decblock{i}') for i in (1, 2, 3)))
  return arch


def _resnet(votes: Votes) -> dict:
  depths = [votes.depth(rf'layer{i}') for i in range(1, 5)]
  return dict(depths=tuple(d for d in depths if d), width=votes.vote((r'conv1\.weight', 0), (r'bn1\.\w+', 0)),
              in_channels=(votes.vote((r'conv1\.weight', 1)), ResNet.in_channels[1]))


def _vit(votes: Votes) -> dict:
  width = votes.vote((r'transformer\.(plane|modality)_table', 2), (r'transformer\.class_token', 2),
                     block(r'transformer\.block1'))
  patch = votes.vote(*((rf'transformer\.patch_embed{n}D\.weight', -1) for n in (2, 3)))
  patch_depth = votes.vote((r'transformer\.patch_embed3D\.weight', 2), default=ViT.patch_depth)
  side = patch * round(votes.vote((r'transformer\.plane_table', 1))**.5)
  planes = votes.vote((r'transformer\.depth_table3D', 1), default=ViT.volume_size[0] // patch_depth)
  return dict(embed_dims=(width,), depths=(votes.depth(r'transformer\.block1'),), num_heads=(max(width // 64, 1),),
              mlp_ratio=votes.hidden() / width, patch=patch, patch_depth=patch_depth, image_size=side,
              volume_size=(planes * patch_depth, side, side),
              in_channels=tuple(votes.vote((rf'transformer\.patch_embed{n}D\.weight', 1), default=default)
                                for n, default in zip((2, 3), ViT.in_channels)))
