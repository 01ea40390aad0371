"""A MiT of the pilot UniMiSS leaves as a folder for PyTorch users, comes back, and embeds scans and radiographs."""
import importlib.util
import json
import logging

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from data_pipelines import evalset
from tests.cli.test_embed import made, numbers, picture, scan, write
from tests.e2e import tiny
from unimiss_jax import models, porting, weights
from unimiss_jax.cli import export
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.porting import PortingError, parity, torch_files
from unimiss_jax.porting import arch as architectures
from unimiss_jax.report import card

pytest.importorskip('torch')


@pytest.fixture(autouse=True)
def no_log_to_a_closed_stream():
  yield
  logging.getLogger().handlers = [h for h in logging.getLogger().handlers if type(h) is not logging.StreamHandler]


@pytest.fixture(scope='module')
def config():
  return tiny.pilot(**{'views.ct.extent': 'output', 'views.ct.resize': 'linear'})


@pytest.fixture(scope='module')
def params(config):
  backbone = numbers(config)
  shapes = jax.eval_shape(DINOHead(32, 16, 8).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), np.float32))
  rng = np.random.default_rng(1)
  head = {path: np.float32(rng.standard_normal(leaf.shape)) for path, leaf in flatten_dict(shapes['params']).items()}
  return {'backbone': backbone, 'head': unflatten_dict(head)}


@pytest.fixture(scope='module')
def file(config, params, tmp_path_factory):
  """A safetensors file with its fields, and what it was trained on beside it."""
  file = tmp_path_factory.mktemp('pilot') / torch_files.WEIGHTS
  torch_files.write(file, porting.to_torch(params), {'arch': architectures.of_config(config.model.to_dict())})
  about = {'sha': torch_files.sha(file), 'branch': 'student', 'preprocessing': card.contract(config.to_dict())}
  (file.parent / torch_files.ABOUT).write_text(json.dumps(about))
  return file


def test_a_head_without_its_decoder_is_refused(file, tmp_path):
  with pytest.raises(PortingError, match='its head reads the class token of the decoder'):
    export.export(file, tmp_path / 'out', parts=('encoder', 'head'))


@pytest.mark.slow
def test_the_exported_folder(file, params, tmp_path, monkeypatch):
  import safetensors.torch
  import torch
  monkeypatch.setattr(parity, 'SIZES', ((64, 96), (16, 64, 64)))
  proof = export.export(file, tmp_path / 'out', formats=('safetensors', 'stablehlo'))
  assert proof['passed'] and set(proof['inputs']) == {
      '64x96', '16x64x64', 'forward_2d.stablehlo', 'forward_3d.stablehlo'}
  assert set(proof['inputs']['64x96']) == {'embedding', 'c0', 's1', 's2', 's3', 's4', 'logits'}
  known = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert known['model_type'] == 'mit' and known['architectures'] == ['UniMiSS']
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert 'torch_mit_pilot.UniMiSS(**json' in text and 'of the released UniMiSS code' in text
  back = flatten_dict(weights.read(tmp_path / 'out').params)
  assert all(np.array_equal(back[path], leaf) for path, leaf in flatten_dict(params).items())

  spec = importlib.util.spec_from_file_location('copied', tmp_path / 'out' / 'torch_mit_pilot.py')
  copied = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(__import__('sys').modules, 'copied', copied)      # its dataclass looks itself up
  spec.loader.exec_module(copied)
  net = copied.UniMiSS(**known['torch']).eval()
  net.load_state_dict(safetensors.torch.load_file(tmp_path / 'out' / 'model.safetensors'))
  assert net(torch.zeros(1, 3, 64, 64))[1].shape == (1, 32)


@pytest.mark.slow
def test_embeddings_are_the_encoders_class_token(file, config, params, tmp_path):
  hu = scan((16, 64, 64))
  hu[:] = np.random.default_rng(0).integers(-400, 900, hu.shape)
  write(tmp_path / 'data' / 'a.nii.gz', hu)
  grey = picture(tmp_path / 'data' / 'b.png')
  got = made(tmp_path, file.parent, tmp_path / 'data')
  module = models.build(config.model)
  run = jax.jit(lambda x: module.apply({'params': params['backbone']}, x[None], decode=False).embedding[0])
  np.testing.assert_allclose(got['embedding'][0], run(np.float32(hu)[..., None] / 1024), rtol=0, atol=1e-5)
  view = evalset.centre_xray({'image': grey}, config)['xray'][0]
  np.testing.assert_allclose(got['embedding'][1], run(view), rtol=0, atol=1e-5)
