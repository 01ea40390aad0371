"""One run from start to end, and the same run stopped and continued."""
import json
import os
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest
from etils import epath
from PIL import Image

from data_pipelines import manifest, prepare, sources
from data_pipelines.errors import DataError
from tests.e2e import tiny
from unimiss_jax import checkpoint, train, workdir
from unimiss_jax.checkpoint import CheckpointError
from unimiss_jax.mirror import Mirror
from unimiss_jax.optim import named_leaves
from unimiss_jax.validate import ConfigError
from unimiss_jax.writers import Writer


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  assert train.train_and_evaluate(tiny.config(), str(folder)) == 0
  return folder


def test_a_run_leaves_what_it_should(undisturbed):
  names = {p.name for p in undisturbed.iterdir()}
  assert {'config.json', 'env.json', 'metrics.jsonl', 'checkpoints', 'report', 'logs', 'DONE'} <= names
  assert any(n.startswith('events.') for n in names)
  assert sorted(p.name for p in (undisturbed / 'report').iterdir()) == [
      'ct_0000008.png', 'index.html', 'xray_0000008.png']
  rows = tiny.metrics(undisturbed)
  ct, xray = rows[0, 'ct'], rows[1, 'xray']
  for name in ('train/loss', 'train/dino_loss', 'train/drr_loss', 'train/slice_loss', 'train/recon_ct_loss',
               'train/recon_drr_loss', 'train/nce_loss', 'train/pair_nce_loss', 'train/grad_norm', 'train/grad_norm_3d',
               'train/lr', 'train/wd', 'train/skipped', 'collapse/teacher_entropy', 'collapse/center_norm',
               'collapse/feature_std', 'collapse/rankme', 'data/bad_records'):
    assert np.isfinite(ct[name]), name
  assert xray['train/grad_norm_3d'] == 0 and 'train/drr_loss' not in xray
  assert ct['train/skipped'] == 0 and 0 < ct['collapse/teacher_entropy'] <= np.log(32) + 1e-5
  first, last = rows[0, 'eval'], rows[8, 'eval']
  best = json.loads((undisturbed / 'best' / '8' / 'meta' / 'metadata').read_text())
  assert best['select'] == 'eval/knn_auc_ct' and best['value'] == last['eval/knn_auc_ct']
  for name in ('eval/knn_auc_ct', 'eval/knn_auc_xray', 'eval/drr_to_ct_r10', 'eval/xray_to_ct_r10'):
    assert 0 <= first[name] <= 1 and 0 <= last[name] <= 1
  assert 'eval/raw_knn_auc_ct' in first


def test_a_finished_run_is_left_alone(undisturbed):
  before = (undisturbed / 'metrics.jsonl').read_bytes()
  assert train.train_and_evaluate(tiny.config(), str(undisturbed)) == 0
  assert (undisturbed / 'metrics.jsonl').read_bytes() == before


def test_stopped_by_a_signal_and_continued_equals_undisturbed(undisturbed, tmp_path, monkeypatch):
  write = Writer.write_scalars

  def stopping(self, step, scalars, phase=''):
    write(self, step, scalars, phase)
    if (step, phase) == (2, 'ct'):
      os.kill(os.getpid(), signal.SIGTERM)
  monkeypatch.setattr(Writer, 'write_scalars', stopping)
  assert train.train_and_evaluate(tiny.config(), str(tmp_path), preempt_exit_code=7) == 7
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['4'] and not (tmp_path / 'DONE').exists()
  monkeypatch.undo()
  assert train.train_and_evaluate(tiny.config(), str(tmp_path)) == 0
  want, got = tiny.metrics(undisturbed), tiny.metrics(tmp_path)
  assert got == want


def test_steps_that_nothing_waits_for_are_the_same(undisturbed, tmp_path, monkeypatch):
  """As on accelerators: the next step is dispatched while one runs; rows are told a step later, not otherwise."""
  monkeypatch.setattr(train, 'AHEAD', {})
  assert train.train_and_evaluate(tiny.config(), str(tmp_path)) == 0
  assert tiny.metrics(tmp_path) == tiny.metrics(undisturbed)


def test_another_config_is_refused_and_the_keys_are_listed(undisturbed):
  with pytest.raises(ConfigError, match=r'another config: optim.lr 0.002 -> 0.5. FIX: use a new --workdir'):
    train.train_and_evaluate(tiny.config(**{'optim.lr': .5}), str(undisturbed))
  changed = tiny.config(**{'log.every': 3, 'eval.every': 5, 'checkpoint.keep': 9, 'data.workers': 1})
  assert workdir.config_hash(changed) == json.loads((undisturbed / 'DONE').read_text())


@pytest.fixture
def stopped(undisturbed, tmp_path):
  """A run with a checkpoint that has not ended yet, as far as anyone can tell."""
  shutil.copytree(undisturbed, tmp_path / 'run')
  (tmp_path / 'run' / 'DONE').unlink()
  return tmp_path / 'run'


