"""BERT against the outputs and gradients of PyTorch's, and what padding may not do."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax.models.bert import Bert
from unimiss_jax.optim import named_leaves
from unimiss_jax.porting import bert as porting


@pytest.fixture(scope='module')
def reference(fixtures):
  return dict(np.load(fixtures / 'unimedi' / 'bert_tiny' / 'reference.npz'))


@pytest.fixture(scope='module')
def tiny(fixtures):
  return porting.read(fixtures / 'unimedi' / 'bert_tiny', pooler=True)


def run(tiny, ids, mask, types=None, dtype=jnp.float32, **fields):
  model = Bert(**tiny[0] | fields, dtype=dtype)
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tiny[1])
  out, kept = model.apply({'params': params}, ids, mask, types, mutable=['intermediates'])
  n = model.num_hidden_layers
  return out, [kept['intermediates'][f'layer_{i}']['attention'][0] for i in range(n)]


@pytest.mark.parametrize('dtype, tolerance', [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_every_state_and_attention_map_equals_that_of_pytorch(reference, tiny, dtype, tolerance):
  with jax.enable_x64(dtype == np.float64):
    out, maps = run(tiny, reference['input_ids'], reference['attention_mask'], reference['token_type_ids'], dtype)
    np.testing.assert_allclose(out.last, reference['last_hidden_state'], rtol=0, atol=tolerance)
    np.testing.assert_allclose(out.last[:, 0], reference['cls'], rtol=0, atol=tolerance)
    np.testing.assert_allclose(out.pooled, reference['pooler_output'], rtol=0, atol=tolerance)
    assert len(out.hidden) == 4 and len(maps) == 3
    for i, x in enumerate(out.hidden):
      np.testing.assert_allclose(x, reference[f'hidden_{i}'], rtol=0, atol=tolerance)
    for i, x in enumerate(maps):
      np.testing.assert_allclose(x, reference[f'attn_{i}'], rtol=0, atol=tolerance)


def test_loss_and_gradients_equal_those_of_pytorch(reference, tiny):
  model, mask = Bert(**tiny[0]), reference['attention_mask']

  def loss(params):
    out = model.apply({'params': params}, reference['input_ids'], mask, reference['token_type_ids'])
    return (out.last * reference['loss_weight'].astype(np.float32) * mask[..., None]).sum() / mask.sum()
  value, grads = jax.value_and_grad(loss)(tiny[1])
  np.testing.assert_allclose(value, reference['loss'][0], rtol=1e-5)
  found = {porting.torch_name(n): np.asarray(x).T if n.endswith('kernel') else np.asarray(x)
           for n, x in named_leaves(grads).items()}
  names = [k[5:] for k in reference if k.startswith('grad.')]
  assert len(names) == 13
  for name in names:
    np.testing.assert_allclose(found[name], reference[f'grad.{name}'], rtol=0, atol=1e-5, err_msg=name)
  np.testing.assert_array_equal(found['embeddings.word_embeddings.weight'][0], 0)      # [PAD]


def test_padding_changes_nothing(reference, tiny):
  ids, mask = reference['input_ids'], reference['attention_mask']
  there = mask > 0
  plain = np.asarray(run(tiny, ids, mask)[0].last)
  other = np.where(there, ids, np.random.default_rng(0).integers(0, 156, ids.shape))
  np.testing.assert_array_equal(np.asarray(run(tiny, other, mask)[0].last)[there], plain[there])
  wide = np.asarray(run(tiny, np.pad(ids, ((0, 0), (0, 16))), np.pad(mask, ((0, 0), (0, 16))))[0].last)
  np.testing.assert_allclose(wide[:, :24][there], plain[there], rtol=0, atol=1e-6)


def test_longer_texts_than_positions_are_refused(tiny):
  with pytest.raises(ValueError, match='41 word pieces.*40'):
    jax.eval_shape(lambda: Bert(**tiny[0]).apply({'params': tiny[1]}, np.zeros((1, 41), np.int32)))
