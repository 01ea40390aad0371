"""Joint: what each phase trains, what each run builds, which configs are refused."""
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import joint
from data_pipelines import streams
from unimiss_jax import models, optim, sharding, step, validate
from unimiss_jax.methods import base

RECORDS = {'ct': (16, {}), 'xray': (16, {})}


def tiny(preset='phantom', **leaves):
  c = joint.get_config(preset)
  c.unlock()
  c.steps = 6
  c.model.update(dict(embed_dims=(4, 4, 8, 8, 8, 8), decoder_dims=(8, 8, 8, 4, 4), num_heads=(1, 1, 1, 1),
                      decoder_heads=(1, 1, 1)))
  c.batch.update(dict(ct=4, xray=4))
  c.head.update(dict(out_dim=4, hidden_dim=16, bottleneck_dim=8))
  c.joint.update(dict(width=16, freeze_prototypes=1, prototypes=4, volume_queue=0, rates=()))
  c.joint.inter.update(dict(layers=1, hidden=16, head_dim=4, dropout=.1))
  c.optim.update(dict(name='larc', lr=.5, weight_decay=1e-6, weight_decay_end=1e-6))      # that of plain
  c.joint.update(leaves)
  validate.validate(c)
  return c


def made(config):
  return base.make(config, {s: v for s, v in RECORDS.items() if config.phases[s]})


def shapes(config):
  return jax.eval_shape(made(config).init, jax.random.key(0))[0]


@pytest.mark.parametrize('preset, name, lr, batch, flips', [
    ('phantom', 'adamw', 2e-3, 64, 0.), ('swav2d', 'adamw', 2e-3, 64, 0.), ('deepcluster2d', 'adamw', 2e-3, 64, 0.),
    ('plain', 'larc', .15, 128, .5), ('reference', 'larc', .15, 128, .5)])
def test_phantoms_have_a_recipe_of_their_own(preset, name, lr, batch, flips):
  c = joint.get_config(preset)
  assert (c.optim.name, c.optim.lr, c.batch.xray, c.views.xray.flip_p) == (name, lr, batch, flips)


def test_the_schedule_is_that_of_the_config():
  method = made(tiny())
  assert [method.schedule(i)[0] for i in range(6)] == ['intra'] * 3 + ['mask'] + ['inter'] * 2
  assert {n: dict(p.streams) for n, p in method.phases.items()} == {
      'intra': {'xray': 4}, 'mask': {'ct': 4}, 'inter': {'ct': 4}}
  assert dict(made(tiny('joint')).phases['joint'].streams) == {'xray': 4, 'ct': 4}


def test_a_baseline_builds_nothing_of_volumes_and_the_same_encoder():
  full, plain = shapes(tiny()), shapes(tiny('swav2d'))
  assert set(full) == {'backbone', 'head', 'slice', 'inter', 'mask', 'prototypes'}
  assert set(plain) == {'backbone', 'head'}
  assert full['backbone'] == plain['backbone'] and full['head'] == plain['head']
  assert set(shapes(tiny(phases=('intra', 'inter'), shares=(.5, .5)))) == set(full) - {'mask'}


def test_a_baseline_embeds_a_volume_as_the_mean_of_its_slices():
  method = made(tiny('swav2d'))
  params, extra = jax.jit(method.init)(jax.random.key(0))
  volumes = np.random.default_rng(0).random((2, 1, 3, 64, 64, 1), np.float32)
  slices = np.repeat(volumes[:, 0], 3, -1)
  out = jax.jit(method.predict['embed'])(params, extra, {'ct': volumes, 'xray': slices})
  assert out['ct'].shape == (2, 1, 8) and np.ptp(out['xray'], 1).max() > 1e-3
  np.testing.assert_allclose(out['ct'][:, 0], np.mean(out['xray'], 1), rtol=0, atol=1e-5)


