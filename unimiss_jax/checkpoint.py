"""Checkpoints: state and data positions in one save, asynchronous; the only file that imports orbax.

A damaged newest checkpoint is never deleted: it is moved aside and the next older one is taken with a
warning, or the run is refused (--resume=strict).
"""
import hashlib
import logging

import jax
import orbax.checkpoint as ocp
from etils import epath

from unimiss_jax.optim import named_leaves


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
    """Starts the save of `state` at `step`; call it before the next batch is used."""
    if step not in self._manager.all_steps():
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          meta=ocp.args.JsonSave(meta | {'shapes': shapes_hash(state)})), force=True)

  def restore(self, template, strict: bool = False):
    """Newest readable (state, meta), or None where there is no checkpoint at all.

    Args:
      template: tree of jax.ShapeDtypeStruct with shardings.
      strict: refuse when the newest one is damaged.

    Raises:
      CheckpointError: none is readable, the newest is not and `strict`, or it belongs to another model.
    """
    steps = self.steps()
    for step, older in zip(reversed(steps), [*reversed(steps[:-1]), None]):
      try:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if meta['shapes'] != shapes_hash(template):
          raise CheckpointError(f'checkpoint {self.folder / str(step)} holds tensors of other names or shapes than '
                                'this config needs. FIX: use the config of the run, or a new --workdir')
        args = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        return self._manager.restore(step, args=args).state, meta
      except CheckpointError:
        raise
      except Exception as e:      # TensorStore and Orbax raise plain exceptions for torn files
        reason = ' '.join(str(e).split())[:200]
        if strict or older is None:
          raise CheckpointError(f'checkpoint {self.folder / str(step)} unreadable ({reason}). FIX: --resume=auto takes '
                                'an older one where there is one, else move the folder away to start anew') from e
        aside = self._set_aside(step)
        logging.warning('checkpoint %d unreadable (%s); continuing from %d; nothing was deleted, it lies in %s',
                        step, reason, older, aside)
    return None

  def _set_aside(self, step: int):
    """Moves a damaged checkpoint out of the way, so that its step can be saved again."""
    aside = self.folder.parent / 'damaged'
    aside.mkdir(parents=True, exist_ok=True)
    n = sum(1 for p in aside.iterdir() if p.name.startswith(f'{step}-'))
    target = aside / f'{step}-{n}'
    (self.folder / str(step)).rename(target)
    self._manager.reload()
    return target

  def wait(self) -> None:
    """Until all saves are on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()


def shapes_hash(tree) -> str:
  """Of names, shapes and dtypes of a tree."""
  text = sorted(f'{n} {tuple(x.shape)} {x.dtype}' for n, x in named_leaves(tree).items())
  return hashlib.blake2b('\n'.join(text).encode(), digest_size=8).hexdigest()


def template(abstract, shardings):
  """Shapes, dtypes and shardings to restore into."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
