"""MiT+: sizes and their errors, branches, options, initialisers; what it computes is checked in tests/parity."""
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax import models
from unimiss_jax.models.mit import MiTPlus
from unimiss_jax.porting import torch_names

TINY = dict(embed_dims=(4, 4, 8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
            decoder_dims=(16, 8, 8, 4, 4), decoder_heads=(2, 1, 1), image_size=64, volume_size=(16, 32, 32))
IMAGE, VOLUME = (2, 64, 64, 3), (2, 16, 32, 32, 1)


@pytest.fixture(scope='module')
def model():
  return MiTPlus(**TINY)


@pytest.fixture(scope='module')
def params(model):
  return jax.jit(lambda key: models.init_params(model, key))(jax.random.key(0))


@pytest.fixture(scope='module')
def outputs(model, params):
  """What the model makes of one batch of each rank."""
  run = jax.jit(lambda p, x: model.apply({'params': p}, x))
  return {shape: run(params, inputs(shape)) for shape in (IMAGE, VOLUME)}


def numpy_params(model, seed=0):
  """Initial parameters without a compilation: the model's laws, numpy's noise."""
  rng, shapes = np.random.default_rng(seed), {path: leaf.shape for path, leaf in models.param_shapes(model).items()}
  draw = {'constant': lambda width, shape: np.full(shape, width),
          'normal': lambda width, shape: width * rng.standard_normal(shape),
          'uniform': lambda width, shape: rng.uniform(-width, width, shape)}
  laws = {path: model.initial(path, shapes) for path in shapes}
  return unflatten_dict({path: draw[law](width, shapes[path]).astype(np.float32)
                         for path, (law, width) in laws.items()})


def inputs(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shapes(model, shape, **options):
  """Output shapes, without computing anything."""
  params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
  x = jax.ShapeDtypeStruct(shape, np.float32)
  return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(
      lambda p, x: model.apply({'params': p}, x, **options), params, x), is_leaf=lambda v: hasattr(v, 'shape'))


def test_released_shapes():
  """The sizes of the released model at 96 x 96 and 16 x 96 x 96."""
  out = shapes(MiTPlus(), (2, 96, 96, 3))
  assert out.embedding == (2, 320) and out.reconstruction == (2, 96, 96, 3)
  assert out.pyramid == ((2, 96, 96, 32), (2, 48, 48, 64), (2, 24, 24, 128), (2, 12, 12, 256), (2, 6, 6, 320),
                         (2, 3, 3, 320))
  out = shapes(MiTPlus(), (1, 16, 96, 96, 1))
  assert out.embedding == (1, 320) and out.reconstruction == (1, 16, 96, 96, 1)
  assert out.pyramid == ((1, 16, 96, 96, 32), (1, 16, 48, 48, 64), (1, 8, 24, 24, 128), (1, 4, 12, 12, 256),
                         (1, 4, 6, 6, 320), (1, 4, 3, 3, 320))
  assert shapes(MiTPlus(), (1, 16, 96, 96, 1), method='decoder_maps') == (
      (1, 4, 6, 6, 320), (1, 4, 12, 12, 256), (1, 8, 24, 24, 128), (1, 16, 48, 48, 64), (1, 16, 96, 96, 32))


def test_last_stride_keeps_the_grid():
  model = MiTPlus(**TINY | dict(last_stride=1))
  assert shapes(model, (1, 80, 64, 3)).pyramid[4:] == ((1, 5, 4, 16), (1, 5, 4, 16))
  out = shapes(model, (1, 16, 48, 32, 1))
  assert out.pyramid[4:] == ((1, 4, 3, 2, 16), (1, 4, 3, 2, 16)) and out.reconstruction == (1, 16, 48, 32, 1)


@pytest.mark.parametrize('shape, nearest', [
    ((1, 60, 64, 3), '(64, 64)'), ((1, 32, 96, 3), '(64, 96)'), ((1, 100, 120, 3), '(96, 128)'),
    ((1, 16, 60, 32, 1), '(16, 64, 32)'), ((1, 18, 32, 32, 1), '(16, 32, 32)'), ((1, 27, 32, 32, 1), '(28, 32, 32)'),
    ((1, 8, 16, 32, 1), '(16, 32, 32)')])
def test_wrong_sizes_name_the_nearest(model, shape, nearest):
  with pytest.raises(ValueError, match='nearest valid size is ' + nearest.replace('(', r'\(').replace(')', r'\)')):
    shapes(model, shape)


@pytest.mark.parametrize('shape, text', [
    ((1, 64, 64, 1), '1 channels: expected 3'), ((1, 16, 32, 32, 3), '3 channels: expected 1'),
    ((64, 64, 3), 'expected .B, H, W, C.')])
def test_wrong_layouts(model, shape, text):
  with pytest.raises(ValueError, match=text):
    shapes(model, shape)


def test_unknown_options_are_named():
  with pytest.raises(ValueError, match='use one of grid, reference'):
    shapes(MiTPlus(**TINY, pos_interp='cubic'), IMAGE)
  with pytest.raises(ValueError, match="'released', 'fan_in'"):
    models.init_params(MiTPlus(**TINY, init='xavier'), jax.random.key(0))
  with pytest.raises(ValueError, match='known are mit_plus'):
    models.build(dict(name='mit_minus'))
  with pytest.raises(ValueError, match='model.width is no field of mit_plus'):
    models.build(dict(name='mit_plus', width=3))


def test_build_reads_a_config():
  assert models.build(dict(TINY, name='mit_plus', depths=[1, 1, 1, 1], dtype='bfloat16')) == MiTPlus(
      **TINY, dtype=jnp.dtype('bfloat16'))


@pytest.mark.parametrize('shape', [IMAGE, VOLUME])
def test_without_decoder_the_embedding_is_the_same(model, params, outputs, shape):
  encoder = {'transformer': params['transformer']}           # the decoder's parameters are not even looked at
  half = jax.jit(lambda p, x: model.apply({'params': p}, x, decode=False))(encoder, inputs(shape))
  assert half.reconstruction is None
  np.testing.assert_allclose(half.embedding, outputs[shape].embedding, atol=1e-5)
  assert np.isfinite(outputs[shape].reconstruction).all()


@pytest.mark.parametrize('shape', [(1, 128, 128, 3), (1, 96, 160, 3), (1, 32, 32, 64, 1)])
def test_other_sizes_run_in_encoder_and_decoder(model, params, shape):
  out = jax.jit(lambda p, x: model.apply({'params': p}, x))(params, inputs(shape))
  assert out.reconstruction.shape == shape
  assert np.isfinite(out.embedding).all() and np.isfinite(out.reconstruction).all()


def test_drop_path_is_in_the_decoder_only(params):
  """The encoder's rate is 0: its output does not depend on the keys; the reconstruction does, row by row."""
  model = MiTPlus(**TINY, decoder_drop_path=0.8)
  x = inputs((6, 64, 64, 3))
  run = jax.jit(lambda p, x, keys: model.apply({'params': p}, x, train=True, row_keys=keys))
  keys = jax.random.split(jax.random.key(1), 6)
  a, b = run(params, x, keys), run(params, x, keys.at[3:].set(jax.random.split(jax.random.key(2), 3)))
  np.testing.assert_array_equal(a.embedding, b.embedding)
  np.testing.assert_array_equal(a.reconstruction[:3], b.reconstruction[:3])
  assert not np.array_equal(a.reconstruction[3:], b.reconstruction[3:])
  with pytest.raises(Exception, match='drop_path'):
    jax.eval_shape(lambda p, x: model.apply({'params': p}, x, train=True), params, x)


@pytest.mark.parametrize('shape', [IMAGE, VOLUME])
def test_training_without_drop_path_is_evaluation(params, shape):
  """One and the same program."""
  model = MiTPlus(**TINY, decoder_drop_path=0.)
  programs = {str(jax.make_jaxpr(lambda p, x, train=train: model.apply({'params': p}, x, train=train))(
      params, jax.ShapeDtypeStruct(shape, 'float32'))) for train in (False, True)}
  assert len(programs) == 1


@pytest.mark.parametrize('shape', [IMAGE, VOLUME])
def test_bfloat16_is_finite_and_close(params, outputs, shape):
  half, full = MiTPlus(**TINY, dtype=jnp.bfloat16), outputs[shape]
  out = jax.jit(lambda p, x: half.apply({'params': p}, x))(params, inputs(shape))
  assert out.embedding.dtype == out.reconstruction.dtype == jnp.bfloat16
  for a, b in ((out.embedding, full.embedding), (out.reconstruction, full.reconstruction)):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    assert np.corrcoef(a, b)[0, 1] > 0.99


@pytest.mark.parametrize('dtype, parameters', [('bfloat16', 'float32'), ('float64', 'float64')])
def test_dtypes(dtype, parameters):
  with jax.enable_x64(True):
    model = MiTPlus(**TINY, dtype=jnp.dtype(dtype))
    tree = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {parameters}
    out = jax.eval_shape(lambda p, x: model.apply({'params': p}, x), tree, jax.ShapeDtypeStruct(VOLUME, 'float32'))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(out)} == {dtype}


