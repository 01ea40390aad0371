"""Other ways to alternate than step by step: X-rays alone by epochs, both in one step; evaluation on a save."""
import numpy as np
import pytest

from tests.e2e import tiny
from unimiss_jax import train
from unimiss_jax.writers import Writer

NCE_ONLY = {f'loss.{k}': 0. for k in ('ct', 'drr', 'slice', 'xray', 'recon_ct', 'recon_drr', 'recon_xray')}


@pytest.mark.slow
def test_xrays_alone(tmp_path, monkeypatch):
  """Lengths follow the X-ray stream; a run cut right after an evaluation at a save keeps that evaluation."""
  c = tiny.config(**NCE_ONLY, **{'phases.unit': 'epoch', 'phases.ct': 0, 'steps': 0, 'epochs': 2, 'batch.ct': 1,
                                 'eval.every': 2, 'checkpoint.every': 2, 'log.every': 10})
  write = Writer.write_scalars

  def dying(self, step, scalars, phase=''):
    if (step, phase) == (3, 'xray'):
      raise OSError('the disk is full')
    write(self, step, scalars, phase)
  monkeypatch.setattr(Writer, 'write_scalars', dying)
  with pytest.raises(OSError, match='the disk is full'):
    train.train_and_evaluate(c, str(tmp_path))
  monkeypatch.undo()
  assert train.train_and_evaluate(c, str(tmp_path)) == 0
  rows = tiny.metrics(tmp_path)
  assert list(rows) == [(0, 'eval'), (0, 'xray'), (2, 'eval'), (3, 'xray'), (4, 'eval')]
  assert rows[0, 'xray'].keys() >= {'train/nce_loss', 'train/grad_norm_rest'}
  assert rows[0, 'eval'].keys() >= {'eval/knn_auc_ct', 'eval/knn_auc_xray'}


@pytest.mark.slow
def test_both_in_one_step(tmp_path):
  c = tiny.config(**NCE_ONLY, **{'phases.unit': 'joint', 'steps': 1, 'eval.tasks': ()})
  assert train.train_and_evaluate(c, str(tmp_path)) == 0
  row = tiny.metrics(tmp_path)[0, 'joint']
  parts = [row[f'train/{k}'] for k in ('nce_loss', 'pair_nce_loss', 'xray_nce_loss')]
  np.testing.assert_allclose(row['train/loss'], sum(parts), rtol=1e-5)
  assert row['train/grad_norm_3d'] > 0 and row['collapse/xray_rankme'] > 1
