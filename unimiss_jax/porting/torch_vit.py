"""The ViT for images and volumes that UniMedI trains, and its DINO head, in PyTorch: one file that needs torch alone.

So it repeats blocks of torch_mit.py, the file of MiT+. The forward pass equals our Flax modules. What is loaded decides
the weights: those of a fresh module are PyTorch's own. Nothing is random: training and evaluation mode agree.

  net = UniMedI(**json.load(open('export/config.json'))['torch'])
  net.load_state_dict(safetensors.torch.load_file('export/model.safetensors'))
  output, logits = net(images)                               # [B, 3, H, W] in [0, 1], or volumes [B, 1, D, H, W]
  slices = net.backbone.choose(volumes, 2)                   # as training saw a volume: with the slices that matter
  cls, patches = net.backbone.encode(volume=volumes, slices=slices)
"""
from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class ViTOutput(NamedTuple):
  """embedding [B, C]; pyramid: one map of patches [B, C, *grid]; there is no reconstruction."""
  embedding: torch.Tensor
  pyramid: tuple
  reconstruction: None = None


@dataclasses.dataclass(frozen=True)
class Arch:
  """What a ViT is.

  Attributes:
    embed_dims, depths, num_heads: (width,), (blocks,), (heads,).
    mlp_ratio: hidden width of the MLPs over the width.
    patch, patch_depth: pixels of a token in-plane, slices of a token of a volume.
    in_channels: of images, of volumes.
    image_size, volume_size: what the tables of positions are made for: the plane of an image, the depth of a volume.
  """
  embed_dims: tuple = (768,)
  depths: tuple = (12,)
  num_heads: tuple = (12,)
  mlp_ratio: float = 4
  patch: int = 16
  patch_depth: int = 4
  in_channels: tuple = (3, 1)
  image_size: int = 224
  volume_size: tuple = (32, 128, 128)

  def native_size(self, n: int) -> tuple:
    """What the position tables are made for."""
    return (self.image_size,) * 2 if n == 2 else tuple(self.volume_size)

  def kernel(self, n: int) -> tuple:
    """Pixels of a token in n dimensions."""
    return (self.patch_depth,)[:n - 2] + (self.patch, self.patch)

  def check(self, shape):
    """Raises ValueError for an input that patches do not fill or that has other channels."""
    n = len(shape) - 2
    if n not in (2, 3):
      raise ValueError(f'input of shape {tuple(shape)}: expected [B, C, H, W] or [B, C, D, H, W]')
    if shape[1] != self.in_channels[n - 2]:
      raise ValueError(f'input has {shape[1]} channels: expected {self.in_channels[n - 2]} for {n}-D inputs')
    nearest = tuple(max(1, round(s / k)) * k for s, k in zip(shape[2:], self.kernel(n)))
    if tuple(shape[2:]) != nearest:
      raise ValueError(f'input size {tuple(shape[2:])}: expected multiples of {self.kernel(n)}; the nearest valid size '
                       f'is {nearest}')


