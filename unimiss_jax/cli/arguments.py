"""Flags of the programs, and a one-line answer to a wrong one."""
import difflib
import functools
import importlib.util
import json
import logging
import operator
import os
import re
import shlex
import sys

from absl import flags

from data_pipelines.command import fail
from data_pipelines.errors import DataError

PROGRAM, SETTINGS = 'main.py', 'launch.env'
START = f'set -a; . ./{SETTINGS}; set +a; exec "$@"'      # sh -c START - COMMAND: with the settings of the project
ASSUMED = 'num_heads', 'decoder_heads', 'volume_size'


def parse(argv):
  """Flag parser for app.run: exits with 2 and one line on an unknown key (with the nearest), type or preset."""
  file = config_file(argv)
  if file and not os.path.exists(file.partition(':')[0]):
    sys.exit(fail(f'--config={file}: no such file; the shipped ones are in configs/', 2))
  try:
    return flags.FLAGS(argv)
  except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as e:
    sys.exit(fail(reason(argv, e), 2))


def run(work, debug: bool) -> int:
  """Exit code of a command that prints what it logs.

  Args:
    work: does it and returns the code, None = 0. What it raises is told in one line.
    debug: it is raised instead.
  """
  logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout, force=True)
  for noisy in ('jax', 'absl', 'orbax'):
    logging.getLogger(noisy).setLevel(logging.ERROR)
  try:
    return work() or 0
  except Exception as e:
    if debug:
      raise
    from unimiss_jax.checkpoint import CheckpointError  # late: a usage error should not wait for jax
    from unimiss_jax.porting.errors import PortingError
    known = isinstance(e, (CheckpointError, PortingError, DataError, OSError))
    return fail(e if known else f'unforeseen {type(e).__name__}: {e}. --debug shows where', 1)


def add_weights(p) -> None:
  """The flags of programs that read weights of any kind: the arguments of `weights.read`."""
  p.add_argument('--branch', default='', choices=('', 'student', 'teacher'), help='where there are both')
  p.several('--allow', (), (), help='parts (decoder, head) or pieces of names that may be missing or surplus; 3D takes '
            'a 2D-only file, 2D a 3D-only one')
  p.add_argument('--in_chans', default='strict', choices=('strict', 'sum', 'repeat'),
                 help='what to do with other input channels than 3 and 1')
  p.add_argument('--arch', type=_fields, default={}, help='what a file does not record, as JSON: '
                 '{"num_heads": [1, 2, 4, 8], "decoder_heads": [4, 2, 1], "volume_size": [16, 96, 96]}')


def _fields(text) -> dict:
  found = json.loads(text)
  if not isinstance(found, dict):
    raise ValueError(text)
  return found


def tell_assumed(found, arch: dict) -> None:
  """Warns of weights that do not say how many heads they have.

  Args:
    found: `weights.Weights`.
    arch: all its fields.
  """
  if not found.recorded:
    logging.warning('%s does not record heads and the depth of volumes: assuming %s. FIX: --arch, if that is wrong',
                    found.source, {k: arch[k] for k in ASSUMED if k in arch})


def config_file(argv) -> str | None:
  return next((a.split('=', 1)[1] for a in argv if re.match(r'--?config=', a)), None)


def reason(argv, error) -> str:
  """What was wrong with the command line."""
  text = ' '.join(str(error).split())
  if 'Error whilst parsing config file' in text:      # the last of the traceback's lines says it
    return re.sub(r'.*?\b\w*(Error|Exception): ', '', text.split('Traceback')[-1])
  file = config_file(argv)
  return isinstance(error, (KeyError, AttributeError)) and file and unknown_key(file, argv) or text


def unknown_key(file: str, argv) -> str | None:
  """The first --config.a.b that the config of `file` has not, with the nearest that it has."""
  known = leaves(load(file))
  for key in (m[1] for a in argv if (m := re.match(r'--?config\.([\w.]+)', a))):
    if key not in known:
      near = difflib.get_close_matches(key, known, 1, 0.)
      return f'config key "{key}" unknown; did you mean "{near[0]}"?'
  return None


def load(file: str):
  """Config of FILE[:arg] without overrides."""
  path, _, arg = file.partition(':')
  return module(path).get_config(*([arg] if arg else []))


def module(path: str):
  """A Python file of configs/, executed."""
  spec = importlib.util.spec_from_file_location('config_file', path)
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


def leaves(config, prefix='') -> list[str]:
  out = []
  for k, v in config.items():
    out += leaves(v, f'{prefix}{k}.') if hasattr(v, 'items') else [prefix + k]
  return out


def shown(config) -> list[str]:
  """A line for every leaf, as it can be given to main.py again: --config.views.ct.size='(16, 96, 96)'."""
  values = {name: str(functools.reduce(operator.getitem, name.split('.'), config)) for name in leaves(config)}
  quoted = lambda text: f'"{text}"' if "'" in text and not set(text) & set('"$`!\\') else shlex.quote(text)
  return [f'--config.{name}={quoted(text)}' for name, text in values.items()]
