"""Sequences of one scan as channels: which files belong together, on one grid, through folder, shards and doctor."""
import json

import nibabel as nib
import numpy as np
import pytest

from data_pipelines import (
  doctor,
  draw,
  manifest,
  prepare,
  prepared,
  readers,
  records,
  sample,
  sequences,
  sources,
  streams,
  tiles,
)
from data_pipelines.errors import DataError
from tests.data_pipelines import dicom_files
from tests.e2e import tiny

ENDS = ('_t1', '_flair')


def scan(seed, depth=26, shape=(20, 22)):
  """[S, A, R] of a magnitude image: zeros around, positive inside."""
  values = np.random.default_rng(seed).integers(1, 900, (depth, *shape)).astype(np.int16)
  values[:, :4] = 0
  return values


def save(path, array, origin=(0., 0., 0.), spacing=(2., 2., 3.), axes=None):
  affine = np.diag([*spacing, 1.])
  affine[:3, 3] = origin
  image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
  image.header.set_xyzt_units('mm')
  if axes:
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine),
                                                                nib.orientations.axcodes2ornt(axes)))
  path.parent.mkdir(parents=True, exist_ok=True)
  nib.save(image, path)
  return path


def brain(folder, cases=2, **more):
  """Two sequences a case, the second one stored in another axis order; a label map that is no sequence."""
  for i in range(cases):
    save(folder / f'p{i}' / f'p{i}_t1.nii.gz', scan(2 * i), **more)
    save(folder / f'p{i}' / f'p{i}_flair.nii.gz', scan(2 * i + 1), axes='LPS', **more)
    save(folder / f'p{i}' / f'p{i}_seg.nii.gz', (scan(9) > 800).astype(np.int16))
  return folder


def z_scores(array):
  """By NumPy, apart from the code."""
  inside = array[array != 0].astype(float)
  low, high = np.percentile(inside, [.5, 99.5])
  clipped = np.clip(inside, low, high)
  return (np.clip(array, low, high) - clipped.mean()) / clipped.std()


# ---- what belongs together

def test_names_are_joined_in_the_order_of_the_channels():
  paths = ['a/x_flair.nii.gz', 'a/x_t1.nii', 'a/x_t1ce.nii', 'b/x_t1.nii', 'b/x_seg.nii', 'c/y_t1.nii',
           'c/y_t1.nii.gz', 'c/y_flair.nii']
  made, rest = sequences.cases(paths, ENDS)
  assert rest == ['a/x_t1ce.nii', 'b/x_seg.nii']
  assert [c.paths for c in made] == [('a/x_t1.nii', 'a/x_flair.nii.gz'), ('b/x_t1.nii',),
                                     ('c/y_t1.nii', 'c/y_flair.nii')]
  assert made[0].fault is None
  assert str(made[1].fault) == ('SEQUENCES b/x_t1.nii: nothing beside it ends in _flair. FIX: copy the missing '
                                'sequence, or leave the case out')
  assert '2 of its files end in _t1' in str(made[2].fault)


@pytest.mark.parametrize('ends, paths, want', [
    ('_0000,_0001', ['BRATS_001_0000.nii.gz', 'BRATS_001_0001.nii.gz'], None),
    ('_T1w, _FLAIR', ['sub-01/anat/sub-01_T1w.nii.gz', 'sub-01/anat/sub-01_FLAIR.nii.gz'], None),
    ('/t1,/flair', ['p1/t1', 'p1/flair'], None),
    ('t1,ft1', ['x_t1.nii', 'x_ft1.nii'], None),    # the longer end wins
    ('::0,::3', ['x.nii.gz'], ('x.nii.gz::0', 'x.nii.gz::3'))])
def test_customs_of_naming(ends, paths, want):
  made, rest = sequences.cases(paths, sequences.parse(ends))
  assert made == [(want or tuple(paths), None)] and not rest


@pytest.mark.parametrize('text', ['_t1,_t1', '::0,_t1'])
def test_ends_that_cannot_be_meant(text):
  with pytest.raises(DataError, match='SEQUENCES .*write _t1,_flair or ::0,::3'):
    sequences.parse(text)


# ---- one grid

def test_sequences_are_stacked_as_z_scores(tmp_path):
  item, = sources.CTFolder(str(brain(tmp_path, 1)), modality='mr', sequences=ENDS).items
  got = tiles.read(item, 'mr')
  assert got.volume.shape == (2, 26, 20, 22) and got.volume.dtype == np.int16 and got.whole is None
  for c in range(2):
    np.testing.assert_allclose(got.volume[c] / 1024, z_scores(scan(c)), rtol=0, atol=.5 / 1024 + 1e-5)


