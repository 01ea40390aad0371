"""Fine-tuning: what trains and how fast, what of a file each task takes, and what the heads compute."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import finetune
from tests.e2e import tiny
from unimiss_jax import init_from, models, optim, sharding, step, validate
from unimiss_jax.methods import base, supervised
from unimiss_jax.models.heads import Classifier, Segmenter, doublings
from unimiss_jax.optim import named_leaves


def built(preset='phantom_cls3d', classes=3, **overrides):
  c = tiny.task(preset, **overrides)
  stream = 'ct' if c.phases.ct else 'xray'
  mask = (*c.views.ct.size,) if c.phases.ct else (c.views.xray.size,) * 2
  spec = {'label': ((classes,), np.float32)} if c.task.kind == 'cls' else {
      'mask': (mask if c.task.exclusive else (*mask, classes), np.uint8)}
  return c, base.make(c, {stream: (16, spec)})


def shapes(method):
  return named_leaves(jax.eval_shape(method.init, jax.random.key(0))[0])


def groups(method):
  out = {}
  for name in shapes(method):
    out.setdefault(method.groups(name), []).append(name)
  return out


# ---- what trains

def test_only_what_the_task_uses_is_trained():
  _, method = built('phantom_cls3d')
  found = groups(method)
  assert found['head'] == ['task/linear/bias', 'task/linear/kernel'] and 'decoder' not in found
  assert not [n for g, names in found.items() if g != 'fixed' for n in names if '2D' in n or '/Dec' in n]
  _, method = built('phantom_seg2d')
  found = groups(method)
  assert len(found['head']) == 8 and found['decoder']
  assert not [n for g, names in found.items() if g != 'fixed' for n in names if '3D' in n or 'recon_conv' in n]
  assert all('recon_conv' in n or '3D' in n or 'final_norm' in n for n in found['fixed'])


def test_rates_fall_from_the_head_to_the_first_step_of_the_encoder():
  _, method = built('phantom_seg3d', **{'optim.layer_decay': .5, 'task.encoder_rate': .8})
  rate = {n: method.rate(method.groups(n)) for n in shapes(method) if method.groups(n) != 'fixed'}
  for name, depth in (('ConvBlock3D0_0', 6), ('ConvBlock3D1_1', 5), ('patch_embed3D1', 4), ('pos_embed3D1', 4),
                      ('block1_0', 4), ('cls_tokens1', 4), ('block2_0', 3), ('block3_0', 2), ('cls_tokens4', 1),
                      ('block4_0', 1)):
    mine = {r for n, r in rate.items() if n.startswith(f'backbone/transformer/{name}')}
    assert {round(r, 9) for r in mine} == {round(.8 * .5**depth, 9)}, name
  assert {r for n, r in rate.items() if n.startswith(('task/', 'backbone/Dec'))} == {1.}


def test_a_vit_classifies_with_a_rate_for_each_of_its_blocks():
  for preset, mine, other in (('phantom_cls3d', '3D', '2D'), ('phantom_cls2d', '2D', '3D')):
    c = tiny.changed(finetune.get_config(f'{preset},model=vit_tiny').unlock(), {'optim.layer_decay': .5})
    validate.validate(c)
    stream = 'ct' if c.phases.ct else 'xray'
    method = base.make(c, {stream: (16, {'label': ((4,), np.float32)})})
    names = [n.removeprefix('backbone/transformer/') for n in groups(method)['fixed']]
    assert 'mask_token' in names and all(other in n or n == 'mask_token' for n in names)
    rate = {n.removeprefix('backbone/transformer/'): method.rate(method.groups(n)) for n in shapes(method)}
    assert rate[f'patch_embed{mine}/kernel'] == rate['plane_table'] == rate['class_token'] == .5**4
    assert [rate[f'block1_{i}/attn/q/kernel'] for i in range(3)] == [.5**3, .5**2, .5]
    assert rate['final_norm/scale'] == .5 and rate['task/linear/kernel'] == 1
    size = c.views.ct.size if stream == 'ct' else (c.views.xray.size,) * 2
    x = jax.ShapeDtypeStruct((2, 1, *size, 1 if stream == 'ct' else 3), np.float32)
    params = jax.eval_shape(method.init, jax.random.key(0))[0]
    assert jax.eval_shape(method.predict['logits'], params, {}, {stream: x})[stream].shape == (2, 1, 4)


@pytest.mark.slow
def test_a_vit_segments_at_full_size():
  """Fifteen steps on one volume and one picture: the loss falls, every new tensor learns."""
  for preset in ('phantom_seg3d', 'phantom_seg2d'):
    c = tiny.changed(finetune.get_config(f'{preset},model=vit_tiny').unlock(), {
        'model.embed_dims': (16,), 'model.depths': (1,), 'batch.ct': 1, 'batch.xray': 1, 'views.ct.size': (4, 16, 16),
        'views.xray.size': 32, 'model.image_size': 16, 'model.volume_size': (4, 16, 16), 'optim.warmup_epochs': 0.,
        'optim.lr': 1e-2})
    stream = 'ct' if c.phases.ct else 'xray'
    size, classes = ((4, 16, 16), 7) if stream == 'ct' else ((32, 32), 3)
    method = base.make(c, {stream: (16, {'mask': (size if stream == 'ct' else (*size, classes), np.uint8)})})
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    tx = optim.adamw(method.groups)
    state = first = jax.jit(step.make_init(c, method, tx))(jax.random.key(0))
    run, rng = jax.jit(step.make_step(c, method, tx, stream, mesh)), np.random.default_rng(0)
    right = np.broadcast_to(np.arange(size[-1]) >= size[-1] // 2 - 3, size)      # bright from there on
    mask = 3 * right if stream == 'ct' else np.stack([right, ~right, right], -1)
    x = (right + .1 * rng.standard_normal(size))[None, None, ..., None].astype(np.float32)
    x = x if stream == 'ct' else np.repeat(x, 3, -1)
    rows = {'id': np.arange(1), 'rng': np.zeros((1, 2), np.uint32), 'bad': np.zeros(1, bool), stream: x,
            'mask': mask[None].astype(np.uint8)}
    losses = []
    for _ in range(15):
      state, metrics = run(state, {stream: rows})
      losses.append(float(metrics['train/loss']))
    assert losses[-1] < losses[0] / 2 and np.isfinite(losses).all(), losses
    moved = {n for n, x in named_leaves(state.params).items() if not np.array_equal(x, named_leaves(first.params)[n])}
    assert {n for n in named_leaves(first.params) if n.startswith('task/')} <= moved
    out = method.predict['logits'](state.params, {}, {stream: x})[stream]
    assert out.shape == (1, 1, *size, classes + (stream == 'ct'))


RESNET = {'model.depths': (1, 1, 1, 1), 'model.width': 4, 'views.xray.size': 32, 'views.ct.size': (4, 32, 32),
          'batch.ct': 2, 'batch.xray': 2, 'optim.layer_decay': .5, 'optim.warmup_epochs': 0.}


def with_resnet(preset, **overrides):
  """(config, method, stream, fields of two rows) of a tiny ResNet."""
  c = tiny.changed(finetune.get_config(f'{preset},model=resnet50').unlock(), RESNET | overrides)
  validate.validate(c)
  stream = 'ct' if c.phases.ct else 'xray'
  size = c.views.ct.size if stream == 'ct' else (32, 32)
  target = {'label': ((4,), np.float32)} if c.task.kind == 'cls' else {
      'mask': (size if c.task.exclusive else (*size, 3), np.uint8)}
  method = base.make(c, {stream: (16, target)})
  rng, (name, (shape, dtype)) = np.random.default_rng(0), *target.items()
  rows = {stream: rng.standard_normal((2, 1, *size, 1 if stream == 'ct' else 3)).astype(np.float32),
          name: rng.integers(0, 2, (2, *shape)).astype(dtype), 'id': np.arange(2), 'rng': np.zeros((2, 2), np.uint32),
          'bad': np.zeros(2, bool)}
  return c, method, stream, rows


@pytest.mark.parametrize('preset', ['phantom_cls2d', 'phantom_cls3d', 'phantom_seg2d', 'phantom_seg3d'])
def test_a_resnet_takes_every_task_and_its_rates_fall_stage_by_stage(preset):
  _, method, stream, rows = with_resnet(preset)
  params, extra = jax.eval_shape(method.init, jax.random.key(0))
  rate = {n: method.rate(method.groups(n)) for n in named_leaves(params)}
  got = {n: rate[f'backbone/{n}'] for n in ('conv1/kernel', 'bn1/scale', 'layer1_0/conv1/kernel', 'layer4_0/bn3/bias')}
  assert list(got.values()) == [.5**5, .5**5, .5**4, .5]
  assert {r for n, r in rate.items() if n.startswith('task/')} == {1.}
  loss, aux = jax.eval_shape(method.phases[stream].loss, params, extra, {stream: rows}, jax.random.key(0), 0)
  assert jax.tree.structure(jax.eval_shape(method.post, params, extra, aux, 0)) == jax.tree.structure(extra)
  out = jax.eval_shape(method.predict['logits'], params, extra, {stream: rows[stream]})[stream]
  size = rows[stream].shape[2:-1]
  assert out.shape == {'phantom_cls2d': (2, 1, 4), 'phantom_cls3d': (2, 1, 4), 'phantom_seg2d': (2, 1, *size, 3),
                       'phantom_seg3d': (2, 1, *size, 8)}[preset]
  assert jax.eval_shape(method.predict['embed'], params, extra, {stream: rows[stream]})[stream].shape == (2, 1, 128)
  if 'seg' in preset:
    heads = {n: x.shape for n, x in named_leaves(params).items() if n.startswith('task/out/') and n.endswith('kernel')}
    assert [heads[f'task/out/level_{i}/kernel'][0] for i in range(4)] == [4, 4, 4, 8]
    assert params['task']['conv_0a']['kernel'].shape == (3, 3, 128 + 64, 16)      # s4 doubled, beside s3


def test_views_that_a_unet_cannot_halve_are_named():
  with pytest.raises(ValueError, match='views of 72 pixels: .* multiples of 32, the nearest is 64'):
    with_resnet('phantom_seg2d', **{'views.xray.size': 72})


@pytest.mark.slow
@pytest.mark.parametrize('frozen', [False, True])
def test_a_resnet_learns_with_its_batch_statistics_and_stands_still_when_frozen(frozen):
  """A volume slice by slice: the loss falls; frozen, neither weights nor statistics move by one bit."""
  c, method, stream, rows = with_resnet('phantom_seg3d', **{'task.frozen': frozen})
  right = np.broadcast_to(np.arange(32) >= 13, rows['mask'].shape)
  rows |= {'mask': (3 * right).astype(np.uint8), 'ct': (.1 * rows['ct'][..., 0] + right[:, None])[..., None]}
  tx = optim.adamw(method.groups, rate=method.rate)
  state = first = jax.jit(step.make_init(c, method, tx))(jax.random.key(0))
  run = jax.jit(step.make_step(c, method, tx, stream, sharding.make_mesh(1, 1, jax.devices()[:1])))
  losses = []
  for _ in range(30):
    state, metrics = run(state, {stream: rows})
    losses.append(float(metrics['train/loss']))
  assert losses[-1] < losses[0] / 2 and np.isfinite(losses).all(), losses
  before, after = ({**named_leaves(s.params), **named_leaves(s.extra)} for s in (first, state))
  moved = {n for n, x in after.items() if not np.array_equal(x, before[n])}
  assert {n for n in after if n.startswith('task/')} <= moved
  assert any(n.startswith('batch_stats/') for n in moved) != frozen
  assert any(n.startswith('backbone/') for n in moved) != frozen


def test_a_patch_grows_until_it_is_full():
  assert doublings((4, 16, 16)) == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
  with pytest.raises(ValueError, match='use powers of two'):
    doublings((12, 12))


def test_a_rate_scales_the_whole_step():
  params = {'a': jnp.ones((2, 2)), 'b': jnp.ones((2, 2))}
  grads = jax.tree.map(lambda x: .3 * x, params)
  tx = optim.adamw(lambda name: name, rate={'a': 1., 'b': .25}.get)
  new, _ = tx.update(grads, tx.init(params), params, dict.fromkeys('ab', optim.TRAIN), .1, .04)
  np.testing.assert_allclose((1 - new['b']) / (1 - new['a']), .25, rtol=1e-5)
  np.testing.assert_allclose(1 - new['a'], .1 * (1 + .04), rtol=1e-5)


@pytest.fixture(scope='module')
def frozen():
  """Five steps of a linear probe: parameters before and after, and the optimiser's state."""
  c, method = built('phantom_cls3d', **{'task.frozen': True, 'optim.lr': .1, 'steps': 6})
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  tx = optim.adamw(method.groups, clip=c.optim.clip, rate=method.rate)
  init = step.make_init(c, method, tx)
  placed = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
  first = jax.jit(init, out_shardings=placed)(jax.random.key(0))
  run = jax.jit(step.make_step(c, method, tx, 'ct', mesh), out_shardings=(placed, sharding.replicated(mesh)))
  r, state, losses = np.random.default_rng(0), first, []
  x = r.normal(size=(8, 1, 16, 64, 64, 1)).astype(np.float32)
  rows = {'ct': x, 'label': r.integers(0, 2, (8, 3)).astype(np.float32), 'rng': r.integers(0, 9, (8, 2), np.uint32),
          'bad': np.zeros(8, bool)}
  for _ in range(5):
    state, metrics = run(state, sharding.to_devices({'ct': rows}, mesh))
    losses.append(float(metrics['train/ce_loss']))
  return first, state, losses


