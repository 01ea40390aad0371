"""UniMedI leaves as a folder for PyTorch users, with its text tower, and comes back; what lacks is named."""
import importlib.util
import json
import logging
import shutil
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from data_pipelines.phantom import studies as world
from tests.e2e import tiny
from tests.methods.test_unimedi import Built
from unimiss_jax import checkpoint, init_from, models, weights
from unimiss_jax.checkpoint import CheckpointError
from unimiss_jax.cli import export, towers
from unimiss_jax.methods import base
from unimiss_jax.models.bert import Bert
from unimiss_jax.optim import named_leaves
from unimiss_jax.porting import PortingError, convert, parity, torch_files

torch = pytest.importorskip('torch')


@pytest.fixture(autouse=True)
def no_log_to_a_closed_stream():
  yield
  logging.getLogger().handlers = [h for h in logging.getLogger().handlers if type(h) is not logging.StreamHandler]


@pytest.fixture(scope='module')
def built():
  return Built(**{'unimedi.icl': 1., 'model.depths': (2,)})


@pytest.fixture(scope='module')
def params(built):
  shapes = jax.eval_shape(built.method.init, jax.random.key(0))[0]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


@pytest.fixture(scope='module')
def run(built, params, tmp_path_factory):
  """What a run leaves, without running it."""
  folder = tmp_path_factory.mktemp('run')
  c = checkpoint.Checkpoints(folder / 'checkpoints', keep=1)
  c.save(3, {'params': params, 'extra': {'teacher': {k: params[k] for k in ('backbone', 'head')}}},
         {'positions': {'ct': 12, 'xray': 12}, 'config_hash': 'beef'})
  c.close()
  (folder / 'config.json').write_text(json.dumps(built.config.to_dict()))
  return folder


@pytest.fixture(scope='module')
def out(run, tmp_path_factory):
  out = tmp_path_factory.mktemp('out') / 'model'
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parity, 'SIZES', ((24, 32), (4, 16, 24)))
    export.export(run, out, formats=('safetensors', 'pth'))
  return out


def same(got, want):
  got, want = flatten_dict(got), flatten_dict(want)
  assert got.keys() == want.keys()
  for path, leaf in want.items():
    np.testing.assert_array_equal(got[path], leaf, err_msg='/'.join(path))


def copied(file, name, monkeypatch):
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, name, module)      # its dataclass looks itself up
  spec.loader.exec_module(module)
  return module


def test_both_towers_come_back_bit_exact(out, params):
  proof = json.loads((out / 'parity.json').read_text())
  assert proof['passed'] and proof['worst_max_rel'] < 1e-5
  assert set(proof['inputs']) == {'24x32', '4x16x24', 'reports of 16 word pieces', '8x16x16 with 2 slices'}
  assert set(proof['inputs']['8x16x16 with 2 slices']) == {'embedding', 'patches', 'projected'}
  for file in (out, out / 'model.pth'):
    same(weights.read(file, arch={'num_heads': (2,)} if file.suffix else None).params,
         {k: params[k] for k in ('backbone', 'head')})
  back = towers.of(weights.read(out))
  same(back.params, params['text'])
  np.testing.assert_array_equal(back.projections['text_proj'], params['text_proj']['kernel'])
  np.testing.assert_array_equal(back.projections['vision_proj'], params['vision_proj']['kernel'])
  assert back.projections['log_scale'] == params['log_scale'] and back.vocabulary == world.VOCABULARY
  text = (out / 'README.md').read_text()
  assert 'released' not in text.split('## Use')[0] and 'torch_bert.Bert' in text and '`: \n' not in text


@pytest.mark.slow
def test_a_user_of_pytorch_needs_this_folder_alone(out, built, params, monkeypatch):
  """The lines of the card, on what a user has: copies of the files."""
  import safetensors.torch
  vit, bert = (copied(out / f'torch_{n}.py', f'copied_{n}', monkeypatch) for n in ('vit', 'bert'))
  net = vit.UniMedI(**json.loads((out / 'config.json').read_text())['torch']).eval()
  net.load_state_dict(safetensors.torch.load_file(out / 'model.safetensors'))
  x = np.random.default_rng(1).random((2, 3, 16, 16)).astype(np.float32)
  ours = models.build(built.config.model).apply({'params': params['backbone']}, np.moveaxis(x, 1, -1)).embedding
  output, logits = net(torch.tensor(x))
  np.testing.assert_allclose(output.embedding.detach().numpy(), ours, rtol=0, atol=1e-5)
  assert logits.shape == (2, 8)
  text = bert.Bert(**json.loads((out / 'text' / 'config.json').read_text())).eval()
  text.load_state_dict(safetensors.torch.load_file(out / 'text' / 'model.safetensors'))
  ids = np.array([[2, 5, 3, 0], [2, 7, 9, 3]])
  want = Bert(29, 8, 1, 2, 8, 16).apply({'params': params['text']}, ids, (ids > 0).astype(int)).last[:, 0]
  got = text(torch.tensor(ids), torch.tensor(ids > 0))[0][:, 0]
  np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=1e-5)
  said = json.loads((out / 'text' / towers.TOKENIZER).read_text())
  assert said['do_lower_case'] and said['model_max_length'] == 16


@pytest.mark.slow
def test_weights_of_another_architecture_are_named(out, run, tmp_path):
  found = weights.read(out)
  tensors = torch_files.read(out / 'model.safetensors')
  with pytest.raises(PortingError, match='missing: .*block1.2.attn.q.weight'):
    convert.from_torch(tensors, found.arch | {'depths': (3,)})
  with pytest.raises(PortingError, match='missing: .*ConvBlock2D0.*unexpected: .*plane_table'):
    convert.from_torch(tensors, 'mit_plus', allow=('head',))
  with pytest.raises(PortingError, match='mis-shaped: .*patch_embed2D.weight .8, 8, 3, 8. expected .4, 4, 3, 8.'):
    convert.from_torch(tensors, found.arch | {'patch': 4})
  shutil.copytree(run / 'checkpoints', tmp_path / 'run' / 'checkpoints')
  with pytest.raises(PortingError, match='config.json of its run is not there, so the text tower is unknown'):
    export.export(tmp_path / 'run', tmp_path / 'x')


@pytest.mark.slow
def test_a_run_of_another_architecture_starts_from_none_of_it(out, run, built):
  """A ViT for MiT+, and a wider one for this ViT; the same one is taken, text and projections by their own leaf."""
  for config, what in ((tiny.config(), 'holds a ViT, and this run has model.name=mit_plus'),
                       (tiny.changed(built.config.copy_and_resolve_references(), {'model.embed_dims': (16,)}),
                        'another shape: backbone/transformer/')):
    config = tiny.changed(config.unlock(), {'init_from': str(out)})
    params = jax.eval_shape(base.make(config, {s: (80, {}) for s in ('ct', 'xray')}).init, jax.random.key(0))[0]
    with pytest.raises(CheckpointError, match=what):
      init_from.read(config, params)
  config = tiny.changed(built.config.copy_and_resolve_references().unlock(), {
      'init_from': str(out), 'unimedi.text.init_from': str(out / 'text'), 'unimedi.text.vocab_size': 0})
  method = base.make(config, {s: (80, {}) for s in ('ct', 'xray')})
  params = jax.eval_shape(method.init, jax.random.key(0))[0]
  found = init_from.read(config, params)
  assert 'backbone/transformer/plane_table' in found and not [n for n in found if n.startswith('text')]
  assert {n for n in method.given() if n.startswith('text/')} == {
      n for n in named_leaves(params) if n.startswith('text/')}
