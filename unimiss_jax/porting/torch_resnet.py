"""The ResNet of bottlenecks in PyTorch: one file that needs torch and no more, with torchvision's names and maps.

  net = ResNet()                                              # ResNet-50; depths, width as in the run's config
  net.load_state_dict(weights)                                # what porting.resnet.to_torch gives
  embedding, pyramid = net.eval()(images)                     # [B, 3, H, W]
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


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
  """Images [B, 3, H, W] -> (mean of the last map [B, 32 * width], maps of stem and stages)."""

  def __init__(self, depths=(3, 4, 6, 3), width: int = 64, in_channels: int = 3):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    channels, self.stages = width, len(depths)
    for stage, depth in enumerate(depths):
      features, blocks = width * 2**stage, []
      for i in range(depth):
        blocks.append(Bottleneck(channels, features, 2 if stage and not i else 1))
        channels = 4 * features
      setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))

  def forward(self, x):
    maps = [F.relu(self.bn1(self.conv1(x)))]
    x = F.max_pool2d(maps[0], 3, 2, 1)
    for stage in range(self.stages):
      x = getattr(self, f'layer{stage + 1}')(x)
      maps.append(x)
    return torch.mean(x, (2, 3)), tuple(maps)
