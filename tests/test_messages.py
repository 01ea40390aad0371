"""A user's fault gives one clear line: what is wrong, what was found, what to do; never a traceback."""
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines import sample
from data_pipelines.errors import DataError
from tests.conftest import ROOT
from tests.e2e import tiny
from unimiss_jax import train
from unimiss_jax.cli import arguments
from unimiss_jax.validate import DRR_LOSSES, ConfigError, check_devices, validate

NO_DRR = {f'loss.{term}': 0. for term in DRR_LOSSES}
LEAVES = [
    ({'steps': 0}, r'steps=0, epochs=0: exactly one .* set the other to 0'),
    ({'epochs': 2}, r'steps=8, epochs=2: exactly one'),
    ({'views.xray.size': 100}, r'views.xray.size: .*\(100, 100\).* nearest valid size is \(96, 96\)'),
    ({'views.ct.size': (18, 64, 64)}, r'views.ct.size: .*\(18, 64, 64\).* nearest valid size is \((16|20), 64, 64\)'),
    ({'views.ct.size': (16, 64, 40)}, r'views.ct.size: .*nearest valid size is'),
    ({'views.ct.size': (16, 16, 16)}, r'views.ct.size: .*nearest valid size is \(16, 32, 32\)'),
    ({'views.ct.size': (16, 48, 48)}, r'views.ct.size \(its slices .*nearest valid size is \(64, 64\)'),
    ({'views.ct.size': (64, 64)}, r'views.ct.size=\(64, 64\): needs 3 numbers'),
    ({'views.ct.blur_p': (.5,)}, r'views.ct.blur_p=\(0.5,\): needs two numbers'),
    ({'model.image_size': 32}, r'model.image_size: .* nearest valid size is \(64, 64\)'),
    ({'model.volume_size': (16, 50, 50)}, r'model.volume_size: .* nearest valid size is \(16, 48, 48\)'),
    ({'model.depths': (1, 1, 1)}, r'model.embed_dims=.*: needs 5 numbers'),
    ({'model.num_heads': (1, 1, 1)}, r'model.num_heads=\(1, 1, 1\): needs 4 numbers'),
    ({'model.num_heads': (1, 1, 1, 3)}, r'3 heads do not divide the width 8'),
    ({'model.name': 'resnet18'}, r'resnet18.*known are mit_plus'),
    ({'model.dtype': 'float64'}, r'model.dtype="float64" needs .*JAX_ENABLE_X64=1'),
    ({'phases.unit': 'epok'}, r'phases.unit="epok" unknown: use one of epoch, step, joint'),
    ({'phases.ct': 0, 'phases.xray': 0}, r'nothing to train on'),
    ({'phases.ct': -1}, r'phases.ct=-1: must be at least 0'),
    ({'batch.ct': 0}, r'batch.ct=0: must be at least 1, or set phases.ct=0'),
    ({'drr.kind': 'siddon'}, r'drr.kind="siddon" unknown: use one of box, linear'),
    ({'optim.accum': 0}, r'optim.accum=0: must be at least 1'),
    ({'data.tile': 14}, r'data.tile=14: an even number from 16, or 0 for whole scans'),
    ({'data.tile': 25}, r'data.tile=25: an even number from 16, or 0 for whole scans'),
    ({'log.watchdog_min': -1.}, r'log.watchdog_min=-1.0: must be at least 0'),
    ({'eval.fit': 24}, r'eval.fit=24: must lie between 0 and eval.records=24'),
    ({'eval.records': 2_000_000}, r'eval.records=2000000: at most 1000000'),
    ({'eval.tasks': ('knn', 'retrival')}, r'eval.tasks: "retrival" unknown: use some of knn, retrieval'),
    ({'method': 'unimis'}, r'method "unimis" unknown'),
    ({'data.modality': 'pet'}, r'data.modality="pet" unknown: use one of ct, mr, other'),
    ({'data.modality': 'mr', 'data.ct': 'x'}, r'loss.drr=0.5, loss.recon_drr=5, loss.pair_nce=1: DRR are made from HU, '
     r'which data.modality=mr has not; set loss.drr and loss.recon_drr and loss.pair_nce to 0'),
    (NO_DRR | {'data.modality': 'other'}, r'data.modality=other with data.ct="": phantoms are CT; name a folder'),
    (NO_DRR | {'data.modality': 'mr', 'data.ct': 'x', 'data.sequences': '_t1,_t2,_flair'},
     r'data.sequences="_t1,_t2,_flair" names 3, model.in_channels=\(3, 1\): use model.in_channels=\(3, 3\)'),
    ({'model.in_channels': (3, 2)}, r'model.in_channels=\(3, 2\): CT has one sequence; use data.modality=mr, or'),
    ({'model.in_channels': (1, 1)}, r'model.in_channels=\(1, 1\): images have 3 channels, .*; use \(3, 1\)'),
    ({'data.place': 'gpu'}, r'data.place="gpu" unknown: use one of host, device'),
    ({'data.place': 'device', 'drr.image': 'reference'}, r'data.place="device", drr.image="reference": the released '
     r'renderer runs on the host alone; set data.place=host, or another drr.image'),
    ({'data.place': 'device', 'drr.tilt_deg': 20., 'drr.source_jitter_mm': 300.}, r'drr.tilt_deg=20, drr.source_jitter_'
     r'mm=300: the beam leans by up to 29.5 degrees in each direction, at most 25 there; set them lower, or'),
    ({'data.device_shape.xray': (0, 0, 0)}, r'data.device_shape.xray=\(0, 0, 0\): needs 2 numbers, none below 0'),
    ({'data.manifest': '/m', 'data.xray': '/x'}, r'data.manifest="/m" says what is trained on, and so does '
     r'data.xray="/x": set one of them to ""'),
    ({'optim.schedule_unit': 'dataset'}, r'schedule_unit="dataset" is of method unimiss alone, this is unimiss_plus'),
]