class ViT(nn.Module):
  """x [B, 3, H, W] or [B, 1, D, H, W] -> ViTOutput.

  Args:
    decoder: there is none; False.
    dimensions: (2,) or (3,): built for images or for volumes only.
    **arch: the fields of `Arch`.
  """

  def __init__(self, decoder: bool = False, dimensions: tuple = (2, 3), **arch):
    super().__init__()
    self.arch, self.dimensions = Arch(**arch), tuple(dimensions)
    self.transformer = Encoder(self.arch, self.dimensions)

  def forward(self, x, decode: bool = True) -> ViTOutput:
    self.arch.check(x.shape)
    cls, patches = self.encode(**{'image' if x.ndim == 4 else 'volume': x})
    grid = [s // k for s, k in zip(x.shape[2:], self.arch.kernel(x.ndim - 2))]
    return ViTOutput(cls, (patches.transpose(1, 2).unflatten(2, grid),))

  def encode(self, image=None, volume=None, slices=None):
    """One sequence of the tokens of a volume, then those of an image or of slices of the volume.

    Args:
      image: [B, 3, H, W] in [0, 1], or None.
      volume: [B, 1, D, H, W] in HU / 1024, or None.
      slices: [B, k] integers, which slices of the volume enter as images do, too.

    Returns:
      (class token [B, C], patches [B, P, C]), behind the last norm.
    """
    for x in (image, volume):
      if x is not None:
        self.arch.check(x.shape)
        if x.ndim - 2 not in self.dimensions:
          raise ValueError(f'input of shape {tuple(x.shape)}: these weights are {self.dimensions[0]}-D only')
    return self.transformer(image, volume, slices)

  def choose(self, volume, k: int):
    """[B, k] slices: the middle ones of the k planes of tokens that the class token looks at most, in their order."""
    rows = []
    self.arch.check(volume.shape)
    self.transformer(None, volume, None, rows)
    planes = volume.shape[2] // self.arch.patch_depth
    scores = torch.stack(rows, 1)[..., 1:].mean((1, 2)).unflatten(1, (planes, -1)).mean(2)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values
    return best * self.arch.patch_depth + self.arch.patch_depth // 2


class Encoder(nn.Module):
  """Arguments and result: `ViT.encode`; `rows` takes what the class token looks at, [B, heads, 1 + P] of each block."""

  def __init__(self, arch: Arch, dimensions: tuple):
    super().__init__()
    self.arch, (width,) = arch, arch.embed_dims
    self.native = (arch.image_size // arch.patch,) * 2
    for n in dimensions:
      conv = {2: nn.Conv2d, 3: nn.Conv3d}[n]
      self.add_module(f'patch_embed{n}D', conv(arch.in_channels[n - 2], width, arch.kernel(n), arch.kernel(n)))
    self.plane_table = normal(1, math.prod(self.native), width)
    self.modality_table = normal(1, 2, width)
    if 3 in dimensions:
      self.depth_table3D = normal(1, arch.volume_size[0] // arch.patch_depth, width)
    self.mask_token, self.class_token = normal(1, 1, width), normal(1, 1, width)      # the first is of training alone
    self.block1 = nn.ModuleList(Block(width, arch.num_heads[0], arch.mlp_ratio) for _ in range(arch.depths[0]))
    self.final_norm = nn.LayerNorm(width, 1e-6)

  def forward(self, image=None, volume=None, slices=None, rows=None):
    tokens = []
    if volume is not None:
      x = self.patch_embed3D(volume)                                                 # [B, C, planes, h, w]
      deep = F.interpolate(self.depth_table3D.transpose(1, 2), x.shape[2], mode='linear', align_corners=False)
      place = self.of_plane(x.shape[3:])[:, :, None] + deep[..., None, None]
      tokens.append(to_tokens(x + place + self.modality_table[:, 1, :, None, None, None]))
    if image is not None:
      tokens.append(to_tokens(self.of_image(2 * image - 1)))
    elif slices is not None:
      b, k = slices.shape
      picked = volume[torch.arange(b, device=volume.device)[:, None], 0, slices]    # [B, k, H, W]
      x = self.of_image(picked.flatten(0, 1)[:, None].expand(-1, self.arch.in_channels[0], -1, -1))
      x = to_tokens(x).unflatten(0, (b, k)) + deep[0].T[slices // self.arch.patch_depth][:, :, None]
      tokens.append(x.flatten(1, 2))
    x = torch.cat(tokens, 1)
    x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
    for block in self.block1:
      x = block(x, rows)
    x = self.final_norm(x)
    return x[:, 0], x[:, 1:]

  def of_image(self, image):
    """[B, 3, H, W] in [-1, 1] -> tokens at their places, [B, C, h, w]."""
    x = self.patch_embed2D(image)
    return x + self.of_plane(x.shape[2:]) + self.modality_table[:, 0, :, None, None]

  def of_plane(self, grid):
    """[1, C, h, w]: bicubic (a = -0.75), half-pixel centres, no antialias."""
    table = self.plane_table.transpose(1, 2).unflatten(2, self.native)
    if tuple(grid) == self.native:
      return table
    return F.interpolate(table, tuple(grid), mode='bicubic', align_corners=False)


class Attention(nn.Module):
  """Multi-head self-attention."""

  def __init__(self, dim: int, num_heads: int):
    super().__init__()
    self.num_heads = num_heads
    self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

  def forward(self, x, rows):                                # [B, 1 + P, C]
    b, length, c = x.shape
    split = lambda t: t.view(b, -1, self.num_heads, c // self.num_heads).transpose(1, 2)
    q, k, v = map(split, (self.q(x), *self.kv(x).chunk(2, -1)))
    if rows is not None:
      rows.append((q[:, :, :1] * q.shape[-1]**-0.5 @ k.transpose(2, 3)).softmax(-1)[:, :, 0])
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, length, c))


class Block(nn.Module):
  """Pre-norm transformer block: attention, then Linear, exact GELU, Linear, each added to its input."""

  def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
    super().__init__()
    hidden = int(dim * mlp_ratio)
    self.norm1, self.attn = nn.LayerNorm(dim, 1e-6), Attention(dim, num_heads)
    self.norm2 = nn.LayerNorm(dim, 1e-6)
    self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))

  def forward(self, x, rows=None):
    x = x + self.attn(self.norm1(x), rows)
    return x + self.mlp(self.norm2(x))


class DINOHead(nn.Module):
  """[B, in_dim] -> logits [B, out_dim], no temperature (Caron et al., ICCV 2021); without last layer the projection."""

  def __init__(self, out_dim: int = 8192, hidden_dim: int = 2048, bottleneck_dim: int = 256, in_dim: int = 768,
               last_layer: bool = True):
    super().__init__()
    self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                             nn.Linear(hidden_dim, bottleneck_dim))
    self.last_layer = Prototypes(bottleneck_dim, out_dim) if last_layer else None

  def forward(self, x):
    x = self.mlp(x)
    return x if self.last_layer is None else self.last_layer(F.normalize(x, dim=-1))


