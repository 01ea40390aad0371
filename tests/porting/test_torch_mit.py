"""The PyTorch twin of MiT+: released names, released numbers, and in float64 the values and gradients of Flax."""
import ast
import json
import math
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.parity import recipe
from unimiss_jax import models, porting
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiTPlus

torch = pytest.importorskip('torch')
from unimiss_jax.porting import torch_mit  # noqa: E402

TINY = dict(embed_dims=(4, 8, 16, 32, 40, 40), decoder_dims=(40, 32, 16, 8, 4), image_size=64,
            volume_size=(16, 64, 64))
HEADS = {'tiny': dict(out_dim=128, hidden_dim=64, bottleneck_dim=32), 'full': {}}
CASES = {'x2d': ((2, 3, 64, 64), 'unit'), 'x3d': ((1, 1, 16, 64, 64), 'ct')}

SMALL = dict(embed_dims=(4, 6, 8, 12, 16, 16), depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), mlp_ratio=2,
             decoder_dims=(16, 12, 8, 6, 4), decoder_depths=(1, 1, 2), image_size=64, volume_size=(16, 64, 64))
ARCHS = {      # the tables of the last two fit none of the sizes, in depth neither
    'released': SMALL,
    'changed': dict(SMALL, conv_residual=True, last_stride=1, final_norm=True, image_size=80, volume_size=(20, 48, 64)),
    'no class token': dict(SMALL, cls_token=False, image_size=96, volume_size=(24, 64, 32))}
SIZES = {'square': (3, 64, 64), 'wide': (3, 64, 96), 'cube': (1, 16, 64, 64), 'flat': (1, 16, 32, 64)}


@pytest.fixture(scope='module')
def names(fixtures):
  return json.loads((fixtures / 'parity' / 'plus_state_keys.json').read_text())


def tensors(state):
  return {name: torch.tensor(array) for name, array in state.items()}


def channels_first(x):
  return np.moveaxis(np.asarray(x), -1, 1) if np.ndim(x) > 2 else np.asarray(x)


@pytest.mark.parametrize('size', HEADS)
def test_names_and_shapes_are_the_released_ones(names, size):
  with torch.device('meta'):
    net = torch_mit.UniMiSSPlus(TINY if size == 'tiny' else {}, HEADS[size])
  assert {name: list(leaf.shape) for name, leaf in net.state_dict().items()} == names[size]
  assert [name for name, leaf in net.named_parameters() if not leaf.requires_grad] == ['head.last_layer.weight_g']


def test_the_fields_are_those_of_the_flax_module():
  fields = vars(torch_mit.Arch())
  assert fields == {name: getattr(MiTPlus, name) for name in fields}
  training = {'encoder_drop_path', 'decoder_drop_path', 'init', 'dtype', 'remat', 'fold', 'parent', 'name'}
  assert set(MiTPlus.__dataclass_fields__) - training == set(fields)


def released(fixture, net, case, shape, kind):
  """Each stage within 1e-4 of its largest value."""
  with torch.no_grad():
    out, logits = net(torch.tensor(recipe.network_input(0, case, shape, kind)))
  stages = dict(zip(('c0', 'c1', 's1', 's2', 's3'), out.pyramid), cls=out.embedding, recon=out.reconstruction,
                s4tok=out.pyramid[5].flatten(2).transpose(1, 2), logits=logits)
  for name, ours in stages.items():
    ours, key = ours.numpy(), f'{case}/{name}'
    np.testing.assert_array_equal(ours.shape, fixture[f'{key}/shape'])
    if f'{key}/full' in fixture:
      theirs = fixture[f'{key}/full']
    else:
      theirs = fixture[f'{key}/sample']
      np.testing.assert_allclose(recipe.summary(ours)[:2], fixture[f'{key}/summary'][:2], rtol=0, atol=1e-4)
      ours = ours.reshape(-1)[recipe.sample_index(ours.size, theirs.size)]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * abs(theirs).max(), err_msg=key)


@pytest.mark.parametrize('case', CASES)
def test_every_stage_equals_the_released_code(fixtures, names, case):
  net = torch_mit.UniMiSSPlus(TINY, HEADS['tiny'])
  net.load_state_dict(tensors(recipe.state_dict(0, names['tiny'])))
  released(np.load(fixtures / 'parity' / 'plus_tiny_forward.npz'), net, case, *CASES[case])


@pytest.mark.realdata
def test_the_full_model_equals_the_released_code(shared, names):
  net = torch_mit.UniMiSSPlus()
  net.load_state_dict(tensors(recipe.state_dict(0, names['full'])))
  fixture = np.load(shared / 'fixtures' / 'parity' / 'plus_full_forward.npz')
  released(fixture, net, 'x2d', (1, 3, 96, 96), 'unit')
  released(fixture, net, 'x3d', (1, 1, 16, 96, 96), 'ct')


def noise(path, shape, rng):
  """Values of a size that keeps every layer alive."""
  z = rng.standard_normal(shape)
  return {'bias': 0.2 * z, 'scale': 1 + 0.2 * z, 'kernel': z / math.prod(shape[:-1])**0.5}.get(path[-1], 0.5 * z)