def test_final_norm_standardises_the_sum_of_class_token_and_mean():
  model = MiTPlus(**TINY, final_norm=True, conv_residual=True, init='fan_in', last_stride=1)
  params = numpy_params(model)
  e = np.asarray(jax.jit(lambda p, x: model.apply({'params': p}, x, decode=False).embedding)(params, inputs(IMAGE)))
  np.testing.assert_allclose(e.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(e.var(-1), 1, atol=1e-3)


def test_without_class_token_the_embedding_is_the_mean_token():
  model = MiTPlus(**TINY, cls_token=False)
  paths = models.param_shapes(model)
  assert not any('cls_tokens' in part for path in paths for part in path)
  assert paths['transformer', 'pos_embed2D1'].shape == (1, 256, 8)
  params = numpy_params(model)
  out = jax.jit(lambda p, x: model.apply({'params': p}, x, decode=False))(params, inputs(IMAGE))
  np.testing.assert_allclose(out.embedding, out.pyramid[-1].mean((1, 2)), atol=1e-5)


# What, where, law and its width in the released code, as (kernel positions, fan) of the layer.
LAWS = [
    ('transformer/block1_0/mlp/fc1/kernel', 'normal', 0.02),
    ('transformer/pos_embed3D1', 'normal', 0.02),
    ('transformer/ConvBlock2D1_1/conv/kernel', 'normal', math.sqrt(2 / (64 * 9))),
    ('transformer/patch_embed3D2/proj1/conv/kernel', 'normal', math.sqrt(2 / (256 * 27))),
    ('transformer/block1_0/attn/sr2D/kernel', 'normal', 0.015625),
    ('transformer/block1_0/attn/sr3D/bias', 'uniform', 512**-0.5),
    ('DecEmbed2D1/proj1/conv/kernel', 'uniform', (320 * 9)**-0.5),
    ('DecEmbed3D3/proj1/conv/kernel', 'normal', math.sqrt(2 / (128 * 27))),
    ('DecEmbed3D1/proj/kernel', 'uniform', (320 * 4)**-0.5),
    ('TransposeConv3D1/kernel', 'uniform', (64 * 8)**-0.5),
    ('TransposeConv3D1/bias', 'uniform', (64 * 8)**-0.5),
    ('Decblock3_0/attn/sr2D/kernel', 'uniform', 0.125),
    ('recon_conv2D/kernel', 'uniform', 32**-0.5),
    ('recon_conv3D/kernel', 'normal', math.sqrt(2)),
    ('transformer/block1_0/mlp/fc1/bias', 'constant', 0.),
    ('norm/scale', 'constant', 1.),
    ('transformer/ConvBlock3D0_0/norm/bias', 'constant', 0.),
]


def test_released_initialisers():
  model = MiTPlus()
  shapes = {path: leaf.shape for path, leaf in models.param_shapes(model).items()}
  for name, law, width in LAWS:
    got = model.initial(tuple(name.split('/')), shapes)
    assert got[0] == law and math.isclose(got[1], width), (name, got)
  fan_in = MiTPlus(init='fan_in').initial(('transformer', 'block1_0', 'mlp', 'fc2', 'kernel'), shapes)
  assert fan_in == ('normal', 512**-0.5)


def test_drawn_parameters_follow_their_laws(model, params):
  """Mean and standard deviation within 4 standard errors, bounds kept, every draw its own."""
  leaves = flatten_dict(params)
  shapes, checked = {path: leaf.shape for path, leaf in leaves.items()}, set()
  for path, leaf in leaves.items():
    law, width = model.initial(path, shapes)
    leaf = np.asarray(leaf, np.float64)
    if law == 'constant':
      assert (leaf == width).all()
    elif leaf.size > 2000:
      std = width / math.sqrt(3) if law == 'uniform' else width
      assert abs(leaf.mean()) < 4 * std / leaf.size**0.5, path
      assert abs(leaf.std() / std - 1) < 4 / (2 * leaf.size)**0.5, path
      assert (abs(leaf).max() <= width) == (law == 'uniform')
      checked.add(law)
  assert checked == {'normal', 'uniform'}
  a, b = (np.asarray(params['transformer'][f'block{i}_0']['mlp']['fc1']['kernel']).ravel() for i in (3, 4))
  assert abs(np.corrcoef(a, b)[0, 1]) < 4 / a.size**0.5


def test_initialisers_match_a_model_drawn_by_the_released_code(fixtures):
  """Standard deviation of every tensor above 10^4 numbers, and the largest value of every uniform one."""
  stats = json.loads((fixtures / 'parity' / 'plus_init_stats_seed0.json').read_text())
  model = MiTPlus()
  shapes = {path: leaf.shape for path, leaf in models.param_shapes(model).items()}
  for path in shapes:
    (shape, _, std, low, high) = stats['backbone.' + torch_names.to_torch_name(path)]
    law, width = model.initial(path, shapes)
    if law == 'constant':
      assert low == high == width
      continue
    if math.prod(shape) > 10_000:
      assert abs(std / (width / math.sqrt(3) if law == 'uniform' else width) - 1) < 0.03, path
    if law == 'uniform':
      assert max(-low, high) <= width * (1 + 1e-6)
