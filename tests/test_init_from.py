"""A new run from the weights of another one: all, some, none of them."""
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from unimiss_jax import checkpoint, init_from
from unimiss_jax.checkpoint import CheckpointError


@pytest.fixture
def run(tmp_path):
  c = checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints', keep=1)
  params = {'backbone': {'a': {'kernel': jnp.ones((4, 4))}, 'old': {'bias': jnp.ones(2)}},
            'head': {'last': {'kernel': jnp.ones((4, 8))}}}
  c.save(7, {'params': params, 'step': jnp.int32(7)}, {})
  c.close()
  return tmp_path / 'run'


def config(path, **model):
  return ConfigDict(dict(init_from=str(path), init_branch='', init_allow='', pos_resize='grid',
                         init_parts=('encoder', 'decoder', 'head'), model=dict(name='mit_plus', **model)))


def shapes(**named):
  """backbone_a=(4, 4) -> {'backbone': {'a': {'kernel': ShapeDtypeStruct}}}."""
  out = {}
  for name, shape in named.items():
    part, layer = name.split('_')
    out.setdefault(part, {})[layer] = {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
  return out


def test_what_matches_is_loaded_and_the_rest_is_listed(run, caplog):
  with caplog.at_level(logging.INFO):
    given = init_from.read(config(run), shapes(backbone_a=(4, 4), backbone_new=(3,), head_last=(4, 16)))
  assert list(given) == ['backbone/a/kernel']
  assert 'loaded 1/3 tensors; fresh: backbone/new/kernel, head/last/kernel; not used: backbone/old/bias' in caplog.text
  assert 'other shapes, left fresh: head/last/kernel (4, 8) -> (4, 16)' in caplog.text
  merged = init_from.merge({'backbone': {'a': {'kernel': jnp.zeros((4, 4), jnp.bfloat16)}, 'new': jnp.zeros(3)}}, given)
  np.testing.assert_array_equal(merged['backbone']['a']['kernel'], 1.)
  np.testing.assert_array_equal(merged['backbone']['new'], 0.)


def test_a_backbone_of_another_shape_is_an_error(run):
  with pytest.raises(CheckpointError, match=r'1 tensors of the backbone have another shape: backbone/a/kernel '
                                            r'\(4, 4\) -> \(4, 5\). FIX: use the model leaves'):
    init_from.read(config(run), shapes(backbone_a=(4, 5)))


def test_nothing_there_and_nothing_in_common(run, tmp_path):
  with pytest.raises(CheckpointError, match='typo: no such file'):
    init_from.read(config(tmp_path / 'typo'), shapes(backbone_a=(4, 4)))
  with pytest.raises(CheckpointError, match=r'none of its 3 tensors \(encoder, decoder, head\) belongs to this model'):
    init_from.read(config(run), shapes(backbone_b=(4, 4)))


def test_an_empty_folder_and_a_file_that_is_no_weights(tmp_path):
  with pytest.raises(CheckpointError, match='no checkpoint and no model.safetensors there. FIX: name the'):
    init_from.read(config(tmp_path), shapes(backbone_a=(4, 4)))
  (tmp_path / 'w.pth').write_text('no weights')
  with pytest.raises(CheckpointError, match='init_from: .*w.pth: neither a file of torch.save nor safetensors'):
    init_from.read(config(tmp_path / 'w.pth'), shapes(backbone_a=(4, 4)))


def test_other_numbers_of_heads_are_told(run, caplog):
  """They change no shape."""
  heads = dict(num_heads=(1, 2, 4, 8), decoder_heads=(4, 2, 1))
  (run / 'config.json').write_text(json.dumps({'model': dict(name='mit_plus', **heads)}))
  init_from.read(config(run, **heads), shapes(backbone_a=(4, 4)))
  assert 'num_heads' not in caplog.text
  init_from.read(config(run, **heads | dict(num_heads=(1, 2, 2, 2))), shapes(backbone_a=(4, 4)))
  assert 'was trained with model.num_heads=(1, 2, 4, 8), this run has (1, 2, 2, 2)' in caplog.text


def test_only_the_parts_that_are_asked_for_are_taken(run):
  c = config(run)
  c.init_parts = ('head',)
  assert list(init_from.read(c, shapes(backbone_a=(4, 4), head_last=(4, 8)))) == ['head/last/kernel']
  assert [init_from.part_of(n) for n in ('backbone/transformer/x', 'backbone/DecEmbed2D1/x', 'head/x', 'task/x')] == [
      'encoder', 'decoder', 'head', 'head']
