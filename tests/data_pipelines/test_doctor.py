"""The doctor as its users see it: odd files, folders, lists, exit codes, lines, JSON, page, manifest, processes."""
import base64
import csv
import html.parser
import io
import json
import os
import re
import shutil
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from data_pipelines import doctor, doctor_page, doctor_report, examination, files, manifest, thumbnails, workers
from data_pipelines.errors import DataError
from data_pipelines.volume import settle
from tests.data_pipelines import dicom_files


def ct(shape=(24, 40, 36), seed=0):
  return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def save(path, array, spacing_mm=(3., 2., 2.), origin=(0., 0., 0.), dtype=None):
  """[S, A, R] voxels as a NIfTI file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  affine = np.diag([*spacing_mm[::-1], 1.])
  affine[:3, 3] = origin
  image = nib.Nifti1Image(array.transpose(2, 1, 0), affine, dtype=dtype)
  image.header.set_xyzt_units('mm')
  nib.save(image, path)
  return path


def chest(path, seed=0, size=(200, 180)):
  """A left-right symmetric picture of its own."""
  path.parent.mkdir(parents=True, exist_ok=True)
  half = np.random.default_rng(seed).integers(0, 255, (8, 4)).astype(np.uint8)
  Image.fromarray(np.hstack([half, half[:, ::-1]])).resize(size[::-1], Image.Resampling.NEAREST).save(path)
  return path


def rgb(path):
  data = np.zeros((20, 20, 20), [('R', 'u1'), ('G', 'u1'), ('B', 'u1')])
  nib.save(nib.Nifti1Image(data, np.eye(4)), path)


def codes(source, **more):
  """{code: severity} of all findings, and the report."""
  report = doctor.examine(source, workers=0, **more)
  return {f.code: f.severity for f in report.all_findings}, report


def run(capsys, *args):
  """-> exit code, lines on stdout."""
  code = doctor.main([*map(str, args)] + ['--workers=0'])
  return code, capsys.readouterr().out.splitlines()


@pytest.fixture
def mixed(tmp_path):
  """One good file among a truncated one (its first slices can be read), an empty one, colours, wrong spacing."""
  folder = tmp_path / 'mixed'
  save(folder / 'a_good.nii.gz', ct())
  whole = save(folder / 'b_cut.nii.gz', ct(seed=1)).read_bytes()
  (folder / 'b_cut.nii.gz').write_bytes(whole[:len(whole) // 2])
  (folder / 'c_empty.nii.gz').write_bytes(b'')
  rgb(folder / 'd_colour.nii.gz')
  image = nib.Nifti1Image(ct(seed=2).transpose(2, 1, 0), None)
  image.header['pixdim'][1:4] = 2, 2, 0
  image.header['sform_code'], image.header['qform_code'], image.header['vox_offset'] = 0, 0, 352
  (folder / 'e_spacing.nii').write_bytes(image.header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes('F'))
  return folder


# ---- the odd files of the specification

ORIENTATIONS = ('ASR', 'IRA', 'LAS', 'LPI', 'LPS', 'PIR', 'PLI', 'RAS', 'RSP', 'SLP')
UNCALIBRATED, ORIENT = {'HU_UNCALIBRATED': 'ERROR'}, {'ORIENT': 'INFO'}
SLICE = 'dicom/CTImage.dcm_{}TransferSyntax_1.2.840.10008.1.2{}.dcm'
SLICES = (('BigEndianExplicit', '.2'), ('LittleEndianImplicit', ''), ('RLELossless', '.5'),
          ('JPEG2000LosslessOnly', '.4.90'))
OF_SLICE = {'HU_PADDING': 'WARN', 'ORIENT': 'INFO'}
ROWS = [    # file, options, {code: severity}
    *[(f'nifti/orient_{o}.nii.gz', {}, UNCALIBRATED | (ORIENT if o != 'RAS' else {})) for o in ORIENTATIONS],
    *[(f'nifti/orient_{o}.nii.gz', {'modality': 'other'}, ORIENT if o != 'RAS' else {}) for o in ORIENTATIONS],
    ('nifti/air.*', {}, UNCALIBRATED | ORIENT), ('nifti/air.*', {'modality': 'other'}, ORIENT),
    ('nifti/big.nii.gz', {}, UNCALIBRATED | ORIENT | {'SPACING': 'WARN'}),
    ('nifti/big.nii.gz', {'modality': 'mr'}, ORIENT | {'SPACING': 'WARN'}),
    ('nifti/with_extension.nii.gz', {}, UNCALIBRATED | ORIENT),
    ('nifti/with_extension.nii.gz', {'modality': 'other'}, ORIENT),
    ('nifti/5D_small.nii', {}, {'NDIM': 'ERROR'}), ('nifti/rgb_ct_perfusion.nii.gz', {}, {'DTYPE_RGB': 'ERROR'}),
    ('nifti/rotated_CT_pitch.nii.gz', {}, UNCALIBRATED | {'OBLIQUE': 'WARN'}),
    ('nifti/rotated_CT_pitch.nii.gz', {'modality': 'other'}, {'OBLIQUE': 'WARN'}),
    ('nifti/sheared_scl_slope_uint8.nii.gz', {}, {'SHEAR': 'WARN', 'FORM_MISMATCH': 'WARN'}),
    ('nifti/wrong_spacing_chest.nii.gz', {}, ORIENT | {'BODY_SIZE': 'WARN'}),
    ('nifti/not-nifti.nii', {}, {'NOT_IMAGE': 'ERROR'}), ('nifti/zero_bytes.nii.gz', {}, {'ZERO_BYTES': 'ERROR'}),
    *[(SLICE.format(*s), {}, OF_SLICE | {'TOO_SMALL': 'ERROR'}) for s in SLICES],
    *[(SLICE.format(*s), {'as_image': True}, OF_SLICE) for s in SLICES],
    (SLICE.format('JPEGProcess1', '.4.50'), {}, {'LOSSY_CT': 'ERROR'}),
    ('dicom/CR-MONO1-10-chest', {}, {'MONO1': 'INFO'}), ('dicom/cxr_jpeg_mono2.dcm', {}, {}),
    ('dicom/d2n_gantrytilting_001.zip', {},
     ORIENT | {'GANTRY_TILT': 'WARN', 'HU_IMPLAUSIBLE': 'WARN', 'TOO_SMALL': 'ERROR'}),
    ('dicom/d2n_sliceincrement_001.zip', {}, {'SLICE_GAP': 'ERROR'}),
    ('dicom/d2n_sliceincrement_001.zip', {'resample_gaps': True},
     ORIENT | {'SLICE_GAP': 'WARN', 'HU_IMPLAUSIBLE': 'WARN', 'TOO_SMALL': 'ERROR'}),
    *[(f'cxr_rotated/{name}', {'beside': f'../cxr/nih/{name}'}, {'ROTATED?': 'WARN', 'DUPLICATE': 'WARN'})
      for name in ('00000061_025.png', '00001880_006.png')],
    ('../ct/dicom/nysbu_A067967_axial.dcm', {}, OF_SLICE | {'TOO_SMALL': 'ERROR', 'METAL': 'INFO'}),
    ('../ct/dicom/nysbu_A098752_axial.dcm', {}, OF_SLICE | {'TOO_SMALL': 'ERROR'})]


@pytest.mark.realdata
@pytest.mark.parametrize('name, options, expected', ROWS,
                         ids=[f'{n.split("/")[-1][:40]} {o or ""}' for n, o, _ in ROWS])
def test_every_odd_file_gets_its_codes(shared, tmp_path, name, options, expected):
  file, options = shared / 'data/odd' / name, dict(options)
  source = ','.join([str(file), *([str(shared / 'data/odd' / options.pop('beside'))] if 'beside' in options else [])])
  if name.endswith('.zip'):
    zipfile.ZipFile(file).extractall(tmp_path)
    source = str(tmp_path)
  found, report = codes(source, **options)
  assert found == expected
  assert len(report.rows) == 1 + (',' in source)
  assert all(f.line.startswith(f'{f.severity} {f.code} ') and '\n' not in f.line for f in report.all_findings)


@pytest.mark.realdata
def test_no_odd_file_is_left_out(shared):
  tested = {p for name, _, _ in ROWS for p in (shared / 'data/odd').glob(name)}
  assert tested >= {p for p in (shared / 'data/odd').rglob('*') if p.is_file()}
  report = doctor.examine(shared / 'data/ct/dicom', workers=0)
  assert len(report.rows) == 7 and report.ignored == '2 DICOM reformat'


@pytest.mark.realdata
def test_the_ten_orientations_are_one_volume(shared):
  of = lambda o: examination.examine(examination.Job(
      {'path': f'{shared}/data/odd/nifti/orient_{o}.nii.gz', 'kind': 'volume'}, modality='other'))
  first, *others = map(of, ORIENTATIONS)
  assert len(first.slices) == 67
  for result in others:
    assert result.slices == first.slices and result.facts['shape_canon'] == [67, 79, 64]
    assert result.facts['hu_p99'] == first.facts['hu_p99']


@pytest.mark.realdata
def test_all_shared_scans_and_radiographs(shared):
  known = {'ct': {'TOO_SMALL', 'UNITS', 'HU_PADDING', 'DUPLICATE', 'ORIENT', 'METAL', 'HU_CLIPPED'},
           'cxr': {'MODE', 'LATERAL?', 'ROTATED?', 'INVERTED?'}}
  for folder, expected in known.items():
    found, report = codes(shared / 'data' / folder)
    assert found.keys() == expected
  assert {r['status'] for r in report.rows} == {'ok', 'warn'} and len(report.rows) == 246


# ---- folders that hold all kinds

def test_it_never_stops(mixed, capsys):
  code, lines = run(capsys, mixed)
  assert code == 1
  expected = {
      r'ERROR TRUNCATED {}/b_cut.nii.gz: gzip stream ends early \(about \d+ % of the voxels readable\); excluded. '
      'FIX: copy again', r'ERROR ZERO_BYTES {}/c_empty.nii.gz: file has 0 bytes; excluded. FIX: .+',
      r'ERROR DTYPE_RGB {}/d_colour.nii.gz: colour voxels \(R,G,B\), not HU; excluded. FIX: use the grey series',
      r'ERROR SPACING {}/e_spacing.nii: slice distance 0.00 mm; excluded. FIX: .+'}
  for pattern in expected:
    assert sum(bool(re.fullmatch(pattern.format(re.escape(str(mixed))), line)) for line in lines) == 1, pattern
  assert sum(line.startswith('ERROR') for line in lines) == 4 and not any('a_good' in line for line in lines)
  assert lines[-1] == '5 files: 1 ok, 0 warn, 4 excluded'
  assert 'TRUNCATED   ERROR            1' in lines


def test_exit_codes(mixed, tmp_path, capsys):
  assert run(capsys, mixed / 'a_good.nii.gz')[0] == 0
  warned = save(tmp_path / 'warned.nii', ct(), (3., 4., 4.))
  code, lines = run(capsys, warned)
  assert code == 0 and lines[-1] == '1 files: 0 ok, 1 warn, 0 excluded'
  assert lines[0] == f'WARN SPACING {warned}: pixels of 4.00 mm'
  for wrong in (['--modality=xray'], ['--workers=-1'], ['--nonsense'], ['--split=.5,.5']):
    try:
      assert doctor.main([str(mixed), *wrong]) == 2
    except SystemExit as e:
      assert e.code == 2
    said = capsys.readouterr()
    assert len((said.out + said.err).splitlines()) == 1 and (said.out + said.err).startswith('ERROR')
  with pytest.raises(SystemExit) as e:
    doctor.main([])
  assert e.value.code == 2


def test_nothing_to_read(tmp_path, capsys, monkeypatch):
  assert run(capsys, tmp_path / 'absent')[0] == 2
  (tmp_path / 'notes.txt').write_text('x')
  assert run(capsys, tmp_path) == (2, [
      f'ERROR EMPTY_DIR {tmp_path}: no readable image (found 1 *.txt). FIX: name a folder with NIfTI, DICOM, PNG or '
      'JPEG files'])
  dicom_files.series(tmp_path / 'x', ct((3, 8, 8)))
  for file in (tmp_path / 'x').iterdir():
    file.rename(file.with_suffix('.dcm'))
  text = (f'ERROR EMPTY_DIR {tmp_path / "x"}: no readable image (found 3 *.dcm). '
          'FIX: install [dicom] or pass --format=dicom')
  assert run(capsys, tmp_path / 'x', '--format=nifti') == (2, [text])
  monkeypatch.setitem(sys.modules, 'pydicom', None)
  assert run(capsys, tmp_path / 'x') == (2, [text])
  save(tmp_path / 'x' / 'y.nii', ct())
  code, lines = run(capsys, tmp_path / 'x')
  assert code == 1 and lines[0].startswith('ERROR DICOM ') and lines[-1] == '1 files: 1 ok, 0 warn, 0 excluded'


def test_damaged_dicom_and_names_that_cannot_be_printed(tmp_path, capsys):
  dicom_files.series(tmp_path / 'series', ct((18, 20, 20)))
  ray = dicom_files.save(tmp_path / 'ray', dicom_files.dataset(np.zeros((50, 40), np.uint16), 'CR'))
  ray.write_bytes(ray.read_bytes()[:-400])
  (tmp_path / 'deflated').write_bytes(bytes(128) + b'DICM' + b'1.2.840.10008.1.2.1.99' + bytes(99))
  (tmp_path / 'junk.dcm').write_bytes(b'x' * 600)
  (tmp_path / 'zero.dcm').write_bytes(b'')
  save(tmp_path / 'two\nlines.nii', ct(seed=1))
  code, lines = run(capsys, tmp_path)
  assert code == 1 and lines[-1] == '5 files: 1 ok, 0 warn, 4 excluded'
  found = {tuple(line.split()[1:3]) for line in lines if line.startswith('ERROR')}
  assert found == {('TRANSFER_SYNTAX', f'{tmp_path}/deflated:'), ('NOT_IMAGE', f'{tmp_path}/junk.dcm:'),
                   ('ZERO_BYTES', f'{tmp_path}/zero.dcm:'),
                   ('TRUNCATED', f'{tmp_path}/ray:'), ('NAME', repr(f'{tmp_path}/two\nlines.nii') + ':')}


def test_whatever_a_reader_raises_is_a_line(mixed, monkeypatch):
  def fails(item, **how):
    raise ZeroDivisionError('an\nodd one')
  monkeypatch.setattr(examination.readers, 'volume', fails)
  found, report = codes(mixed / 'a_good.nii.gz')
  assert found == {'READER': 'ERROR'}
  assert 'unforeseen ZeroDivisionError: an odd one; excluded' in report.all_findings[0].line


# ---- processes

def test_a_dead_process_costs_its_own_job():
  jobs = ['1 + 1', '__import__("os")._exit(3)', '2 + 2', '__import__("signal").raise_signal(9)', '3 + 3']
  results = dict(workers.run(eval, jobs, 2))
  assert results == {0: 2, 1: workers.Died(3), 2: 4, 3: workers.Died(-9), 4: 6}
  threads = dict(workers.run(eval, ['__import__("os").environ["OMP_NUM_THREADS"]'], 1))
  assert threads == {0: '1'} and os.environ.get('OMP_NUM_THREADS') != '1'


def test_a_killed_process_is_a_finding(mixed, monkeypatch):
  monkeypatch.setattr(doctor.processes, 'run', lambda f, jobs, n: [(i, workers.Died(-9)) for i in range(len(jobs))])
  found, report = codes(mixed / 'a_good.nii.gz')
  assert found == {'WORKER': 'ERROR'} and report.rows[0]['status'] == 'excluded'
  assert 'ended by SIGKILL (out of memory?); excluded. FIX: take fewer --workers' in report.all_findings[0].line


def test_results_do_not_depend_on_the_number_of_processes(mixed):
  chest(mixed / 'f.png')
  chest(mixed / 'g.png')
  reports = [doctor.examine(mixed, workers=n, pictures=True) for n in (0, 1, 2)]
  assert reports[0].rows == reports[1].rows == reports[2].rows
  shown = [doctor_page.html(r) for r in reports]
  assert shown[0] == shown[1] == shown[2]
  lines = [[re.sub(r'"seconds": [\d.e-]+', '', line) for line in doctor_report.json_lines(r).splitlines()]
           for r in reports]
  assert lines[0] == lines[1] == lines[2] and len(lines[0]) == 7


# ---- what is written

def test_json_rows(mixed, tmp_path, capsys):
  run(capsys, mixed, f'--json={tmp_path / "new" / "out.jsonl"}')
  rows = [json.loads(line) for line in (tmp_path / 'new' / 'out.jsonl').read_text().splitlines()]
  good, cut, *_ = rows
  values = ct()
  assert len(rows) == 5 and good['status'] == 'ok' and good['findings'] == [] and good['shape'] == [36, 40, 24]
  assert good['shape_canon'] == [24, 40, 36] and good['spacing'] == [2, 2, 3] and good['orient'] == 'RAS'
  assert [good[f'hu_{q}'] for q in ('min', 'p1', 'p50', 'p99', 'max')] == [
      values.min(), *np.percentile(values, (1, 50, 99), method='inverted_cdf'), values.max()]
  assert good['sha'] == files.sha(mixed / 'a_good.nii.gz') and good['seconds'] >= 0
  assert cut['status'] == 'excluded' and cut['findings'][0]['code'] == 'TRUNCATED'
  assert cut['findings'][0]['line'].startswith('ERROR TRUNCATED')


class Page(html.parser.HTMLParser):
  """Tags must close in order; collects text and pictures."""

  def __init__(self, text):
    super().__init__()
    self.open, self.text, self.pictures, self.tags = [], [], [], set()
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.add(tag)
    if tag == 'img':
      self.pictures.append(dict(attributes)['src'])
    if tag not in ('img', 'meta', 'br'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def test_the_page(mixed, tmp_path, capsys):
  save(mixed / '<b>x.nii', ct(seed=5), (3., 4., 4.))
  chest(mixed / 'ray & more.png')
  run(capsys, mixed, f'--html={tmp_path / "out.html"}')
  text = (tmp_path / 'out.html').read_text()
  page = Page(text)
  assert 'http' not in text and '//' not in text.replace('data:image/png;base64,', '').split('<h2>Pictures')[0]
  assert not page.tags & {'b', 'script', 'link', 'iframe'} and '<b>x.nii' in ''.join(page.text)
  assert '7 files: 2 ok, 1 warn, 4 excluded' in page.text and 'ray & more.png' in ''.join(page.text)
  assert len(page.pictures) == 3
  for source in page.pictures:
    picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix('data:image/png;base64,'))))
    picture.load()
    assert picture.format == 'PNG' and picture.height <= 112


def test_pictures_are_limited(mixed, monkeypatch):
  monkeypatch.setattr(doctor, 'ALL_PICTURES', 3)
  save(mixed / 'warned.nii', ct(seed=5), (3., 4., 4.))
  report = doctor.examine(mixed, workers=0, pictures=True)
  assert [r['id'].split('/')[-1] for r, x in zip(report.rows, report.results) if x.picture] == ['warned.nii']
  monkeypatch.setattr(doctor_page, 'MOST_BYTES', 10)
  assert '<img' not in doctor_page.html(report) and '6 files without picture' in doctor_page.html(report)


def test_a_page_of_a_thousand_noisy_scans_stays_below_20_mb(mixed):
  result = examination.examine(examination.Job(
      {'path': str(save(mixed / 'large.nii', ct((120, 160, 160)), (1., 1., 1.))), 'kind': 'volume'}, picture=True))
  row = {'id': 'x', 'path': 'x' * 100, 'kind': 'volume', 'status': 'warn', 'findings': []}
  finding = doctor.Finding('WARN', 'HU_PADDING', 'x' * 100, 'y' * 200, '', 'z' * 100)
  report = doctor.Report('x', [row] * 1000, [result._replace(findings=[finding] * 3)] * 1000, [], '')
  text = doctor_page.html(report)
  assert len(text) < 20e6 and text.count('<img') > 300


def test_the_right_of_the_patient_is_on_the_left_of_the_picture():
  # voxels in LPS order: bright = right, anterior, superior, one after the other
  for axis, corner in ((0, 'R'), (1, 'A'), (2, 'S')):
    stored = np.full((40, 40, 40), -1000, np.int16)
    index = [slice(None)] * 3
    index[axis] = slice(0, 10) if corner in 'RA' else slice(30, 40)    # LPS: index 0 is right, anterior, inferior
    stored[tuple(index)] = 500
    v = settle(stored, np.diag([-1., -1., 1., 1.]), 'x', {}, [])
    (axial, _), (coronal, _), (sagittal, _) = thumbnails.planes(v)
    bright = lambda plane: [side for side, part in (('left', plane[:, :8]), ('right', plane[:, -8:]),
                            ('top', plane[:8]), ('bottom', plane[-8:])) if part.mean() > 400]
    expected = {'R': (['left'], ['left'], []), 'A': (['top'], [], ['left']), 'S': ([], ['top'], ['top'])}[corner]
    assert tuple(map(bright, (axial, coronal, sagittal))) == expected
    picture = Image.open(io.BytesIO(thumbnails.of_volume(v))).convert('L')
    assert picture.size == (3 * 112 + 4, 112)
  assert thumbnails.MARKS == (('R', 'L'), ('R', 'L'), ('A', 'P'))


def test_the_manifest(mixed, tmp_path, capsys):
  for i in range(12):
    chest(mixed / 'rays' / f'{i}.png', i)
  shutil.copy(mixed / 'rays/0.png', mixed / 'rays/copy.png')
  flags = [mixed, f'--manifest={tmp_path / "list"}', '--dataset=mine', '--licence=CC BY 4.0', '--split=.5,.25,.25']
  code, first_lines = run(capsys, *flags, '--seed=1')
  assert code == 1 and any('manifest.jsonl (hash ' in line for line in first_lines)
  rows = {r['id']: r for r in manifest.read(tmp_path / 'list', labelled=False)}
  assert len(rows) == 18 and len(manifest.usable(rows.values())) == 14
  good, cut = rows['mine/a_good.nii.gz'], rows['mine/b_cut.nii.gz']
  assert good['path'] == str(mixed / 'a_good.nii.gz') and good['licence'] == 'CC BY 4.0'
  assert good['hu_min'] == ct().min() and good['shape_canon'] == [24, 40, 36] and good['status'] == 'ok'
  assert cut['status'] == 'excluded' and cut['findings'] == ['TRUNCATED'] and cut['sha']
  copy, first = rows['mine/rays/copy.png'], rows['mine/rays/0.png']
  assert copy['group'] == first['group'] and copy['split'] == first['split'] and copy['findings'] == ['DUPLICATE']
  assert copy['status'] == 'warn' and {r['split'] for r in rows.values()} == set(manifest.SPLITS)
  assert manifest.meta(tmp_path / 'list')['config']['seed'] == 1
  again, lines = run(capsys, tmp_path / 'list')    # the written list can be looked at again
  assert again == 1 and lines[-1] == first_lines[-1] and lines[-1].startswith('18 files: ')


# ---- lists

def table(path, rows):
  with open(path, 'w', newline='') as f:
    out = csv.DictWriter(f, list(rows[0]))
    out.writeheader()
    out.writerows(rows)
  return path


def test_leaks_and_empty_splits(tmp_path, capsys):
  for i in range(4):
    chest(tmp_path / f'{i}.png', i)
  (tmp_path / '5.png').write_bytes(b'x')
  shutil.copy(tmp_path / '2.png', tmp_path / '4.png')
  rows = [{'path': f'{i}.png', 'subject': s, 'split': split} for i, s, split in (
      (0, '285', 'train'), (1, '285', 'test'), (2, 'a', 'train'), (3, 'b', 'train'), (4, 'c', 'test'),
      (5, 'd', 'val'))]
  source = table(tmp_path / 'list.csv', rows)
  code, lines = run(capsys, source, '--dataset=x', f'--manifest={tmp_path / "out"}')
  assert code == 1
  assert 'ERROR LEAK group x/285: train and test. FIX: give the group one split' in lines
  assert any(re.match('ERROR LEAK group x/a: train and test', line) for line in lines)    # by the duplicate
  assert any(line.startswith(f'WARN DUPLICATE {tmp_path}/4.png = {tmp_path}/2.png (equal bytes), subjects c and a: '
                             'put in one group') for line in lines)
  assert any(line.startswith('ERROR SPLIT_EMPTY val: 0 samples after exclusion (1 excluded: 1 NOT_IMAGE)')
             for line in lines)
  assert 'manifest not written (LEAK)' in lines and not (tmp_path / 'out').exists()
  assert lines[-1] == '6 files: 4 ok, 1 warn, 1 excluded'


def test_our_own_manifest_may_leak_and_is_still_read(tmp_path, capsys):
  for i in range(2):
    chest(tmp_path / f'{i}.png', i)
  rows = [{'id': str(i), 'path': f'{i}.png', 'kind': 'image', 'subject': 'p', 'split': s}
          for i, s in enumerate(('train', 'test'))]
  (tmp_path / 'manifest.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  code, lines = run(capsys, tmp_path / 'manifest.jsonl')
  assert code == 1 and lines[0].startswith('ERROR LEAK group p: train and test')
  assert lines[-1] == '2 files: 2 ok, 0 warn, 0 excluded'


def test_a_list_names_files_that_are_not_there(tmp_path, capsys):
  chest(tmp_path / '0.png')
  source = table(tmp_path / 'list.csv', [{'path': '0.png', 'case': 'a'}, {'path': 'gone.png', 'case': 'b'}])
  code, lines = run(capsys, source)
  assert code == 1 and lines[0].startswith(f'ERROR UNREADABLE {tmp_path}/gone.png: ')
  assert lines[-1] == '2 files: 1 ok, 0 warn, 1 excluded'
  assert run(capsys, source, '--group_by=site')[0] == 2
  assert run(capsys, source, '--group_by=case')[0] == 1
  with pytest.raises(DataError, match='IMPORT'):
    doctor.examine(source, workers=0)    # as the importers do, unless told


def test_label_maps_lie_on_the_grid_of_their_image(tmp_path, capsys):
  for i in range(4):
    save(tmp_path / f'ct{i}.nii', ct(seed=i))
  mask = (ct() > 0).astype(np.int16)
  save(tmp_path / 'm0.nii', mask)
  save(tmp_path / 'm1.nii', mask, origin=(0., 0., 82 * 3.))
  save(tmp_path / 'm2.nii', mask[:20])
  (tmp_path / 'm3.nii').write_bytes(b'')
  (tmp_path / 'list.json').write_text(json.dumps({'training': [
      {'image': f'ct{i}.nii', 'label': f'm{i}.nii'} for i in range(4)]}))
  code, lines = run(capsys, tmp_path / 'list.json')
  assert code == 1 and lines[-1] == '4 files: 1 ok, 0 warn, 3 excluded'
  assert (f'ERROR MASK_GRID {tmp_path}/m1.nii: origin differs by 82 slices from its image; excluded. '
          'FIX: resample it on the grid of its image') in lines
  assert any(line.startswith(f'ERROR MASK_GRID {tmp_path}/m2.nii: shape 36 x 40 x 20') for line in lines)
  assert any(line.startswith(f'ERROR ZERO_BYTES {tmp_path}/m3.nii') for line in lines)


def test_a_series_is_a_volume_or_as_many_pictures(tmp_path):
  dicom_files.series(tmp_path / 'x', ct((18, 40, 40)))
  found, report = codes(tmp_path)
  assert found == {'ORIENT': 'INFO'} and len(report.rows) == 1 and report.rows[0]['shape_canon'] == [18, 40, 40]
  _, report = codes(tmp_path, as_image=True)
  assert len(report.rows) == 18 and {r['kind'] for r in report.rows} == {'image'}
  assert {r['status'] for r in report.rows} == {'ok'}
