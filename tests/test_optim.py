"""Schedules and LARC against the released code's arrays, AdamW against its closed form and PyTorch."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax import optim
from unimiss_jax.optim import SKIP, TRAIN, ZERO


def test_schedules_equal_the_released_arrays(fixtures):
  z = np.load(fixtures / 'parity' / 'plus_schedules.npz')
  made = {'lr': optim.cosine_schedule(z_lr_base(z), 1e-6, 60, 15), 'wd': optim.cosine_schedule(0.04, 0.4, 60, 0),
          'momentum': optim.cosine_schedule(0.996, 1.0, 60, 0)}
  for name, f in made.items():
    np.testing.assert_allclose([f(i) for i in range(60)], z[name], rtol=0, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(f(np.arange(60)), z[name], rtol=0, atol=1e-12)
    traced = jax.jit(jax.vmap(f))(jnp.arange(60))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, z[name], rtol=1e-5, atol=1e-6)


def test_poly_falls_in_every_step_or_is_held_for_an_epoch():
  each, held = optim.poly_schedule(3e-4, 1000), optim.poly_schedule(3e-4, 1000, hold=250)
  for step in (0, 1, 249, 250, 500, 999):
    np.testing.assert_allclose(each(step), 3e-4 * (1 - step / 1000)**.9, rtol=0, atol=1e-12)
    np.testing.assert_allclose(held(step), 3e-4 * (1 - step // 250 / 4)**.9, rtol=0, atol=1e-12)
  assert each(1000) == each(1200) == 0 and len({float(held(i)) for i in range(1000)}) == 4
  assert each(5).dtype == np.float64
  traced = jax.jit(jax.vmap(held))(jnp.arange(1000))
  np.testing.assert_allclose(traced, held(np.arange(1000)), rtol=1e-6)


def test_a_constant_is_one():
  f = optim.constant_schedule(5e-5)
  assert f(0) == f(10**6) == 5e-5 and float(jax.jit(f)(jnp.int32(7))) == np.float32(5e-5)


def z_lr_base(z):
  return float(z['lr'].max())     # the warm-up includes its end point


def test_schedule_ends_and_dtype():
  f = optim.cosine_schedule(2., 0.5, 10, 4, start=1.)
  assert f(0) == 1. and f(3) == 2. and f(4) == 2.
  assert f(10) == 0.5 and f(1000) == 0.5 and f(9) > 0.5
  assert f(5).dtype == np.float64 and f(np.int32(5)).dtype == np.float64
  assert optim.cosine_schedule(2., 0., 10, 1)(0) == 0.


PARAMS = {'a': {'kernel': np.linspace(-1, 1, 6).reshape(2, 3), 'bias': np.array([.5, -.5])},
          'b3D': {'kernel': np.full((2, 2), 2.)}, 'g': {'weight_g': np.ones((2, 1))}}


def group_of(name):
  return 'fixed' if name.endswith('weight_g') else '3d' if '3D' in name else 'rest'


def run(modes, steps, clip=0., mode='global', scale=1.):
  with jax.enable_x64(True):
    tx = optim.adamw(group_of, clip=clip, clip_mode=mode)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, trace = tx.init(params), []
    update = jax.jit(tx.update)
    for i in range(steps):
      grads = jax.tree.map(lambda p, i=i: scale * (p + 0.1 * (i + 1)), params)
      params, state = update(grads, state, params, {'rest': TRAIN, '3d': modes[i]}, 0.1, 0.04)
      moved = tx.moved(state, params, {'rest': TRAIN, '3d': modes[i]}, 0.1, 0.04)
      trace.append(jax.device_get((params, state, moved)))
    return trace


def adamw_by_hand(p, grads, lr=0.1, wd=0.04, eps=1e-8):
  m = v = 0.
  for t, g in enumerate(grads, 1):
    m, v = .9 * m + .1 * g, .999 * v + .001 * g * g
    p = p - lr * wd * p - lr * (m / (1 - .9 ** t)) / (np.sqrt(v / (1 - .999 ** t)) + eps)
  return p


def test_skip_leaves_tensor_moments_and_counter_alone():
  trace = run([SKIP, SKIP, TRAIN], 3)
  for params, state, _ in trace[:2]:
    np.testing.assert_array_equal(params['b3D']['kernel'], PARAMS['b3D']['kernel'])
    assert int(state['3d'].count) == 0 and int(state['rest'].count) > 0
  # the first step after two skipped ones has the size of a first Adam step
  moved = PARAMS['b3D']['kernel'] - trace[2][0]['b3D']['kernel']
  np.testing.assert_allclose(moved, 0.1 * 0.04 * 2 + 0.1, rtol=1e-6)
  np.testing.assert_array_equal(trace[2][0]['g']['weight_g'], 1.)


def test_zero_gradients_drift_only_after_a_real_step():
  trace = run([ZERO, TRAIN, ZERO, ZERO], 4)
  np.testing.assert_array_equal(trace[0][0]['b3D']['kernel'], 2.)
  g = 2. + 0.2
  np.testing.assert_allclose(trace[3][0]['b3D']['kernel'], adamw_by_hand(2., [g, 0., 0.]), rtol=1e-12)
  assert int(trace[3][1]['3d'].count) == 3


def test_a_group_with_a_rate_is_adamw_at_another_learning_rate():
  rates = {'rest': .25, '3d': .75**3}
  grads = [np.full((2, 2), g) for g in (2., -.5, .1)]
  with jax.enable_x64(True):
    tx = optim.adamw(group_of, eps=1e-4, rate=rates.get)
    params = {'w': {'kernel': jnp.full((2, 2), 2.)}, 'b3D': {'kernel': jnp.full((2, 2), 2.)}}
    state = tx.init(params)
    for g in grads:
      params, state = tx.update({'w': {'kernel': g}, 'b3D': {'kernel': g}}, state, params,
                               dict.fromkeys(rates, TRAIN), .1, .04)
  for name, group in (('w', 'rest'), ('b3D', '3d')):
    want = adamw_by_hand(np.full((2, 2), 2.), grads, lr=.1 * rates[group], eps=1e-4)
    np.testing.assert_allclose(params[name]['kernel'], want, rtol=1e-12)


def test_bias_does_not_decay_and_clipping_scales_by_the_norm():
  got = run([TRAIN], 1)[0][0]['a']['bias']
  np.testing.assert_allclose(got, PARAMS['a']['bias'] - 0.1 * np.sign(PARAMS['a']['bias'] + .1), rtol=1e-6)
  _, state, _ = run([SKIP], 1, clip=1e-3)[0]
  mu = np.concatenate([np.ravel(x) for x in state['rest'].mu.values()])
  np.testing.assert_allclose(np.linalg.norm(mu), 0.1 * 1e-3, rtol=2e-3)     # the skipped group is not in the norm
  whole = np.concatenate([PARAMS['a']['kernel'].ravel(), PARAMS['a']['bias']]) + 0.1
  with jax.enable_x64(True):
    norms = optim.adamw(group_of).norms(jax.tree.map(lambda x: jnp.asarray(x) + .1, PARAMS))
    np.testing.assert_allclose(norms['rest'], np.linalg.norm(whole), rtol=1e-12)
  per_tensor = run([TRAIN], 1, clip=1e-3, mode='per_tensor')[0][1]
  for group in per_tensor.values():
    for x in group.mu.values():
      np.testing.assert_allclose(np.linalg.norm(x), 0.1 * 1e-3, rtol=2e-3)


def test_norms_that_are_given_are_not_computed_again():
  tx, params = optim.adamw(lambda name: 'rest', clip=1.), {'w': jnp.arange(6.)}
  grads = {'w': jnp.full(6, 3.)}
  mu = lambda norms: tx.update(grads, tx.init(params), params, {'rest': TRAIN}, .1, 0., norms)[1]['rest'].mu['w']
  np.testing.assert_array_equal(mu(tx.norms(grads)), mu(None))
  np.testing.assert_allclose(mu({'rest': 2 * tx.norms(grads)['rest']}), mu(None) / 2, rtol=1e-5)


def flat(params, name):
  return np.concatenate([np.ravel(x) for n, x in sorted(params[name].items())])


def test_what_an_update_added_is_told_from_the_state_after_it():
  before, sizes = PARAMS, []
  for params, _, moved in run([ZERO, SKIP, TRAIN, TRAIN, ZERO, SKIP], 6):
    for name, group in (('a', 'rest'), ('b3D', '3d')):
      np.testing.assert_allclose(moved[group], np.linalg.norm(flat(params, name) - flat(before, name)), rtol=1e-12)
    before, sizes = params, [*sizes, float(moved['3d'])]
  assert [s > 0 for s in sizes] == [False, False, True, True, True, False]
  with jax.enable_x64(True):
    tx, params = optim.larc(lambda name: 'rest', rate=lambda group: .5), {'w': jnp.arange(6.)}
    state = tx.init(params)
    for g in (2., -1.):
      new, state = tx.update({'w': jnp.full(6, g)}, state, params, {'rest': TRAIN}, .1, .04)
      np.testing.assert_allclose(tx.moved(state, new, {'rest': TRAIN}, .1, .04)['rest'],
                                 np.linalg.norm(new['w'] - params['w']), rtol=1e-12)
      params = new


def test_equals_torch_adamw():
  torch = pytest.importorskip('torch')
  start = torch.tensor(PARAMS['a']['kernel'], requires_grad=True)
  opt = torch.optim.AdamW([start], lr=0.1, weight_decay=0.04)
  for i in range(4):
    start.grad = (start + 0.1 * (i + 1)).detach()
    opt.step()
  np.testing.assert_allclose(run([TRAIN] * 4, 4)[-1][0]['a']['kernel'], start.detach().numpy(), rtol=1e-10)


@pytest.mark.parametrize('exclude, decaying', [
    ('1d', {'kernel', 'cls_tokens2/kernel', 'pos_embed2D', 'cls_tokens'}), ('tokens', {'kernel', 'cls_tokens2/kernel'}),
    ('', {'kernel', 'cls_tokens2/kernel', 'pos_embed2D', 'cls_tokens', 'bias', 'scale'})])
def test_what_decays(exclude, decaying):
  """With zero gradients decay alone moves a tensor: by lr * wd of its value."""
  params = {n: jnp.full(s, 2.) for n, s in {'kernel': (2, 3), 'pos_embed2D': (1, 4, 2), 'cls_tokens': (1, 2),
                                            'cls_tokens2/kernel': (2, 2), 'bias': (3, 2), 'scale': (3,)}.items()}
  tx = optim.adamw(lambda name: 'rest', decay_exclude=exclude)
  after, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, {'rest': optim.TRAIN}, .1, .5)
  for name, x in after.items():
    np.testing.assert_allclose(x, 2 - .1 * .5 * 2 * (name in decaying), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('x64', [True, False])
def test_larc_takes_the_reference_steps(fixtures, x64):
  """Three steps with their own rates; the third tensor starts at zero and takes plain SGD."""
  with jax.enable_x64(x64):
    z = np.load(fixtures / 'joint' / 'larc_sched.npz')
    wide = np.float64 if x64 else np.float32
    optimiser = optim.larc(lambda name: 'rest', trust=float(z['trust']), momentum=float(z['momentum']),
                           eps=float(z['eps']))
    params = {f'p{i}': jnp.asarray(z[f'p{i}'], wide) for i in range(3)}
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    for t, lr in enumerate(z['lrs']):
      grads = {f'p{i}': jnp.asarray(z[f'g{t}_{i}'], wide) for i in range(3)}
      params, state = update(grads, state, params, {'rest': TRAIN}, lr, float(z['wd']))
    for i in range(3):
      np.testing.assert_allclose(params[f'p{i}'], z[f'out{i}'], rtol=0, atol=1e-9 if x64 else 1e-6)
    assert state['rest'].count == 3


def test_the_schedule_of_joint_is_the_same_one(fixtures):
  z = {k: v.item() if not v.ndim else v for k, v in np.load(fixtures / 'joint' / 'larc_sched.npz').items()}
  f = optim.cosine_schedule(z['base_lr'], z['final_lr'], z['epochs'] * z['steps_per_epoch'],
                            z['warmup_epochs'] * z['steps_per_epoch'], z['start_warmup'])
  np.testing.assert_allclose(f(np.arange(140)), z['schedule'], rtol=0, atol=1e-9)