TASKS = [
    ('cls3d', {'phases.xray': 1}, r'a task learns from one kind of image: set one of phases.ct and phases.xray to 0'),
    ('cls3d', {'data.place': 'device'}, r'data.place="device": views of a task are made on the host alone; set '
     r'data.place=host'),
    ('cls3d', {'data.label_fraction': 0.}, r'data.label_fraction=0.0: must lie in \(0, 1\]'),
    ('cls3d', {'data.label_fraction': .2, 'steps': 0, 'epochs': 3}, r'fewer labels would mean fewer steps. FIX: set'),
    ('cls3d', {'data.ct': '/data'}, r'data.ct and data.xray have no labels: name a labelled data.manifest'),
    ('seg3d', {'views.ct.extent': 'record'}, r'views.ct.extent="record": a segmentation of volumes cuts patches'),
    ('cls3d', {'task.test_view': 'tencrop'}, r'task.test_view="tencrop": here it is one of centre, whole$'),
    ('cls3d', {'task.test_view': 'windows'}, r'task.test_view="windows": here it is one of centre, whole$'),
    ('cls2d', {'task.test_view': 'windows'}, r'task.test_view="windows": here it is one of centre, whole, tencrop'),
    ('seg3d', {'task.ce_weight': 0., 'task.dice_weight': 0.}, r'nothing to learn from, give one a weight'),
    ('seg2d', {'task.threshold': 128, 'task.classes': ('a', 'b')}, r'task.threshold=128: for one class, .* has 2'),
    ('seg2d', {'task.mask_values': (1,), 'task.classes': ('a', 'b')}, r'task.mask_values has 1 entries, .*: one for'),
    ('seg3d', {'task.overlap': 1.}, r'task.overlap=1.0, .*: shares, below 1'),
    ('cls3d', {'task.phantoms': (4, 2)}, r'task.phantoms=\(4, 2\): needs three numbers'),
    ('cls3d', {'task.epoch_steps': -1}, r'task.epoch_steps=-1: must be at least 0'),
    ('cls3d', {'eval.patience': 3, 'eval.select': ''}, r'eval.patience=3: needs eval.select and eval.every'),
    ('cls3d', {'init_parts': ('encoder', 'neck')}, r'init_parts: "neck" unknown: use some of encoder, decoder, head'),
    ('cls3d', {'optim.schedule': 'step'}, r'optim.schedule="step" unknown: use one of cosine, poly, constant'),
    ('cls3d', {'task.features': 'max'}, r'task.features="max" unknown: use one of cls, mean, both'),
    ('seg2d', {'task.dice': 'hard'}, r'task.dice="hard" unknown: use one of soft, hard_no_grad'),
]


