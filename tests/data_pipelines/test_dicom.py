"""DICOM series and radiographs against SimpleITK, closed forms, and files that are broken on purpose."""
import sys
import time
import warnings

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from data_pipelines import dicom, dicom_file, nifti, tiles
from data_pipelines.errors import DataError
from tests.data_pipelines import dicom_files
from tests.data_pipelines.dicom_files import bare, dataset, noise, save, series

S, C = np.sin(np.radians(14)), np.cos(np.radians(14))
ORIENTATIONS = {'axial': dicom_files.AXIAL, 'feet first': (-1, 0, 0, 0, 1, 0), 'prone': (-1, 0, 0, 0, -1, 0),
                'coronal': (1, 0, 0, 0, 0, -1), 'sagittal': (0, 1, 0, 0, 0, -1), 'cyclic': (0, 0, 1, 1, 0, 0),
                'turned by 1 deg': (.9998476952, .0174524064, 0, -.0174524064, .9998476952, 0)}


def listed(folder):
  return dicom.series([p for p in folder.rglob('*') if p.is_file()])


def read(folder, **kw):
  found = listed(folder)
  assert len(found.series) == 1 and not found.faults, found
  return dicom.read(found.series[0], **kw)


def code_of(call, *args, **kw):
  with pytest.raises(DataError) as e:
    call(*args, **kw)
  assert '\n' not in str(e.value) and e.value.reason and e.value.remedy
  return e.value.code


def by_simpleitk(folder, names=None):
  sitk = pytest.importorskip('SimpleITK')
  reader = sitk.ImageSeriesReader()
  reader.SetFileNames(names or reader.GetGDCMSeriesFileNames(str(folder)))
  return reader.Execute()


def assert_same_scene(volume, image):
  """Every voxel of a SimpleITK image stands at its physical point in ours."""
  import SimpleITK as sitk
  theirs = sitk.GetArrayFromImage(image)    # [k, j, i]
  assert theirs.size == volume.array.size
  corners = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
  lps = np.array([image.TransformIndexToPhysicalPoint(c) for c in corners])
  affine = np.eye(4)
  affine[:3, 3], affine[:3, :3] = lps[0], (lps[1:] - lps[0]).T
  affine = np.diag([-1., -1, 1, 1]) @ affine
  k, j, i = np.indices(theirs.shape)
  at = np.linalg.inv(volume.affine) @ affine @ np.stack([i, j, k, np.ones_like(i)]).reshape(4, -1)
  index = np.rint(at[:3]).astype(int)
  np.testing.assert_allclose(at[:3], index, atol=2e-3)
  np.testing.assert_allclose(volume.array[tuple(index)], theirs.ravel(), rtol=1e-6)


# ---- order and geometry

@pytest.mark.parametrize('name', ORIENTATIONS)
def test_series_agree_with_simpleitk(tmp_path, name):
  pixels = noise()
  affine = series(tmp_path, pixels, orientation=ORIENTATIONS[name])
  volume = read(tmp_path)
  image = by_simpleitk(tmp_path)
  assert_same_scene(volume, image)
  np.testing.assert_allclose(sorted(volume.spacing_mm), sorted(image.GetSpacing()), rtol=1e-6)
  assert volume.array.dtype == np.int16 and volume.array.flags.c_contiguous and not volume.meta['warnings']
  np.testing.assert_allclose(volume.meta['grid'][1], affine, atol=1e-6)


def test_axial_geometry_in_numbers(tmp_path):
  pixels = noise((4, 6, 5))
  series(tmp_path, pixels, step=3.)
  volume = read(tmp_path)
  assert volume.spacing_mm == pytest.approx((3, 1.5, 2)) and volume.meta['axcodes'] == 'LPS'
  np.testing.assert_array_equal(volume.array, pixels[:, ::-1, ::-1])    # superior up, anterior and right rising
  # first voxel: most right, most posterior: LPS (-30, -20 + 5 * 1.5) is the far end in A, and x = 30 - 4 * 2
  np.testing.assert_allclose(volume.affine[:3, 3], (30 - 8, 20 - 7.5, 40))


def test_names_and_numbers_do_not_matter(tmp_path):
  pixels = noise()
  for seed in range(3):
    series(tmp_path / str(seed), pixels, seed=seed)
  volumes = [read(tmp_path / str(seed)) for seed in range(3)]
  np.testing.assert_array_equal(volumes[0].array, volumes[1].array)
  np.testing.assert_array_equal(volumes[0].array, volumes[2].array)


def test_distance_is_that_of_positions(tmp_path):
  series(tmp_path, noise(), step=2.5, SliceThickness=5., SpacingBetweenSlices=6.5)
  assert read(tmp_path).spacing_mm == pytest.approx((2.5, 1.5, 2))


def places(z, x=0.):
  return np.stack(np.broadcast_arrays(x, 0., z), 1)


@pytest.mark.parametrize('positions, code, text', [
    (places([0, 5, 10, 20, 25]), 'SLICE_GAP', 'distances 5, 5, 10, 5 mm: 1 slice missing after position 10.0'),
    (places([0, 5, 10, 25]), 'SLICE_GAP', '2 slices missing after position 10.0'),
    (places([0, 5, 10, 15.2]), 'SLICE_GAP', 'irregular after position 10.0'),
    (places([0, 5, 5, 10]), 'DUP_POSITION', '2 images at position 5.0 mm'),
    (places([0, 5, 10, 15], [0, 0, 3, 0]), 'GEOMETRY', 'shifted sideways by up to 3.0 mm')])
def test_irregular_positions_are_refused(tmp_path, positions, code, text):
  series(tmp_path, noise((len(positions), 6, 5)), positions=positions)
  with pytest.raises(DataError, match=f'{code} {tmp_path}: .*{text}'):
    read(tmp_path)


