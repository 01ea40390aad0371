"""Work spread over processes of which each may die: a dead one costs its own job, and another takes its place.

(The pools of the standard library lose all jobs when one process is killed, and do not say whose it was.)
"""
import collections
import contextlib
import multiprocessing
import os
from multiprocessing import connection
from typing import NamedTuple

THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


class Died(NamedTuple):
  """In place of a result: the process ended over this job, with this exit code (-9: killed by signal 9)."""
  code: int | None


def run(function, jobs, workers: int):
  """Yields (index of a job, function(job)), in the order in which they are done.

  Args:
    function: importable, without state; it may not raise.
    jobs: list; jobs and results can be pickled.
    workers: processes, which start anew (spawn) and compute with one thread each; 0: in this process.
  """
  if not workers:
    yield from ((i, function(job)) for i, job in enumerate(jobs))
    return
  waiting, busy = collections.deque(range(len(jobs))), {}    # connection -> (process, index of its job)
  try:
    for _ in range(min(workers, len(jobs))):
      line, process = _start(function)
      busy[line] = process, None
      _next(line, busy, waiting, jobs)
    while busy:
      for line in connection.wait(list(busy)):
        process, index = busy[line]
        try:
          result = line.recv()
        except (EOFError, OSError):
          process.join()
          result = Died(process.exitcode)
          line.close()
          del busy[line]
          if waiting:
            line, process = _start(function)
        if waiting or line in busy:
          busy[line] = process, None
          _next(line, busy, waiting, jobs)
        yield index, result
  finally:
    for line, (process, _) in busy.items():
      line.close()
      process.terminate()
      process.join()


def _next(line, busy: dict, waiting, jobs) -> None:
  """Gives a process its next job, or sends it home."""
  process, _ = busy[line]
  if waiting:
    busy[line] = process, waiting.popleft()
    with contextlib.suppress(OSError):    # it has died already: its line says so when it is asked
      line.send(jobs[busy[line][1]])
    return
  with contextlib.suppress(OSError):
    line.send(None)
  process.join()
  line.close()
  del busy[line]


def _start(function):
  ours, theirs = multiprocessing.get_context('spawn').Pipe()
  process = multiprocessing.get_context('spawn').Process(target=_serve, args=(theirs, function), daemon=True)
  with _one_thread():
    process.start()
  theirs.close()    # or nobody would notice its end
  return ours, process


@contextlib.contextmanager
def _one_thread():
  before = {name: os.environ.get(name) for name in THREADS}
  os.environ.update(dict.fromkeys(THREADS, '1'))
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def _serve(line, function) -> None:
  with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
    while (job := line.recv()) is not None:
      line.send(function(job))
