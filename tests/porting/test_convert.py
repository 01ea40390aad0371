"""Import and export: exact round trips, nestings, inference of the architecture, strict and named failures."""
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax import models, porting
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiTPlus

ARCH = dict(embed_dims=(4, 4, 8, 8, 16, 16), depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2),
            decoder_dims=(16, 8, 8, 4, 4), decoder_depths=(1, 1, 2), image_size=64, volume_size=(16, 32, 32))


@pytest.fixture(scope='module')
def params():
  """Noise of every shape, both parts."""
  rng = np.random.default_rng(0)
  noise = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
  head = jax.eval_shape(DINOHead(32, 8, 4).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16), np.float32))['params']
  return {'backbone': unflatten_dict({path: noise(leaf) for path, leaf in
                                             models.param_shapes(MiTPlus(**ARCH)).items()}),
          'head': jax.tree.map(noise, head)}


def same(a, b):
  a, b = flatten_dict(a), flatten_dict(b)
  assert a.keys() == b.keys()
  for path, leaf in a.items():
    np.testing.assert_array_equal(leaf, b[path])
    assert leaf.dtype == b[path].dtype


def test_round_trip_is_exact(params):
  state = porting.to_torch(params, ARCH)
  assert all(v.flags.c_contiguous for v in state.values())
  same(porting.from_torch(state, ARCH), params)
  same(porting.from_torch(state), params)
  half = {k: v.astype(np.float16) for k, v in state.items()}
  same(porting.from_torch(half), jax.tree.map(lambda leaf: leaf.astype(np.float16), params))


@pytest.mark.parametrize('arch', [
    ARCH, dict(ARCH, cls_token=False), dict(ARCH, last_stride=1, conv_residual=True, final_norm=True),
    dict(ARCH, mlp_ratio=2, sr_ratios=(4, 2, 2, 1), in_channels=(1, 2)), {}])
def test_the_architecture_shows_in_the_tensors(arch):
  """Every inferred field is the one that the tensors were made with."""
  tree = {path: np.broadcast_to(np.float16(0), leaf.shape) for path, leaf in
          models.param_shapes(MiTPlus(**arch)).items()}
  state = porting.to_torch({'backbone': unflatten_dict(tree)})
  found = porting.infer_arch({k.removeprefix('backbone.'): v for k, v in state.items()})
  assert len(found) == 14
  assert found == {k: getattr(MiTPlus(**arch), k) for k in found}


def test_layouts(params):
  """Linear, convolution, depthwise, transposed convolution and prototypes, one element each."""
  state = porting.to_torch(params)
  block, b = params['backbone']['transformer']['block1_0'], 'backbone.'
  assert state[b + 'transformer.block1.0.mlp.fc1.weight'][3, 5] == block['mlp']['fc1']['kernel'][5, 3]
  sr = block['attn']['sr3D']['kernel']
  assert state[b + 'transformer.block1.0.attn.sr3D.weight'][5, 0, 1, 2, 3] == sr[1, 2, 3, 0, 5]
  conv = params['backbone']['transformer']['patch_embed3D1']['proj']['conv']['kernel']
  assert state[b + 'transformer.patch_embed3D1.proj.conv.weight'][7, 2, 0, 1, 2] == conv[0, 1, 2, 2, 7]
  up = params['backbone']['TransposeConv2D1']['kernel']
  assert state[b + 'TransposeConv2D1.weight'][6, 3, 0, 1] == up[0, 1, 6, 3]
  np.testing.assert_array_equal(state['head.last_layer.weight_v'], params['head']['last_layer']['weight_v'])


def test_nestings_and_both_spellings_of_weight_norm(params):
  state = porting.to_torch(params)
  student = {f'module.{k}': v for k, v in state.items()}
  teacher = {k.replace('weight_g', 'parametrizations.weight.original0')
              .replace('weight_v', 'parametrizations.weight.original1'): v + 1 for k, v in state.items()}
  file = {'student': student, 'teacher': teacher, 'epoch': 3}
  same(porting.from_torch(file), params)
  same(porting.from_torch(file, branch='teacher'), jax.tree.map(lambda leaf: leaf + 1, params))
  bare = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
  same(porting.from_torch(bare), {'backbone': params['backbone']})
  assert set(porting.to_torch(params['head'])) == {k for k in state if k.startswith('head.')}


def test_failures_are_named(params):
  state = porting.to_torch(params)
  gone, extra, bent = 'backbone.transformer.block2.1.attn.q.bias', 'backbone.oddity.weight', 'head.mlp.2.bias'
  broken = {k: v for k, v in state.items() if k != gone} | {extra: np.zeros(3), bent: np.zeros(9)}
  with pytest.raises(porting.PortingError) as error:
    porting.from_torch(broken | {bent: state[bent]}, ARCH)
  assert f'1 missing: {gone}' in str(error.value) and f'1 unexpected: {extra}' in str(error.value)
  with pytest.raises(porting.PortingError, match=r'head.mlp.2.bias \(9,\) expected \(8,\)'):
    porting.from_torch(dict(state, **{bent: np.zeros(9)}))
  allowed = porting.from_torch(broken | {bent: state[bent]}, ARCH, allow=('block2.1.attn.q.bias', 'oddity'))
  assert 'bias' not in allowed['backbone']['transformer']['block2_1']['attn']['q']
  with pytest.raises(porting.PortingError, match='mis-shaped'):
    porting.from_torch(state, dict(ARCH, image_size=96))
  with pytest.raises(porting.PortingError, match='mis-shaped'):
    porting.to_torch(params, dict(ARCH, image_size=96))
  with pytest.raises(porting.PortingError, match='pass arch='):
    porting.from_torch({'backbone.transformer.cls_tokens1': np.zeros((1, 1, 8))})
  with pytest.raises(porting.PortingError, match='no tensors'):
    porting.from_torch({})
