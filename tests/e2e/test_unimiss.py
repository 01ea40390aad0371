"""The pilot UniMiSS from start to end on phantoms, and the same run stopped and continued; its weights for others."""
import os
import signal

import numpy as np
import pytest

from tests.e2e import tiny
from unimiss_jax import train
from unimiss_jax.writers import Writer


@pytest.mark.slow
def test_a_run_and_the_same_stopped_and_continued(tmp_path, monkeypatch):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert train.train_and_evaluate(tiny.pilot(), str(whole)) == 0
  want = tiny.metrics(whole)
  assert [k for k in want if k[1] != 'eval'] == [*((i, 'xray') for i in range(4)), *((i, 'ct') for i in range(4, 8))]
  for name in ('loss', 'dino_loss', 'slice_loss', 'slice_slice_loss', 'ct_slice_loss', 'grad_norm_3d'):
    assert np.isfinite(want[4, 'ct'][f'train/{name}']), name
  for name in ('knn_auc_ct', 'knn_auc_xray'):
    assert 0 <= want[8, 'eval'][f'eval/{name}'] <= 1

  write = Writer.write_scalars

  def stopping(self, step, scalars, phase=''):
    write(self, step, scalars, phase)
    if (step, phase) == (4, 'ct'):
      os.kill(os.getpid(), signal.SIGTERM)
  monkeypatch.setattr(Writer, 'write_scalars', stopping)
  assert train.train_and_evaluate(tiny.pilot(), str(parts), preempt_exit_code=7) == 7
  monkeypatch.undo()
  assert train.train_and_evaluate(tiny.pilot(), str(parts)) == 0
  assert tiny.metrics(parts) == want
