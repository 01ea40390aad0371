"""MiT, the network of the pilot UniMiSS, against the released PyTorch code: names, every stage, embeddings, logits."""
import json

import jax
import numpy as np
import pytest

from tests.parity import recipe
from tests.parity.test_forward import channels_first, close
from unimiss_jax import models, porting
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiT, MiTTiny
from unimiss_jax.porting import torch_names

MAPS = ('c0', 's1', 's2', 's3')
CASES = ('x3d', 'x2d_96x128', *(pytest.param(case, marks=pytest.mark.slow) for case in ('x2d', 'x2d_128', 'x3d_128')))


@pytest.fixture(scope='module')
def meta(fixtures):
  return json.loads((fixtures / 'parity' / 'pilot_meta.json').read_text())


@pytest.fixture(scope='module')
def arrays(fixtures):
  return np.load(fixtures / 'parity' / 'pilot_forward.npz')


@pytest.fixture(scope='module')
def params(meta):
  """The recipe's weights, through the importer."""
  return porting.from_torch(recipe.state_dict(meta['seed'], meta['state_keys']))


@pytest.fixture(scope='module')
def run(meta):
  model, head = MiTTiny(image_size=meta['img2d'], pos_interp='reference'), DINOHead(**meta['head'])

  @jax.jit
  def forward(params, x):
    out = model.apply({'params': params['backbone']}, x)
    encoder_token = model.apply({'params': params['backbone']}, x, decode=False).embedding
    return out, encoder_token, head.apply({'params': params['head']}, out.embedding)
  return forward


@pytest.mark.parametrize('case', CASES)
def test_every_stage_equals_the_released_code(arrays, meta, params, run, case):
  """Native sizes, larger ones and one that is not square, through encoder and decoder; each within 1e-4."""
  shape, kind = next(rest for name, *rest in meta['cases'] if name == case)
  out, token, logits = run(params, np.moveaxis(recipe.network_input(meta['seed'], case, shape, kind), 1, -1))
  for name, ours in zip(MAPS, out.pyramid):
    close(channels_first(ours), arrays, f'{case}/{name}', 1e-4)
  tokens = np.concatenate([token[:, None], np.asarray(out.pyramid[4]).reshape(1, -1, token.shape[-1])], 1)
  close(tokens, arrays, f'{case}/s4tok', 1e-4)
  for name, ours in (('embed', out.embedding), ('logits', logits)):
    theirs = arrays[f'{case}/{name}']
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * abs(theirs).max(), err_msg=f'{case}/{name}')


def test_names_shapes_and_counts_are_the_released_ones(meta):
  """The 199 tensors of the backbone in PyTorch's layout; all numbers of tiny and small at the released sizes."""
  names = {'.'.join(('backbone', torch_names.to_torch_name(path))): leaf for path, leaf in
           models.param_shapes(MiTTiny(image_size=meta['img2d'])).items()}
  ours = {name: torch_names.to_torch_layout(name, np.broadcast_to(np.float16(0), leaf.shape)).shape
          for name, leaf in names.items()}
  assert ours == {k: tuple(v) for k, v in meta['state_keys'].items() if k.startswith('backbone.')}
  assert len(ours) == 199
  for model, count in ((MiTTiny(), 20_380_336), (MiT(), 43_942_944)):
    assert sum(leaf.size for leaf in models.param_shapes(model).values()) == count
