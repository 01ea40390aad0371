"""Files to shards: the same bytes on every way there, and the same records as from the files themselves."""
import contextlib
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from data_pipelines import manifest, nifti, preparation, prepare, prepared, readers, records, sources, tiles
from data_pipelines.errors import DataError
from tests.conftest import ROOT
from tests.data_pipelines import dicom_files
from unimiss_jax.views import matrices

VOLUMES, PICTURES = 5, 3
SHARDS = '--num_shards=3'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """5 scans of 24 to 40 slices, 8- and 16-bit pictures, one broken file of each kind."""
  where, rng = tmp_path_factory.mktemp('files'), np.random.default_rng(0)
  for i in range(VOLUMES):
    hu = rng.integers(-1000, 1000, (20, 18, 24 + 4 * i)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([2., 2., 3., 1.])), where / f'{i}.nii.gz')
  for i in range(PICTURES):
    deep = i == 0
    image = rng.integers(0, 1 << (16 if deep else 8), (40, 30)).astype(np.uint16 if deep else np.uint8)
    Image.fromarray(image).save(where / f'{i}.png')
  (where / 'bad.nii.gz').write_bytes(b'')
  (where / 'bad.png').write_bytes(b'no picture')
  return where


def run(folder, out, *flags):
  return prepare.main([str(folder), f'--out={out}', SHARDS, *flags])


def contents(out):
  """Name and hash of every shard, and the manifest without the time."""
  shards = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob('*.array_record-*')}
  return shards, (out / 'manifest.jsonl').read_text().replace(str(out), ''), manifest.meta(out)['shards']


@pytest.fixture(scope='module')
def out(folder, tmp_path_factory):
  where = tmp_path_factory.mktemp('out') / 'prepared'
  assert run(folder, where, '--workers=0') == 0
  return where


def test_shards_are_a_data_set_of_tfds(out):
  import tensorflow_datasets as tfds
  data = tfds.builder_from_directory(str(records.folder(out, 'ct'))).as_data_source('train')
  assert len(data) == sum(len(tiles.starts(24 + 4 * i)) for i in range(VOLUMES))
  assert {d['volume'].shape for d in (data[i] for i in range(len(data)))} == {(24, 18, 20)}
  assert data[0]['volume'].dtype == np.int16 and json.loads(data[0]['label']) == {}
  assert len(tfds.builder_from_directory(str(records.folder(out, 'xray'))).as_data_source('train')) == PICTURES
  assert 'tensorflow' not in sys.modules


def test_records_are_decoded_as_tfds_does(out):
  import tensorflow_datasets as tfds
  for kind in records.KINDS:
    theirs = tfds.builder_from_directory(str(records.folder(out, kind))).as_data_source('train')
    ours = records.Shards(out, kind)
    assert len(ours) == len(theirs) > 0
    for i in range(len(ours)):
      assert ours[i].keys() == theirs[i].keys()
      for name, value in theirs[i].items():
        want = value.decode() if isinstance(value, bytes) else value
        assert np.asarray(ours[i][name]).dtype == np.asarray(want).dtype, name
        np.testing.assert_array_equal(ours[i][name], want)


def test_damaged_records_are_refused_and_nothing_else_happens():
  """Cut and changed at random: ValueError, IndexError, KeyError, zlib.error or a record, in no time."""
  example = {'id': 'a', 'group': 'b', 'label': '{}', 'bits': -3, 'view': '', 'image': np.zeros((9, 7), np.uint16)}
  f = records.features('xray')
  from tensorflow_datasets.core import example_serializer
  data = example_serializer.ExampleSerializer(f.get_serialized_info()).serialize_example(f.encode_example(example))
  assert records.decode(data)['bits'] == -3
  rng = np.random.default_rng(0)
  for i in range(2000):
    bad = bytearray(data[:rng.integers(len(data))] if i % 2 else data)
    for at in rng.integers(len(bad) or 1, size=i % 4):
      if bad:
        bad[at] = rng.integers(256)
    with contextlib.suppress(ValueError, IndexError, KeyError, TypeError, OverflowError, zlib.error):
      records.decode(bytes(bad))


