"""Clustering over two processes: the numbers of one, gradients, banks, queues and assignments included."""
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.e2e import tiny
from tests.multiprocess.cluster import Cluster, drawn
from unimiss_jax.cli.launch_local import free_port

pytestmark = pytest.mark.slow


def test_losses_and_clusters_over_two_processes_equal_the_reference(fixtures, tmp_path):
  """Four devices in two processes, float64."""
  out = tmp_path / 'found.npz'
  env = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(ROOT),
             XLA_FLAGS='--xla_force_host_platform_device_count=2')
  address = f'127.0.0.1:{free_port()}'
  started = [subprocess.Popen([sys.executable, '-m', 'tests.multiprocess.clusters', address, '2', str(i), str(fixtures),
                               str(out)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) for i in range(2)]
  try:
    said = [p.communicate(timeout=300)[0] for p in started]
  finally:
    for p in started:
      p.kill()
  assert [p.returncode for p in started] == [0, 0], said
  found = np.load(out)
  z = {n: np.load(fixtures / 'joint' / f'{n}.npz') for n in ('sinkhorn', 'swapped_loss', 'dc2_loss', 'kmeans')}
  assert found['processes'] == 2 and found['devices'] == 4
  for name, want in {
      'sinkhorn': z['sinkhorn']['codes_queue_it3'], 'loss': z['swapped_loss']['loss'],
      'codes': z['swapped_loss']['codes'], 'dlogits': z['swapped_loss']['dlogits'], 'dc2': z['dc2_loss']['loss'],
      'dz': z['dc2_loss']['dz'], 'centroids': z['kmeans']['centroids']}.items():
    np.testing.assert_allclose(found[name].reshape(want.shape), want, rtol=0, atol=1e-9, err_msg=name)
  np.testing.assert_array_equal(found['clusters'][:400], z['kmeans']['local_assign'])


@pytest.mark.parametrize('objective', ['swav', 'deepcluster'])
def test_a_run_in_two_processes_is_that_of_one(objective, tmp_path):
  """Twelve steps over all three phases in float64: same rows, losses, gradient norms."""
  for name, processes, devices in (('one', 1, 1), ('two', 2, 2)):
    run = Cluster(tmp_path / name, config=f'tests/multiprocess/light_joint.py:{objective}', processes=processes,
                  devices=devices, x64=True)
    assert run.wait(900) == [0] * processes, run.said()
  assert drawn(tmp_path / 'one') == drawn(tmp_path / 'two')
  want, got = tiny.metrics(tmp_path / 'one'), tiny.metrics(tmp_path / 'two')
  assert got.keys() == want.keys() and [phase for _, phase in want] == ['intra'] * 6 + ['mask'] * 3 + ['inter'] * 3
  for key, row in want.items():
    for name in (n for n in row if n.startswith('train/')):
      np.testing.assert_allclose(got[key][name], row[name], rtol=1e-9, atol=1e-12, err_msg=f'{key} {name}')
