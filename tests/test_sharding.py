"""Mesh, rules and placement on 8 virtual devices."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from unimiss_jax import sharding
from unimiss_jax.state import own


def test_minus_one_fills():
  assert dict(sharding.make_mesh(-1, 1).shape) == {'data': 8, 'fsdp': 1}
  assert dict(sharding.make_mesh(2, -1).shape) == {'data': 2, 'fsdp': 4}
  assert dict(sharding.make_mesh(-1, 1, jax.devices()[:1]).shape) == {'data': 1, 'fsdp': 1}


@pytest.mark.parametrize('data,fsdp', [(3, 1), (-1, 3), (-1, -1), (0, 8), (16, 1), (-2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
  with pytest.raises(ValueError, match=r'does not fit 8 devices'):
    sharding.make_mesh(data, fsdp)


def test_large_tensors_are_split_small_ones_not():
  mesh = sharding.make_mesh(2, 4)
  tree = {'kernel': jnp.zeros((130, 1024)), 'bias': jnp.zeros(2 ** 17), 'x': {'kernel': jnp.zeros((8, 8))}}
  got = sharding.shardings(tree, mesh)
  assert got['kernel'].spec == P(None, 'fsdp')
  assert got['bias'].spec == P() and got['x']['kernel'].spec == P()


def test_a_leaf_without_rule_is_named():
  with pytest.raises(ValueError, match='no sharding rule matches new_head/queue'):
    sharding.shardings({'new_head': {'queue': jnp.zeros(3)}}, sharding.make_mesh(-1, 1))


def test_rows_go_to_devices_in_order():
  batch = {'x': np.arange(16).reshape(16, 1)}
  got = sharding.to_devices(batch, sharding.make_mesh(4, 2))['x']
  np.testing.assert_array_equal(got, batch['x'])
  assert len(got.addressable_shards) == 8 and got.addressable_shards[0].data.shape == (2, 1)


def test_own_breaks_aliases():
  x = jnp.ones(3)
  state = own({'student': x, 'teacher': x})
  assert state['student'].unsafe_buffer_pointer() != state['teacher'].unsafe_buffer_pointer()
