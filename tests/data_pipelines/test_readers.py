"""Folders of every format: what is a sample, what it is called, and that training reads it."""
import io
import os
import pickle
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from etils import epath
from PIL import Image

from data_pipelines import dicom_file, evalset, readers, sources
from data_pipelines.errors import DataError
from tests.data_pipelines.dicom_files import bare, dataset, noise, save, series
from tests.e2e import tiny


def nifti_file(path, array=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  array = noise((24, 30, 28)) if array is None else array
  image = nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([2., 2., 3., 1.]))
  image.header.set_xyzt_units('mm')
  nib.save(image, path)


@pytest.fixture
def mixed(tmp_path):
  """One sample of every kind, and what lies about beside them."""
  nifti_file(tmp_path / 'a' / 'scan.nii.gz')
  nib.save(nib.Nifti1Pair(noise((20, 20, 20)), np.eye(4)), tmp_path / 'a' / 'pair.img')
  series(tmp_path / 'b' / 'series', noise((24, 30, 28)))
  for n in (1, 2):
    series(tmp_path / f'c{n}', noise((20, 20, 20), seed=n), SeriesInstanceUID=f'4.5.{n}')
    for f in list((tmp_path / f'c{n}').iterdir()):
      f.rename(tmp_path / 'b' / f'{n}_{f.name}.dcm')
    (tmp_path / f'c{n}').rmdir()
  grey = noise((40, 50), dtype=np.uint8, low=0, high=255)
  Image.fromarray(grey).save(tmp_path / 'ray.png')
  save(tmp_path / 'd' / 'ray', dataset(noise((40, 50), dtype=np.uint16, low=0, high=4096), 'CR'))
  bare(tmp_path / 'd' / 'old', dataset(noise((40, 50), dtype=np.uint16, low=0, high=4096), 'CR'))
  save(tmp_path / 'd' / 'scout', dataset(noise((40, 50)), ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']))
  (tmp_path / 'notes.txt').write_text('hello')
  (tmp_path / 'x.dcm').write_bytes(b'x')
  (tmp_path / '.hidden').write_bytes(bytes(128) + b'DICM')
  return tmp_path


# ---- what there is

def test_every_kind_of_sample_is_found(mixed):
  found = readers.discover(str(mixed), 'volume')
  names = [(i.path[len(str(mixed)) + 1:], i.format, len(i.files)) for i in found.items]
  assert names == [('a/pair.hdr', 'nifti', 2), ('a/scan.nii.gz', 'nifti', 1), ('b/series', 'dicom', 24),
                   ('b::4.5.1', 'dicom', 20), ('b::4.5.2', 'dicom', 20)]
  assert all(i.kind == 'volume' for i in found.items) and not found.faults
  assert found.others == '1 *.dcm, 1 *.png, 1 *.txt, 1 DICOM localizer, 2 DICOM radiograph'
  found = readers.discover(str(mixed), 'image')
  assert [(i.path[len(str(mixed)) + 1:], i.format) for i in found.items] == [
      ('d/old', 'dicom'), ('d/ray', 'dicom'), ('ray.png', 'image')]
  assert found.others == ('1 *.dcm, 1 *.gz, 1 *.hdr, 1 *.img, 1 *.txt, 1 DICOM localizer, 64 DICOM slice')


def test_an_item_is_found_again_by_its_path(mixed):
  for kind, read in (('volume', readers.volume), ('image', readers.image)):
    for found in readers.discover(str(mixed), kind).items:
      again = readers.item(found.path, kind)
      assert again == found or (again.path, again.files) == (found.path, tuple(sorted(found.files)))
      np.testing.assert_array_equal(read(found.path).array, read(found).array)
      assert pickle.loads(pickle.dumps(found)) == found


def test_a_copy_below_is_another_item(tmp_path):
  series(tmp_path / 'p', noise((4, 6, 5)))
  (tmp_path / 'p' / 'copy').mkdir()
  for f in list((tmp_path / 'p').glob('IM*')):
    (tmp_path / 'p' / 'copy' / f.name).write_bytes(f.read_bytes())
  found = readers.discover(str(tmp_path), 'volume').items
  assert [i.path for i in found] == [f'{tmp_path}/p/copy', f'{tmp_path}/p::1.2.3']
  assert [readers.item(i.path, 'volume') for i in found] == found


def test_the_current_folder_has_a_name(mixed, monkeypatch):
  monkeypatch.chdir(mixed / 'b')
  assert [i.path for i in readers.discover('*.dcm', 'volume').items] == ['.::4.5.1', '.::4.5.2']
  assert [i.path for i in readers.discover('1_*.dcm', 'volume').items] == ['.']
  assert len(readers.item('.::4.5.2', 'volume').files) == 20
  monkeypatch.chdir(mixed)
  assert [i.path for i in readers.discover('b', 'volume').items] == ['b/series', 'b::4.5.1', 'b::4.5.2']


def test_one_format_alone(mixed):
  formats = lambda kind, format: {i.format for i in readers.discover(str(mixed), kind, format).items}
  assert formats('volume', 'nifti') == {'nifti'} and formats('image', 'image') == {'image'}
  assert formats('volume', 'dicom') == formats('image', 'dicom') == {'dicom'}
  assert formats('volume', 'image') == formats('image', 'nifti') == set()
  (mixed / 'd' / 'ray').rename(mixed / 'd' / 'ray.img')    # a name that means something else
  assert [os.path.basename(i.path) for i in readers.discover(str(mixed), 'image', 'dicom').items] == ['old', 'ray.img']
  for wrong in (('movie', 'auto'), ('volume', 'jpeg')):
    with pytest.raises(ValueError, match='expected one of'):
      readers.discover(str(mixed), *wrong)


def test_items_that_cannot_be_named(mixed):
  code = lambda *a: pytest.raises(DataError, readers.item, *a).value
  assert code(f'{mixed}/b', 'volume').code == 'SERIES' and '4.5.1' in str(code(f'{mixed}/b', 'volume'))
  assert code(f'{mixed}/b::9', 'volume').code == 'EMPTY_DIR'
  assert 'found 1 DICOM localizer' in str(code(f'{mixed}/d', 'volume'))
  assert code(f'{mixed}/d', 'image').code == 'NOT_IMAGE'
  with pytest.raises(DataError, match='UNREADABLE'):
    readers.volume(mixed / 'absent')
  with pytest.raises(DataError, match='NOT_IMAGE'):
    readers.volume(mixed / 'notes.txt')
  nifti_file(mixed / 'n.nii.gz')
  (mixed / 'n.nii.gz').rename(mixed / 'without_suffix')
  assert readers.volume(mixed / 'without_suffix').array.shape == (24, 30, 28)


def test_a_frame_of_a_file_with_more_axes(tmp_path):
  array = noise((20, 18, 16, 3))
  nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / 'x.nii')
  np.testing.assert_array_equal(readers.volume(tmp_path / 'x.nii', frame=2).array, array[..., 2].transpose(2, 1, 0))


def test_only_the_start_of_other_files_is_read(tmp_path, monkeypatch):
  for i in range(20):
    (tmp_path / f'{i}.bin').write_bytes(bytes(4096))
    (tmp_path / f'{i}.nii.gz').write_bytes(bytes(4096))
    (tmp_path / f'{i}.png').write_bytes(bytes(4096))
  asked = []
  monkeypatch.setattr(dicom_file, 'looks', lambda start: asked.append(len(start)) or False)
  found = readers.discover(str(tmp_path), 'volume')
  assert asked == [512] * 20 and len(found.items) == 20 and found.others == '20 *.bin, 20 *.png'


def test_many_files_are_sorted_quickly(tmp_path):
  for i in range(4000):
    (tmp_path / f'{i}{(".png", ".json")[i % 2]}').write_bytes(b'{"a": 1}' * 80)
  began = time.monotonic()
  assert len(readers.discover(str(tmp_path), 'image').items) == 2000
  assert time.monotonic() - began < 4    # 100,000 within two minutes even on a busy machine


def test_object_stores(memory):
  folder = epath.Path(memory) / 'ct' / 'p1'
  folder.mkdir(parents=True)
  pixels = noise((20, 18, 17))
  for k, part in enumerate(pixels):
    buffer = io.BytesIO()
    dataset(part, ImagePositionPatient=[0, 0, 3 * k]).save_as(buffer, enforce_file_format=True)
    (folder / f'{k}').write_bytes(buffer.getvalue())
  found = readers.discover(f'{memory}/ct', 'volume')
  assert [i.path for i in found.items] == [f'{memory}/ct/p1']
  np.testing.assert_array_equal(readers.volume(found.items[0]).array, pixels[:, ::-1, ::-1])
  assert readers.item(f'{memory}/ct/p1', 'volume') == found.items[0]


# ---- training

def test_a_folder_of_dicom_series_trains_like_nifti(tmp_path, capsys):
  pixels = noise((36, 30, 28))
  series(tmp_path / 'dicom' / 'p1', pixels, step=3., PixelSpacing=[2., 2.])
  series(tmp_path / 'dicom' / 'p2', noise((24, 30, 28), seed=2), PixelSpacing=[2., 2.], SeriesInstanceUID='8')
  series(tmp_path / 'dicom' / 'gap', pixels[:4], positions=[[0, 0, z] for z in (0, 3, 6, 12)], SeriesInstanceUID='9')
  nifti_file(tmp_path / 'nifti' / 'p1.nii.gz', pixels[:, ::-1, ::-1])
  source = sources.CTFolder(str(tmp_path / 'dicom'), whole=True)
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 2 and err[0].startswith(f'WARN SLICE_GAP {tmp_path}/dicom/gap: ')
  assert err[1] == 'data.ct: 3 files, 2 usable, 3 records; refused: 1 SLICE_GAP'
  other = sources.CTFolder(str(tmp_path / 'nifti'), whole=True)
  for i in range(2):
    ours, theirs = source[i], other[i]
    np.testing.assert_array_equal(ours['volume'], theirs['volume'])
    np.testing.assert_array_equal(ours['whole'], theirs['whole'])
    assert ours['spacing_mm'] == pytest.approx(theirs['spacing_mm'])
    assert ours['name'] == f'p1 z{12 * i}' and ours['group'] == 0
  assert source[2]['name'] == 'p2 z0' and pickle.loads(pickle.dumps(source))[2]['group'] == 1
  with pytest.raises(DataError, match='SLICE_GAP'):
    sources.CTFolder(str(tmp_path / 'dicom'), on_bad_file='stop')
  record = sources.one_ct(tmp_path / 'dicom' / 'p1', tiny.config())
  np.testing.assert_array_equal(record['volume'], pixels[6:30, ::-1, ::-1])
  assert record['name'] == 'p1'


def test_dicom_radiographs_train(tmp_path):
  pixels = noise((40, 50), dtype=np.uint16, low=0, high=4096)
  save(tmp_path / 'b', dataset(pixels, 'CR', BitsStored=12, HighBit=11))
  Image.fromarray(pixels).save(tmp_path / 'a.png')    # of 12 bits, which the reader finds out
  source = sources.XrayFolder(str(tmp_path))
  assert [source[i]['name'] for i in range(2)] == ['a.png', 'b']
  np.testing.assert_array_equal(source[0]['image'], source[1]['image'])


def test_without_pydicom_other_formats_still_train(tmp_path, capsys, monkeypatch):
  series(tmp_path / 'p1', noise((24, 30, 28)))
  monkeypatch.setitem(sys.modules, 'pydicom', None)
  with pytest.raises(DataError, match=r'^DICOM .*p1: 24 DICOM files: .* FIX: pip install "unimiss_jax\[dicom\]"$'):
    sources.CTFolder(str(tmp_path))
  nifti_file(tmp_path / 'x.nii.gz')
  assert len(sources.CTFolder(str(tmp_path))) == 1
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 2 and err[0].startswith(f'WARN DICOM {tmp_path}/p1: 24 DICOM files: ')
  with pytest.raises(DataError, match='^DICOM '):
    sources.CTFolder(str(tmp_path), on_bad_file='stop')
  with pytest.raises(DataError, match='^DICOM .*p1'):
    readers.volume(tmp_path / 'p1')


def test_a_manifest_may_name_dicom(tmp_path):
  rows = []
  for i, split in enumerate(('train', 'test')):
    series(tmp_path / f's{i}', noise((26, 40, 40), seed=i), PixelSpacing=[3., 3.])
    save(tmp_path / f'r{i}.dcm', dataset(noise((90, 80), dtype=np.uint16, low=0, high=4096), 'CR'))
    rows += [f'{{"path": "s{i}", "kind": "volume", "label": {i}, "split": "{split}"}}',
             f'{{"path": "r{i}.dcm", "kind": "image", "label": {i}, "split": "{split}"}}']
  (tmp_path / 'manifest.jsonl').write_text('\n'.join(rows))
  got = evalset.build(tiny.config(**{'eval.knn': str(tmp_path / 'manifest.jsonl')}))
  assert got.views['ct'].shape == (2, 1, 16, 64, 64, 1) and got.views['xray'].shape == (2, 1, 64, 64, 3)


def test_a_place_without_samples_says_what_it_holds(tmp_path):
  save(tmp_path / 'scout', dataset(noise((40, 50)), ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']))
  with pytest.raises(DataError, match=r'EMPTY_DIR .*no readable volume \(found 1 DICOM localizer; volumes end in '
                     '.nii.gz, .*or are DICOM.*FIX: point data.ct at a folder with volumes'):
    sources.CTFolder(str(tmp_path))


@pytest.mark.realdata
def test_the_shared_folder(shared):
  found = readers.discover(f'{shared}/data/odd,{shared}/data/ct', 'volume')
  assert sum(i.format == 'nifti' for i in found.items) == 20 + 17 + 6    # air is one sample
  assert sum(i.format == 'dicom' for i in found.items) == 8
  assert found.others == '2 *.png, 2 *.zip, 2 DICOM radiograph, 2 DICOM reformat' and not found.faults
  rays = readers.discover(f'{shared}/data/odd', 'image')
  assert len(rays.items) == 4 and all(readers.image(i).array.ndim == 2 for i in rays.items)