def test_small_irregularities_are_kept(tmp_path):
  series(tmp_path, noise((5, 6, 5)), positions=places([0, 5.05, 10, 15.04, 20]))
  volume = read(tmp_path)
  assert volume.spacing_mm[0] == pytest.approx(5) and not volume.meta['warnings']
  series(tmp_path / 'long', noise((5, 6, 5)), positions=places([0, 20.08, 40, 60.08, 80]), SeriesInstanceUID='9')
  assert read(tmp_path / 'long').spacing_mm[0] == pytest.approx(20)


# positions in mm; where they count as being, if that is somewhere else; positions of the result; slices made
THIN = np.arange(40) * .65
GAPS = {
    'one missing': ([0, 5, 10, 20, 25], None, np.arange(0, 26, 5), 1),
    'two in a row, one elsewhere': ([0, 2, 8, 10, 14, 16], None, np.arange(0, 17, 2), 3),
    'irregular': ([0, 5, 10, 17], None, np.linspace(0, 17, 4), 2),
    'small irregularities are kept': ([0, 5.04, 10, 20.03, 25], [0, 5, 10, 20, 25], np.arange(0, 26, 5), 1),
    'rounded tags': (np.delete(np.round(THIN, 1), [7, 8, 20]), np.delete(THIN, [7, 8, 20]), THIN, 3)}


@pytest.mark.parametrize('slope', [1, .3])
@pytest.mark.parametrize('name', GAPS)
def test_missing_slices_are_interpolated_on_request(tmp_path, name, slope):
  """Against numpy.interp through every pixel."""
  positions, counted, want, made = GAPS[name]
  pixels = noise((len(positions), 6, 5))
  series(tmp_path, pixels, positions=places(positions), RescaleSlope=slope)
  with pytest.raises(DataError, match='SLICE_GAP .* FIX: copy the missing slices, or interpolate them: --resample_ga'):
    read(tmp_path)
  volume = read(tmp_path, resample_gaps=True)
  at = positions if counted is None else counted
  truth = np.apply_along_axis(lambda v: np.interp(want, at, v), 0, pixels * slope)
  truth = np.rint(truth) if slope == 1 else truth
  assert volume.array.dtype == (np.int16 if slope == 1 else np.float32)
  np.testing.assert_allclose(volume.array, truth[:, ::-1, ::-1], rtol=0, atol=1e-3)
  assert volume.spacing_mm[0] == pytest.approx(want[1], rel=2e-3) and volume.affine[2, 3] == positions[0]
  warning, = volume.meta['warnings']
  assert warning.startswith(f'WARN SLICE_GAP {tmp_path}: distances ')
  assert warning.endswith(f'; {made} of {len(want)} slices interpolated. FIX: copy the missing slices')


def test_a_tilted_series_with_a_gap(tmp_path):
  """Values are linear in space, so nothing is lost with a slice."""
  orientation, pixels = (1, 0, 0, 0, C, -S), np.indices((12, 30, 24)) * np.array([40, 3, 5]).reshape(3, 1, 1, 1)
  pixels = pixels.sum(0).astype(np.int16)
  series(tmp_path / 'all', pixels, step=(0, 0, 5.), orientation=orientation)
  left = np.delete(np.arange(12), [4, 5, 9])
  positions = np.array((-30., -20., 40.)) + np.outer(left, (0, 0, 5.))
  series(tmp_path / 'some', pixels[left], positions=positions, orientation=orientation, SeriesInstanceUID='1.2.9')
  whole, filled = read(tmp_path / 'all'), read(tmp_path / 'some', resample_gaps=True)
  np.testing.assert_allclose(filled.affine, whole.affine, atol=1e-9)
  np.testing.assert_allclose(filled.array, whole.array, atol=1e-3)
  assert [w.split()[1] for w in filled.meta['warnings']] == ['SLICE_GAP', 'GANTRY_TILT']


def test_what_is_not_filled(tmp_path):
  series(tmp_path / 'a', noise((4, 6, 5)), positions=places([0, 5, 10, 40]))
  with pytest.raises(DataError, match='5 slices missing .*largest gap is 30 mm. FIX: .*no more than 4 in a row'):
    read(tmp_path / 'a', resample_gaps=True)
  series(tmp_path / 'b', noise((4, 6, 5)), positions=places([0, 5, 5, 20]))
  assert code_of(read, tmp_path / 'b', resample_gaps=True) == 'DUP_POSITION'


def test_gantry_tilt_is_corrected(tmp_path):
  """Values are linear in space, so each tells where it was; steps go along z while slices are tilted by 14 deg."""
  index = np.indices((30, 40, 24)).reshape(3, -1)    # k, j, i
  orientation = (1, 0, 0, 0, C, -S)
  rows, columns, _ = dicom_files.turns(orientation)
  lps = np.array([[-30], [-20], [40]]) + np.outer(rows, index[2] * 2.) + np.outer(columns, index[1] * 1.5)
  lps = lps + np.outer([0, 0, 1], index[0] * 5.)
  ras = np.diag([-1, -1, 1]) @ lps
  field = lambda p: 3 * p[0] - 2 * p[1] + p[2]
  pixels = np.rint(16 * field(ras)).astype(np.int16).reshape(30, 40, 24)
  series(tmp_path, pixels, step=(0, 0, 5.), orientation=orientation, RescaleSlope='0.0625')
  volume = read(tmp_path)
  assert volume.meta['warnings'] == [f'WARN GANTRY_TILT {tmp_path}: 14.0 deg; in-plane shift 1.21 mm per slice; '
                                     "corrected. FIX: oblique='refuse' to exclude"]
  np.testing.assert_allclose(volume.affine[:3, :3], np.diag(volume.spacing_mm)[::-1])
  z, y, x = np.indices(volume.array.shape)
  at = np.einsum('ij,j...->i...', volume.affine, np.stack([z, y, x, np.ones_like(z)]))[:3]
  back = np.einsum('ij,j...->i...', np.linalg.inv(volume.meta['grid'][1]), np.concatenate([at, np.ones_like(at[:1])]))
  inside = ((back[:3] > 0) & (back[:3] < np.array([23, 39, 29])[:, None, None, None])).all(0)
  assert inside.mean() > .5
  np.testing.assert_allclose(volume.array[inside], field(at)[inside], atol=.05)    # stored in sixteenths
  with pytest.raises(DataError, match='GANTRY_TILT'):
    read(tmp_path, oblique='refuse')


