"""Pre-train: python main.py --config=configs/unimiss_plus.py[:preset] --workdir=DIR [--config.a.b=value]."""
import logging
import traceback

from absl import app, flags
from ml_collections import config_flags

from unimiss_jax.cli.arguments import fail, parse, shown

config_flags.DEFINE_config_file('config', None, 'FILE[:preset,key=value]', lock_config=True)
flags.DEFINE_string('workdir', None, 'Folder of the run; the same command continues it.')
flags.DEFINE_enum('resume', 'auto', ['auto', 'strict', 'force'],
                  'auto: fall back from a damaged checkpoint; strict: refuse; force: accept another config.')
flags.DEFINE_bool('print_config', False, 'Print every leaf of the config as a flag, and exit.')
flags.DEFINE_bool('debug', False, 'Show the traceback of a user error.')
flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where no scheduler says it.')
flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
flags.DEFINE_integer('process_id', None, 'Which of them this one is.')
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
    print(*shown(f.config), sep='\n')
    return 0
  if not f.workdir:
    return fail(f'missing --workdir. {USAGE}', 2)
  logging.basicConfig(level=logging.INFO, format='%(levelname).1s %(asctime)s %(message)s', datefmt='%H:%M:%S',
                      force=True)
  logging.getLogger('jax').setLevel(logging.WARNING)
  from data_pipelines.errors import DataError  # late: a usage error should not wait for jax
  from unimiss_jax import processes, train
  from unimiss_jax.checkpoint import CheckpointError, quiet
  from unimiss_jax.validate import ConfigError
  quiet()
  continues = f'What was saved before is in {f.workdir}; the same command continues from there'
  try:
    processes.join(f.coordinator, f.num_processes, f.process_id)
    return train.train_and_evaluate(f.config, f.workdir, f.resume, f.preempt_exit_code)
  except KeyboardInterrupt:
    code = fail(f'interrupted. {continues}', 130)
  except Exception as e:
    said = isinstance(e, (ConfigError, CheckpointError, DataError, processes.ProcessError, train.TrainError))
    if f.debug or not said and not isinstance(e, OSError):    # OSError: a full disk, a vanished share
      traceback.print_exc()
      code = 1
    else:
      told = e if said else f'{e}. {continues}'
      code = fail(told if isinstance(e, processes.ProcessError) else f'{processes.me()}{told}', 1)
  return processes.leave(code)


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
