"""What is due before the first step of an epoch or of a phase."""
from unimiss_jax import sharding
from unimiss_jax.state import TrainState, restarted


def crossed(method, state: TrainState, step: int, read) -> TrainState:
  """The state that step `step` starts from; it is no part of the checkpoint of that step, a resumed run makes it again.

  Args:
    method: `methods.base.Method`.
    read: see `reader`.
  """
  phase, reached = method.schedule(step)
  if reached == ('phase', phase) and method.phases[phase].fresh_optimiser:
    state = restarted(state)
  return method.between(state, step, read, reached) if reached and method.between else state


def reader(streams: dict, batch, mesh):
  """stream -> its rows on the devices, one pass over all records (see Stream.fresh); the training position stays.

  Args:
    streams: {name: Stream}. batch: {name: rows of a step}.
  """
  def read(name):
    for rows in streams[name].fresh(batch[name]):
      yield sharding.to_devices(rows, mesh)
  return read
