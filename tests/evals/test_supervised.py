"""Cases scored by networks that are known: the mean over views, the grid of the file, what is not known."""
import json

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from data_pipelines import cases
from tests.data_pipelines.test_cases import Records, config, forty_views
from tests.data_pipelines.test_labelled import organ, scan
from unimiss_jax.evals import supervised


def test_twenty_views_give_the_probability_of_the_released_forty():
  """The mean of probabilities, which is not the probability of the mean logit."""
  rng = np.random.default_rng(0)
  records = [{'image': rng.integers(0, 256, (64, 64)).astype(np.uint8), 'label': np.eye(3)[k]} for k in (1, 0, 2)]
  w = rng.normal(size=(224 * 224, 3)) / 30
  network = lambda x: x[..., 0].reshape(len(x), -1).astype(float) @ w
  found = supervised.classify(network, cases.of(config('chestxr'), 'test', Records(*records)), True)
  z = np.stack([network(forty_views(r['image'])[..., None]) for r in records])      # [3, 40, 3]
  want = softmax(z, -1).mean(1)
  np.testing.assert_allclose(found.table['probability'], want, rtol=0, atol=1e-6)
  assert np.abs(softmax(z.mean(1), -1) - want).max() > 1e-3
  assert found.table['id'].tolist() == ['case 0', 'case 1', 'case 2'] and found.table['group'].tolist() == list('012')


def test_what_is_not_known_does_not_count():
  """Cases are scored where they have a label: the network is right there and wrong elsewhere."""
  label = np.array([[1, -1], [0, 1], [-1, 0], [1, 1], [0, -1]], np.float32)
  image = lambda k: np.full((64, 64), 40 * k, np.uint8)
  tests = cases.of(config('phantom_cls2d'), 'test', Records(*({'image': image(k), 'label': y}
                                                              for k, y in enumerate(label))))
  answer = np.where(label < 0, -5., 5 * (2 * label - 1))
  which = lambda x: np.rint(x[:, 0, 0, 0] * 255 / 40).astype(int)
  found = supervised.classify(lambda x: answer[which(x)], tests, False)
  np.testing.assert_array_equal(np.isnan(found.table['truth']), label < 0)
  assert found.scores['auroc'] == found.scores['accuracy'] == 1


# ---- segmentation

HU = np.array([-900, 0, 500], np.int16)      # of the background and of both classes


def oracle(x):
  """Logits [N, *S, 3] of a network that knows what HU / 1024 each class has."""
  return -1000. * np.abs(x - HU / 1024.)


@pytest.fixture
def scans(tmp_path):
  """Two scans, stored left-posterior-superior, with masks that are stored otherwise."""
  rows = []
  for k, axcodes in enumerate(('RAS', 'SAL')):
    scan(tmp_path / f'{k}.nii', axcodes='LPS', values=HU[organ(k)])
    scan(tmp_path / f'{k}m.nii.gz', axcodes=axcodes, values=organ(k))
    rows.append({'id': f's{k}', 'path': f'{k}.nii', 'mask': f'{k}m.nii.gz', 'kind': 'volume', 'split': 'test'})
  (tmp_path / 'manifest.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return {'data.manifest': str(tmp_path), 'task.classes': ('liver', 'spleen'), 'views.ct.size': (16, 32, 16)}


def test_a_perfect_network_is_perfect_on_the_grid_of_the_file(scans):
  """Windows smaller and larger than the volume, whatever way file and mask are stored."""
  c = config('seg3d', **scans, **{'task.mirror': True})
  shown = {}
  found = supervised.segment(oracle, cases.of(c, 'test'), c.task, distances=True,
                             keep=lambda i, record, labels: shown.setdefault(i, labels))
  for i, labels in shown.items():
    np.testing.assert_array_equal(labels, organ(i).transpose(2, 1, 0))
  assert found.scores == {f'{name}{c}': value for c in ('', '/liver', '/spleen')
                          for name, value in (('dice', 1.), ('iou', 1.), ('hd95_mm', 0.), ('nsd', 1.))}


def test_a_coarser_working_grid_costs_less_than_its_voxel(scans):
  c = config('seg3d', **scans, **{'task.spacing_mm': (9., 2., 2.)})
  found = supervised.segment(oracle, cases.of(c, 'test'), c.task, distances=True)
  assert .8 < found.scores['dice'] < 1 and 0 < found.scores['hd95_mm'] <= 9


def test_a_wrong_network_has_the_overlap_of_its_boxes(scans):
  """All of the volume is called liver: Dice 2 |A| / (|A| + |V|), and 0 for the spleen, whose distance is not finite."""
  c = config('seg3d', **scans)
  found = supervised.segment(lambda x: np.broadcast_to([0., 9., 0.], (*x.shape[:-1], 3)), cases.of(c, 'test'), c.task,
                             distances=True)
  sizes = [(organ(k) == 1).sum() for k in (0, 1)]
  want = [2 * n / (n + organ(0).size) for n in sizes]
  np.testing.assert_allclose(found.table['dice'], np.stack([want, [0, 0]], 1), rtol=1e-12)
  assert np.isinf(found.table['hd95'][:, 1]).all() and np.isnan(found.scores['hd95_mm/spleen'])
  assert found.scores['hd95_mm'] == found.scores['hd95_mm/liver'] > 0


def test_pictures_are_asked_for_once_and_measured_in_pixels(tmp_path):
  """Outlines that overlap; a file of another size than the network's."""
  mask = np.zeros((128, 192, 2), np.uint8)
  mask[32:96, 48:120, 0] = mask[64:112, 96:144, 1] = 1
  Image.fromarray(mask[..., 0] * 100 + mask[..., 1] * 40).save(tmp_path / 'x.png')
  Image.fromarray(mask[..., 0] + 2 * mask[..., 1]).save(tmp_path / 'm.png')
  (tmp_path / 'manifest.jsonl').write_text(json.dumps(
      {'path': 'x.png', 'mask': 'm.png', 'kind': 'image', 'split': 'test'}))
  c = config('seg2d', **{'data.manifest': str(tmp_path), 'task.classes': ('lung', 'heart'), 'views.xray.size': 64,
                         'task.mask_values': ((1, 3), (2, 3))})
  asked = []

  def network(x):
    asked.append(x.shape)
    grey = x[..., 0] * 255
    return np.stack([grey - 70, 30 - np.abs(grey % 100 - 40)], -1)

  found = supervised.segment(network, cases.of(c, 'test'), c.task, distances=True)
  assert asked == [(1, 64, 64, 3)]
  assert found.scores['dice'] > .97 and 0 <= found.scores['hd95_px'] <= 3 and 'hd95_mm' not in found.scores
