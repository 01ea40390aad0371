"""Who makes the shards: processes of this machine, or Apache Beam on a cluster; every one ends with the same bytes."""
import contextlib

from data_pipelines import files, preparation
from data_pipelines import workers as processes
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
  """Makes shards, each in one process; a process that dies costs its own shard.

  Args:
    out: the prepared folder.
    jobs: {Unit: rows}.
    config: preparation.Config.
    workers: processes; 0 = in this one.

  Raises:
    DataError: WRITE or WORKER; finished shards are kept.
  """
  order = sorted(jobs, key=lambda u: (-len(jobs[u]), u))      # the largest first: the last one to end is then small
  done, total, dead = 0, sum(map(len, jobs.values())), []
  files.say(f'{out}: {len(jobs)} shards to make from {total} files, {max(1, min(workers, len(jobs)))} workers')
  progress = files.Progress('prepare', total)
  for i, fault in processes.run(_shard, [(str(out), u, jobs[u], config) for u in order], workers):
    done += len(jobs[order[i]])
    progress.reach(done)
    if isinstance(fault, processes.Died):
      dead.append(f'{order[i].name} (exit code {fault.code})')
    elif fault:
      raise fault
  if dead:
    raise DataError('WORKER', out, f'{len(dead)} processes were killed (memory?) over {", ".join(dead[:4])}',
                    'use fewer --workers; the same command makes those shards')


def _shard(job) -> DataError | None:
  """The shard, or why it could not be written."""
  files.single_threaded_blas()
  try:
    with writing(job[0]):
      preparation.make_shard(*job)
  except DataError as e:
    return e


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
  except DataError:
    raise
  except Exception as e:      # a full disk; array_record and Beam raise plain exceptions
    raise DataError('WRITE', out, f'{type(e).__name__}: {e}'[:300],
                    'make room; the same command goes on with what is left') from e
