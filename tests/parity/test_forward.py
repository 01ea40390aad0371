"""MiT+ against the released PyTorch code: names, every stage, reconstruction and logits of a tiny model."""
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.parity import recipe
from unimiss_jax import models, porting
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiTPlus

TINY = dict(embed_dims=(4, 8, 16, 32, 40, 40), decoder_dims=(40, 32, 16, 8, 4), image_size=64,
            volume_size=(16, 64, 64))
CASES = {'x2d': ((2, 3, 64, 64), 'unit'), 'x3d': ((1, 1, 16, 64, 64), 'ct')}
OTHER_SIZES = {'x2d_96': ((1, 3, 96, 96), 'unit'), 'x2d_64x96': ((1, 3, 64, 96), 'unit'),      # encoder only
               'x3d_96': ((1, 1, 16, 96, 96), 'ct'), 'x3d_64x96': ((1, 1, 16, 64, 96), 'ct')}
MAPS = ('c0', 'c1', 's1', 's2', 's3')


@pytest.fixture(scope='module')
def names(fixtures):
  return json.loads((fixtures / 'parity' / 'plus_state_keys.json').read_text())


@pytest.fixture(scope='module')
def tiny(names):
  """The tiny model with the recipe's weights, through the importer."""
  arch = porting.infer_arch({k.removeprefix('backbone.'): np.zeros(s) for k, s in names['tiny'].items()})
  return MiTPlus(**arch), porting.from_torch(recipe.state_dict(0, names['tiny']))


def close(ours, fixture, key, atol):
  """Compares an array in PyTorch's layout with what is stored of the reference, relative to its largest value."""
  np.testing.assert_array_equal(ours.shape, fixture[f'{key}/shape'])
  if f'{key}/full' in fixture:
    theirs = fixture[f'{key}/full']
  else:
    theirs = fixture[f'{key}/sample']
    np.testing.assert_allclose(recipe.summary(ours)[:2], fixture[f'{key}/summary'][:2], rtol=0, atol=atol)
    ours = ours.reshape(-1)[recipe.sample_index(ours.size, theirs.size)]
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol * abs(theirs).max(), err_msg=key)


def channels_first(x):
  return np.moveaxis(np.asarray(x), -1, 1)


def every_stage(fixture, model, params, case, shape, kind, decode=True):
  """Input, pyramid, tokens, class token and, unless `decode` is off, reconstruction and logits, each within 1e-4."""
  x = recipe.network_input(0, case, shape, kind)
  close(x, fixture, f'{case}/input', 0)
  weights = params['head']['last_layer']['weight_v'].shape
  head = DINOHead(weights[0], params['head']['mlp_0']['kernel'].shape[1], weights[1])

  @jax.jit
  def forward(params, x):
    out = model.apply({'params': params['backbone']}, x, decode=decode)
    return out, head.apply({'params': params['head']}, out.embedding)
  out, logits = forward(params, np.moveaxis(x, 1, -1))
  for name, ours in zip(MAPS, out.pyramid):
    close(channels_first(ours), fixture, f'{case}/{name}', 1e-4)
  tokens = np.asarray(out.pyramid[5])
  close(tokens.reshape(len(tokens), -1, tokens.shape[-1]), fixture, f'{case}/s4tok', 1e-4)
  close(np.asarray(out.embedding), fixture, f'{case}/cls', 1e-4)
  if not decode:
    return
  close(channels_first(out.reconstruction), fixture, f'{case}/recon', 1e-4)
  close(np.asarray(logits), fixture, f'{case}/logits', 1e-4)


@pytest.mark.parametrize('case', CASES)
def test_every_stage_equals_the_released_code(fixtures, tiny, case):
  every_stage(np.load(fixtures / 'parity' / 'plus_tiny_forward.npz'), *tiny, case, *CASES[case])


@pytest.mark.parametrize('case', OTHER_SIZES)
def test_the_encoder_at_other_sizes_equals_the_released_code(fixtures, tiny, case):
  model, params = tiny
  every_stage(np.load(fixtures / 'parity' / 'plus_tiny_forward.npz'), model.clone(pos_interp='reference'), params, case,
              *OTHER_SIZES[case], decode=False)


@pytest.mark.slow
@pytest.mark.realdata
def test_the_full_model_equals_the_released_code(shared, names):
  """63.3 million weights: the recipe's statistics, images and volumes of 96 x 96, the encoder at 128 x 128."""
  fixture = np.load(shared / 'fixtures' / 'parity' / 'plus_full_forward.npz')
  state = recipe.state_dict(0, names['full'])
  np.testing.assert_allclose([recipe.summary(state[k])[:3] for k in sorted(state)], fixture['weight_summary'],
                             rtol=1e-6, atol=1e-12)
  params = porting.from_torch(state)
  every_stage(fixture, MiTPlus(), params, 'x2d', (1, 3, 96, 96), 'unit')
  every_stage(fixture, MiTPlus(), params, 'x3d', (1, 1, 16, 96, 96), 'ct')
  model = MiTPlus(pos_interp='reference')
  every_stage(fixture, model, params, 'x2d_128', (1, 3, 128, 128), 'unit', decode=False)
  every_stage(fixture, model, params, 'x3d_128', (1, 1, 16, 128, 128), 'ct', decode=False)


@pytest.mark.parametrize('size', ['tiny', 'full'])
def test_exported_names_and_shapes_are_the_released_ones(names, size):
  """The exporter writes what the released code reads, nothing more or less, and in its layout."""
  ours = models.param_shapes(MiTPlus(**(TINY if size == 'tiny' else {})))
  wide = {k[len('head.'):]: v for k, v in names[size].items() if k.startswith('head.')}
  head = DINOHead(wide['last_layer.weight_v'][0], wide['mlp.0.weight'][0], wide['mlp.4.weight'][0])
  shape = jax.ShapeDtypeStruct((1, wide['mlp.0.weight'][1]), np.float32)
  tree = {'backbone': unflatten_dict(ours), 'head': jax.eval_shape(head.init, jax.random.key(0), shape)['params']}
  exported = porting.to_torch(jax.tree.map(_hollow, tree))
  assert {k: list(v.shape) for k, v in exported.items()} == names[size]
  assert len(exported) == 367 and sum('3D' in k for k in exported) == 84
  assert sum(v.size for v in exported.values()) == {'tiny': sum(np.prod(s) for s in names['tiny'].values()),
                                                    'full': 63_333_828}[size]


def _hollow(leaf):
  """An array of this shape without its memory: the full model has 250 MB."""
  return np.broadcast_to(np.float16(0), leaf.shape)
