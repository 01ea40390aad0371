"""Joint leaves as a folder for PyTorch users, ResNet and Transformer over slices in one file, and comes back."""
import importlib.util
import json
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.methods import test_joint
from unimiss_jax import checkpoint, init_from, models, weights
from unimiss_jax.cli import embed, export
from unimiss_jax.models import deformable
from unimiss_jax.porting import PortingError, parity, to_torch, torch_files
from unimiss_jax.porting import arch as architectures

torch = pytest.importorskip('torch')
from unimiss_jax.porting import torch_resnet  # noqa: E402

PARTS = 'backbone', 'batch_stats', 'head', 'slice', 'inter'


@pytest.fixture(autouse=True)
def no_log_to_a_closed_stream():
  yield
  logging.getLogger().handlers = [h for h in logging.getLogger().handlers if type(h) is not logging.StreamHandler]


def config(preset='phantom', resnet=True, **leaves):
  c = test_joint.tiny(preset, **leaves)
  if resnet:
    c.model = dict(name='resnet50', depths=(1, 1, 1, 1), width=4, in_channels=(3, 1), image_size=64, dtype='float32',
                   remat='')
  return c.lock()


def saved(c, folder):
  """What a run leaves, without running it; returns all its trees."""
  params, extra = jax.eval_shape(test_joint.made(c).init, jax.random.key(0))
  rng = np.random.default_rng(0)

  def drawn(path, x):
    spread = x.size / x.shape[-1] if path[-1].key == 'kernel' else 100
    return jnp.asarray(rng.standard_normal(x.shape) / spread**.5 + (path[-1].key in ('scale', 'var')), jnp.float32)
  trees = jax.tree_util.tree_map_with_path(drawn, params | {k: x for k, x in extra.items() if k == 'batch_stats'})
  keeper = checkpoint.Checkpoints(folder / 'checkpoints', keep=1)
  keeper.save(5, {'params': {k: x for k, x in trees.items() if k in params},
                  'extra': {k: x for k, x in trees.items() if k not in params}},
              {'positions': {'ct': 8, 'xray': 12}, 'config_hash': 'beef'})
  keeper.close()
  (folder / 'config.json').write_text(json.dumps(c.to_dict()))
  return trees


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(folder of a run, its trees)."""
  folder = tmp_path_factory.mktemp('run')
  return folder, saved(config(), folder)


@pytest.fixture(scope='module')
def out(run, tmp_path_factory):
  out = tmp_path_factory.mktemp('out') / 'model'
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parity, 'SIZES', ((40, 64), (6, 32, 40)))      # six slices: no multiple of the downsampling
    export.export(run[0], out, formats=('safetensors', 'pth'))
  return out


def same(got, want):
  got, want = flatten_dict(got), flatten_dict(want)
  assert got.keys() == want.keys()
  for path, leaf in want.items():
    np.testing.assert_array_equal(got[path], leaf, err_msg='/'.join(path))


def test_every_way_back_is_bit_exact(out, run):
  folder, trees = run
  kept = {k: trees[k] for k in PARTS}
  found = weights.read(out)
  same(found.params, kept)
  assert found.recorded and found.dimensions == (2, 3) and found.parts == ('encoder', 'head', 'inter')
  assert found.inter == weights.read(folder).inter and found.inter['downsample'] == 4 and found.inter['width'] == 16
  same(weights.read(folder).params, trees)
  with pytest.raises(PortingError, match='does not record its fields. FIX: .*--allow=inter'):
    weights.read(out / 'model.pth')
  same(weights.read(out / 'model.pth', allow=['inter']).params, {k: trees[k] for k in PARTS[:3]})
  assert weights.read(out, allow=['inter']).dimensions == (2,)


def test_the_folder_is_whole_and_proven(out):
  assert {p.name for p in out.iterdir()} == {
      'model.safetensors', 'model.pth', 'config.json', 'README.md', 'parity.json', 'torch_resnet.py'}
  proof = json.loads((out / 'parity.json').read_text())
  assert proof['passed'] and proof['worst_max_rel'] < 1e-5
  assert {k: set(v) for k, v in proof['inputs'].items()} == {
      '40x64': {'embedding', 'c0', 's1', 's2', 's3', 's4', 'logits'}, '6x32x40': {'embedding', 'slices', 'tokens'}}
  text = (out / 'README.md').read_text()
  assert 'released' not in text.split('## Use')[0] and 'import json, safetensors.torch, torch_resnet' in text
  assert 'parameters: encoder, head, Transformer over slices)' in text and 'those of torchvision' in text
  assert 'slice by slice' in text and '`: \n' not in text
  assert '| phases | intra 50 %, mask 20 %, inter 30 % |' in text and '| size | 16 x 64 x 64 |' in text


@pytest.mark.slow
def test_a_user_of_pytorch_needs_this_folder_alone(out, run, monkeypatch):
  """The lines of the card on copies of the files; torchvision's names behind 'backbone.'."""
  import safetensors.torch
  spec = importlib.util.spec_from_file_location('copied', out / 'torch_resnet.py')
  copied = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, 'copied', copied)
  spec.loader.exec_module(copied)
  net = copied.Joint(**json.loads((out / 'config.json').read_text())['torch']).eval()
  state = safetensors.torch.load_file(out / 'model.safetensors')
  net.load_state_dict(state)
  assert {'backbone.layer4.0.downsample.1.running_var', 'slice.weight', 'inter.layer.0.attn.to_q.weight'} <= set(state)
  c, trees = config(), run[1]
  x = np.random.default_rng(1).uniform(-1, 1, (2, 1, 8, 48, 32)).astype(np.float32)
  want = test_joint.made(c).predict['embed'](
      {k: v for k, v in trees.items() if k != 'batch_stats'}, {'batch_stats': trees['batch_stats']},
      {'ct': np.moveaxis(x, 1, -1)[:, None]})['ct'][:, 0]
  output, logits = net(torch.tensor(x))
  assert logits is None and output.pyramid[1].shape == (2, 16, 8)
  np.testing.assert_allclose(output.embedding.detach().numpy(), want, rtol=0, atol=1e-5)
  with pytest.raises(ValueError, match='at least 32 x 32'):
    net(torch.zeros(1, 1, 8, 48, 24))


