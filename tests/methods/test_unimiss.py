"""The pilot UniMiSS: order and length of its epochs, where schedules are read, which terms are built, on what."""
import itertools

import jax
import numpy as np
import pytest

from configs import finetune, unimiss
from tests.e2e import tiny
from tests.methods.test_unimiss_plus import rows
from tests.parity.test_preset import leaves
from unimiss_jax import optim, sharding, step, validate
from unimiss_jax.losses import distillation, reference
from unimiss_jax.methods import base

DATA = {'ct': (24, {}), 'xray': (17, {})}      # 3 and 2 steps an epoch
LENGTHS, RECORDS = {'ct': 3, 'xray': 2}, {'ct': 24, 'xray': 17}
ORDER = ('xray', 'xray', 'ct', 'ct', 'xray', 'xray')
TERMS = {'ct': ('dino', 'slice', 'slice_slice', 'ct_slice'), 'xray': ('dino',)}


def walk():
  """(epoch, phase, step within it) of every step of six epochs."""
  return [(e, phase, j) for e, phase in enumerate(ORDER) for j in range(LENGTHS[phase])]


def test_xrays_begin_and_an_epoch_is_a_pass_over_its_own_stream():
  method = base.make(tiny.pilot(epochs=6), DATA)
  assert method.total_steps == 14 and tuple(method.phases) == ('xray', 'ct')
  assert [method.schedule(i) for i in range(14)] == [
      (phase, None if j else ('epoch', e)) for e, phase, j in walk()]
  assert [method.timeline.until(n) for n in (0, 1, 2.5, 3, 6)] == [0, 2, 6, 7, 14]
  assert method.phases['ct'].update('last_layer', 0) == optim.TRAIN
  frozen = base.make(tiny.pilot(**{'optim.freeze_last_layer': 3.}), DATA).phases['ct'].update
  assert [int(frozen('last_layer', i)) for i in (6, 7)] == [optim.SKIP, optim.TRAIN]


def test_schedules_go_by_steps_or_as_released_by_records():
  """Released: laid out over epochs of the number of CT, read at epoch * (records of the phase) + step."""
  change = {'optim.warmup_epochs': 1., 'epochs': 6}
  mine, theirs = (tiny.pilot(**change, **{'optim.schedule_unit': unit}) for unit in ('step', 'dataset'))
  lr, wd = step.schedules(mine, base.make(mine, DATA))
  expected = optim.cosine_schedule(mine.optim.lr, mine.optim.min_lr, 14, 2)
  np.testing.assert_allclose([lr(i) for i in range(14)], [expected(i) for i in range(14)], rtol=1e-6)
  method = base.make(theirs, DATA)
  lr, wd = step.schedules(theirs, method)
  places = [e * RECORDS[phase] + j for e, phase, j in walk()]
  for schedule, warm, first, last in ((lr, 24, theirs.optim.lr, theirs.optim.min_lr),
                                      (wd, 0, theirs.optim.weight_decay, theirs.optim.weight_decay_end)):
    whole = optim.cosine_schedule(first, last, 6 * 24, warm)
    np.testing.assert_allclose([schedule(i) for i in range(14)], [whole(p) for p in places], rtol=1e-5)
    traced = jax.jit(jax.vmap(schedule))(np.arange(14))
    np.testing.assert_allclose(traced, [whole(p) for p in places], rtol=1e-5)
  with pytest.raises(ValueError, match='needs epochs > 0'):
    base.make(tiny.pilot(**{'optim.schedule_unit': 'dataset', 'epochs': 0, 'steps': 9}), DATA)
  with pytest.raises(ValueError, match='phases.unit=epoch alone'):
    base.make(tiny.pilot(**{'optim.schedule_unit': 'dataset', 'phases.unit': 'step'}), DATA)


def seen(config, phase):
  """Names of the losses that a step of this phase reports; the state keeps its shapes."""
  method = base.make(config, DATA)
  tx = optim.adamw(method.groups)
  state = jax.eval_shape(step.make_init(config, method, tx), jax.random.key(0))
  f = step.make_step(config, method, tx, phase, sharding.make_mesh(1, 1, jax.devices()[:1]))
  after, metrics = jax.eval_shape(f, state, rows(8, ct=phase == 'ct'))
  assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
  return {k[6:-5] for k in metrics if k.startswith('train/') and k.endswith('_loss')}


@pytest.mark.parametrize('model', ['mit_small', 'mit_plus'])
def test_the_objective_is_built_on_either_network(model):
  config = tiny.pilot(model)
  validate.validate(config)
  for phase, terms in TERMS.items():
    assert seen(config, phase) == set(terms)


