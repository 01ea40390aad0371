"""Pre-train: python main.py --config=configs/unimiss_plus.py[:preset] --workdir=DIR [--config.a.b=value]."""
import difflib
import logging
import os
import re
import sys

from absl import app, flags
from ml_collections import config_flags

config_flags.DEFINE_config_file('config', None, 'FILE[:preset,key=value]', lock_config=True)
flags.DEFINE_string('workdir', None, 'Folder of the run; the same command continues it.')
flags.DEFINE_enum('resume', 'auto', ['auto', 'strict', 'force'],
                  'auto: fall back from a damaged checkpoint; strict: refuse; force: accept another config.')
flags.DEFINE_bool('print_config', False, 'Print the config and exit.')
flags.DEFINE_bool('debug', False, 'Show the traceback of a user error.')
flags.DEFINE_integer('preempt_exit_code', 0, 'Exit code after a save that SIGTERM or SIGUSR1 asked for.')
USAGE = 'usage: main.py --config=FILE[:preset,key=value] --workdir=DIR [--config.a.b=value] [--resume=auto|strict|force]'


def run(argv) -> int:
  f = flags.FLAGS
  if f.config is None or len(argv) > 1 or not (f.workdir or f.print_config):
    what = f'unexpected argument {argv[1]}' if len(argv) > 1 else 'missing --' + ('config' if f.config is None else 'workdir')
    return fail(f'{what}. {USAGE}', 2)
  if f.print_config:
    print(f.config)
    return 0
  logging.basicConfig(level=logging.INFO, format='%(levelname).1s %(asctime)s %(message)s', datefmt='%H:%M:%S', force=True)
  for noisy in ('absl', 'orbax', 'jax', 'tensorstore'):
    logging.getLogger(noisy).setLevel(logging.WARNING)
  from data_pipelines.errors import DataError
  from unimiss_jax import train
  from unimiss_jax.checkpoint import CheckpointError
  from unimiss_jax.validate import ConfigError
  try:
    return train.train_and_evaluate(f.config, f.workdir, f.resume, f.preempt_exit_code)
  except (ConfigError, CheckpointError, DataError, train.TrainError) as e:
    if f.debug:
      raise
    return fail(str(e), 1)


def parse(argv):
  """Flag parsing with a one-line answer to a wrong key, type or preset."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as e:
    text = ' '.join(str(e).split())
    key = re.search(r'--config\.([\w.]+)', text + ' ' + ' '.join(argv))
    sys.exit(fail(f'{text}' if key is None or key[1] in text else f'config key "{key[1]}": {text}', 2))


def fail(text: str, code: int) -> int:
  print('ERROR ' + text, file=sys.stderr)
  return code


if __name__ == '__main__':
  app.run(run, flags_parser=parse)