def test_the_manifest_says_where_every_record_is_and_what_was_left_out(out, folder):
  rows = manifest.read(out, labelled=False)
  lost = {r['path'].rpartition('/')[2]: r['findings'] for r in rows if r['status'] == 'excluded'}
  assert lost == {'bad.nii.gz': ['ZERO_BYTES'], 'bad.png': ['NOT_IMAGE']}
  kept = manifest.usable(rows)
  for row in kept:
    kind = {'subvolume': 'ct', 'image': 'xray'}[row['kind']]
    shard, i = row['record']
    shards = records.Shards(out, kind)
    assert shards.at([os.path.basename(f) for f in shards.files].index(shard), i)['id'] == row['id']
    assert len(row['sha']) == 32 and row['split'] == 'train' and row['path'].startswith(str(folder))
  assert manifest.meta(out)['config'] == {'modality': 'ct', 'spacing_mm': [0., 0., 0.], 'tile': 24, 'compress': 'none',
                                          'sequences': [], 'resample_gaps': False, 'uncut': False}


def fingerprints(source, fields):
  """{name: bytes of the fields}; names without folders."""
  found = {}
  for i in range(len(source)):
    record = source[i]
    assert record['index'] == i and not record['bad']
    found[record['name'].rpartition('/')[2]] = [
        (np.asarray(record[f]).dtype.str, np.asarray(record[f]).shape, np.asarray(record[f]).tobytes()) for f in fields]
  return found


def test_records_are_those_of_the_folder(out, folder):
  whole = ('volume', 'whole')
  got = fingerprints(prepared.PreparedCT(str(out), whole=True), whole)
  assert got == fingerprints(sources.CTFolder(str(folder), whole=True), whole)
  assert fingerprints(prepared.PreparedXray(str(out)), ['image']) == fingerprints(
      sources.XrayFolder(str(folder)), ['image'])
  a, b = prepared.PreparedCT(str(out), whole=True)[3], {}
  b = {r['name'].rpartition('/')[2]: r for r in map(sources.CTFolder(str(folder), whole=True).__getitem__, range(8))}
  b = b[a['name'].rpartition('/')[2]]
  np.testing.assert_allclose(a['spacing_mm'], b['spacing_mm'], rtol=1e-6)
  np.testing.assert_allclose(a['whole_spacing_mm'], b['whole_spacing_mm'], rtol=1e-6)


def test_dicom_and_the_nifti_made_of_it_give_the_same_records(tmp_path):
  dicom_files.series(tmp_path / 'dicom' / 's', dicom_files.noise((26, 20, 18)), step=2.5)
  volume = readers.volume(str(tmp_path / 'dicom' / 's'))
  (tmp_path / 'nifti').mkdir()
  nifti.write(tmp_path / 'nifti' / 's.nii.gz', volume.array, volume)
  got = []
  for name in ('dicom', 'nifti'):
    assert prepare.main([str(tmp_path / name), f'--out={tmp_path / "out" / name}', '--workers=0']) == 0
    source = prepared.PreparedCT(str(tmp_path / 'out' / name), whole=True)
    got.append([source[i] for i in range(len(source))])
  assert len(got[0]) == len(got[1]) == 2
  for a, b in zip(*got):
    for field in ('volume', 'whole', 'spacing_mm', 'whole_spacing_mm'):
      np.testing.assert_allclose(a[field], b[field], rtol=1e-6)


@pytest.mark.realdata
def test_real_files_give_the_same_records(shared, tmp_path):
  """Every CT and X-ray of the shared folder, prepared and as they lie."""
  assert run(shared / 'data/ct', tmp_path / 'ct', '--workers=0') == 0
  assert fingerprints(prepared.PreparedCT(str(tmp_path / 'ct')), ['volume']) == fingerprints(
      sources.CTFolder(str(shared / 'data/ct')), ['volume'])
  assert run(shared / 'data/cxr/nih', tmp_path / 'cxr', '--workers=0') == 0
  assert fingerprints(prepared.PreparedXray(str(tmp_path / 'cxr')), ['image']) == fingerprints(
      sources.XrayFolder(str(shared / 'data/cxr/nih')), ['image'])


# ---- the same bytes on every way

def test_worker_processes_change_nothing(out, folder, tmp_path):
  assert run(folder, tmp_path / 'p', '--workers=2') == 0
  assert contents(tmp_path / 'p') == contents(out)


