"""The manifest on disk: round trip, hash, what changed, and damaged files."""
import json
import os
import random

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

import unimiss_jax
from data_pipelines import files, manifest
from data_pipelines.errors import DataError

ROWS = [
    {'id': 'b/2', 'path': '/data/b/2.nii.gz', 'kind': 'volume', 'dataset': 'b', 'subject': 'p', 'group': 'b/p',
     'split': 'train', 'shape': [512, 512, 41], 'spacing': [.8, .8, 5.], 'orient': 'LPS', 'hu_min': -3024,
     'sha': 'aa', 'status': 'warn', 'findings': ['HU_PADDING'], 'licence': 'CC BY 4.0', 'mask': '/data/b/m.nii.gz'},
    {'id': 'a/1', 'path': '/data/a/1.png', 'kind': 'image', 'dataset': 'a', 'subject': '7', 'group': 'a/7',
     'split': 'val', 'label': {'nodule': 1, 'mass': 0}, 'view': 'PA', 'text': 'clear\u2028lungs', 'sha': 'bb',
     'status': 'ok', 'url': 'https://x.org/1', 'age': 61},
    {'id': 'a/2', 'path': '/elsewhere/2.png', 'kind': 'image', 'group': 'a/2', 'sha': 'cc', 'status': 'excluded',
     'findings': ['CONSTANT', 'MODE']}]


def by_id(rows):
  return sorted(rows, key=lambda r: r['id'])


# ---- round trip

def test_rows_come_back_sorted_and_complete(tmp_path):
  written = manifest.write(tmp_path, ROWS, root='/data', config={'spacing': None}, note='x')
  assert manifest.read(tmp_path, labelled=False) == by_id(ROWS)
  lines = [json.loads(line) for line in (tmp_path / 'manifest.jsonl').read_text().splitlines()]
  assert [r['path'] for r in lines] == ['a/1.png', '/elsewhere/2.png', 'b/2.nii.gz']
  assert lines[2]['mask'] == 'b/m.nii.gz'
  assert list(lines[0])[:3] == ['id', 'kind', 'path']
  about = manifest.meta(tmp_path)
  assert about['rows'] == 3 and about['hash'] == written == manifest.digest(ROWS) and about['root'] == '/data'
  assert about['version'] == unimiss_jax.__version__ and about['note'] == 'x' and about['config'] == {'spacing': None}
  assert len(about['config_hash']) == 32 and about['created'].endswith('+00:00')
  assert sorted(os.listdir(tmp_path)) == ['manifest.jsonl', 'manifest.meta.json']


def test_writing_twice_gives_the_same_bytes(tmp_path):
  manifest.write(tmp_path / 'a', ROWS, root='/data')
  manifest.write(tmp_path / 'b', manifest.read(tmp_path / 'a', labelled=False)[::-1], root='/data')
  assert (tmp_path / 'a/manifest.jsonl').read_bytes() == (tmp_path / 'b/manifest.jsonl').read_bytes()


def test_without_a_root_folder_and_files_move_together(tmp_path):
  rows = [{'id': 'x', 'path': str(tmp_path / 'old/ct/x.nii'), 'kind': 'volume'}]
  manifest.write(tmp_path / 'old', rows)
  os.rename(tmp_path / 'old', tmp_path / 'new')
  assert manifest.read(tmp_path / 'new', labelled=False)[0]['path'] == f'{tmp_path}/new/ct/x.nii'


def test_the_root_may_be_overruled(tmp_path):
  manifest.write(tmp_path, ROWS, root='/data')
  rows = manifest.read(tmp_path / 'manifest.jsonl', labelled=False, root='/mnt')
  assert [r['path'] for r in rows] == ['/mnt/a/1.png', '/elsewhere/2.png', '/mnt/b/2.nii.gz']


def test_object_stores(memory):
  rows = [{'id': 'x', 'path': f'{memory}/data/ct/x.nii', 'kind': 'volume', 'split': 'train'}]
  for _ in range(2):    # the second one replaces the first
    manifest.write(f'{memory}/prepared', rows, root=f'{memory}/data')
  assert manifest.read(f'{memory}/prepared', labelled=False)[0]['path'] == rows[0]['path']
  assert '"ct/x.nii"' in epath.Path(f'{memory}/prepared/manifest.jsonl').read_text()
  assert len(list(epath.Path(f'{memory}/prepared').iterdir())) == 2


def test_arrays_and_tuples_are_written_as_lists(tmp_path):
  row = {'id': 'x', 'path': '/x.nii', 'kind': 'volume', 'shape': np.array([3, 4, 5]),
         'spacing': (1., np.float32(2), 3), 'hu_min': np.int16(-5), 'sha': None}
  manifest.write(tmp_path, [row])
  got, = manifest.read(tmp_path, labelled=False)
  assert got['shape'] == [3, 4, 5] and got['spacing'] == [1, 2, 3] and got['hu_min'] == -5 and 'sha' not in got