def test_a_shift_below_one_percent_is_no_tilt(tmp_path):
  series(tmp_path, noise(), step=(.02, 0, 3.))
  volume = read(tmp_path)
  assert not volume.meta['warnings'] and volume.array.dtype == np.int16


def test_oblique_series_are_straightened(tmp_path):
  series(tmp_path, noise(), orientation=(1, 0, 0, 0, C, S))
  assert [w.split()[1] for w in read(tmp_path).meta['warnings']] == ['OBLIQUE']


@pytest.mark.parametrize('tags, code', [
    ({'ImagePositionPatient': None}, 'GEOMETRY'), ({'ImageOrientationPatient': None}, 'GEOMETRY'),
    ({'PixelSpacing': None}, 'GEOMETRY'), ({'PixelSpacing': [0, 1]}, 'SPACING'),
    ({'ImageOrientationPatient': [1, 0, 0, .7, .7, 0]}, 'GEOMETRY'),
    ({'ImageOrientationPatient': [0, 0, 0, 0, 0, 0]}, 'GEOMETRY'), ({'RescaleSlope': None}, 'NO_RESCALE'),
    ({'RescaleIntercept': None}, 'NO_RESCALE'), ({'RescaleSlope': 0}, 'NO_RESCALE'),
    ({'PhotometricInterpretation': 'PALETTE COLOR'}, 'DTYPE_RGB')])
def test_slices_without_their_meaning_are_refused(tmp_path, tags, code):
  path = str(save(tmp_path / 'x', dataset(noise((6, 5)), **tags)))
  assert code_of(dicom.read, dicom.Series(path, '', (path,))) == code


def test_slices_must_agree(tmp_path):
  series(tmp_path / 'a', noise((4, 6, 5)), each={'PixelSpacing': [[1, 1], [1, 1], [1, 1.1], [1, 1]]})
  assert code_of(read, tmp_path / 'a') == 'GEOMETRY'
  series(tmp_path / 'b', noise((4, 6, 5)), each={'PatientPosition': ['HFS'] * 4})
  save(tmp_path / 'b' / 'other', dataset(noise((6, 5), dtype=np.uint8, low=0, high=255),
                                         ImagePositionPatient=[-30, -20, 52]))
  assert code_of(read, tmp_path / 'b') == 'LOSSY_CT'


# ---- values

@pytest.mark.parametrize('dtype, low', [('int16', -2000), ('uint16', 0)])
def test_values_agree_with_simpleitk(tmp_path, dtype, low):
  pixels = noise(dtype=dtype, low=low)
  series(tmp_path, pixels, RescaleIntercept=-24)
  volume = read(tmp_path)
  assert volume.array.dtype == np.int16 and volume.meta['dtype'] == dtype
  assert_same_scene(volume, by_simpleitk(tmp_path))
  assert volume.meta['range'] == (float(pixels.min()) - 24, float(pixels.max()) - 24)


def test_slopes_of_each_slice(tmp_path):
  pixels = noise((5, 6, 5), low=0, high=500)
  slopes, inters = [1, 2, .5, 1.25, 3], [-1024, 0, 10, -5, 7]
  series(tmp_path, pixels, each={'RescaleSlope': slopes, 'RescaleIntercept': inters})
  volume = read(tmp_path)
  expected = pixels * np.array(slopes)[:, None, None] + np.array(inters)[:, None, None]
  assert volume.array.dtype == np.float32
  np.testing.assert_array_equal(volume.array, expected[:, ::-1, ::-1].astype(np.float32))
  series(tmp_path / 'whole', pixels * 2, each={'RescaleSlope': [.5] * 5}, SeriesInstanceUID='9')
  whole = read(tmp_path / 'whole')
  assert whole.array.dtype == np.int16
  np.testing.assert_array_equal(whole.array, pixels[:, ::-1, ::-1])


@pytest.mark.parametrize('signed', [False, True])
def test_unused_bits_do_not_reach_the_values(tmp_path, signed):
  values = noise((6, 5), low=-2048 if signed else 0, high=2048 if signed else 4096).astype(np.int32)
  overlay = noise((6, 5), seed=1, low=0, high=16).astype(np.int32)
  raw = ((values & 0xfff) | overlay << 12).astype(np.uint16)
  tags = {'BitsStored': 12, 'HighBit': 11, 'PixelRepresentation': int(signed)}
  path = str(save(tmp_path / 'x', dataset(raw, **tags)))
  volume = dicom.read(dicom.Series(path, '', (path,)))
  np.testing.assert_array_equal(volume.array[0], values[::-1, ::-1])
  raw = ((values & 0xfff) << 4 | overlay).astype(np.uint16)    # an old habit: the value in the upper bits
  path = str(save(tmp_path / 'y', dataset(raw, **tags | {'HighBit': 15})))
  np.testing.assert_array_equal(dicom.read(dicom.Series(path, '', (path,))).array, volume.array)


