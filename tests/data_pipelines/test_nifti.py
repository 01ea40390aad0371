"""The NIfTI reader against stored scenes, nibabel, SimpleITK, and files that are broken on purpose."""
import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest

from data_pipelines import nifti, tiles
from data_pipelines.errors import DataError

CODES = ('RAS', 'LPS', 'LAS', 'PLI', 'SRP', 'ILA')
ODD = 'data/odd/nifti'


def save(path, array, affine=None, cls=nib.Nifti1Image, sform=True, **header):
  image = cls(array, np.diag([2., 2., 3., 1.]) if affine is None else affine)
  image.header.set_xyzt_units('mm')
  image.set_sform(image.affine, code=1 if sform else 0)
  for name, value in header.items():
    image.header[name] = value
  nib.save(image, path)
  return str(path)


def scan(shape=(20, 18, 17), seed=0):
  return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def code_of(path, **kw):
  with pytest.raises(DataError) as e:
    nifti.read(path, **kw)
  assert '\n' not in str(e.value) and e.value.reason and e.value.remedy
  return e.value.code


# ---- orientation

@pytest.mark.parametrize('code', CODES)
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_six_orientations_give_one_array(fixtures, tmp_path, code, suffix):
  z = np.load(fixtures / 'drr' / 'orientation.npz')
  volume = nifti.read(save(tmp_path / f'x{suffix}', z[f'arr_{code}'], z[f'aff_{code}']))
  expected = z['arr_RAS'].transpose(2, 1, 0)    # nibabel order [R, A, S] -> [S, A, R]
  np.testing.assert_array_equal(volume.array, expected)
  assert volume.array.dtype == np.int16 and volume.array.flags.c_contiguous
  np.testing.assert_allclose(volume.affine, z['aff_RAS'][:, [2, 1, 0, 3]], atol=1e-4)
  np.testing.assert_allclose(volume.spacing_mm, np.linalg.norm(z['aff_RAS'][:3, :3], axis=0)[::-1], rtol=1e-6)
  assert volume.meta['axcodes'] == code


def test_every_permutation_and_flip_keeps_voxels_in_place(tmp_path):
  array, base = scan(), np.diag([1.5, 2., 3., 1.])
  base[:3, 3] = -20, 7, 11
  for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2)):
    for flips in range(8):
      sign = [-1 if flips >> i & 1 else 1 for i in range(3)]
      turn = nib.orientations.inv_ornt_aff(np.column_stack([axes, sign]), array.shape)
      stored = nib.apply_orientation(array, np.column_stack([axes, sign]))
      volume = nifti.read(save(tmp_path / 'x.nii', stored, base @ turn))
      np.testing.assert_array_equal(volume.array, array.transpose(2, 1, 0))
      np.testing.assert_allclose(volume.affine, base[:, [2, 1, 0, 3]], atol=1e-4)


@pytest.mark.realdata
def test_ten_real_orientations_are_one_volume(shared):
  files = sorted((shared / ODD).glob('orient_*.nii.gz'))
  assert len(files) == 10
  first = nifti.read(files[0])
  assert first.array.shape == (67, 79, 64)
  for f in [*files[1:], shared / ODD / 'air.hdr.gz', shared / ODD / 'air.img.gz']:
    volume = nifti.read(f)
    np.testing.assert_allclose(volume.array, first.array, atol=4e-6 if 'air' in f.name else 0)
    np.testing.assert_allclose(volume.affine, first.affine, atol=1e-4)


@pytest.mark.realdata
@pytest.mark.parametrize('ct, seg, label, offset_mm', [
    ('chaos_ct_set3', 'chaos_ct_set3_liver', 1, 69.7), ('totalseg_example_ct', 'totalseg_example_ct_seg', 5, 68.6)])
def test_liver_is_on_the_patients_right(shared, ct, seg, label, offset_mm):
  volume = nifti.read(shared / f'data/ct/{ct}.nii.gz')
  mask = nifti.read(shared / f'data/seg/{seg}.nii.gz')
  np.testing.assert_allclose(mask.affine, volume.affine, atol=1e-4)
  right = lambda m: np.nonzero(m)[2].mean() * volume.spacing_mm[2]
  liver = mask.array == label
  assert right(liver) - right(volume.array > -300) == pytest.approx(offset_mm, abs=.2)
  if label == 1:    # portal phase; 35 HU if z were flipped
    assert volume.array[liver].mean() == pytest.approx(140, abs=3)


