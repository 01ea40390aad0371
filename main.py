"""Pre-train: python main.py --config=configs/unimiss_plus.py[:preset] --workdir=DIR [--config.a.b=value]."""
import logging

from absl import app, flags
from ml_collections import config_flags

from unimiss_jax.cli.arguments import fail, parse

config_flags.DEFINE_config_file('config', None, 'FILE[:preset,key=value]', lock_config=True)
flags.DEFINE_string('workdir', None, 'Folder of the run; the same command continues it.')
flags.DEFINE_enum('resume', 'auto', ['auto', 'strict', 'force'],
                  'auto: fall back from a damaged checkpoint; strict: refuse; force: accept another config.')
flags.DEFINE_bool('print_config', False, 'Print the config and exit.')
flags.DEFINE_bool('debug', False, 'Show the traceback of a user error.')
flags.DEFINE_integer('preempt_exit_code', 0, 'Exit code after a save that SIGTERM or SIGUSR1 asked for.')
USAGE = ('usage: main.py --config=FILE[:preset,key=value] --workdir=DIR [--config.a.b=value] '
         '[--resume=auto|strict|force]')


def main(argv) -> int:
  f = flags.FLAGS
  if len(argv) > 1:
    return fail(f'unexpected argument {argv[1]}. {USAGE}', 2)
  if f.config is None:
    return fail(f'missing --config. {USAGE}', 2)
  if f.print_config:
    print(f.config)
    return 0
  if not f.workdir:
    return fail(f'missing --workdir. {USAGE}', 2)
  logging.basicConfig(level=logging.INFO, format='%(levelname).1s %(asctime)s %(message)s', datefmt='%H:%M:%S',
                      force=True)
  for noisy in ('absl', 'orbax', 'jax', 'tensorstore'):
    logging.getLogger(noisy).setLevel(logging.WARNING)
  from data_pipelines.errors import DataError  # late: a usage error should not wait for jax
  from unimiss_jax import train
  from unimiss_jax.checkpoint import CheckpointError
  from unimiss_jax.validate import ConfigError
  try:
    return train.train_and_evaluate(f.config, f.workdir, f.resume, f.preempt_exit_code)
  except (ConfigError, CheckpointError, DataError, train.TrainError) as e:
    if f.debug:
      raise
    return fail(e, 1)
  except OSError as e:    # a full disk, a vanished share
    if f.debug:
      raise
    return fail(f'{e}. What was saved before is in {f.workdir}; the same command continues from there', 1)
  except KeyboardInterrupt:
    return fail(f'interrupted; what was saved before is in {f.workdir}, the same command continues from there', 130)


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