def pair(arch):
  """The Flax module, its parameters and the PyTorch twin that holds the same, all in float64."""
  rng, arch = np.random.default_rng(0), ARCHS[arch]
  model = MiTPlus(**arch, dtype=np.float64)
  params = unflatten_dict({path: noise(path, leaf.shape, rng) for path, leaf in models.param_shapes(model).items()})
  net = torch_mit.MiTPlus(**arch).double()
  net.load_state_dict({name.removeprefix('backbone.'): leaf for name, leaf in
                       tensors(porting.to_torch(params, arch)).items()}, strict=True)
  return model, params, net


def batch(size):
  return np.random.default_rng(1).random((2, *SIZES[size]))


def close(ours, theirs, rtol, label):
  assert ours.dtype == theirs.dtype == np.float64
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * abs(theirs).max(), err_msg=label)


@pytest.mark.parametrize('arch, size', [
    pytest.param(a, s, marks=[] if s == 'cube' or (a, s) == ('changed', 'wide') else pytest.mark.slow)
    for a in ARCHS for s in SIZES])
def test_every_stage_equals_flax(arch, size):
  with jax.enable_x64(True):
    model, params, net = pair(arch)
    x = batch(size)
    theirs = jax.jit(lambda p, x: model.apply({'params': p}, x))(params, np.moveaxis(x, 1, -1))
    with torch.no_grad():
      ours = net(torch.tensor(x))
      short = net(torch.tensor(x), decode=False)
    assert len(ours.pyramid) == 6
    for i, (a, b) in enumerate(zip(ours.pyramid, theirs.pyramid)):
      close(a.numpy(), channels_first(b), 1e-9, f'map {i}')
    close(ours.embedding.numpy(), np.asarray(theirs.embedding), 1e-9, 'embedding')
    close(ours.reconstruction.numpy(), channels_first(theirs.reconstruction), 1e-9, 'reconstruction')
    assert ours.reconstruction.shape == x.shape
    assert short.reconstruction is None and torch.equal(short.embedding, ours.embedding)


@pytest.mark.parametrize('arch, size', [('changed', 'flat'), pytest.param('released', 'wide', marks=pytest.mark.slow)])
def test_gradients_equal_those_of_flax(arch, size):
  """Of one loss on embedding and reconstruction, for every parameter; those of the other rank have none."""
  with jax.enable_x64(True):
    model, params, net = pair(arch)
    x = batch(size)

    def loss(params, x):
      out = model.apply({'params': params}, x)
      return (out.embedding**3).mean() + ((jax.nn.sigmoid(out.reconstruction) - x)**2).mean()
    value, grads = jax.jit(jax.value_and_grad(loss))(params, np.moveaxis(x, 1, -1))
    theirs = porting.to_torch({'backbone': grads})
    images = torch.tensor(x)
    out = net(images)
    ours = (out.embedding**3).mean() + ((out.reconstruction.sigmoid() - images)**2).mean()
    ours.backward()
    np.testing.assert_allclose(ours.item(), value, rtol=1e-9)
    other = '2D' if len(SIZES[size]) == 4 else '3D'
    for name, leaf in net.named_parameters():
      expected = theirs[f'backbone.{name}']
      assert (leaf.grad is None) == (other in name) == (not expected.any()), name
      if leaf.grad is not None:
        close(leaf.grad.numpy(), expected, 1e-8, name)


def test_the_head_equals_that_of_flax():
  rng = np.random.default_rng(2)
  with jax.enable_x64(True):
    head = DINOHead(24, 12, 6, dtype=np.float64)
    x = rng.standard_normal((3, 10))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), head.init(jax.random.key(0), x)['params'])
    twin = torch_mit.DINOHead(24, 12, 6, in_dim=10).double()
    twin.load_state_dict({k.removeprefix('head.'): v for k, v in tensors(porting.to_torch({'head': params})).items()})
    close(twin(torch.tensor(x)).detach().numpy(), np.asarray(head.apply({'params': params}, x)), 1e-12, 'logits')


@pytest.mark.parametrize('shape, message', [
    ((1, 3, 64, 80), r'nearest valid size is \(64, 64\)'), ((1, 3, 32, 64), r'nearest valid size is \(64, 64\)'),
    ((1, 1, 14, 64, 64), r'nearest valid size is \(16, 64, 64\)'), ((1, 1, 64, 64), 'expected 3 for 2-D'),
    ((3, 64, 64), 'expected')])
def test_other_inputs_are_refused(shape, message):
  with pytest.raises(ValueError, match=message):
    torch_mit.Arch(**SMALL).check(shape)


def test_other_interpolations_are_refused():
  with pytest.raises(ValueError, match="only 'grid'"):
    torch_mit.MiTPlus(pos_interp='reference')


def test_the_file_can_be_copied():
  """It imports torch and the standard library only, nothing relative."""
  nodes = [*ast.walk(ast.parse(pathlib.Path(torch_mit.__file__).read_text()))]
  found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
  found |= {'.' * node.level + (node.module or '') for node in nodes if isinstance(node, ast.ImportFrom)}
  assert {name.split('.')[0] for name in found} - set(sys.stdlib_module_names) == {'torch'}
