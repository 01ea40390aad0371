"""An image ViT of PyTorch (names of timm and DeiT, Touvron et al. 2021) -> what a ViT of both dimensions starts from.

Of images the result computes what the file's network does. The tokenizer of volumes is the one of images, its colours
summed and repeated over the slices of a token, divided by their number (inflation, Carreira and Zisserman 2017): a
volume of equal slices gets the tokens that a slice of it gets.
"""
from __future__ import annotations

import math
import re

import numpy as np

from unimiss_jax.models import layers
from unimiss_jax.porting import torch_files
from unimiss_jax.porting.errors import check_tensors

NESTED = ('model', 'state_dict')
UNUSED = re.compile(r'(head|fc_norm|pre_logits)\.')
LINEAR = {'attn.proj': 'attn/proj', 'mlp.fc1': 'mlp/fc1', 'mlp.fc2': 'mlp/fc2'}


def read(path, model) -> dict:
  """Tensors of a file for a `models.vit.ViT`.

  Args:
    path: a file of `torch.save` or safetensors; positions of another image size are interpolated.
    model: the ViT that they are for.

  Returns:
    {'transformer/...': array}: all but the depth table and the mask token; both modalities are 0.

  Raises:
    PortingError: unreadable; tensors that are missing, unexpected or mis-shaped, by name.
  """
  tensors = torch_files.read(path)
  for level in NESTED:
    tensors = tensors.get(level, tensors)
  tensors = {n: np.asarray(x) for n, x in tensors.items() if not UNUSED.match(n)}
  (width,), (depth,) = model.embed_dims, model.depths
  hidden = int(width * model.mlp_ratio)
  side = math.isqrt(max(tensors['pos_embed'].shape[1] - 1, 1)) if 'pos_embed' in tensors else 14
  shapes = {'cls_token': (1, 1, width), 'pos_embed': (1, 1 + side**2, width),
            'patch_embed.proj.weight': (width, model.in_channels[0], model.patch, model.patch)}
  shapes |= {'patch_embed.proj.bias': (width,), 'norm.weight': (width,), 'norm.bias': (width,)}
  for i in range(depth):
    of = {f'{n}.{end}': (width,) for n in ('norm1', 'norm2') for end in ('weight', 'bias')}
    for name, (a, b) in {'attn.qkv': (3 * width, width), 'attn.proj': (width, width), 'mlp.fc1': (hidden, width),
                         'mlp.fc2': (width, hidden)}.items():
      of |= {f'{name}.weight': (a, b), f'{name}.bias': (a,)}
    shapes |= {f'blocks.{i}.{n}': shape for n, shape in of.items()}
  check_tensors(path, tensors, shapes)
  return {f'transformer/{n}': x for n, x in _renamed(tensors, model).items()}


def _renamed(t: dict, model) -> dict:
  width, tokens = model.embed_dims[0], t['pos_embed'].shape[1] - 1
  kernel = t['patch_embed.proj.weight'].transpose(2, 3, 1, 0)                              # [p, p, 3, C]
  grey = kernel.sum(2, keepdims=True) / model.patch_depth
  volume = np.repeat(np.broadcast_to(grey, (model.patch_depth, *grey.shape)), model.in_channels[1], -2)
  native = (math.isqrt(tokens),) * 2
  plane = layers.resize_positions(t['pos_embed'][:, 1:], native, model.grid((model.image_size,) * 2), False)
  out = {'class_token': t['cls_token'] + t['pos_embed'][:, :1], 'plane_table': np.asarray(plane),
         'modality_table': np.zeros((1, 2, width), t['cls_token'].dtype),
         'final_norm/scale': t['norm.weight'], 'final_norm/bias': t['norm.bias']}
  for n, w in ((2, kernel), (3, volume / model.in_channels[1])):
    out |= {f'patch_embed{n}D/kernel': w, f'patch_embed{n}D/bias': t['patch_embed.proj.bias']}
  for i in range(model.depths[0]):
    of, to = f'blocks.{i}', f'block1_{i}'
    for norm in ('norm1', 'norm2'):
      out |= {f'{to}/{norm}/scale': t[f'{of}.{norm}.weight'], f'{to}/{norm}/bias': t[f'{of}.{norm}.bias']}
    for name, ours in LINEAR.items():
      out |= {f'{to}/{ours}/kernel': t[f'{of}.{name}.weight'].T, f'{to}/{ours}/bias': t[f'{of}.{name}.bias']}
    for part, rows in (('q', slice(width)), ('kv', slice(width, None))):
      out |= {f'{to}/attn/{part}/kernel': t[f'{of}.attn.qkv.weight'][rows].T,
              f'{to}/attn/{part}/bias': t[f'{of}.attn.qkv.bias'][rows]}
  return out