@pytest.mark.parametrize('changed, text', [
    ({'origin': (0, 0, 30.)}, 'origin differs by 10 slices from a_t1.nii'),
    ({'spacing': (2., 2., 4.)}, 'voxels of 2.0 x 2.0 x 4.0 mm, a_t1.nii 2.0 x 2.0 x 3.0 mm'),
    ({'array': scan(1, shape=(20, 24))}, 'shape 24 x 20 x 26, a_t1.nii 22 x 20 x 26')])
def test_another_grid_is_refused_by_name(tmp_path, changed, text):
  save(tmp_path / 'a_t1.nii', scan(0))
  save(tmp_path / 'a_flair.nii', **{'array': scan(1)} | changed)
  item, = sequences.of_items(readers.discover(str(tmp_path), 'volume'), ENDS).items
  with pytest.raises(DataError) as e:
    tiles.read(item, 'other')
  assert e.value.code == 'SEQUENCE_GRID' and e.value.path == f'{tmp_path}/a_flair.nii' and text in e.value.reason
  with pytest.raises(DataError, match='SEQUENCES .*a_t1.nii: 2 sequences; of CT one is taken'):
    tiles.read(item, 'ct')


def test_volumes_of_a_4d_file(tmp_path):
  """As the brain tumours of the Medical Segmentation Decathlon."""
  stack = np.stack([scan(i).transpose(2, 1, 0) for i in range(4)], -1)
  nib.save(nib.Nifti1Image(stack, np.diag([2., 2., 3., 1.])), tmp_path / 'x.nii.gz')
  source = sources.CTFolder(str(tmp_path), modality='mr', sequences=('::0', '::3'))
  assert [source[i]['name'] for i in range(len(source))] == ['x.nii.gz::0 z0', 'x.nii.gz::0 z2']
  for c, number in enumerate((0, 3)):
    z = source[1]['volume'][c] / 1024
    np.testing.assert_allclose(z, z_scores(scan(number))[2:26], rtol=0, atol=.5 / 1024 + 1e-5)
  assert readers.sha(source.items[0]) != readers.sha(
      sequences.of_items(readers.discover(str(tmp_path), 'volume'), ('::3', '::0')).items[0])
  with pytest.raises(DataError, match='EMPTY_DIR .*1 NDIM'):
    sources.CTFolder(str(tmp_path), modality='mr', sequences=('::0', '::4'))


def test_dicom_series_of_two_folders(tmp_path):
  for name, seed in (('t1', 0), ('flair', 1)):
    dicom_files.series(tmp_path / 'p' / name, dicom_files.noise((16, 18, 17), seed, low=1), Modality='MR',
                       SeriesInstanceUID=f'1.{seed}')
  source = sources.CTFolder(str(tmp_path), modality='mr', sequences=('/t1', '/flair'))
  assert source[0]['volume'].shape == (2, 24, 18, 17)
  dicom_files.series(tmp_path / 'q' / 't1', dicom_files.noise((16, 18, 17)), SeriesInstanceUID='1.7')
  with pytest.raises(DataError, match='MODALITY .*q/t1: is CT by its header, not MR'):
    tiles.read(tmp_path / 'q' / 't1', 'mr')


# ---- values that are no HU

def test_nothing_of_hu_is_done_to_other_modalities(tmp_path):
  """Voxels that are not finite become 0 and not -1024; what lies below -1024 is no padding."""
  array = scan(0).astype(np.float32) - 3000
  array[3, 5, 5] = np.nan
  path = save(tmp_path / 'x.nii', array)
  got = tiles.read(path, 'other')
  assert [w.split(': ', 1)[1] for w in got.warnings] == ['1 voxels (0.01 %) set to 0']
  array[3, 5, 5] = 0
  low, high = np.percentile(array, [.5, 99.5])
  clipped = np.clip(array.astype(float), low, high)
  z = (clipped - clipped.mean()) / clipped.std()
  np.testing.assert_allclose(got.volume[0] / 1024, z, rtol=0, atol=.5 / 1024 + 1e-4)


def test_short_scans_lie_in_the_middle_of_their_background(tmp_path):
  got = tiles.read(save(tmp_path / 'x.nii', scan(0, 19)), 'mr')
  assert got.volume.shape == (1, 24, 20, 22) and got.corner == (-2, 0, 0)
  assert (got.volume[0, :2] == got.intensity['pad'][0]).all() and (got.volume[0, 21:] == got.volume.min()).all()


