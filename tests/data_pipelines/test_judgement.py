"""What a look at values tells: made volumes and pictures with one fault each, and percentiles against NumPy."""
import nibabel as nib
import numpy as np
import pytest

from data_pipelines import finding, images, judgement
from data_pipelines.errors import DataError
from data_pipelines.finding import Finding
from data_pipelines.volume import settle


def volume(array=None, spacing=(3., 2., 2.), dtype='int16', affine=None, nonfinite=0):
  """Of [S, A, R] voxels, as a reader gives it."""
  array = tissue() if array is None else array
  affine = np.diag([*spacing[::-1], 1.]) if affine is None else affine
  meta = {'shape': array.shape[::-1], 'dtype': dtype, 'range': (float(array.min()), float(array.max())),
          'nonfinite': nonfinite}
  return settle(array.transpose(2, 1, 0), affine, 'x.nii', meta, [])


def tissue(shape=(24, 30, 40), seed=0):
  return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def found(v, modality='ct', **more):
  return {f.code: f.severity for f in judgement.volume(v, 'x.nii', modality, **more)}


def line(v, code, modality='ct'):
  text, = [f.line for f in judgement.volume(v, 'x.nii', modality) if f.code == code]
  return text


def test_a_good_scan_has_no_findings():
  assert found(volume()) == {}


def with_values(value, share=.01):
  array = tissue()
  array.flat[:int(share * array.size)] = value
  return array


FAULTS = {    # voxels, arguments -> code, severity, whether it is about HU, the line
    'constant': (np.full((24, 30, 40), -1024, np.int16), {}, 'CONSTANT', 'ERROR', False,
                 'every voxel is -1024; excluded (min-max would divide by zero)'),
    'nonfinite': (tissue(), {'nonfinite': 1440}, 'NONFINITE', 'ERROR', False, '5.0 % of the voxels are not finite'),
    'thin': (tissue((1, 30, 40)), {}, 'TOO_SMALL', 'ERROR', False, '1 slice, need >= 16; excluded for 3-D'),
    'narrow': (tissue((24, 15, 40)), {}, 'TOO_SMALL', 'ERROR', False, '24 x 15 x 40 voxels (S x A x R), need >= 16'),
    'thick': (tissue(), {'spacing': (12., 2, 2)}, 'SPACING', 'ERROR', False, 'voxels of 12.00 mm'),
    'coarse': (tissue(), {'spacing': (3., 4, 4)}, 'SPACING', 'WARN', False, 'pixels of 4.00 mm'),
    'padding': (with_values(-3024), {}, 'HU_PADDING', 'WARN', True,
                '1.0 % of voxels below -1024 (minimum -3024): scanner padding, clipped'),
    'stored numbers': ((tissue() + 1024).clip(0), {}, 'HU_INTERCEPT', 'ERROR', True,
                       'no negatives: looks like stored numbers without intercept -1024'),
    'grey': (tissue() % 256, {}, 'HU_UNCALIBRATED', 'ERROR', True,
             'values 0 … 255, no air; not HU. FIX: rescale or use --modality=other'),
    'eight bit': (tissue().clip(-300, 200), {'dtype': 'uint8'}, 'HU_UNCALIBRATED', 'ERROR', True,
                  'values -300 … 200'),
    'air': (tissue().clip(-1024, -770), {}, 'HU_IMPLAUSIBLE', 'WARN', True,
            'all values -1000 … -770: no soft tissue'),
    'clipped': (np.where(tissue() > 900, 1024, np.where(tissue() < -900, -1024, tissue())).astype(np.int16), {},
                'HU_CLIPPED', 'INFO', True, 'clipped to +-1024 by its source'),
    'metal': (with_values(3071), {}, 'METAL', 'INFO', True, '1.000 % of voxels at the upper limit')}


@pytest.mark.parametrize('name', FAULTS)
def test_each_fault_has_its_code(name):
  array, more, code, severity, of_hu, text = FAULTS[name]
  assert found(volume(array, **more)) == {code: severity}
  assert line(volume(array, **more), code).startswith(f'{severity} {code} x.nii: ')
  assert text in line(volume(array, **more), code)
  for modality in ('mr', 'other'):
    assert found(volume(array, **more), modality) == ({} if of_hu else {code: severity})


