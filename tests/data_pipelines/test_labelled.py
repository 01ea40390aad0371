"""Labelled rows: masks on the grid of their images whatever their order, and one clear line for each fault."""
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from data_pipelines import cases, labelled
from data_pipelines.errors import DataError
from tests.data_pipelines.test_cases import config

RNG = np.random.default_rng(0)
SHAPE = 20, 18, 24                        # x, y, z as stored


def scan(path, seed=0, axcodes='RAS', values=None, zooms=(2., 2., 3.)):
  """A NIfTI file whose axes run as `axcodes`, of values given in RAS order."""
  x = np.random.default_rng(seed).integers(-1000, 1000, SHAPE).astype(np.int16) if values is None else values
  image = nib.Nifti1Image(x, np.diag([*zooms, 1.]))
  turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt('RAS'), nib.orientations.axcodes2ornt(axcodes))
  nib.save(image.as_reoriented(turn), path)


def organ(seed, values=(0, 1, 2)):
  out = np.zeros(SHAPE, np.uint8)
  at = np.random.default_rng(seed).integers(2, 10, 3)
  out[at[0]:at[0] + 6, at[1]:at[1] + 6, at[2]:at[2] + 8] = values[1]
  out[:3, :3, :6] = values[2]
  return out


@pytest.fixture
def volumes(tmp_path):
  """Two scans of each split: images LPS, masks RAS."""
  rows = []
  for k, split in enumerate(('train', 'train', 'val', 'val', 'test', 'test')):
    scan(tmp_path / f'{k}.nii', k, 'LPS')
    scan(tmp_path / f'{k}m.nii.gz', axcodes='RAS', values=organ(k))
    rows.append({'id': f'case {k}', 'path': f'{k}.nii', 'mask': f'{k}m.nii.gz', 'kind': 'volume', 'split': split,
                 'group': f'p{k}', 'label': {'sick': k % 2}})
  return rows


