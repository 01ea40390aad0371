"""data.manifest: the list that the doctor wrote, or the one beside prepared shards, says what is trained on."""
import collections
import hashlib
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from configs import unimiss_plus
from data_pipelines import doctor, manifest, prepare, prepared, sources, splits, streams
from data_pipelines.errors import DataError

SPLIT = {'4.nii': 'val', '5.nii': 'test', '3.png': 'val'}      # the rest is of train


def scan(i):
  """[R, A, S]: two tiles."""
  return np.random.default_rng(i).integers(-1000, 1000, (20, 18, 30)).astype(np.int16)


@pytest.fixture
def folder(tmp_path):
  """Six scans, four pictures, a broken file; the doctor's list of them in `list`."""
  where = tmp_path / 'files'
  where.mkdir()
  for i in range(6):
    nib.save(nib.Nifti1Image(scan(i), np.diag([2., 2., 3., 1.])), where / f'{i}.nii')
  for i in range(4):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 36)).astype(np.uint8)).save(where / f'{i}.png')
  (where / 'cut.nii').write_bytes((where / '0.nii').read_bytes()[:9000])
  rows = doctor.examine(where, workers=0).rows
  said = {r['id']: SPLIT.get(r['id'].partition('/')[2], 'train') for r in rows}
  manifest.write(tmp_path / 'list', splits.assign(rows, override=said))
  return tmp_path


def config(path, **data):
  c = unimiss_plus.get_config('phantom')
  with c.unlocked():
    c.data.manifest = str(path)
    c.data.update(data)
    c.batch.ct = c.batch.xray = 2
    c.views.ct.size, c.views.drr.size, c.views.xray.size = (8, 16, 16), 16, 16
  return c


def build(path, names=None, **data):
  built = streams.build(config(path, **data), names)
  for stream in built.values():
    stream.close()
  return built


def contents(source):
  """How often which voxels."""
  field = 'volume' if 'volume' in source[0] else 'image'
  return collections.Counter(hashlib.blake2b(source[i][field]).hexdigest() for i in range(len(source)))


def edit(path, change):
  """Passes every row through change(row); rows that it turns to None go."""
  rows = [change(r) for r in manifest.read(path, labelled=False)]
  manifest.write(path, [r for r in rows if r])