def test_other_records_are_refused_unless_forced(stopped, monkeypatch):
  """And named, as the run has kept its list."""
  before = sources.PhantomCT.listing
  monkeypatch.setattr(sources.PhantomCT, 'digest', 'of other files')
  monkeypatch.setattr(sources.PhantomCT, 'listing', lambda self: before(self)[1:] + [{'id': 'new'}])
  with pytest.raises(CheckpointError, match=r'checkpoints/8 was written with other records of data.ct '
                                            r'\(16 then, 16 now; 1 removed: phantom \d+ of seed 0; 1 added: new\).*'
                                            r'FIX: bring the files back .*--resume=force'):
    train.train_and_evaluate(tiny.config(), str(stopped))
  assert not (stopped / 'DONE').exists()
  assert train.train_and_evaluate(tiny.config(), str(stopped), resume='force') == 0
  assert json.loads((stopped / 'records.json').read_text())['ct'][-1] == {'id': 'new'}


def test_files_and_their_shards_train_and_what_changed_is_named(tmp_path):
  """Named by folder and by manifest; as many records as phantoms, so that nothing is compiled anew."""
  files, rng = tmp_path / 'files', np.random.default_rng(0)
  files.mkdir()
  for i in range(16):
    volume = rng.integers(-1000, 1000, (20, 20, 24)).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([2., 2., 3., 1.])), files / f'{i}.nii')
    Image.fromarray(rng.integers(0, 256, (40, 40)).astype(np.uint8)).save(files / f'{i}.png')
  at = lambda folder: tiny.config(**{'data.ct': str(folder), 'data.xray': str(folder), 'eval.tasks': ()})
  run = tmp_path / 'run'
  assert train.train_and_evaluate(at(files), str(run)) == 0
  shards, other = tmp_path / 'shards', tmp_path / 'other'
  assert prepare.main([str(files), f'--out={shards}', '--workers=0']) == 0
  listed = tiny.config(**{'data.manifest': str(shards), 'eval.tasks': ()})
  assert train.train_and_evaluate(listed, str(other)) == 0
  written = json.loads((other / 'checkpoints' / '8' / 'meta' / 'metadata').read_text())['records']['manifest']
  assert written == {'count': 32, 'hash': manifest.meta(shards)['hash']}
  rows = manifest.read(shards, labelled=False)
  rows[5] |= {'status': 'excluded'}
  manifest.write(shards, rows, shards=manifest.meta(shards)['shards'])
  (other / 'DONE').unlink()
  with pytest.raises(CheckpointError, match=r'other records of data.manifest \(32 then, 32 now; 1 changed status: '
                                            f'{rows[5]["id"]}' r'\): samples would .* FIX: bring it back'):
    train.train_and_evaluate(listed, str(other))
  (run / 'DONE').unlink()
  (files / '3.nii').unlink()
  with pytest.raises(CheckpointError, match=r'other records of data.ct \(16 then, 15 now; 1 removed: 3.nii z0\)'):
    train.train_and_evaluate(at(files), str(run))


def test_a_checkpoint_says_whose_it_is_even_without_the_config_beside_it(stopped):
  (stopped / 'config.json').unlink()
  with pytest.raises(CheckpointError, match='checkpoints/8 was written by another config. FIX: use a new --workdir'):
    train.train_and_evaluate(tiny.config(**{'optim.lr': .5}), str(stopped))


def test_a_new_run_starts_from_the_weights_of_another(undisturbed, tmp_path):
  """Student and teacher begin with the trained student, in buffers of their own; step and optimiser begin anew."""
  run = train.Run(tiny.config(init_from=str(undisturbed)), str(tmp_path), Mirror(tmp_path), 'auto')
  want = checkpoint.read_params(undisturbed / 'checkpoints' / '8')
  for tree in (run.state.params, run.state.extra['teacher']):
    got = named_leaves(tree)
    assert got.keys() == want.keys() and all(np.array_equal(got[n], x) for n, x in want.items())
  step = run.steps['xray'].result()      # donates: a teacher that were the student would end the process
  batch = train.sharding.to_devices(run.take('xray'), run.mesh)
  assert int(run.state.step) == 0 and int(step(run.state, batch)[0].step) == 1
  run.close(wait=True)


def test_a_folder_in_an_object_store(undisturbed, memory, tmp_path, monkeypatch):
  """All but the checkpoints, which Orbax would write there itself."""
  monkeypatch.setattr(train, 'STORES', ('memory://',))
  monkeypatch.setattr(checkpoint, 'absolute', lambda folder: epath.Path(tmp_path) / epath.Path(folder).name)
  folder = epath.Path(memory) / 'run'
  assert train.train_and_evaluate(tiny.config(), str(folder)) == 0
  assert {p.name for p in folder.iterdir()} >= {'config.json', 'env.json', 'metrics.jsonl', 'report', 'logs', 'DONE'}
  assert (folder / 'report' / 'ct_0000008.png').exists() and (folder / 'logs' / 'host_0.txt').exists()
  assert tiny.metrics(folder) == tiny.metrics(undisturbed)
  assert train.train_and_evaluate(tiny.config(), str(folder)) == 0      # complete, left alone


def test_a_workdir_that_nothing_can_write(tmp_path):
  with pytest.raises(DataError, match='SCHEME s5://bucket/run: "s5://" is not supported'):
    train.train_and_evaluate(tiny.config(), 's5://bucket/run')


def test_a_workdir_where_checkpoints_cannot_go(memory):
  with pytest.raises(ConfigError, match='checkpoints cannot be written there. FIX: use a local folder or gs://'):
    train.train_and_evaluate(tiny.config(), f'{memory}/run')