def test_views_show_the_same_box_of_every_sequence(tmp_path):
  """Without augmentation they are the z-scores themselves, and background where the volume ends."""
  config = tiny.config(**{'data.modality': 'mr', 'views.ct.extent': 'output', 'views.ct.size': (16, 32, 32)})
  source = sources.CTFolder(str(brain(tmp_path, 1)), modality='mr', sequences=ENDS)
  record = source[0]
  out = sample.ct_sample(record, draw.ct_centre(config, *sample.sizes(record)), config)
  assert out.keys() == {'ct'} and out['ct'].shape == (1, 16, 32, 32, 2) and out['ct'].dtype == np.float32
  for c in range(2):
    seen = out['ct'][0, ..., c]
    np.testing.assert_allclose(seen[:, 6:26, 5:27], record['volume'][c, 4:20] / 1024, rtol=0, atol=1e-5)
    np.testing.assert_allclose(seen[:, :6], record['pad'][c] / 1024, rtol=0, atol=1e-5)
  two = streams.views('ct', record, config, np.random.default_rng(3))
  assert two.keys() == {'ct'} and two['ct'].shape == (2, 16, 32, 32, 2) and np.isfinite(two['ct']).all()


def test_noise_is_every_sequence_s_own(tmp_path):
  config = tiny.config(**{'data.modality': 'mr', 'views.ct.noise_std': (.1, .1), 'views.ct.blur_p': (0., 0.),
                          'views.ct.gamma_p': (0., 0.)})
  record = sources.CTFolder(str(brain(tmp_path, 1)), modality='mr', sequences=ENDS)[0]
  record = record | {'volume': np.stack([record['volume'][0]] * 2), 'pad': record['pad'][[0, 0]]}
  a, b = np.moveaxis(streams.views('ct', record, config, np.random.default_rng(0))['ct'], -1, 0)
  assert (a - b).std() == pytest.approx(.1 * 2 ** .5, rel=.2)    # times a factor of .85 to 1.15


# ---- folders, shards, doctor

def test_a_folder_says_what_it_took_and_what_not(tmp_path, capsys):
  save(brain(tmp_path) / 'p7' / 'p7_t1.nii.gz', scan(7))
  source = sources.CTFolder(str(tmp_path), modality='mr', sequences=ENDS)
  assert len(source) == 4 and source.items[0].path.endswith('p0_t1.nii.gz') and len(source.items[0].further) == 1
  err = capsys.readouterr().err
  assert 'WARN SEQUENCES ' in err and 'p7_t1.nii.gz: nothing beside it ends in _flair; skipped. FIX: copy' in err
  assert 'data.ct: 3 files, 2 usable, 4 records; refused: 1 SEQUENCES; ignored: 2 volumes of no sequence' in err


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
  folder, out = tmp_path_factory.mktemp('brain'), tmp_path_factory.mktemp('out') / 'prepared'
  save(brain(folder) / 'p7' / 'p7_t1.nii.gz', scan(7))
  assert prepare.main([str(folder), f'--out={out}', '--workers=0', '--modality=mr', '--sequences=_t1,_flair']) == 0
  return folder, out


def test_shards_hold_what_the_folder_does(shards):
  folder, out = shards
  from_files = sources.CTFolder(str(folder), modality='mr', sequences=ENDS)
  from_files = {r['name'].rpartition('/')[2]: r for r in map(from_files.__getitem__, range(4))}
  source = prepared.PreparedCT(str(out), modality='mr')
  assert len(source) == 4
  for i in range(4):
    record = source[i]
    want = from_files[record['name'].rpartition('/')[2]]
    for name in ('volume', 'scale', 'offset', 'pad', 'spacing_mm'):
      np.testing.assert_array_equal(record[name], want[name])
  assert not records.folder(out, 'whole').exists()
  rows = manifest.read(out, labelled=False)
  lost = [r for r in rows if r['status'] == 'excluded']
  assert [r['findings'] for r in lost] == [['SEQUENCES']] and len(rows) == 5
  assert [p[len(str(folder)):] for p in rows[0]['paths']] == ['/p0/p0_t1.nii.gz', '/p0/p0_flair.nii.gz']
  assert rows[0]['shape'] == [24, 20, 22] and rows[0]['sha'] == rows[1]['sha'] != rows[2]['sha']
  assert manifest.meta(out)['config']['sequences'] == ['_t1', '_flair']
  with pytest.raises(DataError, match='MODALITY .*was prepared with --modality=mr, the run has data.modality=ct'):
    prepared.PreparedCT(str(out))