def test_files_of_the_training_split_and_no_others(folder, capsys):
  built = build(folder / 'list')
  ct, xray = built['ct'].source, built['xray'].source
  assert isinstance(ct, sources.CTFolder) and isinstance(xray, sources.XrayFolder)
  assert [ct[i]['name'] for i in range(len(ct))] == [f'files/{i}.nii z{z}' for i in range(4) for z in (0, 6)]
  assert [xray[i]['name'] for i in range(3)] == [f'files/{i}.png' for i in range(3)] and len(xray) == 3
  for i in range(8):
    np.testing.assert_array_equal(ct[i]['volume'], scan(i // 2).transpose(2, 1, 0)[6 * (i % 2):][:24])
  groups = [ct[i]['group'] for i in range(8)]
  assert groups[::2] == groups[1::2] and len(set(groups)) == 4 and max(groups) < 2**31
  said = capsys.readouterr().err
  assert 'data.manifest, volumes: 4 files, 4 usable, 8 records' in said and 'cut.nii' not in said
  assert built['ct'].manifest.digest == manifest.meta(folder / 'list')['hash']
  assert build(folder / 'list' / 'manifest.jsonl', ['xray'])['xray'].digest == built['xray'].digest


def test_rows_of_one_group_share_their_number(folder):
  edit(folder / 'list', lambda r: r | {'group': 'one'} if r['id'] in ('files/0.nii', 'files/2.nii') else r)
  ct = build(folder / 'list', ['ct'])['ct'].source
  groups = [ct[i]['group'] for i in range(0, 8, 2)]
  assert groups[0] == groups[2] and len(set(groups)) == 3


def test_prepared_shards_are_read_by_the_same_leaf(folder, capsys):
  """The same records as from the files, and as from data.ct and data.xray."""
  raw, out = build(folder / 'list'), folder / 'out'
  assert prepare.main([str(folder / 'list'), f'--out={out}', '--workers=0', '--num_shards=2']) == 0
  capsys.readouterr()
  ready = build(out)
  assert isinstance(ready['ct'].source, prepared.PreparedCT)
  assert isinstance(ready['xray'].source, prepared.PreparedXray)
  assert 'data.manifest, ct: 8 records of 2 shards' in capsys.readouterr().err
  plain = streams.build(config('', ct=str(out), xray=str(out)))
  for name, stream in ready.items():
    plain[name].close()
    assert contents(stream.source) == contents(raw[name].source) == contents(plain[name].source)
    assert stream.digest == plain[name].digest
    assert sorted(r['id'] for r in stream.listing()) == sorted(r['id'] for r in raw[name].listing())
  assert {r['name']: r['group'] for r in map(ready['ct'].source.__getitem__, range(8))} == {
      r['name']: r['group'] for r in map(raw['ct'].source.__getitem__, range(8))}


def test_a_row_that_is_excluded_later_is_not_read_from_its_shard(folder):
  out, lost = folder / 'out', 'files/1.nii z6'
  assert prepare.main([str(folder / 'list'), f'--out={out}', '--workers=0']) == 0
  before = build(out, ['ct'])['ct']
  meta = (out / 'manifest.meta.json').read_text()
  rows = (out / 'manifest.jsonl').read_text().splitlines()
  changed = [json.dumps(json.loads(r) | ({'status': 'excluded'} if json.loads(r)['id'] == lost else {})) for r in rows]
  (out / 'manifest.jsonl').write_text('\n'.join(changed))
  assert (out / 'manifest.meta.json').read_text() == meta
  stream = build(out, ['ct'])['ct']
  names = [stream.source[i]['name'] for i in range(len(stream.source))]
  assert len(names) == 7 and lost not in names and stream.digest != before.digest
  assert contents(before.source) - contents(stream.source) == {
      hashlib.blake2b(np.ascontiguousarray(scan(1).transpose(2, 1, 0)[6:])).hexdigest(): 1}
  assert manifest.changes(before.manifest.listing(), stream.manifest.listing()) == f'1 changed status: {lost}'
  (out / 'manifest.jsonl').write_text('\n'.join(rows).replace('"split": "val"', '"split": "train"'))
  with pytest.raises(DataError, match=r"MANIFEST .*files/4.nii z0 is said to be \['ct-val.array_record-00000-of-00001"
                                      r"', 0\], which is no record of ct in split train. FIX: prepare"):
    build(out, ['ct'])


def test_a_file_that_changed_since_the_doctor_saw_it(folder, capsys):
  """Scans are compared at the start, pictures when they are first read; prepare leaves both out."""
  shutil.copy(folder / 'files' / '5.nii', folder / 'files' / '1.nii')
  Image.fromarray(np.zeros((40, 36), np.uint8)).save(folder / 'files' / '1.png')
  built = build(folder / 'list')
  ct, xray = built['ct'].source, built['xray'].source
  assert [r['id'] for r in ct.listing()][::2] == [f'files/{i}.nii' + ' z0' for i in (0, 2, 3)]
  assert xray[1]['bad'] and xray[1]['name'] == 'files/2.png' and not xray[0]['bad']
  told = capsys.readouterr().err
  for name, end in (('1.nii', 'skipped'), ('1.png', 'replaced by the next good record')):
    assert f'WARN CHANGED {folder}/files/{name}: its content has the hash' in told and f'; {end}. FIX: bring' in told
  with pytest.raises(DataError, match='CHANGED .*1.nii: '):
    build(folder / 'list', on_bad_file='stop')
  assert prepare.main([str(folder / 'list'), f'--out={folder / "out"}', '--workers=0']) == 0
  lost = {r['id']: r['findings'] for r in manifest.read(folder / 'out', labelled=False) if r['status'] == 'excluded'}
  assert lost == {'files/1.nii': ['CHANGED'], 'files/1.png': ['CHANGED'], 'files/cut.nii': ['TRUNCATED']}


def test_what_a_list_must_have(folder):
  with pytest.raises(DataError, match='UNREADABLE .*nowhere'):
    build(folder / 'nowhere')
  edit(folder / 'list', lambda r: r if r['kind'] == 'volume' or r['split'] != 'train' else None)
  assert list(build(folder / 'list', ['ct'])) == ['ct']
  with pytest.raises(DataError, match=r'SPLIT_EMPTY .*manifest.jsonl: no usable image in split train \(1 val\). FIX: '
                                      'give it some, or set phases.xray=0'):
    build(folder / 'list')
  edit(folder / 'list', lambda r: {k: v for k, v in r.items() if k != 'split'} if r['kind'] == 'volume' else None)
  with pytest.raises(DataError, match=r'no usable volume in split train \(1 excluded, 6 without split\)'):
    build(folder / 'list')


def test_a_file_that_is_gone_costs_its_own_records(folder, capsys):
  (folder / 'files' / '2.nii').unlink()
  assert len(build(folder / 'list', ['ct'])['ct'].source) == 6
  assert 'WARN UNREADABLE' in capsys.readouterr().err