def write(folder, rows):
  (folder / 'manifest.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return {'data.manifest': str(folder / 'manifest.jsonl')}


def seg3d(folder, rows, **leaves):
  return config('seg3d', **write(folder, rows), **({'task.classes': ('liver', 'spleen')} | leaves))


def test_image_and_mask_meet_on_one_grid(volumes, tmp_path):
  source = labelled.source('ct', seg3d(tmp_path, volumes))
  assert len(source) == 2 and source.groups() == ['p0', 'p1'] and source.classes == ('liver', 'spleen')
  record = source[1]
  want = np.random.default_rng(1).integers(-1000, 1000, SHAPE).astype(np.int16).transpose(2, 1, 0)
  np.testing.assert_array_equal(record['volume'], want)
  np.testing.assert_array_equal(record['mask'], organ(1).transpose(2, 1, 0))
  assert record['spacing_mm'] == pytest.approx((3., 2., 2.))


def test_a_prediction_goes_back_to_the_grid_of_the_file(volumes, tmp_path):
  tests = cases.of(seg3d(tmp_path, volumes, **{'task.spacing_mm': (6., 2., 2.)}), 'test')
  record = tests.record(0)
  assert record['volume'].shape == record['mask'].shape == (12, 18, 20)
  np.testing.assert_array_equal(record['truth'], organ(4).transpose(2, 1, 0))
  tests.save(0, record['truth'], tmp_path / 'out')
  saved, source = nib.load(tmp_path / 'out' / 'case_4.nii.gz'), nib.load(tmp_path / '4.nii')
  np.testing.assert_allclose(saved.affine, source.affine, atol=1e-6)
  back = saved.as_reoriented(nib.io_orientation(saved.affine))
  np.testing.assert_array_equal(np.asarray(back.dataobj), organ(4))


def test_values_of_masks(volumes, tmp_path):
  for k in range(6):
    scan(tmp_path / f'{k}m.nii.gz', values=organ(k, (0, 7, 9)))
  leaves = {'task.mask_values': ((7,), (3, 9))}
  record = labelled.source('ct', seg3d(tmp_path, volumes, **leaves))[0]
  np.testing.assert_array_equal(record['mask'], organ(0).transpose(2, 1, 0))
  each = labelled.source('ct', seg3d(tmp_path, volumes, **leaves, **{'task.exclusive': False}))[0]['mask']
  np.testing.assert_array_equal(each, np.stack([record['mask'] == 1, record['mask'] == 2], -1))
  with pytest.raises(DataError, match=r'MASK_VALUE .*0m.nii.gz: holds 7, 9, expected 0 to 2 \(liver, spleen\).*'
                                      r'FIX: set task.mask_values'):
    labelled.source('ct', seg3d(tmp_path, volumes))


def broken(rows, tmp_path, what):
  if what == 'grid':
    scan(tmp_path / '0m.nii.gz', values=organ(0), zooms=(2., 2., 4.))
  elif what == 'size':
    nib.save(nib.Nifti1Image(organ(0)[:-1], np.diag([2., 2., 3., 1.])), tmp_path / '0m.nii.gz')
  elif what == 'no mask':
    del rows[1]['mask']
  elif what == 'empty':
    rows[:] = [r for r in rows if r['split'] != 'val']
  elif what == 'leak':
    rows[2]['group'] = 'p0'
  elif what == 'twin':
    (tmp_path / '2.nii').write_bytes((tmp_path / '0.nii').read_bytes())
  elif what == 'absent':
    for k in range(6):
      scan(tmp_path / f'{k}m.nii.gz', values=np.minimum(organ(k), 1))
  elif what == 'oblique':
    turn = np.eye(4)
    turn[:2, :2] = [[.966, -.259], [.259, .966]]
    for name, values in (('0.nii', RNG.integers(-1000, 1000, SHAPE).astype(np.int16)), ('0m.nii.gz', organ(0))):
      nib.save(nib.Nifti1Image(values, turn @ np.diag([2., 2., 3., 1.])), tmp_path / name)
  return rows


FAULTS = {
    'grid': r'MASK_GRID .*0m.nii.gz: voxels of .* mm, its image',
    'size': r'MASK_GRID .*0m.nii.gz: shape 19 x 18 x 24, its image 20 x 18 x 24',
    'no mask': r'LABEL .*: 1 rows of split train have no mask: case 1',
    'empty': r'SPLIT_EMPTY .*: val: 0 of 4 usable rows of kind volume',
    'leak': r'LEAK .*: group p0: train and val',
    'twin': r'LEAK .*: case 0 \(train\) and case 2 \(val\) are the same file',
    'absent': r'LABEL .*: no mask of split train shows spleen',
    'oblique': r'OBLIQUE .*0.nii: is tilted: its label map cannot be interpolated',
}


@pytest.mark.parametrize('what', FAULTS)
def test_faults_of_segmentations_are_one_line(volumes, tmp_path, what):
  with pytest.raises(DataError, match=FAULTS[what]) as e:
    c = seg3d(tmp_path, broken(volumes, tmp_path, what), **{'data.on_bad_file': 'stop'})
    for split in ('train', 'val'):
      labelled.source('ct', c, split)
  assert '\n' not in str(e.value) and 'FIX: ' in str(e.value)


LABELS = {
    'no label': (lambda rows: rows[0].pop('label'), {}, r'LABEL .*: 1 rows of split train have no label: case 0'),
    'one class': (lambda rows: [r['label'].update(sick=1) for r in rows if r['split'] == 'val'], {},
                  r'LABEL .*: split val has one class only'),
    'unknown class': (lambda rows: None, {'task.classes': ('ill',)},
                      r'LABEL .*: no row of split train says anything of class ill'),
    'two at once': (lambda rows: rows[1]['label'].update(well=1), {'task.exclusive': True,
                                                                    'task.classes': ('sick', 'well')},
                    r'LABEL .*: 2 rows of split train have none or several of the classes sick, well: case 0, case 1'),
}


@pytest.mark.parametrize('what', LABELS)
def test_faults_of_classes_are_one_line(volumes, tmp_path, what):
  spoil, leaves, message = LABELS[what]
  spoil(volumes)
  with pytest.raises(DataError, match=message) as e:
    for split in ('train', 'val'):
      labelled.source('ct', config('cls3d', **write(tmp_path, volumes), **leaves), split)
  assert '\n' not in str(e.value) and 'FIX: ' in str(e.value)


def test_a_file_that_cannot_be_read_leaves_the_training_split_only(volumes, tmp_path, capsys):
  (tmp_path / '0.nii').write_bytes(b'')
  c = config('cls3d', **write(tmp_path, volumes))
  assert len(labelled.source('ct', c)) == 1
  assert '0.nii: file has 0 bytes; left out' in capsys.readouterr().err
  (tmp_path / '4.nii').write_bytes(b'')
  with pytest.raises(DataError, match='ZERO_BYTES'):
    labelled.source('ct', c, 'test')


def test_pictures_with_masks_of_0_and_255(tmp_path):
  rows = []
  for k, split in enumerate(('train', 'val', 'test')):
    mask = np.zeros((600, 700), np.uint8)
    mask[100:300, 200:500] = 255
    mask[0, 0] = 127                                  # not strictly binary
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (600, 700)).astype(np.uint8)).save(tmp_path / f'{k}.png')
    Image.fromarray(mask).save(tmp_path / f'{k}m.png')
    rows.append({'path': f'{k}.png', 'mask': f'{k}m.png', 'kind': 'image', 'split': split})
  c = config('seg2d', **write(tmp_path, rows), **{'task.classes': ('lung',), 'task.threshold': 128})
  record = labelled.source('xray', c)[0]
  assert record['image'].shape == (512, 597) and record['mask'].shape == (512, 597, 1)
  assert record['mask'].mean() == pytest.approx(200 * 300 / (600 * 700), rel=.01)
  tests = cases.of(c, 'test')
  tests.save(0, tests.record(0)['mask'], tmp_path / 'out')
  back = np.asarray(Image.open(tmp_path / 'out' / '2.png_lung.png'))
  assert back.shape == (600, 700) and back.mean() == pytest.approx(200 * 300 / (600 * 700), rel=.01)
  Image.fromarray(mask[:, :-1]).save(tmp_path / '0m.png')
  with pytest.raises(DataError, match='MASK_GRID .*0m.png: 699 x 600 pixels, its image 700 x 600'):
    labelled.source('xray', c)


def test_phantoms_of_the_splits_are_other_patients_and_every_run_seed_has_the_same():
  c = config('phantom_cls3d', **{'task.phantoms': (6, 3, 4)})
  ids = [{r['id'] for r in labelled.source('ct', c, s).listing()} for s in ('train', 'val', 'test')]
  assert [len(i) for i in ids] == [6, 3, 4] and not set.intersection(*ids[:2]) and not ids[0] & ids[2]
  c.seed = 5
  assert labelled.source('ct', c, 'test').digest == labelled.source('ct', config(
      'phantom_cls3d', **{'task.phantoms': (6, 3, 4)}), 'test').digest
  c.data.label_fraction = .5
  assert {r['id'] for r in labelled.source('ct', c).listing()} < ids[0]
  with pytest.raises(DataError, match='LABEL phantoms: task.classes: "gallstone" is not drawn.*FIX: use some of nodule'):
    labelled.source('ct', config('phantom_cls3d', **{'task.classes': ('gallstone',)}))
