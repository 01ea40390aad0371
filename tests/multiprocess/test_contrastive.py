"""Contrastive losses and a step of UniMedI over two processes: the numbers of one process, gradients included."""
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.e2e import tiny
from tests.multiprocess.cluster import Cluster, drawn
from tests.multiprocess.losses import OPTIONS
from unimiss_jax.cli.launch_local import free_port

pytestmark = pytest.mark.slow
NAMES = {'siglip': ('dimg', 'dtxt', 'dtprime', 'db')}      # of the gradients, else those of InfoNCE


def test_losses_and_gradients_over_two_processes_equal_the_torch_reference(fixtures, tmp_path):
  """Four devices in two processes, float64: plain jit, gathered and ring; negatives are those of both processes."""
  reference, out = fixtures / 'unimedi' / 'contrastive.npz', tmp_path / 'found.npz'
  env = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(ROOT),
             XLA_FLAGS='--xla_force_host_platform_device_count=2')
  address = f'127.0.0.1:{free_port()}'
  started = [subprocess.Popen([sys.executable, '-m', 'tests.multiprocess.losses', address, '2', str(i), str(reference),
                               str(out)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) for i in range(2)]
  try:
    said = [p.communicate(timeout=300)[0] for p in started]
  finally:
    for p in started:
      p.kill()
  assert [p.returncode for p in started] == [0, 0], said
  found, want = np.load(out), np.load(reference)
  assert found['processes'] == 2 and found['devices'] == 4
  compared = 0
  for form in ('jit', 'gathered', 'ring'):
    for case in OPTIONS:
      mine = f'{form} {case}'
      np.testing.assert_allclose(found[f'{mine}/loss'], want[f'{case}_loss'], rtol=1e-10, err_msg=mine)
      for i, name in enumerate(NAMES.get(case, ('dimg', 'dtxt', 'dlogscale'))):
        if f'{case}_{name}' in want:
          np.testing.assert_allclose(found[f'{mine}/{i}'], want[f'{case}_{name}'], rtol=0, atol=1e-12,
                                     err_msg=f'{mine} {name}')
          compared += 1
  assert compared >= 3 * (2 * len(OPTIONS) + 3)      # both sides of each case, and the scalars of two


def test_a_run_of_studies_in_two_processes_is_that_of_one(tmp_path):
  """Five steps of the full loss in float64: same rows, losses, gradient norms."""
  flags = [f'--config.{k}={v}' for k, v in {
      'model.embed_dims': '(8,)', 'model.num_heads': '(2,)', 'model.depths': '(1,)', 'model.dtype': 'float64',
      'head.out_dim': 8, 'head.hidden_dim': 8, 'head.bottleneck_dim': 4, 'batch.ct': 8, 'batch.xray': 8, 'steps': 5,
      'data.phantom_records': 40, 'unimedi.icl': 1., 'unimedi.pcl': 1., 'unimedi.text.num_layers': 1,
      'unimedi.text.width': 8, 'unimedi.text.heads': 2, 'unimedi.text.mlp': 8, 'eval.tasks': '()', 'log.every': 1,
      'checkpoint.every': 100}.items()]
  for name, processes, devices in (('one', 1, 1), ('two', 2, 2)):
    run = Cluster(tmp_path / name, *flags, config='configs/unimedi.py', processes=processes, devices=devices, x64=True)
    assert run.wait(400) == [0] * processes, run.said()
  assert drawn(tmp_path / 'one') == drawn(tmp_path / 'two')
  want, got = tiny.metrics(tmp_path / 'one'), tiny.metrics(tmp_path / 'two')
  assert got.keys() == want.keys() and len(want) >= 5
  for key, row in want.items():
    for name in (n for n in row if n.startswith('train/')):
      np.testing.assert_allclose(got[key][name], row[name], rtol=1e-9, atol=1e-12, err_msg=f'{key} {name}')
