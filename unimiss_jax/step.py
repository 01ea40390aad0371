"""One training step as a pure function: loss, gradients, optimiser, post-update, gated by finiteness."""
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unimiss_jax import init_from, optim, sharding
from unimiss_jax.methods.base import Aux, timeline
from unimiss_jax.state import TrainState


def schedules(config, method):
  """Learning rate (scaled by the batch) and weight decay, as functions of the step."""
  o = config.optim
  batch = config.batch.ct if config.phases.ct else config.batch.xray
  ratio = batch / o.lr_reference_batch if o.lr_reference_batch else 1.
  lr = o.lr * (ratio**.5 if o.lr_scaling == 'sqrt' else ratio)
  place, total, until, factor = timeline(method)
  at_place = lambda schedule: lambda step: schedule(place(step))
  if o.schedule == 'cosine':
    rates = optim.cosine_schedule(lr, o.min_lr, total, min(until(o.warmup_epochs), total - 1))
  elif o.schedule == 'poly':
    hold = method.steps_per_epoch if o.schedule_unit == 'epoch' else 1
    rates = optim.poly_schedule(lr, total, hold=hold)
  else:
    rates = optim.constant_schedule(lr)
  rate = lambda step: rates(place(step)) * factor(step)
  return rate, at_place(optim.cosine_schedule(o.weight_decay, o.weight_decay_end, total, 0))


def make_init(config, method, optimiser):
  """(key, {name: tensor} to start from) -> the first TrainState; jit it with shardings so that it is born in place."""
  def init(key, given=None):
    params, extra = method.init(key)
    if given:
      params, extra = method.init(key, init_from.merge(params, given))
      extra = init_from.merge(extra, given)      # batch statistics
    counters = {'skipped': jnp.zeros((), jnp.int32), 'bad': jnp.zeros((), jnp.int32)}
    return TrainState(jnp.zeros((), jnp.int32), params, {'groups': optimiser.init(params), **counters}, extra)
  return init


def make_step(config, method, optimiser, phase_name, mesh, finish=None):
  """(state, batch) -> (state, metrics) of one phase. A step that is not finite changes nothing but the counters.

  finish: {stream: its rows as they come -> its fields}; None: they come as fields.
  """
  phase = method.phases[phase_name]
  lr, wd = schedules(config, method)

  def whole_loss(params, extra, *rest):
    return phase.loss(sharding.gathered(params, mesh), sharding.gathered(extra, mesh), *rest)

  def step_fn(state: TrainState, batch):
    batch = {name: finish[name](rows) for name, rows in batch.items()} if finish else batch
    step, extra = state.step, state.extra
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    loss, aux, grads = accumulate(whole_loss, state.params, extra, batch, key, step, config.optim.accum, mesh)
    modes = {g: phase.update(g, step) for g in state.opt_state['groups']}
    norms = optimiser.norms(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(sum(norms.values()))

    def move(old):
      params, groups, extra = old
      params, groups = optimiser.update(grads, groups, params, modes, lr(step), wd(step), norms)
      return params, groups, method.post(params, extra, aux, step)
    params, groups, extra = optim.gated(finite, move, (state.params, state.opt_state['groups'], extra))
    skipped = jnp.where(finite, 0, state.opt_state['skipped'] + 1)
    bad = state.opt_state['bad'] + sum(rows['bad'].sum(dtype=jnp.int32) for rows in batch.values())
    metrics = aux.metrics | {f'train/grad_norm_{g}': n for g, n in norms.items()} | {
        'data/flat_views': flat_views(batch), **bad_gradients(grads),
        'train/grad_norm': jnp.sqrt(sum(n ** 2 for n in norms.values())),
        'train/lr': lr(step), 'train/wd': wd(step),
        'train/skipped': jnp.where(finite, 0, 1), 'train/skipped_in_a_row': skipped, 'data/bad_records': bad}
    return TrainState(step + 1, params, {'groups': groups, 'skipped': skipped, 'bad': bad}, extra), metrics
  return step_fn


def make_moved(config, method, optimiser, phase_name):
  """(state after a step, whether that was skipped) -> {'train/update_norm_<group>'}: norms of what the step changed."""
  lr, wd = schedules(config, method)

  def moved(state: TrainState, skipped):
    step, groups = state.step - 1, state.opt_state['groups']
    modes = {g: method.phases[phase_name].update(g, step) for g in groups}
    found = optimiser.moved(groups, state.params, modes, lr(step), wd(step))
    return {f'train/update_norm_{g}': jnp.where(skipped, 0., n) for g, n in found.items()}
  return moved


def compiled(config, method, optimiser, phase, mesh, streams, state):
  """The step of a phase for the shapes of `state` and of the streams; it donates its state."""
  rows = sharding.batch_sharding(mesh)
  batch = {s: {k: jax.ShapeDtypeStruct((n, *shape), dtype, sharding=rows)
               for k, (shape, dtype) in streams[s].spec.items()} for s, n in method.phases[phase].streams.items()}
  out = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)
  f = make_step(config, method, optimiser, phase, mesh, {n: s.finish for n, s in streams.items()})
  return jax.jit(f, donate_argnums=0, out_shardings=out).lower(state, batch).compile()


def flat_views(batch):
  """Share of the views [B, V, ...] of a batch that show nothing: the same number everywhere, to a thousandth."""
  views = [x for rows in batch.values() for x in rows.values()
           if x.ndim >= 5 and jnp.issubdtype(x.dtype, jnp.floating)]       # no masks
  flat = [jnp.std(x.astype(jnp.float32), tuple(range(2, x.ndim))) < 1e-3 for x in views]
  return sum(f.sum() for f in flat) / max(sum(f.size for f in flat), 1)


def bad_gradients(grads) -> dict:
  """Number of tensors whose gradient is not finite, and of the first of them in the order of optim.named_leaves; -1 =
  none."""
  bad = ~jnp.isfinite(jnp.stack([jnp.sum(g * g) for g in jax.tree.leaves(grads)]))
  return {'train/bad_tensors': bad.sum(), 'train/bad_tensor': jnp.where(bad.any(), jnp.argmax(bad), -1)}


def accumulate(loss_fn, params, extra, batch, key, step, n, mesh):
  """(loss, Aux, gradients), as the mean over n micro-batches one after the other.

  Rows are dealt out with stride n, so each device keeps its own; `rows` come back in batch order.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if n == 1:
    (loss, aux), grads = grad_fn(params, extra, batch, key, step)
    return loss, aux, grads
  rows = NamedSharding(mesh, P(None, sharding.AXES))
  micro = jax.tree.map(lambda a: a.reshape(a.shape[0] // n, n, *a.shape[1:]).swapaxes(0, 1), batch)
  micro = jax.lax.with_sharding_constraint(micro, rows)

  def body(total, given):
    i, part = given
    (loss, aux), grads = grad_fn(params, extra, part, jax.random.fold_in(key, i), step)
    return jax.tree.map(jnp.add, total, (loss, aux.mean, aux.metrics, grads)), aux.rows

  shapes = jax.eval_shape(lambda: grad_fn(params, extra, jax.tree.map(lambda a: a[0], micro), key, step))
  (loss, aux), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, kept = jax.lax.scan(body, (loss, aux.mean, aux.metrics, grads), (jnp.arange(n), micro))
  loss, mean, metrics, grads = jax.tree.map(lambda a: a / n, total)
  kept = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), kept)
  return loss, Aux(mean, kept, metrics), grads