SYNTAXES = {'implicit': uid.ImplicitVRLittleEndian, 'big-endian': uid.ExplicitVRBigEndian, 'RLE': uid.RLELossless,
            'JPEG 2000': uid.JPEG2000Lossless}


@pytest.mark.parametrize('name', SYNTAXES)
@pytest.mark.parametrize('dtype', ['int16', 'uint16'])
def test_syntaxes_give_identical_volumes(tmp_path, name, dtype):
  pixels = noise((3, 40, 36), dtype=dtype, low=0 if dtype == 'uint16' else -2000)
  for folder, syntax in (('plain', None), ('other', SYNTAXES[name])):
    series(tmp_path / folder, pixels, syntax=syntax, RescaleIntercept=-1024)
  plain, other = read(tmp_path / 'plain'), read(tmp_path / 'other')
  np.testing.assert_array_equal(plain.array, pixels[:, ::-1, ::-1].astype(np.int32) - 1024)
  np.testing.assert_array_equal(plain.array, other.array)


def test_files_without_preamble_meta_header_and_extension(tmp_path):
  pixels = noise((4, 6, 5))
  for k, part in enumerate(pixels):
    bare(tmp_path / f'{k}', dataset(part, ImagePositionPatient=[0, 0, 4 * k]))
  assert (tmp_path / '0').read_bytes()[:2] != bytes(2)
  np.testing.assert_array_equal(read(tmp_path).array, pixels[:, ::-1, ::-1])


@pytest.mark.parametrize('tag, stored, intercept, masked', [
    (-2000, -2000, -1024, True), (63536, -2000, -1024, True),    # written as unsigned
    (-32768, -2000, -1024, False),    # a tag that names another value than the padding
    (0, 0, 0, False),                 # 0 HU is water: the tag must be wrong
    (32767, 32767, 0, True), (-1024, -1024, 0, False)])
def test_padding_is_masked_unless_it_could_be_tissue(tmp_path, tag, stored, intercept, masked):
  pixels = noise((6, 5), low=-500, high=500)
  pixels[:2] = stored
  ds = dataset(pixels, RescaleIntercept=intercept)
  ds.add_new('PixelPaddingValue', 'US' if tag > 32767 else 'SS', tag)
  path = str(save(tmp_path / 'x', ds))
  volume = dicom.read(dicom.Series(path, '', (path,)))
  expected = pixels.astype(int) + intercept
  if masked:
    expected[:2] = -1024
  np.testing.assert_array_equal(volume.array[0], expected[::-1, ::-1])
  assert volume.meta['padding'] == 10 * masked and volume.array.dtype == np.int16


def table(first, data, bits):
  item = Dataset()
  item.add_new('LUTDescriptor', 'US' if first >= 0 else 'SS', [len(data), first, bits])
  item.add_new('LUTData', 'OW', np.asarray(data, '<u2').tobytes())
  return item


def test_modality_table_replaces_the_slope(tmp_path):
  pixels = noise((6, 5), low=-3, high=9)
  data = np.random.default_rng(1).integers(0, 4096, 8)
  ds = dataset(pixels, RescaleSlope=None, RescaleIntercept=None, ModalityLUTSequence=[table(-1, data, 12)])
  path = str(save(tmp_path / 'x', ds))
  volume = dicom.read(dicom.Series(path, '', (path,)))
  np.testing.assert_array_equal(volume.array[0], data[np.clip(pixels + 1, 0, 7)][::-1, ::-1])


@pytest.mark.parametrize('tags, step', [({'BitsStored': 8, 'HighBit': 7}, ''), ({'RescaleSlope': 32.12}, '32 HU')])
def test_eight_bit_ct_is_refused(tmp_path, tags, step):
  path = str(save(tmp_path / 'x', dataset(noise((6, 5), dtype=np.uint8, low=0, high=255), **tags)))
  with pytest.raises(DataError, match=f'LOSSY_CT .*8-bit.*{step}'):
    dicom.read(dicom.Series(path, '', (path,)))


def test_a_missing_decoder_is_named_with_its_remedy(tmp_path, monkeypatch):
  path = str(save(tmp_path / 'x', dataset(noise((40, 36))), uid.JPEG2000Lossless))
  from pydicom.pixels import get_decoder
  monkeypatch.setattr(get_decoder(uid.JPEG2000Lossless), '_available', {})
  for call in (lambda: dicom.read(dicom.Series(path, '', (path,))), lambda: dicom.check_image(path)):
    with pytest.raises(DataError, match=r'TRANSFER_SYNTAX .*JPEG 2000.*FIX: pip install "unimiss_jax\[dicom\]"'):
      call()
  deflated = save(tmp_path / 'y', dataset(noise((6, 5))), uid.DeflatedExplicitVRLittleEndian)
  assert code_of(dicom.read, dicom.Series(str(deflated), '', (str(deflated),))) == 'TRANSFER_SYNTAX'


def test_without_pydicom_there_is_one_clear_fault(tmp_path, monkeypatch):
  series(tmp_path, noise((4, 6, 5)))
  monkeypatch.setitem(sys.modules, 'pydicom', None)
  found = listed(tmp_path)
  assert not found.series and len(found.faults) == 1
  assert str(found.faults[0]).startswith(f'DICOM {tmp_path}: 4 DICOM files: ')
  assert str(found.faults[0]).endswith('FIX: pip install "unimiss_jax[dicom]"')


# ---- several frames in a file

