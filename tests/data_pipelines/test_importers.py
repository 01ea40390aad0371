"""Every importer on small trees, the faults of lists, and the real label tables."""
import csv
import json
import os
import random

import numpy as np
import pytest
from etils import epath
from PIL import Image

from data_pipelines import importers, manifest
from data_pipelines.errors import DataError
from tests.data_pipelines.dicom_files import dataset, noise, save


def make(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'x')
  return folder


def brief(rows, *keys):
  return [tuple(r.get(k) for k in keys) for r in rows]


# ---- folders

def test_a_folder(tmp_path):
  root = make(tmp_path / 'hospital', 'a/1.nii.gz', 'b/2.hdr', 'b/2.img', 'c.png', 'notes.txt', '.hidden.png')
  got = importers.rows(root)
  assert brief(got, 'id', 'kind', 'subject') == [
      ('hospital/a/1.nii.gz', 'volume', 'a/1.nii.gz'), ('hospital/b/2.hdr', 'volume', 'b/2.hdr'),
      ('hospital/c.png', 'image', 'c.png')]
  assert all(os.path.isfile(r['path']) and r['dataset'] == 'hospital' and r['status'] == 'ok' for r in got)
  assert brief(importers.rows(root, kind='image', dataset='x'), 'id') == [('x/c.png',)]
  assert brief(importers.rows(f'{root}/*/*.nii.gz'), 'id') == [('a/1.nii.gz',)]    # the folder of all that match


def test_who_the_subject_is(tmp_path):
  root = make(tmp_path / 'x', 'p1/s1/a.png', 'p2/s1/b.png', 'c_dep0.nii.gz', 'c_dep12.nii.gz')
  subjects = lambda how: [r['subject'] for r in importers.rows(root, subject_from=how)]
  assert subjects('file') == ['c.nii.gz', 'c.nii.gz', 'p1/s1/a.png', 'p2/s1/b.png']    # tiles of one volume
  assert subjects('folder') == ['c.nii.gz', 'c.nii.gz', 's1', 's1']
  assert subjects('^(p[0-9]|c)') == ['c', 'c', 'p1', 'p2']
  for how, message in (('^(p[0-9])', 'c_dep0.nii.gz: subject_from .* does not match c_dep0'), ('p[0-9]', '0 groups'),
                       ('(', 'subject_from')):
    with pytest.raises(DataError, match=f'IMPORT .*{message}'):
      subjects(how)


def test_dicom_series_are_volumes(tmp_path):
  """One in a folder goes by the folder, several by their ids; a radiograph is an image."""
  root = tmp_path / 'pacs'
  for k in range(2):
    save(root / f'p/1/IM{k}', dataset(noise((4, 4)), ImagePositionPatient=[0, 0, 5 * k]))
    for uid in ('1.5', '1.6'):
      save(root / f'p/2/{uid}-{k}', dataset(noise((4, 4)), ImagePositionPatient=[0, 0, 5 * k], SeriesInstanceUID=uid))
  save(root / 'q/x', dataset(noise((4, 4)), kind='CR'))
  got = importers.rows(root)
  assert brief(got, 'id', 'kind') == [
      ('pacs/p/1', 'volume'), ('pacs/p/2::1.5', 'volume'), ('pacs/p/2::1.6', 'volume'), ('pacs/q/x', 'image')]
  assert brief(importers.rows(root / 'p/1'), 'id', 'path') == [('1/1', str(root / 'p/1'))]


def test_a_folder_without_images(tmp_path):
  with pytest.raises(DataError, match='EMPTY_DIR .*found 2 [*].dcm'):
    importers.rows(make(tmp_path, 'a.dcm', 'b.dcm'))
  with pytest.raises(DataError, match='EMPTY_DIR'):
    importers.rows(tmp_path / 'none')


