"""Training steps of UniMiSS+ against the released code: preset `reference`, the recipe's weights, the same batches.

Trajectories are compared in float64 only: Adam's first steps are nearly signs, so that float32 noise grows by orders
of magnitude within a few steps; in float32 the first step is compared strictly, and the losses of the next three.
"""
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import unimiss_plus
from tests.parity import recipe
from unimiss_jax import optim, porting, sharding, step
from unimiss_jax.methods import base
from unimiss_jax.state import TrainState

PHASES = {'3D': 'ct', '2D': 'xray'}
LOSSES = {'ct': ('loss', 'dino_loss', 'drr_loss', 'slice_loss', 'recon_ct_loss', 'recon_drr_loss'),
          'xray': ('loss', 'dino_loss', 'recon_xray_loss')}
INPUTS = {'ct': {'ct': 'train3d', 'drr': 'train2d'}, 'xray': {'xray': 'trainXR'}}
ROWS = 2      # of every batch; fixtures of one sample have it twice, which changes no mean


def config(meta, dtype):
  """The preset, at the sizes and with the schedules of a fixture."""
  cfg, hyp, weights = meta['cfg'], meta['hyp'], meta['weights']
  c = unimiss_plus.get_config('reference')
  c.unlock()
  c.epochs, c.batch.ct, c.batch.xray = hyp['epochs'], ROWS, ROWS
  c.model.update(dict(
      embed_dims=tuple(cfg['enc_dims']), decoder_dims=tuple(cfg['dec_dims']), depths=tuple(cfg['depths']),
      num_heads=tuple(cfg['heads']), decoder_heads=tuple(cfg['dec_heads']), image_size=meta['img2d'],
      volume_size=tuple(meta['img3d']), decoder_drop_path=0., dtype=dtype))
  c.head.update(cfg['head'])
  c.loss.update(dict(drr=weights['drr'], slice=weights['s'],
                     **{f'recon_{k}': weights['re'] for k in ('ct', 'drr', 'xray')}))
  c.optim.update(dict(lr=hyp['lr'], lr_reference_batch=0, min_lr=hyp['min_lr'], warmup_epochs=float(hyp['warm']),
                      weight_decay=hyp['wd'], weight_decay_end=hyp['wde'], freeze_last_layer=float(hyp['freeze']),
                      freeze_3d='mask' if meta['set_to_none'] else 'zero_grad'))
  c.ema.momentum = hyp['m']
  return c.lock()


class Run:
  """A method built from a fixture's config, its weights, batches and compiled steps."""

  def __init__(self, meta, shapes, dtype='float64'):
    self.meta, self.dtype, self.config = meta, dtype, config(meta, dtype)
    records = ROWS * meta['hyp']['niter']
    self.method = base.make(self.config, {'ct': (records, {}), 'xray': (records, {})})
    self.optimiser = optim.adamw(self.method.groups, clip=self.config.optim.clip)
    self.weights = porting.from_torch(
        {k: v.astype(dtype) for k, v in recipe.state_dict(meta['seed'], shapes).items()})

  def start(self):
    params = jax.tree.map(jnp.asarray, self.weights)
    zero = jnp.zeros((), jnp.int32)
    extra = {'teacher': jax.tree.map(jnp.copy, params), 'center': jnp.zeros((1, self.config.head.out_dim))}
    return TrainState(zero, params, {'groups': self.optimiser.init(params), 'skipped': zero, 'bad': zero}, extra)

  def batch(self, phase):
    def views(name):
      size = self.meta['img3d'] if name == 'train3d' else [self.meta['img2d']] * 2
      shape = (self.meta['B'], 1 if name == 'train3d' else 3, *size)
      pair = [recipe.network_input(self.meta['seed'], f'{name}_{i}', shape, 'ct' if name == 'train3d' else 'unit')
              for i in range(2)]
      x = np.moveaxis(np.stack(pair, 1), 2, -1).astype(self.dtype)             # [B, 2, *S, C]
      return x if len(x) == ROWS else np.repeat(x, ROWS, 0)
    rows = {'id': np.arange(ROWS), 'rng': np.zeros((ROWS, 2), np.uint32), 'bad': np.zeros(ROWS, bool)}
    return {phase: rows | {field: views(name) for field, name in INPUTS[phase].items()}}

  @functools.cache      # noqa: B019 (few objects, of one test module)
  def step(self, phase):
    """(state, batch) -> (state, metrics, gradients as the optimiser gets them)."""
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])

    def recorded(state, batch):
      seen = []
      update = lambda grads, *rest: (seen.append(grads), self.optimiser.update(grads, *rest))[1]
      f = step.make_step(self.config, self.method, self.optimiser._replace(update=update), phase, mesh)
      return (*f(state, batch), seen[0])
    return jax.jit(recorded)

  def steps(self):
    """Takes the listed steps; yields (index, what the fixture says, phase, state, metrics, gradients)."""
    state = self.start()
    for k, listed in enumerate(self.meta['steps']):
      phase = PHASES[listed['phase']]
      state, metrics, grads = self.step(phase)(
          state._replace(step=jnp.asarray(listed['it'], jnp.int32)), self.batch(phase))
      yield k, listed, phase, state, metrics, porting.to_torch(grads)