@pytest.mark.realdata
def test_spine_is_posterior_and_lungs_on_their_sides(shared):
  labels = nifti.read(shared / 'data/seg/nsclc_LUNG1-001_rtstruct.nii.gz').array
  left, right, cord = (np.array([c.mean() for c in np.nonzero(labels == k)]) for k in (1, 2, 3))
  assert left[2] < cord[2] < right[2]
  assert cord[1] < min(left[1], right[1])
  organs = nifti.read(shared / 'data/seg/totalseg_example_ct_seg.nii.gz').array
  z = lambda k: np.nonzero(organs == k)[0].mean()
  assert z(21) < z(25) < z(27) < z(5)    # bladder, sacrum, L5, liver: feet to head


# ---- values

def test_scaling_is_applied_and_integers_stay_int16(tmp_path):
  array = scan()
  image = nib.Nifti1Image(array, np.eye(4))
  image.header.set_slope_inter(2., -24.)
  image.header.set_data_dtype(np.int16)
  path = tmp_path / 'x.nii'
  with open(path, 'wb') as f:    # the raw block is written as it is
    header = image.header.copy()
    header['vox_offset'] = 352
    f.write(header.binaryblock + bytes(4) + array.tobytes('F'))
  volume = nifti.read(path)
  assert volume.array.dtype == np.int16
  np.testing.assert_array_equal(volume.array, 2 * array.transpose(2, 1, 0) - 24)


@pytest.mark.parametrize('dtype, expected', [
    ('uint8', 'int16'), ('int16', 'int16'), ('int32', 'int16'), ('float32', 'int16'), ('float64', 'int16')])
@pytest.mark.parametrize('order', '<>')
def test_whole_numbers_of_any_type_and_byte_order_become_int16(tmp_path, dtype, order, expected):
  array = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(np.dtype(dtype).newbyteorder(order))
  header = nib.Nifti1Header(endianness=order)
  header.set_data_dtype(array.dtype)
  path = tmp_path / 'x.nii'
  nib.save(nib.Nifti1Image(array, np.eye(4), header), path)
  volume = nifti.read(path)
  assert volume.array.dtype == np.dtype(expected) and volume.array.dtype.isnative
  np.testing.assert_array_equal(volume.array, array.transpose(2, 1, 0))


def test_fractions_and_large_numbers_are_float32(tmp_path):
  half = nifti.read(save(tmp_path / 'a.nii', scan().astype(np.float32) + .5))
  large = nifti.read(save(tmp_path / 'b.nii', scan().astype(np.int32) + 40000))
  assert half.array.dtype == large.array.dtype == np.float32
  assert half.array[2, 1, 0] == scan()[0, 1, 2] + .5
  assert large.array[2, 1, 0] == int(scan()[0, 1, 2]) + 40000


def test_nonfinite_voxels_become_air_and_are_counted(tmp_path):
  array = scan().astype(np.float32)
  array[3, 4, 5], array[0, 0, 0] = np.nan, np.inf
  volume = nifti.read(save(tmp_path / 'x.nii', array))
  assert volume.array[5, 4, 3] == volume.array[0, 0, 0] == -1024 and volume.array.dtype == np.int16
  assert volume.meta['nonfinite'] == 2
  real = array[np.isfinite(array)]
  assert volume.meta['range'] == (real.min(), real.max())
  assert volume.meta['warnings'] == [f'WARN NONFINITE {tmp_path / "x.nii"}: 2 voxels (0.03 %) set to -1024']


def test_nifti2_pairs_and_trailing_axes(tmp_path):
  array = scan()
  expected = array.transpose(2, 1, 0)
  np.testing.assert_array_equal(nifti.read(save(tmp_path / 'a.nii.gz', array, cls=nib.Nifti2Image)).array, expected)
  np.testing.assert_array_equal(nifti.read(save(tmp_path / 'b.nii', array[..., None, None])).array, expected)
  save(tmp_path / 'c.img', array, cls=nib.Nifti1Pair)
  np.testing.assert_array_equal(nifti.read(tmp_path / 'c.img').array, expected)
  np.testing.assert_array_equal(nifti.read(tmp_path / 'c.hdr').array, expected)
  for kind in ('hdr', 'img'):
    (tmp_path / f'd.{kind}.gz').write_bytes(gzip.compress((tmp_path / f'c.{kind}').read_bytes()))
  np.testing.assert_array_equal(nifti.read(tmp_path / 'd.img.gz').array, expected)
  (tmp_path / 'd.img.gz').unlink()
  assert code_of(tmp_path / 'd.hdr.gz') == 'NOT_IMAGE'


