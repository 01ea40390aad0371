"""Which MiT+ a set of tensors is."""
from __future__ import annotations

import re

from unimiss_jax import models
from unimiss_jax.models.mit import MiTPlus
from unimiss_jax.porting.errors import PortingError

# Fields that leave no trace in the weights and change no result of a trained model.
TRAINING = ('encoder_drop_path', 'decoder_drop_path', 'init', 'dtype')
SHAPELESS = ('num_heads', 'decoder_heads')      # change results, but not shapes


def model(arch) -> MiTPlus:
  """The module of `arch`: a dict of fields, or 'mit_plus' for its defaults."""
  if isinstance(arch, str):
    if arch not in models.BACKBONES:
      raise PortingError(f'arch={arch!r}: known are {", ".join(models.BACKBONES)}, or a dict of fields')
    return models.BACKBONES[arch]()
  return MiTPlus(**arch)


def of_config(leaves: dict) -> dict:
  """The leaves `model.*` of a run -> fields of the architecture, without what only matters in training."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in leaves.items() if k not in ('name', *TRAINING)}


def shapes(module) -> dict:
  """Path -> shape of all parameters."""
  return {path: leaf.shape for path, leaf in models.param_shapes(module).items()}


def infer_arch(tensors) -> dict:
  """The `MiTPlus` fields that a backbone's tensors show: all but the heads and what has no weights.

  Each is read from several tensors where it can be, so that one that is missing is named as missing. The depth of
  volumes shows nowhere in the tables: it is taken to be the default 16.

  Args:
    tensors: name -> array in PyTorch's layout, without 'backbone.'.

  Raises:
    PortingError: a tensor that is needed is absent.
  """
  found = {name: tuple(array.shape) for name, array in tensors.items()}

  def find(name, default=None):
    """Shape of the 2-D tensor of this name ('?D'), else of the 3-D one."""
    for rank in ('2D', '3D'):
      if shape := found.get(name.replace('?D', rank)):
        return shape
    if default is None:
      raise PortingError(f'architecture not inferred: 1 missing: backbone.{name.replace("?D", "2D")}. FIX: is this a '
                         'MiT+? else pass arch=')
    return default

  any_of = lambda pattern: any(re.fullmatch(pattern, name) for name in found)
  number = lambda prefix: [int(m[1]) for name in found if (m := re.match(prefix + r'\.(\d+)\.', name))]
  depth = lambda prefix: 1 + max(number(prefix), default=-1)
  stages, first = range(1, 5), int(any_of(r'transformer\.cls_tokens\d.*'))
  embed_dims = [find(f'transformer.ConvBlock?D{i}.0.conv.weight')[0] for i in range(2)]
  embed_dims += [find(f'transformer.patch_embed?D{i}.proj.conv.weight')[0] for i in stages]
  arch = dict(
      embed_dims=tuple(embed_dims),
      depths=tuple(depth(f'transformer.block{i}') for i in stages),
      sr_ratios=tuple(find(f'transformer.block{i}.0.attn.sr?D.weight', (1,) * 3)[-1] for i in stages),
      mlp_ratio=find('transformer.block1.0.mlp.fc1.weight')[0] / embed_dims[2],
      cls_token=bool(first),
      conv_residual=any_of(r'transformer\.patch_embed.D1\.proj\.skip\.weight'),
      final_norm=any_of(r'transformer\.final_norm\..*'),
      in_channels=tuple(found.get(f'transformer.ConvBlock{rank}0.0.conv.weight', (0, c))[1]
                        for rank, c in zip(('2D', '3D'), MiTPlus.in_channels)))
  planes = MiTPlus.volume_size[0] // 2      # of the tables of s1; s2 and s3 have half as many
  for rank, size in (('2D', 'image_size'), ('3D', 'volume_size')):
    tokens = {i: found[name][1] - first for i in stages if (name := f'transformer.pos_embed{rank}{i}') in found}
    sides = {i: round((n / (1 if rank == '2D' else planes if i == 1 else planes // 2))**0.5) for i, n in tokens.items()}
    widths = [4 * side * 2**(i - 1) for i, side in sides.items() if i < 4]
    if widths:
      arch[size] = widths[0] if rank == '2D' else (2 * planes, widths[0], widths[0])
    if {3, 4} <= sides.keys():
      arch.setdefault('last_stride', round(sides[3] / max(sides[4], 1)))
  if depth('Decblock1'):
    ups = [f'DecEmbed?D{i}.proj.weight' for i in (1, 2, 3)] + [f'TransposeConv?D{i}.weight' for i in (1, 2)]
    arch |= dict(decoder_dims=tuple(find(name)[1] for name in ups),
                 decoder_depths=tuple(depth(f'Decblock{i}') for i in (1, 2, 3)),
                 decoder_sr_ratios=tuple(find(f'Decblock{i}.0.attn.sr?D.weight')[-1] for i in (1, 2, 3)))
  return arch