def test_terms_of_weight_0_are_not_built():
  assert seen(tiny.pilot(**{'loss.slice_slice': 0., 'loss.ct_slice': 0.}), 'ct') == {'dino', 'slice'}
  with pytest.raises(ValueError, match="model.name='mit_small' reconstructs nothing"):
    base.make(tiny.pilot(**{'loss.recon_ct': 1.}), DATA)


def test_the_decoder_is_trained_where_it_embeds():
  groups = {m: base.make(tiny.pilot(m), DATA).groups for m in ('mit_small', 'mit_plus')}
  assert groups['mit_small']('backbone/DecEmbed2D0/proj/kernel') == 'rest'
  assert groups['mit_small']('backbone/DecPosEmbed3D0') == '3d'
  assert groups['mit_plus']('backbone/DecEmbed2D1/proj/kernel') == 'fixed'      # nothing is reconstructed


def test_the_centre_that_a_step_leaves():
  """Default: the mean over teachers; released: as the last loss left it."""
  volumes, slices = np.float32([[1., 0.]]), np.float32([[0., 3.]])
  np.testing.assert_array_equal(distillation.center_of_step([volumes, slices]), [[.5, 1.5]])
  np.testing.assert_array_equal(reference.center_of_step([volumes, slices]), slices)


# leaf: (row of the table of the released code's quirks, plain, reference).
TABLE = {
    'optim.freeze_3d': (2, 'mask', 'zero_grad'),
    'loss.center_updates': (3, 'once', 'sequential'),
    'model.pos_interp': ('7-9', 'grid', 'reference'),
    'optim.max_skipped': (10, 10, 1),
    'views.ct.pad_hu': (11, -1024, 0),
    'views.ct.pad_to': (11, (0, 0), (256, 256)),
    'views.ct.gamma_stats': (14, 'fixed', 'bg0197'),
    'data.reshuffle': (18, True, False),
    'optim.schedule_unit': (21, 'step', 'dataset'),
}
RECIPE = {'epochs': 200, 'phases.ct': 2, 'phases.xray': 2, 'batch.ct': 192, 'batch.xray': 192, 'optim.lr': 8e-4,
          'optim.lr_reference_batch': 256, 'optim.clip': .3, 'optim.clip_mode': 'per_tensor', 'views.xray.size': 224,
          'optim.freeze_last_layer': 1., 'optim.warmup_epochs': 10., 'loss.slices': 1, 'model.image_size': 224}


def test_its_encoder_classifies_and_does_not_segment():
  config = finetune.get_config('cls3d,model=mit_tiny').unlock()
  config.batch.ct = 2
  validate.validate(config)
  spec = {'label': ((3,), np.float32)}
  method = base.make(config, {'ct': (8, spec)})
  params, _ = jax.eval_shape(method.init, jax.random.key(0))
  names = optim.named_leaves(params)
  assert {g: sum(method.groups(n) == g for n in names) for g in ('head', 'fixed')} == {
      'head': 2, 'fixed': sum('2D' in n or not n.startswith(('task', 'backbone/transformer')) for n in names)}
  like = lambda dtype, *shape: jax.ShapeDtypeStruct((2, *shape), dtype)
  rows = {'ct': like(np.float32, 2, 16, 96, 96, 1), 'label': like(np.float32, 3), 'rng': like(np.uint32, 2)}
  loss, aux = jax.eval_shape(method.phases['ct'].loss, params, {}, {'ct': rows}, jax.random.key(0), 0)
  assert loss.shape == () and 'train/accuracy' in aux.metrics
  with pytest.raises(ValueError, match='has no maps to segment'):
    base.make(finetune.get_config('seg3d,model=mit_tiny'), {'ct': (8, {'mask': ((16, 96, 96, 1), np.uint8)})})


def test_presets_and_networks():
  plain, theirs = (leaves(unimiss.get_config(p)) for p in ('plain', 'reference'))
  assert {k: (plain[k], theirs[k]) for k in plain if plain[k] != theirs[k] and k != 'preset'} == {
      k: v[1:] for k, v in TABLE.items()}
  assert {k: plain[k] for k in RECIPE} == RECIPE
  for preset, model in itertools.product(unimiss.PRESETS, unimiss.MODELS):
    validate.validate(unimiss.get_config(f'{preset},model={model}'))
  with pytest.raises(ValueError, match='model=mit_huge" unknown'):
    unimiss.get_config('plain,model=mit_huge')