def test_a_frozen_encoder_does_not_change_by_one_bit(frozen):
  first, last, losses = frozen
  for name, x in named_leaves(first.params).items():
    same = np.array_equal(x, named_leaves(last.params)[name])
    assert same != name.startswith('task/'), name
  assert set(last.opt_state['groups']) == {'head'}
  assert losses[-1] < losses[0]


# ---- what a file gives

def taken(preset, monkeypatch):
  """Names of the parameters that a task takes from a pre-trained network of the same size."""
  other = tiny.config()
  trained = {n: np.zeros(x.shape, x.dtype) for n, x in shapes(base.make(
      other, {'ct': (16, {}), 'xray': (16, {})})).items()}
  tree = {}
  for name, x in trained.items():
    at = tree
    *path, leaf = name.split('/')
    for key in path:
      at = at.setdefault(key, {})
    at[leaf] = x
  from unimiss_jax.porting import arch
  given = init_from.weights.Weights(tree, arch.of_config(other.model.to_dict()), True, (2, 3), 'student', 'x', {})
  monkeypatch.setattr(init_from.weights, 'read', lambda *a: given)
  plain = finetune.get_config(preset)
  c, method = built(preset, 3, **{'init_from': 'x'}, **{
      f'views.xray.{k}': v for k, v in {'size': 64}.items()}, **{f'model.{k}': other.model[k] for k in (
          'final_norm', 'conv_residual', 'last_stride', 'depths', 'sr_ratios', 'init')})
  assert c.init_parts == plain.init_parts and c.model.cls_token == plain.model.cls_token
  wanted = jax.eval_shape(method.init, jax.random.key(0))[0]
  return set(init_from.read(c, wanted)), set(named_leaves(wanted)), method