def test_little_padding_and_few_bright_voxels_are_no_finding():
  assert found(volume(with_values(-3024, 9e-4))) == {}
  array = tissue((24, 64, 100))
  array.flat[0] = 3071
  assert found(volume(array)) == {}


def test_slices_may_be_few_where_they_are_pictures():
  assert found(volume(tissue((1, 30, 40))), least=1) == {}
  assert found(volume(tissue((1, 15, 40))), least=1) == {'TOO_SMALL': 'ERROR'}


def test_orientation_is_told():
  lps = volume(affine=np.diag([-2., -2., 3., 1.]))
  assert line(lps, 'ORIENT') == 'INFO ORIENT x.nii: stored LPS, reoriented exactly to RAS'
  turn = np.eye(4)
  for degrees, severity in ((10, 'WARN'), (30, 'ERROR')):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn[:2, :2] = [[c, -s], [s, c]]
    tilted = volume(affine=turn @ np.diag([2., 2., 3., 1.]))
    warned = [finding.of_warning(t, 'x.nii') for t in tilted.meta['warnings']]
    kept = finding.worst_of_each_code(warned + judgement.volume(tilted, 'x.nii'))
    assert {f.code: f.severity for f in kept}['OBLIQUE'] == severity


def thorax(scale=1., lungs=True, couch=True):
  """A body of 320 x 200 mm with two lungs, above a couch; at 2 mm, or said to be smaller."""
  z, y, x = np.mgrid[:30, :150, :200]
  hu = np.full(z.shape, -1000, np.int16)
  hu[((x - 100) / 80) ** 2 + ((y - 90) / 50) ** 2 < 1] = 40
  if lungs:
    for centre in (65, 135):
      hu[((x - centre) / 25) ** 2 + ((y - 90) / 30) ** 2 < 1] = -800
  if couch:
    hu[:, 20:26, 5:195] = 200
  return volume(hu, (5., 2 * scale, 2 * scale))


def test_the_body_is_measured_without_the_couch():
  width, depth = judgement.body_mm(thorax())
  assert width == pytest.approx(320, abs=12) and depth == pytest.approx(200, abs=12)
  assert found(thorax()) == {}
  small = thorax(.4)
  assert found(small) == {'BODY_SIZE': 'WARN'}
  assert 'at 0.8 x 0.8 x 5 mm; header spacing probably wrong' in line(small, 'BODY_SIZE')


def test_without_lungs_or_cut_by_the_picture_a_body_has_no_size():
  assert judgement.body_mm(thorax(lungs=False)) is None
  full = thorax()
  assert judgement.body_mm(full._replace(array=full.array[:, :, 30:])) is None
  assert judgement.body_mm(volume(np.full((24, 30, 40), 50, np.int16))) is None


def test_percentiles_are_exact():
  array = tissue((20, 33, 41))
  array[:, :3] = -2000
  counts = judgement.histogram(array)
  assert counts.sum() == array.size and counts[-2000 + 2**15] == (array == -2000).sum()
  expected = np.percentile(array, (1, 50, 99), method='inverted_cdf')
  np.testing.assert_array_equal(judgement.percentiles(array, counts), expected)
  floats = (array / 100).astype(np.float32)
  np.testing.assert_allclose(judgement.percentiles(floats, judgement.histogram(floats)),
                             np.percentile(floats, (1, 50, 99)), atol=.1)
  extremes = np.array([[[-2**15, 2**15 - 1]]], np.int16)
  assert judgement.histogram(extremes)[[0, -1]].tolist() == [1, 1]


# ---- radiographs

def chest(shape=(300, 280)):
  """Left-right symmetric, dark lungs and a bright lower part."""
  y, x = np.mgrid[-1:1:shape[0] * 1j, -1:1:shape[1] * 1j]
  lungs = ((np.abs(x) - .45) / .3) ** 2 + ((y + .3) / .6) ** 2 < 1
  return (160 - 90 * lungs + 60 * y - 10 * (np.abs(x) > .9)).astype(np.uint8)


def look(array, mode='L', view=None):
  picture = images.Radiograph(array, {'mode': mode, 'size': array.shape[::-1], 'warnings': []})
  return {f.code: f for f in judgement.radiograph(picture, 'x.png', view)}


