"""One scene in every storage order and type, the way back to the file, frames, and files that claim too much."""
import gzip
import time
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_pipelines import nifti, tiles, volume
from data_pipelines.errors import DataError

TWELVE = ('RAS', 'LPS', 'LAS', 'LPI', 'PLI', 'PIR', 'ASR', 'IRA', 'RSP', 'SLP', 'SRP', 'ILA')


def scene(shape=(17, 15, 13), seed=0):
  """[R, A, S] HU and its affine."""
  base = np.diag([1.5, 2., 3., 1.])
  base[:3, 3] = -20, 7, 11
  return np.random.default_rng(seed).integers(-1024, 2000, shape).astype(np.int16), base


def stored(array, affine, code):
  """[R, A, S] -> the same scene in another order of axes."""
  to = nib.orientations.axcodes2ornt(code)
  change = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], to)
  return nib.apply_orientation(array, change), affine @ nib.orientations.inv_ornt_aff(change, array.shape)


def save(path, array, affine, slope=None, inter=None):
  """A NIfTI file whose raw block is `array` as it is."""
  header = nib.Nifti1Header()
  header.set_data_shape(array.shape)
  header.set_data_dtype(array.dtype)
  header.set_xyzt_units('mm')
  header.set_sform(affine, 1)
  header['vox_offset'] = 352
  if slope is not None:
    header['scl_slope'], header['scl_inter'] = slope, inter
  data = header.binaryblock + bytes(4) + array.tobytes('F')
  path.write_bytes(gzip.compress(data, 1) if path.suffix == '.gz' else data)
  return path


def turned(degrees, axis=0):
  c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  out = np.eye(4)
  i, j = [k for k in range(3) if k != axis]
  out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
  return out


# ---- one form

@pytest.mark.parametrize('code', TWELVE)
def test_a_scene_is_the_same_in_every_orientation_and_type(tmp_path, code):
  truth, base = scene()
  array, affine = stored(truth, base, code)
  assert ''.join(nib.aff2axcodes(affine)) == code
  for kind, scaling in (('int16', ()), ('uint16', (1., -1024.)), ('float32', ())):
    raw = (array + 1024).astype(np.uint16) if kind == 'uint16' else array.astype(kind)
    read = nifti.read(save(tmp_path / 'x.nii.gz', raw, affine, *scaling))
    assert read.array.dtype == np.int16 and read.meta['dtype'] == kind and read.meta['axcodes'] == code
    np.testing.assert_array_equal(read.array, truth.transpose(2, 1, 0))
    np.testing.assert_allclose(read.affine, base[:, [2, 1, 0, 3]], atol=1e-4)
    np.testing.assert_allclose(read.spacing_mm, (3, 2, 1.5), rtol=1e-6)


@pytest.mark.parametrize('affine', [turned(16) @ turned(9, 2), np.array(
    [[1, 0, 0, 0], [0, 1, .25, 0], [0, 0, 1, 0], [0, 0, 0, 1.]])])
def test_straightened_values_stand_where_they_were(tmp_path, affine):
  """A field that is linear in space is interpolated without error, so its value tells where a voxel lies."""
  affine = affine @ np.diag([1.2, 1.4, 3., 1.])
  affine[:3, 3] = -11, 6, 40
  field = lambda x, y, z: 3 * x - 2 * y + 5 * z + .25
  index = np.indices((30, 28, 15)).reshape(3, -1)
  at = affine[:3, :3] @ index + affine[:3, 3:]
  read = nifti.read(save(tmp_path / 'x.nii', field(*at).reshape(30, 28, 15).astype(np.float32), affine))
  z, y, x = np.indices(read.array.shape)
  ras = np.einsum('ij,j...->i...', read.affine, np.stack([z, y, x, np.ones_like(z)]))
  back = np.einsum('ij,j...->i...', np.linalg.inv(affine), ras)
  inside = ((back[:3] > 1e-3) & (back[:3] < np.array([29, 27, 14])[:, None, None, None] - 1e-3)).all(0)
  assert inside.mean() > .2
  np.testing.assert_allclose(read.array[inside], field(*ras[:3])[inside], atol=2e-3)


