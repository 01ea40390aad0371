"""Folders to records: tiling, refusals, the cache, and files that fail after the start."""
import pickle
import threading
import time

import nibabel as nib
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import common
from data_pipelines import files, judgement, manifest, phantom, readers, sources, streams, tiles
from data_pipelines.errors import DataError
from unimiss_jax import validate


def ct(depth, seed=0, side=40):
  """[S, A, R] HU noise."""
  return np.random.default_rng(seed).integers(-1000, 1000, (depth, side, side)).astype(np.int16)


def save(path, volume, spacing_mm=(3., 2., 2.)):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = nib.Nifti1Image(volume.transpose(2, 1, 0), np.diag([*spacing_mm[::-1], 1.]))
  image.header.set_xyzt_units('mm')
  nib.save(image, path)
  return path


@pytest.fixture
def folder(tmp_path):
  for i, depth in enumerate((24, 36, 30)):
    save(tmp_path / 'ct' / f'case{i}.nii.gz', ct(depth, i))
  return tmp_path / 'ct'


# ---- tiles

@pytest.mark.parametrize('depth, expected', [
    (16, [0]), (24, [0]), (25, [0, 1]), (36, [0, 12]), (41, [0, 12, 17]), (134, [*range(0, 109, 12), 110])])
def test_tile_starts(depth, expected):
  assert tiles.starts(depth) == expected
  assert depth != 134 or len(expected) == 11


def test_records_are_tiles_of_the_file(folder, capsys):
  source = sources.CTFolder(str(folder), whole=True)
  assert len(source) == 1 + 2 + 2
  for i, (case, start) in enumerate([(0, 0), (1, 0), (1, 12), (2, 0), (2, 6)]):
    record, truth = source[i], ct((24, 36, 30)[case], case)
    np.testing.assert_array_equal(record['volume'], truth[start:start + 24])
    assert record['whole'].dtype == np.int16
    np.testing.assert_allclose(record['whole'], truth_reduced(truth), atol=.51)    # rounded, in float32
    assert record['spacing_mm'] == (3, 2, 2) and record['index'] == i and not record['bad']
    assert record['name'] == f'case{case}.nii.gz z{start}'
  assert capsys.readouterr().err == 'data.ct: 3 files, 3 usable, 5 records\n'