def test_one_shard_a_machine_and_a_merge(out, folder, tmp_path, capsys):
  p = tmp_path / 'p'
  for i in (2, 0):
    assert run(folder, p, '--workers=0', f'--shard_index={i}') == 0
  assert prepare.main([f'--out={p}', '--merge']) == 1
  assert 'ERROR SHARDS' in (told := capsys.readouterr().err) and 'ct-train-00001-of-00003' in told
  assert run(folder, p, '--workers=0', '--shard_index=1') == 0 and prepare.main([f'--out={p}', '--merge']) == 0
  assert contents(p) == contents(out)
  with pytest.raises(DataError, match='no plan.json there'):
    preparation.merge(tmp_path)


def test_beam_makes_the_same_bytes(out, folder, tmp_path):
  """Two runners of its own: in this process, and in two worker processes."""
  pytest.importorskip('apache_beam')
  assert run(folder, tmp_path / 'a', '--engine=beam') == 0
  assert contents(tmp_path / 'a') == contents(out)
  options = '--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing'
  command = [sys.executable, '-m', 'data_pipelines.prepare', str(folder), f'--out={tmp_path / "b"}', SHARDS,
             '--engine=beam', f'--beam_options={options}']
  subprocess.run(command, cwd=ROOT, check=True)
  assert contents(tmp_path / 'b') == contents(out)