def test_what_cannot_be_is_named(caplog):
  for leaves, message in ((dict(phases=('intra', 'outer'), shares=(.5, .5)), '"outer" unknown'),
                          (dict(shares=(.5, .5, .5)), 'together 1'),
                          (dict(phases=('intra',), shares=(1.,)), 'phases.ct')):
    with pytest.raises(ValueError, match=message):
      made(tiny(**leaves))
  with caplog.at_level(logging.WARNING):
    made(tiny())
    assert not caplog.records
    made(tiny(prototypes=5))
  assert 'joint.prototypes=5 prototypes for batch.ct=4' in caplog.text and 'FIX: joint.volume_queue=4' in caplog.text
  caplog.clear()
  made(tiny(prototypes=5, volume_queue=4))
  assert not caplog.records
  with pytest.raises(ValueError, match='joint.image_queue=6 rows are no multiple of batch.xray=4: use 4 or 8'):
    made(tiny(image_queue=6))


@pytest.mark.parametrize('preset, stores, parts', [
    ('phantom,objective=deepcluster', {'intra', 'inter'}, {'backbone', 'head', 'slice', 'inter', 'mask'}),
    ('deepcluster2d', {'intra'}, {'backbone', 'head'})])
def test_deepcluster_has_banks_in_place_of_prototypes(preset, stores, parts):
  config = tiny(preset, image_clusters=(4, 4, 4))
  params, extra = jax.eval_shape(made(config).init, jax.random.key(0))
  assert set(params) == parts and set(extra) == stores and 'last_layer' not in params['head']
  bank = extra['intra']
  assert bank['bank_rows'].shape == (2, 4, 4, 8) and bank['bank_ids'].shape == (4, 4) and bank['table'].shape == (3, 16)
  with pytest.raises(ValueError, match=r'joint.image_clusters=\(17,\): a number for every head, none above the 16'):
    made(tiny(preset, image_clusters=(17,)))


def test_an_epoch_of_deepcluster_is_a_pass_over_the_stream_of_its_term():
  config = tiny('phantom,objective=deepcluster', image_clusters=(4,))
  config.steps = 24      # 12 of intra with epochs of 4, 5 of mask, 7 of inter
  method = made(config)
  assert [i for i in range(24) if method.schedule(i)[1]] == [0, 4, 8, 12, 16, 17, 20, 21]
  assert method.schedule(12)[1] == ('phase', 'mask') and method.schedule(17)[1] == ('phase', 'inter')
  assert method.between is not None and made(tiny()).between is None


@pytest.mark.parametrize('preset', ['plain', 'reference', 'plain,objective=swav,schedule=baseline_2d'])
def test_presets_of_the_papers_sizes_build_their_state(preset):
  config = joint.get_config(preset)
  validate.validate(config)
  method = base.make(config, {s: (3072, {}) for s in ('ct', 'xray') if config.phases[s]})
  params, extra = jax.eval_shape(method.init, jax.random.key(0))
  numbers = sum(x.size for n, x in optim.named_leaves(params['backbone']).items())
  assert numbers == 23_508_032 and 'batch_stats' in extra      # ResNet-50 without its classes
  assert ('inter' in params) == bool(config.phases.ct)


def test_slices_that_the_attention_cannot_halve_are_named():
  config = tiny()
  config.views.ct.size = (18, 64, 64)
  with pytest.raises(ValueError, match=r'18 slices of views.ct.size=.* multiple of joint.inter.downsample=4: use 16'):
    made(config)


def rows(rng, *shape):
  return {'rng': jax.random.bits(jax.random.key(7), (4, 2), jnp.uint32), 'bad': jnp.zeros(4, jnp.int32),
          ('ct' if len(shape) == 4 else 'xray'): jnp.asarray(rng.uniform(size=(4, 2, *shape)), jnp.float32)}