@pytest.mark.parametrize('preset, parts', [('bcv', ('encoder',)), ('jsrt', ('encoder', 'decoder')),
                                           ('ricord', ('encoder',)), ('chestxr', ('encoder',)),
                                           ('seg3d', ('encoder', 'decoder')), ('cls2d', ('encoder', 'decoder'))])
def test_each_task_takes_its_parts_and_nothing_else(preset, parts, monkeypatch):
  found, wanted, method = taken(preset, monkeypatch)
  assert found == {n for n in wanted if n.startswith('backbone/') and init_from.part_of(n) in parts}
  assert {n for n in wanted - found if method.groups(n) != 'fixed'} >= {n for n in wanted if n.startswith('task/')}


# ---- heads

X = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
MAP = np.random.default_rng(1).standard_normal((3, 2, 4, 4, 6)).astype(np.float32)


def head(features):
  made = Classifier(5, features)
  params = jax.tree.map(lambda x: x + .1, made.init(jax.random.key(0), X, MAP)['params'])
  return params, lambda x, m: np.asarray(made.apply({'params': params}, x, m), np.float64)


def test_the_class_token_is_taken_as_it_is():
  params, apply = head('cls')
  bias = np.asarray(params['linear']['bias'])
  np.testing.assert_allclose(apply(2 * X, MAP) - bias, 2 * (apply(X, MAP) - bias), rtol=1e-5)
  np.testing.assert_array_equal(apply(X, MAP), apply(X, MAP * 0))