def test_a_failed_write_leaves_the_old_manifest(tmp_path, monkeypatch):
  manifest.write(tmp_path, ROWS)
  def full(*_):
    raise OSError(28, 'disk full')
  monkeypatch.setattr(type(epath.Path(tmp_path)), 'replace', full)
  with pytest.raises(DataError, match='WRITE .*disk full'):
    manifest.write(tmp_path, ROWS[:1])
  monkeypatch.undo()
  assert len(manifest.read(tmp_path, labelled=False)) == 3
  assert sorted(os.listdir(tmp_path)) == ['manifest.jsonl', 'manifest.meta.json']


@pytest.mark.parametrize('rows, message', [
    ([], 'no rows'), (ROWS[:1] * 2, 'id "b/2" occurs twice'), ([{'path': 'x'}], 'row x: kind is None'),
    ([{'path': 'x', 'kind': 'image', 'hu_min': float('nan')}], 'row x: cannot be written'),
    ([{'path': 'x', 'kind': 'image', 'y': object()}], 'row x: cannot be written'),
    ([{'path': 'x', 'kind': 'image', 'id': 'a\nb'}], 'expected a printable name')])
def test_rows_that_cannot_be_read_again_are_not_written(tmp_path, rows, message):
  with pytest.raises(DataError, match=message):
    manifest.write(tmp_path / 'new', rows)
  assert not (tmp_path / 'new').exists()


# ---- reading

def test_excluded_rows_are_kept_and_told_apart(tmp_path):
  manifest.write(tmp_path, ROWS)
  rows = manifest.read(tmp_path, labelled=False)
  assert [r['id'] for r in rows] == ['a/1', 'a/2', 'b/2']
  assert [r['id'] for r in manifest.usable(rows)] == ['a/1', 'b/2']


def test_rows_for_evaluation_need_a_label_unless_excluded(tmp_path):
  with pytest.raises(DataError, match='line 3: label is None'):
    manifest.write(tmp_path, ROWS)
    manifest.read(tmp_path)
  manifest.write(tmp_path, ROWS[1:])
  assert [r.get('label') for r in manifest.read(tmp_path)] == [{'nodule': 1, 'mass': 0}, None]


def test_an_excluded_row_is_no_leak_and_a_subject_is_a_group(tmp_path):
  one = {'path': 'a', 'kind': 'image', 'subject': 1, 'dataset': 'd', 'split': 'train'}
  other = one | {'path': 'b', 'split': 'test'}
  manifest.write(tmp_path, [one, other | {'status': 'excluded'}])
  assert [r['group'] for r in manifest.read(tmp_path, labelled=False)] == ['d/1', 'd/1']
  manifest.write(tmp_path, [one, other])
  with pytest.raises(DataError, match='LEAK .*group d/1: train and test'):
    manifest.read(tmp_path, labelled=False)


def test_a_manifest_edited_by_hand_is_told(tmp_path, capsys):
  manifest.write(tmp_path, ROWS)
  file = tmp_path / 'manifest.jsonl'
  file.write_text(file.read_text().replace('"val"', '"test"'))
  manifest.read(tmp_path, labelled=False)
  err = capsys.readouterr().err
  assert err.startswith(f'WARN MANIFEST {file}: 3 rows with hash') and err.count('\n') == 1


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
  manifest.write(tmp_path, ROWS)
  file = tmp_path / 'manifest.jsonl'
  file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes().replace(b'\n', b'\r\n'))
  assert len(manifest.read(file, labelled=False)) == 3


@pytest.mark.parametrize('field, value', [
    ('kind', 'film'), ('split', 'fold0'), ('status', 'bad'), ('shape', [1, 2.5]), ('shape', 'axb'),
    ('spacing', [1, None]), ('hu_p99', 'high'), ('findings', 'CONSTANT'), ('record', ['x', 'y']), ('sha', 5),
    ('subject', {}), ('group', ''),
    ('text', 3), ('z0', True), ('label', []), ('id', ['x']), ('crop_box', [])])
def test_a_field_of_the_wrong_type_is_named(tmp_path, field, value):
  (tmp_path / 'm.jsonl').write_text(json.dumps(ROWS[0] | {field: value}))
  with pytest.raises(DataError, match=f'^MANIFEST .*m.jsonl line 1: {field} is '):
    manifest.read(tmp_path / 'm.jsonl', labelled=False)


