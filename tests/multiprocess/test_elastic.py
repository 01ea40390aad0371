"""The same run on other meshes and other numbers of processes, and one run moved from each to the next; float64."""
import signal

import numpy as np
import pytest

from tests.e2e import tiny
from tests.multiprocess.cluster import CONFIG, Cluster, drawn

pytestmark = pytest.mark.slow
FLOAT64 = dict(config=f'{CONFIG}:float64', x64=True)


def meshed(data, fsdp):
  return f'--config.mesh.data={data}', f'--config.mesh.fsdp={fsdp}'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('elastic')


@pytest.fixture(scope='module')
def one_device(folder):
  """5 steps of each phase on one device."""
  run = Cluster(folder / 'one', devices=1, **FLOAT64)
  assert run.wait(900) == [0], run.said()
  return folder / 'one'


def same(workdir, one_device):
  """Samples and random numbers exactly, losses, gradient norms and the centre to 1e-9."""
  assert drawn(workdir) == drawn(one_device)
  want, got = tiny.metrics(one_device), tiny.metrics(workdir)
  assert got.keys() == want.keys()
  for key, row in want.items():
    for name, value in row.items():
      if name.startswith('train/') or name == 'collapse/center_norm':
        np.testing.assert_allclose(got[key][name], value, rtol=1e-9, atol=1e-12, err_msg=f'{key} {name}')


@pytest.mark.parametrize('processes, devices, data, fsdp', [(1, 8, 8, 1), (1, 8, 1, 8), (1, 8, 2, 4), (2, 4, 2, 4)])
def test_meshes_and_processes_change_nothing(one_device, folder, processes, devices, data, fsdp):
  workdir = folder / f'{processes}x{devices}_{data}_{fsdp}'
  run = Cluster(workdir, *meshed(data, fsdp), processes=processes, devices=devices, **FLOAT64)
  assert run.wait(1200) == [0] * processes, run.said()
  same(workdir, one_device)


def test_a_run_that_moves_house_four_times(one_device, folder):
  """8 devices -> 2 processes of 2 (4 devices) -> 4 of 1 -> 1 of 8, cut in another way, with a data worker."""
  workdir = folder / 'moving'
  lives = [(1, 8, meshed(8, 1)), (2, 2, meshed(2, 2)), (4, 1, meshed(1, 4)), (1, 8, meshed(2, 4))]
  for i, (processes, devices, mesh) in enumerate(lives):
    run = Cluster(workdir, *mesh, f'--config.data.workers={int(i == 2)}', processes=processes, devices=devices,
                  **FLOAT64)
    if i + 1 < len(lives):
      run.until_steps(1, 1200)
      run.kill(processes - 1, signal.SIGTERM)
    assert run.wait(1200) == [0] * processes, run.said()
    assert not i or 'resumed step' in run.said(0)
  same(workdir, one_device)
