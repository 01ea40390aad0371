"""AdamW, and SGD with LARC, with one state and one step counter per parameter group, and the schedules.

A group is trained (TRAIN), left wholly alone (SKIP: tensors, moments and counter) or run on zero
gradients (ZERO: moments fade, stale momentum and decay still move the weights; SKIP while the
counter is 0). Freezing, last-layer freezing and the drift of the released code are thus one
mechanism. AdamW (Loshchilov and Hutter 2019): decay is decoupled and multiplied by the learning
rate. LARC (You et al. 2017, as in apex without clipping): every tensor's step is a share of its norm.
"""
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

SKIP, ZERO, TRAIN = 0, 1, 2


def cosine_schedule(base, final, total_steps, warmup_steps, start=0.) -> Callable:
  """Linear warm-up that includes both its ends, then a cosine that stops one step short of `final`.

  Args:
    base: value at the end of the warm-up.
    final: value the cosine runs towards; steps >= total_steps give it.
    total_steps, warmup_steps: the cosine lasts total_steps - warmup_steps.
    start: value of step 0 if there is a warm-up.

  Returns:
    f(step): float64 for Python and numpy steps, jax's default float for traced ones (DINO, Caron et al. 2021).
  """
  warm = int(warmup_steps)
  rest = max(int(total_steps) - warm, 1)

  def schedule(step):
    if isinstance(step, jax.Array):
      xp, step = jnp, step.astype(float)
    else:
      xp, step = np, np.asarray(step, np.float64)
    rise = start + (base - start) * step / max(warm - 1, 1)
    part = xp.clip((step - warm) / rest, 0., 1.)
    fall = final + 0.5 * (base - final) * (1 + xp.cos(np.pi * part))
    return xp.where(step < warm, rise, fall)
  return schedule


def poly_schedule(base, total_steps, power=0.9, hold: int = 1) -> Callable:
  """base * (1 - step / total_steps) ** power, constant over every `hold` steps; as cosine_schedule otherwise."""
  def schedule(step):
    xp, step = (jnp, step.astype(float)) if isinstance(step, jax.Array) else (np, np.asarray(step, np.float64))
    return base * (1 - xp.clip(xp.floor(step / hold) * hold / total_steps, 0., 1.))**power
  return schedule


def constant_schedule(value) -> Callable:
  """As cosine_schedule, but always the same."""
  return lambda step: (jnp if isinstance(step, jax.Array) else np).full((), value)


