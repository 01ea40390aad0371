"""The full-size model as we draw it beside one drawn by the released code: shapes and statistics of all 367 tensors."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import recipe
from unimiss_jax import models, porting
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.mit import MiTPlus


@pytest.fixture(scope='module')
def theirs(fixtures):
  return json.loads((fixtures / 'parity' / 'plus_init_stats_seed0.json').read_text())


@pytest.fixture(scope='module')
def ours():
  keys = jax.random.split(jax.random.key(0))
  return porting.to_torch({'backbone': jax.jit(lambda k: models.init_params(MiTPlus(), k))(keys[0]),
                           'head': jax.jit(DINOHead().init)(keys[1], jnp.zeros((1, 320)))['params']})


def test_statistics(ours, theirs):
  """Standard deviation of large tensors within 3 %, bounds of uniform ones, constants."""
  assert ours.keys() == theirs.keys() and sum(x.size for x in ours.values()) == 63_333_828
  checked = set()
  for name, (shape, mean, std, low, high) in theirs.items():
    x = ours[name]
    assert list(x.shape) == shape, name
    if low == high and x.size > 1:
      assert (x == low).all(), name
      checked.add('constant')
    elif x.size > 10_000:
      our_mean, our_std, _, our_low, our_high = recipe.summary(x)
      assert abs(our_std / std - 1) < 0.03 and abs(our_mean - mean) < 5 * std * (2 / x.size)**.5, (name, our_std, std)
      uniform = high < 1.8 * std                                    # a normal tensor of this size reaches 3.7 std
      assert (our_high < 1.8 * our_std) == uniform, name
      if uniform:
        np.testing.assert_allclose([our_low, our_high], [low, high], rtol=0.01)
      checked.add('uniform' if uniform else 'normal')
  assert checked == {'constant', 'normal', 'uniform'}
  assert 1.0 <= ours['backbone.recon_conv3D.weight'].std() <= 1.9
  assert abs(ours['backbone.recon_conv2D.weight']).max() <= 0.17678
