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
  with pytest.raises(DataError, match='LABEL phantoms: task.classes: "gallstone" is not drawn.*FIX: use some of nod'):
    labelled.source('ct', config('phantom_cls3d', **{'task.classes': ('gallstone',)}))


# ---- pictures

def radiographs(folder, n=3, size=(60, 80), splits=('train', 'val', 'test'), **row):
  """n pictures of each split with a mask of 0 and 255 each."""
  rows = []
  for k, split in enumerate(np.repeat(splits, n)):
    image = np.random.default_rng(k).integers(0, 256, size).astype(np.uint8)
    Image.fromarray(image).save(folder / f'{k}.png')
    Image.fromarray(np.pad(np.full((20, 30), 255, np.uint8), ((5, size[0] - 25), (k % 9, size[1] - 30 - k % 9)))).save(
        folder / f'{k}m.png')
    rows.append({'id': f'{k}', 'path': f'{k}.png', 'mask': f'{k}m.png', 'kind': 'image', 'split': str(split)} | row)
  return rows


def seg2d(folder, rows, **leaves):
  return config('seg2d', **write(folder, rows), **({'task.classes': ('lung',), 'task.threshold': 128} | leaves))


def test_masks_of_255_without_a_threshold(tmp_path):
  with pytest.raises(DataError, match=r'MASK_VALUE .*0m.png: holds 255, expected 0 to 1 \(lung\).* or task.threshold'):
    labelled.source('xray', seg2d(tmp_path, radiographs(tmp_path), **{'task.threshold': 0}))


