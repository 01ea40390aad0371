"""Deformable attention over slices against arrays of an independent float64 reference."""
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax.losses import reconstruction
from unimiss_jax.losses import reference as released
from unimiss_jax.models import deformable

ATTENTION = {      # name in the fixtures, in PyTorch's layout -> ours
    'wq': 'to_q/kernel', 'wk': 'to_k/kernel', 'wv': 'to_v/kernel', 'wo': 'to_out/kernel', 'bo': 'to_out/bias',
    'off_w': 'to_offsets/kernel', 'off_b': 'to_offsets/bias', 'off_p': 'to_offsets/to_offset/kernel',
    **{f'c{i}{b}': f'rel_pos_bias/mlp_{i}/{"bias" if b else "kernel"}' for i in range(3) for b in ('', 'b')}}
DDETR = {'wv': 'value_proj/kernel', 'bv': 'value_proj/bias', 'wo_': 'sampling_offsets/kernel',
         'bo_': 'sampling_offsets/bias', 'wa': 'attention_weights/kernel', 'ba': 'attention_weights/bias',
         'wp': 'output_proj/kernel', 'bp': 'output_proj/bias'}
LAYER = {**{k: f'attn/{v}' for k, v in ATTENTION.items()},
         'n1g': 'norm1/scale', 'n1b': 'norm1/bias', 'n2g': 'norm2/scale', 'n2b': 'norm2/bias', 'f1': 'linear1/kernel',
         'f1b': 'linear1/bias', 'f2': 'linear2/kernel', 'f2b': 'linear2/bias'}
FIELDS = dict(heads=4, head_dim=6, groups=4)


@pytest.fixture(params=['float64', pytest.param('float32', marks=pytest.mark.slow)])
def precise(request):
  """Both precisions: the tolerance of float64 is 1e-9 everywhere, that of float32 is the test's own."""
  with jax.enable_x64(True) if request.param == 'float64' else nullcontext():
    yield lambda tolerance: 1e-9 if request.param == 'float64' else tolerance


def dtype():
  return jnp.zeros((), float).dtype


def read(fixtures, name):
  z = np.load(fixtures / 'joint' / f'{name}.npz')
  return {k: z[k].astype(dtype()) if z[k].dtype.kind == 'f' else z[k] for k in z}


def tree(z, names, prefix):
  """The arrays as our parameters: all axes the other way round, grouped linears as convolutions of width 1."""
  out = {}
  for theirs, path in names.items():
    *scopes, leaf = path.split('/')
    place = out
    for scope in scopes:
      place = place.setdefault(scope, {})
    x = z[prefix + theirs].T
    place[leaf] = x[None] if scopes[-1] in ('to_q', 'to_k', 'to_v') else x
  return out


def close(x, y, tolerance):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def same(grads, expected, tolerance):
  """Every tensor; tolerance of its largest entry, or absolute in float64."""
  assert jax.tree.structure(grads) == jax.tree.structure(expected)
  for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
    close(g, e, tolerance if dtype() == jnp.float64 else tolerance * max(np.abs(e).max(), .1))


def differentiate(module, z, names, swap):
  f = lambda p, x: swap(module.apply({'params': p}, swap(x)))
  step = jax.value_and_grad(lambda p, x: ((y := f(p, x)).astype(dtype()).ravel() @ z['cot'].ravel(), y), (0, 1), True)
  (_, y), (grads, dx) = jax.jit(step)(tree(z, names, 'p_'), z['x'])
  return y, dx, grads


@pytest.mark.parametrize('sampler', ['interp', 'collapse'])
@pytest.mark.parametrize('axis', ['slice', 'feature'])
def test_dat_attention_and_its_gradients(fixtures, precise, axis, sampler):
  """One module computes all four by its fields; the fixtures are [B, C, L]."""
  z = read(fixtures, f'dat1d_{axis}_{sampler}')
  module = deformable.DATAttention(**FIELDS, sampler=sampler, dtype=dtype())
  y, dx, grads = differentiate(module, z, ATTENTION, lambda x: x.swapaxes(1, 2))
  close(y, z['y'], precise(3e-5))
  same((dx, grads), (z['dx'], tree(z, ATTENTION, 'g_')), precise(2e-4))
  close(grads['rel_pos_bias']['mlp_2']['bias'], 0, 1e-12 if dtype() == jnp.float64 else 2e-5)


def test_ddetr_attention_and_its_gradients(fixtures, precise):
  z = read(fixtures, 'ddetr1d')
  y, dx, grads = differentiate(deformable.DDETRAttention(4, 4, dtype()), z, DDETR, lambda x: x)
  close(y, z['y'], precise(2e-5))
  same((dx, grads), (z['dx'], tree(z, DDETR, 'g_')), precise(2e-5))


def test_sampling_is_interpolation_with_zeros_outside():
  x = np.random.default_rng(0).normal(size=(1, 9, 1, 2)).astype(np.float32)
  at = np.float32([-3, -1, -.25, 0, 2, 3.5, 7.75, 8, 8.5, 9, 30])
  beyond = np.pad(x[0, :, 0], ((40, 40), (0, 0)))
  expected = np.stack([np.interp(at, np.arange(-40, 49), beyond[:, c]) for c in range(2)], -1)
  close(deformable.sample(jnp.asarray(x), jnp.asarray(at)[None, :, None])[0, :, 0], expected, 1e-6)