@pytest.mark.parametrize('dtype', ['int16', 'float32'])
def test_straightening_slice_by_slice_is_that_of_the_whole_volume(dtype):
  """Bit for bit what scipy makes of a float copy of all of it; integers stay integers, rounded."""
  array = np.random.default_rng(0).integers(-1000, 2000, (20, 31, 23)).astype(dtype)
  array, affine = volume.canonical(array, turned(14) @ turned(8, 2) @ np.diag([-1.3, 1.1, 2.5, 1.]))
  out, grid = volume.straighten(array, affine)
  to_source = np.linalg.inv(affine) @ grid
  whole = ndimage.affine_transform(array.astype(np.float32), to_source[:3, :3], to_source[:3, 3], order=1,
                                   output_shape=out.shape, mode='constant', cval=float(array.min()))
  assert out.dtype == dtype and out.size > array.size
  np.testing.assert_array_equal(out, np.rint(whole) if dtype == 'int16' else whole)


@pytest.mark.parametrize('dtype, shear, spacing_mm', [
    ('int16', 0., (0., 0., 0.)), ('int16', .6, (0., 0., 0.)), ('float32', .6, (0., 0., 0.)),
    ('int64', 0., (0., 0., 0.)), ('int16', 0., (1., 1.2, 1.2)), ('int16', 0., (4., 3., 1.))])
def test_reading_a_scan_takes_less_than_six_times_its_size(tmp_path, dtype, shear, spacing_mm):
  """Its int16 size, as it is stored or, where that is larger, as it is made; float64 is in benchmarks/shards.py."""
  affine = np.diag([-1.5, -1.5, 2., 1.])
  affine[1, 2] = shear
  array = np.random.default_rng(0).integers(-1000, 2000, (160, 160, 96)).astype(dtype)
  path = save(tmp_path / 'x.nii.gz', array + np.array(.25, dtype), affine)
  tracemalloc.start()
  scan = tiles.read(path, whole=True, spacing_mm=spacing_mm, tile=0)
  peak, size = tracemalloc.get_traced_memory()[1], 2 * max(array.size, scan.volume.size)
  tracemalloc.stop()
  assert peak < 6 * size


# ---- the way back

@pytest.mark.parametrize('code', TWELVE)
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_a_written_volume_lies_on_the_grid_of_its_source(tmp_path, code, suffix):
  array, affine = stored(*scene(), code)
  source = nifti.read(save(tmp_path / 'x.nii', array, affine))
  path = tmp_path / f'y{suffix}'
  nifti.write(path, source.array, source)
  back = nib.load(path)
  np.testing.assert_array_equal(np.asanyarray(back.dataobj), array)
  np.testing.assert_allclose(back.affine, affine, atol=1e-5)
  assert back.get_data_dtype() == np.int16 and back.header.get_xyzt_units()[0] == 'mm'
  again = nifti.read(path)
  np.testing.assert_array_equal(again.array, source.array)
  np.testing.assert_array_equal(again.affine, source.affine)
  assert not again.meta['warnings']


def test_written_bytes_do_not_depend_on_the_time(tmp_path):
  source = nifti.read(save(tmp_path / 'x.nii', *scene()))
  nifti.write(tmp_path / 'a.nii.gz', source.array, source)
  time.sleep(1.1)
  nifti.write(tmp_path / 'b.nii.gz', source.array, source)
  assert (tmp_path / 'a.nii.gz').read_bytes() == (tmp_path / 'b.nii.gz').read_bytes()


@pytest.mark.parametrize('given, kept', [
    (bool, 'uint8'), ('uint8', 'uint8'), ('int16', 'int16'), ('int64', 'int32'), ('float16', 'float32'),
    ('float64', 'float32')])
def test_types_that_are_written(tmp_path, given, kept):
  source = nifti.read(save(tmp_path / 'x.nii', *stored(*scene(), 'PIR')))
  result = (source.array > 300).astype(given)
  nifti.write(tmp_path / 'y.nii', result, source)
  back = nifti.read(tmp_path / 'y.nii')
  assert back.meta['dtype'] == kept
  np.testing.assert_array_equal(back.array, result)