def test_structures_that_overlap_share_values(tmp_path):
  """As JSRT: 1 lung, 2 heart, 3 both."""
  rows = radiographs(tmp_path)
  mask = np.random.default_rng(0).integers(0, 4, (60, 80)).astype(np.uint8)
  for k in range(9):
    Image.fromarray(mask).save(tmp_path / f'{k}m.png')
  c = seg2d(tmp_path, rows, **{'task.threshold': 0, 'task.classes': ('lung', 'heart'),
                               'task.mask_values': ((1, 3), (2, 3))})
  np.testing.assert_array_equal(labelled.source('xray', c)[0]['mask'], np.stack([mask % 2, mask // 2], -1))


def test_a_palette_keeps_its_numbers_and_a_picture_turned_by_exif_its_mask(tmp_path):
  rows = radiographs(tmp_path, 1)
  for k in range(3):
    x = np.random.default_rng(k).integers(0, 256, (60, 80)).astype(np.uint8)
    turn = Image.Exif()
    turn[0x0112] = 6                                  # shown after a quarter turn: 80 rows of 60 pixels
    Image.fromarray(x).save(tmp_path / f'{k}.png', exif=turn)
    mask = Image.fromarray(np.pad(np.ones((30, 20), np.uint8), ((2, 48), (3, 37)))).convert('P')
    mask.putpalette([0, 0, 0, 255, 0, 0])
    mask.save(tmp_path / f'{k}m.gif')
    rows[k]['mask'] = f'{k}m.gif'
  record = labelled.source('xray', seg2d(tmp_path, rows, **{'task.threshold': 0}))[0]
  assert record['image'].shape == (80, 60) and record['mask'][2:32, 3:23].all() and record['mask'].sum() == 600


def test_a_picture_that_is_reduced_to_a_square(tmp_path):
  """Which side of the file is longer cannot be asked of it."""
  rows = radiographs(tmp_path, 1, (1200, 1201))
  tests = cases.of(seg2d(tmp_path, rows), 'test')
  assert tests.record(0)['image'].shape == (512, 512)
  tests.save(0, tests.record(0)['mask'], tmp_path)
  assert np.asarray(Image.open(tmp_path / '2_lung.png')).shape == (1200, 1201)


@pytest.mark.parametrize('what, message', [
    ('colour', r'MASK_VALUE .*1m.png: is coloured'), ('text', r'NOT_IMAGE .*1m.png'), ('cut', r'TRUNCATED .*1m.png'),
    ('turned', r'MASK_GRID .*1m.png: 60 x 80 pixels, its image 80 x 60')])
def test_faults_of_a_mask_are_one_line(tmp_path, what, message):
  rows = radiographs(tmp_path)
  file = tmp_path / '1m.png'
  if what == 'colour':
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)).save(file)
  elif what == 'turned':
    Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
  else:
    file.write_bytes(b'no picture' if what == 'text' else file.read_bytes()[:-40])
  with pytest.raises(DataError, match=message) as e:
    labelled.source('xray', seg2d(tmp_path, rows, **{'data.on_bad_file': 'stop'}))
  assert '\n' not in str(e.value) and 'FIX: ' in str(e.value)


def classified(folder, **leaves):
  """9 pictures whose class is a number: 0, 1, 2 in every split."""
  rows = radiographs(folder)
  for k, row in enumerate(rows):
    del row['mask']
    row['label'] = k % 3
  return config('cls2d', **write(folder, rows), **leaves)


@pytest.mark.parametrize('exclusive', [True, False])
def test_a_class_number_says_that_it_is_no_other_class(tmp_path, exclusive):
  source = labelled.source('xray', classified(tmp_path, **{'task.exclusive': exclusive}))
  assert source.classes == ('class_0', 'class_1', 'class_2')
  np.testing.assert_array_equal([source[i]['label'] for i in range(3)], np.eye(3))


def test_what_a_row_does_not_say_is_unknown(volumes, tmp_path):
  volumes[0]['label'] = {'sick': 0, 'old': 1}
  source = labelled.source('ct', config('cls3d', **write(tmp_path, volumes), **{'task.classes': ('sick', 'old')}))
  np.testing.assert_array_equal([source[i]['label'] for i in range(2)], [[0, 1], [1, -1]])


def test_a_class_that_no_training_row_has(tmp_path):
  with pytest.raises(DataError, match=r'LABEL .*: no row of split train says anything of class class_3'):
    labelled.source('xray', classified(tmp_path, **{
        'task.exclusive': True, 'task.classes': ('class_0', 'class_1', 'class_2', 'class_3')}))


def test_a_picture_that_breaks_later_is_replaced_in_training_and_refused_before_a_test(tmp_path, capsys):
  c = classified(tmp_path)
  source = labelled.source('xray', c)
  for k in (1, 7):      # a good header with little behind it
    (tmp_path / f'{k}.png').write_bytes((tmp_path / f'{k}.png').read_bytes()[:-2000])
  got = [source[i] for i in (0, 1, 1, 2)]
  assert [r['bad'] for r in got] == [False, True, True, False] and [r['index'] for r in got] == [0, 1, 1, 2]
  np.testing.assert_array_equal(got[1]['image'], got[3]['image'])
  np.testing.assert_array_equal(got[1]['label'], got[3]['label'])
  assert capsys.readouterr().err.count('1.png') == 1
  with pytest.raises(DataError, match='TRUNCATED .*7.png'):
    labelled.source('xray', c, 'test')
  c.data.on_bad_file = 'stop'
  with pytest.raises(DataError, match='TRUNCATED .*1.png'):
    labelled.source('xray', c)[1]


def test_a_share_holds_every_class_and_whole_patients(tmp_path):
  rows = radiographs(tmp_path, 24)
  for k, row in enumerate(rows):
    row |= {'label': {'rare': int(k % 24 == 5), 'often': int(k % 3 > 0)}, 'group': f'{row["split"]} {k // 2}'}
  groups = {}
  for share in (.1, .5, 1.):
    source = labelled.source('xray', config('cls2d', **write(tmp_path, rows), **{'data.label_fraction': share}))
    labels = np.array([source[i]['label'] for i in range(len(source))])
    assert labels.any(0).all() and (labels == 0).any(0).all()
    groups[share] = source.groups()
    assert all(groups[share].count(g) == 2 for g in groups[share])
  assert set(groups[.1]) < set(groups[.5]) < set(groups[1.]) and len(groups[1.]) == 24
  c = config('cls2d', **write(tmp_path, rows), **{'data.label_fraction': .1})
  assert len(labelled.source('xray', c, 'val')) == len(labelled.source('xray', c, 'test')) == 24