def test_an_object_store(memory):
  for name in ('x/a.nii.gz', 'x/b.png'):
    (epath.Path(memory) / name).parent.mkdir(parents=True, exist_ok=True)
    (epath.Path(memory) / name).write_bytes(b'x')
  assert brief(importers.rows(f'{memory}/x'), 'id', 'path') == [
      ('x/a.nii.gz', f'{memory}/x/a.nii.gz'), ('x/b.png', f'{memory}/x/b.png')]
  epath.Path(f'{memory}/x/l.csv').write_text('image,finding\nb.png,mass\n')
  assert brief(importers.rows(f'{memory}/x/l.csv'), 'path', 'label') == [(f'{memory}/x/b.png', {'mass': 1})]
  epath.Path(f'{memory}/x/l.csv').write_text('image\nb.png\nc.png\n')
  with pytest.raises(DataError, match=r'l.csv line 3: memory://bucket/x/c.png is not there \(1 of 2'):
    importers.rows(f'{memory}/x/l.csv')


def test_bids(tmp_path):
  root = make(tmp_path / 'study', 'sub-01/ses-a/ct/sub-01_ses-a_ct.nii.gz', 'sub-01/ses-b/ct/sub-01_ses-b_ct.nii.gz',
              'sub-02/anat/sub-02_T1w.nii.gz', 'sub-02/anat/sub-02_dseg.nii.gz', 'sub-02/func/sub-02_bold.nii.gz',
              'sub-02/anat/sub-02_T1w.json', 'derivatives/sub-02/anat/sub-02_T1w.nii.gz')
  assert brief(importers.rows(root), 'id', 'subject', 'study') == [
      ('study/sub-01/ses-a/ct/sub-01_ses-a_ct.nii.gz', 'sub-01', 'ses-a'),
      ('study/sub-01/ses-b/ct/sub-01_ses-b_ct.nii.gz', 'sub-01', 'ses-b'),
      ('study/sub-02/anat/sub-02_T1w.nii.gz', 'sub-02', None)]


NNUNET = {'channel_names': {'0': 'CT', '1': 'PET'}, 'labels': {'background': 0, 'tumour': 1}, 'numTraining': 2,
          'file_ending': '.nii.gz'}


def nnunet(tmp_path, **changes):
  root = make(tmp_path / 'Dataset007_Lung', *(f'images{p}/{c}_000{i}.nii.gz' for i in (0, 1) for p, c in (
      ('Tr', 'lung_001'), ('Tr', 'lung_2'), ('Ts', 'lung_003'))),
              'labelsTr/lung_001.nii.gz', 'labelsTr/lung_2.nii.gz')
  (root / 'dataset.json').write_text(json.dumps(NNUNET | changes))
  return root


def test_nnunet(tmp_path):
  root = nnunet(tmp_path)
  got = importers.rows(root)
  assert brief(got, 'id', 'subject', 'split') == [
      (f'Dataset007_Lung/images{p}/{c}_000{i}.nii.gz', c, s) for p, c, s in (
          ('Tr', 'lung_001', 'train'), ('Tr', 'lung_2', 'train'), ('Ts', 'lung_003', 'test')) for i in (0, 1)]
  assert got[0]['mask'] == str(root / 'labelsTr/lung_001.nii.gz') and 'mask' not in got[-1]
  assert importers.rows(root / 'dataset.json') == got == importers.rows(root, 'nnunet')


@pytest.mark.parametrize('changes, message', [
    ({'channel_names': []}, 'channel_names: missing or not an object'),
    ({'numTraining': '2'}, 'numTraining: missing'),
    ({'file_ending': None}, 'file_ending: missing'), ({'numTraining': 3}, 'numTraining: is 3, imagesTr has 2 cases'),
    ({'channel_names': {'0': 'CT'}}, 'imagesTr/lung_001: 2 files for 1 channels'),
    ({'file_ending': '.gz'}, 'lung_001_0000.nii.gz: is not named CASE_0000')])
def test_faults_of_nnunet(tmp_path, changes, message):
  with pytest.raises(DataError, match=f'IMPORT .*dataset.json .*{message}'):
    importers.rows(nnunet(tmp_path, **changes))


# ---- lists

