"""The training step of UniMiSS+: what moves, what must not, and that placement does not matter."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.e2e import tiny
from unimiss_jax import optim, sharding, state, step
from unimiss_jax.methods import alternation, base
from unimiss_jax.optim import named_leaves

DISTIL_ONLY = {'loss.nce': 0., 'loss.pair_nce': 0.}


def rows(n, seed=0, ct=False):
  r = np.random.default_rng(seed)
  out = {'id': np.arange(n, dtype=np.int32), 'group': np.arange(n, dtype=np.int32),
         'rng': r.integers(0, 2 ** 32, (n, 2), np.uint32), 'bad': np.zeros(n, bool)}
  if ct:
    return {'ct': out | {'ct': r.normal(size=(n, 2, 16, 64, 64, 1)).astype(np.float32),
                         'drr': r.random((n, 2, 64, 64, 3)).astype(np.float32)}}
  return {'xray': out | {'xray': r.random((n, 2, 64, 64, 3)).astype(np.float32)}}


class Built:
  """A method with its compiled steps on one mesh; state after `n` steps by run(n)."""

  def __init__(self, mesh=None, **overrides):
    self.config = tiny.config(**({'optim.warmup_epochs': 0., 'optim.lr': 1e-3} | overrides))
    self.mesh = mesh or sharding.make_mesh(1, 1, jax.devices()[:1])
    self.method = base.make(self.config, {'ct': (16, {}), 'xray': (16, {})})
    self.tx = optim.adamw(self.method.groups, clip=self.config.optim.clip)
    init = step.make_init(self.config, self.method, self.tx)
    key = jax.random.key(0)
    placed = sharding.shardings(jax.eval_shape(init, key), self.mesh)
    self.init = lambda: jax.jit(init, out_shardings=placed)(key)
    self.placed = placed

  @functools.cache       # noqa: B019 (one object per test module)
  def step(self, phase):
    f = step.make_step(self.config, self.method, self.tx, phase, self.mesh)
    return jax.jit(f, out_shardings=(self.placed, sharding.replicated(self.mesh)))

  def run(self, batch, before=None):
    start = before or self.init()
    return start, *self.step(next(iter(batch)))(start, sharding.to_devices(batch, self.mesh))


@pytest.fixture(scope='module')
def distil():
  return Built(**DISTIL_ONLY)


def close(a, b, tolerance):
  for name, x in named_leaves(a).items():
    np.testing.assert_allclose(x, named_leaves(b)[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize('shape', [pytest.param((8, 1), marks=pytest.mark.slow), (2, 4)])
def test_init_and_step_do_not_depend_on_the_mesh(distil, shape):
  batch = rows(8)
  start, after, metrics = distil.run(batch)
  other = Built(sharding.make_mesh(*shape), **DISTIL_ONLY)
  begun, got, seen = other.run(batch)
  for name, x in named_leaves(start.params).items():
    np.testing.assert_array_equal(x, named_leaves(begun.params)[name], err_msg=name)
  np.testing.assert_allclose(seen['train/loss'], metrics['train/loss'], rtol=1e-5)
  close(got.opt_state['groups']['rest'].mu, after.opt_state['groups']['rest'].mu, 5e-6)
  close(got.extra, after.extra, 5e-6)


def test_an_xray_step_leaves_3d_weights(distil):
  start, after, _ = distil.run(rows(8))
  moved = {n for n, x in named_leaves(after.params).items()
           if not np.array_equal(x, named_leaves(start.params)[n])}
  names = set(named_leaves(start.params))
  assert not [n for n in moved if '3D' in n or n.endswith('weight_g')]
  assert {n for n in names if 'patch_embed2D' in n} <= moved
  assert 'head/last_layer/weight_v' in moved                        # preset phantom does not freeze it
  assert int(after.opt_state['groups']['3d'].count) == 0


@pytest.mark.slow
def test_a_frozen_last_layer_stays(distil):
  start = distil.init()
  frozen = Built(**DISTIL_ONLY, **{'optim.freeze_last_layer': 1.})
  _, kept, _ = frozen.run(rows(8))
  np.testing.assert_array_equal(kept.params['head']['last_layer']['weight_v'],
                                start.params['head']['last_layer']['weight_v'])


def test_teacher_and_centre_follow_their_formulas(distil):
  start, after, _ = distil.run(rows(8))
  m = distil.config.ema.momentum
  teacher, student = named_leaves(after.extra['teacher']), named_leaves(after.params)
  for name, t in named_leaves(start.extra['teacher']).items():
    np.testing.assert_allclose(teacher[name], m * t + (1 - m) * student[name], rtol=0, atol=1e-6, err_msg=name)
  x = rows(8)['xray']['xray'].reshape(-1, 64, 64, 3)
  from unimiss_jax import models
  from unimiss_jax.models.heads import DINOHead
  h = distil.config.head
  e = models.build(distil.config.model).apply({'params': start.params['backbone']}, x, decode=False).embedding
  t = DINOHead(h.out_dim, h.hidden_dim, h.bottleneck_dim).apply({'params': start.params['head']}, e)
  np.testing.assert_allclose(after.extra['center'][0], 0.1 * np.asarray(t).mean(0), rtol=0, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_counters(distil):
  batch = rows(8)
  batch['xray']['xray'][3, 1, 5, 5, 0] = np.nan
  batch['xray']['bad'][2] = True
  start, after, metrics = distil.run(batch)
  for part in ('params', 'extra'):
    for name, x in named_leaves(getattr(start, part)).items():
      np.testing.assert_array_equal(x, named_leaves(getattr(after, part))[name], err_msg=name)
  for name, x in named_leaves(start.opt_state['groups']).items():
    np.testing.assert_array_equal(x, named_leaves(after.opt_state['groups'])[name], err_msg=name)
  assert int(after.step) == 1 and int(after.opt_state['skipped']) == 1 and int(metrics['train/skipped']) == 1
  assert int(metrics['data/bad_records']) == 1


def test_rows_carry_their_own_random_numbers(distil):
  """Drop-path is on: the loss is the same for any order of the rows, and another for other random numbers."""
  batch, order = rows(8), np.array([3, 0, 7, 1, 6, 2, 5, 4])
  *_, want = distil.run(batch)
  *_, got = distil.run(jax.tree.map(lambda a: a[order], batch))
  np.testing.assert_allclose(got['train/recon_xray_loss'], want['train/recon_xray_loss'], rtol=0, atol=2e-7)
  batch['xray']['rng'] = batch['xray']['rng'] + 1
  *_, other = distil.run(batch)
  assert abs(float(other['train/recon_xray_loss'] - want['train/recon_xray_loss'])) > 2e-6


def test_micro_batches_give_the_same_step(distil):
  batch = rows(8)
  _, want, metrics = distil.run(batch)
  _, got, seen = Built(**DISTIL_ONLY, **{'optim.accum': 2}).run(batch)
  np.testing.assert_allclose(seen['train/loss'], metrics['train/loss'], rtol=1e-5)
  close(got.opt_state['groups']['rest'].mu, want.opt_state['groups']['rest'].mu, 1e-5)
  close(got.extra['center'], want.extra['center'], 1e-6)


def test_a_term_of_weight_0_is_not_built():
  """No DRR term: DRR that are not numbers do not matter; no self-distillation: no teacher, no prototypes."""
  off = {f'loss.{k}': 0. for k in ('ct', 'drr', 'slice', 'xray', 'recon_ct', 'recon_drr', 'recon_xray', 'pair_nce')}
  built = Built(**off)
  batch = rows(8, ct=True)
  batch['ct']['drr'][:] = np.nan
  start, after, metrics = built.run(batch)
  assert int(metrics['train/skipped']) == 0
  assert {k for k in metrics if k.endswith('_loss')} == {'train/nce_loss'}
  assert start.extra == {} and 'last_layer' not in start.params['head'] and list(built.method.weights) == ['student']
  assert built.method.predict.keys() == {'embed', 'project'}
  decoder = [n for n in named_leaves(start.params) if 'DecEmbed' in n]
  assert decoder and all(built.method.groups(n) == 'fixed' for n in decoder)


def test_every_leaf_has_a_sharding_rule_and_a_shared_buffer_never_reaches_a_donating_step():
  built = Built()
  assert set(jax.tree.leaves(built.placed)) and len(named_leaves(built.placed)) > 100
  fresh = built.init()
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((fresh.params, fresh.extra)) if x.size]
  assert len(set(pointers)) == len(pointers)
  owned = state.own(fresh._replace(extra={**fresh.extra, 'teacher': fresh.params}))
  student, teacher = jax.tree.leaves(owned.params), jax.tree.leaves(owned.extra['teacher'])
  assert not {x.unsafe_buffer_pointer() for x in student} & {x.unsafe_buffer_pointer() for x in teacher}


@pytest.mark.parametrize('unit,want', [('step', 'cxcxcxcx'), ('epoch', 'cccxxxcc'), ('joint', 'jjjjjjjj')])
def test_alternation(unit, want):
  config = tiny.config(**{'phases.unit': unit})
  at, names = alternation.schedule(config.phases, 3)
  assert ''.join(at(i)[0][0] for i in range(8)) == want
  assert [at(i)[1] for i in (0, 1, 3)] == [('epoch', 0), None, ('epoch', 1)]
  assert set(names) == {at(i)[0] for i in range(8)}


def test_alternation_of_unequal_turns():
  config = tiny.config(**{'phases.unit': 'step', 'phases.xray': 3})
  assert ''.join(alternation.schedule(config.phases, 5)[0](i)[0][0] for i in range(8)) == 'cxxxcxxx'


def test_chance_levels():
  phases = Built().method.phases
  assert phases['ct'].chance['train/nce_loss'] == pytest.approx(np.log(15))
  assert phases['ct'].chance['train/pair_nce_loss'] == pytest.approx(np.log(8))
  assert phases['xray'].chance['train/dino_loss'] == pytest.approx(np.log(32))
  same = jnp.ones((2, 8, 4))
  from unimiss_jax.losses.contrastive import nt_xent
  assert float(nt_xent(same, 0.2)) == pytest.approx(np.log(15), rel=1e-5)
