"""Labels that belong to other pictures teach nothing: what leads from a label to a score would show here."""
import json

import numpy as np
import pytest
from PIL import Image

from tests.e2e import tiny
from unimiss_jax import train

SPLITS = {'train': 64, 'val': 8, 'test': 96}


def pictures(folder, shuffled: bool) -> str:
  """Noise with a bright disc on the left or on the right; the class says where it is, or where that of another is."""
  rng = np.random.default_rng(5)
  y, x = np.mgrid[:64, :64]
  rows = []
  for split, n in SPLITS.items():
    right = np.arange(n) % 2
    told = rng.permutation(right) if shuffled else right
    for k in range(n):
      disc = (y - rng.uniform(20, 44))**2 + (x - (44 if right[k] else 20))**2 < 12**2
      image = np.clip(rng.normal(90, 30, (64, 64)) + 90 * disc, 0, 255).astype(np.uint8)
      Image.fromarray(image).save(folder / f'{split}{k}.png')
      rows.append({'id': f'{split}{k}', 'path': f'{split}{k}.png', 'kind': 'image', 'split': split,
                   'label': {'right': int(told[k])}})
  (folder / 'manifest.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return str(folder)


@pytest.mark.slow
def test_shuffled_labels_give_chance(tmp_path):
  """The same pictures and steps; the area of n against n cases deviates by sqrt((2n + 1) / 12) / n."""
  area = {}
  for shuffled in (False, True):
    data, run = tmp_path / f'data{shuffled}', tmp_path / f'run{shuffled}'
    data.mkdir()
    config = tiny.task('phantom_cls2d', **{
        'data.manifest': pictures(data, shuffled), 'task.classes': ('right',), 'steps': 40, 'task.epoch_steps': 8,
        'optim.lr': 1e-2, 'views.xray.scale': (.9, 1.), 'eval.every': 40})
    assert train.train_and_evaluate(config, str(run)) == 0
    area[shuffled] = json.loads((run / 'eval' / 'test.json').read_text())['scores']['auroc']
  n = SPLITS['test'] // 2
  assert area[False] > .9
  assert abs(area[True] - .5) < 3 * np.sqrt((2 * n + 1) / 12) / n
