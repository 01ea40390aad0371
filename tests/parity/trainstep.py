"""A run of preset `reference` at the sizes, weights and batches of a fixture of training steps."""
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np

from configs import unimiss_plus
from tests.parity import recipe
from unimiss_jax import optim, porting, sharding, step
from unimiss_jax.methods import base
from unimiss_jax.state import TrainState

PHASES = {'3D': 'ct', '2D': 'xray'}
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

  def __init__(self, meta, shapes, dtype='float64', config=config):
    self.meta, self.dtype, self.config = meta, dtype, config(meta, dtype)
    records = ROWS * meta['hyp']['niter']
    self.method = base.make(self.config, {'ct': (records, {}), 'xray': (records, {})})
    self.optimiser = optim.adamw(self.method.groups, clip=self.config.optim.clip,
                                 clip_mode=self.config.optim.clip_mode)
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
    """(state, batch, modes of the groups) -> (state, metrics, gradients as the optimiser gets them)."""
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])

    def recorded(state, batch, modes):
      seen = []
      norms = lambda grads: (seen.append(grads), self.optimiser.norms(grads))[1]
      given = self.method.phases[phase]._replace(update=lambda group, step: modes[group])
      f = step.make_step(self.config, self.method._replace(phases={phase: given}),
                         self.optimiser._replace(norms=norms), phase, mesh)
      return (*f(state, batch), seen[0])
    return jax.jit(recorded)

  def steps(self, other=None):
    """Takes the listed steps; yields (index, what the fixture says, phase, state, metrics, gradients).

    The modes are those of this method, but given as numbers: `other`, a run of another kind of freezing, may lend its
    compiled steps.
    """
    state = self.start()
    for k, listed in enumerate(self.meta['steps']):
      phase = PHASES[listed['phase']]
      assert self.method.schedule(listed['it'])[0] == phase
      modes = {g: np.int32(self.method.phases[phase].update(g, listed['it'])) for g in state.opt_state['groups']}
      state, metrics, grads = (other or self).step(phase)(
          state._replace(step=jnp.asarray(listed['it'], jnp.int32)), self.batch(phase), modes)
      yield k, listed, phase, state, metrics, porting.to_torch(grads)


def built(folder, name, dtype, size='tiny'):
  """A run and the arrays of its fixture."""
  meta = json.loads((folder / 'parity' / f'{name}.json').read_text())
  shapes = json.loads((folder / 'parity' / 'plus_state_keys.json').read_text())[size]
  return types.SimpleNamespace(meta=meta, arrays=np.load(folder / 'parity' / f'{name}.npz'),
                               names=meta['param_names'], run=Run(meta, shapes, dtype))
