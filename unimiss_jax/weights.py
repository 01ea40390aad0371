"""Weights from anywhere: a run, a checkpoint, an exported folder, a released dump, a safetensors file."""
from __future__ import annotations

import contextlib
import hashlib
import json
from typing import NamedTuple

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax import checkpoint, processes
from unimiss_jax.checkpoint import CheckpointError
from unimiss_jax.optim import named_leaves
from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import convert, torch_files
from unimiss_jax.porting.convert import PARTS
from unimiss_jax.porting.errors import PortingError
from unimiss_jax.report import summary


class Weights(NamedTuple):
  """Attributes:
    params: {'backbone': ..., 'head': ...}, nested dicts of numpy arrays; what is absent stays absent. Of a ResNet
      also 'batch_stats', of Joint with volumes 'slice' and 'inter', of UniMedI its text tower.
    arch: fields of the model; {} for a checkpoint that was parted from the config.json of its run.
    recorded: whether `arch` was written down; else it was inferred, and heads and the depth of volumes are assumed.
    dimensions: of (2, 3), those that the weights are for.
    branch: 'student' or 'teacher', '' where nothing says it.
    source: the file or checkpoint that was read.
    about: what is known of the training: {'config', 'env', 'meta', 'metrics'} of a run, {'preprocessing', 'training'}
      of an exported folder, {} else.
    inter: fields of the Transformer over slices through which volumes go, see `porting.arch.inter_encoder`; {} else.
  """
  params: dict
  arch: dict
  recorded: bool
  dimensions: tuple
  branch: str
  source: str
  about: dict
  inter: dict = {}

  @property
  def parts(self) -> tuple:
    return tuple(part for part, there in (
        ('encoder', 'backbone' in self.params),
        ('decoder', not all(architectures.in_encoder((name,)) for name in self.params.get('backbone', {}))),
        ('head', 'head' in self.params), ('inter', bool(self.inter))) if there)


def read(path, branch: str = '', allow=(), in_chans: str = 'strict', arch: dict | None = None) -> Weights:
  """Reads a run's folder (its newest checkpoint), one checkpoint of it, an exported folder, or one file.

  Args:
    path: local or remote; files as in `porting.torch_files.read`.
    branch: 'student' or 'teacher', where there are both; '' = the student, or the only one.
    allow: as in `porting.from_torch`.
    in_chans: as in `porting.from_torch`, for files.
    arch: fields that the file does not record, {'num_heads': ...}.

  Raises:
    CheckpointError, PortingError: one line that names the path and the reason.
  """
  path = epath.Path(path)
  if path.is_dir():
    folder = processes.on_main(lambda: str(checkpoint.newest(path) or ''))
    if folder:
      return _checked(_run(checkpoint.absolute(folder), branch or 'student'))
    if not (path / torch_files.WEIGHTS).exists():
      raise CheckpointError(f'{path}: no checkpoint and no {torch_files.WEIGHTS} there. FIX: name the folder of a run, '
                            'an exported folder, or a .safetensors or .pth file')
    path = path / torch_files.WEIGHTS
  try:
    return _checked(_file(path, branch, allow, in_chans, arch or {}))
  except PortingError as e:
    raise e if str(e).startswith(str(path)) else PortingError(f'{path}: {e}') from e


def part_of(name: str) -> str:
  """'backbone.DecEmbed2D1.proj.weight' -> 'decoder'."""
  return next(part for part, starts in PARTS.items() if name.startswith(starts))


def _checked(found: Weights) -> Weights:
  if bad := [n for n, x in named_leaves(found.params).items() if not np.isfinite(x).all()]:
    raise PortingError(f'{found.source}: {len(bad)} tensors hold values that are not finite, the first is {bad[0]}. '
                       'FIX: take an older checkpoint')
  return found


def _run(folder, branch) -> Weights:
  params = unflatten_dict({tuple(name.split('/')): x for name, x in checkpoint.read_params(folder, branch).items()})
  run = folder.parent.parent
  about = {name: found for name, found in (
      ('config', _json(run / 'config.json')), ('env', _json(run / 'env.json')),
      ('meta', _json(folder / checkpoint.META)), ('metrics', summary.rows(run))) if found}
  model = about.get('config', {}).get('model')
  arch, inter = architectures.of_config(model) if isinstance(model, dict) else {}, {}
  dimensions = architectures.dimensions(params['backbone'])
  if joint := about.get('config', {}).get('joint'):      # it trains a 2-D encoder, and volumes go through that
    params['backbone'] = unflatten_dict({
        path: x for path, x in flatten_dict(params['backbone']).items()
        if architectures.in_encoder(path) and not any('3D' in part for part in path)})
    inter = architectures.inter_fields(joint['inter'], joint['width']) if 'inter' in params else {}
    dimensions = (2, 3) if inter else (2,)
  return Weights(params, arch, True, dimensions, branch, str(folder), about, inter)


def _json(path) -> dict:
  """{} where it is not there or torn: the weights were whole."""
  with contextlib.suppress(OSError, ValueError):
    return json.loads(path.read_text())
  return {}


def _file(path, branch, allow, in_chans, given) -> Weights:
  tensors, about, model = torch_files.read(path), torch_files.about(path), torch_files.recorded(path)
  nested = any(b in tensors for b in convert.BRANCHES)
  mine = branch if nested else about.get('branch', '')
  if branch and not nested and mine != branch:
    raise PortingError(f'the file holds one network, {mine or "of which nothing says whose"}, no {branch}')
  allow = [*allow, *_left_out(model)]
  parts = convert.split(tensors, branch or 'student')
  arch, inter = architectures.of_config(model['arch']) if model else None, (model or {}).get('inter') or {}
  if arch is None and given and parts['backbone']:
    arch = convert.inferred(parts['backbone'], in_chans) | architectures.of_config(given)
  inter = {} if 'inter' in allow else inter
  params, arch = convert.load(parts, arch, allow, in_chans, inter)
  if 'backbone' not in params:
    raise PortingError('holds no backbone')
  dimensions = (2, 3) if inter else architectures.dimensions(params['backbone'])
  keep = {name: about[name] for name in ('preprocessing', 'training') if name in about}
  recorded = bool(model or given) or 'batch_stats' in params      # a ResNet has no heads
  return Weights(params, arch, recorded, dimensions, mine or ('student' if nested else ''), str(path), keep, inter)


def _left_out(model: dict) -> list[str]:
  """What an export says that it lacks was left out by name."""
  return [f'{n}D' for n in (2, 3) if n not in model.get('dimensions', (2, 3))] + (
      ['decoder'] if not model.get('decoder', True) else [])


def digest(tree) -> str:
  """Hash of names, shapes and numbers of a tree of arrays: the same for a run and for what was exported from it."""
  found = hashlib.blake2b(digest_size=16)
  for name, tensor in sorted(named_leaves(tree).items()):
    found.update(f'{name} {tensor.shape} {tensor.dtype}'.encode())
    found.update(np.asarray(tensor).tobytes())
  return found.hexdigest()
