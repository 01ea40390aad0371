"""A run's folder: its config, its environment, its log file; another run's folder is refused."""
import hashlib
import importlib.metadata
import json
import logging
import platform
import sys

import jax
from etils import epath

from unimiss_jax.validate import ConfigError

FREE = ('mesh', 'log', 'eval', 'checkpoint')    # sections that may change between lives of a run
FREE_LEAVES = ('data.workers',)
RECORDS = 'records.json'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def flat(tree, prefix='') -> dict:
  """Nested dict -> {'a.b': value}; tuples as lists, as JSON has them."""
  out = {}
  for k, v in tree.items():
    if isinstance(v, dict):
      out |= flat(v, f'{prefix}{k}.')
    else:
      out[f'{prefix}{k}'] = list(v) if isinstance(v, tuple) else v
  return out


def binding(leaves: dict) -> dict:
  """The leaves that make two runs different runs."""
  return {k: v for k, v in leaves.items() if k.split('.')[0] not in FREE and k not in FREE_LEAVES}


def config_hash(config) -> str:
  text = json.dumps(binding(flat(config.to_dict())), sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def versions() -> dict[str, str]:
  return {p: importlib.metadata.version(p) for p in PACKAGES}


def claim(workdir, config, resume: str) -> None:
  """Makes the folder this run's; one process does.

  Raises:
    ConfigError: the folder holds a run with another config (unless resume='force').
  """
  folder = epath.Path(workdir)
  file = folder / 'config.json'
  mine = flat(config.to_dict())
  if file.exists() and _began(folder):
    theirs = binding(flat(json.loads(file.read_text())))
    ours = binding(mine)
    changed = [f'{k} {theirs.get(k, "(absent)")} -> {ours.get(k, "(absent)")}'
               for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
    if changed and resume != 'force':
      raise ConfigError(f'workdir {workdir} holds a run with another config: {"; ".join(changed)}. '
                        'FIX: use a new --workdir, or --resume=force to go on with the new config')
  folder.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True, default=str))
  (folder / 'env.json').write_text(json.dumps(environment(), indent=1))


def seen(workdir, config) -> None:
  """Raises ConfigError if this process does not see what process 0 has written there."""
  file = epath.Path(workdir) / 'config.json'
  if not file.exists() or flat(json.loads(file.read_text())) != flat(config.to_dict()):
    raise ConfigError(f'workdir {workdir} is not the same folder on all hosts. FIX: use one that they share, or gs://')


def _began(folder) -> bool:
  """Whether a run got as far as its first number; a folder of a failed start may be taken with another config."""
  metrics, saved = folder / 'metrics.jsonl', folder / 'checkpoints'
  return metrics.exists() and bool(metrics.read_text().strip()) or saved.exists() and any(saved.iterdir())


def finished(workdir, config) -> bool:
  """Whether the folder holds this very run, complete."""
  done = epath.Path(workdir) / 'DONE'
  return done.exists() and json.loads(done.read_text()) == config_hash(config)


def finish(workdir, config) -> None:
  (epath.Path(workdir) / 'DONE').write_text(json.dumps(config_hash(config)))


def keep_records(workdir, listings: dict) -> None:
  """Writes records.json, {stream or 'manifest': rows}: what a later life compares its records with, to name the
  difference."""
  file = epath.Path(workdir) / RECORDS
  part = file.with_name(f'{RECORDS}.part')
  part.write_text(json.dumps(listings))
  part.replace(file)


def records(workdir) -> dict:
  """What `keep_records` wrote; {} where nothing is, or something torn."""
  try:
    return json.loads((epath.Path(workdir) / RECORDS).read_text())
  except (OSError, ValueError):
    return {}


def continued() -> tuple[str, ...]:
  """Small files that a later life of a run appends to."""
  return 'metrics.jsonl', log_file()


def environment() -> dict:
  return {'python': platform.python_version(), 'platform': platform.platform(), 'packages': versions(),
          'devices': [' '.join(dict.fromkeys((d.platform, d.device_kind))) for d in jax.devices()],
          'hosts': jax.process_count(), 'command': sys.argv}


def log_file() -> str:
  return f'logs/host_{jax.process_index()}.txt'


def log_to(local) -> logging.Handler:
  """Also writes every log line of this process to logs/host_<i>.txt below a local folder."""
  file = local / log_file()
  file.parent.mkdir(parents=True, exist_ok=True)
  handler = logging.FileHandler(file)
  handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
  logging.getLogger().addHandler(handler)
  return handler
