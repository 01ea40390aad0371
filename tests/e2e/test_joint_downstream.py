"""A run of Joint with a ResNet, its export, and what users do with both: fine-tuning, embeddings, pages."""
import json
import logging

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from configs import finetune
from configs import joint as joint_config
from tests.e2e import tiny
from unimiss_jax import checkpoint, train, weights
from unimiss_jax.cli import embed, export
from unimiss_jax.cli import report as pages
from unimiss_jax.optim import named_leaves
from unimiss_jax.porting import parity

pytest.importorskip('torch')
pytestmark = pytest.mark.slow
NET = {'model.width': 4, 'model.image_size': 64}


@pytest.fixture(autouse=True)
def no_log_to_a_closed_stream():
  yield
  logging.getLogger().handlers = [h for h in logging.getLogger().handlers if type(h) is not logging.StreamHandler]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Three phases of two steps each, on eight devices."""
  folder = tmp_path_factory.mktemp('joint')
  c = joint_config.get_config('phantom,model=resnet50').unlock()
  c = tiny.changed(c, NET | {
      'steps': 6, 'data.phantom_records': 16, 'batch.ct': 8, 'batch.xray': 8,
      'eval.records': 24, 'eval.fit': 12, 'log.every': 1,
      'checkpoint.every': 6, 'views.ct.size': (8, 32, 32), 'head.out_dim': 8, 'head.hidden_dim': 16,
      'head.bottleneck_dim': 8, 'joint.shares': (1 / 3, 1 / 3, 1 / 3), 'joint.width': 16, 'joint.freeze_prototypes': 0,
      'joint.slice_parts': 2, 'optim.warmup_epochs': 0.})
  with c.unlocked():
    c.joint.inter.update(dict(layers=1, hidden=16, head_dim=4))
  assert train.train_and_evaluate(c, str(folder)) == 0
  return folder


@pytest.fixture(scope='module')
def out(run, tmp_path_factory):
  out = tmp_path_factory.mktemp('out') / 'model'
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parity, 'SIZES', ((64, 64), (8, 32, 32)))
    export.export(run, out)
  return out


def test_it_was_trained_and_is_proven(run, out):
  losses = tiny.metrics(run)
  assert [name for _, name in losses if name != 'eval'] == ['intra'] * 2 + ['mask'] * 2 + ['inter'] * 2
  assert all(np.isfinite(row['train/loss']) for (_, name), row in losses.items() if name != 'eval')
  found = weights.read(run)
  assert np.abs(found.params['batch_stats']['bn1']['mean']).max() > 0
  assert json.loads((out / 'parity.json').read_text())['worst_max_rel'] < 1e-5
  assert '64x64' in (out / 'README.md').read_text()


@pytest.mark.parametrize('preset', ['phantom_cls2d', 'phantom_seg2d', 'phantom_seg3d'])
def test_a_task_starts_from_it_and_is_tested(run, out, tmp_path, preset):
  """From the export; the frozen encoder and its statistics are those of the file to the end."""
  frozen = preset == 'phantom_cls2d'
  c = finetune.get_config(f'{preset},model=resnet50').unlock()
  c = tiny.changed(c, NET | {
      'steps': 4, 'task.phantoms': (16, 8, 8), 'batch.ct': 8, 'batch.xray': 8, 'views.xray.size': 32,
      'views.ct.size': (4, 32, 32), 'eval.every': 2, 'log.every': 1, 'checkpoint.every': 4, 'task.frozen': frozen,
      'init_from': str(out if preset != 'phantom_seg2d' else run)})
  assert train.train_and_evaluate(c, str(tmp_path)) == 0
  told = json.loads((tmp_path / 'eval' / 'test.json').read_text())
  given = named_leaves(weights.read(run).params)
  encoder = {n: x for n, x in given.items() if n.startswith(('backbone/', 'batch_stats/'))}
  assert told['loaded'][0] == len(encoder) and told['loaded'][0] < told['loaded'][1]
  assert told['weights_hash'] == weights.digest(encoder)
  assert {'cls': 'auroc', 'seg': 'iou'}[c.task.kind] in told['scores']
  got = checkpoint.read_params(checkpoint.newest(tmp_path))
  assert all(np.array_equal(got[n], x) for n, x in encoder.items()) == frozen
  assert np.array_equal(got['batch_stats/bn1/mean'], encoder['batch_stats/bn1/mean']) == frozen


def test_scans_are_embedded_alike_by_run_and_export(run, out, tmp_path):
  """Volumes through the Transformer, images through the ResNet; both in one table are refused, with the widths."""
  rng = np.random.default_rng(0)
  for kind in ('ct', 'xray', 'both'):
    (tmp_path / kind).mkdir()
  scan = nib.Nifti1Image(rng.integers(-900, 900, (60, 60, 24)).astype(np.int16), np.diag([2., 2., 4., 1.]))
  scan.header.set_xyzt_units('mm')
  picture = Image.fromarray(rng.integers(0, 255, (80, 90)).astype(np.uint8))
  for folder in ('ct', 'both'):
    nib.save(scan, tmp_path / folder / 'a.nii.gz')
  for folder in ('xray', 'both'):
    picture.save(tmp_path / folder / 'b.png')
  for kind, width in (('ct', 16), ('xray', 128)):
    mine, theirs = (embed.embed(str(source), str(tmp_path / kind), str(tmp_path / f'{i}.npz'))
                    for i, source in enumerate((run, out)))
    a, b = (np.load(tmp_path / f'{i}.npz') for i in (0, 1))
    assert mine.count('ok') == theirs.count('ok') == 1 and a['embedding'].shape == (1, width)
    np.testing.assert_array_equal(a['embedding'], b['embedding'])
    assert a['weights_hash'] == b['weights_hash']
  with pytest.raises(Exception, match='of images have 128 numbers and those of volumes 16'):
    embed.embed(str(out), str(tmp_path / 'both'), str(tmp_path / 'x.npz'))


def test_its_page_shows_what_the_resnet_sees(run):
  assert pages.main([f'--workdir={run}', '--records=12']) == 0
  text = (run / 'report' / 'index.html').read_text()
  assert 'Attention and dense features: xray' in text and 'not shown (' not in text
