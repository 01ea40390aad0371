"""From a folder of scans to a table of embeddings: the numbers by hand, and a row for every file, whatever it is."""
import csv
import io
import json
import logging
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from configs import finetune, unimiss_plus
from data_pipelines import evalset, nifti, tiles
from tests.conftest import ROOT
from tests.data_pipelines import dicom_files
from tests.e2e import tiny
from unimiss_jax import checkpoint, models, porting, weights
from unimiss_jax.cli import embed
from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import torch_files
from unimiss_jax.report import card

OUTPUT = {'views.ct.extent': 'output', 'views.ct.resize': 'linear'}
MM = (2., 1., 1.)


@pytest.fixture(autouse=True)
def no_log_to_a_closed_stream():
  yield
  logging.getLogger().handlers = [h for h in logging.getLogger().handlers if type(h) is not logging.StreamHandler]


def numbers(config):
  """Parameters of a network, at random."""
  rng = np.random.default_rng(0)
  shapes = architectures.shapes(models.build(config.model))
  return unflatten_dict({path: np.float32(rng.standard_normal(shape) / max(np.prod(shape[:-1]), 1)**.5
                                          if path[-1] == 'kernel' else
                                          .1 * rng.standard_normal(shape) + (path[-1] == 'scale'))
                         for path, shape in shapes.items()})


@pytest.fixture(scope='module')
def params():
  return numbers(tiny.config())


@pytest.fixture(scope='module')
def saved(params, tmp_path_factory):
  """What a run leaves, but for its config.json."""
  folder = tmp_path_factory.mktemp('run')
  c = checkpoint.Checkpoints(folder / 'checkpoints', keep=1)
  other = jax.tree.map(lambda x: x + np.float32(.01), params)
  c.save(8, {'params': {'backbone': params, 'head': {'a': np.zeros(1)}}, 'extra': {'teacher': {'backbone': other}}}, {})
  c.close()
  return folder


def exported(folder, config, params):
  """What export writes, as far as embed looks at it: read ten times faster than a run."""
  file = folder / 'model.safetensors'
  if not file.exists():
    fields = architectures.fields(architectures.of_config(config.model.to_dict()))
    torch_files.write(file, porting.to_torch({'backbone': params}), {'arch': fields})
  about = {'sha': torch_files.sha(file), 'branch': 'student', 'preprocessing': card.contract(config.to_dict())}
  (folder / 'config.json').write_text(json.dumps(about))
  return folder


@pytest.fixture(scope='module')
def run(params, tmp_path_factory):
  """config -> an exported folder of a run with it."""
  folder = tmp_path_factory.mktemp('export')
  return lambda config: exported(folder, config, params)


@pytest.fixture(scope='module')
def backbone(params):
  """[N, ...] -> [N, E], plainly."""
  module = models.build(tiny.config().model)
  forward = jax.jit(lambda x: module.apply({'params': params}, x).embedding)
  return lambda xs: np.concatenate([np.asarray(forward(x[None])) for x in xs])