@pytest.mark.parametrize('axis', ['slice', 'feature'])
def test_encoder_and_masked_prediction(fixtures, precise, axis):
  z = read(fixtures, f'encoder_mask_{axis}')
  encoder = deformable.InterEncoder(2, 30, axis=axis, **FIELDS, slices=16, dtype=dtype())
  head = deformable.MaskedSlices(24, dtype())
  params = {'encoder': {f'layer_{i}': tree(z, LAYER, f'l{i}_') for i in range(2)},
            'head': {'token': z['token'], 'decoder': {'kernel': z['dec_w'].T, 'bias': z['dec_b']}}}
  mask, views = z['mask'][..., 0].astype(bool), np.stack([z['view1'], z['view2']])

  @jax.jit
  def step(params):
    def f(params):
      hide = lambda v: head.apply({'params': params['head']}, v, mask, method='hide')
      tokens = [encoder.apply({'params': params['encoder']}, hide(v)) for v in views]
      pred = jnp.stack([head.apply({'params': params['head']}, t) for t in tokens])
      return released.masked_slices(pred, views, mask), (pred, reconstruction.masked_slices(pred, views, mask))
    tokens = encoder.apply({'params': params['encoder']}, views[0])
    return jax.value_and_grad(f, has_aux=True)(params), deformable.volume_feature(tokens)
  ((loss, (pred, masked_only)), grads), feature = step(params)
  close(pred, np.stack([z['pred1'], z['pred2']]), precise(5e-4))
  close([loss, masked_only], [z['loss_released'], z['loss_masked_only']], precise(2e-5))
  close(feature, z['global_feature'], precise(2e-5))
  layers = grads['encoder']
  same([grads['head']['token'], grads['head']['decoder']['kernel'], layers['layer_0']['attn']['to_q']['kernel'][0],
        layers['layer_1']['linear1']['kernel']],
       [z['dtoken'], z['ddec_w'].T, z['g_l0_wq'].T, z['g_l1_f1'].T], precise(2e-4))


def sizes(module, *shape, **given):
  tree = jax.eval_shape(lambda k: module.init(k, jnp.zeros(shape), **given), jax.random.key(0))['params']
  return sum(x.size for x in jax.tree.leaves(tree))


def test_sizes_are_those_of_the_papers_network():
  assert sizes(deformable.InterEncoder(), 1, 64, 640) == 5_613_892
  assert sizes(deformable.InterEncoder(axis='feature'), 1, 64, 640) == 3_885_892
  assert sizes(deformable.DATAttention(), 1, 64, 640) == 477_953
  assert sizes(deformable.MaskedSlices(640), 1, 64, 640) == 410_880


def test_any_number_of_slices_with_the_same_weights(fixtures):
  z = read(fixtures, 'encoder_mask_slice')
  encoder, weights = deformable.InterEncoder(1, 30, **FIELDS), {'params': {'layer_0': tree(z, LAYER, 'l0_')}}
  for n in (5, 16, 32, 64):
    assert jax.eval_shape(encoder.apply, weights, jnp.zeros((1, n, 24))).shape == (1, n, 24)
  apply, x = jax.jit(encoder.apply), z['view1']
  filled = np.where(np.arange(16)[:, None] < 13, x, 0)
  close(apply(weights, filled)[:, :13], apply(weights, x[:, :13]), 1e-6)
  with pytest.raises(ValueError, match='64 slices, given .* 16'):
    encoder.clone(axis='feature').apply(weights, x)
  with pytest.raises(ValueError, match='multiple of the downsampling 4'):
    deformable.DATAttention(**FIELDS).apply(weights, x[:, :14])


def test_padding_is_left_out_of_the_volume_feature():
  tokens = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
  valid = np.arange(6) < np.array([[4], [6]])
  for i, n in enumerate((4, 6)):
    mean = tokens[i, :n].mean(0)
    close(deformable.volume_feature(jnp.asarray(tokens), jnp.asarray(valid))[i], mean / np.linalg.norm(mean), 1e-6)


def test_masks_hide_a_tenth_of_the_valid_slices():
  valid = np.arange(70)[None] < np.array([[64], [40], [70], [1]])
  keys = jax.random.split(jax.random.key(0), 4)
  masks = np.asarray(jax.vmap(lambda k, v: deformable.draw_mask(k, v, .1))(keys, valid))
  np.testing.assert_array_equal(masks.sum(1), [7, 4, 7, 1])
  assert not (masks & ~valid).any() and not np.array_equal(masks[0, :64], masks[2, :64])


def test_pooled_levels_have_unit_length_each_and_the_last_one_twice():
  maps = [np.random.default_rng(c).normal(size=(2, 3, 3, c)).astype(np.float32) for c in (256, 512, 1024, 2048)]
  z = np.asarray(deformable.pooled_levels(maps))
  np.testing.assert_array_equal(z[:, 3840:], z[:, 1792:3840])
  close(np.linalg.norm(z, axis=1), 5**.5, 1e-5)
  mean = maps[0].mean((1, 2))
  close(z[:, :256], mean / np.linalg.norm(mean, axis=1, keepdims=True), 1e-6)