@pytest.mark.slow
def test_the_mask_phase_leaves_the_slice_encoder_bit_equal():
  """One step of it: token, decoder and Transformer move, nothing else does, not even by decay."""
  config = tiny()
  config.optim.warmup_epochs = 0.
  method = made(config)
  optimiser = optim.of(config, method)
  state = jax.jit(step.make_init(config, method, optimiser))(jax.random.key(0))
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  batch = {'ct': rows(np.random.default_rng(0), 8, 64, 64, 1)}
  after, metrics = jax.jit(step.make_step(config, method, optimiser, 'mask', mesh))(state, batch)
  assert metrics['train/skipped'] == 0 and metrics['train/mask_loss'] > 0
  for name, x in optim.named_leaves(state.params).items():
    y = optim.named_leaves(after.params)[name]
    if not name.startswith(('mask/', 'inter/')):
      np.testing.assert_array_equal(x, y, err_msg=name)
  for name in ('mask/token', 'mask/decoder/kernel', 'inter/layer_0/attn/to_q/kernel'):
    assert np.any(optim.named_leaves(state.params)[name] != optim.named_leaves(after.params)[name]), name


def test_prototypes_wait_at_the_start_of_their_phase():
  method = made(tiny())
  modes = lambda phase, group: [int(method.phases[phase].update(group, i)) for i in range(6)]
  assert modes('intra', 'head_prototypes')[:3] == [optim.SKIP, optim.TRAIN, optim.TRAIN]
  assert modes('inter', 'prototypes')[4:] == [optim.SKIP, optim.TRAIN]
  assert modes('inter', 'head') == [optim.SKIP] * 6 and modes('intra', 'encoder') == [optim.TRAIN] * 6
  paths = models.param_shapes(models.build(tiny().model))
  assert {method.groups('/'.join(('backbone', *path))) for path in paths} == {'encoder', 'fixed'}


def test_small_crops_come_from_the_host_and_the_loss_takes_them_with_a_queue():
  """Shapes alone; batch statistics of a ResNet pass through both sizes."""
  config = tiny('swav2d', image_queue=8, local=dict(crops=3, size=32, scale=(.1, .3)))
  config.model = dict(name='resnet50', depths=(1, 1, 1, 1), width=4, in_channels=(3, 1), image_size=64, dtype='float32',
                      remat='')
  record = {'index': 0, 'bad': False, 'image': np.random.default_rng(0).integers(0, 256, (80, 90)).astype(np.uint8)}
  views = streams.views('xray', record, config, np.random.default_rng(1))
  config.joint.local.crops = 0
  alone = streams.views('xray', record, config, np.random.default_rng(1))
  np.testing.assert_array_equal(views['xray'], alone['xray'])
  assert views['local'].shape == (3, 32, 32, 3) and views['local'].std() > 0 and 'local' not in alone
  method = made(config)
  params, extra = jax.eval_shape(method.init, jax.random.key(0))
  assert extra['intra']['bank_rows'].shape == (2, 2, 4, 8)
  batch = {'xray': {k: jax.ShapeDtypeStruct((4, *x.shape), x.dtype) for k, x in views.items()} | {
      'rng': jax.ShapeDtypeStruct((4, 2), jnp.uint32), 'id': jax.ShapeDtypeStruct((4,), jnp.int32)}}
  loss, aux = jax.eval_shape(method.phases['intra'].loss, params, extra, batch, jax.random.key(0), 0)
  assert loss.shape == () and aux.rows['intra'][0].shape == (4, 2, 8)
  assert jax.tree.structure(jax.eval_shape(method.post, params, extra, aux, 0)) == jax.tree.structure(extra)


def test_parts_of_slices_and_the_small_resnet_of_the_phantoms():
  with pytest.raises(ValueError, match=r'slice_parts=3 does not divide the 16 slices .*: use one of 1, 2, 4, 8, 16'):
    made(tiny(slice_parts=3))
  with pytest.raises(ValueError, match='model=vit_tiny unknown: use resnet50'):
    joint.get_config('phantom,model=vit_tiny')
  config = joint.get_config('joint,model=resnet50')
  validate.validate(config)
  assert joint.get_config('plain,model=resnet50').model.depths == (3, 4, 6, 3) and config.model.depths == (1, 1, 1, 1)
  _, extra = jax.eval_shape(made(config).init, jax.random.key(0))
  assert set(extra) == {'batch_stats'}
