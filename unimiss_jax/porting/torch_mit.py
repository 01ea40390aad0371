"""MiT+, the network of UniMiSS+ (TPAMI 2024), and its DINO head in PyTorch: one file that needs torch and no more.

Parameters have the names and shapes of the released weights, and the forward pass equals our Flax modules. What is
loaded decides the weights: those of a fresh module are PyTorch's own. There is no drop-path, so that training and
evaluation mode agree.

  net = UniMiSSPlus(**json.load(open('export/config.json'))['torch'])
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
MEAN = {2: F.avg_pool2d, 3: F.avg_pool3d}


class MiTOutput(NamedTuple):
  """embedding [B, E]; pyramid c0, c1, s1..s4, channels first; reconstruction like the input, before the sigmoid."""
  embedding: torch.Tensor
  pyramid: tuple
  reconstruction: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Arch:
  """What a MiT+ is, and the sizes that follow from it.

  Attributes:
    embed_dims: channels of c0, c1, s1..s4.
    depths, num_heads, sr_ratios: blocks, heads and spatial reduction of s1..s4.
    mlp_ratio: hidden width of the MLPs over their input width.
    decoder_dims: channels after each up-sampling: s3, s2, s1, c1, c0.
    decoder_depths, decoder_heads, decoder_sr_ratios: of the three decoder stages.
    in_channels: of images, of volumes.
    image_size, volume_size: what the position tables are made for.
    pos_interp: how they are laid over other sizes; 'grid' is the only way here.
    conv_residual: every 3^n block of the encoder but the first adds its input.
    last_stride: in-plane stride of s4 and of the decoder's first up-sampling.
    final_norm: the embedding is the LayerNorm of class token + mean token of s4.
    cls_token: False = position tables without the class slot; the embedding is the mean token of s4.
  """
  embed_dims: tuple = (32, 64, 128, 256, 320, 320)
  depths: tuple = (1, 2, 4, 2)
  num_heads: tuple = (1, 2, 4, 8)
  mlp_ratio: float = 4
  sr_ratios: tuple = (8, 4, 2, 1)
  decoder_dims: tuple = (320, 256, 128, 64, 32)
  decoder_depths: tuple = (1, 1, 1)
  decoder_heads: tuple = (4, 2, 1)
  decoder_sr_ratios: tuple = (2, 4, 8)
  in_channels: tuple = (3, 1)
  image_size: int = 96
  volume_size: tuple = (16, 96, 96)
  pos_interp: str = 'grid'
  conv_residual: bool = False
  last_stride: int = 2
  final_norm: bool = False
  cls_token: bool = True

  def __post_init__(self):
    if self.pos_interp != 'grid':
      raise ValueError(f"pos_interp={self.pos_interp!r}: only 'grid' is built here; the Flax model has the others")

  def strides(self, n: int) -> list[tuple]:
    """Of c1, s1, s2, s3, s4 in n dimensions."""
    last = (self.last_stride,) * 2
    return [(2, 2)] * 4 + [last] if n == 2 else [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, *last)]

  def grids(self, size) -> list[tuple]:
    """Sizes of c1, s1, s2, s3, s4 for an input of this size."""
    out = []
    for stride in self.strides(len(size)):
      size = tuple(s // t for s, t in zip(size, stride))
      out.append(size)
    return out

  def native_size(self, n: int) -> tuple:
    """What the position tables are made for."""
    return (self.image_size,) * 2 if n == 2 else tuple(self.volume_size)

  def native_grids(self, n: int) -> list[tuple]:
    return self.grids(self.native_size(n))

  def check(self, shape):
    """Raises ValueError for an input that the strides do not divide, that is too small or has other channels."""
    n, step = len(shape) - 2, 16 * self.last_stride
    if n not in (2, 3):
      raise ValueError(f'input of shape {tuple(shape)}: expected [B, C, H, W] or [B, C, D, H, W]')
    if shape[1] != self.in_channels[n - 2]:
      raise ValueError(f'input has {shape[1]} channels: expected {self.in_channels[n - 2]} for {n}-D inputs')
    least, steps = ((64, 64), (step, step)) if n == 2 else ((16, 32, 32), (4, step, step))
    nearest = tuple(max(math.ceil(lo / m), round(s / m)) * m for s, lo, m in zip(shape[2:], least, steps))
    if tuple(shape[2:]) != nearest:
      raise ValueError(f'input size {tuple(shape[2:])}: expected multiples of {steps} from {least}; the nearest valid '
                       f'size is {nearest}')


class MiTPlus(nn.Module):
  """x [B, 3, H, W] or [B, 1, D, H, W] -> MiTOutput.

  H and W are multiples of 32 (16 with `last_stride=1`), at least 64 in 2-D; depth a multiple of 4, at least 16.

  Args:
    decoder: False = the encoder alone, there is no reconstruction.
    dimensions: (2,) or (3,): built for images or for volumes only.
    **arch: the fields of `Arch`.
  """

  def __init__(self, decoder: bool = True, dimensions: tuple = (2, 3), **arch):
    super().__init__()
    self.arch = a = Arch(**arch)
    self.dimensions, self.has_decoder, dims = tuple(dimensions), decoder, a.decoder_dims
    self.transformer = Encoder(a, self.dimensions)
    if not decoder:
      return
    for n in self.dimensions:
      strides, native, one = a.strides(n), a.native_grids(n), (1,) * n
      widths = (a.embed_dims[-1], *dims)
      for stage in (1, 2, 3):
        before, dim, stride = widths[stage - 1], widths[stage], strides[5 - stage]
        self.add_module(f'DecEmbed{n}D{stage}', nn.Sequential(OrderedDict(
            proj=TRANSPOSED[n](before, dim, stride, stride), proj1=ConvBlock(dim, dim, one))))
        self.register_parameter(f'DecPosEmbed{n}D{stage}', normal(1, math.prod(native[4 - stage]), dim))
      self.add_module(f'TransposeConv{n}D1', TRANSPOSED[n](dims[2], dims[3], strides[1], strides[1]))
      self.add_module(f'DeConvBlock{n}D1', ConvBlock(dims[3], dims[3], one))
      self.add_module(f'TransposeConv{n}D2', TRANSPOSED[n](dims[3], dims[4], strides[0], strides[0]))
      self.add_module(f'recon_conv{n}D', CONV[n](dims[4], a.in_channels[n - 2], 1))
    for i in range(3):
      self.add_module(f'Decblock{i + 1}', nn.ModuleList(
          Block(dims[i], a.decoder_heads[i], a.mlp_ratio, a.decoder_sr_ratios[i], self.dimensions, qkv_bias=False,
                epsilon=1e-5) for _ in range(a.decoder_depths[i])))
    self.norm = nn.LayerNorm(dims[2], 1e-5)

  def forward(self, x, decode: bool = True) -> MiTOutput:
    """Embedding and pyramid; the reconstruction is None with decode=False, else raw: its sigmoid is compared with x."""
    self.arch.check(x.shape)
    if x.ndim - 2 not in self.dimensions:
      raise ValueError(f'input of shape {tuple(x.shape)}: these weights are {self.dimensions[0]}-D only')
    embedding, pyramid = self.transformer(x)
    return MiTOutput(embedding, pyramid, self.decode(pyramid) if decode and self.has_decoder else None)

  def decode(self, pyramid):
    """The six maps -> [B, C, *S], the size of the first of them."""
    c0, c1, *maps, x = pyramid
    n = x.ndim - 2
    part = lambda name, i='': getattr(self, f'{name}{n}D{i}')
    native = self.arch.native_grids(n)
    for stage, skip in zip((1, 2, 3), reversed(maps)):
      x = part('DecEmbed', stage)(x) + skip
      grid = tuple(x.shape[2:])
      tokens = to_tokens(x) + resize_positions(part('DecPosEmbed', stage), native[4 - stage], grid, False)
      for block in getattr(self, f'Decblock{stage}'):
        tokens = block(tokens, grid)
      x = to_map(self.norm(tokens) if stage == 3 else tokens, grid)
    x = part('DeConvBlock', 1)(part('TransposeConv', 1)(x) + c1)
    return part('recon_conv')(part('TransposeConv', 2)(x) + c0)


class Encoder(nn.Module):
  """[B, C, *S] -> (embedding [B, E], (c0, c1, s1, s2, s3, s4)); `transformer` among the released names."""

  def __init__(self, arch: Arch, dimensions: tuple):
    super().__init__()
    self.arch, dims, residual = arch, arch.embed_dims, arch.conv_residual
    if arch.cls_token:
      self.cls_tokens1 = normal(1, 1, dims[2])
    for n in dimensions:
      strides, native, one = arch.strides(n), arch.native_grids(n), (1,) * n
      self.add_module(f'ConvBlock{n}D0', nn.Sequential(ConvBlock(arch.in_channels[n - 2], dims[0], one)))
      self.add_module(f'ConvBlock{n}D1', nn.Sequential(
          ConvBlock(dims[0], dims[1], strides[0], residual), ConvBlock(dims[1], dims[1], one, residual)))
      for stage in range(1, 5):
        before, dim = dims[stage:stage + 2]
        self.add_module(f'patch_embed{n}D{stage}', nn.Sequential(OrderedDict(
            proj=ConvBlock(before, dim, strides[stage], residual), proj1=ConvBlock(dim, dim, one, residual))))
        self.register_parameter(f'pos_embed{n}D{stage}',
                                normal(1, int(arch.cls_token) + math.prod(native[stage]), dim))
    for stage in range(1, 5):
      before, dim, i = *dims[stage:stage + 2], stage - 1
      self.add_module(f'block{stage}', nn.ModuleList(
          Block(dim, arch.num_heads[i], arch.mlp_ratio, arch.sr_ratios[i], dimensions) for _ in range(arch.depths[i])))
      if arch.cls_token and stage > 1:
        self.add_module(f'cls_tokens{stage}', nn.Linear(before, dim))
    if arch.final_norm:
      self.final_norm = nn.LayerNorm(dims[-1], 1e-6)

  def forward(self, x):
    n, has_cls = x.ndim - 2, self.arch.cls_token
    native = self.arch.native_grids(n)
    c0 = getattr(self, f'ConvBlock{n}D0')(x)
    x = getattr(self, f'ConvBlock{n}D1')(c0)
    pyramid = [c0, x]
    cls = self.cls_tokens1.expand(len(x), -1, -1) if has_cls else None
    for stage in range(1, 5):
      x = getattr(self, f'patch_embed{n}D{stage}')(x)
      grid, tokens = tuple(x.shape[2:]), to_tokens(x)
      if has_cls:
        if stage > 1:
          cls = getattr(self, f'cls_tokens{stage}')(cls)
        tokens = torch.cat([cls, tokens], 1)
      tokens = tokens + resize_positions(getattr(self, f'pos_embed{n}D{stage}'), native[stage], grid, has_cls)
      for block in getattr(self, f'block{stage}'):
        tokens = block(tokens, grid)
      cls, tokens = tokens[:, :int(has_cls)], tokens[:, int(has_cls):]
      x = to_map(tokens, grid)
      pyramid.append(x)
    mean = tokens.mean(1)
    embedding = cls[:, 0] if has_cls else mean
    if self.arch.final_norm:
      embedding = self.final_norm(embedding + mean if has_cls else mean)
    return embedding, tuple(pyramid)


class ConvBlock(nn.Module):
  """Convolution 3^n -> InstanceNorm -> LeakyReLU 0.01; `residual` adds the input (pooled and projected if strided)."""

  def __init__(self, inputs: int, features: int, stride: tuple, residual: bool = False):
    super().__init__()
    n = len(stride)
    self.stride, self.residual = stride, residual
    self.conv = CONV[n](inputs, features, 3, stride, 1, bias=False)
    self.norm = INSTANCE_NORM[n](features, eps=1e-5, affine=True)
    self.skip = CONV[n](inputs, features, 1, bias=False) if residual and inputs != features else None

  def forward(self, x):
    y = F.leaky_relu(self.norm(self.conv(x)), 0.01)
    if not self.residual:
      return y
    if max(self.stride) > 1:
      x = MEAN[len(self.stride)](x, self.stride)
    return y + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
  """Multi-head attention whose keys and values come from spatially reduced tokens.

  The class token, if any, is the first token; it is a query as all others and joins the keys unreduced.
  """

  def __init__(self, dim: int, num_heads: int, sr_ratio: int, dimensions: tuple, qkv_bias: bool):
    super().__init__()
    self.num_heads, self.sr_ratio = num_heads, sr_ratio
    self.q = nn.Linear(dim, dim, qkv_bias)
    self.kv = nn.Linear(dim, 2 * dim, qkv_bias)
    self.proj = nn.Linear(dim, dim)
    if sr_ratio > 1:
      for n in dimensions:
        self.add_module(f'sr{n}D', CONV[n](dim, dim, sr_ratio, sr_ratio, groups=dim))
      self.norm = nn.LayerNorm(dim, 1e-5)

  def forward(self, x, grid):                                # [B, N, C], N = cls + prod(grid)
    b, length, c = x.shape
    split = lambda t: t.reshape(b, -1, self.num_heads, c // self.num_heads).transpose(1, 2)
    q = split(self.q(x))
    if self.sr_ratio > 1:
      first = length - math.prod(grid)
      reduced = getattr(self, f'sr{len(grid)}D')(to_map(x[:, first:], grid))
      x = self.norm(torch.cat([x[:, :first], to_tokens(reduced)], 1))
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

  def forward(self, x, grid):                                # [B, N, C]
    x = x + self.attn(self.norm1(x), grid)
    return x + self.mlp(self.norm2(x))


class DINOHead(nn.Module):
  """[B, in_dim] -> logits [B, out_dim], no temperature (Caron et al., ICCV 2021).

  With last_layer=False -> the projection [B, bottleneck_dim].
  """

  def __init__(self, out_dim: int = 65536, hidden_dim: int = 2048, bottleneck_dim: int = 256, in_dim: int = 320,
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


class UniMiSSPlus(nn.Module):
  """Backbone and head under the prefixes of the released files: x -> (MiTOutput, logits [B, out_dim] or None).

  Args:
    arch: the fields of `Arch`.
    head: keyword arguments of `DINOHead`; True = its defaults, None = no head.
    decoder, dimensions: as in `MiTPlus`.
  """

  def __init__(self, arch: dict | None = None, head: dict | bool | None = True, decoder: bool = True,
               dimensions: tuple = (2, 3)):
    super().__init__()
    self.backbone = MiTPlus(decoder, dimensions, **(arch or {}))
    in_dim = {'in_dim': self.backbone.arch.embed_dims[-1]}
    self.head = None if head in (None, False) else DINOHead(**in_dim | (head if isinstance(head, dict) else {}))

  def forward(self, x, decode: bool = True):
    output = self.backbone(x, decode)
    return output, None if self.head is None else self.head(output.embedding)


def resize_positions(table, native: tuple, grid: tuple, cls_token: bool):
  """Position table of another grid: bicubic (a = -0.75) in 2-D, trilinear in 3-D, half-pixel centres, no antialias.

  Args:
    table: [1, cls + prod(native), C], row-major tokens.
    native: grid that the table was made for, (H, W) or (D, H, W).
    grid: grid wanted.
    cls_token: whether the first row is the class token's; it is kept as it is.

  Returns:
    [1, cls + prod(grid), C]; the table itself where the grid is the native one.
  """
  if grid == native:
    return table
  first = int(cls_token)
  mode = 'bicubic' if len(grid) == 2 else 'trilinear'
  maps = F.interpolate(to_map(table[:, first:], native), grid, mode=mode, align_corners=False)
  return torch.cat([table[:, :first], to_tokens(maps)], 1)


def to_tokens(x):
  """[B, C, *S] -> [B, prod(S), C]."""
  return x.flatten(2).transpose(1, 2)


def to_map(tokens, grid: tuple):
  """[B, prod(grid), C] -> [B, C, *grid]."""
  return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


def normal(*shape):
  """A parameter of N(0, 0.02) noise."""
  return nn.Parameter(0.02 * torch.randn(*shape))