def enhanced(pixels, each=None, shared=None):
  ds = dataset(pixels, SOPClassUID=dicom_files.ENHANCED_CT, ImageOrientationPatient=None, ImagePositionPatient=None,
               PixelSpacing=None, RescaleSlope=None, RescaleIntercept=None)

  def group(**macros):
    out = Dataset()
    for macro, values in macros.items():
      item = Dataset()
      for name, value in values.items():
        setattr(item, name, value)
      setattr(out, macro, [item])
    return out
  shared = {'PlaneOrientationSequence': {'ImageOrientationPatient': list(dicom_files.AXIAL)},
            'PixelMeasuresSequence': {'PixelSpacing': [1.5, 2.]}} if shared is None else shared
  ds.SharedFunctionalGroupsSequence = [group(**shared)]
  ds.PerFrameFunctionalGroupsSequence = [group(**macros) for macros in each]
  return ds


def test_enhanced_objects_are_read_by_their_functional_groups(tmp_path):
  pixels, order = noise((6, 8, 7), low=0, high=900), [3, 0, 5, 1, 4, 2]
  each = [{'PlanePositionSequence': {'ImagePositionPatient': [0, 0, 4 * k]},
           'PixelValueTransformationSequence': {'RescaleSlope': 1 + k, 'RescaleIntercept': -k}} for k in order]
  path = str(save(tmp_path / 'x.dcm', enhanced(pixels, each)))
  found = dicom.series([path])
  assert found.series[0].path == path
  volume = dicom.read(found.series[0])
  expected = np.stack([pixels[order.index(k)].astype(int) * (1 + k) - k for k in range(6)])
  np.testing.assert_array_equal(volume.array, expected[:, ::-1, ::-1])
  assert volume.spacing_mm == pytest.approx((4, 1.5, 2))
  for broken, code in ((each[:5], 'MULTIFRAME'), ([each[0]] * 6, 'DUP_POSITION')):
    save(tmp_path / 'x.dcm', enhanced(pixels, broken))
    assert code_of(dicom.read, found.series[0]) == code
  save(tmp_path / 'x.dcm', enhanced(pixels, each, shared={}))
  assert code_of(dicom.read, found.series[0]) == 'GEOMETRY'


def test_frames_without_positions_are_refused_by_name(tmp_path):
  path = str(save(tmp_path / 'x.dcm', dataset(noise((3, 8, 7)))))
  with pytest.raises(DataError, match='MULTIFRAME .*CT Image Storage with 3 frames'):
    dicom.read(dicom.series([path]).series[0])
  assert code_of(dicom.read_image, path) == 'MULTIFRAME'


# ---- which files belong together

def test_localizers_reformats_and_other_sizes_stay_outside(tmp_path):
  pixels = noise((8, 12, 12))
  series(tmp_path, pixels)
  add = lambda name, part, **tags: save(tmp_path / name, dataset(part, **tags))
  for k in range(3):
    add(f'coronal{k}', noise((12, 12)), ImageOrientationPatient=[1, 0, 0, 0, 0, -1], ImagePositionPatient=[0, k, 0])
    add(f'reformat{k}', noise((12, 12)), ImageType=['DERIVED', 'SECONDARY', 'REFORMATTED', 'AVERAGE'])
  add('scout', noise((12, 12)), ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])
  add('small', noise((6, 6)))
  add('report', noise((6, 6)), Modality='SR')
  found = listed(tmp_path)
  assert len(found.series) == 1 and len(found.series[0].files) == 8 and found.series[0].path == str(tmp_path)
  assert found.others == {'DICOM localizer': 1, 'DICOM reformat': 3, 'DICOM of another orientation or size': 4,
                          'DICOM SR': 1}
  np.testing.assert_array_equal(dicom.read(found.series[0]).array, pixels[:, ::-1, ::-1])


def test_of_two_equal_parts_the_axial_one_is_kept(tmp_path):
  for name, turn in (('a', (1, 0, 0, 0, 0, -1)), ('b', dicom_files.AXIAL)):
    series(tmp_path / name, noise((4, 6, 5)), orientation=turn)
  assert all('/b/' in f for f in listed(tmp_path).series[0].files)


def test_two_series_in_one_folder(tmp_path):
  for number in (1, 2):
    series(tmp_path / str(number), noise((4, 6, 5), seed=number), SeriesInstanceUID=f'1.2.{number}')
    for f in list((tmp_path / str(number)).iterdir()):
      f.rename(tmp_path / f'{number}_{f.name}')
  found = listed(tmp_path)
  assert [s.path for s in found.series] == [f'{tmp_path}::1.2.1', f'{tmp_path}::1.2.2']
  for number, chosen in zip((1, 2), found.series):
    np.testing.assert_array_equal(dicom.read(chosen).array, noise((4, 6, 5), seed=number)[:, ::-1, ::-1])


def test_one_series_in_two_folders_and_copies(tmp_path):
  pixels = noise((8, 6, 5))
  series(tmp_path / 'p' / 'a', pixels)
  (tmp_path / 'p' / 'b').mkdir()
  for f in sorted((tmp_path / 'p' / 'a').iterdir())[:3]:
    f.rename(tmp_path / 'p' / 'b' / f.name)
  found = listed(tmp_path)
  assert [s.path for s in found.series] == [f'{tmp_path}/p']
  np.testing.assert_array_equal(dicom.read(found.series[0]).array, pixels[:, ::-1, ::-1])
  series(tmp_path / 'q', pixels, SeriesInstanceUID='7')
  (tmp_path / 'r').mkdir()
  for f in (tmp_path / 'q').iterdir():
    (tmp_path / 'r' / f.name).write_bytes(f.read_bytes())
  assert [s.path for s in listed(tmp_path).series] == [f'{tmp_path}/{n}' for n in 'pqr']
  for f in list((tmp_path / 'r').iterdir())[:1]:
    (tmp_path / 'q' / 'copy').write_bytes(f.read_bytes())
  q, = listed(tmp_path / 'q').series
  assert code_of(dicom.read, q) == 'DUP_POSITION'


