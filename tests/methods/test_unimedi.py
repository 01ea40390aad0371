"""The training step of UniMedI: which slices it takes, what the teacher is, and what each option changes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import unimedi
from data_pipelines.phantom import studies as world
from tests.e2e import tiny
from unimiss_jax import models, optim, sharding, step, validate
from unimiss_jax.losses import contrastive
from unimiss_jax.methods import base
from unimiss_jax.methods.unimedi import frozen, hidden_tokens, visible
from unimiss_jax.models import slices
from unimiss_jax.models.bert import Bert
from unimiss_jax.models.vit import class_rows
from unimiss_jax.optim import named_leaves

N = 4      # studies of each kind
ALL = {'unimedi.icl': 1., 'unimedi.pcl': 1.}


def config(**overrides):
  c = unimedi.get_config('phantom').unlock()
  c.model.update(dict(embed_dims=(8,), num_heads=(2,), depths=(1,)))
  c.head.update(dict(out_dim=8, hidden_dim=8, bottleneck_dim=4))
  c.batch.ct = c.batch.xray = N
  c.steps, c.data.phantom_records, c.optim.warmup_epochs = 20, 80, 0.
  c.unimedi.embed_dim = 6
  c.unimedi.text.update(dict(num_layers=1, width=8, heads=2, mlp=8))
  return tiny.changed(c, overrides)


def rows(seed=0, streams=('ct', 'xray')):
  r, out = np.random.default_rng(seed), {}
  for i, name in enumerate(streams):
    shape = (N, 1, 8, 16, 16, 1) if name == 'ct' else (N, 1, 16, 16, 3)
    x = r.normal(size=shape) if name == 'ct' else r.random(shape)
    out[name] = {'id': np.arange(N, dtype=np.int32), 'rng': r.integers(0, 2**32, (N, 2), np.uint32),
                 'bad': np.zeros(N, bool), name: x.astype(np.float32),
                 'ids': r.integers(4, 29, (N, 16)).astype(np.int32), 'mask': np.ones((N, 16), np.int32),
                 'report': np.arange(N, dtype=np.int32) + N * i}
  return out


class Built:
  """A method, and its step on one mesh."""

  def __init__(self, mesh=None, streams=('ct', 'xray'), **overrides):
    self.config = config(**overrides)
    self.mesh = mesh or sharding.make_mesh(1, 1, jax.devices()[:1])
    self.method = base.make(self.config, {s: (80, {}) for s in streams})
    self.tx = optim.adamw(self.method.groups)
    self.init = jax.jit(step.make_init(self.config, self.method, self.tx))

  @functools.cached_property
  def step(self):
    return jax.jit(step.make_step(self.config, self.method, self.tx, 'joint', self.mesh))

  @functools.cached_property
  def loss(self):
    return jax.jit(self.method.phases['joint'].loss)

  def start(self):
    """Initial state whose teacher is another network than its student."""
    state, other = self.init(jax.random.key(0)), self.init(jax.random.key(1))
    teacher = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, other.extra['teacher'])
    return state._replace(extra=state.extra | {'teacher': teacher})


@pytest.fixture(scope='module')
def plain():
  return Built()


@pytest.fixture(scope='module')
def full():
  return Built(**ALL)


def chosen(built, backbone, volume):
  model = models.build(built.config.model)
  return np.asarray(slices.select(slices.scores(class_rows(model, backbone, volume=volume)[1], 8)[1], 2))


def vl_by_hand(built, params, batch, planes):
  """Image-text loss with given planes, from the parts."""
  c = built.config
  model, fields = models.build(c.model), c.unimedi.text
  xray = model.apply({'params': params['backbone']}, image=batch['xray']['xray'][:, 0], method='encode').cls
  ct = model.apply({'params': params['backbone']}, volume=batch['ct']['ct'][:, 0], slices=planes, method='encode').cls
  bert = Bert(29, 8, 1, fields.heads, fields.mlp, fields.positions)
  said = [bert.apply({'params': params['text']}, batch[s]['ids'], batch[s]['mask']).last[:, 0] for s in ('xray', 'ct')]
  image = jnp.concatenate([xray, ct]) @ params['vision_proj']['kernel']
  return contrastive.info_nce(image, jnp.concatenate(said) @ params['text_proj']['kernel'], params['log_scale'])


@pytest.mark.slow
def test_the_step_takes_the_slices_that_the_teacher_looks_at(plain):
  state, batch = plain.start(), rows()
  volume = batch['ct']['ct'][:, 0]
  of_teacher = chosen(plain, state.extra['teacher']['backbone'], volume)
  of_student = chosen(plain, state.params['backbone'], volume)
  assert (of_teacher != of_student).any() and (of_teacher != [0, 1]).any()
  value, _ = plain.loss(state.params, state.extra, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(value, vl_by_hand(plain, state.params, batch, of_teacher), rtol=1e-5)
  for other in (of_student, np.tile([0, 1], (N, 1))):
    assert abs(value - vl_by_hand(plain, state.params, batch, other)) > 1e-5
  swapped, _ = plain.loss(state.params, {'teacher': {'backbone': state.params['backbone']}}, batch,
                          jax.random.key(0), 0)
  np.testing.assert_allclose(swapped, vl_by_hand(plain, state.params, batch, of_student), rtol=1e-5)
  planes = plain.method.predict['planes'](state.params, state.extra, {'ct': batch['ct']['ct']})['ct']
  np.testing.assert_array_equal(planes[:, 0], of_teacher)


@pytest.mark.slow
def test_no_gradient_reaches_the_teacher(full):
  state, batch = full.start(), rows()
  value = lambda params, extra: full.method.phases['joint'].loss(params, extra, batch, jax.random.key(0), 0)[0]
  of_params, of_teacher = jax.jit(jax.grad(value, (0, 1)))(state.params, state.extra)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(of_teacher))
  grads = named_leaves(of_params)
  assert all(np.asarray(x).any() for n, x in grads.items() if n.endswith('kernel')) and 'head/mlp_0/kernel' in grads


@pytest.mark.slow
@pytest.mark.parametrize('name, other', [('ct', 'xray'), ('xray', 'ct')])
def test_both_kinds_of_image_train_the_same_blocks(full, name, other):
  state, one = full.start(), Built(streams=(name,), **{f'phases.{other}': 0, 'phases.unit': 'step'})
  loss = lambda p: one.method.phases['joint'].loss(p, state.extra, rows(streams=(name,)), jax.random.key(0), 0)[0]
  got = named_leaves(jax.jit(jax.grad(loss))(state.params)['backbone']['transformer'])
  assert all(np.asarray(x).any() for n, x in got.items() if 'block' in n and n.endswith('kernel'))
  assert np.asarray(got['patch_embed3D/kernel']).any() == (name == 'ct')
  assert np.asarray(got['patch_embed2D/kernel']).any()      # of a CT through its slices


@pytest.mark.slow
def test_the_teacher_is_the_moving_average_of_the_student(full):
  state = full.start()
  want, m = named_leaves(state.extra['teacher']), full.config.ema.momentum
  before = state.extra
  for i in range(3):
    state, metrics = full.step(state, rows(i))
    assert int(metrics['train/skipped']) == 0
    student = named_leaves({k: state.params[k] for k in ('backbone', 'head')})
    want = {n: m * x + (1 - m) * student[n] for n, x in want.items()}
  got = named_leaves(state.extra['teacher'])
  assert set(got) == set(want) and not [n for n in got if n.startswith(('text', 'log_scale'))]
  for n, x in got.items():
    np.testing.assert_allclose(x, want[n], rtol=0, atol=1e-6, err_msg=n)
  assert not [n for n in named_leaves(state.opt_state) if 'teacher' in n or 'center' in n]
  assert {k: v.shape for k, v in state.extra.items() if k != 'teacher'} == {
      'center': (1, 8), 'center_patch': (1, 1, 8)}
  assert all(np.abs(state.extra[k] - before[k]).max() > 1e-6 for k in ('center', 'center_patch'))


@pytest.mark.slow
def test_the_step_does_not_depend_on_the_mesh(full):
  state, batch = full.start(), rows()
  after, metrics = full.step(state, batch)
  other = Built(sharding.make_mesh(4, 1, jax.devices()[:4]), **ALL)
  placed = sharding.shardings(jax.eval_shape(other.init, jax.random.key(0)), other.mesh)
  got, seen = other.step(jax.device_put(state, placed), sharding.to_devices(batch, other.mesh))
  np.testing.assert_allclose(seen['train/loss'], metrics['train/loss'], rtol=1e-5)
  for name in ('center', 'center_patch'):
    np.testing.assert_allclose(after.extra[name], got.extra[name], rtol=0, atol=1e-6, err_msg=name)
  for name, x in named_leaves(after.opt_state['groups']['rest'].mu).items():
    np.testing.assert_allclose(x, named_leaves(got.opt_state['groups']['rest'].mu)[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_scope_of_the_image_text_loss(plain):
  state, batch = plain.start(), rows()
  run = lambda built, batch: float(built.loss(state.params, state.extra, batch, jax.random.key(0), 0)[0])
  parted = Built(**{'unimedi.vl_scope': 'per_modality'})
  assert abs(run(plain, batch) - run(parted, batch)) > 1e-2
  alone = {'phases.ct': 0, 'phases.unit': 'step'}
  xray = rows(streams=('xray',))
  of_one = [run(Built(streams=('xray',), **alone, **more), xray) for more in ({}, {
      'unimedi.vl_scope': 'per_modality'})]
  assert of_one[0] == pytest.approx(of_one[1], abs=1e-6)


@pytest.mark.slow
def test_options_of_the_image_text_loss(plain):
  """SigLIP has a bias; shuffled reports are those of the next study."""
  state, batch = plain.start(), rows()
  sig = Built(**{'unimedi.vl_kind': 'siglip', 'unimedi.multi_positive': False})
  params = sig.init(jax.random.key(0)).params
  assert float(params['logit_bias']) == -10 and float(params['log_scale']) == pytest.approx(np.log(10))
  assert np.isfinite(sig.loss(params, state.extra, batch, jax.random.key(0), 0)[0])
  shuffled = Built(**{'unimedi.shuffle_reports': True})
  rolled = {s: dict(r) for s, r in batch.items()}
  for k in ('ids', 'mask', 'report'):
    both = np.roll(np.concatenate([batch['xray'][k], batch['ct'][k]]), 1, 0)
    rolled['xray'][k], rolled['ct'][k] = both[:N], both[N:]
  run = lambda built, batch: float(built.loss(state.params, state.extra, batch, jax.random.key(0), 0)[0])
  assert run(shuffled, batch) == pytest.approx(run(plain, rolled), rel=1e-6)
  assert run(shuffled, batch) != pytest.approx(run(plain, batch), rel=1e-4)


def test_hidden_tokens():
  keys = jax.random.split(jax.random.key(0), 50)
  hidden = np.asarray(hidden_tokens(keys, 40, .5))
  assert (hidden.sum(1) == 20).all() and (hidden.mean(0) < .9).all() and (hidden.mean(0) > .1).all()
  looks = np.array([[.3, .1, .4, .2]])
  np.testing.assert_array_equal(hidden_tokens(keys[:1], 4, .5, looks), [[False, True, False, True]])


def test_visible_tokens_are_the_others_in_order():
  hidden = np.asarray(hidden_tokens(jax.random.split(jax.random.key(1), 6), 9, .4))
  kept = np.asarray(visible(hidden, .4))
  assert kept.shape == (6, 5)
  np.testing.assert_array_equal(kept, [np.flatnonzero(~row) for row in hidden])


@pytest.mark.slow
def test_tokens_that_are_left_out_change_nothing(full):
  """The student sees less, the teacher everything; a token that is dropped has no influence, one that stays has."""
  built, batch = Built(**ALL, **{'unimedi.hidden_mode': 'drop', 'unimedi.vl': 0.}), rows()
  state = built.start()
  value, aux = built.loss(state.params, state.extra, batch, jax.random.key(0), 0)
  replaced, _ = full.loss(state.params, state.extra, batch, jax.random.key(0), 0)
  assert np.isfinite(value) and abs(value - replaced) > 1e-3
  grads = named_leaves(jax.jit(jax.grad(lambda p: built.method.phases['joint'].loss(
      p, state.extra, batch, jax.random.key(0), 0)[0]))(state.params))
  assert not np.asarray(grads['backbone/transformer/mask_token']).any()
  assert built.method.groups('backbone/transformer/mask_token') == 'fixed'
  model, x = models.build(built.config.model), jnp.asarray(batch['xray']['xray'][:, 0])
  run = jax.jit(lambda x, kept: model.apply({'params': state.params['backbone']}, image=x, kept=kept, method='encode'))
  kept = jnp.tile(jnp.array([0, 3]), (N, 1))
  a, b, c = run(x, kept), run(x.at[:, :8, 8:].add(1.), kept), run(x.at[:, 8:, 8:].add(1.), kept)
  np.testing.assert_array_equal(a.cls, b.cls)
  assert a.patches.shape == (N, 2, 8) and np.abs(a.cls - c.cls).max() > 1e-3
  whole = model.apply({'params': state.params['backbone']}, image=x, method='encode')
  same = run(x, jnp.tile(jnp.arange(4), (N, 1)))
  np.testing.assert_allclose(same.patches, whole.patches, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_plain_traces_with_its_real_sizes(tmp_path):
  """Shapes of a step alone: 96 X-rays and 48 CT, ViT-B/16, BERT-base, all losses."""
  (tmp_path / 'vocab.txt').write_text('\n'.join(map(str, range(28996))))
  c = tiny.changed(unimedi.get_config('plain').unlock(), {'unimedi.text.vocab': str(tmp_path / 'vocab.txt')})
  method = base.make(c, {s: (9600, {}) for s in ('ct', 'xray')})
  tx = optim.adamw(method.groups)
  state = jax.eval_shape(step.make_init(c, method, tx), jax.random.key(0))
  like = jax.ShapeDtypeStruct
  of = lambda n, name, size: {
      'id': like((n,), np.int32), 'rng': like((n, 2), np.uint32), 'bad': like((n,), bool),
      name: like((n, 1, *size), np.float32), 'ids': like((n, 112), np.int32), 'mask': like((n, 112), np.int32),
      'report': like((n,), np.int32)}
  batch = {'ct': of(48, 'ct', (32, 128, 128, 1)), 'xray': of(96, 'xray', (224, 224, 3))}
  run = step.make_step(c, method, tx, 'joint', sharding.make_mesh(1, 1, jax.devices()[:1]))
  after, metrics = jax.eval_shape(run, state, batch)
  assert jax.tree.structure(after.params) == jax.tree.structure(state.params)
  assert {'train/vl_loss', 'train/icl_loss', 'train/pcl_loss'} <= metrics.keys()
  model = models.build(c.model)
  out = jax.eval_shape(lambda p, v, s: model.apply({'params': p}, volume=v, slices=s, method='encode'),
                       state.params['backbone'], batch['ct']['ct'].update(shape=(48, 32, 128, 128, 1)),
                       like((48, 2), np.int32))
  assert out.patches.shape == (48, 512 + 2 * 64, 768)


def test_frozen_layers_of_the_text():
  names = ('word_embeddings/embedding', 'embeddings_norm/scale', 'layer_0/query/kernel', 'layer_1/query/bias',
           'layer_11/query/bias')
  assert [[frozen(n, k) for n in names] for k in (0, 1, 2, -1)] == [
      [False] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
  groups = Built(**{'unimedi.text.freeze_layers': 1}).method.groups
  assert groups('text/layer_0/query/kernel') == 'fixed' and groups('text_proj/kernel') == 'rest'


def test_weights_of_a_folder_are_what_the_text_tower_starts_from(fixtures):
  folder = str(fixtures / 'unimedi' / 'bert_tiny')
  built = Built(**{'unimedi.text.init_from': folder, 'unimedi.text.num_layers': 2, 'unimedi.text.vocab_size': 0})
  given = built.method.given()
  state = jax.jit(step.make_init(built.config, built.method, built.tx))(jax.random.key(0), given)
  names = named_leaves(state.params)
  assert {n for n in names if n.startswith('text/')} == set(given) and 'text/layer_2/query/kernel' not in names
  for n, x in given.items():
    np.testing.assert_array_equal(names[n], x, err_msg=n)
  with pytest.raises(ValueError, match='unimedi.vision_init: /nowhere/vit.pth: no such file'):
    Built(**{'unimedi.vision_init': '/nowhere/vit.pth'}).method.given()


@pytest.mark.parametrize('overrides, what', [
    ({'unimedi.select': 'best'}, 'unimedi.select="best" unknown: use one of teacher, random, spread'),
    ({'unimedi.vl': 0.}, 'are all 0: give one of them a weight'),
    ({'unimedi.slices': 9}, 'has 8 planes, use 1 to 8'),
    ({'unimedi.text.length': 17}, 'the network has 16 positions'),
    ({'unimedi.text.init_from': '/nowhere'}, 'unimedi.text.init_from: /nowhere/config.json: cannot be read'),
    ({'unimedi.text.length': 2}, 'and to 3 at least'),
    ({'unimedi.text.vocab': '/nowhere/vocab.txt'}, 'unimedi.text.vocab=./nowhere/vocab.txt. cannot be read'),
    ({'unimedi.hidden_mode': 'blur'}, 'unknown: use one of replace, drop'),
    ({'unimedi.text.vocab_size': 0}, 'they must be the same number'),
    ({'data.place': 'device'}, 'set data.place=host')])
def test_mistakes_are_named(overrides, what):
  with pytest.raises(ValueError, match=what):
    base.make(config(**overrides), {s: (80, {}) for s in ('ct', 'xray')})


def test_vocabulary_of_another_size_than_the_table(fixtures):
  vocab = str(fixtures / 'unimedi' / 'bert_tiny' / 'vocab.txt')
  with pytest.raises(ValueError, match='has 156 word pieces, the table of words has 29 rows'):
    base.make(config(**{'unimedi.text.vocab': vocab}), {s: (80, {}) for s in ('ct', 'xray')})


@pytest.mark.parametrize('preset', unimedi.PRESETS)
def test_presets_pass_the_checks_and_every_tensor_has_its_place(preset, tmp_path):
  vocab = tmp_path / 'vocab.txt'
  vocab.write_text('\n'.join(map(str, range(28996))))
  c = tiny.changed(unimedi.get_config(preset).unlock(), {'unimedi.text.vocab': str(vocab)} if preset == 'plain' else {})
  validate.validate(c)
  method = base.make(c, {s: (9600, {}) for s in ('ct', 'xray')})
  mesh = sharding.make_mesh(2, 4)
  state = jax.eval_shape(step.make_init(c, method, optim.adamw(method.groups)), jax.random.key(0))
  sharding.shardings(state, mesh)
  if preset == 'plain':
    count = sum(x.size for n, x in named_leaves(state.params).items() if n.startswith('text/'))
    assert count == 108_310_272 - 768 * 769      # bert-base-cased, without its pooler
  assert len(world.VOCABULARY) == unimedi.get_config('phantom').unimedi.text.vocab_size