@pytest.mark.parametrize('shear', [False, True])
def test_results_on_a_straight_grid_come_back_to_the_tilted_one(tmp_path, shear):
  affine = np.diag([1.5, 1.5, 2., 1.])
  if shear:
    affine[1, 2] = .6
  else:
    affine = turned(12) @ affine
  index = np.indices((40, 38, 30)).reshape(3, -1)
  at = affine[:3, :3] @ index + affine[:3, 3:]
  centre = at.mean(1, keepdims=True)
  ball = (np.linalg.norm(at - centre, axis=0) < 18).reshape(40, 38, 30)
  smooth = (at - centre)[2].reshape(40, 38, 30).astype(np.float32) + .25
  source = nifti.read(save(tmp_path / 'x.nii', smooth, affine))
  z, y, x = np.indices(source.array.shape)
  ras = np.einsum('ij,j...->i...', source.affine, np.stack([z, y, x, np.ones_like(z)]))[:3]
  label = np.linalg.norm(ras - centre[..., None, None], axis=0) < 18
  nifti.write(tmp_path / 'label.nii.gz', label.astype(np.uint8) * 7, source)
  stored_label = nib.load(tmp_path / 'label.nii.gz')
  np.testing.assert_allclose(stored_label.affine, affine, atol=1e-5)
  back = np.asanyarray(stored_label.dataobj)
  assert set(np.unique(back)) == {0, 7} and back.shape == ball.shape
  assert 2 * (ball & (back == 7)).sum() / (ball.sum() + (back == 7).sum()) > .97
  nifti.write(tmp_path / 'smooth.nii.gz', ras[2] - centre[2] + .25, source)
  back = np.asanyarray(nib.load(tmp_path / 'smooth.nii.gz').dataobj)
  np.testing.assert_allclose(back, smooth, atol=2e-3)    # linear in space: both ways without error
  warned = [w.split()[1] for w in nifti.read(tmp_path / 'smooth.nii.gz').meta['warnings']]
  assert warned == (['SHEAR'] if shear else ['OBLIQUE'])    # no FORM_MISMATCH from a quaternion without shear


def test_what_cannot_be_written(tmp_path):
  source = nifti.read(save(tmp_path / 'x.nii', *scene()))
  with pytest.raises(DataError, match='SUFFIX .*y.mha: .* FIX: let it end in .nii.gz'):
    nifti.write(tmp_path / 'y.mha', source.array, source)
  with pytest.raises(DataError, match='UNWRITABLE .*absent'):
    nifti.write(tmp_path / 'absent' / 'y.nii', source.array, source)
  with pytest.raises(ValueError, match='array has shape'):
    nifti.write(tmp_path / 'y.nii', source.array[1:], source)
  with pytest.raises(ValueError, match='do not fit int32'):
    nifti.write(tmp_path / 'y.nii', source.array.astype(np.int64) << 40, source)
  with pytest.raises(ValueError, match='cannot write complex'):
    nifti.write(tmp_path / 'y.nii', source.array * 1j, source)


def test_a_volume_without_a_file_is_written_on_its_own_grid(tmp_path):
  array, base = scene()
  made = volume.Volume(array.transpose(2, 1, 0), (3., 2., 1.5), base[:, [2, 1, 0, 3]], {})
  nifti.write(tmp_path / 'x.nii', made.array, made)
  np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / 'x.nii').dataobj), array)
  np.testing.assert_allclose(nifti.read(tmp_path / 'x.nii').affine, made.affine, atol=1e-5)


@pytest.mark.realdata
@pytest.mark.parametrize('name', ['ct/ricord1b_440808-000100.nii.gz', 'ct/tptbox_sub-ct_label-22_ct.nii.gz',
                                  'seg/nsclc_LUNG1-001_rtstruct.nii.gz', 'odd/nifti/orient_SLP.nii.gz'])
def test_real_files_come_back_as_they_were(shared, tmp_path, name):
  path = shared / 'data' / name
  read = nifti.read(path)
  nifti.write(tmp_path / 'x.nii.gz', read.array, read)
  ours, theirs = nib.load(tmp_path / 'x.nii.gz'), nib.load(path)
  np.testing.assert_allclose(np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj), atol=1e-5)
  np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)


# ---- frames

