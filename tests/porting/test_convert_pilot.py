"""Import and export of MiT: exact round trips, inference of the architecture, files that hold a part of it."""
import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.porting.test_convert import same
from unimiss_jax import models, porting
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiT, MiTTiny
from unimiss_jax.porting import positions

ARCH = dict(embed_dims=(8, 8, 16, 16), depths=(1, 2, 1, 1), decoder_dims=(16, 8, 8), decoder_heads=(4, 2, 1),
            decoder_depths=(1, 1, 2), image_size=64, volume_size=(16, 64, 64))


@pytest.fixture(scope='module')
def params():
  """Noise of every shape, both parts."""
  rng = np.random.default_rng(0)
  noise = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
  head = jax.eval_shape(DINOHead(32, 8, 6).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), np.float32))['params']
  return {'backbone': unflatten_dict({path: noise(leaf) for path, leaf in models.param_shapes(MiT(**ARCH)).items()}),
          'head': jax.tree.map(noise, head)}


def test_round_trip_is_exact(params):
  state = porting.to_torch(params, ARCH)
  same(porting.from_torch(state, ARCH), params)
  same(porting.from_torch({'student': {f'module.{k}': v for k, v in state.items()}}), params)
  dense = params['backbone']['transformer']['block1_0']['attn']['sr3D']['kernel']
  assert state['backbone.transformer.block1.0.attn.sr3D.weight'][5, 3, 1, 2, 4] == dense[1, 2, 4, 3, 5]


@pytest.mark.parametrize('model', [MiT(**ARCH), MiT(), MiTTiny(in_channels=(3, 2), sr_ratios=(4, 2, 1, 1))])
def test_the_architecture_shows_in_the_tensors(model):
  tree = {path: np.broadcast_to(np.float16(0), leaf.shape) for path, leaf in models.param_shapes(model).items()}
  found = porting.infer_arch({k.removeprefix('backbone.'): v for k, v in
                              porting.to_torch({'backbone': unflatten_dict(tree)}).items()})
  assert found == {k: getattr(model, k) for k in found} and len(found) == 10


def test_a_part_of_a_file(params):
  """The encoder alone, with and without its prefixes; 2-D only; the decoder's tokens are no tokens of the encoder."""
  state = porting.to_torch(params)
  encoder = {'backbone': {'transformer': params['backbone']['transformer']}}
  names = {k: v for k, v in state.items() if k.startswith('backbone.transformer.')}
  for start in ('backbone.transformer.', 'backbone.', ''):
    same(porting.from_torch({k.removeprefix(start): v for k, v in names.items()}, allow='decoder'), encoder)
  with pytest.raises(porting.PortingError, match='this is an encoder alone'):
    porting.from_torch(names, ARCH)
  flat = {k: v for k, v in state.items() if '3D' not in k}
  assert not any('3D' in k for k in porting.to_torch(porting.from_torch(flat, allow='3D')))
  gone = 'backbone.cls_tokens1.weight'
  with pytest.raises(porting.PortingError, match=f'1 missing: {gone}$'):
    porting.from_torch({k: v for k, v in state.items() if k != gone})


def test_other_channels_are_adapted(params):
  got = porting.from_torch(porting.to_torch(params), dict(ARCH, in_channels=(1, 1)), in_chans='sum')
  stem = lambda tree: tree['backbone']['transformer']['patch_embed2D0']['conv']['kernel']
  np.testing.assert_allclose(stem(got), stem(params).sum(2, keepdims=True), rtol=1e-6, atol=1e-6)


def test_tables_are_laid_out_for_other_sizes(params):
  new = dict(ARCH, image_size=96, volume_size=(32, 64, 64))
  wanted = models.param_shapes(MiT(**new))
  leaves = jax.tree.map(np.asarray, positions.resize(params['backbone'], ARCH, new))
  state = {path: leaf.shape for path, leaf in wanted.items()}
  got = porting.to_torch({'backbone': leaves}, new)       # raises unless every shape fits
  assert len(got) == len(state)
  for name in ('DecPosEmbed2D2', 'DecPosEmbed3D0'):       # class slots are copied
    np.testing.assert_array_equal(leaves[name][0, 0], params['backbone'][name][0, 0])
