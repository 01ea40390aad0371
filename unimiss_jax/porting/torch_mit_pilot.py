"""MiT, the network of the pilot UniMiSS (ECCV 2022), and its DINO head in PyTorch: one file that needs torch alone.

So it repeats blocks of torch_mit.py, the file of MiT+. Parameters have the names and shapes of the released weights,
and the forward pass equals our Flax modules. What is loaded decides the weights: those of a fresh module are PyTorch's
own. Nothing is random: training and evaluation mode agree.

  net = UniMiSS(**json.load(open('export/config.json'))['torch'])
  net.load_state_dict(safetensors.torch.load_file('export/model.safetensors'))
  output, logits = net(images)                               # [B, 3, H, W], or volumes [B, 1, D, H, W]
"""
from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
STEM = 32                    # channels of c0


class MiTOutput(NamedTuple):
  """embedding [B, E]; pyramid c0, s1..s4, channels first; there is no reconstruction."""
  embedding: torch.Tensor
  pyramid: tuple
  reconstruction: None = None


@dataclasses.dataclass(frozen=True)
class Arch:
  """What a MiT is, and the sizes that follow from it; the defaults are MiT small, tiny has one block in every stage.

  Attributes:
    embed_dims, depths, num_heads, sr_ratios: channels, blocks, heads and spatial reduction of s1..s4.
    mlp_ratio: hidden width of the MLPs over their input width.
    decoder_dims, decoder_depths, decoder_heads, decoder_sr_ratios: of the decoder on the grids of s3, s2, s1.
    in_channels: of images, of volumes.
    image_size, volume_size: what the position tables are made for.
    pos_interp: how they are laid over other sizes; 'grid' is the only way here.
  """
  embed_dims: tuple = (48, 128, 256, 512)
  depths: tuple = (2, 3, 4, 3)
  num_heads: tuple = (1, 2, 4, 8)
  mlp_ratio: float = 4
  sr_ratios: tuple = (6, 4, 2, 1)
  decoder_dims: tuple = (256, 128, 48)
  decoder_depths: tuple = (3, 4, 3)
  decoder_heads: tuple = (8, 4, 2)
  decoder_sr_ratios: tuple = (2, 4, 6)
  in_channels: tuple = (3, 1)
  image_size: int = 224
  volume_size: tuple = (16, 96, 96)
  pos_interp: str = 'grid'

  def __post_init__(self):
    if self.pos_interp != 'grid':
      raise ValueError(f"pos_interp={self.pos_interp!r}: only 'grid' is built here; the Flax model has the others")

  def native_size(self, n: int) -> tuple:
    """What the position tables are made for."""
    return (self.image_size,) * 2 if n == 2 else tuple(self.volume_size)

  def native_grids(self, n: int) -> list[tuple]:
    """Sizes of c0, s1, s2, s3, s4 of an input of native size."""
    size = self.native_size(n)
    return [tuple(s // 2 ** (i + (n == 2 or axis > 0)) for axis, s in enumerate(size)) for i in range(5)]

  def check(self, shape):
    """Raises ValueError for an input that the strides do not divide, that is too small or has other channels."""
    n = len(shape) - 2
    if n not in (2, 3):
      raise ValueError(f'input of shape {tuple(shape)}: expected [B, C, H, W] or [B, C, D, H, W]')
    if shape[1] != self.in_channels[n - 2]:
      raise ValueError(f'input has {shape[1]} channels: expected {self.in_channels[n - 2]} for {n}-D inputs')
    least, steps = ((64, 64), (32, 32)) if n == 2 else ((16, 64, 64), (16, 32, 32))
    nearest = tuple(max(math.ceil(lo / m), round(s / m)) * m for s, lo, m in zip(shape[2:], least, steps))
    if tuple(shape[2:]) != nearest:
      raise ValueError(f'input size {tuple(shape[2:])}: expected multiples of {steps} from {least}; the nearest valid '
                       f'size is {nearest}')


class Stages(nn.Module):
  """Position tables and blocks of some stages, under the names that a subclass gives them."""

  def add_stage(self, blocks: str, table: str, dim: int, depth: int, grids: dict, *block, **how):
    """grids: {dimensions: native grid}."""
    for n, grid in grids.items():
      self.register_parameter(table.format(n), normal(1, 1 + math.prod(grid), dim))
    self.add_module(blocks, nn.ModuleList(Block(dim, *block, tuple(grids), **how) for _ in range(depth)))

  def attend(self, x, cls, blocks: str, table: str, native: tuple):
    """Class token [B, 1, C] and map [B, C, *S] through the blocks of a stage -> the same two."""
    grid = tuple(x.shape[2:])
    tokens = torch.cat([cls, to_tokens(x)], 1)
    tokens = tokens + resize_positions(getattr(self, table.format(len(grid))), native, grid)
    for block in getattr(self, blocks):
      tokens = block(tokens, grid)
    return tokens[:, :1], to_map(tokens[:, 1:], grid)


class MiT(Stages):
  """x [B, 3, H, W] or [B, 1, D, H, W] -> MiTOutput: embedding = class token of the decoder, or of s4 without decoder.

  H and W are multiples of 32 from 64, depth a multiple of 16.

  Args:
    decoder: False = the encoder alone.
    dimensions: (2,) or (3,): built for images or for volumes only.
    **arch: the fields of `Arch`.
  """

  def __init__(self, decoder: bool = True, dimensions: tuple = (2, 3), **arch):
    super().__init__()
    self.arch = a = Arch(**arch)
    self.dimensions, self.has_decoder = tuple(dimensions), decoder
    self.transformer = Encoder(a, self.dimensions)
    if not decoder:
      return
    for i, (before, dim) in enumerate(zip((a.embed_dims[-1], *a.decoder_dims), a.decoder_dims)):
      for n in self.dimensions:
        self.add_module(f'DecEmbed{n}D{i}', nn.Sequential(OrderedDict(proj=TRANSPOSED[n](before, dim, 2, 2))))
      self.add_module(f'cls_tokens{i}', nn.Linear(before, dim))
      self.add_stage(f'Decblock{i}', f'DecPosEmbed{{}}D{i}', dim, a.decoder_depths[i],
                     {n: a.native_grids(n)[3 - i] for n in self.dimensions}, a.decoder_heads[i], a.mlp_ratio,
                     a.decoder_sr_ratios[i], qkv_bias=False, epsilon=1e-5)
    self.norm = nn.LayerNorm(a.decoder_dims[-1], 1e-5)

  def forward(self, x, decode: bool = True) -> MiTOutput:
    self.arch.check(x.shape)
    n = x.ndim - 2
    if n not in self.dimensions:
      raise ValueError(f'input of shape {tuple(x.shape)}: these weights are {self.dimensions[0]}-D only')
    cls, pyramid = self.transformer(x)
    if not (decode and self.has_decoder):
      return MiTOutput(cls[:, 0], pyramid)
    x, native = pyramid[-1], self.arch.native_grids(n)
    for i, skip in enumerate(pyramid[3:0:-1]):
      x = getattr(self, f'DecEmbed{n}D{i}')(x) + skip
      cls = getattr(self, f'cls_tokens{i}')(cls)
      cls, x = self.attend(x, cls, f'Decblock{i}', f'DecPosEmbed{{}}D{i}', native[3 - i])
    return MiTOutput(self.norm(cls[:, 0]), pyramid)


class Encoder(Stages):
  """[B, C, *S] -> (class token [B, 1, E], (c0, s1, s2, s3, s4)); `transformer` among the released names."""

  def __init__(self, arch: Arch, dimensions: tuple):
    super().__init__()
    self.arch, dims = arch, arch.embed_dims
    self.cls_tokens1 = normal(1, 1, dims[0])
    for n in dimensions:
      self.add_module(f'patch_embed{n}D0', ConvBlock(arch.in_channels[n - 2], STEM, (2, 2) if n == 2 else (1, 2, 2), 7))
    for i, (before, dim) in enumerate(zip((STEM, *dims), dims)):
      for n in dimensions:
        self.add_module(f'patch_embed{n}D{i + 1}', nn.Sequential(OrderedDict(proj=ConvBlock(before, dim, (2,) * n, 3))))
      if i:
        self.add_module(f'cls_tokens{i + 1}', nn.Linear(before, dim))
      self.add_stage(f'block{i + 1}', f'pos_embed{{}}D{i + 1}', dim, arch.depths[i],
                     {n: arch.native_grids(n)[i + 1] for n in dimensions}, arch.num_heads[i], arch.mlp_ratio,
                     arch.sr_ratios[i])

  def forward(self, x):
    n = x.ndim - 2
    native, cls = self.arch.native_grids(n), self.cls_tokens1.expand(len(x), -1, -1)
    x = getattr(self, f'patch_embed{n}D0')(x)
    pyramid = [x]
    for stage in range(1, 5):
      x = getattr(self, f'patch_embed{n}D{stage}')(x)
      if stage > 1:
        cls = getattr(self, f'cls_tokens{stage}')(cls)
      cls, x = self.attend(x, cls, f'block{stage}', f'pos_embed{{}}D{stage}', native[stage])
      pyramid.append(x)
    return cls, tuple(pyramid)


class ConvBlock(nn.Module):
  """Convolution -> InstanceNorm -> LeakyReLU 0.01."""

  def __init__(self, inputs: int, features: int, stride: tuple, kernel: int):
    super().__init__()
    n = len(stride)
    self.conv = CONV[n](inputs, features, kernel, stride, kernel // 2, bias=False)
    self.norm = INSTANCE_NORM[n](features, eps=1e-5, affine=True)

  def forward(self, x):
    return F.leaky_relu(self.norm(self.conv(x)), 0.01)


class Attention(nn.Module):
  """Multi-head attention; keys and values come from the class token and from spatially reduced tokens."""

  def __init__(self, dim: int, num_heads: int, sr_ratio: int, dimensions: tuple, qkv_bias: bool):
    super().__init__()
    self.num_heads, self.sr_ratio = num_heads, sr_ratio
    self.q = nn.Linear(dim, dim, qkv_bias)
    self.kv = nn.Linear(dim, 2 * dim, qkv_bias)
    self.proj = nn.Linear(dim, dim)
    if sr_ratio > 1:
      for n in dimensions:
        self.add_module(f'sr{n}D', CONV[n](dim, dim, sr_ratio, sr_ratio))
      self.norm = nn.LayerNorm(dim, 1e-5)

  def forward(self, x, grid):                                # [B, 1 + prod(grid), C]
    b, length, c = x.shape
    split = lambda t: t.reshape(b, -1, self.num_heads, c // self.num_heads).transpose(1, 2)
    q = split(self.q(x))
    if self.sr_ratio > 1:
      reduced = getattr(self, f'sr{len(grid)}D')(to_map(x[:, 1:], grid))
      x = self.norm(torch.cat([x[:, :1], to_tokens(reduced)], 1))
    k, v = map(split, self.kv(x).chunk(2, -1))
    scores = q * q.shape[-1]**-0.5 @ k.transpose(2, 3)       # [B, heads, N, keys]
    return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, length, c))


class Block(nn.Module):
  """Pre-norm transformer block: attention, then Linear, exact GELU, Linear, each added to its input."""

  def __init__(self, dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, dimensions: tuple, qkv_bias=True,
               epsilon=1e-6):
    super().__init__()
    hidden = int(dim * mlp_ratio)
    self.norm1 = nn.LayerNorm(dim, epsilon)
    self.attn = Attention(dim, num_heads, sr_ratio, dimensions, qkv_bias)
    self.norm2 = nn.LayerNorm(dim, epsilon)
    self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))

  def forward(self, x, grid):
    x = x + self.attn(self.norm1(x), grid)
    return x + self.mlp(self.norm2(x))


