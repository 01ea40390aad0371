"""A ViT as backbone of UniMiSS+: its config passes the checks, and a step of either phase trains what it must."""
import jax
import numpy as np
import pytest

from configs import unimiss_plus
from tests.e2e import tiny
from unimiss_jax import optim, sharding, step, validate
from unimiss_jax.methods import base
from unimiss_jax.optim import named_leaves


def config(**overrides):
  c = unimiss_plus.get_config('phantom,model=vit_tiny').unlock()
  c.model.update(dict(embed_dims=(8,), num_heads=(2,), depths=(1,)))
  c.head.update(dict(out_dim=8, hidden_dim=8, bottleneck_dim=4))
  c.batch.ct = c.batch.xray = 4
  c.optim.warmup_epochs = 0.
  c.loss.update(dict(ct=1., drr=.5, slice=.1, xray=1., slices=8))
  return tiny.changed(c, overrides)


@pytest.mark.slow
def test_a_step_of_either_phase_trains_what_is_of_it():
  c = config()
  validate.validate(c)
  method = base.make(c, {'ct': (8, {}), 'xray': (8, {})})
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  tx = optim.adamw(method.groups)
  init = step.make_init(c, method, tx)
  state = jax.jit(init)(jax.random.key(0))
  sharding.shardings(state, mesh)                                          # every tensor has its place
  rng = np.random.default_rng(0)
  rows = {'id': np.arange(4), 'group': np.arange(4), 'rng': np.zeros((4, 2), np.uint32), 'bad': np.zeros(4, bool),
          'xray': rng.random((4, 2, 64, 64, 3), np.float32)}
  after, metrics = jax.jit(step.make_step(c, method, tx, 'xray', mesh))(state, {'xray': rows})
  moved = {n for n, x in named_leaves(after.params).items() if not np.array_equal(x, named_leaves(state.params)[n])}
  assert metrics['train/skipped'] == 0 and 'backbone/transformer/plane_table' in moved
  assert not [n for n in moved if '3D' in n]
  ct = {'ct': rng.random((4, 2, *c.views.ct.size, 1), np.float32), 'drr': rng.random((4, 2, 64, 64, 3), np.float32)}
  grads = jax.eval_shape(lambda p: jax.grad(lambda p: method.phases['ct'].loss(
      p, state.extra, {'ct': rows | ct}, jax.random.key(0), 0)[0])(p), state.params)
  assert jax.tree.structure(grads) == jax.tree.structure(state.params)


def test_what_a_vit_cannot_do_is_refused():
  with pytest.raises(validate.ConfigError, match='vit_tiny has no decoder.*set loss.recon_ct to 0'):
    validate.validate(config(**{'loss.recon_ct': 5.}))
  with pytest.raises(validate.ConfigError, match=r'views.xray.size.*nearest valid size is \(64, 64\)'):
    validate.validate(config(**{'views.xray.size': 60}))
  with pytest.raises(ValueError, match='model=vit_huge unknown: use mit_plus, vit_b16 or vit_tiny'):
    unimiss_plus.get_config('plain,model=vit_huge')