def test_the_kinds_of_attention_equal_ours():
  """ddetr too, in float64, and lengths that are no multiple of the downsampling."""
  with jax.enable_x64(True):
    for fields in (dict(kind='ddetr'), dict(kind='dat', downsample=2, offset_kernel=4)):
      fields = dict(layers=1, hidden=20, heads=4, head_dim=3, groups=2, points=3) | fields
      ours = deformable.InterEncoder(dtype=jnp.float64, **fields)
      z = np.random.default_rng(0).standard_normal((2, 11, 8))
      shapes = jax.eval_shape(ours.init, jax.random.key(0), jnp.zeros((1, 4, 8)))['params']
      rng = np.random.default_rng(1)
      params = jax.tree.map(lambda s, r=rng: .5 * r.standard_normal(s.shape), shapes)
      theirs = torch_resnet.InterEncoder(8, **fields).double().eval()
      state = {n.removeprefix('inter.'): torch.tensor(x) for n, x in to_torch({'inter': params}).items()}
      theirs.load_state_dict(state)
      got = theirs(torch.tensor(z)).detach().numpy()
      np.testing.assert_allclose(got, jax.jit(ours.apply)({'params': params}, z), rtol=0, atol=1e-11)
  with pytest.raises(ValueError, match='along the slices'):
    torch_resnet.InterEncoder(8, axis='feature')


def test_a_new_run_starts_from_it_with_its_batch_statistics(out, run):
  """Of Joint with Transformer and head; a network of another kind is refused by name."""
  c = config().unlock()
  c.init_from = str(out)
  params, extra = jax.eval_shape(test_joint.made(c).init, jax.random.key(0))
  given = init_from.read(c, params | {'batch_stats': extra['batch_stats']})
  want = flatten_dict({k: run[1][k] for k in PARTS}, sep='/')
  assert given.keys() == want.keys()
  merged = flatten_dict(init_from.merge(extra, given)['batch_stats'], sep='/')
  np.testing.assert_array_equal(merged['layer2_0/bn2/var'], want['batch_stats/layer2_0/bn2/var'])
  other = config(resnet=False).unlock()
  other.init_from = str(out)
  with pytest.raises(checkpoint.CheckpointError, match='holds a ResNet, and this run has model.name=mit_plus'):
    init_from.read(other, params)


def test_a_plain_baseline_and_torchvisions_names(tmp_path):
  """Images alone; a bare file of torchvision's names without any record becomes the same folder."""
  (tmp_path / 'run').mkdir()
  trees = saved(config('swav2d'), tmp_path / 'run')
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parity, 'SIZES', ((40, 64),))
    proof = export.export(tmp_path / 'run', tmp_path / 'out')
    assert set(proof['inputs']) == {'40x64'}
    known = json.loads((tmp_path / 'out' / 'config.json').read_text())['torch']
    assert known['dimensions'] == [2] and 'inter' not in known and known['arch']['depths'] == [1, 1, 1, 1]
    plain = {n.removeprefix('backbone.'): x for n, x in torch_files.read(tmp_path / 'out' / 'model.safetensors').items()
             if n.startswith('backbone.')}
    torch_files.write(tmp_path / 'resnet.safetensors', plain | {'fc.weight': np.ones((2, 128), np.float32)})
    export.export(tmp_path / 'resnet.safetensors', tmp_path / 'again', parts=('encoder',))
  same(weights.read(tmp_path / 'again').params, {k: trees[k] for k in ('backbone', 'batch_stats')})


@pytest.mark.slow
def test_of_a_mit_what_was_trained_is_written(tmp_path):
  """The 2-D branch; the Transformer over its slices is refused. The run itself embeds volumes through both."""
  c = config(resnet=False)
  trees = saved(c, tmp_path)
  with pytest.raises(PortingError, match=r'2-D branch of a MiT\+, .* FIX: --parts=encoder,head'):
    export.export(tmp_path, tmp_path / 'out')
  found = weights.read(tmp_path)
  assert found.dimensions == (2, 3) and found.inter
  assert not any('3D' in part for path in flatten_dict(found.params['backbone']) for part in path)
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parity, 'SIZES', ((64, 64),))
    export.export(tmp_path, tmp_path / 'out', parts=('encoder', 'head'))
  network, got = embed._network(found, 2)[0], []
  x = np.random.default_rng(1).uniform(-1, 1, (16, 64, 64, 1)).astype(np.float32)
  network.give(x, got.append)
  network.end()
  want = test_joint.made(c).predict['embed'](trees, {}, {'ct': x[None, None]})['ct'][0]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  back = weights.read(tmp_path / 'out')
  assert back.dimensions == (2,) and back.parts == ('encoder', 'head')


def test_what_no_pytorch_file_holds_is_refused():
  for leaves, why in ((dict(axis='feature'), 'attends along features'), (dict(sampler='collapse'), 'samples')):
    found = weights.Weights({}, architectures.of_config({'name': 'resnet50'}), True, (2, 3), '', 'x', {},
                            architectures.inter_fields(leaves, 16))
    with pytest.raises(PortingError, match=why):
      export._refuse_inter(found, ('encoder', 'inter'))
  assert models.build({'name': 'resnet50'}).width == architectures.of_config({'name': 'resnet50'})['width']
