"""MR with two sequences, from a folder to a trained model: two steps of everything that needs no HU."""
import nibabel as nib
import numpy as np
import pytest

from tests.e2e import tiny
from unimiss_jax import checkpoint, train
from unimiss_jax.validate import ConfigError

OFF = {f'loss.{k}': 0. for k in ('drr', 'recon_drr', 'pair_nce')}
MR = OFF | {'data.modality': 'mr', 'phases.xray': 0, 'steps': 2, 'log.images_every': 1}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """8 heads of two sequences: zeros around, a unit of its own for each file."""
  where, rng = tmp_path_factory.mktemp('mr'), np.random.default_rng(0)
  for i in range(8):
    for name, unit in (('T1w', 3), ('FLAIR', 400)):
      head = rng.integers(1, 100, (20, 20, 24)) * unit
      head[:3] = 0
      nib.save(nib.Nifti1Image(head.astype(np.float32), np.diag([2., 2., 3., 1.])), where / f'sub-{i}_{name}.nii.gz')
  return where


@pytest.mark.slow
def test_two_sequences_are_trained_on(folder, tmp_path, capsys):
  config = tiny.config(**MR, **{'data.ct': str(folder), 'data.sequences': '_T1w,_FLAIR', 'model.in_channels': (3, 2)})
  assert train.train_and_evaluate(config, str(tmp_path)) == 0
  rows = tiny.metrics(tmp_path)
  assert list(rows) == [(0, 'ct'), (1, 'ct')]      # phantoms are no MR: there are no scores
  assert 'no scores: phantoms are CT and X-ray, this run is data.modality=mr' in capsys.readouterr().err
  for row in rows.values():
    for name in ('dino_loss', 'slice_loss', 'recon_ct_loss', 'nce_loss', 'grad_norm_3d'):
      assert np.isfinite(row[f'train/{name}']) and row['train/skipped'] == 0, name
    assert not [k for k in row if 'drr' in k or 'pair' in k]
  assert (tmp_path / 'report' / 'ct_0000002.png').exists()
  params = checkpoint.read_params(tmp_path / 'checkpoints' / '2')
  first, last = (next(x for n, x in params.items() if all(p in n for p in parts)) for parts in (
      ('backbone', 'ConvBlock3D0_0', 'kernel'), ('backbone', 'recon_conv3D', 'kernel')))
  assert first.shape[-2] == 2 and last.shape[-1] == 2


def test_the_model_must_have_a_channel_for_every_sequence(folder, tmp_path):
  """Said before anything is compiled; of a prepared set only its records tell."""
  config = tiny.config(**MR, **{'data.ct': f'{folder}/*_T1w.nii.gz', 'model.in_channels': (3, 2)})
  with pytest.raises(ConfigError, match=r'model.in_channels=\(3, 2\): the volumes of data.ct have 1 sequence; use '
                                        r'model.in_channels=\(3, 1\)'):
    train.train_and_evaluate(config, str(tmp_path))
