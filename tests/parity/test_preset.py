"""Where preset `reference` leaves `plain`: every difference is a row of the table of the released code's quirks."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import unimiss_plus
from tests.e2e import tiny
from unimiss_jax import optim, step, train, validate
from unimiss_jax.methods import base

# leaf: (row of the table, plain, reference). Rows that are not here are the same in both presets, or not reproduced.
TABLE = {
    'optim.freeze_3d': (2, 'mask', 'zero_grad'),
    'loss.center_updates': (3, 'once', 'sequential'),
    'epochs': (5, 402, 401),
    'model.pos_interp': ('7-9', 'grid', 'reference'),
    'loss.recon_minmax_eps': (10, 1e-6, 0.),
    'optim.max_skipped': (10, 10, 1),
    'views.ct.pad_hu': (11, -1024, 0),
    'views.ct.pad_to': (11, (0, 0), (256, 256)),
    'views.ct.gamma_stats': (14, 'fixed', 'bg0197'),
    'data.reshuffle': (18, True, False),
    'drr.kind': (20, 'box', 'bspline'),
    'drr.mu': (20, 'water', 'minmax'),
    'drr.image': (20, 'line', 'reference'),
    'drr.quantize': (20, False, True),
}
# Both presets: rows 1, 12, 13, 16, 17, 23, 24, 26 of the table.
SAME = {
    'model.encoder_drop_path': 0., 'model.decoder_drop_path': 0.1, 'views.ct.flip_p': 0.8, 'views.ct.aug_unit': 'slice',
    'optim.min_lr': 1e-6, 'loss.slice_intensity': 'raw', 'model.init': 'released', 'model.dtype': 'float32',
    'drr.paired_window': False, 'optim.accum': 1, 'optim.clip': 0., 'phases.unit': 'epoch',
}


def leaves(config, path=''):
  out = {}
  for key, value in config.items():
    out |= leaves(value, f'{path}{key}.') if hasattr(value, 'items') else {path + key: value}
  return out


def test_the_difference_of_the_presets_is_the_table():
  plain, reference = (leaves(unimiss_plus.get_config(p)) for p in ('plain', 'reference'))
  assert plain.keys() == reference.keys()
  found = {k: (plain[k], reference[k]) for k in plain if plain[k] != reference[k] and k != 'preset'}
  for leaf, (ours, theirs) in sorted(found.items()):
    print(f'{leaf:24} {TABLE.get(leaf, "?")[0]!s:>4}  {ours!s:>10} -> {theirs}')
  assert found == {k: v[1:] for k, v in TABLE.items()}
  for config in (plain, reference):
    assert {k: config[k] for k in SAME} == SAME
  validate.validate(unimiss_plus.get_config('reference'))


def test_an_odd_number_of_epochs_ends_after_a_ct_epoch():
  """5 epochs: CT, X-ray, CT, X-ray, CT and no step more; every one of them within the schedules."""
  config = tiny.config(**reference_leaves(), **{'steps': 0, 'epochs': 5, 'phases.unit': 'epoch', 'batch.ct': 4})
  method = base.make(config, {'ct': (12, {}), 'xray': (40, {})})
  phases = [method.schedule(i)[0] for i in range(method.total_steps)]
  assert phases == ['ct'] * 3 + ['xray'] * 3 + ['ct'] * 3 + ['xray'] * 3 + ['ct'] * 3
  lr, wd = step.schedules(config, method)
  for schedule, low in ((lr, config.optim.min_lr), (wd, config.optim.weight_decay)):
    values = [float(schedule(i)) for i in range(method.total_steps)]
    assert np.isfinite(values).all() and values[-1] > low
  assert unimiss_plus.get_config('reference').epochs == 401    # 201 of CT, 200 of X-rays


def reference_leaves() -> dict:
  """What makes a config the reference preset, the number of epochs apart."""
  return {leaf: theirs for leaf, (_, _, theirs) in TABLE.items() if leaf != 'epochs'}


def test_a_constant_crop(tmp_path):
  """Default: a target of zeros. Reference: 0 / 0, and the run ends with a message at the first such step."""
  off = {f'loss.{k}': 0. for k in ('ct', 'drr', 'slice', 'xray', 'recon_drr', 'recon_xray', 'nce', 'pair_nce')}
  small = dict(off, **{'loss.recon_ct': 1., 'phases.xray': 0, 'model.decoder_drop_path': 0.})
  rows = {'ct': np.full((1, 2, 16, 64, 64, 1), -1., np.float32), 'rng': np.zeros((1, 2), np.uint32)}
  plain, reference = (base.make(tiny.config(**small, **extra), {'ct': (8, {})})
                      for extra in ({}, {'loss.recon_minmax_eps': 0.}))
  params, extra = jax.jit(plain.init)(jax.random.key(0))

  @jax.jit
  def both(params):
    value = lambda m: m.phases['ct'].loss(params, extra, {'ct': rows}, jax.random.key(0), jnp.zeros((), jnp.int32))[0]
    image = plain.predict['reconstruct'](params, extra, {'ct': rows['ct']})['ct']
    return value(plain), value(reference), jnp.mean(image**2)
  ours, theirs, zero_target = both(params)
  assert np.isnan(theirs)
  np.testing.assert_allclose(ours, zero_target, rtol=1e-5)

  run = types.SimpleNamespace(config=unimiss_plus.get_config('reference'), main=False,
                              mirror=types.SimpleNamespace(local=str(tmp_path)),
                              state=types.SimpleNamespace(params=params),
                              checkpoints=types.SimpleNamespace(steps=lambda: []))
  with pytest.raises(train.TrainError, match='step 7 ct: 1 steps in a row were not finite'):
    train.Run.skipped(run, 7, 'ct', {'train/skipped_in_a_row': 1, 'train/bad_tensor': -1}, {})


def test_modes_of_3d_tensors():
  """In X-ray phases only: skipped, run on zero gradients, or trained."""
  for freeze, mode in (('mask', optim.SKIP), ('zero_grad', optim.ZERO), ('none', optim.TRAIN)):
    phases = base.make(tiny.config(**{'optim.freeze_3d': freeze}), {'ct': (16, {}), 'xray': (16, {})}).phases
    assert phases['xray'].update('3d', 5) == mode and phases['ct'].update('3d', 5) == optim.TRAIN


def test_sequential_centres_refuse_micro_batches():
  config = tiny.config(**{'loss.nce': 0., 'loss.pair_nce': 0., 'loss.center_updates': 'sequential', 'optim.accum': 2})
  with pytest.raises(validate.ConfigError, match='set optim.accum=1'):
    validate.check_method(config, base.make(config, {'ct': (16, {}), 'xray': (16, {})}))


@pytest.mark.slow
def test_the_preset_runs_from_start_to_end(tmp_path):
  """Five epochs of one step each on phantoms, at the smallest widths; the last one is CT's."""
  c = unimiss_plus.get_config('reference').unlock()
  small = tiny.config()
  c.epochs, c.data.phantom_records, c.batch.ct, c.batch.xray = 5, 8, 8, 8
  c.model.update(dict({k: small.model[k] for k in ('embed_dims', 'decoder_dims', 'num_heads', 'decoder_heads')},
                      depths=(1, 1, 1, 1), image_size=64, volume_size=(16, 64, 64)))
  c.head.update(small.head.to_dict())
  c.views.ct.size, c.views.xray.size, c.views.drr.size, c.loss.slices = (16, 64, 64), 64, 64, 8
  c.optim.update(dict(warmup_epochs=1., freeze_last_layer=1.))
  c.eval.update(small.eval.to_dict())
  c.log.every = 1
  assert train.train_and_evaluate(c.lock(), str(tmp_path)) == 0
  rows = [key for key in tiny.metrics(tmp_path) if key[1] != 'eval']
  assert rows == [(0, 'ct'), (1, 'xray'), (2, 'ct'), (3, 'xray'), (4, 'ct')]
  for (_, phase), row in tiny.metrics(tmp_path).items():
    if phase != 'eval':
      assert row['train/skipped'] == 0 and np.isfinite(row['train/loss'])