def test_one_norm_and_one_layer_serve_class_token_and_mean_token():
  """RICORD: mean of the logits of the normed class token and of the mean of the normed patch tokens."""
  params, apply = head('both')
  assert set(params) == {'linear', 'norm'}
  scale, shift, w, b = (np.asarray(params[m][k], np.float64) for m, k in (
      ('norm', 'scale'), ('norm', 'bias'), ('linear', 'kernel'), ('linear', 'bias')))
  norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift
  tokens = norm(MAP.reshape(3, -1, 6).astype(np.float64)).mean(1)
  want = (norm(X.astype(np.float64)) @ w + b + tokens @ w + b) / 2
  np.testing.assert_allclose(apply(X, MAP), want, atol=1e-5)


def test_the_mean_token_alone():
  params, apply = head('mean')
  want = MAP.reshape(3, -1, 6).mean(1) @ np.asarray(params['linear']['kernel']) + np.asarray(params['linear']['bias'])
  np.testing.assert_allclose(apply(X, MAP), want, atol=1e-5)


def test_deep_supervision_builds_the_outputs_that_count_and_aims_at_their_sizes():
  """Full MiT+ on a patch of the abdominal task: outputs at 1, (1, 1/2, 1/2), (1/2, 1/4, 1/4), (1/4, 1/8, 1/8)."""
  config = finetune.get_config('bcv')
  model = models.build(config.model)
  params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
  x = jax.ShapeDtypeStruct((1, 48, 192, 192, 1), jnp.float32)
  maps = jax.eval_shape(lambda p, x: model.apply({'params': p}, x, method='decoder_maps'), params, x)
  assert [m.shape[1:] for m in maps] == [(12, 12, 12, 320), (12, 24, 24, 256), (24, 48, 48, 128), (48, 96, 96, 64),
                                         (48, 192, 192, 32)]
  method = base.make(config, {'ct': (24, {'mask': ((48, 192, 192), np.uint8)})})
  heads = {n: s.shape for n, s in shapes(method).items() if n.startswith('task/') and n.endswith('kernel')}
  assert heads == {f'task/level_{i}/kernel': (c, 14) for i, c in enumerate((32, 64, 128, 256))}
  small = [np.zeros((1, 2, 2), np.float32), np.ones((1, 4, 4), np.float32)]
  out = Segmenter(3, 2)
  made = out.apply(out.init(jax.random.key(0), [m[..., None] for m in small]), [m[..., None] for m in small])
  assert [m.shape for m in made] == [(1, 4, 4, 3), (1, 2, 2, 3)]