@pytest.mark.parametrize('preset,overrides,text', TASKS)
def test_a_leaf_of_a_task_that_cannot_work_is_named(preset, overrides, text):
  with pytest.raises(ConfigError, match=text) as e:
    validate(tiny.task(f'phantom_{preset}', **overrides))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('overrides,text', LEAVES)
def test_a_leaf_that_cannot_work_is_named(overrides, text):
  with pytest.raises(ConfigError, match=text) as e:
    validate(tiny.config(**overrides))
  assert '\n' not in str(e.value)


def test_a_run_without_hu_is_valid_without_drr():
  validate(tiny.config(**NO_DRR, **{'data.modality': 'mr', 'data.ct': 'x', 'data.sequences': '::0,::1',
                                    'model.in_channels': (3, 2)}))
  validate(tiny.config(**{'data.modality': 'mr', 'phases.ct': 0}))      # nothing is rendered
  assert DRR_LOSSES == sample.DRR_LOSSES


def test_all_shipped_presets_are_valid():
  from configs import finetune, unimiss_plus
  for preset in unimiss_plus.PRESETS:
    validate(unimiss_plus.get_config(preset))
  for preset in finetune.PHANTOM + finetune.GENERIC + finetune.PROTOCOLS:
    validate(finetune.get_config(preset))
    validate(finetune.get_config(f'{preset},quirks=1'))


def test_a_batch_that_the_devices_cannot_share():
  with pytest.raises(ConfigError, match='batch.ct=100 not divisible by 16 devices: use 96 or 112'):
    check_devices(tiny.config(**{'batch.ct': 100}), 16)
  with pytest.raises(ConfigError, match='batch.ct=8 not divisible by 8 devices x 2 micro-batches: use 16'):
    check_devices(tiny.config(**{'optim.accum': 2}), 8)


def test_accumulation_with_a_loss_between_samples(tmp_path):
  c = tiny.config(**{'optim.accum': 2, 'batch.ct': 16, 'batch.xray': 16})
  with pytest.raises(ConfigError, match='optim.accum=2: a loss of this run compares samples'):
    train.train_and_evaluate(c, str(tmp_path))


def test_a_phase_without_any_loss(tmp_path):
  off = {f'loss.{k}': 0. for k in ('xray', 'recon_xray', 'nce')}
  with pytest.raises(ConfigError, match='phases.xray=1, but none of its losses is on .* set phases.xray=0'):
    train.train_and_evaluate(tiny.config(**off), str(tmp_path))


def test_an_empty_folder(tmp_path):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'note.txt').write_text('nothing')
  with pytest.raises(DataError, match=r'EMPTY_DIR .*data: no readable .*FIX'):
    train.train_and_evaluate(tiny.config(**{'data.ct': str(tmp_path / 'data')}), str(tmp_path / 'run'))
  # a run that never began does not bind its folder to its config
  with pytest.raises(DataError, match='EMPTY_DIR'):
    train.train_and_evaluate(tiny.config(**{'data.ct': str(tmp_path)}), str(tmp_path / 'run'))