def test_an_upright_chest_has_no_findings_and_a_turned_one_has():
  assert look(chest()) == {}
  assert look(chest()[::-1]) == {}
  turned = look(np.ascontiguousarray(np.rot90(chest())))
  assert turned.keys() == {'ROTATED?'} and turned['ROTATED?'].severity == 'WARN'


def test_a_side_view_is_told_from_its_look_unless_the_list_says_its_view():
  side = np.ascontiguousarray(np.hstack([chest()[:, :140], chest()[:, :140]]))[:, 60:]
  side = (side * np.linspace(.1, 1, side.shape[1])).astype(np.uint8)
  assert look(side).keys() == {'LATERAL?'} and look(side, view='L') == {}


@pytest.mark.parametrize('mode, text', [
    ('RGBA', 'INFO MODE x.png: RGBA, alpha constant 255; one channel kept'),
    ('RGB', 'INFO MODE x.png: RGB, all grey; one channel kept'), ('I;16', '16 bit; kept'),
    ('MONOCHROME1 10 bit', 'INFO MONO1 x.png: inverted (10 bit)')])
def test_modes(mode, text):
  (only,) = look(chest(), mode).values()
  assert text in only.line and only.severity == 'INFO'


def test_pictures_without_content_are_refused():
  assert look(np.zeros((300, 300), np.uint8))['CONSTANT'].severity == 'ERROR'
  assert look(chest()[::12, ::12])['TOO_SMALL'].severity == 'ERROR'


# ---- label maps

def grid(shape=(20, 30, 40), spacing=(2., 2., 3.), origin=(5., 6., 7.)):
  affine = np.diag([*spacing, 1.])
  affine[:3, 3] = origin
  return shape, affine


def test_a_label_map_may_be_stored_in_another_order():
  shape, affine = grid()
  for code in ('RAS', 'LPS', 'PIR', 'SLP'):
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(code))
    stored = tuple(nib.apply_orientation(np.zeros(shape), turn).shape)
    other = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    assert judgement.mask_grid((stored, other), (shape, affine), 'm.nii') is None


@pytest.mark.parametrize('changed, text', [
    ({'origin': (5., 6., 7 + 82 * 3)}, 'origin differs by 82 slices from its image'),
    ({'origin': (7., 6., 7.)}, 'origin differs by 1 columns'), ({'shape': (20, 30, 41)}, 'shape 20 x 30 x 41'),
    ({'spacing': (2., 2., 3.1)}, 'voxels of 2.0 x 2.0 x 3.1 mm')])
def test_another_grid_is_named(changed, text):
  told = judgement.mask_grid(grid(**changed), grid(), 'm.nii')
  assert told.line.startswith('ERROR MASK_GRID m.nii: ') and text in told.line


# ---- findings

def test_the_parts_of_a_line():
  error = DataError('TRUNCATED', 'a\nb.nii', 'ends\nearly', 'copy again')
  assert finding.of_error(error).line == 'ERROR TRUNCATED a b.nii: ends early; excluded. FIX: copy again'
  text = 'WARN SHEAR a: b.nii: tilt 5 deg; resampled. FIX: exclude it'
  parsed = finding.of_warning(text, 'a: b.nii')
  assert parsed.line == text and (parsed.path, parsed.remedy) == ('a: b.nii', 'exclude it')
  assert finding.of_warning('WARN MODE x: a\n b', 'x').line == 'WARN MODE x: a b'
  assert str(Finding('ERROR', 'A', 'x', 'y', 'excluded', 'z').error) == 'A x: y. FIX: z'


def test_one_finding_of_each_code_is_kept():
  many = [Finding('INFO', 'A', 'x', '1'), Finding('WARN', 'B', 'x', '2'), Finding('ERROR', 'B', 'x', '3'),
          Finding('WARN', 'B', 'x', '4'), Finding('WARN', 'C', 'x', '5'), Finding('WARN', 'C', 'x', '6')]
  assert [f.reason for f in finding.worst_of_each_code(many)] == ['3', '6', '1']
  assert [finding.status(many[:n]) for n in (0, 1, 2, 3)] == ['ok', 'ok', 'warn', 'excluded']