def test_damaged_headers_are_faults_beside_good_series(tmp_path):
  series(tmp_path, noise((4, 6, 5)))
  (tmp_path / 'cut').write_bytes((tmp_path / 'IM0000').read_bytes()[:140])
  (tmp_path / 'empty').write_bytes(b'')
  found = listed(tmp_path)
  assert len(found.series) == 1 and {f.code for f in found.faults} <= {'ZERO_BYTES', 'NOT_IMAGE'} and found.faults


# ---- to NIfTI and back

@pytest.mark.parametrize('name', ORIENTATIONS)
def test_a_series_written_as_nifti_is_the_same_volume(tmp_path, name):
  affine = series(tmp_path / 'dicom', noise(), orientation=ORIENTATIONS[name], RescaleSlope=.5)
  volume = read(tmp_path / 'dicom')
  nifti.write(tmp_path / 'x.nii.gz', volume.array, volume)
  back = nifti.read(tmp_path / 'x.nii.gz')
  np.testing.assert_array_equal(back.array, volume.array)
  np.testing.assert_allclose(back.affine, volume.affine, atol=1e-4)
  np.testing.assert_allclose(back.meta['grid'][1], affine, atol=1e-4)
  assert not back.meta['warnings'] and back.array.dtype == volume.array.dtype


@pytest.mark.realdata
@pytest.mark.parametrize('name', ['totalseg_example_ct.nii.gz', 'tptbox*', 'ricord1b*', 'deeplesion/*'])
def test_a_real_scan_written_as_dicom_is_the_same(shared, tmp_path, name):
  import nibabel as nib
  path = sorted((shared / 'data/ct').glob(name))[0]
  image = nib.load(path)
  lps = np.diag([-1., -1, 1, 1]) @ image.affine
  spacing = np.linalg.norm(lps[:3, :3], axis=0)
  pixels = np.asanyarray(image.dataobj).astype(np.int16).transpose(2, 1, 0)
  positions = lps[:3, 3] + np.outer(np.arange(len(pixels)), lps[:3, 2])
  series(tmp_path, pixels, positions=positions, orientation=(*lps[:3, 0] / spacing[0], *lps[:3, 1] / spacing[1]),
         PixelSpacing=[float(f'{spacing[1]:.10g}'), float(f'{spacing[0]:.10g}')])
  ours, theirs = read(tmp_path), nifti.read(path)
  np.testing.assert_array_equal(ours.array, theirs.array)
  np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)


def test_memory_of_a_large_series(tmp_path):
  """Less than five times the int16 array at its peak."""
  import tracemalloc
  series(tmp_path, noise((60, 200, 200)))
  found = listed(tmp_path).series[0]
  tracemalloc.start()
  volume = dicom.read(found)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 5 * volume.array.nbytes


# ---- radiographs

def radiograph(tmp_path, pixels, **tags):
  ds = dataset(pixels, 'CR', **tags)
  return dicom.read_image(save(tmp_path / 'x.dcm', ds))


def test_monochrome1_is_inverted_at_its_depth(tmp_path):
  pixels = noise((40, 30), dtype=np.uint16, low=0, high=1024)
  tags = {'BitsStored': 10, 'HighBit': 9}
  plain = radiograph(tmp_path, pixels, **tags)
  assert plain.array.dtype == np.uint16 and plain.meta['size'] == (30, 40)
  np.testing.assert_allclose(plain.array, pixels * (65535 / 1023), atol=.5)
  inverted = radiograph(tmp_path, pixels, **tags, PhotometricInterpretation='MONOCHROME1')
  np.testing.assert_allclose(inverted.array, (1023 - pixels.astype(int)) * (65535 / 1023), atol=.5)
  word = radiograph(tmp_path, np.minimum(pixels, 1023), PhotometricInterpretation='MONOCHROME1')    # says 16 bits
  np.testing.assert_array_equal(word.array, inverted.array)


def linear(x, c, w):
  """PS3.3 C.11.2.1.2.1, pseudo code, y from 0 to 1."""
  return 0. if x <= c - .5 - (w - 1) / 2 else 1. if x > c - .5 + (w - 1) / 2 else (x - (c - .5)) / (w - 1) + .5


@pytest.mark.parametrize('function', ['', 'LINEAR_EXACT', 'SIGMOID'])
@pytest.mark.parametrize('mono1', [False, True])
def test_windows(tmp_path, function, mono1):
  pixels = noise((40, 30), dtype=np.uint16, low=0, high=4096)
  tags = {'RescaleSlope': 2, 'RescaleIntercept': -100, 'WindowCenter': [3000, 1], 'WindowWidth': [2000, 1]}
  tags |= {'VOILUTFunction': function} if function else {}
  tags |= {'PhotometricInterpretation': 'MONOCHROME1'} if mono1 else {}
  got = radiograph(tmp_path, pixels, BitsStored=12, HighBit=11, **tags)
  x = pixels * 2. - 100
  expected = {'': np.vectorize(linear)(x, 3000, 2000), 'LINEAR_EXACT': np.clip((x - 3000) / 2000 + .5, 0, 1),
              'SIGMOID': 1 / (1 + np.exp(-4 * (x - 3000) / 2000))}[function]
  np.testing.assert_allclose(got.array / 65535, 1 - expected if mono1 else expected, atol=1e-5)