# ---- affine

def test_affine_faults(tmp_path):
  array, warned = scan(), lambda v: [w.split()[1] for w in v.meta['warnings']]
  other = np.diag([2., 2., 3., 1.])
  other[0, 3] = 12
  image = nib.Nifti1Image(array, np.diag([2., 2., 3., 1.]))
  image.header.set_xyzt_units('mm')
  image.set_qform(other, 1)
  image.set_sform(np.diag([2., 2., 3., 1.]), 1)
  nib.save(image, tmp_path / 'two.nii')
  two = nifti.read(tmp_path / 'two.nii')
  assert warned(two) == ['FORM_MISMATCH'] and '12 mm' in two.meta['warnings'][0] and two.affine[0, 3] == 0
  none = nifti.read(save(tmp_path / 'none.nii', array, sform=False, qform_code=0))
  assert warned(none) == ['NO_AFFINE'] and none.spacing_mm == (3, 2, 2)
  np.testing.assert_array_equal(none.array, array.transpose(2, 1, 0))
  unit = nifti.read(save(tmp_path / 'unit.nii', array, xyzt_units=0))
  assert warned(unit) == ['UNITS'] and unit.spacing_mm == (3, 2, 2)
  metre = nifti.read(save(tmp_path / 'm.nii', array, np.diag([.002, .002, .003, 1]), xyzt_units=1))
  np.testing.assert_allclose(metre.spacing_mm, (3, 2, 2), rtol=1e-6)
  path = save(tmp_path / 'zero.nii', array)
  data = bytearray((tmp_path / 'zero.nii').read_bytes())
  data[280 + 32:280 + 48] = bytes(16)    # third row of the sform
  (tmp_path / 'zero.nii').write_bytes(data)
  assert code_of(path) == 'SPACING'


def rotation(degrees, axis=0):
  c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  turn = np.eye(4)
  i, j = [k for k in range(3) if k != axis]
  turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
  return turn


def test_small_tilt_is_kept_and_large_tilt_resampled_or_refused(tmp_path):
  array, base = scan(), np.diag([2., 2., 3., 1.])
  kept = nifti.read(save(tmp_path / 'a.nii', array, rotation(2.9) @ base))
  np.testing.assert_array_equal(kept.array, array.transpose(2, 1, 0))
  assert kept.meta['oblique_deg'] == pytest.approx(2.9, abs=1e-3) and not kept.meta['warnings']
  path = save(tmp_path / 'b.nii', array, rotation(15) @ base)
  turned = nifti.read(path)
  np.testing.assert_allclose(turned.affine[:3, :3], np.diag(turned.spacing_mm)[::-1])
  np.testing.assert_allclose(turned.spacing_mm, (3, 2, 2), rtol=1e-6)
  assert '15.0 deg' in turned.meta['warnings'][0]
  assert code_of(path, oblique='refuse') == 'OBLIQUE'
  shear = base.copy()
  shear[1, 2] = 3 * np.tan(np.radians(14))
  path = save(tmp_path / 'c.nii', array, shear)
  assert nifti.read(path).meta['warnings'][0].split()[1] == 'SHEAR'
  assert code_of(path, oblique='refuse') == 'SHEAR'