def test_csv_with_findings(tmp_path):
  make(tmp_path / 'set', 'img/a b.png', 'img/c.png', 'img/d.jpg')
  file = tmp_path / 'set/list.csv'
  file.write_bytes('\ufeffPatient ID;Image Index;Split;Mass;Nodule;Age;sex;status;Empty\r\n'
                   '007;"img/a b.png";training;1;0;61;1;alive;\r\n\r\n'
                   '007;img/c.png;Valid;0;;1;0;"two\nlines; quoted";\r\n8;img\\d.jpg;;-1;1.0;0;1;;\r\n'.encode())
  got = importers.rows(file)
  assert brief(got, 'id', 'subject', 'split', 'label') == [
      ('set/img/a b.png', '007', 'train', {'Mass': 1, 'Nodule': 0}), ('set/img/c.png', '007', 'val', {'Mass': 0}),
      ('set/img/d.jpg', '8', None, {'Nodule': 1})]
  assert brief(got, 'sex', 'Age', 'source_status', 'Empty') == [
      ('1', '61', 'alive', None), ('0', '1', 'two\nlines; quoted', None), ('1', '0', None, None)]
  only = importers.rows(file, labels=['sex'])
  assert [r['label'] for r in only] == [{'sex': 1}, {'sex': 0}, {'sex': 1}] and only[0]['Mass'] == '1'


@pytest.mark.parametrize('cells, labels', [
    (['3', '', '0'], [{'class_3': 1}, None, {'class_0': 1}]),
    (['mass|node', 'No Finding', ''], [{'mass': 1, 'node': 1}, {'mass': 0, 'node': 0}, None]),
    (['COVID-19, ARDS', 'Lipoid', 'ARDS'], [{'ARDS': 1, 'COVID-19': 1, 'Lipoid': 0}, {'ARDS': 0, 'COVID-19': 0,
                                            'Lipoid': 1}, {'ARDS': 1, 'COVID-19': 0, 'Lipoid': 0}]),
    (['No Finding', '', ''], [None, None, None])])
def test_csv_with_one_label_column(tmp_path, cells, labels):
  make(tmp_path, '0.png', '1.png', '2.png')
  with open(tmp_path / 'l.tsv', 'w', newline='') as f:
    csv.writer(f, delimiter='\t').writerows([('file', 'finding'), *((f'{i}.png', c) for i, c in enumerate(cells))])
  assert [r.get('label') for r in importers.rows(tmp_path / 'l.tsv')] == labels


def test_csv_with_the_other_fields(tmp_path):
  make(tmp_path / 'd', 'a.nii.gz', 'm.nii.gz')
  (tmp_path / 'd/l.csv').write_text('path,id,group,study,view,report,license,shape,spacing_mm,mask,orient\n'
                                    'a.nii.gz,one,g,s,PA,clear,CC0,512x512x41,"[.8, .8, 5]",m.nii.gz,LPS\n')
  got, = importers.rows(tmp_path / 'd/l.csv')
  assert got == {'id': 'd/one', 'kind': 'volume', 'path': str(tmp_path / 'd/a.nii.gz'), 'dataset': 'd',
                 'status': 'ok', 'subject': 'a.nii.gz', 'group': 'd/g', 'study': 's', 'view': 'PA', 'text': 'clear',
                 'licence': 'CC0',
                 'shape': [512, 512, 41], 'spacing': [.8, .8, 5], 'mask': str(tmp_path / 'd/m.nii.gz'),
                 'source_orient': 'LPS'}


def test_where_relative_paths_begin(tmp_path):
  make(tmp_path, 'data/set/a.png', 'data/lists/x')
  file = tmp_path / 'data/lists/l.csv'
  file.write_text('image\nset/a.png\n')
  above, = importers.rows(file)    # found in the folder above the list
  given, = importers.rows(file, root=tmp_path / 'data', dataset='s')
  assert above['path'] == given['path'] == str(tmp_path / 'data/set/a.png')
  assert (above['id'], given['id']) == ('lists/set/a.png', 's/set/a.png')
  file.write_text(f'image\n{tmp_path}/data/set/a.png\n')
  assert importers.rows(file)[0]['id'] == f'lists{tmp_path}/data/set/a.png'
  assert importers.rows(file, root=str(tmp_path))[0]['id'] == 'lists/data/set/a.png'