def test_beam_that_is_not_installed(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  assert run(folder, tmp_path / 'p', '--engine=beam') == 1
  assert 'ERROR BEAM' in (told := capsys.readouterr().err) and 'pip install "unimiss_jax[beam]"' in told


def killed(folder, p, times):
  """Runs it as a program and kills the whole group, `times` times."""
  rng, command = np.random.default_rng(times), [
      sys.executable, '-m', 'data_pipelines.prepare', str(folder), f'--out={p}', SHARDS, '--workers=2']
  for _ in range(times):
    made = len(list(p.rglob('journal/*.json'))) if p.exists() else 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    while process.poll() is None and len(list(p.rglob('journal/*.json')) if p.exists() else ()) == made:
      time.sleep(.02)
    time.sleep(rng.random() * .05)
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def test_killed_once_and_started_again(out, folder, tmp_path):
  killed(folder, tmp_path / 'p', 1)
  assert contents(tmp_path / 'p') == contents(out)
  assert not list((tmp_path / 'p').rglob('*.part'))


@pytest.mark.slow
def test_killed_five_times(out, folder, tmp_path):
  killed(folder, tmp_path / 'p', 5)
  assert contents(tmp_path / 'p') == contents(out)


def test_a_full_disk_leaves_what_can_go_on(out, folder, tmp_path, monkeypatch, capsys):
  write, left = records.Writer.write, [4]

  def full(self, record):
    left[0] -= 1
    if left[0] < 0:
      raise OSError(28, 'No space left on device')
    write(self, record)
  monkeypatch.setattr(records.Writer, 'write', full)
  assert run(folder, tmp_path / 'p', '--workers=0') == 1
  error = capsys.readouterr().err.splitlines()[-1]
  assert 'ERROR WRITE' in error and 'No space left on device' in error and 'FIX: make room; the same command' in error
  monkeypatch.undo()
  assert run(folder, tmp_path / 'p', '--workers=0') == 0
  assert contents(tmp_path / 'p') == contents(out)


def test_finished_shards_are_not_made_again(out, folder, monkeypatch):
  monkeypatch.setattr(preparation, 'make_shard', None)
  assert run(folder, out, '--workers=0') == 0


def test_another_config_and_other_files_are_refused(out, folder, tmp_path, capsys):
  assert run(folder, out, '--tile=16') == 1
  assert 'was begun with other config' in capsys.readouterr().err
  assert prepare.main([str(folder), f'--out={out}', '--num_shards=2', '--workers=0']) == 1
  assert 'was begun with other num_shards: 3, now 2' in capsys.readouterr().err
  nib.save(nib.Nifti1Image(np.zeros((20, 20, 24), np.int16), np.eye(4)), tmp_path / 'more.nii.gz')
  assert prepare.main([str(folder), str(tmp_path), f'--out={out}', SHARDS]) == 1
  assert 'was begun with other files: 1 added:' in capsys.readouterr().err


def test_a_file_that_was_repaired_is_noticed(folder, tmp_path, capsys):
  shutil.copytree(folder, tmp_path / 'files')
  assert run(tmp_path / 'files', tmp_path / 'p', '--workers=0') == 0
  shutil.copy(folder / '0.nii.gz', tmp_path / 'files' / 'bad.nii.gz')
  capsys.readouterr()
  assert run(tmp_path / 'files', tmp_path / 'p', '--workers=0') == 1
  assert 'was begun with other files: 1 changed content: files/bad.nii.gz' in capsys.readouterr().err


def test_a_damaged_shard_is_made_again_or_found_by_merge(out, folder, tmp_path, capsys):
  p = tmp_path / 'p'
  shutil.copytree(out, p)
  file = next(p.rglob('ct-train.array_record-00000-of-00003'))
  whole = file.read_bytes()
  file.write_bytes(whole[:len(whole) // 2])
  assert run(folder, p, '--workers=0') == 0 and contents(p) == contents(out)
  damaged = bytearray(whole)
  damaged[len(whole) // 3:len(whole) // 3 + 999] = bytes(999)
  file.write_bytes(damaged)
  assert prepare.main([f'--out={p}', '--merge']) == 1
  assert 'ERROR SHARDS' in (told := capsys.readouterr().err) and 'its records are not those that were written' in told


def test_two_writers_of_one_shard(tmp_path):
  """A job that was queued again while the first one still ran: whoever is last wins, whole."""
  path = records.folder(tmp_path, 'whole') / records.shard_name('whole', 'train', 0, 1)
  record = {'id': 'a', 'group': 'a', 'label': '{}', 'volume': np.ones((2, 3, 4), np.int16),
            'spacing_mm': np.ones(3, np.float32)}
  one = records.Writer(path, 'whole')
  one.write(record)
  one.part = one.part.rename(one.part.with_name('of another process.part'))
  two = records.Writer(path, 'whole')
  written = [w.close() for w in (one, two)]
  assert records.digest(path, 0) == written[1]['hash'] != written[0]['hash']


def test_faults_before_the_work_begins(folder, tmp_path, capsys):
  more = tmp_path / 'again' / folder.name
  shutil.copytree(folder, more)
  assert prepare.main([str(folder), str(more), f'--out={tmp_path / "p"}']) == 1
  assert 'ERROR PLAN' in (told := capsys.readouterr().err) and 'two files are called' in told and '--dataset' in told
  (tmp_path / 'bad').mkdir()
  shutil.copy(folder / 'bad.nii.gz', tmp_path / 'bad')
  assert prepare.main([str(tmp_path / 'bad'), f'--out={tmp_path / "q"}', '--workers=0']) == 1
  assert 'ERROR SPLIT_EMPTY' in capsys.readouterr().err
  assert prepare.main([str(folder), '--out=/dev/null/x', '--workers=0']) == 1
  assert 'ERROR WRITE /dev/null/x: ' in capsys.readouterr().err
  manifest.write(tmp_path / 'm', [
      {'id': 'r', 'path': 'r.txt', 'kind': 'report', 'split': 'train'},
      {'id': 'v', 'path': str(folder / '0.nii.gz'), 'kind': 'volume', 'split': 'train'}])
  assert prepare.main([str(tmp_path / 'm'), f'--out={tmp_path / "s"}', '--workers=0']) == 0
  assert '1 rows of kind report are not prepared' in capsys.readouterr().err


def test_a_process_that_is_killed_costs_its_own_shard(out, folder, tmp_path, capsys):
  """As a machine without memory does; what it left is made by the same command."""
  code = f"""
import os, sys
from data_pipelines import engines, preparation, prepare
make = preparation.make_shard
def dying(out, unit, rows, config):
  if unit.kind == 'ct' and unit.shard == 0:
    os.kill(os.getpid(), 9)
  make(out, unit, rows, config)
preparation.make_shard = dying
if __name__ == '__main__':
  sys.exit(prepare.main([{str(folder)!r}, '--out={tmp_path / "p"}', '{SHARDS}', '--workers=2']))
"""
  (tmp_path / 'dying.py').write_text(code)
  done = subprocess.run([sys.executable, tmp_path / 'dying.py'], cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)},
                        capture_output=True, text=True)
  assert done.returncode == 1 and 'ERROR WORKER' in done.stderr
  assert 'ct-train-00000-of-00003 (exit code -9)' in done.stderr
  assert len(list((tmp_path / 'p/journal').iterdir())) == 5
  assert run(folder, tmp_path / 'p', '--workers=0') == 0 and contents(tmp_path / 'p') == contents(out)


def test_an_unforeseen_fault_of_one_file_costs_that_file(folder, tmp_path, monkeypatch):
  read = preparation.ct_records

  def failing(row, item, config):
    if row['path'].endswith('1.nii.gz'):
      raise MemoryError('too much')
    return read(row, item, config)
  monkeypatch.setattr(preparation, 'ct_records', failing)
  assert run(folder, tmp_path / 'p', '--workers=0') == 0
  lost = [r for r in manifest.read(tmp_path / 'p', labelled=False) if r['findings'] == ['READER']]
  assert len(lost) == 1 and lost[0]['reason'].startswith('MemoryError: too much')


# ---- what is in a record

def test_whole_volumes_and_splits(folder, tmp_path):
  flags = '--workers=0', '--tile=0', '--split=.4,.3,.3', '--seed=5', '--compress=zstd'
  assert run(folder, tmp_path / 'p', *flags) == 0
  rows = manifest.usable(manifest.read(tmp_path / 'p', labelled=False))
  depths = {r['path'].rpartition('/')[2]: r['shape'][0] for r in rows if r['kind'] == 'subvolume'}
  assert depths == {f'{i}.nii.gz': 24 + 4 * i for i in range(VOLUMES)}
  for split in records.SPLITS:
    n = sum(r['split'] == split and r['kind'] == 'subvolume' for r in rows)
    assert len(records.Shards(tmp_path / 'p', 'ct', split)) == n
    if not n:
      with pytest.raises(DataError, match=f'SPLIT_EMPTY .*no records of ct in split {split}'):
        prepared.PreparedCT(str(tmp_path / 'p'), split=split)


def test_where_a_tile_lies_in_its_scan(tmp_path):
  """A wide scan is cut to the central 80 %, a short one gets air, or neither; too few slices are refused."""
  rng = np.random.default_rng(0)
  (tmp_path / 'f').mkdir()
  for name, shape in (('wide', (330, 20, 40)), ('short', (20, 20, 18))):
    nib.save(nib.Nifti1Image(rng.integers(-1000, 1000, shape).astype(np.int16), np.diag([1., 1., 3., 1.])),
             tmp_path / 'f' / f'{name}.nii')
  assert prepare.main([str(tmp_path / 'f'), f'--out={tmp_path / "p"}', '--workers=0']) == 0
  rows = {r['id'].rpartition('/')[2]: r for r in manifest.read(tmp_path / 'p', labelled=False)}
  assert rows['wide.nii z12']['crop_box'] == [12, 2, 33, 36, 18, 297] and rows['wide.nii z12']['z_offset_mm'] == 36.
  assert rows['short.nii z0']['crop_box'] == [-3, 0, 0, 21, 20, 20] and rows['short.nii z0']['z_offset_mm'] == -9.
  assert prepare.main([str(tmp_path / 'f'), f'--out={tmp_path / "r"}', '--workers=0', '--uncut']) == 0
  boxes = {r['id'].rpartition('/')[2]: r['crop_box'] for r in manifest.read(tmp_path / 'r', labelled=False)}
  assert boxes == {'wide.nii z0': [0, 0, 0, 40, 20, 330], 'short.nii z0': [0, 0, 0, 18, 20, 20]}
  flags = f'--out={tmp_path / "q"}', '--workers=0', '--spacing=6,0,0'
  assert prepare.main([str(tmp_path / 'f'), *flags]) == 0
  assert [r['findings'] for r in manifest.read(tmp_path / 'q', labelled=False) if r['id'] == 'f/short.nii'] == [
      ['TOO_SMALL']]


def test_resampling_keeps_the_extent():
  """A ramp stays a ramp: coarser by means, finer by lines; against scipy's linear interpolation where it gets finer."""
  z, y, x = np.meshgrid(np.arange(12) + .5, np.arange(10) + .5, np.arange(8) + .5, indexing='ij')
  ramp = np.rint(600 * z + 60 * y + 6 * x).astype(np.int16)
  out, mm = tiles.resampled(ramp, (3., 2., 1.), (6., 0., 2.))
  assert out.shape == (6, 10, 4) and mm == (6., 2., 2.)
  np.testing.assert_allclose(out, ramp.reshape(6, 2, 10, 4, 2).mean((1, 4)), atol=.5)
  out, mm = tiles.resampled(ramp, (3., 2., 1.), (1., 1.4, 0.))
  assert out.shape == (36, 14, 8) and np.allclose(mm, (1., 20 / 14, 1.))
  fine = 600 * (np.arange(36) + .5) / 3 + 60 * 5 + 6 * .5
  np.testing.assert_allclose(out[2:-2, 7, 0] - out[2, 7, 0], (fine - fine[2])[2:-2], atol=1)
  same, mm = tiles.resampled(ramp, (3., 2., 1.), (3., 0., 1.))
  assert same is ramp and mm == (3., 2., 1.)


@pytest.mark.parametrize('to_mm', [(1., .5, .6), (3.1, .3, 2.), (5., 0., 1.6), (0., 1.6, 0.)])
def test_resampling_a_slab_at_a_time_is_that_of_the_whole_volume(to_mm):
  volume = np.random.default_rng(0).integers(-1024, 3000, (37, 25, 22)).astype(np.int16)
  out, _ = tiles.resampled(volume, (2., .8, .8), to_mm)
  d, h, w = (matrices.resize('area' if m < n else 'linear', 0, n, n, m) for n, m in zip(volume.shape, out.shape))
  whole = np.einsum('az,by,cx,zyx->abc', d, h, w, volume.astype(float), optimize=True)
  np.testing.assert_allclose(out, whole, rtol=0, atol=.5 + 1e-3)      # float32 beside float64, then rounded


# ---- reading

def test_a_record_that_cannot_be_read_is_replaced(out, folder, tmp_path, capsys):
  run(folder, tmp_path / 'p', '--workers=0')
  source = prepared.PreparedCT(str(tmp_path / 'p'))
  names = [source[i]['name'] for i in range(len(source))]
  shard, _ = source.shards.place(2)
  broken = tmp_path / 'p/ct/1.0.0' / os.path.basename(source.shards.files[shard])
  data = bytearray(broken.read_bytes())
  data[len(data) // 3:len(data) // 3 + 2000] = bytes(2000)
  broken.write_bytes(data)
  source = prepared.PreparedCT(str(tmp_path / 'p'))
  got = [source[i] for i in range(len(source))]
  bad = [i for i, r in enumerate(got) if r['bad']]
  assert bad and all(r['index'] == i for i, r in enumerate(got))
  assert all(got[i]['name'] == names[i] for i in range(len(got)) if i not in bad)
  assert 'WARN RECORD' in capsys.readouterr().err
  with pytest.raises(DataError, match='RECORD'):
    stop = prepared.PreparedCT(str(tmp_path / 'p'), on_bad_file='stop')
    [stop[i] for i in range(len(stop))]
  broken.unlink()
  with pytest.raises(DataError, match='SHARDS .*1 of 3 shards are not there'):
    prepared.PreparedCT(str(tmp_path / 'p'))


def test_sources_travel_to_worker_processes(out):
  source = prepared.PreparedCT(str(out), whole=True)
  source[0]
  again = pickle.loads(pickle.dumps(source))
  assert again.digest == source.digest and np.array_equal(again[5]['volume'], source[5]['volume'])


def test_other_content_or_order_is_another_list(out, folder, tmp_path):
  """The path is the same: a resumed run must notice by the hash."""
  digest = prepared.PreparedCT(str(out)).digest
  for name, flags in (('fewer', ['--num_shards=2']), ('coarser', [SHARDS, '--spacing=0,4,4'])):
    assert prepare.main([str(folder), f'--out={tmp_path / name}', '--workers=0', *flags]) == 0
    assert prepared.PreparedCT(str(tmp_path / name)).digest != digest
  assert prepare.main([str(folder), f'--out={tmp_path / "other"}', '--workers=0', SHARDS, '--modality=other']) == 0
  with pytest.raises(DataError, match='MODALITY .*was prepared with --modality=other, the run has data.modality=ct'):
    prepared.PreparedCT(str(tmp_path / 'other'))


def test_series_with_gaps_on_request(tmp_path):
  place = np.delete(np.arange(24), [3, 11])
  dicom_files.series(tmp_path / 'a', dicom_files.noise((22, 18, 17)), positions=np.outer(place, (0, 0, 2.)))
  dicom_files.series(tmp_path / 'b', dicom_files.noise((20, 18, 17)), SeriesInstanceUID='1.7')
  for flags, want in (([], [('excluded', ['SLICE_GAP']), ('ok', [])]),
                      (['--resample_gaps'], [('warn', ['SLICE_GAP']), ('ok', [])])):
    out = tmp_path / f'out{len(flags)}'
    assert prepare.main([f'{tmp_path}/a,{tmp_path}/b', f'--out={out}', '--workers=0', *flags]) == 0
    assert [(r['status'], r['findings']) for r in manifest.read(out, labelled=False)] == want
  assert prepared.PreparedCT(str(out))[0]['volume'].shape == (24, 18, 17)


def test_every_source_lists_its_records(out, folder):
  parts = [prepared.PreparedCT(str(out)), sources.CTFolder(str(folder)), sources.PhantomCT(0, 3)]
  for source in (*parts, prepared.PreparedXray(str(out)), sources.XrayFolder(str(folder)), sources.PhantomXray(0, 3),
                 prepared.Mixture(parts, [1., 1., 1.])):
    assert len({row['id'] for row in source.listing()}) == len(source)


def test_more_shards_than_files_may_be_open(out, monkeypatch):
  monkeypatch.setattr(records, 'OPEN', 1)
  source = prepared.PreparedCT(str(out))
  for i in np.random.default_rng(0).integers(0, len(source), 30):
    assert not source[int(i)]['bad']
  assert len(source.shards._readers) == 1


def test_a_mixture_keeps_its_proportions(out, folder):
  a, b = prepared.PreparedCT(str(out)), sources.CTFolder(str(folder))
  mixed = prepared.Mixture([a, b], [1., 2.5])
  got = [mixed[i] for i in range(len(mixed))]
  assert len(mixed) == len(a) + round(2.5 * len(b))
  counts = np.bincount([r['index'] for r in got])
  assert len(counts) == len(a) + len(b) and (counts[:len(a)] == 1).all() and set(counts[len(a):]) <= {2, 3}
  assert len({r['group'] for r in got}) == 2 * VOLUMES
  assert mixed.digest != prepared.Mixture([a, b], [1., 2.]).digest
  assert len(prepared.Mixture([a, b], [.5, 1.])) == len(a) + 2 * len(b)


@pytest.mark.parametrize('spec, want', [
    ('/a', {'/a': 1.}), ('/a@2, gs://b/c@0.5', {'/a': 2., 'gs://b/c': .5}), ('/x@y,/z', {'/x@y': 1., '/z': 1.})])
def test_weights(spec, want):
  assert prepared.weights(spec) == want


def test_a_weight_of_zero():
  with pytest.raises(DataError, match='WEIGHT /a: weight 0'):
    prepared.weights('/a@0,/b')


@pytest.mark.parametrize('flags, text', [
    ([], 'required: --out'), (['--out=x'], 'exactly one of SOURCE and --merge'),
    (['a', '--out=x', '--merge'], 'exactly one of SOURCE and --merge'),
    (['a', '--out=x', '--tile=7'], '--tile=7: an even'),
    (['a', '--out=x', '--spacing=1,2'], '--spacing: three numbers'),
    (['a', '--out=x', '--modality=pet'], 'invalid choice'), (['a', '--out=gs://b/x'], 'a local folder'),
    (['a', '--out=x', '--shard_index=-1', '--num_shards=2'], '--shard_index=-1'),
    (['--out=x', '--merge', '--shard_index=0'], '--shard_index=0'),
    (['a', '--out=x', '--shard_index=0'], 'with --num')])
def test_usage(flags, text, capsys):
  with pytest.raises(SystemExit) as e:
    prepare.main(flags)
  told = capsys.readouterr().err
  assert e.value.code == 2 and text in told and told.count('\n') == 1


def test_a_place_without_files(tmp_path, capsys):
  assert prepare.main([str(tmp_path), f'--out={tmp_path / "out"}']) == 1
  assert capsys.readouterr().err.startswith('ERROR EMPTY_DIR')