@pytest.mark.parametrize('shear', [False, True])
def test_resampling_agrees_with_simpleitk(tmp_path, shear):
  sitk = pytest.importorskip('SimpleITK')
  array = scan((30, 28, 15)).astype(np.float32) + .25
  affine = rotation(9, 2) @ rotation(16) @ np.diag([1.2, 1.4, 3., 1.])
  if shear:
    affine = np.diag([1.2, 1.4, 3., 1.])
    affine[2, 1] = .4
  affine[:3, 3] = -11, 6, 40
  ours = nifti.read(save(tmp_path / 'x.nii', array, affine))
  lps = np.diag([-1., -1, 1])
  source = sitk.GetImageFromArray(array.transpose(2, 1, 0))    # index space; the affine goes into the transform
  voxel_of_mm = sitk.AffineTransform(3)
  inverse = np.linalg.inv(affine)
  voxel_of_mm.SetMatrix((inverse[:3, :3] @ lps).ravel().tolist())
  voxel_of_mm.SetTranslation(inverse[:3, 3].tolist())
  grid = sitk.Image([int(n) for n in ours.array.shape[::-1]], sitk.sitkFloat32)
  grid.SetSpacing([float(s) for s in ours.spacing_mm[::-1]])
  grid.SetOrigin((lps @ ours.affine[:3, 3]).tolist())
  grid.SetDirection(lps.ravel().tolist())
  theirs = sitk.GetArrayFromImage(sitk.Resample(source, grid, voxel_of_mm, sitk.sitkLinear, 1e6))
  z, y, x = np.indices(ours.array.shape)
  at = inverse @ ours.affine @ np.stack([z, y, x, np.ones_like(z)]).reshape(4, -1)
  inside = ((at[:3] > 1e-3) & (at[:3] < np.array(array.shape)[:, None] - 1 - 1e-3)).all(0).reshape(z.shape)
  assert inside.mean() > .2
  np.testing.assert_allclose(ours.array[inside], theirs[inside], atol=.02)
  outside = ((at[:3] < -1e-3) | (at[:3] > np.array(array.shape)[:, None] - 1 + 1e-3)).any(0).reshape(z.shape)
  assert (ours.array[outside] == array.min()).all()


def test_padding_is_not_averaged_into_tissue(tmp_path):
  array = np.full((20, 20, 20), 40, np.int16)
  array[:, :6] = -3024
  volume = nifti.read(save(tmp_path / 'x.nii', array, rotation(10)))
  assert volume.array.min() == -1024 and [w.split()[1] for w in volume.meta['warnings']] == ['OBLIQUE', 'HU_PADDING']


# ---- broken files

ODD_OUTCOME = {    # file -> code of the reader, or None; warnings; code as CT
    '5D_small.nii': ('NDIM', (), None), 'rgb_ct_perfusion.nii.gz': ('DTYPE_RGB', (), None),
    'not-nifti.nii': ('NOT_IMAGE', (), None), 'zero_bytes.nii.gz': ('ZERO_BYTES', (), None),
    'big.nii.gz': (None, (), 'HU_UNCALIBRATED'), 'with_extension.nii.gz': (None, (), 'HU_UNCALIBRATED'),
    'rotated_CT_pitch.nii.gz': (None, ('OBLIQUE',), 'HU_UNCALIBRATED'),
    'sheared_scl_slope_uint8.nii.gz': (None, ('FORM_MISMATCH', 'SHEAR'), None),
    'wrong_spacing_chest.nii.gz': (None, (), None),
    'air.hdr.gz': (None, (), 'HU_UNCALIBRATED'), 'air.img.gz': (None, (), 'HU_UNCALIBRATED'),
    **{f'orient_{c}.nii.gz': (None, (), 'HU_UNCALIBRATED')
       for c in ('ASR', 'IRA', 'LAS', 'LPI', 'LPS', 'PIR', 'PLI', 'RAS', 'RSP', 'SLP')}}


@pytest.mark.realdata
def test_list_of_odd_files_is_complete(shared):
  assert {p.name for p in (shared / ODD).iterdir()} == set(ODD_OUTCOME)


@pytest.mark.realdata
@pytest.mark.parametrize('name', sorted(ODD_OUTCOME))
def test_odd_file(shared, name):
  refused, warned, as_ct = ODD_OUTCOME[name]
  path = shared / ODD / name
  if refused:
    assert code_of(path) == refused
    return
  volume = nifti.read(path)
  assert tuple(w.split()[1] for w in volume.meta['warnings']) == warned
  assert volume.array.dtype.isnative and np.isfinite(volume.array).all()
  if as_ct:
    with pytest.raises(DataError) as e:
      tiles.judge(volume, path)
    assert e.value.code == as_ct
    assert tiles.judge(volume, path, 'other') in ([], [f'WARN SPACING {path}: pixels of 4.00 mm'])
  else:
    tiles.judge(volume, path)