def leaf_name(path) -> str:
  """Key path of jax.tree_util -> 'backbone/transformer/.../kernel'."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def named_leaves(tree) -> dict[str, jax.Array]:
  return {leaf_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


TOKENS = re.compile(r'(pos_?embed\w*|cls_tokens?\d*|\w*_table(3D)?|class_token|mask_token)$', re.IGNORECASE)
DECAY_EXCLUDE = '1d', 'tokens', ''


def decays(name: str, x, exclude: str = '1d') -> bool:
  """Whether weight decay applies. exclude: '1d' = not to biases and one-dimensional tensors (released pre-training),
  'tokens' = nor to position embeddings and class tokens, '' = to everything (released fine-tuning)."""
  return not exclude or x.ndim > 1 and not name.endswith('bias') and not (exclude == 'tokens' and TOKENS.search(name))


class Optimiser(NamedTuple):
  init: Callable     # params -> opt_state = {group: optax state over {name: tensor}}
  update: Callable   # (grads, opt_state, params, modes, lr, wd, norms or None) -> (params, opt_state)
  norms: Callable    # grads -> {group: their norm}
  moved: Callable    # (opt_state, params, modes, lr, wd), after an update -> {group: norm of what it added}


def of(config, method) -> Optimiser:
  """The optimiser of a run."""
  o = config.optim
  given = dict(clip=o.clip, clip_mode=o.clip_mode, eps=o.eps, rate=method.rate)
  return larc(method.groups, **given) if o.name == 'larc' else adamw(
      method.groups, decay_exclude=o.decay_exclude, **given)


def adamw(group_of: Callable[[str], str], *, b1=0.9, b2=0.999, eps=1e-8, decay_exclude: str = '1d',
          **given) -> Optimiser:
  """AdamW per group; decay_exclude: of `decays`; the other arguments are those of `by_group`."""
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

  def decayed(direction, params, wd):
    return {n: d + (wd * params[n] if decays(n, params[n], decay_exclude) else 0.) for n, d in direction.items()}

  def rule(grads, state, params, wd):
    direction, state = adam.update(grads, state)
    return decayed(direction, params, wd), state

  def last(state, params, lr, wd):
    mu, nu = (optax.tree.bias_correction(x, b, state.count) for x, b in ((state.mu, b1), (state.nu, b2)))
    direction = {n: m / (jnp.sqrt(nu[n]) + eps) for n, m in mu.items()}
    before = {n: (p + lr * direction[n]) / (1 - lr * wd) for n, p in params.items()}      # of those that decay
    return decayed(direction, before, wd)
  return by_group(group_of, adam.init, rule, last, **given)


class Momentum(NamedTuple):
  count: jax.Array     # steps
  buffer: Any          # {name: tensor}


def larc(group_of: Callable[[str], str], *, trust=1e-3, momentum=0.9, eps=1e-8, **given) -> Optimiser:
  """SGD with momentum; LARC scales the decayed gradient of every tensor to `trust` times the tensor's norm.

  Every tensor decays, but where it or its gradient is all zero: there the plain gradient is taken. The learning rate
  stays outside the momentum, and the decay is part of the ratio (`optax.lars`: otherwise in all of this). The other
  arguments are those of `by_group`.
  """
  def start(tensors):
    return Momentum(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, tensors))

  def scaled(g, p, wd):
    size, slope = jnp.linalg.norm(p.ravel()), jnp.linalg.norm(g.ravel())
    ratio = trust * size / (slope + wd * size + eps)
    return jnp.where((size > 0) & (slope > 0), (g + wd * p) * ratio, g)

  def rule(grads, state, params, wd):
    buffer = {n: momentum * state.buffer[n] + scaled(g, params[n], wd) for n, g in grads.items()}
    return buffer, Momentum(state.count + 1, buffer)
  return by_group(group_of, start, rule, lambda state, params, lr, wd: state.buffer, **given)


def by_group(group_of: Callable[[str], str], start: Callable, rule: Callable, last: Callable, *, clip: float = 0.,
             clip_mode: str = 'global', rate: Callable[[str], float] = lambda group: 1.) -> Optimiser:
  """An optimiser of {name: tensor}, once per group.

  Args:
    group_of: parameter name -> group; the group 'fixed' is never trained and has no state.
    start: tensors -> state, with a `count` of steps.
    rule: (gradients, state, tensors, wd) -> (what the learning rate multiplies, state).
    last: (that state, the new tensors, lr, wd) -> what the learning rate multiplied.
    clip: largest gradient norm, before the moments; 0 = off.
    clip_mode: 'global' = one norm over all groups that train; 'per_tensor'.
    rate: group -> factor of the learning rate (and so of the decay).

  `update` takes modes {group: SKIP | ZERO | TRAIN} (traceable), lr and wd scalars, and, where it is known, what
  `norms` gives: to compute it again would read all gradients again. `moved` tells its norms from the state that it
  leaves, for a step that also did so would need more memory, and time for another pass over all tensors.
  """
  def split(tree) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for name, x in named_leaves(tree).items():
      out.setdefault(group_of(name), {})[name] = x
    out.pop('fixed', None)
    return out

  def init(params):
    return {group: start(tensors) for group, tensors in split(params).items()}

  def norms_of(grads):
    return {g: optax.tree.norm(t) for g, t in split(grads).items()}

  def changed(mode, grads, lr, wd, held):
    tensors, state = held
    direction, state = rule({n: jnp.where(mode == TRAIN, x, jnp.zeros_like(x)) for n, x in grads.items()}, state,
                            tensors, wd)
    return {n: p - (lr * direction[n]).astype(p.dtype) for n, p in tensors.items()}, state

  def update(grads, opt_state, params, modes, lr, wd, norms=None):
    groups, tensors, norms = split(grads), split(params), norms or norms_of(grads)
    groups = {g: _clipped(t, clip, clip_mode, _norm_of_training(norms, modes)) for g, t in groups.items()}
    new_params, new_state = {}, {}
    for g, old in opt_state.items():
      mode, held = modes[g], (tensors[g], old)
      move = partial(changed, mode, groups[g], rate(g) * lr, wd)
      if isinstance(mode, int) and mode != ZERO:       # known when the step is compiled
        new, new_state[g] = held if mode == SKIP else move(held)
      else:
        new, new_state[g] = gated((mode == TRAIN) | ((mode == ZERO) & (old.count > 0)), move, held)
      new_params |= new
    merged = jax.tree_util.tree_map_with_path(lambda path, p: new_params.get(leaf_name(path), p), params)
    return merged, new_state

  def moved(opt_state, params, modes, lr, wd):
    def one(g, tensors):
      size = rate(g) * lr * optax.tree.norm(last(opt_state[g], tensors, rate(g) * lr, wd))
      return jnp.where((modes[g] == SKIP) | (opt_state[g].count == 0), 0., size)
    return {g: one(g, tensors) for g, tensors in split(params).items()}

  return Optimiser(init, update, norms_of, moved)


def gated(go, move, old, branch: bool | None = None):
  """move(old) where `go`, else old.

  As a branch the old state is changed in place: a fifth less traffic of an X-ray step on CPU, where selecting between
  whole states keeps both. branch=None: on CPU alone; elsewhere a branch may have to wait for the host.
  """
  if jax.default_backend() == 'cpu' if branch is None else branch:
    return jax.lax.cond(go, move, lambda old: old, old)
  return jax.tree.map(lambda new, was: jnp.where(go, new, was), move(old), old)


def _norm_of_training(norms, modes):
  return jnp.sqrt(sum(jnp.where(jnp.asarray(modes[g]) == TRAIN, n ** 2, 0.) for g, n in norms.items()))


def _clipped(tensors, clip, clip_mode, norm):
  """Scaled so that the norm (of all that trains, or of each tensor) is at most `clip`."""
  if not clip:
    return tensors
  if clip_mode == 'per_tensor':
    norms = {n: jnp.linalg.norm(x.ravel()) for n, x in tensors.items()}
  else:
    norms = dict.fromkeys(tensors, norm)
  return {n: x * jnp.minimum(1., clip / (norms[n] + 1e-6)).astype(x.dtype) for n, x in tensors.items()}