def test_voi_tables_and_windows_that_show_nothing(tmp_path):
  pixels = noise((40, 30), dtype=np.uint16, low=0, high=256)
  data = np.random.default_rng(1).integers(0, 1024, 200)
  got = radiograph(tmp_path, pixels, VOILUTSequence=[table(20, data, 10)], WindowCenter=1, WindowWidth=2)
  np.testing.assert_allclose(got.array, data[np.clip(pixels.astype(int) - 20, 0, 199)] * 65535 / 1023, atol=.5)
  got = radiograph(tmp_path, pixels, BitsStored=8, HighBit=7, WindowCenter=90000, WindowWidth=10)
  np.testing.assert_allclose(got.array, pixels * 257., atol=.5)
  assert [w.split()[1] for w in got.meta['warnings']] == ['WINDOW']


def test_colour_radiographs_become_grey_and_large_ones_smaller(tmp_path):
  grey = noise((30, 20), dtype=np.uint8, low=0, high=255)
  ds = dataset(grey, 'CR', SamplesPerPixel=3, PhotometricInterpretation='RGB', PlanarConfiguration=0)
  ds.PixelData = np.repeat(grey[..., None], 3, -1).tobytes()
  np.testing.assert_array_equal(dicom.read_image(save(tmp_path / 'x.dcm', ds)).array, grey.astype(np.uint16) * 257)
  assert radiograph(tmp_path, noise((800, 1000), dtype=np.uint16, low=0, high=4096)).array.shape == (512, 640)
  assert code_of(dicom.read_image, save(tmp_path / 'y.dcm', dataset(grey, 'CR', PhotometricInterpretation=
                                                                    'PALETTE COLOR'))) == 'DTYPE_RGB'


def test_header_check_of_radiographs(tmp_path):
  path = save(tmp_path / 'x.dcm', dataset(noise((6, 5)), 'CR'))
  assert dicom.check_image(path) == dicom.read_image(path).array.shape == (6, 5)
  (tmp_path / 'y.dcm').write_text('hello')
  (tmp_path / 'z.dcm').write_bytes(b'')
  assert code_of(dicom.check_image, tmp_path / 'y.dcm') == 'NOT_IMAGE'
  assert code_of(dicom.check_image, tmp_path / 'z.dcm') == 'ZERO_BYTES'
  assert code_of(dicom.check_image, tmp_path / 'none.dcm') == 'UNREADABLE'
  assert code_of(dicom.read_image, tmp_path / 'none.dcm') == 'UNREADABLE'


# ---- damage

@pytest.mark.parametrize('syntax', ['plain', 'implicit', 'RLE', 'JPEG 2000'])
@pytest.mark.parametrize('part', ['header', 'everywhere'])
def test_random_damage_gives_a_volume_or_one_clear_error(tmp_path, syntax, part):
  rng = np.random.default_rng(11)
  path = tmp_path / 'x.dcm'
  save(path, dataset(noise((40, 36))), SYNTAXES.get(syntax))
  good = path.read_bytes()
  refused = 0
  for _ in range(75):
    data = bytearray(good)
    limit = len(data) if part == 'everywhere' else min(len(data), 1000)
    for at in rng.integers(128, limit, rng.integers(1, 9)):
      data[at] = rng.integers(256)
    if rng.random() < .3:
      data = data[:rng.integers(len(data))]
    path.write_bytes(data)
    began = time.monotonic()
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      dicom.series([path])
      for call in (dicom.read_image, lambda p: dicom.read(dicom.Series(str(p), '', (str(p),)))):
        try:
          array = call(path).array
        except DataError as e:
          refused += 1
          assert '\n' not in str(e) and str(path) in str(e)
        else:
          assert array.ndim in (2, 3) and np.isfinite(array).all()
    assert time.monotonic() - began < 5
  assert refused > 10


def test_files_that_claim_too_much(tmp_path):
  import tracemalloc
  for i, tags in enumerate(({'Rows': 65535, 'Columns': 65535}, {'NumberOfFrames': 2**31 - 1},
                            {'Rows': 8000, 'Columns': 8000})):
    for syntax in (None, uid.RLELossless):
      ds = dataset(noise((6, 5)))
      if syntax:
        ds.compress(syntax)
      for name, value in tags.items():
        setattr(ds, name, value)
      path = str(save(tmp_path / str(i), ds))
      tracemalloc.start()
      code = code_of(dicom.read, dicom.Series(path, '', (path,)))
      assert tracemalloc.get_traced_memory()[1] < 300 << 20
      tracemalloc.stop()
      assert code in ('TOO_LARGE', 'TRUNCATED', 'MULTIFRAME')


@pytest.mark.parametrize('at, value', [(8, 40000), (12, 40000), (16, 2**32 - 9), (40, 16384)])
def test_code_streams_that_claim_too_much(tmp_path, at, value):
  path = save(tmp_path / 'x', dataset(noise((40, 36))), uid.JPEG2000Lossless)
  data = bytearray(path.read_bytes())
  at += data.find(b'\xff\x4f\xff\x51')
  width = 2 if value == 16384 else 4
  data[at:at + width] = value.to_bytes(width, 'big')
  path.write_bytes(data)
  with pytest.raises(DataError, match='TRUNCATED .*compressed pixels (are|have no valid)'):
    dicom.read(dicom.Series(str(path), '', (str(path),)))


def test_cut_pixels_say_how_many_are_left(tmp_path):
  path = save(tmp_path / 'x', dataset(noise((64, 64))))
  path.write_bytes(path.read_bytes()[:-4096])
  with pytest.raises(DataError, match='TRUNCATED .*about 50 % of the pixels readable'):
    dicom.read(dicom.Series(str(path), '', (str(path),)))


@pytest.mark.parametrize('start, yes', [
    (bytes(128) + b'DICM', True), (b'', False), (bytes(512), False), (b'hello, this is text' * 30, False),
    (b'\x89PNG\r\n\x1a\n' * 60, False), (b'\x08\x00' * 256, False), (b'PK\x03\x04' + bytes(500), False)])