def test_a_mesh_that_does_not_fit(tmp_path):
  with pytest.raises(ConfigError, match='mesh.data=3, mesh.fsdp=1 does not fit 8 devices'):
    train.train_and_evaluate(tiny.config(**{'mesh.data': 3}), str(tmp_path))


COMMANDS = [
    (['--config=configs/unimiss_plus.py', '--workdir=/x', '--config.optim.lrr=2'], 2,
     'config key "optim.lrr" unknown; did you mean "optim.lr"?'),
    (['--config=configs/unimiss_plus.py', '--workdir=/x', '--config.steps=1.5'], 2, '--config.steps=1.5: invalid'),
    (['--config=configs/unimiss_plus.py:plane', '--workdir=/x'], 2, 'did you mean "plain"'),
    (['--config=configs/none.py', '--workdir=/x'], 2, 'no such file'),
    (['--config=configs/unimiss_plus.py'], 2, 'missing --workdir. usage: main.py --config=FILE'),
    ([], 2, 'missing --config. usage: main.py'),
]


@pytest.mark.parametrize('arguments,code,text', COMMANDS)
def test_the_command_line_answers_in_one_line(arguments, code, text):
  done = subprocess.run([sys.executable, 'main.py', *arguments], cwd=ROOT, capture_output=True, text=True)
  lines = done.stderr.strip().splitlines()
  assert done.returncode == code and len(lines) == 1 and re.search(text, lines[0]), done.stderr


def test_a_bad_value_exits_with_1_and_one_error_line(tmp_path):
  done = subprocess.run([sys.executable, 'main.py', '--config=configs/unimiss_plus.py', f'--workdir={tmp_path}',
                         '--config.views.drr.size=70'], cwd=ROOT, capture_output=True, text=True)
  errors = [r for r in done.stderr.splitlines() if 'ERROR' in r]
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert len(errors) == 1 and errors[0].startswith('ERROR views.drr.size: ') and errors[0].endswith('(64, 64)')


def test_print_config_prints_flags_that_give_the_same_config():
  def printed(*given):
    done = subprocess.run([sys.executable, 'main.py', '--config=configs/unimiss_plus.py', '--print_config', *given],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
  found = printed('--config.seed=7', '--config.data.ct=/a b/*.nii', '--config.views.ct.size=(8, 32, 32)')
  assert set(found.splitlines()) >= {'--config.seed=7', "--config.data.ct='/a b/*.nii'", "--config.data.xray=''",
                                     "--config.views.ct.size='(8, 32, 32)'", '--config.drr.view=pa'}
  assert printed(*shlex.split(found)) == found


def test_leaves_of_any_kind_are_printed_as_a_shell_takes_them():
  values = {'phases': ('intra',), 'none': (), 'text': '', 'both': "it's $5", 'rate': .5, 'on': True}
  lines = arguments.shown(ConfigDict({'a': values}))
  assert lines[0] == '--config.a.both=\'it\'"\'"\'s $5\'' and "--config.a.phases=\"('intra',)\"" in lines
  assert shlex.split(' '.join(lines)) == [f'--config.a.{k}={v}' for k, v in sorted(values.items())]


@pytest.mark.slow
def test_a_loss_that_is_never_finite_ends_the_run(tmp_path):
  from data_pipelines import streams
  original = streams.Stream.next

  def poisoned(self):
    batch = original(self)
    return batch | {k: np.full_like(batch[k], np.nan) for k in ('ct', 'drr', 'xray') if k in batch}
  streams.Stream.next = poisoned
  try:
    with pytest.raises(train.TrainError, match='2 steps in a row were not finite; the last good checkpoint is none'):
      train.train_and_evaluate(tiny.config(**{'optim.max_skipped': 2}), str(tmp_path))
  finally:
    streams.Stream.next = original
  rows = tiny.metrics(tmp_path)
  assert rows[0, 'ct']['train/skipped'] == 1 and rows[0, 'ct']['train/loss'] is None
