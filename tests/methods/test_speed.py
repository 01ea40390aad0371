"""Forms of the step that save work: equal to the plain ones in values and gradients."""
import contextlib
import functools

import jax
import numpy as np
import pytest

from tests.e2e import tiny
from tests.methods.test_unimiss_plus import rows
from unimiss_jax import models, optim
from unimiss_jax.methods import base
from unimiss_jax.optim import named_leaves

PLAIN = {'speed.shared_2d': False, 'speed.shared_head': False, 'model.fold': False}
TERMS = {'ct': 1., 'drr': .5, 'slice': .1, 'recon_ct': 5., 'recon_drr': 5., 'nce': 1., 'pair_nce': 1.}
SHALLOW = {'model.depths': (1, 1, 1, 1)}
PICTURES = {k: TERMS[k] * (k in ('drr', 'slice', 'recon_drr')) for k in TERMS}


@functools.cache
def start(dtype):
  """(params, extra) of the tiny network, all losses on."""
  method = base.make(tiny.config(**SHALLOW | {'model.dtype': dtype}), {'ct': (16, {}), 'xray': (16, {})})
  return jax.jit(method.init)(jax.random.key(0))


def gradients(overrides, dtype, terms=TERMS):
  """Metrics and gradients of a CT step, drop-path on."""
  wide = jax.enable_x64(True) if dtype == 'float64' else contextlib.nullcontext()
  config = tiny.config(**(SHALLOW | {f'loss.{k}': v for k, v in terms.items()} | {'model.dtype': dtype} | overrides))
  method = base.make(config, {'ct': (16, {}), 'xray': (16, {})})
  with wide:
    batch = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == np.float32 else a, rows(2, ct=True))
    f = jax.value_and_grad(method.phases['ct'].loss, has_aux=True)
    (_, aux), grads = jax.jit(f)(*start(dtype), batch, jax.random.key(1), 3)
    return jax.device_get(({k: v for k, v in aux.metrics.items() if k.startswith('train/')}, named_leaves(grads)))


@pytest.mark.slow
@pytest.mark.parametrize('dtype, tolerance, terms', [
    ('float64', 1e-9, PICTURES), ('float64', 1e-9, TERMS), ('float32', 1e-5, TERMS)])
def test_shared_passes_and_the_folded_reconstruction_equal_the_plain_step(dtype, tolerance, terms):
  (want, plain), (got, grads) = gradients(PLAIN, dtype, terms), gradients({}, dtype, terms)
  assert want.keys() == got.keys() and plain.keys() == grads.keys()
  assert 'train/slice_loss' in got and 'train/recon_drr_loss' in got
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=tolerance, err_msg=name)
  for name, grad in plain.items():
    np.testing.assert_allclose(grads[name], grad, rtol=0, atol=tolerance * max(1, abs(grad).max()), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['convs', 'blocks', 'all'])
def test_what_is_computed_again_is_the_same(remat):
  (want, plain), (got, grads) = gradients({}, 'float64'), gradients({'model.remat': remat}, 'float64')
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-9)
  for name, grad in plain.items():
    np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-9 * max(1, abs(grad).max()), err_msg=name)


def test_an_unknown_remat_is_refused():
  with pytest.raises(ValueError, match="model.remat='half' unknown: use one of '', 'convs', 'blocks', 'all'"):
    models.param_shapes(models.build(tiny.config(**{'model.remat': 'half'}).model))


@pytest.mark.parametrize('go', [True, False])
def test_a_step_gated_by_a_branch_is_one_gated_by_a_choice(go):
  old = {'w': np.arange(6, dtype=np.float32), 'count': np.int32(3)}
  move = lambda s: {'w': 2 * s['w'], 'count': s['count'] + 1}
  branch, choice = (jax.jit(lambda go, old, b=b: optim.gated(go, move, old, b))(go, old) for b in (True, False))
  jax.tree.map(np.testing.assert_array_equal, branch, choice)
  jax.tree.map(np.testing.assert_array_equal, branch, move(old) if go else old)