class DINOHead(nn.Module):
  """[B, in_dim] -> logits [B, out_dim], no temperature (Caron et al., ICCV 2021); without last layer the projection."""

  def __init__(self, out_dim: int = 65536, hidden_dim: int = 2048, bottleneck_dim: int = 256, in_dim: int = 48,
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


class UniMiSS(nn.Module):
  """Backbone and head under the prefixes of the released files: x -> (MiTOutput, logits [B, out_dim] or None).

  Args:
    arch: the fields of `Arch`.
    head: keyword arguments of `DINOHead`; True = its defaults, None = no head. It reads the decoder's class token.
    decoder, dimensions: as in `MiT`.
  """

  def __init__(self, arch: dict | None = None, head: dict | bool | None = True, decoder: bool = True,
               dimensions: tuple = (2, 3)):
    super().__init__()
    self.backbone = MiT(decoder, dimensions, **(arch or {}))
    in_dim = {'in_dim': self.backbone.arch.decoder_dims[-1]}
    self.head = None if head in (None, False) else DINOHead(**in_dim | (head if isinstance(head, dict) else {}))

  def forward(self, x, decode: bool = True):
    output = self.backbone(x, decode)
    return output, self.head(output.embedding) if self.head is not None and decode else None


def resize_positions(table, native: tuple, grid: tuple):
  """Position table of another grid: bicubic (a = -0.75) in 2-D, trilinear in 3-D, half-pixel centres, no antialias.

  Args:
    table: [1, 1 + prod(native), C], the class slot first (kept as it is), then row-major tokens.
    native: grid that the table was made for, (H, W) or (D, H, W).
    grid: grid wanted.

  Returns:
    [1, 1 + prod(grid), C]; the table itself where the grid is the native one.
  """
  if grid == native:
    return table
  mode = 'bicubic' if len(grid) == 2 else 'trilinear'
  maps = F.interpolate(to_map(table[:, 1:], native), grid, mode=mode, align_corners=False)
  return torch.cat([table[:, :1], to_tokens(maps)], 1)


def to_tokens(x):
  """[B, C, *S] -> [B, prod(S), C]."""
  return x.flatten(2).transpose(1, 2)


def to_map(tokens, grid: tuple):
  """[B, prod(grid), C] -> [B, C, *grid]."""
  return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


def normal(*shape):
  """A parameter of N(0, 0.02) noise."""
  return nn.Parameter(0.02 * torch.randn(*shape))