@pytest.mark.parametrize('preset, first, middle, last', [
    ('bcv', 1e-4, 1e-4 * .5**.9, 1e-4 * .01**.9), ('jsrt', 1e-4, 1e-4 * .5**.9, 1e-4 * 1e-4**.9),
    ('ricord', 1e-5, 1e-5, 1e-5), ('chestxr', 1e-4, 1e-4 * .5**.9, 1e-4 * (1 / (30 * 561))**.9)])
def test_learning_rates_of_the_protocols(preset, first, middle, last):
  config = finetune.get_config(preset)
  stream = 'ct' if config.phases.ct else 'xray'
  spec = {'label': ((3,), np.float32)} if config.task.kind == 'cls' else {'mask': ((64, 64, 3), np.uint8)}
  method = base.make(config, {stream: (24, spec)})
  lr, wd = step.schedules(config, method)
  total = {'bcv': 25_000, 'jsrt': 10_000, 'ricord': 14_600, 'chestxr': 16_830}[preset]
  assert method.total_steps == total
  for at, want in ((0, first), (total // 2, middle), (total - 1, last)):
    assert float(lr(at)) == pytest.approx(want, rel=1e-12), at
  assert float(wd(total // 3)) == pytest.approx({'ricord': 5e-3}.get(preset, 3e-5), rel=1e-12)
  assert config.optim.eps == (1e-4 if preset == 'jsrt' else 1e-8)


def test_layers_are_counted_along_the_pyramid():
  assert [supervised.layer(f'transformer/{n}') for n in ('ConvBlock2D0_0/x', 'ConvBlock3D1_0/x', 'patch_embed2D1/x',
                                                         'block4_1/x', 'final_norm/scale')] == [0, 1, 2, 5, 5]
