"""The PyTorch twin of MiT: released names, released numbers, at other sizes the values of Flax."""
import ast
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.parity import recipe
from tests.porting.test_torch_mit import channels_first, close, noise, tensors
from unimiss_jax import models, porting
from unimiss_jax.models.mit import MiT
from unimiss_jax.porting import arch as architectures

torch = pytest.importorskip('torch')
from unimiss_jax.porting import torch_mit_pilot  # noqa: E402

TINY = dict(depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1))
SMALL = dict(embed_dims=(8, 8, 16, 16), depths=(1, 2, 1, 1), mlp_ratio=2, decoder_dims=(16, 8, 8),
             decoder_depths=(1, 1, 2), image_size=96, volume_size=(16, 64, 96))


@pytest.fixture(scope='module')
def meta(fixtures):
  return json.loads((fixtures / 'parity' / 'pilot_meta.json').read_text())


def test_names_shapes_and_fields_are_the_released_ones(meta):
  with torch.device('meta'):
    net = torch_mit_pilot.UniMiSS(dict(TINY, image_size=meta['img2d']), meta['head'])
  assert {name: list(leaf.shape) for name, leaf in net.state_dict().items()} == meta['state_keys']
  assert [name for name, leaf in net.named_parameters() if not leaf.requires_grad] == ['head.last_layer.weight_g']
  fields = vars(torch_mit_pilot.Arch())
  assert fields == {name: getattr(MiT, name) for name in fields}
  assert set(MiT.__dataclass_fields__) - {'dtype', 'parent', 'name'} == set(fields)


@pytest.fixture(scope='module')
def net(meta):
  """The recipe's weights."""
  net = torch_mit_pilot.UniMiSS(dict(TINY, image_size=meta['img2d']), meta['head'])
  net.load_state_dict(tensors(recipe.state_dict(meta['seed'], meta['state_keys'])))
  return net


@pytest.mark.parametrize('case', ['x2d', 'x3d'])
def test_every_stage_equals_the_released_code(fixtures, meta, net, case):
  arrays = np.load(fixtures / 'parity' / 'pilot_forward.npz')
  shape, kind = next(rest for name, *rest in meta['cases'] if name == case)
  x = torch.tensor(recipe.network_input(meta['seed'], case, shape, kind))
  with torch.no_grad():
    out, logits = net(x)
    token = net(x, decode=False)[0].embedding
  stages = dict(zip(('c0', 's1', 's2', 's3'), out.pyramid), embed=out.embedding, logits=logits,
                s4tok=torch.cat([token[:, None], out.pyramid[4].flatten(2).transpose(1, 2)], 1))
  for name, ours in stages.items():
    ours, key = ours.numpy(), f'{case}/{name}'
    theirs = arrays[key] if key in arrays else arrays[f'{key}/sample']
    ours = ours if key in arrays else ours.reshape(-1)[recipe.sample_index(ours.size, theirs.size)]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * abs(theirs).max(), err_msg=key)


@pytest.mark.parametrize('shape', [(1, 3, 64, 96), pytest.param((1, 1, 32, 64, 64), marks=pytest.mark.slow)])
def test_flax_and_pytorch_agree_in_float64_where_tables_are_interpolated(shape):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    model = MiT(**SMALL, dtype=np.float64)
    params = unflatten_dict({path: noise(path, leaf.shape, rng) for path, leaf in models.param_shapes(model).items()})
    net = torch_mit_pilot.MiT(**SMALL).double()
    net.load_state_dict({name.removeprefix('backbone.'): leaf for name, leaf in
                         tensors(porting.to_torch(params, SMALL)).items()}, strict=True)
    x = rng.random(shape)
    ours = jax.jit(lambda p, x: model.apply({'params': p}, x))(params, np.moveaxis(x, 1, -1))
    with torch.no_grad():
      theirs = net(torch.tensor(x))
    close(np.asarray(ours.embedding), theirs.embedding.numpy(), 1e-10, 'embedding')
    for i, (mine, other) in enumerate(zip(ours.pyramid, theirs.pyramid, strict=True)):
      close(channels_first(mine), other.numpy(), 1e-10, f'level {i}')


@pytest.mark.parametrize('shape, message', [
    ((1, 3, 64, 80), r'nearest valid size is \(64, 64\)'), ((1, 1, 24, 64, 64), r'valid size is \(32, 64, 64\)'),
    ((1, 1, 64, 64), 'expected 3 for 2-D'), ((3, 64, 64), 'expected')])
def test_other_inputs_are_refused_alike(shape, message):
  with pytest.raises(ValueError, match=message):
    torch_mit_pilot.Arch().check(shape)
  if len(shape) > 3:
    with pytest.raises(ValueError, match=message):
      MiT().check(shape[2:], shape[1])


def test_the_file_can_be_copied():
  """It imports torch and the standard library only, nothing relative."""
  nodes = [*ast.walk(ast.parse(pathlib.Path(torch_mit_pilot.__file__).read_text()))]
  found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
  found |= {'.' * node.level + (node.module or '') for node in nodes if isinstance(node, ast.ImportFrom)}
  assert {name.split('.')[0] for name in found} - set(sys.stdlib_module_names) == {'torch'}


def test_the_twin_is_found_by_the_fields():
  assert architectures.twin(dict(SMALL))[1:] == ('mit', 'torch_mit_pilot', 'UniMiSS')
  assert architectures.twin('mit_plus')[1:] == ('mit_plus', 'torch_mit', 'UniMiSSPlus')
  assert isinstance(architectures.torch_network({'arch': SMALL, 'head': None}), torch_mit_pilot.UniMiSS)
