"""Mesh, rules and placement on 8 virtual devices."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import unimiss_plus
from unimiss_jax import optim, sharding, step
from unimiss_jax.methods import base
from unimiss_jax.state import own


def test_minus_one_fills():
  assert dict(sharding.make_mesh(-1, 1).shape) == {'data': 8, 'fsdp': 1}
  assert dict(sharding.make_mesh(2, -1).shape) == {'data': 2, 'fsdp': 4}
  assert dict(sharding.make_mesh(-1, 1, jax.devices()[:1]).shape) == {'data': 1, 'fsdp': 1}


@pytest.mark.parametrize('data,fsdp', [(3, 1), (-1, 3), (-1, -1), (0, 8), (16, 1), (-2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
  with pytest.raises(ValueError, match=r'does not fit 8 devices'):
    sharding.make_mesh(data, fsdp)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the order of a mesh asks of a device."""
  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'cpu'
  device_kind: str = 'cpu'
  coords: tuple = ()
  core_on_chip: int = 0


def test_each_slice_is_a_block_of_the_data_axis():
  """Four slices of four devices that the runtime lists in turn: fsdp never leaves a slice."""
  chips = [Chip(i, i % 4) for i in range(16)]
  assert sharding.count_slices(chips) == 4 and sharding.count_slices(jax.devices()) == 1
  for data, fsdp in ((16, 1), (8, 2), (4, 4)):
    slices = np.vectorize(lambda c: c.slice_index, otypes=[int])(sharding.over_slices(data, fsdp, 4, chips))
    assert slices.shape == (data, fsdp)
    np.testing.assert_array_equal(slices, np.repeat(np.arange(4), 4).reshape(data, fsdp))


def test_tensors_split_over_slices_are_warned_of(caplog):
  """Chips of TPUs, whose places repeat from slice to slice."""
  chips = [Chip(i, i // 8, platform='tpu', device_kind='TPU v5 lite', coords=(i % 4, i % 8 // 4, 0)) for i in range(16)]
  grid = sharding.over_slices(1, 16, 2, chips)
  assert [c.id for c in grid.ravel()] == list(range(16)) and grid.shape == (1, 16)
  assert 'FIX: make mesh.data a multiple of 2' in caplog.text


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


@pytest.fixture(scope='module')
def full():
  """The state of the full-size model, as shapes."""
  config = unimiss_plus.get_config('plain')
  method = base.make(config, {'ct': (96, {}), 'xray': (96, {})})
  optimiser = optim.adamw(method.groups)
  return jax.eval_shape(step.make_init(config, method, optimiser), jax.random.key(0), {})


@pytest.mark.parametrize('data, fsdp', [(8, 1), (1, 8), (2, 4)])
def test_every_tensor_of_the_full_model_has_its_place(full, data, fsdp):
  """63.3 M parameters, their moments and the teacher: over 8 devices each holds an eighth and little more."""
  mesh = sharding.make_mesh(data, fsdp)
  placed = sharding.shardings(full, mesh)
  template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), full, placed)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(full))
  assert whole > 4 * 4 * 63e6
  assert sharding.bytes_per_device(template) <= {1: 1., 4: 1.2 / 4, 8: 1.2 / 8}[fsdp] * whole
  for name, x in optim.named_leaves(template).items():
    split = [n // m for n, m in zip(x.shape, x.sharding.shard_shape(x.shape))]
    assert sorted(split)[:-1] == [1] * (len(split) - 1) and (not split or max(split) in (1, fsdp)), name
  wide = optim.named_leaves(template)['params/head/last_layer/weight_v']
  assert wide.sharding.shard_shape(wide.shape) == (65536 // fsdp, 256)
  for part in ('extra/teacher', 'opt_state/groups/last_layer/mu'):      # what ends alike lies alike
    like = next(x for n, x in optim.named_leaves(template).items() if n.startswith(part) and 'weight_v' in n)
    assert like.sharding == wide.sharding


def test_a_state_is_born_in_its_place(monkeypatch):
  """Real arrays on (1, 8): no device ever holds more than its part."""
  monkeypatch.setattr(sharding, 'SMALL', 64)
  mesh = sharding.make_mesh(1, 8)
  make = lambda key: {'kernel': jax.random.normal(key, (64, 24)), 'bias': jnp.zeros(24)}
  placed = sharding.shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
  state = jax.jit(make, out_shardings=placed)(jax.random.key(0))
  assert [s.data.shape for s in state['kernel'].addressable_shards] == [(8, 24)] * 8
  assert sharding.bytes_per_device(state) == 4 * (8 * 24 + 24)
  np.testing.assert_array_equal(state['kernel'], jax.jit(make)(jax.random.key(0))['kernel'])