class Prototypes(nn.Module):
  """Products with `features` directions; their lengths weight_g stay 1 and get no gradient."""

  def __init__(self, inputs: int, features: int):
    super().__init__()
    self.weight_g = nn.Parameter(torch.ones(features, 1), requires_grad=False)
    self.weight_v = nn.Parameter(torch.empty(features, inputs).uniform_(-inputs**-0.5, inputs**-0.5))

  def forward(self, x):
    return F.linear(x, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


class UniMedI(nn.Module):
  """Backbone and head under one roof: x -> (ViTOutput, logits [B, out_dim] or None).

  Args:
    arch: the fields of `Arch`.
    head: keyword arguments of `DINOHead`; True = its defaults, None = no head.
    decoder, dimensions: as in `ViT`.
  """

  def __init__(self, arch: dict | None = None, head: dict | bool | None = None, decoder: bool = False,
               dimensions: tuple = (2, 3)):
    super().__init__()
    self.backbone = ViT(decoder, dimensions, **(arch or {}))
    in_dim = {'in_dim': self.backbone.arch.embed_dims[0]}
    self.head = None if head in (None, False) else DINOHead(**in_dim | (head if isinstance(head, dict) else {}))

  def forward(self, x):
    output = self.backbone(x)
    return output, None if self.head is None else self.head(output.embedding)


def to_tokens(x):
  """[B, C, *S] -> [B, prod(S), C]."""
  return x.flatten(2).transpose(1, 2)


def normal(*shape):
  """A parameter of N(0, 0.02) noise."""
  return nn.Parameter(0.02 * torch.randn(*shape))