@pytest.mark.realdata
def test_odd_files_in_numbers(shared):
  read = lambda name: nifti.read(shared / ODD / name)
  big = read('big.nii.gz')
  assert big.array.shape == (21, 64, 64) and big.spacing_mm == (6, 4, 4)
  assert big.meta['range'] == pytest.approx((-8.7, 18.6), abs=.05)
  sheared = read('sheared_scl_slope_uint8.nii.gz')
  assert sheared.meta['range'] == pytest.approx((-1024, 789), abs=.5)
  assert '18.5 deg' in sheared.meta['warnings'][1]
  assert '16.5 deg' in read('rotated_CT_pitch.nii.gz').meta['warnings'][0]
  assert read('with_extension.nii.gz').array.shape == (151, 191, 161)
  assert read('wrong_spacing_chest.nii.gz').meta['range'] == (-1000, 2902)


def test_truncated_files_say_how_much_is_left(tmp_path):
  array = scan((40, 40, 40))
  path = save(tmp_path / 'x.nii.gz', array)
  data = gzip.compress(gzip.decompress((tmp_path / 'x.nii.gz').read_bytes()))
  (tmp_path / 'x.nii.gz').write_bytes(data[:len(data) // 2])
  assert nib.load(path).dataobj[..., 0].shape == (40, 40)    # the trap: the first slices can be read
  with pytest.raises(DataError, match=r'TRUNCATED .*x.nii.gz: gzip stream ends early \(about (49|50|51) %'):
    nifti.read(path)
  (tmp_path / 'x.nii.gz').write_bytes(data[:-5])
  assert code_of(path) == 'TRUNCATED'
  wrong = bytearray(data)
  wrong[-6] ^= 1    # CRC
  (tmp_path / 'x.nii.gz').write_bytes(wrong)
  with pytest.raises(DataError, match='TRUNCATED .*damaged'):
    nifti.read(path)
  plain = save(tmp_path / 'y.nii', array)
  (tmp_path / 'y.nii').write_bytes((tmp_path / 'y.nii').read_bytes()[:352 + 40**3])
  with pytest.raises(DataError, match='about 50 % of the voxels'):
    nifti.read(plain)


def test_missing_empty_and_foreign_files(tmp_path):
  assert code_of(tmp_path / 'no.nii.gz') == 'UNREADABLE'
  for name in ('x.nii', 'x.nii.gz', 'x.hdr'):
    (tmp_path / name).write_bytes(b'')
    (tmp_path / 'x.img').write_bytes(b'')
    assert code_of(tmp_path / name) == 'ZERO_BYTES'
  (tmp_path / 'text.nii').write_text('hello, I am a text file\nwith lines')
  assert code_of(tmp_path / 'text.nii') == 'NOT_IMAGE'
  (tmp_path / 'text.nii.gz').write_bytes(gzip.compress(b'hello'))
  assert code_of(tmp_path / 'text.nii.gz') == 'NOT_IMAGE'
  assert code_of(save(tmp_path / 'c.nii', scan().astype(np.complex64))) == 'DTYPE_COMPLEX'
  with pytest.raises(ValueError, match="expected 'resample' or 'refuse'"):
    nifti.read(save(tmp_path / 'd.nii', scan()), oblique='no')


@pytest.mark.parametrize('kind', ['packed', 'unpacked', 'header'])
def test_random_damage_gives_a_volume_or_one_clear_error(tmp_path, kind):
  rng = np.random.default_rng(7)
  path = tmp_path / 'x.nii.gz'
  save(path, scan((9, 8, 7)))
  packed = path.read_bytes()
  plain = gzip.decompress(packed)
  refused = 0
  for _ in range(200):
    data = bytearray(packed if kind == 'packed' else plain)
    for at in rng.integers(0, 352 if kind == 'header' else len(data), rng.integers(1, 6)):
      data[at] = rng.integers(256)
    if rng.random() < .2:
      data = data[:rng.integers(len(data))]
    path.write_bytes(bytes(data) if kind == 'packed' else gzip.compress(bytes(data), 1))
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      try:
        volume = nifti.read(path)
      except DataError as e:
        refused += 1
        assert '\n' not in str(e) and str(path) in str(e)
        continue
    assert volume.array.ndim == 3 and np.isfinite(volume.array).all() and np.isfinite(volume.affine).all()
  assert refused > (150 if kind == 'packed' else 20)


def test_memory_of_a_large_scan(tmp_path):
  """Less than six times the int16 array at its peak: no float64 copies."""
  import tracemalloc
  array = np.zeros((256, 256, 41), np.int16)
  array[::3] = 5
  path = save(tmp_path / 'x.nii.gz', array, scl_slope=1., scl_inter=0.)
  tracemalloc.start()
  tiles.read(path, 'other')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 6 * array.nbytes