def test_shards_are_a_data_set_of_tfds(shards):
  import tensorflow_datasets as tfds
  theirs = tfds.builder_from_directory(str(records.folder(shards[1], 'ct'))).as_data_source('train')
  ours = records.Shards(shards[1], 'ct')
  assert ours[0].keys() == theirs[0].keys() and theirs[0]['volume'].shape == (2, 24, 20, 22)
  for name in ('volume', 'scale', 'offset', 'pad'):
    np.testing.assert_array_equal(ours[0][name], theirs[0][name])


def test_the_doctor_s_list_is_prepared_to_the_same_records(shards, tmp_path, capsys):
  folder, out = shards
  flags = ['--modality=mr', '--sequences=_t1,_flair', '--workers=0']
  assert doctor.main([str(folder), *flags, f'--manifest={tmp_path}/list', '--split=1,0,0',
                      f'--html={tmp_path}/x.html']) == 1
  told = capsys.readouterr().out
  assert 'ERROR SEQUENCES ' in told and 'p7_t1.nii.gz: nothing beside it ends in _flair' in told
  rows = manifest.read(tmp_path / 'list', labelled=False)
  assert [(len(r['paths']), r['status']) for r in rows] == [(2, 'ok'), (2, 'ok'), (1, 'excluded')]
  assert prepare.main([f'{tmp_path}/list', f'--out={tmp_path}/out', '--workers=0', '--modality=mr']) == 0
  a, b = (prepared.PreparedCT(str(o), modality='mr') for o in (out, tmp_path / 'out'))
  assert {r['name'].rpartition('/')[2]: r['volume'].tobytes() for r in map(a.__getitem__, range(4))} == {
      r['name'].rpartition('/')[2]: r['volume'].tobytes() for r in map(b.__getitem__, range(4))}


def test_the_doctor_looks_at_every_sequence(tmp_path):
  save(tmp_path / 'a_t1.nii', scan(0))
  save(tmp_path / 'a_flair.nii', scan(1), origin=(0, 0, 30.))
  save(tmp_path / 'b_t1.nii', scan(2))
  save(tmp_path / 'b_flair.nii', (scan(3) > 500).astype(np.int16))
  report = doctor.examine(tmp_path, workers=0, modality='mr', ends=ENDS)
  assert [[(f.severity, f.code, f.path.rpartition('/')[2]) for f in r.findings] for r in report.results] == [
      [('ERROR', 'SEQUENCE_GRID', 'a_flair.nii')], [('ERROR', 'CONSTANT', 'b_flair.nii')]]


def test_scans_of_different_numbers_of_sequences_are_not_prepared_together(tmp_path):
  brain(tmp_path / 'a', 1)
  rows = [{'id': 'x', 'kind': 'volume', 'path': f'{tmp_path}/a/p0/p0_t1.nii.gz', 'split': 'train'},
          {'id': 'y', 'kind': 'volume', 'path': f'{tmp_path}/a/p0/p0_t1.nii.gz', 'split': 'train',
           'paths': [f'{tmp_path}/a/p0/p0_t1.nii.gz', f'{tmp_path}/a/p0/p0_flair.nii.gz']}]
  manifest.write(tmp_path / 'list', rows)
  assert json.loads((tmp_path / 'list/manifest.jsonl').read_text().splitlines()[1])['paths'] == [
      f'{tmp_path}/a/p0/p0_t1.nii.gz', f'{tmp_path}/a/p0/p0_flair.nii.gz']
  assert prepare.main([f'{tmp_path}/list', f'--out={tmp_path}/out', '--workers=0', '--modality=mr']) == 1


def test_sources_of_different_numbers_are_not_mixed(shards, tmp_path):
  folder, out = shards
  config = tiny.config(**{'data.modality': 'mr', 'data.ct': f'{out},{folder}'})
  with pytest.raises(DataError, match='SEQUENCES .*: sources of 1 and 2 sequences'):
    streams.build(config, ['ct'])


def test_paths_begin_with_path():
  row = {'path': 'a', 'kind': 'volume', 'paths': ['b', 'a']}
  with pytest.raises(DataError, match='paths begins with b, expected path, a'):
    manifest.check(row, 'here')
