"""Training steps of UniMiSS+ against the released code: preset `reference`, the recipe's weights, the same batches.

Trajectories are compared in float64 only: Adam's first steps are nearly signs, so that float32 noise grows by orders
of magnitude within a few steps; in float32 the first step is compared strictly, and the losses of the next three.
"""
import itertools

import jax
import numpy as np
import pytest

from tests.parity import recipe
from tests.parity.trainstep import built
from unimiss_jax import optim, porting, step

LOSSES = {'ct': ('loss', 'dino_loss', 'drr_loss', 'slice_loss', 'recon_ct_loss', 'recon_drr_loss'),
          'xray': ('loss', 'dino_loss', 'recon_xray_loss')}


@pytest.fixture(scope='module')
def masked(fixtures):
  with jax.enable_x64(True):
    return built(fixtures, 'plus_tiny_trainsteps_f64', 'float64')


@pytest.fixture(scope='module')
def single(fixtures):
  return built(fixtures, 'plus_tiny_trainsteps', 'float32')


def close(ours, theirs, rtol, label):
  """Relative to the largest absolute value of the tensor."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, label
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * max(abs(theirs).max(), 1e-30), err_msg=label)


def losses(phase, metrics):
  return np.array([float(metrics[f'train/{name}']) for name in LOSSES[phase]])


def gradient_norms(grads, theirs, names, rtol, where):
  """Relative, with a floor of 1e-4 of the largest norm; where PyTorch has no gradient ours is zero."""
  ours = np.array([np.linalg.norm(grads[n]) for n in names])
  assert not ours[np.isnan(theirs)].any()
  np.testing.assert_array_equal((theirs == 0) & (ours != 0), False)
  known = ~np.isnan(theirs)
  floor = 1e-4 * theirs[known].max()
  error = abs(ours - theirs)[known] / np.maximum(theirs[known], floor)
  assert error.max() < rtol, (where, names[np.flatnonzero(known)[error.argmax()]], error.max())


def moments(params, theirs, names, rtol, where):
  """[mean, std, norm] of every tensor; a mean is known as well as the values behind it: relative to their RMS."""
  tensors = porting.to_torch(params)
  ours = np.array([recipe.summary(tensors[n])[:3] for n in names])
  rms = theirs[:, 2] / np.sqrt([tensors[n].size for n in names])
  error = abs(ours - theirs) / np.stack([rms, rms, theirs[:, 2]], 1)
  assert error.max() < rtol, (where, names[error.max(1).argmax()], error.max())
  return tensors


def trajectory(case, compiled=None):
  """Every number that the fixture has of every step; returns the states."""
  arrays, names, last = case.arrays, case.names, len(case.meta['steps']) - 1
  states = []
  for k, _, phase, state, metrics, grads in case.run.steps(compiled):
    where = f'step {k} {phase}'
    np.testing.assert_allclose(losses(phase, metrics), arrays[f'{k}/loss'], rtol=1e-6, err_msg=where)
    gradient_norms(grads, arrays[f'{k}/gradnorm'], names, 1e-5, where)
    for key in arrays.files:
      if key.startswith(f'{k}/grad/'):
        close(grads[key.split('/', 2)[2]], arrays[key], 1e-5, key)
    student = moments(state.params, arrays[f'{k}/student'], names, 1e-6, where)
    teacher = moments(state.extra['teacher'], arrays[f'{k}/teacher'], names, 1e-6, where + ' teacher')
    np.testing.assert_allclose(recipe.summary(state.extra['center']), arrays[f'{k}/center'], rtol=1e-6, atol=1e-9)
    states.append(state)
  for name in case.meta['track_full']:
    close(student[name], arrays[f'final/{name}'], 1e-6, name)
    close(teacher[name], arrays[f'final_teacher/{name}'], 1e-6, name)
  close(state.extra['center'], arrays['center_final'], 1e-6, 'centre')
  assert k == last
  return states


def norms_of(states, name):
  return [float(np.linalg.norm(porting.to_torch(s.params)[name])) for s in states]


POS_3D = 'backbone.transformer.pos_embed3D4'


def test_eight_steps_with_masked_3d_tensors(masked):
  with jax.enable_x64(True):
    states = trajectory(masked)
  np.testing.assert_allclose(norms_of(states, POS_3D)[2:6], 7.64007, rtol=0, atol=5e-6)
  assert len(set(norms_of(states, POS_3D)[2:6])) == 1


def test_four_steps_in_which_3d_tensors_drift(fixtures, masked):
  with jax.enable_x64(True):
    states = trajectory(built(fixtures, 'plus_tiny_trainsteps_torch18zerograd_f64', 'float64'), masked.run)
  np.testing.assert_allclose(norms_of(states, POS_3D), [7.63979, 7.63920, 7.63735, 7.63526], rtol=0, atol=5e-6)


def test_schedules_give_the_listed_values(masked):
  """Learning rate, weight decay and momentum of every step that a fixture lists, and the frozen epochs."""
  run = masked.run
  lr, wd = step.schedules(run.config, run.method)
  ema = optim.cosine_schedule(run.config.ema.momentum, run.config.ema.momentum_end, run.method.total_steps, 0)
  assert run.method.steps_per_epoch == 3 and run.method.total_steps == 18
  for listed in masked.meta['steps']:
    ours = [float(f(listed['it'])) for f in (lr, wd, ema)]
    np.testing.assert_allclose(ours, [listed['lr'], listed['wd'], listed['m']], rtol=1e-12, atol=1e-18)
    assert (run.method.phases['ct'].update('last_layer', listed['it']) == optim.SKIP) == (listed['epoch'] < 2)


def test_which_tensors_decay_and_which_are_3d(masked):
  """The 144 tensors that decay, the 84 that X-ray phases do not train, and the one that nothing trains."""
  torch_name = {}
  for path, x in optim.named_leaves(masked.run.weights).items():
    marker = porting.to_torch({'backbone': nested(path, x)} if path.startswith('backbone/') else
                              {'head': nested(path, x)})
    torch_name[next(iter(marker))] = (path, x)
  decayed = np.array([optim.decays(*torch_name[n]) and masked.run.method.groups(torch_name[n][0]) != 'fixed'
                      for n in masked.names])
  np.testing.assert_array_equal(decayed, masked.arrays['decayed_mask'])
  assert decayed.sum() == 144
  groups = {n: masked.run.method.groups(torch_name[n][0]) for n in masked.names}
  assert {n for n, g in groups.items() if g == '3d'} == {n for n in masked.names if '3D' in n}
  assert sum(g == '3d' for g in groups.values()) == 84
  assert [n for n, g in groups.items() if g == 'fixed'] == ['head.last_layer.weight_g']
  assert [n for n, g in groups.items() if g == 'last_layer'] == ['head.last_layer.weight_v']


def nested(path, x):
  """'backbone/a/b' and a leaf -> {'a': {'b': leaf}}."""
  for key in reversed(path.split('/')[1:]):
    x = {key: x}
  return x


def first_step(case):
  """Losses, gradients and centre of the first step in float32."""
  arrays = case.arrays
  k, listed, phase, state, metrics, grads = next(case.run.steps())
  np.testing.assert_allclose(losses(phase, metrics), arrays['0/loss'], rtol=1e-5)
  gradient_norms(grads, arrays['0/gradnorm'], case.names, 1e-3, phase)
  for key in arrays.files:
    if key.startswith('0/grad/'):
      close(grads[key.split('/', 2)[2]], arrays[key], 1e-3, key)
  return state


@pytest.mark.slow
def test_first_xray_step_in_float32(fixtures):
  case = built(fixtures, 'plus_tiny_trainstep_2D', 'float32')
  state = first_step(case)
  close(state.extra['center'], case.arrays['center_final'], 1e-5, 'centre')


@pytest.mark.slow
def test_first_ct_steps_in_float32(single):
  """The first step strictly, then the losses of three more: nothing later can be compared."""
  first_step(single)
  for k, _, phase, _, metrics, _ in itertools.islice(single.run.steps(), 4):
    np.testing.assert_allclose(losses(phase, metrics), single.arrays[f'{k}/loss'], rtol=1e-4, err_msg=f'step {k}')


@pytest.mark.slow
def test_first_step_with_drift_in_float32(fixtures, single):
  case = built(fixtures, 'plus_tiny_trainsteps_torch18zerograd', 'float32')
  for k, _, phase, _, metrics, grads in case.run.steps(single.run):
    np.testing.assert_allclose(losses(phase, metrics), case.arrays[f'{k}/loss'], rtol=1e-4 if k else 1e-5,
                               err_msg=f'step {k}')
    if k == 0:
      gradient_norms(grads, case.arrays['0/gradnorm'], case.names, 1e-3, phase)


@pytest.mark.slow
def test_a_step_of_the_full_model_in_float32(fixtures):
  """63.3 million parameters, 65 536 prototypes, one CT with its DRR and slices."""
  case = built(fixtures, 'plus_full_trainstep', 'float32', 'full')
  state = first_step(case)
  close(state.extra['center'], case.arrays['center_final'], 1e-4, 'centre')
