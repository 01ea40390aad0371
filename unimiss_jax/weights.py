"""Weights from anywhere: a run, a checkpoint, an exported folder, a released dump, a safetensors file."""
from __future__ import annotations

import contextlib
import json
from typing import NamedTuple

import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from unimiss_jax import checkpoint, processes
from unimiss_jax.optim import named_leaves
from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import convert, torch_files
from unimiss_jax.porting.errors import PortingError
from unimiss_jax.report import summary

# The parts of a MiT+ and how their names begin; a part's name is understood in `allow`.
PARTS = {'encoder': ('backbone.transformer.',),
         'decoder': tuple(f'backbone.{name}' for name in ('Dec', 'DeConv', 'TransposeConv', 'recon_conv', 'norm.')),
         'head': ('head.',)}


class Weights(NamedTuple):
  """
  params: {'backbone': ..., 'head': ...}, nested dicts of numpy arrays; what is absent stays absent.
  arch: fields of the model, None where nothing tells them.
  source: the file or checkpoint that was read.
  about: what is known of the training: {'config', 'env', 'meta', 'metrics'} of a run, {'preprocessing', 'training'} of
    an exported folder, {} else.
  """
  params: dict
  arch: dict | None
  source: str
  about: dict


def read(path, branch: str = 'student', allow=(), in_chans: str = 'strict') -> Weights:
  """Reads a run's folder (its newest checkpoint), one checkpoint of it, an exported folder, or one file.

  Args:
    path: local or remote; files as in `porting.torch_files.read`.
    branch: 'student' or 'teacher', where there are both.
    allow: as in `porting.from_torch`; also the names of PARTS.
    in_chans: as in `porting.from_torch`, for files.

  Raises:
    CheckpointError, PortingError: one line that names the path and the reason.
  """
  path = epath.Path(path)
  if (path / torch_files.WEIGHTS).exists():
    path = path / torch_files.WEIGHTS
  found = _folder(path, branch) if path.is_dir() else _file(path, branch, allow, in_chans)
  if bad := [n for n, x in named_leaves(found.params).items() if not np.isfinite(x).all()]:
    raise PortingError(f'{found.source}: {len(bad)} tensors hold values that are not finite, the first is {bad[0]}. '
                       'FIX: take an older checkpoint')
  return found


def part_of(name: str) -> str:
  """'backbone.DecEmbed2D1.proj.weight' -> 'decoder'."""
  return next(part for part, starts in PARTS.items() if name.startswith(starts))


def _folder(path, branch) -> Weights:
  folder = processes.on_main(lambda: str(checkpoint.newest(path) or ''))
  if not folder:
    raise checkpoint.CheckpointError(f'{path}: no checkpoint and no {torch_files.WEIGHTS} there. FIX: name the folder '
                                     'of a run, an exported folder, or a .safetensors or .pth file')
  folder = checkpoint.absolute(folder)
  params = unflatten_dict({tuple(name.split('/')): x for name, x in checkpoint.read_params(folder, branch).items()})
  run = folder.parent.parent
  about = {name: json.loads((run / f'{name}.json').read_text()) for name in ('config', 'env')
           if (run / f'{name}.json').exists()}
  with contextlib.suppress(OSError, ValueError):      # the weights were whole
    about['meta'] = checkpoint.read_meta(folder)
  about['metrics'] = summary.rows(run)
  arch = architectures.of_config(about['config']['model']) if 'config' in about else None
  return Weights(params, arch, str(folder), about)


def _file(path, branch, allow, in_chans) -> Weights:
  known = torch_files.about(path)
  arch = known.get('torch', {}).get('arch')
  if arch is not None:
    arch = architectures.of_config(arch)
  allow = [start for word in allow for start in PARTS.get(word, (word,))]
  tensors = torch_files.read(path)
  try:
    parts = convert.split(tensors, branch)
    if arch is None and parts['backbone']:
      arch = convert.infer_arch(parts['backbone'])
    params = convert.from_torch(tensors, arch, allow, branch, in_chans)
  except PortingError as e:
    raise PortingError(f'{path}: {e}') from e
  about = {name: known[name] for name in ('preprocessing', 'training') if name in known}
  return Weights(params, arch, str(path), about)
