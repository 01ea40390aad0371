"""The optional terms inside the method: each equals what its formula gives for what the step was shown."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.e2e import tiny
from tests.methods.test_unimiss_plus import rows
from unimiss_jax import models
from unimiss_jax.losses import masking, spread
from unimiss_jax.methods import base
from unimiss_jax.models.heads import DINOHead

OFF = {f'loss.{n}': 0.
       for n in ('ct', 'drr', 'slice', 'xray', 'recon_ct', 'recon_drr', 'recon_xray', 'nce', 'pair_nce')}
CALM = {'model.decoder_drop_path': 0., 'phases.ct': 0}


def made(**leaves):
  """(method, params, extra) for X-rays alone."""
  c = tiny.config(**(OFF | CALM | leaves))
  method = base.make(c, {'xray': (16, {})})
  return method, *jax.jit(method.init)(jax.random.key(0))


def loss(method, params, extra, batch):
  return method.phases['xray'].loss(params, extra, batch, jax.random.key(0), 0)


def test_koleo_and_simdino_of_the_embeddings_of_the_step():
  method, params, extra = made(**{'loss.xray': 1., 'extra_loss.koleo': .1, 'extra_loss.coding_rate': .5})
  assert 'last_layer' not in params['head'] and method.groups('head/mlp_0/kernel') == 'fixed'
  assert method.phases['xray'].couples_samples and 'project' not in method.predict
  batch = rows(6)
  value, aux = jax.jit(lambda p, e, b: loss(method, p, e, b))(params, extra, batch)
  e = jax.jit(method.predict['embed'])(params, extra, {'xray': batch['xray']['xray']})['xray']
  koleo = (spread.koleo(e[:, 0]) + spread.koleo(e[:, 1])) / 2
  distance = spread.simdino(e.swapaxes(0, 1), e.swapaxes(0, 1), .5)      # the teacher begins as a copy
  np.testing.assert_allclose(aux.metrics['train/koleo_loss'], koleo, rtol=1e-4)
  np.testing.assert_allclose(aux.metrics['train/dino_loss'], distance, rtol=1e-4)
  np.testing.assert_allclose(value, .1 * koleo + distance, rtol=1e-4)
  assert 'collapse/teacher_entropy' not in aux.metrics


@pytest.mark.slow
def test_sinkhorn_rounds_in_place_of_the_centre():
  method, params, extra = made(**{'loss.xray': 1., 'extra_loss.sinkhorn': 3})
  assert method.phases['xray'].couples_samples
  batch = rows(6)
  aux = jax.jit(lambda p, e, b: loss(method, p, e, b)[1])(params, extra, batch)
  h = tiny.config().head
  e = jax.jit(method.predict['embed'])(params, extra, {'xray': batch['xray']['xray']})['xray']
  head = DINOHead(out_dim=h.out_dim, hidden_dim=h.hidden_dim, bottleneck_dim=h.bottleneck_dim)
  logits = np.asarray(head.apply({'params': params['head']}, e), np.float64)       # [B, 2, K], the teacher's too
  codes = np.exp(logits.reshape(-1, h.out_dim) / tiny.config().loss.teacher_temp)
  for _ in range(3):
    codes /= codes.sum(0)
    codes /= codes.sum(1, keepdims=True)
  codes = codes.reshape(logits.shape)
  log_p = scipy.special.log_softmax(logits[:, ::-1] / .1, -1)
  np.testing.assert_allclose(aux.metrics['train/dino_loss'], -(codes * log_p).sum(-1).mean(), rtol=1e-4)
  entropy = scipy.special.entr(codes).sum(-1).mean()
  np.testing.assert_allclose(aux.metrics['collapse/teacher_entropy'], entropy, rtol=1e-3)
  assert not np.asarray(aux.mean['center']).any()


@pytest.mark.slow
def test_hidden_blocks_do_not_reach_the_network_and_alone_are_judged():
  method, params, extra = made(**{'loss.recon_xray': 1., 'extra_loss.mask_ratio': (.5, .5),
                                  'extra_loss.mask_block': (4, 16, 16)})
  batch = rows(4)
  run = jax.jit(lambda p, b: loss(method, p, extra, b)[1].metrics['train/recon_xray_loss'])
  x = batch['xray']['xray']
  keys = jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, 1)))(base.view_keys(batch['xray']['rng'], 2))
  mask = np.asarray(jax.vmap(jax.vmap(lambda k: masking.blocks(k, (64, 64), (16, 16), (.5, .5))))(keys))
  assert .2 < mask.mean() < .8 and not np.array_equal(mask[0, 0], mask[0, 1])
  seen = np.where(mask[..., None], x.mean((2, 3), keepdims=True), x)
  image = jax.jit(method.predict['reconstruct'])(params, extra, {'xray': jnp.asarray(seen)})['xray']
  wrong = (np.asarray(image) - x)**2
  want = np.mean([wrong[i, j][mask[i, j]].mean() for i in range(4) for j in range(2)])
  np.testing.assert_allclose(run(params, batch), want, rtol=1e-4)


@pytest.mark.slow
def test_tokens_of_hidden_blocks_follow_the_teacher_who_sees_them():
  method, params, extra = made(**{'loss.xray': 1., 'extra_loss.patch': 1., 'extra_loss.mask_ratio': (.5, .5),
                                  'extra_loss.mask_block': (4, 16, 16)})
  extra['teacher'] = jax.tree.map(lambda p: p * 1.1, params)       # not the student
  batch = rows(4)
  aux = jax.jit(lambda p, e, b: loss(method, p, e, b)[1])(params, extra, batch)
  config = tiny.config()
  x, h = batch['xray']['xray'], config.head
  keys = jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, 1)))(base.view_keys(batch['xray']['rng'], 2))
  mask = np.asarray(jax.vmap(jax.vmap(lambda k: masking.blocks(k, (64, 64), (16, 16), (.5, .5))))(keys))
  model = models.build(config.model)
  head = DINOHead(out_dim=h.out_dim, hidden_dim=h.hidden_dim, bottleneck_dim=h.bottleneck_dim)

  def logits(weights, x):       # of the tokens of the coarsest map
    tokens = model.apply({'params': weights['backbone']}, x.reshape(-1, *x.shape[2:])).pyramid[-1]
    return np.asarray(head.apply({'params': weights['head']}, tokens), np.float64).reshape(8, -1, h.out_dim)

  student = logits(params, jnp.asarray(np.where(mask[..., None], x.mean((2, 3), keepdims=True), x)))
  codes = np.exp(logits(extra['teacher'], x) / config.loss.teacher_temp).reshape(-1, h.out_dim)
  for _ in range(3):
    codes /= codes.sum(0)
    codes /= codes.sum(1, keepdims=True)
  wrong = -(codes.reshape(student.shape) * scipy.special.log_softmax(student / .1, -1)).sum(-1)
  side = round(wrong.shape[1]**.5)
  cells = 64 // side
  gone = mask.reshape(8, side, cells, side, cells).mean((2, 4)).reshape(8, -1) >= .5
  want = np.mean([w[g].mean() for w, g in zip(wrong, gone)])
  np.testing.assert_allclose(aux.metrics['train/patch_loss'], want, rtol=1e-4)


@pytest.mark.slow
def test_small_crops_follow_both_views_of_the_teacher():
  """Mean over all pairs of a crop of the student and another view of the teacher, as in DINO."""
  method, params, extra = made(**{'loss.xray': 1., 'extra_loss.local.crops': 3})
  extra = {'teacher': jax.tree.map(lambda p: p * 1.1, params), 'center': extra['center'] + .1}
  batch = rows(4)
  small = np.random.default_rng(5).random((4, 3, 64, 64, 3)).astype(np.float32)
  batch['xray']['local'] = small
  value, aux = jax.jit(lambda p, e, b: loss(method, p, e, b))(params, extra, batch)
  config = tiny.config()
  h = config.head
  head = DINOHead(out_dim=h.out_dim, hidden_dim=h.hidden_dim, bottleneck_dim=h.bottleneck_dim)

  def logits(weights, x):
    e = jax.jit(method.predict['embed'])(weights, extra, {'xray': jnp.asarray(x)})['xray']
    return np.asarray(head.apply({'params': weights['head']}, e), np.float64)
  crops = np.concatenate([logits(params, batch['xray']['xray']), logits(params, small)], 1)
  seen = logits(extra['teacher'], batch['xray']['xray']) - np.asarray(extra['center'])
  target = scipy.special.softmax(seen / config.loss.teacher_temp, -1)
  log_p = scipy.special.log_softmax(crops / .1, -1)
  pairs = {(i, j): -(target[:, i] * log_p[:, j]).sum(-1).mean() for i in range(2) for j in range(5) if i != j}
  assert len(pairs) == 8
  np.testing.assert_allclose(value, np.mean(list(pairs.values())), rtol=1e-4)
  np.testing.assert_allclose(aux.metrics['train/local_loss'], np.mean([v for (_, j), v in pairs.items() if j > 1]),
                             rtol=1e-4)
  assert set(method.phases['xray'].chance) >= {'train/dino_loss', 'train/local_loss'}


@pytest.mark.parametrize('leaves, text', [
    ({'loss.recon_xray': 1., 'extra_loss.local.crops': 2}, 'extra_loss.local.crops=2 .*set phases.xray, loss.xray'),
    ({'loss.xray': 1., 'extra_loss.local.crops': 2, 'extra_loss.local.size': 30}, 'extra_loss.local.size: .*30')])
def test_small_crops_that_cannot_be_are_named(leaves, text):
  with pytest.raises(ValueError, match=text):
    made(**leaves)


def test_tokens_need_hidden_blocks_and_prototypes():
  with pytest.raises(ValueError, match='extra_loss.patch=1.0 .*set extra_loss.mask_ratio'):
    made(**{'loss.xray': 1., 'extra_loss.patch': 1.})


@pytest.mark.parametrize('ratio', [(.5, .2), (-.1, .5), (.2, 1.)])
def test_a_share_that_is_none_is_refused(ratio):
  with pytest.raises(ValueError, match='extra_loss.mask_ratio=.*expected'):
    made(**{'loss.xray': 1., 'extra_loss.mask_ratio': ratio})
