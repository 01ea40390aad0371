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


@pytest.mark.parametrize('strip', ['backbone.', 'transformer.', 'backbone.transformer.'])
def test_whatever_level_was_stripped(params, strip):
  """As the downstream code of the paper saves them; also below 'state_dict'."""
  state = {k.replace(strip, ''): v for k, v in porting.to_torch(params).items()}
  same(porting.from_torch({'state_dict': state, 'epoch': 1}), params)
  head = {k.removeprefix('head.'): v for k, v in porting.to_torch(params['head']).items()}
  same(porting.from_torch(head), {'head': params['head']})


def test_a_branch_that_is_not_there_and_entries_that_are_no_tensors(params):
  state = porting.to_torch(params)
  with pytest.raises(porting.PortingError, match="branch='teacher' is not in the file, only 'student' is"):
    porting.from_torch({'student': state}, branch='teacher')
  with pytest.raises(porting.PortingError, match="branch='best': known are student, teacher"):
    porting.from_torch(state, branch='best')
  with pytest.raises(porting.PortingError, match='backbone.epoch is a int, not a tensor'):
    porting.from_torch(state | {'backbone.epoch': 3})
  with pytest.raises(porting.PortingError, match='two tensors are called backbone.norm.bias'):
    porting.from_torch(state | {'module.backbone.norm.bias': state['backbone.norm.bias']})


@pytest.mark.parametrize('rank, other', [('2D', '3D'), ('3D', '2D')])
def test_a_file_of_one_dimension_only_is_taken_when_asked_for(params, rank, other):
  state = {k: v for k, v in porting.to_torch(params).items() if other not in k}
  with pytest.raises(porting.PortingError, match=rf"missing: .*FIX: this is a {rank}-only file: allow=\('{other}',\)"):
    porting.from_torch(state)
  got = porting.from_torch(state, allow=(other,))
  leaves = flatten_dict(params)
  same(got, unflatten_dict({path: leaf for path, leaf in leaves.items() if not any(other in p for p in path)}))
  assert porting.infer_arch({k.removeprefix('backbone.'): v for k, v in state.items()})['depths'] == (1, 2, 1, 1)
  gone = next(k for k in state if 'block2.1' in k)
  with pytest.raises(porting.PortingError, match=f'1 missing: {gone}$'):      # no other one with it
    porting.from_torch({k: v for k, v in state.items() if k != gone}, allow=(other,))


def test_every_single_tensor_that_is_missing_is_named(params):
  """The inferred architecture does not bend so that it fits."""
  state = porting.to_torch(params)
  for gone in state:
    with pytest.raises(porting.PortingError) as e:
      porting.from_torch({k: v for k, v in state.items() if k != gone})
    assert gone in str(e.value), gone
    assert '1 missing' in str(e.value) and 'unexpected' not in str(e.value), (gone, str(e.value))


def test_every_single_tensor_that_is_mis_shaped_is_named(params):
  """One entry too many along each of its axes."""
  state = porting.to_torch(params)
  for name, array in state.items():
    for axis in range(array.ndim):
      wrong = np.zeros([n + (a == axis) for a, n in enumerate(array.shape)], np.float32)
      with pytest.raises(porting.PortingError) as e:
        porting.from_torch(state | {name: wrong})
      told = str(e.value)
      if 'last_layer' not in name or axis:      # the two tensors of that layer: one word against the other's
        assert f'1 mis-shaped: {name} ' in told and 'missing' not in told, (name, axis, told)


def test_stray_names_and_odd_values(params):
  state = porting.to_torch(params)
  stray = 'backbone.transformer.block1.1.odd.weight'
  with pytest.raises(porting.PortingError, match=f'^1 unexpected: {stray}$'):
    porting.from_torch(state | {stray: np.zeros(3, np.float32)})
  for value in (np.zeros(8, np.complex64), np.zeros(8, np.int64), np.zeros(8, bool)):
    with pytest.raises(porting.PortingError, match='weights are floating-point numbers'):
      porting.from_torch(state | {stray: value})
  for nothing in (3, None, np.zeros(3)):
    with pytest.raises(porting.PortingError, match='where names and tensors were expected'):
      porting.from_torch({'student': nothing})
  gone = next(n for n in state if 'block3' in n)
  with pytest.raises(porting.PortingError, match=f'1 missing: {gone}'):      # a string is one piece of a name
    porting.from_torch({n: a for n, a in state.items() if n != gone}, allow='3D')
  with pytest.raises(porting.PortingError, match="'' would allow everything"):
    porting.from_torch(state, allow=[''])


def test_other_input_channels(params):
  """A grey image, given on every channel, gets the same answer from the adapted stem; sums and turns by hand."""
  stem, recon = 'backbone.transformer.ConvBlock2D0.0.conv.weight', 'backbone.recon_conv2D.'
  state = porting.to_torch(params)
  one = porting.to_torch(porting.from_torch(state, dict(ARCH, in_channels=(1, 1)), in_chans='sum'))
  np.testing.assert_allclose(one[stem], state[stem].sum(1, keepdims=True), rtol=1e-6)
  np.testing.assert_allclose(one[recon + 'weight'], state[recon + 'weight'].mean(0, keepdims=True), rtol=1e-5)
  np.testing.assert_allclose(one[recon + 'bias'], state[recon + 'bias'].mean(0, keepdims=True), rtol=1e-5)
  for how in ('repeat', 'sum'):      # back to three, the default of an inferred architecture
    three = porting.to_torch(porting.from_torch(one, in_chans=how))
    np.testing.assert_allclose(three[stem], np.repeat(one[stem], 3, 1) / 3, rtol=1e-6)
    np.testing.assert_array_equal(three[recon + 'bias'], np.repeat(one[recon + 'bias'], 3))
  two = porting.to_torch(porting.from_torch(state, dict(ARCH, in_channels=(2, 1)), in_chans='repeat'))
  np.testing.assert_allclose(two[stem], state[stem][:, :2] * 1.5, rtol=1e-6)
  assert all(np.array_equal(one[k], v) for k, v in state.items() if k != stem and not k.startswith(recon))
  with pytest.raises(porting.PortingError, match=r"mis-shaped: .*FIX: other input channels: in_chans='sum' or"):
    porting.from_torch(one, ARCH)
  with pytest.raises(porting.PortingError, match="in_chans='mean': known are strict, sum, repeat"):
    porting.from_torch(one, ARCH, in_chans='mean')


def test_bfloat16_tensors_keep_their_dtype(params):
  torch = pytest.importorskip('torch')
  state = {k: torch.tensor(v).bfloat16() for k, v in porting.to_torch(params).items()}
  got = flatten_dict(porting.from_torch(state))
  for path, leaf in flatten_dict(params).items():
    np.testing.assert_array_equal(got[path], leaf.astype(jax.numpy.bfloat16))
    assert got[path].dtype == jax.numpy.bfloat16
