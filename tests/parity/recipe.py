"""The deterministic weights and inputs behind the parity fixtures: a function of (seed, name, PyTorch shape) only."""
import math
import zlib

import numpy as np


def _stream(seed, name):
  return np.random.RandomState(zlib.crc32(f'{seed}:{name}'.encode()))


def weight(seed: int, name: str, shape) -> np.ndarray:
  """float32 values of one tensor in PyTorch's layout; `name` as in the released state dict, without 'module.'."""
  z = _stream(seed, name).standard_normal(tuple(shape))
  last = name.rsplit('.', 1)[-1]
  if last == 'weight_g':
    z = np.ones(shape)
  elif last == 'bias':
    z = 0.05 * z
  elif len(shape) == 1:
    z = 1 + 0.1 * z
  elif 'pos_embed' in name.lower() or 'posembed' in name.lower() or last.startswith('cls_tokens'):
    z = 0.3 * z
  else:
    z = z / math.sqrt(math.prod(shape) / shape[0])
  return z.astype(np.float32)


def state_dict(seed: int, shapes: dict) -> dict:
  return {name: weight(seed, name, shape) for name, shape in shapes.items()}


def network_input(seed: int, name: str, shape, kind: str) -> np.ndarray:
  """float32 input in PyTorch's layout: 'unit' uniform in [0, 1), 'ct' normal with mean -0.4 and std 0.6."""
  stream = _stream(seed, f'input:{name}')
  x = {'unit': lambda: stream.random_sample(shape), 'ct': lambda: 0.6 * stream.standard_normal(shape) - 0.4}[kind]()
  return x.astype(np.float32)


def sample_index(n: int, k: int) -> np.ndarray:
  """The places (of n in C order) that the fixtures store of a large tensor: k equidistant ones, ends included."""
  return np.arange(k) * (n - 1) // (k - 1) if n > k else np.arange(n)


def summary(x) -> np.ndarray:
  """[mean, population std, L2 norm, min, max]."""
  x = np.asarray(x, np.float64)
  return np.array([x.mean(), x.std(), np.linalg.norm(x), x.min(), x.max()])
