"""The networks of Joint in PyTorch, one file that needs torch alone: a ResNet for images, with torchvision's names and
maps, and a Transformer over the slices of a volume, whose keys are sampled at places that the data decide.

The forward pass in evaluation mode equals our Flax modules. Training mode has batch statistics and dropout.

  net = Joint(**json.load(open('export/config.json'))['torch']).eval()
  net.load_state_dict(safetensors.torch.load_file('export/model.safetensors'))
  output, logits = net(images)                                # [B, 3, H, W] in [0, 1]
  output, _ = net(volumes)                                    # [B, 1, D, H, W], any number of slices D
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Output(NamedTuple):
  """Of images: embedding [B, 32 * width], pyramid = maps of stem and stages.

  Of volumes: embedding [B, E], the unit mean of the tokens; pyramid = embeddings of the slices, tokens, each [B, E, D].
  """
  embedding: torch.Tensor
  pyramid: tuple
  reconstruction: None = None


class Bottleneck(nn.Module):
  """1x1, 3x3 (stride), 1x1 to four times the channels, plus the input (projected where its shape differs)."""

  def __init__(self, channels: int, features: int, stride: int):
    super().__init__()
    out = 4 * features
    self.conv1, self.bn1 = nn.Conv2d(channels, features, 1, bias=False), nn.BatchNorm2d(features)
    self.conv2, self.bn2 = nn.Conv2d(features, features, 3, stride, 1, bias=False), nn.BatchNorm2d(features)
    self.conv3, self.bn3 = nn.Conv2d(features, out, 1, bias=False), nn.BatchNorm2d(out)
    self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)) \
        if stride > 1 or channels != out else nn.Identity()

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
  """Images [B, 3, H, W] -> Output: the mean of the last map, the maps of stem and stages.

  Args:
    depths: bottlenecks of the stages; the default is ResNet-50.
    width: channels of the stem.
    in_channels: of images, of volumes.
    image_size: of training; any size of at least 32 works.
  """

  def __init__(self, depths=(3, 4, 6, 3), width: int = 64, in_channels=(3, 1), image_size: int = 224):
    super().__init__()
    self.in_channels, self.image_size = tuple(in_channels), image_size
    self.conv1, self.bn1 = nn.Conv2d(in_channels[0], width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    channels, self.stages, self.channels = width, len(depths), [width]
    for stage, depth in enumerate(depths):
      features, blocks = width * 2**stage, []
      for i in range(depth):
        blocks.append(Bottleneck(channels, features, 2 if stage and not i else 1))
        channels = 4 * features
      setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))
      self.channels.append(channels)

  def forward(self, x) -> Output:
    if x.ndim != 4 or min(x.shape[2:]) < 32 or x.shape[1] != self.in_channels[0]:
      raise ValueError(f'input of shape {tuple(x.shape)}: expected images [B, {self.in_channels[0]}, H, W] of at least '
                       '32 x 32')
    maps = [F.relu(self.bn1(self.conv1(x)))]
    x = F.max_pool2d(maps[0], 3, 2, 1)
    for stage in range(self.stages):
      x = getattr(self, f'layer{stage + 1}')(x)
      maps.append(x)
    return Output(torch.mean(x, (2, 3)), tuple(maps))


def pooled_levels(maps):
  """Maps [M, C, H, W] of the stages -> [M, E]: the unit mean of each, the last one twice, as in the released code."""
  pooled = [F.normalize(m.mean((2, 3)), dim=1) for m in maps]
  return torch.cat([*pooled, pooled[-1]], 1)


def spread(i, n: int):
  """0 .. n - 1 -> -1 .. 1."""
  return 2 * i / max(n - 1, 1) - 1


class Offsets(nn.Conv1d):
  """How far each key strays from its place: queries [B, d, L] -> [B, L / downsample] in key steps, +-scale."""

  def __init__(self, width: int, downsample: int, kernel: int, scale: float):
    super().__init__(width, width, kernel, downsample, (kernel - downsample) // 2, groups=width)
    self.to_offset, self.scale = nn.Linear(width, 1, bias=False), scale

  def forward(self, q):
    y = F.gelu(super().forward(q)).transpose(1, 2)
    return self.scale * torch.tanh(self.to_offset(y))[..., 0]


class PositionBias(nn.Module):
  """Logits from the distance between query and key: [...] -> [..., heads of a group]."""

  def __init__(self, hidden: int, heads: int):
    super().__init__()
    self.mlp = nn.ModuleList([nn.Linear(1, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, heads)])

  def forward(self, distance):
    x = (torch.sign(distance) * torch.log1p(distance.abs()))[..., None]
    return self.mlp[2](F.relu(self.mlp[1](F.relu(self.mlp[0](x)))))


class DATAttention(nn.Module):
  """Attention of all L samples to L / downsample keys, which are read between the samples by linear interpolation at
  places that depend on the queries, for each group of channels its own (Xia et al. 2022, in 1-D). [B, L, C] -> same."""

  def __init__(self, channels: int, heads: int, head_dim: int, groups: int, downsample: int, offset_scale: float,
               offset_kernel: int):
    super().__init__()
    inner = heads * head_dim
    self.heads, self.groups, self.downsample = heads, groups, downsample
    project = lambda: nn.Conv1d(channels, inner, 1, groups=groups, bias=False)
    self.to_q, self.to_k, self.to_v = project(), project(), project()
    self.to_offsets = Offsets(inner // groups, downsample, offset_kernel, offset_scale)
    self.rel_pos_bias = PositionBias(channels // 4, heads // groups)
    self.to_out = nn.Linear(inner, channels)

  def forward(self, x):
    b, length, channels = x.shape
    g, keys = self.groups, length // self.downsample
    x = x.transpose(1, 2)                                                            # [B, C, L]
    q = self.to_q(x)
    strays = self.to_offsets(q.reshape(b * g, -1, length))                           # [B * G, J]
    place = spread(torch.arange(keys, device=x.device, dtype=x.dtype) + strays, keys)
    grid = torch.stack([place, torch.zeros_like(place)], -1)[:, None]                # one row: y = 0
    kv = F.grid_sample(x.reshape(b * g, -1, 1, length), grid, 'bilinear', 'zeros', align_corners=False)
    kv = kv.reshape(b, channels, keys)
    split = lambda y: y.reshape(b, self.heads, -1, y.shape[-1])                      # [B, H, d, .]
    q, k, v = split(q), split(self.to_k(kv)), split(self.to_v(kv))
    at = spread(torch.arange(length, device=x.device, dtype=x.dtype), length)
    bias = self.rel_pos_bias(at[:, None] - place.reshape(b, g, 1, keys))             # [B, G, L, J, H / G]
    bias = bias.movedim(-1, 2).reshape(b, self.heads, length, keys)
    share = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2]) + bias).softmax(-1)       # [B, H, L, J]
    y = (share @ v.transpose(2, 3)).transpose(1, 2).reshape(b, length, -1)
    return self.to_out(y)


class DDETRAttention(nn.Module):
  """Every sample reads `points` places beside itself in each head (Zhu et al. 2021, in 1-D): [B, L, C] -> same."""

  def __init__(self, channels: int, heads: int, points: int):
    super().__init__()
    self.heads = heads
    self.value_proj, self.output_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
    self.sampling_offsets, self.attention_weights = (nn.Linear(channels, heads * points) for _ in range(2))

  def forward(self, x):
    b, length, channels = x.shape
    split = lambda y: y.reshape(b, length, self.heads, -1)
    v, strays = split(self.value_proj(x)), split(self.sampling_offsets(x))
    share = split(self.attention_weights(x)).softmax(-1)
    samples = torch.arange(length, device=x.device, dtype=x.dtype)
    at = samples[:, None, None] + strays                                             # [B, L, H, P]
    hat = (1 - (at[..., None] - samples).abs()).clamp(min=0)
    mix = (share[..., None] * hat).sum(3)                                            # [B, L, H, L]
    return self.output_proj(torch.einsum('bihl,blhd->bihd', mix, v).reshape(b, length, channels))


class Layer(nn.Module):
  """Post-norm: x = LN1(attention(x) + x), x = LN2(MLP(x) + x), dropout after each norm. [B, D, E] -> same."""

  def __init__(self, attention: nn.Module, channels: int, hidden: int, dropout: float, final: float):
    super().__init__()
    self.attn, self.dropout, self.final = attention, dropout, final
    self.norm1, self.norm2 = nn.LayerNorm(channels, 1e-5), nn.LayerNorm(channels, 1e-5)
    self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

  def forward(self, x):
    x = F.dropout(self.norm1(self.attn(x) + x), self.dropout, self.training)
    y = self.linear2(F.gelu(self.linear1(x)))
    return F.dropout(self.norm2(y + x), self.final, self.training)


class InterEncoder(nn.Module):
  """The Transformer over slice embeddings: [B, D, E] -> tokens [B, D, E].

  Any number of slices: what is missing to a multiple of `downsample` is filled with zeros and cut off again.

  Args:
    width: E.
    layers, hidden: their number, the width of their MLPs.
    kind: 'dat' (heads, head_dim, groups, downsample, offset_scale, offset_kernel) | 'ddetr' (heads, points).
    dropout, final_dropout: rate after each norm; also after the last one.
    axis, sampler: 'slice', 'interp'; what the released code does instead is not built.
    slices: of the volumes of training.
  """

  def __init__(self, width: int = 640, layers: int = 4, hidden: int = 720, kind: str = 'dat', heads: int = 8,
               head_dim: int = 64, groups: int = 8, downsample: int = 4, offset_scale: float = 2.,
               offset_kernel: int = 6, points: int = 4, dropout: float = 0.1, final_dropout: bool = True,
               axis: str = 'slice', sampler: str = 'interp', slices: int = 64):
    super().__init__()
    if kind not in ('dat', 'ddetr') or axis != 'slice' or kind == 'dat' and sampler != 'interp':
      raise ValueError(f'kind={kind!r}, axis={axis!r}, sampler={sampler!r}: built are dat and ddetr along the slices, '
                       'with interpolation')
    self.step = downsample if kind == 'dat' else 1
    make = (lambda: DATAttention(width, heads, head_dim, groups, downsample, offset_scale, offset_kernel)) \
        if kind == 'dat' else (lambda: DDETRAttention(width, heads, points))
    final = [dropout] * (layers - 1) + [dropout if final_dropout else 0.]
    self.layer = nn.ModuleList(Layer(make(), width, hidden, dropout, rate) for rate in final)

  def forward(self, z):
    x = F.pad(z, (0, 0, 0, -z.shape[1] % self.step))
    for layer in self.layer:
      x = layer(x)
    return x[:, :z.shape[1]]


class DINOHead(nn.Module):
  """[B, in_dim] -> logits [B, out_dim], no temperature (Caron et al., ICCV 2021); without last layer the projection."""

  def __init__(self, out_dim: int = 3000, hidden_dim: int = 2048, bottleneck_dim: int = 128, in_dim: int = 2048,
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


class Joint(nn.Module):
  """Images [B, 3, H, W] or volumes [B, 1, D, H, W] -> (Output, logits [B, out_dim] of images, or None).

  Args:
    arch: keyword arguments of `ResNet`.
    head: keyword arguments of `DINOHead`, of images; None = no head.
    decoder: there is none; False.
    dimensions: (2,) or (2, 3); volumes need `inter`.
    inter: keyword arguments of `InterEncoder`; None = no volumes.
  """

  def __init__(self, arch: dict | None = None, head: dict | None = None, decoder: bool = False,
               dimensions: tuple = (2,), inter: dict | None = None):
    super().__init__()
    self.backbone = ResNet(**(arch or {}))
    channels = self.backbone.channels
    self.head = DINOHead(**{'in_dim': channels[-1]} | head) if head else None
    self.inter = InterEncoder(**inter) if inter else None
    if inter:
      self.slice = nn.Linear(sum(channels[-4:]) + channels[-1], inter.get('width', 640))

  def forward(self, x):
    if x.ndim == 5:
      return self.volumes(x), None
    output = self.backbone(x)
    return output, None if self.head is None else self.head(output.embedding)

  def volumes(self, x) -> Output:
    """[B, 1, D, H, W] in HU / 1024, or as the card says; all slices go through the ResNet at once."""
    if self.inter is None or x.shape[1] != 1:
      raise ValueError(f'input of shape {tuple(x.shape)}: ' + ('these weights are 2-D only' if self.inter is None else
                                                              'expected volumes [B, 1, D, H, W]'))
    b, _, depth = x.shape[:3]
    maps = self.backbone(x.transpose(1, 2).flatten(0, 1).expand(-1, self.backbone.in_channels[0], -1, -1)).pyramid
    z = self.slice(pooled_levels(maps[-4:])).unflatten(0, (b, depth))
    tokens = self.inter(z)
    return Output(F.normalize(tokens.sum(1), dim=-1), (z.transpose(1, 2), tokens.transpose(1, 2)))
