"""Who makes the shards: processes of this machine, or Apache Beam on a cluster; every one ends with the same bytes."""
import concurrent.futures
import contextlib
import multiprocessing
import threading
from concurrent.futures.process import BrokenProcessPool

from data_pipelines import files, preparation
from data_pipelines.errors import DataError


def todo(out, made: dict, only: int | None = None) -> dict:
  """{Unit: rows} of the shards that are missing.

  Args:
    out: the prepared folder.
    made: the plan.
    only: number of the one shard of each kind and split to make.
  """
  return {u: rows for u, rows in preparation.units(made).items()
          if (only is None or u.shard == only) and not preparation.finished(out, u)}


def pool(out, jobs: dict, config, workers: int) -> None:
  """Makes shards, each in one process.

  Args:
    out: the prepared folder.
    jobs: {Unit: rows}.
    config: preparation.Config.
    workers: processes; 0 = in this one.

  Raises:
    DataError: WRITE or WORKER; finished shards are kept.
  """
  total, workers = sum(map(len, jobs.values())), min(workers, len(jobs))
  files.say(f'{out}: {len(jobs)} shards to make from {total} files, {max(1, workers)} workers')
  context = multiprocessing.get_context('spawn')
  count = context.Value('q', 0)
  with _watched(count, total), writing(out):
    if not workers:
      for unit, rows in jobs.items():
        preparation.make_shard(out, unit, rows, config, count)
      return
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (count,)) as processes:
      try:
        # The largest first: the last one to end is then a small one.
        order = sorted(jobs, key=lambda u: (-len(jobs[u]), u))
        for job in concurrent.futures.as_completed([processes.submit(_work, out, u, jobs[u], config) for u in order]):
          job.result()
      finally:
        processes.shutdown(cancel_futures=True)


def beam(out, jobs: dict, config, options=()) -> None:
  """Makes shards as elements of a Beam pipeline (extra `[beam]`).

  Args:
    out: the prepared folder, which all machines see.
    jobs: {Unit: rows}.
    config: preparation.Config.
    options: flags of the runner, '--runner=DirectRunner' by default.

  Raises:
    DataError: BEAM (not installed), WRITE; finished shards are kept.
  """
  try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as e:
    raise DataError('BEAM', out, f'Apache Beam is not installed ({e})', 'pip install "unimiss_jax[beam]"') from e
  files.say(f'{out}: {len(jobs)} shards to make from {sum(map(len, jobs.values()))} files, Apache Beam '
            f'{apache_beam.__version__}')
  work = [(str(out), unit, rows, config) for unit, rows in sorted(jobs.items())]
  with writing(out), apache_beam.Pipeline(options=PipelineOptions(list(options) or ['--runner=DirectRunner'])) as p:
    _ = p | apache_beam.Create(work) | apache_beam.Reshuffle() | apache_beam.MapTuple(preparation.make_shard)


@contextlib.contextmanager
def writing(out):
  """Whatever goes wrong becomes a DataError."""
  try:
    yield
  except BrokenProcessPool as e:
    raise DataError('WORKER', out, 'a worker process was killed (memory?)',
                    'use fewer --workers; the same command goes on with what is left') from e
  except DataError:
    raise
  except Exception as e:      # a full disk; array_record and Beam raise plain exceptions
    raise DataError('WRITE', out, f'{type(e).__name__}: {e}'[:300],
                    'make room; the same command goes on with what is left') from e


_count = None


def _begin(count) -> None:
  global _count
  _count = count
  files.single_threaded_blas()


def _work(out, unit, rows, config) -> None:
  preparation.make_shard(out, unit, rows, config, _count)


@contextlib.contextmanager
def _watched(count, total: int):
  """Shows progress while processes count."""
  progress, over = files.Progress('prepare', total), threading.Event()

  def look():
    while not over.wait(.5):
      progress.reach(count.value)
  thread = threading.Thread(target=look, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