def scan(shape=(30, 70, 90), seed=0):
  """int16 HU [D, H, W]; the left quarter of W is air."""
  rng = np.random.default_rng(seed)
  hu = (rng.normal(0, 300, shape) + rng.normal(0, 200, (shape[0], 1, 1))).clip(-900, 1500).astype(np.int16)
  hu[:, :, :shape[2] * 3 // 4] = -1000
  return hu


def write(path, hu, mm=MM, code='RAS'):
  """[S, A, R] as a NIfTI file in any axis order."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([*mm[::-1], 1.]))
  image.header.set_xyzt_units('mm')
  turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(code))
  nib.save(image.as_reoriented(turn), path)
  return path


def picture(path, seed=0, mode='L', shape=(80, 100)):
  grey = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
  Image.fromarray(grey).convert(mode).save(path)
  return grey


def table(path) -> dict:
  with np.load(path) as found:      # without pickles
    return dict(found)


def made(tmp_path, ckpt, data, *flags, name='e.npz', code=0):
  assert embed.main([f'--ckpt={ckpt}', f'--data={data}', f'--out={tmp_path / name}', *flags]) == code
  return table(tmp_path / name) if name.endswith('npz') and code == 0 else None


def test_tiles_of_the_view_by_hand(tmp_path, run, backbone):
  """extent=output: boxes of 16 x 64 x 64 voxels that cover 30 x 70 x 90; those with less than a tenth of body do not
  count."""
  hu = scan()
  write(tmp_path / 'data' / 'a.nii.gz', hu)
  got = made(tmp_path, run(tiny.config(**OUTPUT)), tmp_path / 'data', '--per_tile')
  corners = [(z, y, x) for z in (0, 14) for y in (0, 6) for x in (0, 26)]
  boxes = {c: hu[c[0]:c[0] + 16, c[1]:c[1] + 64, c[2]:c[2] + 64] for c in corners}
  body = [c for c, box in boxes.items() if (box > -500).mean() >= .1]
  assert body == [c for c in corners if c[2] == 26]      # the others are air, but for nothing
  want = backbone([np.float32(boxes[c])[..., None] / 1024 for c in body])
  np.testing.assert_array_equal(got['corner'], body)
  np.testing.assert_array_equal(got['z0'], [c[0] for c in body])
  assert (got['size'] == (16, 64, 64)).all() and got['embedding'].dtype == np.float32
  np.testing.assert_allclose(got['embedding'], want, rtol=0, atol=1e-5)
  assert np.ptp(want, axis=0).max() > 1e-2      # tiles differ


def test_records_and_radiographs_as_evaluation_sees_them(tmp_path, run, backbone):
  """extent=record: the 24-slice tiles that training cuts, and the centre view of a picture, through evalset's own."""
  config, hu = tiny.config(), scan((31, 70, 66))
  write(tmp_path / 'data' / 'a.nii.gz', hu)
  grey = picture(tmp_path / 'data' / 'b.png')
  got = made(tmp_path, run(config), tmp_path / 'data')
  views = [evalset.centre_ct(tiles.cut(tiles.Scan(hu, MM, hu, MM, []), z), config)['ct'][0] for z in (0, 7)]
  np.testing.assert_allclose(got['embedding'][0], backbone(views).mean(0), rtol=0, atol=1e-5)
  view = evalset.centre_xray({'image': grey}, config)['xray']
  np.testing.assert_allclose(got['embedding'][1], backbone(view)[0], rtol=0, atol=1e-5)
  assert got['tiles'].tolist() == [2, 1] and got['kind'].tolist() == ['volume', 'image']
  assert got['status'].tolist() == ['ok', 'ok'] and got['id'].tolist() == ['data/a.nii.gz', 'data/b.png']
  assert got['path'].tolist() == [str(tmp_path / 'data' / name) for name in ('a.nii.gz', 'b.png')]


def test_the_middle_of_each_tile(tmp_path, run, backbone):
  """extent=centre: 32 slices begin every 16th; 16 x 64 x 64 voxels of each, cut from 70 rows, filled up from 60
  columns; as evaluation sees such a record."""
  config, hu = tiny.config(**{'views.ct.extent': 'centre', 'data.tile': 32}), scan((40, 70, 60))
  write(tmp_path / 'data' / 'a.nii.gz', hu)
  got = made(tmp_path, run(config), tmp_path / 'data', '--per_tile')
  np.testing.assert_array_equal(got['corner'], [(z + 8, 3, -2) for z in (0, 8)])
  filled = np.pad(hu[:, 3:67], ((0, 0), (0, 0), (2, 2)), constant_values=-1024)
  want = backbone([np.float32(filled[z + 8:z + 24])[..., None] / 1024 for z in (0, 8)])
  np.testing.assert_allclose(got['embedding'], want, rtol=0, atol=1e-5)
  views = [evalset.centre_ct(tiles.cut(tiles.Scan(hu, MM, hu, MM, []), z, 32), config)['ct'][0] for z in (0, 8)]
  np.testing.assert_allclose(backbone(views), want, rtol=0, atol=1e-5)


def test_a_wide_plane_is_cut_as_in_training(tmp_path, run, backbone):
  """The central 80 % of 400 columns; a scan of 20 slices lies in the middle of air."""
  hu = scan((20, 40, 400))
  write(tmp_path / 'a.nii', hu)
  got = made(tmp_path, run(tiny.config()), tmp_path / 'a.nii', '--per_tile')
  padded = np.pad(hu[:, 4:36, 40:360], ((2, 2), (0, 0), (0, 0)), constant_values=-1024)
  view = evalset.centre_ct({'volume': padded, 'spacing_mm': MM, 'whole': hu, 'whole_spacing_mm': MM}, tiny.config())
  np.testing.assert_allclose(got['embedding'], backbone(view['ct']), rtol=0, atol=1e-5)
  assert got['corner'].tolist() == [[-2, 4, 40]] and got['size'].tolist() == [[24, 32, 320]]


def test_neither_batch_nor_workers_change_the_numbers(tmp_path, run):
  for i in range(3):
    write(tmp_path / 'data' / f'{i}.nii.gz', scan(seed=i))
    picture(tmp_path / 'data' / f'{i}.png', seed=i)
  ckpt = run(tiny.config(**OUTPUT))
  want = made(tmp_path, ckpt, tmp_path / 'data', '--batch=8')
  for flags in (('--batch=1', '--workers=1'), ('--batch=3', '--workers=3')):
    got = made(tmp_path, ckpt, tmp_path / 'data', *flags)
    assert got['id'].tolist() == want['id'].tolist()
    np.testing.assert_allclose(got['embedding'], want['embedding'], rtol=0, atol=1e-5)
  assert np.ptp(want['embedding'][::2], axis=0).max() > 1e-3


def test_a_broken_file_costs_its_own_row(tmp_path, run, capsys):
  data = tmp_path / 'data'
  for name in 'ace':
    write(data / f'{name}.nii.gz', scan(seed=ord(name)))
  (data / 'b.nii.gz').write_bytes((data / 'a.nii.gz').read_bytes()[:4000])
  (data / 'd.png').write_bytes(b'')
  write(data / 'f.nii', np.full((20, 64, 64), -1000, np.int16) + np.arange(64, dtype=np.int16))
  ckpt = run(tiny.config(**OUTPUT))
  capsys.readouterr()
  got = made(tmp_path, ckpt, data, '--workers=3')
  said = capsys.readouterr()
  assert got['status'].tolist() == ['ok', 'TRUNCATED', 'ok', 'ZERO_BYTES', 'ok', 'NO_BODY']
  assert re.match(r'gzip stream ends early .*FIX: copy again', got['reason'][1])
  good = got['status'] == 'ok'
  assert np.isfinite(got['embedding'][good]).all() and np.isnan(got['embedding'][~good]).all()
  assert not got['tiles'][~good].any() and got['tiles'][good].all()
  errors = [line for line in said.err.splitlines() if line.startswith('ERROR')]
  assert [line.split()[1] for line in errors] == ['TRUNCATED', 'ZERO_BYTES', 'NO_BODY'] and 'Traceback' not in said.err
  assert re.search(r'^6 samples: 3 ok, 0 of them with warnings, 3 failed \(1 NO_BODY, 1 TRUNCATED, 1 ZERO_BYTES\); '
                   r'3 volumes of 12 tiles; wrote .*e.npz, 8 numbers a row$', said.out, re.M), said.out
  alone = made(tmp_path, ckpt, data / 'c.nii.gz')
  np.testing.assert_allclose(got['embedding'][2], alone['embedding'][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('per_tile', [False, True])
def test_the_csv_holds_what_the_npz_holds(tmp_path, run, per_tile):
  write(tmp_path / 'data' / 'a, "b".nii.gz', scan())
  (tmp_path / 'data' / 'c.png').write_text('no picture')
  flags = ['--per_tile'] * per_tile
  ckpt = run(tiny.config(**OUTPUT))
  want = made(tmp_path, ckpt, tmp_path / 'data', *flags)
  made(tmp_path, ckpt, tmp_path / 'data', *flags, name='e.csv')
  rows = list(csv.DictReader((tmp_path / 'e.csv').read_text().splitlines()))
  assert list(rows[0]) == ['id', 'path', 'kind', 'tiles', *['z0', 'y0', 'x0', 'depth', 'height', 'width'] * per_tile,
                           'status', 'reason', *(f'e{i}' for i in range(8))]
  for name in ('id', 'path', 'kind', 'status', 'reason', 'tiles'):
    assert [row[name] for row in rows] == want[name].astype(str).tolist()
  numbers = np.array([[row[f'e{i}'] or 'nan' for i in range(8)] for row in rows], np.float32)
  np.testing.assert_array_equal(numbers, want['embedding'])
  if per_tile:
    np.testing.assert_array_equal([[int(row[k]) for k in ('z0', 'y0', 'x0')] for row in rows], want['corner'])
    np.testing.assert_array_equal([[int(row[k]) for k in ('depth', 'height', 'width')] for row in rows], want['size'])


def test_the_mean_of_the_tiles_is_the_row(tmp_path, run):
  for i in range(2):
    write(tmp_path / 'data' / f'{i}.nii.gz', scan(seed=i))
  ckpt = run(tiny.config(**OUTPUT))
  rows = made(tmp_path, ckpt, tmp_path / 'data')
  each = made(tmp_path, ckpt, tmp_path / 'data', '--per_tile')
  for i, name in enumerate(rows['id']):
    mine = each['embedding'][each['id'] == name]
    assert len(mine) == rows['tiles'][i] == 4
    np.testing.assert_allclose(mine.astype(float).mean(0), rows['embedding'][i], rtol=0, atol=1e-6)


def test_any_source_gives_the_same_numbers(tmp_path, run):
  """A folder, glob, CSV, datalist, the doctor's manifest, a prepared folder; DICOM and NIfTI in any orientation."""
  from data_pipelines import doctor, prepare
  hu, data = scan((30, 70, 66)), tmp_path / 'data'
  want, ckpt = None, run(tiny.config())
  path = write(data / 'a.nii.gz', hu)
  (tmp_path / 'list.csv').write_text('path\ndata/a.nii.gz\n')
  (tmp_path / 'list.json').write_text(json.dumps({'training': [{'image': 'data/a.nii.gz'}]}))
  doctor.main([str(data), f'--manifest={tmp_path / "checked"}', '--workers=0', '--split=1,0,0'])
  assert prepare.main([str(data), f'--out={tmp_path / "prepared"}', '--workers=0']) == 0
  write(tmp_path / 'turned.nii.gz', hu, code='PIL')
  stored = hu[:, ::-1, ::-1] + np.int16(1024)      # rows run to the back, columns to the left
  dicom_files.series(tmp_path / 'series', stored, step=2., PixelSpacing=[1., 1.], RescaleIntercept=-1024)
  for source in (data, data / '*.nii.gz', path, 'list.csv', 'list.json', 'checked', 'checked/manifest.jsonl',
                 'prepared', 'turned.nii.gz', 'series'):
    got = made(tmp_path, ckpt, tmp_path / source)
    assert got['status'].tolist() == ['ok'] and got['tiles'].tolist() == [2], source
    want = got if want is None else want
    np.testing.assert_allclose(got['embedding'], want['embedding'], rtol=0, atol=1e-6, err_msg=str(source))


def test_pictures_of_a_prepared_folder_and_rows_that_a_list_excludes(tmp_path, run):
  from data_pipelines import prepare
  (tmp_path / 'data').mkdir()
  picture(tmp_path / 'data' / 'a.png')
  (tmp_path / 'data' / 'b.png').write_text('no picture')
  ckpt = run(tiny.config())
  assert prepare.main([str(tmp_path / 'data'), f'--out={tmp_path / "prepared"}', '--workers=0']) == 0
  want, got = (made(tmp_path, ckpt, tmp_path / name) for name in ('data', 'prepared'))
  np.testing.assert_allclose(got['embedding'], want['embedding'], rtol=0, atol=1e-6)
  assert got['status'].tolist() == want['status'].tolist() == ['ok', 'NOT_IMAGE']
  assert got['reason'][1] == want['reason'][1]


def test_every_form_of_the_weights(tmp_path, run, saved, capsys):
  """A run and its export prepare inputs alike; a bare file says that it does not know how."""
  config = tiny.config()
  write(tmp_path / 'data' / 'a.nii.gz', scan((30, 70, 66)))
  picture(tmp_path / 'data' / 'b.png')
  data, folder = tmp_path / 'data', run(config)
  (saved / 'config.json').write_text(json.dumps(config.to_dict()))
  want = made(tmp_path, saved, data)
  for source in (saved / 'checkpoints' / '8', folder):
    got = made(tmp_path, source, data)
    np.testing.assert_array_equal(got['embedding'], want['embedding'])
    assert got['weights_hash'] == want['weights_hash'] and got['branch'] == 'student'
    ours, theirs = (json.loads(str(t['config']))['views'] for t in (got, want))
    assert ours == theirs and ours['volume']['extent'] == 'record' and ours['image']['resize'] == 'area'
  assert 'preprocessing' not in capsys.readouterr().out
  (folder / 'config.json').unlink()
  bare = made(tmp_path, folder / 'model.safetensors', data)
  said = capsys.readouterr().out
  assert said.count('does not record its preprocessing: assuming that of preset plain, {"volume": {"size": '
                    '[16, 64, 64], "extent": "output"') == 1
  config = tiny.config(**OUTPUT, **{'views.xray.resize': 'bicubic', 'views.xray.ratio': (.75, 4 / 3)})
  plain = made(tmp_path, run(config), data)
  np.testing.assert_array_equal(bare['embedding'], plain['embedding'])
  teacher = made(tmp_path, saved, data, '--branch=teacher')
  assert teacher['branch'] == 'teacher' and teacher['weights_hash'] != want['weights_hash']
  assert np.abs(teacher['embedding'] - want['embedding']).max() > 1e-3


def test_weights_of_half_precision_and_of_other_channels(tmp_path, run, capsys):
  picture(tmp_path / 'a.png')
  tensors = torch_files.read(run(tiny.config()) / 'model.safetensors')
  told = {'arch': torch_files.recorded(run(tiny.config()) / 'model.safetensors')['arch']}
  for dtype in ('bfloat16', 'float32'):      # of the same numbers
    half = {n: a.astype(jnp.bfloat16).astype(dtype) for n, a in tensors.items()}
    torch_files.write(tmp_path / f'{dtype}.safetensors', half, told)
  got, want = (made(tmp_path, tmp_path / f'{d}.safetensors', tmp_path / 'a.png') for d in ('bfloat16', 'float32'))
  np.testing.assert_array_equal(got['embedding'], want['embedding'])
  torch_files.write(tmp_path / 'whole.safetensors', tensors)
  stem, last = 'backbone.transformer.ConvBlock2D0.0.conv.weight', 'backbone.recon_conv2D.'
  torch_files.write(tmp_path / 'grey.safetensors', tensors | {stem: tensors[stem].sum(1, keepdims=True)} | {
      n: a[:1] for n, a in tensors.items() if n.startswith(last)})
  heads = '--arch={"num_heads": [1, 1, 1, 1], "decoder_heads": [1, 1, 1]}'
  capsys.readouterr()
  made(tmp_path, tmp_path / 'grey.safetensors', tmp_path / 'a.png', heads, code=1)
  error = capsys.readouterr().err
  assert 'input has 3 channels: expected 1 for 2-D inputs. FIX: ' in error and error.count('\n') == 1
  got = made(tmp_path, tmp_path / 'grey.safetensors', tmp_path / 'a.png', heads, '--in_chans=sum')
  want = made(tmp_path, tmp_path / 'whole.safetensors', tmp_path / 'a.png', heads)
  np.testing.assert_allclose(got['embedding'], want['embedding'], rtol=0, atol=1e-5)      # of a grey picture


def test_a_real_export_carries_the_preprocessing(tmp_path, saved, monkeypatch):
  pytest.importorskip('torch')
  from unimiss_jax.cli import export
  from unimiss_jax.porting import parity
  monkeypatch.setattr(parity, 'SIZES', ((64, 64),))
  (saved / 'config.json').write_text(json.dumps(tiny.config().to_dict()))
  (saved / 'metrics.jsonl').write_text('')
  export.export(saved, tmp_path / 'export', parts=('encoder',))
  views, recorded = card.views(weights.read(tmp_path / 'export'))
  assert recorded and views == json.loads(json.dumps(card.views(weights.read(saved))[0]))
  text = (tmp_path / 'export' / 'README.md').read_text()
  assert '| view | size [16, 64, 64], extent record, resize area, pad_hu -1024' in text


def test_assumed_preprocessing_is_that_of_preset_plain():
  config = unimiss_plus.get_config('plain')
  for kind, of in (('volume', config.views.ct), ('image', config.views.xray)):
    for leaf, value in card.PLAIN[kind].items():
      if leaf in of:
        assert of[leaf] == value, leaf
  contract = card.contract(config.to_dict())
  assert {kind: rules['view'] for kind, rules in contract.items()} == card.PLAIN


def test_a_task_prepares_its_inputs_in_its_own_way(tmp_path, run, backbone):
  """Fine-tuned weights: whole scans at their spacing, clipped and normalised; they know one kind of input."""
  config = finetune.get_config('cls3d')
  config.unlock()
  config.model, config.views.ct.size = tiny.config().model, (16, 64, 64)
  config.task.update(dict(spacing_mm=(4., 0., 0.), clip=(-1000., 400.), normalise=(100., 250.)))
  hu = scan((64, 70, 66))
  write(tmp_path / 'data' / 'a.nii.gz', hu)
  picture(tmp_path / 'data' / 'b.png')
  got = made(tmp_path, run(config), tmp_path / 'data', '--per_tile')
  mean = np.rint(hu.reshape(32, 2, 70, 66).mean(1))                       # 2 -> 4 mm
  shrink = lambda n, m: np.clip(np.minimum(np.arange(1, m + 1)[:, None] * n / m, np.arange(n) + 1) - np.maximum(
      np.arange(m)[:, None] * n / m, np.arange(n)), 0, None) * m / n      # [m, n] overlap of pixels
  view = np.einsum('ad,dhw,bh,cw->abc', shrink(32, 16), mean, shrink(70, 64), shrink(66, 64), optimize=True)
  view = (np.clip(view, -1000, 400) - 100) / 250
  np.testing.assert_allclose(got['embedding'][:1], backbone([np.float32(view)[..., None]]), rtol=0, atol=1e-4)
  assert got['status'].tolist() == ['ok', 'DIMENSION'] and got['size'][0].tolist() == [32, 70, 66]


def test_spacing_and_tile_of_prepared_training_data(tmp_path, run):
  """As if the scan had been resampled before."""
  hu = scan((64, 70, 66))
  half = np.rint(hu.reshape(32, 2, 70, 66).mean(1)).astype(np.int16)
  write(tmp_path / 'fine.nii', hu)
  write(tmp_path / 'coarse.nii', half, (4., 1., 1.))
  ckpt = run(tiny.config())
  got = made(tmp_path, ckpt, tmp_path / 'fine.nii', '--spacing=4,0,0')
  want = made(tmp_path, ckpt, tmp_path / 'coarse.nii')
  np.testing.assert_allclose(got['embedding'], want['embedding'], rtol=0, atol=1e-6)
  whole = made(tmp_path, ckpt, tmp_path / 'coarse.nii', '--tile=0', '--per_tile')
  assert whole['size'].tolist() == [[32, 70, 66]] and whole['corner'].tolist() == [[0, 0, 0]]


def test_an_encoder_of_one_kind(tmp_path, run, params, capsys):
  write(tmp_path / 'data' / 'a.nii.gz', scan())
  picture(tmp_path / 'data' / 'b.png')
  off = ('phases.xray', 'loss.drr', 'loss.recon_drr', 'loss.pair_nce', 'loss.slice')
  ct_only = tiny.config(**{name: 0 if name == 'phases.xray' else 0. for name in off})
  got = made(tmp_path, run(ct_only), tmp_path / 'data')
  assert got['status'].tolist() == ['ok', 'DIMENSION']
  assert f'ERROR DIMENSION {tmp_path}/data/b.png: 2D image given to a 3D-only encoder. FIX: ' in capsys.readouterr().err
  kept = {n: a for n, a in porting.to_torch({'backbone': params}).items() if '3D' not in n}
  torch_files.write(tmp_path / 'flat.safetensors', kept)
  got = made(tmp_path, tmp_path / 'flat.safetensors', tmp_path / 'data', '--allow=3D',
             '--arch={"num_heads": [1, 1, 1, 1], "decoder_heads": [1, 1, 1]}')
  assert got['status'].tolist() == ['DIMENSION', 'ok']
  assert 'volume given to a 2D-only encoder' in capsys.readouterr().err


def test_colour_and_volumes_of_four_axes(tmp_path, run, capsys):
  data, hu = tmp_path / 'data', np.stack([scan((20, 64, 66), seed=i) for i in range(3)])
  data.mkdir()
  grey = picture(data / 'a.png', mode='RGB')
  assert picture(data / 'b.png').shape == grey.shape
  image = nib.Nifti1Image(hu.transpose(3, 2, 1, 0), np.diag([1., 1, 2, 1]))
  nib.save(image, data / 'c.nii.gz')
  write(data / 'd.nii.gz', hu[1])
  ckpt = run(tiny.config())
  got = made(tmp_path, ckpt, data)
  said = capsys.readouterr().err
  assert f'WARN MODE {data}/a.png: RGB X-ray converted to gray\n' in said
  assert f'ERROR NDIM {data}/c.nii.gz: 4-D NIfTI with 3 volumes. FIX: --frame=0 or --frame=all\n' in said
  assert got['status'].tolist() == ['ok', 'ok', 'NDIM', 'ok'] and 'RGB X-ray converted to gray' in got['reason'][0]
  np.testing.assert_array_equal(got['embedding'][0], got['embedding'][1])
  one = made(tmp_path, ckpt, data, '--frame=1')
  np.testing.assert_allclose(one['embedding'][2], got['embedding'][3], rtol=0, atol=1e-6)
  each = made(tmp_path, ckpt, data, '--frame=all')
  assert each['id'].tolist() == [f'data/{n}' for n in ('a.png', 'b.png', *(f'c.nii.gz::{i}' for i in range(3)),
                                                       'd.nii.gz')]
  np.testing.assert_allclose(each['embedding'][3], got['embedding'][3], rtol=0, atol=1e-6)
  assert np.abs(each['embedding'][2] - each['embedding'][3]).max() > 1e-3
  with pytest.raises(Exception, match='there is no frame 3'):
    nifti.read(data / 'c.nii.gz', frame=3)
  assert made(tmp_path, ckpt, data, '--frame=3')['status'].tolist() == ['ok', 'ok', 'NDIM', 'ok']


def test_other_modalities_have_no_air(tmp_path, run, capsys):
  """Values that are no HU are refused as CT; else every tile counts."""
  write(tmp_path / 'a.nii.gz', np.random.default_rng(0).integers(0, 900, (30, 70, 90)).astype(np.int16))
  ckpt = run(tiny.config(**OUTPUT))
  made(tmp_path, ckpt, tmp_path / 'a.nii.gz', code=1)
  assert 'ERROR HU_UNCALIBRATED' in capsys.readouterr().err and not (tmp_path / 'e.npz').exists()
  assert made(tmp_path, ckpt, tmp_path / 'a.nii.gz', '--modality=other')['tiles'].tolist() == [8]


def test_sequences_of_mr_are_the_channels_that_training_saw(tmp_path, capsys):
  """z-scores of what is not 0, between its 0.5 and 99.5 percentiles, stored to 1/1024; joined by the ends of names."""
  config = tiny.config(**OUTPUT, **{'data.modality': 'mr', 'data.sequences': '_t1,_flair', 'model.in_channels': (3, 2)})
  network, folder = numbers(config), tmp_path / 'mr'
  folder.mkdir()
  ckpt, channels = exported(folder, config, network), []
  for seed, end in enumerate(('t1', 'flair')):
    values = np.random.default_rng(seed).integers(0, 900, (16, 64, 64)).astype(np.int16)
    values[:, :8] = 0
    write(tmp_path / 'data' / f'a_{end}.nii.gz', values)
    inside = values[values != 0].astype(float)
    limits = np.percentile(inside, (.5, 99.5))
    inside = inside.clip(*limits)
    channels.append(np.rint(1024 * (values.clip(*limits) - inside.mean()) / inside.std()) / 1024)
  write(tmp_path / 'data' / 'b_t1.nii.gz', values)
  got = made(tmp_path, ckpt, tmp_path / 'data')
  module = models.build(config.model)
  want = jax.jit(lambda x: module.apply({'params': network}, x).embedding)(np.float32(np.stack(channels, -1))[None])
  np.testing.assert_allclose(got['embedding'][:1], want, rtol=0, atol=1e-3)
  assert got['status'].tolist() == ['ok', 'SEQUENCES'] and 'nothing beside it ends in _flair' in got['reason'][1]
  capsys.readouterr()
  made(tmp_path, ckpt, tmp_path / 'data' / 'b_t1.nii.gz', '--sequences=', code=1)
  assert '1 sequences of a scan, the encoder was trained on 2. FIX: say by --sequences' in capsys.readouterr().err


@pytest.mark.parametrize('kind, text', [
    ('empty', 'ERROR EMPTY_DIR'), ('nothing', 'ERROR EMPTY_DIR'), ('no weights', 'no such file'),
    ('no config', 'ERROR .*the config.json of its run is not there'),
    ('folder', 'e.npz is a folder. FIX: name a file')])
def test_what_stops_it_is_one_line(tmp_path, run, saved, capsys, kind, text):
  write(tmp_path / 'data' / 'a.nii.gz', scan((20, 64, 64)))
  ckpt, data = run(tiny.config()), tmp_path / 'data'
  if kind == 'empty':
    data = tmp_path / 'other'
    data.mkdir()
  if kind == 'nothing':
    data = tmp_path / 'nowhere'
  if kind == 'no weights':
    ckpt = tmp_path / 'w.pth'
  if kind == 'no config':
    ckpt = saved
    (saved / 'config.json').unlink(missing_ok=True)
  if kind == 'folder':
    (tmp_path / 'e.npz').mkdir()
  capsys.readouterr()
  made(tmp_path, ckpt, data, code=1)
  error = capsys.readouterr().err
  assert re.search(text, error) and error.count('\n') == 1 and 'Traceback' not in error, error


def test_nothing_is_left_of_a_write_that_fails(tmp_path, run, monkeypatch):
  """The old table stays, no half of the new one."""
  write(tmp_path / 'data' / 'a.nii.gz', scan((30, 70, 66)))
  (tmp_path / 'e.npz').write_bytes(b'the old one')

  def full(*_, **__):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(np, 'savez', full)
  made(tmp_path, run(tiny.config()), tmp_path / 'data', code=1)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['data', 'e.npz']
  assert (tmp_path / 'e.npz').read_bytes() == b'the old one'


@pytest.mark.parametrize('flags, text', [
    ([], '--ckpt, --data, --out'),
    (['--ckpt=x', '--data=y', '--out=z.txt'], '--out=z.txt: a name that ends in .npz or '),
    (['--ckpt=x', '--data=y', '--out=z.csv', '--batch=0'], '--batch=0'),
    (['--ckpt=x', '--data=y', '--out=z.csv', '--frame=-1'], '--frame'),
    (['--ckpt=x', '--data=y', '--out=z.csv', '--modality=us'], '--modality')])
def test_usage_is_told_with_exit_code_2(flags, text, capsys):
  with pytest.raises(SystemExit) as e:
    embed.main(flags)
  error = capsys.readouterr().err
  assert e.value.code == 2 and text in error and error.count('\n') == 1 and 'usage: python -m' in error


def test_a_usage_error_does_not_wait_for_jax():
  code = ('import sys; from unimiss_jax.cli import embed\ntry: embed.main([])\n'
          'except SystemExit: print(sorted({"jax", "flax", "torch", "grain"} & set(sys.modules)))')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == '[]\n' and done.stderr.startswith('ERROR the following arguments are required: --ckpt')


@pytest.mark.parametrize('name', ['e.npz', 'e.csv'])
def test_a_table_in_a_bucket(tmp_path, run, memory, name):
  picture(tmp_path / 'a.png')
  assert embed.main([f'--ckpt={run(tiny.config())}', f'--data={tmp_path / "a.png"}', f'--out={memory}/new/{name}']) == 0
  file, = epath.Path(f'{memory}/new').iterdir()
  assert file.name == name
  if name == 'e.npz':
    assert table(io.BytesIO(file.read_bytes()))['status'].tolist() == ['ok']
  else:
    assert len(list(csv.DictReader(file.read_text().splitlines()))) == 1


@pytest.mark.realdata
def test_real_scans_whatever_their_orientation(tmp_path, run, shared):
  """Ten files of one head give one embedding; a CT in three axis orders, too; all is finite and the same again."""
  ckpt, data = run(tiny.config()), shared / 'data'
  heads = made(tmp_path, ckpt, data / 'odd' / 'nifti' / 'orient_*', '--modality=other')
  assert len(heads['id']) == 10 and (heads['status'] == 'ok').all()
  np.testing.assert_allclose(heads['embedding'], heads['embedding'][:1].repeat(10, 0), rtol=0, atol=1e-6)
  ct = nib.load(data / 'ct' / 'ricord1b_440808-000100.nii.gz')
  for code in ('RAS', 'LPI', 'PIR'):
    turn = nib.orientations.ornt_transform(nib.io_orientation(ct.affine), nib.orientations.axcodes2ornt(code))
    nib.save(ct.as_reoriented(turn), tmp_path / f'ct_{code}.nii')
  others = [data / 'ct' / 'deeplesion' / '000001_02_01_008-023_dep0.nii.gz', *sorted((data / 'cxr').rglob('*.png'))[:3]]
  source = ','.join(map(str, [tmp_path / 'ct_*.nii', *others]))
  first, second = (made(tmp_path, ckpt, source) for _ in range(2))
  assert (first['status'] == 'ok').all() and len(first['id']) == 7 and np.isfinite(first['embedding']).all()
  np.testing.assert_array_equal(first['embedding'], second['embedding'])
  cts = first['embedding'][['ct_' in name for name in first['id']]]
  assert len(cts) == 3
  np.testing.assert_allclose(cts, cts[:1].repeat(3, 0), rtol=0, atol=1e-6)


def test_all_the_leaves_of_a_tree_count_in_the_hash(params):
  encoder = {'transformer': params['transformer']}
  flat = flatten_dict(encoder)
  path = next(p for p in flat if p[-1] == 'bias')
  changed = unflatten_dict(flat | {path: flat[path] + 1})
  assert weights.digest(encoder) == weights.digest(jax.tree.map(np.copy, encoder)) != weights.digest(changed)