def load(folder, name):
  return (json.loads((folder / f'{name}.json').read_text()), np.load(folder / f'{name}.npz'),
          json.loads((folder / 'plus_state_keys.json').read_text()))


def fixture(name, dtype, size='tiny'):
  """A pytest fixture: the run and the arrays of one file."""
  @pytest.fixture(scope='module', name=name)
  def built(fixtures):
    with jax.enable_x64(dtype == 'float64'):
      meta, arrays, names = load(fixtures / 'parity', name)
      run = Run(meta, names[size], dtype)
      return types.SimpleNamespace(meta=meta, arrays=arrays, run=run, names=meta['param_names'])
  return built


masked = fixture('plus_tiny_trainsteps_f64', 'float64')
drifting = fixture('plus_tiny_trainsteps_torch18zerograd_f64', 'float64')


def close(ours, theirs, rtol, label):
  """Relative to the largest absolute value of the tensor."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, label
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * max(abs(theirs).max(), 1e-30), err_msg=label)


def table(tensors, names):
  """[mean, std, norm] of every tensor."""
  return np.array([recipe.summary(tensors[n])[:3] for n in names])


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


def whole_trajectory(case):
  """Every number that the fixture has of every step."""
  arrays, names = case.arrays, case.names
  for k, _, phase, state, metrics, grads in case.run.steps():
    where = f'step {k} {phase}'
    np.testing.assert_allclose(losses(phase, metrics), arrays[f'{k}/loss'], rtol=1e-6, err_msg=where)
    gradient_norms(grads, arrays[f'{k}/gradnorm'], names, 1e-5, where)
    for key in arrays.files:
      if key.startswith(f'{k}/grad/'):
        close(grads[key.split('/', 2)[2]], arrays[key], 1e-5, key)
    for branch, params in (('student', state.params), ('teacher', state.extra['teacher'])):
      tensors = porting.to_torch(params)
      mean, std, norm = table(tensors, names).T
      mean_, std_, norm_ = arrays[f'{k}/{branch}'].T
      size = np.array([tensors[n].size for n in names])
      label = f'{where} {branch}'
      np.testing.assert_allclose(norm, norm_, rtol=1e-6, err_msg=label)
      # A mean near zero is known as well as the values it comes from: relative to the root mean square.
      np.testing.assert_array_less(abs(mean - mean_), 1e-6 * norm_ / size**.5 + 1e-30, err_msg=label)
      np.testing.assert_array_less(abs(std - std_), 1e-6 * norm_ / size**.5 + 1e-30, err_msg=label)
      for name in case.meta['track_full']:
        key = f'final{"" if branch == "student" else "_teacher"}/{name}'
        if k == len(case.meta['steps']) - 1:
          close(tensors[name], arrays[key], 1e-6, key)
    np.testing.assert_allclose(recipe.summary(state.extra['center']), arrays[f'{k}/center'], rtol=1e-6, atol=1e-9)
  close(state.extra['center'], arrays['center_final'], 1e-6, 'centre')
  return state


def test_eight_steps_with_masked_3d_tensors(plus_tiny_trainsteps_f64):
  with jax.enable_x64(True):
    whole_trajectory(plus_tiny_trainsteps_f64)


def test_four_steps_in_which_3d_tensors_drift(plus_tiny_trainsteps_torch18zerograd_f64):
  with jax.enable_x64(True):
    whole_trajectory(plus_tiny_trainsteps_torch18zerograd_f64)