@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_one_volume_of_a_file_with_more_axes(tmp_path, suffix):
  array = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4, 3, 2)).astype(np.int16)
  five = save(tmp_path / f'five{suffix}', array, np.eye(4))
  with pytest.raises(DataError, match=r'NDIM .*\(6, 5, 4, 3, 2\) has more than 3 axes.*frame=\(0, 0\) .* of its 6'):
    nifti.read(five)
  read = nifti.read(five, frame=(2, 1))
  np.testing.assert_array_equal(read.array, array[..., 2, 1].transpose(2, 1, 0))
  nifti.write(tmp_path / 'y.nii', read.array, read)
  assert nib.load(tmp_path / 'y.nii').shape == (6, 5, 4)
  for wrong in (1, (3, 0), (0, -1), (0, 0, 0)):
    with pytest.raises(DataError, match='NDIM .*there is no frame'):
      nifti.read(five, frame=wrong)
  four = save(tmp_path / f'four{suffix}', (array[..., 0] / 2).astype(np.float32), np.eye(4))
  np.testing.assert_array_equal(nifti.read(four, frame=1).array, array[..., 1, 0].transpose(2, 1, 0) / 2)
  late = save(tmp_path / f'late{suffix}', array[..., :1, :], np.eye(4))
  np.testing.assert_array_equal(nifti.read(late, frame=1).array, array[..., 0, 1].transpose(2, 1, 0))
  plain = save(tmp_path / f'plain{suffix}', array[..., 0, 0], np.eye(4))
  np.testing.assert_array_equal(nifti.read(plain, frame=0).array, nifti.read(plain).array)
  with pytest.raises(DataError, match='NDIM'):
    nifti.read(plain, frame=1)


# ---- files that claim or hold too much

def test_bombs_are_refused_before_memory_is_asked_for(tmp_path):
  header = nib.Nifti1Header()
  header.set_data_shape((10, 10, 10))
  header.set_data_dtype(np.int16)
  header.set_sform(np.eye(4), 1)
  header['vox_offset'] = 352
  start = header.binaryblock + bytes(4)
  large = header.copy()
  large['dim'][:4] = 3, 10000, 10000, 10000
  pack = lambda data, zeros: gzip.compress(data + bytes(zeros), 9)
  cases = {'SURPLUS': pack(start, 1 << 30), 'NOT_IMAGE': pack(b'', 1 << 30),
           'TOO_LARGE': pack(large.binaryblock + bytes(4), 1 << 20)}
  pair = pack(start[:344] + b'ni1\0' + start[348:], 0)
  for code, data in cases.items():
    assert len(data) < 2 << 20
    (tmp_path / 'x.nii.gz').write_bytes(data)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(DataError) as e:
      nifti.read(tmp_path / 'x.nii.gz')
    assert tracemalloc.get_traced_memory()[1] < 16 << 20 and time.monotonic() - began < 2
    tracemalloc.stop()
    assert e.value.code == code
  (tmp_path / 'p.hdr.gz').write_bytes(pair)
  (tmp_path / 'p.img.gz').write_bytes(pack(b'', 1 << 28))
  with pytest.raises(DataError, match='SURPLUS'):
    nifti.read(tmp_path / 'p.hdr.gz')
  (tmp_path / 'p.hdr.gz').write_bytes(pack(start, 1 << 28))
  with pytest.raises(DataError, match='SURPLUS'):
    nifti.read(tmp_path / 'p.img.gz')
  (tmp_path / 'x.nii').write_bytes(large.binaryblock + bytes(4))
  with pytest.raises(DataError, match='TOO_LARGE .*10000 x 10000 x 10000 = 1e.12 voxels'):
    nifti.read(tmp_path / 'x.nii')


def test_streams_of_several_members_and_with_padding_are_whole(tmp_path):
  array, affine = scene()
  data = save(tmp_path / 'x.nii', array, affine).read_bytes()
  packed = gzip.compress(data[:3000]) + gzip.compress(data[3000:]) + bytes(512)
  (tmp_path / 'y.nii.gz').write_bytes(packed)
  np.testing.assert_array_equal(nifti.read(tmp_path / 'y.nii.gz').array, array.transpose(2, 1, 0))
  (tmp_path / 'y.nii.gz').write_bytes(packed[:-540])
  with pytest.raises(DataError, match='TRUNCATED'):
    nifti.read(tmp_path / 'y.nii.gz')
