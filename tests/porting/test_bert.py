"""Import of a BERT: both layouts, fewer layers, and everything that must be refused by name; and back."""
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from unimiss_jax.models.bert import Bert
from unimiss_jax.optim import named_leaves
from unimiss_jax.porting import PortingError, bert


@pytest.fixture
def folder(fixtures, tmp_path):
  return shutil.copytree(fixtures / 'unimedi' / 'bert_tiny', tmp_path / 'bert')


def tensors(folder):
  return safetensors.numpy.load_file(folder / 'model.safetensors')


def test_all_55_tensors_are_taken(folder):
  fields, params = bert.read(folder, pooler=True)
  assert fields['num_hidden_layers'] == 3 and len(named_leaves(params)) == 55 == len(tensors(folder))
  assert len(named_leaves(bert.read(folder)[1])) == 53      # without pooler


def test_the_layout_of_2019_is_the_same_network(fixtures, folder):
  pytest.importorskip('torch')
  old = named_leaves(bert.read(fixtures / 'unimedi' / 'bert_tiny_legacy', pooler=True)[1])
  for name, x in named_leaves(bert.read(folder, pooler=True)[1]).items():
    np.testing.assert_array_equal(old[name], x, err_msg=name)


def test_fewer_layers_than_the_file(fixtures, folder):
  reference = np.load(fixtures / 'unimedi' / 'bert_tiny' / 'reference.npz')
  fields, params = bert.read(folder, num_layers=2)
  out = Bert(**fields).apply({'params': params}, *(reference[k] for k in (
      'input_ids', 'attention_mask', 'token_type_ids')))
  np.testing.assert_allclose(out.last, reference['hidden_2'], rtol=0, atol=1e-5)
  with pytest.raises(PortingError, match='has 3 layers, 4 are wanted'):
    bert.read(folder, num_layers=4)


@pytest.mark.parametrize('name', ['encoder.layer.2.output.dense.weight', 'embeddings.token_type_embeddings.weight'])
def test_a_tensor_that_is_missing_surplus_or_of_another_shape_is_named(folder, name):
  whole = tensors(folder)

  def refused(changed, what):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in changed.items()}, folder / 'model.safetensors')
    with pytest.raises(PortingError, match=what):
      bert.read(folder)
  refused({k: v for k, v in whole.items() if k != name}, f'1 missing: {name}')
  refused(whole | {name + '2': whole[name]}, f'1 unexpected: {name}2')
  refused(whole | {name: whole[name][:, :-1]}, rf'1 mis-shaped: {name} \(\d+, \d+\), expected')


@pytest.mark.parametrize('change, what', [
    ({'model_type': 'roberta'}, 'model_type is "roberta", expected "bert"'),
    ({'hidden_act': 'gelu_new'}, 'hidden_act is "gelu_new", expected "gelu"'),
    ({'vocab_size': 157}, '156 word pieces, the table of words has 157 rows'),
    ({'hidden_size': None}, 'expected')])
def test_what_is_no_such_bert_is_refused(folder, change, what):
  path = folder / 'config.json'
  about = json.loads(path.read_text()) | change
  path.write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
  with pytest.raises(PortingError, match=what if change != {'hidden_size': None} else 'not the config of a BERT'):
    bert.read(folder)


def test_folders_without_weights_vocabulary_or_config(folder):
  for name, what in (('model.safetensors', 'no model.safetensors and no pytorch_model.bin'), ('vocab.txt', 'vocab.txt'),
                     ('config.json', 'config.json')):
    (folder / name).unlink()
    with pytest.raises(PortingError, match=what):
      bert.read(folder)


def test_what_is_written_is_what_was_read(folder, tmp_path):
  fields, params = bert.read(folder, pooler=True)
  bert.write(tmp_path / 'out', params, fields, (folder / 'vocab.txt').read_text().split())
  for name, x in tensors(tmp_path / 'out').items():
    np.testing.assert_array_equal(x, tensors(folder)[name], err_msg=name)
  again = bert.read(tmp_path / 'out', pooler=True)
  assert again[0] == fields
  jax.tree.map(np.testing.assert_array_equal, again[1], params)
