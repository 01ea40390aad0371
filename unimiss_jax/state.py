"""What a run is: one frozen tree that holds all a checkpoint needs."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TrainState(NamedTuple):
  step: jax.Array       # int32, steps taken, skipped ones too
  params: Any           # trained: {'backbone': ..., 'head': ...}
  opt_state: Any        # {'groups': {group: moments and counter}, 'skipped': non-finite steps in a row}
  extra: Any            # not trained: teacher, centre, bank


@jax.jit
def own(state):
  """A copy in buffers of its own: a donated step must not meet one buffer twice (student = teacher)."""
  return jax.tree.map(jnp.copy, state)


def restarted(state: TrainState) -> TrainState:
  """With an optimiser that has not moved yet: moments and counters of every group start as zeros."""
  zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), state.opt_state['groups'])
  return state._replace(opt_state=state.opt_state | {'groups': zeros})


def parameters(tree) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))
