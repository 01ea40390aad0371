"""Checkpoints: state and data positions in one save, asynchronous; the only file that imports orbax.

A damaged newest checkpoint is never deleted: the next older one is taken with a warning, or the run
is refused (--resume=strict).
"""
import logging

import jax
import orbax.checkpoint as ocp
from etils import epath


class CheckpointError(Exception):
  """Nothing to restore from, or not what was asked for; the message says what to do."""


class Checkpoints:
  """`<workdir>/checkpoints/<step>/{state,meta}`; the last `keep` are kept."""

  def __init__(self, workdir, keep: int):
    self.folder = epath.Path(workdir).resolve() / 'checkpoints'
    self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True))

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, meta: dict) -> None:
    """Starts the save of `state` at `step`; call it before the next batch is taken."""
    if step not in self._manager.all_steps():
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)), force=True)

  def restore(self, template, strict: bool = False):
    """Newest readable (state, meta), or None where there is no checkpoint at all.

    Args:
      template: tree of jax.ShapeDtypeStruct with shardings.
      strict: refuse when the newest one is damaged.

    Raises:
      CheckpointError: none is readable, or the newest is not and `strict`.
    """
    steps = self.steps()
    for step, older in zip(reversed(steps), [*reversed(steps[:-1]), None]):
      try:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args)
        return found.state, found.meta
      except Exception as e:      # TensorStore and Orbax raise plain exceptions for torn files
        reason = ' '.join(str(e).split())[:200]
        if strict or older is None:
          raise CheckpointError(f'checkpoint {self.folder / str(step)} unreadable ({reason}). FIX: --resume=auto takes '
                                'an older one where there is one, else move the folder away to start anew') from e
        logging.warning('checkpoint %d unreadable (%s); continuing from %d; nothing was deleted', step, reason, older)
    return None

  def wait(self) -> None:
    """Until all saves are on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()


def template(abstract, shardings):
  """Shapes, dtypes and shardings to restore into."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