def test_damaged_files_give_one_line(tmp_path):
  """600 random edits of a manifest and of its meta file: rows, or a DataError."""
  manifest.write(tmp_path / 'good', ROWS, root='/data', config={'a': 1})
  rng, failed = random.Random(0), 0
  for i in range(600):
    folder = tmp_path / str(i)
    folder.mkdir()
    for name in ('manifest.jsonl', 'manifest.meta.json'):
      data = bytearray((tmp_path / 'good' / name).read_bytes())
      if (i % 2 == 0) == (name == 'manifest.jsonl'):
        for _ in range(rng.randint(1, 4)):
          damage(rng, data)
      (folder / name).write_bytes(data)
    try:
      manifest.read(folder, labelled=bool(i % 3))
    except DataError as e:
      assert '\n' not in str(e)
      failed += 1
  assert failed > 200


def damage(rng, data):
  at = rng.randrange(len(data) + 1)
  kind = rng.randrange(5)
  if kind == 0:
    del data[at:at + rng.randint(1, 20)]
  elif kind == 1:
    data[at:at] = rng.choice([b'"', b'{', b']', b',', b'\xff\xfe', b'\x00', b'\n', b'[' * 3000, b'9' * 5000,
                              b'\\ud800'])
  elif kind == 2:
    data[at:at + 1] = bytes([rng.randrange(256)])
  elif kind == 3:
    for value in (b'null', b'1e999', b'{}', b'-1', b'NaN', b'[[]]'):
      if rng.random() < .3:
        start = data.find(b': ', at)
        end = data.find(b',', start)
        if 0 <= start < end:
          data[start + 2:end] = value
  else:
    del data[at:]


# ---- hash and changes

states = st.fixed_dictionaries({'sha': st.sampled_from(['a', 'b', None]), 'status': st.sampled_from(manifest.STATUS),
                                'split': st.sampled_from([*manifest.SPLITS, None])})


@settings(deadline=None)
@given(st.dictionaries(st.text('abc/', min_size=1, max_size=4), states, min_size=1, max_size=8), st.data())
def test_the_hash_is_of_id_sha_status_and_split_in_any_order(tmp, data):
  rows = [{'id': k, 'path': 'x'} | v for k, v in tmp.items()]
  assert manifest.digest(data.draw(st.permutations(rows))) == manifest.digest(rows)
  assert manifest.digest([r | {'path': 'y', 'group': 'g', 'label': {}} for r in rows]) == manifest.digest(rows)
  i = data.draw(st.integers(0, len(rows) - 1))
  for change in ({'id': 'new'}, {'sha': 'other'}, {'split': 'other'}, {'status': 'other'}):
    changed = [*rows[:i], rows[i] | change, *rows[i + 1:]]
    assert manifest.digest(changed) != manifest.digest(rows) and manifest.changes(rows, changed)
  assert manifest.digest(rows[:i] + rows[i + 1:]) != manifest.digest(rows)
  assert manifest.changes(rows, rows) == ''


def test_the_hash_survives_the_disk(tmp_path):
  assert manifest.write(tmp_path, ROWS, root='/x') == manifest.digest(manifest.read(tmp_path, labelled=False))


def test_changes_names_the_rows():
  old = [{'id': c, 'sha': c, 'split': 'train'} for c in 'abcdefghijkl']
  new = [dict(r) for r in old[2:]] + [{'id': c} for c in 'xyz']
  new[0]['sha'], new[1]['split'], new[2]['status'] = 'other', 'val', 'excluded'
  assert manifest.changes(old, new) == (
      '2 removed: a, b; 1 changed content: c; 1 changed status: e; 1 moved split: d; 3 added: x, y, z')
  assert manifest.changes(old, old[:1]) == '11 removed: b, c, d, e, f, g, h, i, ...'
  assert manifest.changes([{'id': 'a'}], [{'id': 'a', 'status': 'ok', 'split': None}]) == ''


# ---- content

def test_the_content_hash(tmp_path):
  import hashlib
  (tmp_path / 'a').write_bytes(os.urandom(3 << 20))
  (tmp_path / 'b').write_bytes(b'b')
  of = lambda name: hashlib.blake2b((tmp_path / name).read_bytes(), digest_size=16).hexdigest()
  assert files.sha(tmp_path / 'a') == files.sha([tmp_path / 'a']) == of('a')
  series = files.sha([tmp_path / 'a', tmp_path / 'b'])
  assert series == files.sha([tmp_path / 'b', tmp_path / 'a']) == files.sha(tmp_path)
  assert series not in (of('a'), of('b'))
  with pytest.raises(DataError, match='UNREADABLE'):
    files.sha(tmp_path / 'none')


def test_the_content_hash_of_a_pair_is_of_both_halves(tmp_path):
  (tmp_path / 'x.hdr').write_bytes(b'h')
  (tmp_path / 'x.img').write_bytes(b'i')
  before = files.sha(tmp_path / 'x.hdr')
  (tmp_path / 'x.img').write_bytes(b'j')
  assert files.sha(tmp_path / 'x.hdr') != before