@pytest.mark.parametrize('tile, parts', [(32, [(0, 0), (1, 0), (1, 4), (2, 0)]), (0, [(0, 0), (1, 0), (2, 0)])])
def test_records_of_other_tiles(folder, tile, parts):
  source = sources.CTFolder(str(folder), tile=tile)
  assert len(source) == len(parts)
  for i, (case, start) in enumerate(parts):
    depth = (24, 36, 30)[case]
    lack = max(0, tile - depth)
    truth = np.pad(ct(depth, case), ((lack // 2, lack - lack // 2), (0, 0), (0, 0)), constant_values=-1024)
    np.testing.assert_array_equal(source[i]['volume'], truth[start:start + (tile or depth)])
  assert source.largest == {'volume': (tile or 36, 40, 40)}


def test_the_config_knows_the_least_depth_of_a_scan():
  assert validate.LEAST_SLICES == judgement.LEAST


def test_records_that_are_shallower_than_their_view_are_told(folder, capsys):
  config = common.base()
  config.data.ct, config.batch.ct = str(folder), 2
  config.views.ct.update(dict(extent='centre', size=(32, 16, 16)))
  config.loss = dict(drr=0.)      # none are rendered
  streams.build(config, ['ct'])['ct'].close()
  assert ('data.ct: records have 24 slices at most, views.ct.size=(32, 16, 16) is filled up around them. FIX: '
          'data.tile=32') in capsys.readouterr().err
  config.data.tile = 0      # 24, 36 and 30 slices
  streams.build(config, ['ct'])['ct'].close()
  assert 'filled up' not in capsys.readouterr().err


def truth_reduced(volume):    # 2 mm -> 40 * 2 / 27 mm: exact box means by fine replication
  fine = volume.repeat(27, 1).repeat(27, 2).reshape(len(volume), 27, 40, 27, 40)
  return fine.mean((2, 4))


def test_reduced_scan_keeps_extent_and_size_limit():
  volume = ct(50, side=200)
  small, spacing = tiles.reduced(volume, (5., .7, .7))
  np.testing.assert_allclose(np.multiply(small.shape, spacing), np.multiply(volume.shape, (5., .7, .7)))
  assert spacing[0] == 5 and all(2.8 < s < 3.2 for s in spacing[1:])
  np.testing.assert_allclose(small.mean(), volume.mean(), atol=.1)
  same, spacing = tiles.reduced(volume, (5., 3., 3.))
  np.testing.assert_array_equal(same, volume)
  large, spacing = tiles.reduced(np.zeros((300, 200, 200), np.int16), (3., 2.5, 2.5))
  assert large.nbytes <= 4 << 20
  np.testing.assert_allclose(np.multiply(large.shape, spacing), (900, 500, 500))


def test_short_scans_are_padded_with_air_and_wide_ones_cut(tmp_path):
  scan = tiles.read(save(tmp_path / 'a.nii', ct(19)))
  assert scan.volume.shape == (24, 40, 40)
  np.testing.assert_array_equal(scan.volume[2:21], ct(19))
  assert (scan.volume[:2] == -1024).all() and (scan.volume[21:] == -1024).all()
  wide = ct(24, side=330)[:, :300]
  scan = tiles.read(save(tmp_path / 'b.nii', wide))
  np.testing.assert_array_equal(scan.volume, wide[:, 30:270, 33:297])


def test_values_are_clipped_before_anything_else(tmp_path):
  volume = ct(24)
  volume[:, :20] = -3024
  volume[0, 30, 30] = 5000
  scan = tiles.read(save(tmp_path / 'a.nii', volume), whole=True)
  assert scan.volume.min() == -1024 and scan.volume.max() == 3071
  assert (scan.whole[:, 0] == -1024).all()
  assert scan.warnings == [f'WARN HU_PADDING {tmp_path / "a.nii"}: 50.0 % of voxels below -1024 (minimum -3024): '
                           'scanner padding, clipped']


@pytest.mark.realdata
def test_padding_of_a_real_scan(shared):
  scan = tiles.read(shared / 'data/ct/crlm_CT-1004.nii.gz')
  assert scan.volume.shape == (41, 409, 409) and scan.volume.min() >= -1024
  share = float(scan.warnings[0].split('%')[0].split()[-1])
  assert share == pytest.approx(21.3, abs=.1) and 'minimum -3024' in scan.warnings[0]


@pytest.mark.realdata
def test_tile_counts_of_the_shared_scans(shared, capsys):
  counts = {}
  source = sources.CTFolder(f'{shared}/data/ct/*.nii.gz,{shared}/data/ct/sts')
  for file, _ in source.parts:
    depth = source.depth[source.items[file].path]
    counts.setdefault(depth, {}).setdefault(file, 0)
    counts[depth][file] += 1
  documented = {30: 2, 41: 3, 47: 3, 51: 4, 60: 4, 68: 5, 78: 6, 112: 9, 134: 11, 137: 11, 152: 12, 164: 13}
  for depth, n in documented.items():
    assert set(counts[depth].values()) == {n}, depth


# ---- refusals

def faulty():
  smooth = ct(24).astype(np.float32)
  return {
      'CONSTANT': np.full((24, 40, 40), -1000, np.int16), 'TOO_SMALL': ct(15),
      'NONFINITE': np.where(np.arange(40) < 1, np.nan, smooth).astype(np.float32),
      'HU_UNCALIBRATED': np.abs(ct(24)) % 256, 'HU_INTERCEPT': (ct(24) + 1024).astype(np.int16)}


@pytest.mark.parametrize('code', list(faulty()))
def test_unfit_volumes_are_refused(tmp_path, code):
  path = save(tmp_path / 'x.nii', faulty()[code])
  with pytest.raises(DataError) as e:
    tiles.read(path)
  assert e.value.code == code and 'x.nii' in str(e.value) and '\n' not in str(e.value)
  if code.startswith('HU'):
    tiles.read(path, 'other')


def test_eight_bit_sources_and_wide_spacing_are_refused(tmp_path):
  volume = ct(24)
  scaled = nib.Nifti1Image((np.abs(volume) % 256).astype(np.uint8).transpose(2, 1, 0), np.diag([2., 2, 3, 1]))
  header = scaled.header.copy()
  header['scl_slope'], header['scl_inter'], header['vox_offset'] = 1, -300, 352
  (tmp_path / 'x.nii').write_bytes(header.binaryblock + bytes(4) + np.asarray(scaled.dataobj).tobytes('F'))
  with pytest.raises(DataError, match='HU_UNCALIBRATED'):
    tiles.read(tmp_path / 'x.nii')
  with pytest.raises(DataError, match='SPACING .* 12.00 mm'):
    tiles.read(save(tmp_path / 'y.nii', volume, (12., 2., 2.)))
  assert tiles.read(save(tmp_path / 'z.nii', volume, (9., 4., 4.))).warnings[0].split()[1] == 'SPACING'


def test_a_mixed_folder_gives_one_line_per_bad_file(folder, capsys):
  (folder / 'deep/er').mkdir(parents=True)
  for code, volume in faulty().items():
    save(folder / 'deep' / 'er' / f'{code}.nii.gz', volume)
  (folder / 'cut.nii.gz').write_bytes((folder / 'case0.nii.gz').read_bytes()[:5000])
  (folder / 'zero.nii').write_bytes(b'')
  (folder / 'notes.txt').write_text('x')
  (folder / 'table.csv').write_text('x')
  (folder / '._case0.nii.gz').write_bytes(b'junk that macOS leaves behind')
  source = sources.CTFolder(str(folder))
  assert len(source) == 5 and not any(source[i]['bad'] for i in range(5))
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 7 + 1
  for code in (*faulty(), 'TRUNCATED', 'ZERO_BYTES'):
    line, = [x for x in lines if x.startswith(f'WARN {code} {folder}')]
    assert '; skipped. FIX: ' in line
  assert lines[-1] == ('data.ct: 10 files, 3 usable, 5 records; refused: 1 CONSTANT, 1 HU_INTERCEPT, '
                       '1 HU_UNCALIBRATED, 1 NONFINITE, 1 TOO_SMALL, 1 TRUNCATED, 1 ZERO_BYTES; '
                       'ignored: 1 *.csv, 1 *.txt')
  with pytest.raises(DataError, match='TRUNCATED .*cut.nii.gz'):    # the first in order
    sources.CTFolder(str(folder), on_bad_file='stop')


def test_empty_folders_say_what_they_hold(tmp_path):
  for i in range(12):
    (tmp_path / f'{i}.dcm').write_bytes(b'x')
  for make, leaf in ((sources.CTFolder, 'data.ct'), (sources.XrayFolder, 'data.xray')):
    with pytest.raises(DataError, match=f'EMPTY_DIR {tmp_path}: .*found 12 .*dcm.* FIX: point {leaf}'):
      make(str(tmp_path))
  with pytest.raises(DataError, match='EMPTY_DIR .*found nothing'):
    sources.CTFolder(str(tmp_path / 'absent'))
  (tmp_path / 'x.nii').write_bytes(b'')
  with pytest.raises(DataError, match='EMPTY_DIR .*none of 1 files is usable .1 ZERO_BYTES.'):
    sources.CTFolder(str(tmp_path))


def test_patterns_pairs_and_order(tmp_path):
  for name in ('b/x.nii', 'a/y.nii.gz', 'a/deep/z.nii'):
    save(tmp_path / name, ct(24))
  nib.save(nib.Nifti1Pair(ct(24).transpose(2, 1, 0), np.eye(4)), tmp_path / 'a' / 'pair.img')
  names = lambda spec: [i.path[len(str(tmp_path)) + 1:] for i in readers.discover(spec, 'volume').items]
  assert names(str(tmp_path)) == ['a/deep/z.nii', 'a/pair.hdr', 'a/y.nii.gz', 'b/x.nii']
  assert names(f'{tmp_path}/a/*.nii*') == ['a/y.nii.gz']
  assert names(f'{tmp_path}/**/*.nii') == ['a/deep/z.nii', 'b/x.nii']
  assert names(f'{tmp_path}/b, {tmp_path}/a/pair.*') == ['a/pair.hdr', 'b/x.nii']
  assert names(f'{tmp_path}/[ab]') == names(str(tmp_path))
  assert names(f'{tmp_path}/b/x.nii,{tmp_path}/b') == ['b/x.nii']


def test_radiographs_of_a_folder(tmp_path, capsys):
  grey = np.random.default_rng(0).integers(0, 255, (50, 40)).astype(np.uint8)
  for name in ('a.png', 'b.JPG', 'c.jpeg', 'd.PNG'):
    Image.fromarray(grey).save(tmp_path / name)
  (tmp_path / 'e.png').write_text('no picture')
  source = sources.XrayFolder(str(tmp_path))
  assert len(source) == 4
  np.testing.assert_array_equal(source[0]['image'], grey)
  assert [source[i]['name'] for i in range(4)] == ['a.png', 'b.JPG', 'c.jpeg', 'd.PNG']
  assert 'WARN NOT_IMAGE' in capsys.readouterr().err


# ---- failures after the start

def test_a_file_that_fails_later_is_replaced_by_the_next_good_record(folder, capsys):
  source = sources.CTFolder(str(folder), cache_bytes=1)    # keeps one scan
  (folder / 'case1.nii.gz').write_bytes(b'damaged')
  source[4], capsys.readouterr()
  for _ in range(2):
    for i in (1, 2):
      record = source[i]
      np.testing.assert_array_equal(record['volume'], ct(30, 2)[:24])
      assert record['bad'] and record['index'] == i and record['name'] == 'case2.nii.gz z0'
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 1 and err[0].startswith(f'WARN NOT_IMAGE {folder / "case1.nii.gz"}')
  (folder / 'case2.nii.gz').unlink()
  fresh = pickle.loads(pickle.dumps(source))    # as a worker process gets it
  assert fresh[4]['name'] == 'case0.nii.gz z0' and fresh[4]['bad']    # wraps round
  save(folder / 'case0.nii.gz', ct(40))
  with pytest.raises(DataError, match='not one record'):
    pickle.loads(pickle.dumps(source))[0]


def test_stop_raises_the_fault_of_the_file(folder):
  source = sources.CTFolder(str(folder), on_bad_file='stop', cache_bytes=1)
  (folder / 'case1.nii.gz').unlink()
  source[4]
  for _ in range(2):
    with pytest.raises(DataError, match='UNREADABLE .*case1'):
      source[1]
  assert not source[0]['bad']


# ---- cache

def test_cache_is_bounded_and_decodes_once():
  made, cache = [], sources.Cache(1000)

  def make(key, size=300):
    made.append(key)
    time.sleep(.02)
    return np.zeros(size, np.uint8), 'text'

  threads = [threading.Thread(target=lambda k=k: cache.get(k % 3, lambda: make(k % 3))) for k in range(12)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert sorted(made) == [0, 1, 2] and cache.bytes == 900
  cache.get(0, None)    # the most recent now
  cache.get('new', lambda: make('new'))
  assert cache.bytes == 900 and len(cache) == 3
  cache.get(0, None)
  cache.get('huge', lambda: make('huge', 5000))
  assert cache.bytes == 5000 and len(cache) == 1
  with pytest.raises(ValueError):    # read-only: a record is shared
    cache.get('huge', None)[0][0] = 1
  with pytest.raises(ZeroDivisionError):
    cache.get('bad', lambda: 1 / 0)
  assert len(pickle.loads(pickle.dumps(cache))) == 0


def test_cached_scans_stay_below_the_limit(tmp_path):
  for i in range(6):
    save(tmp_path / f'{i}.nii.gz', ct(24, i))
  one = 24 * 40 * 40 * 2
  source = sources.CTFolder(str(tmp_path), cache_bytes=2 * one)
  for i in np.random.default_rng(0).integers(0, 6, 50):
    np.testing.assert_array_equal(source[int(i)]['volume'], ct(24, int(i)))
    assert source.cache.bytes <= 2 * one


# ---- phantoms

def test_phantom_records():
  source = sources.PhantomCT(3, 4, whole=True)
  assert len(source) == 4
  truth = phantom.make(3, phantom.INDICES['ct'][2])
  record = source[2]
  assert record['volume'].shape == (24, 112, 112) and record['volume'].dtype == np.int16
  assert record['spacing_mm'] == pytest.approx((2 * truth.spacing_mm[0], *truth.spacing_mm[1:]))
  np.testing.assert_allclose(record['volume'][5], (truth.hu[10].astype(float) + truth.hu[11]) / 2, atol=.5)
  assert record['whole'] is record['volume'] and source.labels(2) == truth.labels
  assert source[2]['volume'] is record['volume']
  assert 'whole' not in sources.PhantomCT(3, 4)[0]
  xray = sources.PhantomXray(3, 2, part='development')[1]
  index = phantom.INDICES['development'][1]
  np.testing.assert_array_equal(xray['image'], phantom.xray(phantom.make(3, index), 3, index))
  assert xray['image'].dtype == np.uint8 and xray['image'].shape == (128, 128)
  with pytest.raises(ValueError, match='between 1 and'):
    sources.PhantomCT(3, 0)


def test_middle_tile_of_one_file(tmp_path):
  config = common.base()
  record = sources.one_ct(save(tmp_path / 'x.nii', ct(41)), config)
  np.testing.assert_array_equal(record['volume'], ct(41)[8:32])
  assert 'whole' not in record
  config.drr.scope = 'volume'
  assert sources.one_ct(tmp_path / 'x.nii', config)['whole_spacing_mm'][0] == 3


# ---- manifest

def test_manifest_rows(tmp_path):
  path = tmp_path / 'manifest.jsonl'
  path.write_text('{"path": "a.nii", "kind": "volume", "label": {"nodule": 1}, "split": "train", "group": 7}\n\n'
                  '{"path": "/x/b.png", "kind": "image", "label": [0, 1], "split": "val", "id": "b"}\n'
                  '{"path": "gs://x/c.png", "kind": "image", "label": 3, "split": "test"}\n')
  rows = manifest.read(path)
  assert [r['path'] for r in rows] == [f'{tmp_path}/a.nii', '/x/b.png', 'gs://x/c.png']
  assert [r['label'] for r in rows] == [{'nodule': 1}, {'label_0': 0, 'label_1': 1}, {'class_3': 1}]
  assert [(r['id'], r['group']) for r in rows] == [('a.nii', '7'), ('b', 'b'), ('gs://x/c.png', 'gs://x/c.png')]


GOOD = '{"path": "a.nii", "kind": "volume", "label": 1, "split": "train", "group": "g"}'


@pytest.mark.parametrize('text, message', [
    ('', 'ZERO_BYTES'), ('\n', 'no rows'), ('{"path": ', 'line 1: not JSON'), ('[1]', 'not an object'),
    (GOOD.replace('"a.nii"', '3'), 'path is 3'),
    (GOOD.replace('volume', 'report'), "kind is 'report', expected volume or image"),
    (GOOD.replace('train', 'fit'), "split is 'fit', expected train"), (GOOD.replace(': 1', ': "x"'), "label is 'x'"),
    (GOOD.replace(': 1', ': [0, 2]'), 'label is'), (f'{GOOD}\n{GOOD}', 'line 2: id "a.nii" occurs twice'),
    (GOOD + '\n' + GOOD.replace('a.nii', 'b.nii').replace('train', 'test'), 'LEAK .*group g: train and test')])
def test_manifest_faults(tmp_path, text, message):
  path = tmp_path / 'manifest.jsonl'
  path.write_text(text)
  with pytest.raises(DataError, match=message):
    manifest.read(path)


# ---- what the user sees

def test_progress_is_shown_only_for_slow_work(monkeypatch, capsys):
  now = [0.]
  monkeypatch.setattr(files.time, 'monotonic', lambda: now[0])
  progress = files.Progress('data.ct: checking files', 10)
  for _ in range(4):
    now[0] += .5
    progress.advance()
  assert capsys.readouterr().err == ''
  now[0] += .5
  progress.advance()
  assert capsys.readouterr().err == 'data.ct: checking files: 5/10, 2.0/s, 2 s left\n'


def test_object_stores_are_listed_and_read(memory, tmp_path):
  nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4)), tmp_path / 'x.nii.gz')
  folder = epath.Path(memory) / 'ct'
  (folder / 'sub').mkdir(parents=True)
  for name in ('y1.nii.gz', 'y2.nii.gz', 'sub/x.nii.gz', 'z.dcm'):
    (folder / name).write_bytes((tmp_path / 'x.nii.gz').read_bytes())
  found = readers.discover(f'{memory}/ct/', 'volume')
  assert [i.path for i in found.items] == [f'{memory}/ct/{n}.nii.gz' for n in ('sub/x', 'y1', 'y2')]
  assert found.others == '1 *.dcm' and not found.faults
  assert readers.discover(f'{memory}/ct/y*.nii.gz', 'volume').items == found.items[1:]
  assert readers.discover(f'{memory}/ct/**/*.nii.gz', 'volume').items == found.items
  assert readers.volume(found.items[0]).array.shape == (8, 8, 8)
