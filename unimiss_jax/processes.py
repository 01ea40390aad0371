"""Several processes as one program: how they start, agree, stop together and never wait for a dead one.

Engine: jax.distributed. A process joins by flags or by what its scheduler says (TPU, Slurm, GKE, Open MPI); then the
same code runs everywhere, and whatever only one of them can know goes through `together` or `agree`.
"""
import importlib.util
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time

import jax
from jax._src import distributed  # its store, its barrier and the coordinator's address have no public name
from jax.experimental import multihost_utils

BARRIER_S = 1800      # start-up: the machines of a pod come up minutes apart
SCHEDULERS = (        # variable -> is there more than this process?
    ('SLURM_STEP_NUM_TASKS', lambda v: int(v) > 1),
    ('OMPI_COMM_WORLD_SIZE', lambda v: int(v) > 1),
    ('TPU_WORKER_HOSTNAMES', lambda v: ',' in v),          # GKE
    ('MEGASCALE_NUM_SLICES', lambda v: int(v) > 1),
    ('JOB_COMPLETION_INDEX', lambda v: importlib.util.find_spec('kubernetes') is not None),
)
HOST = socket.gethostname()
LAST_S = 2            # in which the others say what is wrong, if they know it
SHOWN = 3             # names in a message
_calls = itertools.count()


class ProcessError(Exception):
  """This process is not at fault, but cannot go on alone; the message says which one is."""


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Makes this process one of several; a no-op where nothing asks for it. Call it before jax touches a device.

  Args:
    coordinator: host:port of process 0; with it num_processes and process_id are needed too.

  Raises:
    ProcessError: the flags contradict each other, or the others did not come within half an hour.
  """
  given = coordinator, num_processes, process_id
  flags = '--coordinator=HOST:PORT --num_processes=N --process_id=I'
  if any(g is not None for g in given):
    if None in given:
      raise ProcessError(f'all three or none of {flags} must be given')
    if ':' not in coordinator or not 0 <= process_id < num_processes:
      raise ProcessError(f'--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: '
                         f'needs HOST:PORT and 0 <= I < N in {flags}')
  elif not (found := scheduler()):
    return
  else:
    logging.info('looking for other processes, as %s says', found)
  try:
    jax.distributed.initialize(*given, initialization_timeout=BARRIER_S)
  except Exception as e:
    raise ProcessError(f'the processes did not find each other ({" ".join(str(e).split())[:200]}). FIX: check that all '
                       f'were started and reach process 0, or give {flags}') from e
  if not main():      # on a terminal that all share only process 0 tells of progress; warnings come from each
    for handler in logging.getLogger().handlers:
      handler.setLevel(logging.WARNING)


def scheduler() -> str | None:
  """What says that a scheduler started several processes: an environment variable, or a Cloud TPU."""
  for name, several in SCHEDULERS:
    try:
      if name in os.environ and several(os.environ[name]):
        return name
    except ValueError:
      continue
  if 'JOB_COMPLETION_INDEX' in os.environ:
    logging.warning('JOB_COMPLETION_INDEX is set: if this Kubernetes job has several pods, each of them trains alone. '
                    'FIX: pip install kubernetes, or give --coordinator --num_processes --process_id')
  if importlib.util.find_spec('libtpu') and any(os.path.exists(f'/dev/{d}') for d in ('accel0', 'vfio/0')):
    return 'the TPU of this machine'      # jax asks its metadata server, alone or not
  return None


def main() -> bool:
  """Whether this process is the one that writes files and talks."""
  return jax.process_index() == 0


def called(i: int, host: str) -> str:
  """How messages call process i, which runs on `host`."""
  return f'process {i} ({host})'


def some(names: list[str]) -> str:
  """'a, b, c and 5 more'."""
  more = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (f' and {more} more' if more > 0 else '')


def me() -> str:
  """'process 3 (node17): ' before what this process says to people; '' for a process alone."""
  return f'{called(distributed.global_state.process_id, HOST)}: ' if jax.distributed.is_initialized() else ''


def gather(value) -> list:
  """[value of process 0, of process 1, ...]; JSON values; every process must call it.

  Through the store of the coordinator, no collective of devices: it works before anyone knows whether these fit
  together.
  """
  count = jax.process_count()
  if count == 1:
    return [value]
  store, call, mine = distributed.global_state.client, next(_calls), jax.process_index()
  store.key_value_set(f'unimiss_jax/{call}/{mine}', json.dumps(value))
  meet(f'gather {call}')
  found = {int(key.rsplit('/', 1)[1]): text for key, text in store.key_value_dir_get(f'unimiss_jax/{call}/')}
  meet(f'gathered {call}')      # whoever fails because of what it read does not go before the others have read it
  store.key_value_delete(f'unimiss_jax/{call}/{mine}')
  return [json.loads(found[i]) for i in range(count)]


def meet(name: str, seconds: int = 6 * 3600) -> None:
  """Until all processes are here. Through the coordinator: in a collective of devices an early one may not wait long
  (half a minute on CPUs), and what they do alone, reading scans or compiling, can take them minutes more or less."""
  if jax.process_count() > 1:
    distributed.global_state.client.wait_at_barrier(f'unimiss_jax {name}', 1000 * seconds)


def together(f):
  """f() on every process, which must not communicate; if it raises on one, all raise.

  Returns:
    f() of this process.

  Raises:
    ProcessError: f raised elsewhere only.
  """
  result = error = None
  try:
    result = f()
  except Exception as e:
    error = e
  said = ' '.join(str(error).split()) or type(error).__name__ if error else None
  failed = [(called(i, host), text) for i, (host, text) in enumerate(gather([HOST, said])) if text]
  if error:
    raise error
  if failed:
    raise ProcessError(f'{some([who for who, text in failed if text == failed[0][1]])}: {failed[0][1]}')
  return result


def on_main(f):
  """f() on process 0 alone, its value (JSON) and its error everywhere."""
  return gather(together(f if main() else lambda: None))[0]


class StopSignal:
  """SIGTERM or SIGUSR1 asks for a save and an orderly end after the current step.

  With several processes a signal to one of them stops all at the same step: jax's preemption service listens to
  SIGTERM (a handler of ours would silence it) and agrees on the step; SIGUSR1 is passed on to it.
  """

  def __init__(self):
    self.received = None
    self.several = jax.process_count() > 1
    signals = (signal.SIGUSR1,) if self.several else (signal.SIGTERM, signal.SIGUSR1)
    self._former = {s: signal.signal(s, self._set) for s in signals}

  def _set(self, number, frame):
    self.received = signal.Signals(number).name
    if self.several:
      os.kill(os.getpid(), signal.SIGTERM)

  def asked(self, step: int) -> str | None:
    """After `step` steps, on every process: why to stop now, or None."""
    if not self.several:
      return self.received
    return 'preemption' if multihost_utils.reached_preemption_sync_point(step) else None

  def restore(self):
    for s, handler in self._former.items():
      signal.signal(s, handler)


def coordinator_host() -> str:
  """By which the others reach process 0."""
  return distributed.global_state.coordinator_address.rsplit(':', 1)[0].strip('[]')


def leave(code: int) -> int:
  """Exit code of a failed process; with several, it ends here, so that the others see it and end too."""
  if jax.distributed.is_initialized():
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.global_state.process_id == 0:      # jax ends the others with it, in words of its own
      time.sleep(LAST_S)
    os._exit(code)
  return code
