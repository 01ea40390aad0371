"""Evaluation samples: phantoms with both modalities of one patient, and a user's labelled manifest."""
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from data_pipelines import evalset, phantom
from data_pipelines.errors import DataError
from tests.e2e import tiny
from unimiss_jax.evals import online


@pytest.fixture(scope='module')
def built():
  return evalset.build(tiny.config(**{'eval.records': 4, 'eval.fit': 2}))


def test_phantoms_come_from_the_development_range_with_their_labels(built):
  assert {k: v.shape for k, v in built.views.items()} == {
      'ct': (4, 1, 16, 64, 64, 1), 'drr': (4, 1, 64, 64, 3), 'xray': (4, 1, 64, 64, 3)}
  assert built.paired and built.fit['ct'].tolist() == [True, True, False, False]
  for i in range(4):
    made = phantom.make(0, phantom.INDICES['development'][i])
    assert {k: v[i] for k, v in built.labels['ct'].items()} == made.labels
    lungs = built.views['ct'][i, 0, ..., 0]
    assert lungs.min() >= -1.001 and built.views['drr'][i].min() >= 0 and built.views['drr'][i].max() <= 1


def test_views_are_plain(built):
  again = evalset.build(tiny.config(**{'eval.records': 4, 'eval.fit': 2}))
  for name, x in built.views.items():
    np.testing.assert_array_equal(x, again.views[name])


def write_manifest(folder, splits=('train', 'test', 'train', 'test')):
  rng, rows = np.random.default_rng(0), []
  for i, split in enumerate(splits):
    if i % 4 < 2:
      hu = np.full((40, 40, 26), -1000, np.int16)
      hu[8:32, 8:32] = rng.integers(-100, 100, (24, 24, 26))
      nib.save(nib.Nifti1Image(hu, np.diag([3., 3., 3., 1.])), folder / f'{i}.nii.gz')
      rows.append({'path': f'{i}.nii.gz', 'kind': 'volume', 'label': {'tumour': i % 2}, 'split': split})
    else:
      Image.fromarray(rng.integers(0, 255, (90, 80), np.uint8)).save(folder / f'{i}.png')
      rows.append({'path': f'{i}.png', 'kind': 'image', 'label': i % 2, 'split': split})
  file = folder / 'manifest.jsonl'
  file.write_text('\n'.join(map(json.dumps, rows)))
  return file


def test_a_labelled_manifest(tmp_path):
  got = evalset.build(tiny.config(**{'eval.knn': str(write_manifest(tmp_path))}))
  assert got.views['ct'].shape == (2, 1, 16, 64, 64, 1) and got.views['xray'].shape == (2, 1, 64, 64, 3)
  assert got.labels['ct'] == {'tumour': pytest.approx([0, 1])}
  assert set(got.labels['xray']) == {'class_0', 'class_1'}
  assert got.fit['ct'].tolist() == [True, False] and not got.paired


def test_other_modalities(tmp_path):
  """Phantoms are no MR: only their X-rays are scored, or nothing; volumes of a manifest are, by their sequences."""
  small = {'data.modality': 'mr', 'eval.records': 4, 'eval.fit': 2}
  got = evalset.build(tiny.config(**small))
  assert got.views.keys() == got.labels.keys() == got.fit.keys() == {'xray'} and not got.paired
  assert evalset.build(tiny.config(**small, **{'phases.xray': 0})) is None
  rng, rows = np.random.default_rng(0), []
  for i in range(4):
    for name in 'ab':
      values = rng.gamma(2., 100., (40, 40, 26))
      nib.save(nib.Nifti1Image(values, np.diag([3., 3., 3., 1.])), tmp_path / f'{i}{name}.nii')
    rows.append({'path': f'{i}a.nii', 'paths': [f'{i}a.nii', f'{i}b.nii'], 'kind': 'volume', 'label': {'tumour': i % 2},
                 'split': ('train', 'test')[i // 2]})
  (tmp_path / 'manifest.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  got = evalset.build(tiny.config(**small, **{'eval.knn': str(tmp_path)}))
  assert got.views.keys() == {'ct'} and got.views['ct'].shape == (4, 1, 16, 64, 64, 2)
  assert abs(got.views['ct'].mean()) < .05 and got.views['ct'].max() > 2      # z-scores of skewed values
  assert 0 <= online.control(got, ('knn', 'retrieval'), 'pa')['eval/raw_knn_auc_ct'] <= 1


def test_a_manifest_without_test_rows_is_refused(tmp_path):
  file = write_manifest(tmp_path, ('train',) * 4)
  with pytest.raises(DataError, match='SPLIT_EMPTY .*volumes: 2 of 2 rows are split "train"'):
    evalset.build(tiny.config(**{'eval.knn': str(file)}))