def test_what_looks_like_dicom(start, yes):
  assert dicom_file.looks(start) is yes


def test_random_bytes_do_not_look_like_dicom():
  rng = np.random.default_rng(0)
  assert not any(dicom_file.looks(rng.bytes(512)) for _ in range(5000))


# ---- real files

ODD = 'data/odd/dicom'
CTIMAGE = 'CTImage.dcm_{}TransferSyntax_1.2.840.10008.1.2{}.dcm'


@pytest.mark.realdata
def test_real_slice_in_four_syntaxes(shared):
  names = [('BigEndianExplicit', '.2'), ('LittleEndianImplicit', ''), ('RLELossless', '.5'),
           ('JPEG2000LosslessOnly', '.4.90')]
  paths = [str(shared / ODD / CTIMAGE.format(*n)) for n in names]
  volumes = [dicom.read(dicom.Series(p, '', (p,))) for p in paths]
  for path, volume in zip(paths, volumes):
    assert volume.array.dtype == np.int16 and volume.meta['range'] == (-2000 - 1024, 2402 - 1024)
    np.testing.assert_array_equal(volume.array, volumes[0].array)
    assert (volume.array < -1024).mean() > 1e-3    # HU_PADDING, for the doctor
    assert code_of(tiles.read, path) == 'TOO_SMALL'
  assert_same_scene(volumes[1], by_simpleitk(None, [paths[1]]))
  lossy = str(shared / ODD / CTIMAGE.format('JPEGProcess1', '.4.50'))
  with pytest.raises(DataError, match='LOSSY_CT .*8-bit lossy JPEG.*steps of 32 HU'):
    dicom.read(dicom.Series(lossy, '', (lossy,)))
  together = dicom.series([*paths, lossy])
  assert len(together.series) == 1 and code_of(dicom.read, together.series[0]) in ('LOSSY_CT', 'DUP_POSITION')


@pytest.mark.realdata
def test_real_radiographs(shared):
  import pydicom
  old = shared / ODD / 'CR-MONO1-10-chest'
  read = dicom.read_image(old)
  assert read.meta['mode'] == 'MONOCHROME1 10 bit' and read.array.shape == (440, 440)
  raw = pydicom.dcmread(old, force=True).PixelData
  raw = np.frombuffer(raw, '<u2').reshape(440, 440)
  shown = np.vectorize(linear)(raw.astype(float), 550, 1024)
  np.testing.assert_allclose(read.array / 65535, 1 - shown, atol=1e-5)
  jpeg = dicom.read_image(shared / ODD / 'cxr_jpeg_mono2.dcm')
  assert jpeg.meta['size'] == (1024, 1024) and jpeg.array.shape == (512, 512) and jpeg.array.max() > 60000
  assert dicom.series([old, shared / ODD / 'cxr_jpeg_mono2.dcm']).radiographs == [
      str(old), str(shared / ODD / 'cxr_jpeg_mono2.dcm')]


@pytest.mark.realdata
def test_real_series_with_tilt_and_gap(shared, tmp_path):
  import zipfile
  for name in ('gantrytilting', 'sliceincrement'):
    zipfile.ZipFile(shared / ODD / f'd2n_{name}_001.zip').extractall(tmp_path / name)
  tilted = read(tmp_path / 'gantrytilting')
  assert tilted.meta['warnings'][0].startswith(f'WARN GANTRY_TILT {tmp_path}/gantrytilting: 14.0 deg; in-plane shift '
                                               '1.21 mm per slice; corrected')
  assert tilted.meta['range'] == (-1024, -770) and tilted.meta['shape_canon'] == (4, 512, 512)
  assert code_of(tiles.read, tmp_path / 'gantrytilting') == 'TOO_SMALL'
  with pytest.raises(DataError, match='SLICE_GAP .*distances 5, 5, 10 mm: 1 slice missing after position 28.1'):
    read(tmp_path / 'sliceincrement')
  filled = read(tmp_path / 'sliceincrement', resample_gaps=True)
  assert filled.meta['shape_canon'] == (5, 512, 512) and filled.spacing_mm[0] == pytest.approx(5)
  assert '1 slice missing after position 28.1; 1 of 5 slices interpolated' in filled.meta['warnings'][0]
  files = sorted(map(pydicom.dcmread, (tmp_path / 'sliceincrement').rglob('*.dcm')),
                 key=lambda ds: ds.ImagePositionPatient[2])
  hu = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in files])
  z = [float(ds.ImagePositionPatient[2]) for ds in files]
  truth = np.concatenate([hu[:3], (hu[2:3] + hu[3:]) / 2, hu[3:]])
  assert filled.affine[2, 3] == z[0] and (z[2] + z[3]) / 2 == pytest.approx(z[0] + 15)
  np.testing.assert_array_equal(filled.array, np.rint(truth)[:, ::-1, ::-1])


@pytest.mark.realdata
def test_real_slices_of_one_archive(shared):
  folder = shared / 'data/ct/dicom'
  found = listed(folder)
  assert len(found.series) == 7 and all(s.path.endswith('_axial.dcm') for s in found.series)
  assert found.others == {'DICOM reformat': 2} and not found.faults
  for chosen in found.series:
    volume = dicom.read(chosen)
    assert volume.array.shape == (1, 512, 512) and volume.meta['axcodes'] == 'LPS'
    padded = (volume.array < -1024).mean() > 1e-3
    assert padded == ('A067967' in chosen.path or 'A098752' in chosen.path)    # the others say their padding
    assert padded or volume.meta['padding'] > 50000
    assert code_of(tiles.read, chosen.path) == 'TOO_SMALL'
    image = by_simpleitk(None, [chosen.path])
    if padded:
      assert_same_scene(volume, image)
