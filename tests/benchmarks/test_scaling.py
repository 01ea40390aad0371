"""Collectives are counted as they are: of programs whose traffic is known."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks import scaling
from unimiss_jax import sharding


@pytest.mark.parametrize('axes, size', [('data', 2), ('fsdp', 4), (('data', 'fsdp'), 8)])
def test_what_a_device_sends(axes, size):
  mesh = sharding.make_mesh(2, 4)
  x = jax.ShapeDtypeStruct((8, 1024), np.float32)
  run = lambda f, out: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(('data', 'fsdp')), out_specs=out,
                                             check_vma=False)).lower(x).compile().as_text()
  mib = 4096 / 2 ** 20
  summed = scaling.collectives(run(lambda a: jax.lax.psum(a, axes), P(None)), 8)
  assert summed == {'all-reduce': {'calls': 1, 'mib': mib, 'sent_mib': pytest.approx(2 * mib * (size - 1) / size)}}
  gathered = scaling.collectives(run(lambda a: jax.lax.all_gather(a, axes), P(None)), 8)
  assert gathered['all-gather']['sent_mib'] == pytest.approx(mib * (size - 1))


def test_a_program_of_one_device_has_none():
  assert scaling.collectives(jax.jit(jnp.sum).lower(jnp.ones(8)).compile().as_text(), 1) == {}
