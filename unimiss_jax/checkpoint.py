"""Checkpoints: state and data positions in one save, asynchronous; the only file that imports orbax.

A damaged newest checkpoint is never deleted: it is moved aside and the next older one is taken with a
warning, or the run is refused (--resume=strict). With several processes all of them take the same one.
"""
import contextlib
import hashlib
import json
import logging
import sys
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from unimiss_jax import processes
from unimiss_jax.optim import named_leaves

# Orbax would cut every replicated tensor into a piece per device: one compilation for each shape, which stops the loop
# for many seconds at the first save. The models are small: one replica writes.
logging.getLogger('absl').disabled = True      # it warns that this replaces something
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True)
logging.getLogger('absl').disabled = False
META = 'meta/metadata'      # where orbax puts a JSON item


def quiet() -> None:
  """Of a save that fails these libraries tell once for every tensor; CheckpointError tells once."""
  for name in ('absl', 'asyncio', 'orbax'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore', r"coroutine '.*write_fragment' was never awaited", RuntimeWarning)
  show = sys.unraisablehook
  sys.unraisablehook = lambda a: None if 'Event loop is closed' in str(a.exc_value) else show(a)


class CheckpointError(Exception):
  """Nothing to restore from, or not what was asked for, or it could not be written; the message says what to do."""


class Checkpoints:
  """`<folder>/<step>/{state,meta}`; the last `keep` are kept."""

  def __init__(self, folder, keep: int):
    self.folder = absolute(folder)
    several = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.folder.name)
    self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True,
        multiprocessing_options=several))

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, meta: dict) -> None:
    """Starts the save of `state` at `step`; it returns when the state is copied, the files are written meanwhile."""
    with _writing(self.folder / str(step)):
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          meta=ocp.args.JsonSave(meta | {'shapes': shapes_hash(state)})), force=True)

  def restore(self, template, strict: bool = False, accept=lambda meta: None):
    """Newest readable (state, meta), or None where there is no checkpoint at all.

    Args:
      template: tree of jax.ShapeDtypeStruct with shardings.
      strict: refuse when the newest one is damaged.
      accept: meta -> why a readable checkpoint does not belong to this run, or None.

    Raises:
      CheckpointError: none is readable, the newest is not and `strict`, or it belongs to another model or run.
    """
    steps = processes.gather(self.steps())[0]      # a network file system may show each process another list
    damaged = {}
    for step in reversed(steps):
      folder = self.folder / str(step)
      meta, reason = _try(lambda f=folder: _meta(f))
      if not reason:
        if meta['shapes'] != shapes_hash(template):
          raise CheckpointError(f'checkpoint {folder} holds tensors of other names or shapes than '
                                'this config needs. FIX: use the config of the run, or a new --workdir')
        if refused := accept(meta):
          raise CheckpointError(f'checkpoint {folder} {refused}')
        state, reason = _try(lambda f=folder: _read(f / 'state', template))
      if not reason:
        for bad, why in damaged.items():
          logging.warning('checkpoint %d unreadable (%s); continuing from %d; nothing was deleted, it lies in %s',
                          bad, why, step, self._set_aside(bad))
        return state, meta
      damaged[step] = reason
      if strict or step == steps[0]:
        raise CheckpointError(f'checkpoint {folder} unreadable ({reason}). FIX: --resume=auto takes an older one where '
                              'there is one, else use a new --workdir')
    return None

  def meta(self, step: int) -> dict:
    return _meta(self.folder / str(step))

  def _set_aside(self, step: int) -> str:
    """Moves a damaged checkpoint out of the way, so that its step can be saved again."""
    def move():
      aside = self.folder.parent / 'damaged'
      aside.mkdir(parents=True, exist_ok=True)
      n = sum(1 for p in aside.iterdir() if p.name.startswith(f'{step}-'))
      (self.folder / str(step)).rename(aside / f'{step}-{n}')
      return str(aside / f'{step}-{n}')
    aside = processes.on_main(move)
    self._manager.reload()
    return aside

  def check(self) -> None:
    """Raises CheckpointError if a save in the background has failed."""
    with _writing(self.folder):
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Until all saves are on disk."""
    with _writing(self.folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._manager.close()


@contextlib.contextmanager
def _writing(what):
  """Whatever goes wrong in a save (Orbax and TensorStore raise plain exceptions) becomes a CheckpointError."""
  try:
    yield
  except Exception as e:
    raise CheckpointError(f'{what} could not be written ({" ".join(str(e).split())[:300]}). FIX: make room or mend the '
                          'disk; what was saved before is kept, the same command continues from there') from e


def _try(read):
  """(read(), None), or (None, why a file is damaged): on all processes if on one of them. What has nothing to do with
  the file (memory, rights, the network) is raised."""
  result = reason = None
  try:
    result = read()
  except (PermissionError, TimeoutError, ConnectionError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:      # TensorStore and Orbax raise plain exceptions for torn files
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:200]
  reasons = [r for r in processes.gather(reason) if r]
  return (None, reasons[0]) if reasons else (result, None)


def _meta(folder) -> dict:
  meta = read_meta(folder)
  if missing := {'shapes', 'positions', 'config_hash'} - meta.keys():
    raise ValueError(f'its meta lacks {", ".join(sorted(missing))}')
  return meta


def read_meta(folder) -> dict:
  """What a step folder says of itself."""
  return json.loads((folder / META).read_text())


def _alone(handler):
  """A reader for which no process waits for another, so that a failure of one is noticed by all."""
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me},
                                               barrier_sync_key_prefix=f'process{me}')
  return ocp.Checkpointer(handler(multiprocessing_options=options), multiprocessing_options=options)


def _read(folder, template):
  """The state of one checkpoint, placed as `template` says."""
  return _alone(ocp.StandardCheckpointHandler).restore(folder, args=ocp.args.StandardRestore(template))


def newest(path) -> epath.Path | None:
  """The step folder that a path means: itself, or the newest complete one of a run; None where there is none."""
  path = absolute(path)
  if (path / 'state').exists():
    return path
  for folder in (path / 'checkpoints', path):
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    if steps:
      return folder / str(max(steps))
  return None


def read_params(folder, branch: str = 'student') -> dict[str, np.ndarray]:
  """The weights of a step folder, whatever devices wrote it: {'backbone/...': array}; with 'batch_stats/...', if any.

  Args:
    folder: a step folder.
    branch: 'student' = what is trained, 'teacher' = its moving average.

  Raises:
    CheckpointError: it cannot be read, or the run has no teacher.
  """
  reader, student = _alone(ocp.PyTreeCheckpointHandler), branch == 'student'
  try:
    whole = reader.metadata(folder / 'state').item_metadata.tree
    found = whole['params'] if student else (whole.get('extra') or {}).get(branch)
    if not found:
      raise CheckpointError(f'checkpoint {folder} has no {branch}: the run has no self-distillation. FIX: '
                            '--branch=student')
    tree = {'params': found} if student else {'extra': {branch: found}}
    if counted := student and (whole.get('extra') or {}).get('batch_stats'):
      tree['extra'] = {'batch_stats': counted}
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    args = ocp.args.PyTreeRestore(item=tree, restore_args=plain, partial_restore=True)
    tree = reader.restore(folder / 'state', args=args)
  except CheckpointError:
    raise
  except Exception as e:
    raise CheckpointError(f'checkpoint {folder} unreadable ({" ".join(str(e).split())[:200]}). FIX: name another one, '
                          '<run>/checkpoints/<step>') from e
  return named_leaves(tree['params'] | tree.get('extra', {}) if student else tree['extra'][branch])


def absolute(folder) -> epath.Path:
  """A local folder made absolute, as orbax wants it."""
  folder = epath.Path(folder)
  return folder if '://' in str(folder) else folder.resolve()


def shapes_hash(tree) -> str:
  """Of names, shapes and dtypes of a tree."""
  text = sorted(f'{n} {tuple(x.shape)} {x.dtype}' for n, x in named_leaves(tree).items())
  return hashlib.blake2b('\n'.join(text).encode(), digest_size=8).hexdigest()


def template(abstract, shardings):
  """Shapes, dtypes and shardings to restore into."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