@pytest.mark.parametrize('text, message', [
    ('name,age\na.png,3\n', 'line 1: no column with the path .found name, age.'), ('', 'ZERO_BYTES'),
    ('\n\n', 'line 1'), ('image\n', 'names no files'), ('image,x\na.png\n', 'line 2: 1 columns, the header has 2'),
    ('image,x,x\na.png,1,1\n', 'two columns have one name'),
    ('image\na.png\nno.png\nnot.png\n', 'line 3: .*no.png is not there .2 of 3 are missing'),
    ('image\na.png\n./a.png\n', 'line 3: id "d/a.png" occurs twice, first at .* line 2'),
    ('image\n../../etc/passwd\n', 'line 2: ../../etc/passwd leads out of'), ('image,x\n,1\n', "line 2: path is ''"),
    ('image,split\na.png,holdout\n', "line 2: split is 'holdout'"), ('image\n"a.png\n', 'line 2: unexpected end'),
    ('image,shape\na.png,0.5x2\n', 'line 2: shape is'),
    ('image\nnotes.xyz\n', 'line 2: .*may be a volume or an image'), (b'image\n\xff.png\n', 'not UTF-8 .byte 6')])
def test_faults_of_csv(tmp_path, text, message):
  folder = make(tmp_path / 'd', 'a.png', 'notes.xyz')
  (folder / 'l.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(DataError, match=message) as e:
    importers.rows(folder / 'l.csv')
  assert 'l.csv' in str(e.value) and '\n' not in str(e.value)
  assert e.value.code == ('IMPORT' if text else 'ZERO_BYTES')


def test_wanted_columns_are_checked(tmp_path):
  make(tmp_path, 'a.png')
  (tmp_path / 'l.csv').write_text('image,mass\na.png,many\n')
  for labels, message in ((['mass'], 'line 2: mass is "many"'), (['x'], 'no column "x"')):
    with pytest.raises(DataError, match=message):
      importers.rows(tmp_path / 'l.csv', labels=labels)


def test_decathlon_and_monai_lists(tmp_path):
  root = make(tmp_path / 'Task09', 'imagesTr/1.nii.gz', 'labelsTr/1.nii.gz', 'imagesTr/2.nii.gz', 'imagesTs/3.nii.gz',
              'mod/4a.nii.gz', 'mod/4b.nii.gz', 'labelsTr/4.nii.gz')
  (root / 'dataset.json').write_text(json.dumps({
      'name': 'Spleen', 'modality': {'0': 'CT'}, 'numTraining': 2, 'channel_names': {},
      'training': [{'image': './imagesTr/1.nii.gz', 'label': './labelsTr/1.nii.gz', 'fold': 0},
                   {'image': [['mod/4a.nii.gz'], 'mod/4b.nii.gz'], 'label': 'labelsTr/4.nii.gz', 'patient': 4}],
      'validation': [{'image': 'imagesTr/2.nii.gz', 'label': 1}], 'test': ['./imagesTs/3.nii.gz']}))
  got = importers.rows(root)
  assert brief(got, 'id', 'subject', 'split', 'label') == [
      ('Spleen/imagesTr/1.nii.gz', 'imagesTr/1.nii.gz', 'train', None), ('Spleen/mod/4a.nii.gz', '4', 'train', None),
      ('Spleen/mod/4b.nii.gz', '4', 'train', None),
      ('Spleen/imagesTr/2.nii.gz', 'imagesTr/2.nii.gz', 'val', {'class_1': 1}),
      ('Spleen/imagesTs/3.nii.gz', 'imagesTs/3.nii.gz', 'test', None)]
  assert got[0]['mask'] == str(root / 'labelsTr/1.nii.gz') and got[0]['fold'] == 0
  assert got[1]['mask'] == got[2]['mask'] == str(root / 'labelsTr/4.nii.gz')


def test_lists_of_image_shape_and_spacing(tmp_path):
  make(tmp_path, 'a.nii.gz', 'b.nii.gz')
  items = [{'image': str(tmp_path / 'a.nii.gz'), 'shape': [512, 512, 90], 'spacing': [.7, .7, 1.25], 'label': 'lung'},
           {'image': 'b.nii.gz', 'shape': [4, 4, 4], 'spacing': [1, 1, 1], 'label': 'liver'}]
  (tmp_path / 'l.json').write_text(json.dumps(items))
  got = importers.rows(tmp_path / 'l.json')
  assert brief(got, 'shape', 'spacing', 'split') == [([512, 512, 90], [.7, .7, 1.25], None), ([4] * 3, [1] * 3, None)]
  assert [r['label'] for r in got] == [{'liver': 0, 'lung': 1}, {'liver': 1, 'lung': 0}]
  assert got == importers.rows(tmp_path / 'l.json', '3dino')


@pytest.mark.parametrize('data, message', [
    ('{', 'not JSON'), ('3', 'neither a list nor an object'), ('{"a": []}', 'none of the keys training'),
    ('[' * 100000, 'not JSON'), ('[]', 'names no files'), ('{"training": {}}', 'training: is not a list'),
    ('{"training": ["a.png", {"label": 1}]}', r'training\[1\]: has no image'), ('[[]]', r'\[0\]: has no image'),
    ('[3]', r'\[0\]: has no image'), ('[{"image": [1]}]', 'has no image'),
    ('["b.png"]', r'\[0\]: .*b.png is not there'),
    ('{"test": [{"image": "a.png", "label": "x.png"}]}', r'test\[0\]: .*x.png is not there'),
    ('[{"image": "a.png", "label": ["a.png", "a.png"]}]', '2 label maps for 1 images'),
    ('[{"image": "a.png", "label": [0, 2]}]', r'\[0\]: label is \[0, 2\]'), ('["../../a.png"]', 'leads out of'),
    ('[{"image": "a.png", "spacing": [1, NaN]}]', r'\[0\]: spacing is'), ('["a\\u0000.png"]', r'\[0\]: path is'),
    ('[{"image": "a.png", "subject": {}}]', 'subject is'), ('["\\ud800.png"]', 'path is')])
def test_faults_of_datalists(tmp_path, data, message):
  folder = make(tmp_path / 'd', 'a.png')
  (folder / 'l.json').write_text(data)
  with pytest.raises(DataError, match=f'^IMPORT .*l.json.*{message}'):
    importers.rows(folder / 'l.json')


def test_released_path_lists(tmp_path):
  make(tmp_path, 'CT/1_dep0.nii.gz', 'CT/1_dep1.nii.gz', 'xr/a b 1.png', 'xr/c.png', 'xr/m.png')
  (tmp_path / '3D_images.txt').write_text('CT/1_dep0.nii.gz\r\nCT/1_dep1.nii.gz\r\n\r\n')
  got = importers.rows(tmp_path / '3D_images.txt', dataset='dl')
  assert brief(got, 'id', 'subject') == [(f'dl/CT/1_dep{i}.nii.gz', 'CT/1.nii.gz') for i in (0, 1)]
  (tmp_path / '2D_images.txt').write_text('# comment\nxr/a b 1.png\nxr/c.png xr/m.png\nxr/m.png 3\n')
  assert brief(importers.rows(tmp_path / '2D_images.txt', dataset='x'), 'id', 'label', 'mask') == [
      ('x/xr/a b 1.png', None, None), ('x/xr/c.png', None, str(tmp_path / 'xr/m.png')),
      ('x/xr/m.png', {'class_3': 1}, None)]
  (tmp_path / '2D_images.txt').write_text('xr/c.png\nxr/d.png\n')
  with pytest.raises(DataError, match='2D_images.txt line 2: .*d.png is not there'):
    importers.rows(tmp_path / '2D_images.txt')


def test_our_own_manifest(tmp_path):
  rows = importers.rows(make(tmp_path / 'set', 'a.nii.gz', 'b.png'))
  manifest.write(tmp_path / 'set', rows)
  got = importers.rows(tmp_path / 'set')
  assert got == [r | {'group': f'set/{r["subject"]}'} for r in rows]
  assert importers.rows(tmp_path / 'set/manifest.jsonl') == got


def test_formats_and_kinds_are_checked(tmp_path):
  for options, message in ((dict(format='xml'), "format is 'xml'"), (dict(kind='film'), "kind is 'film'")):
    with pytest.raises(DataError, match=message):
      importers.rows(tmp_path, **options)
  with pytest.raises(DataError, match='SCHEME'):
    importers.rows('ftp://x/y')


def test_ids_of_two_data_sets_do_not_meet(tmp_path):
  rows = [r for name in 'ab' for r in importers.rows(make(tmp_path / name, '1.png', '2.png'))]
  manifest.write(tmp_path, rows)
  assert [r['id'] for r in manifest.read(tmp_path, labelled=False)] == ['a/1.png', 'a/2.png', 'b/1.png', 'b/2.png']


def test_damaged_lists_give_one_line(tmp_path):
  """Random edits of a CSV, a datalist and a dataset.json, 150 each: rows, or a DataError."""
  root = nnunet(tmp_path)
  make(root, 'a.png', 'b.png')
  (root / 'l.csv').write_text('image,patient,split,shape,finding,x,y\na.png,1,train,2x3,mass|node,0,1\n'
                              'b.png,2,test,"4, 5",,1,1\n')
  (root / 'l.json').write_text(json.dumps({'training': [
      {'image': 'a.png', 'label': {'mass': 1}, 'shape': [3, 4], 'subject': 1}, 'b.png'], 'test': [
          {'image': ['imagesTs/lung_003_0000.nii.gz'], 'label': ['labelsTr/lung_2.nii.gz'], 'spacing': [1, 1, 2]}]}))
  rng, failed = random.Random(0), 0
  for name in ('l.csv', 'l.json', 'dataset.json'):
    good = (root / name).read_bytes()
    assert importers.rows(root / name)
    for _ in range(150):
      data = bytearray(good)
      for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        cut = rng.choice([0, 1, rng.randint(1, 15)])
        data[at:at + cut] = rng.choice([b'', b'"', b',', b'\n', b'\x00', b'\xff', b'{}', b'[', b']', b'null', b'-1',
                                        b'../', b'\\ud800', b'1e999', b'NaN', bytes([rng.randrange(256)])])
      (root / name).write_bytes(data)
      try:
        manifest.write(tmp_path / 'out', importers.rows(root / name))
        manifest.read(tmp_path / 'out', labelled=False)
      except DataError as e:
        assert '\n' not in str(e)
        failed += 1
    (root / name).write_bytes(good)
  assert failed > 200


def test_names_of_data_sets_are_printable(tmp_path):
  rows = importers.rows(make(tmp_path / 'a\nb', 'x.png'))
  assert rows[0]['id'] == 'a_b/x.png'


# ---- real tables

@pytest.mark.realdata
def test_chest_x_ray_14(shared):
  file = shared / 'data/cxr/nih/labels.csv'
  got = importers.rows(file)
  with open(file) as f:
    truth = list(csv.DictReader(f))
  names = list(truth[0])[-14:]
  assert names[0] == 'Atelectasis' and names[-1] == 'Hernia' and len(got) == 91
  for row, line in zip(got, truth):
    assert row['label'] == {n: int(line[n]) for n in names}
    assert {n for n, v in row['label'].items() if v} == set(line['labels'].split('|')) - {'No Finding'}
    assert (row['subject'], row['view'], row['kind']) == (line['patient'], line['view'], 'image')
    assert row['path'] == str(shared / 'data' / line['image']) and 'age' not in row['label']
  assert len({r['subject'] for r in got}) == 83


@pytest.mark.realdata
def test_covid_table(shared):
  got = importers.rows(shared / 'data/cxr/covid/labels.csv')
  assert len(got) == 78 and len({r['subject'] for r in got}) == 47
  assert sum(r['label']['COVID-19'] for r in got) >= 30 and all(r['licence'] and r['url'] for r in got)
  assert np.asarray(Image.open(got[0]['path'])).size


@pytest.mark.realdata
def test_folder_of_scans(shared):
  got = importers.rows(shared / 'data/ct')
  nifti = [r for r in got if r['path'].endswith('.nii.gz')]      # the others are DICOM slices
  assert len(nifti) == 23 and len(got) == 30 and all(r['kind'] == 'volume' for r in got)
  assert len({r['subject'] for r in nifti}) == 19    # six tiles of two DeepLesion volumes
