"""Three training steps of the pilot UniMiSS against the released code: X-ray, CT, CT; preset `reference`, float32.

After the first step only losses can be compared, and those roughly: Adam's first steps are nearly signs, so that
float32 noise grows (tests/parity/README.md).
"""
import json

import numpy as np
import pytest

from configs import unimiss
from tests.parity import recipe
from tests.parity.test_trainsteps import gradient_norms
from tests.parity.trainstep import ROWS, Run
from unimiss_jax import porting

LOSSES = {'ct': ('loss', 'dino_loss', 'slice_loss', 'slice_slice_loss', 'ct_slice_loss'), 'xray': ('loss', 'dino_loss')}


def config(meta, dtype):
  """The preset at the fixture's sizes; its learning rate, decay and momentum are constant, nothing is frozen."""
  hyp = meta['hyp']
  c = unimiss.get_config('reference,model=mit_tiny').unlock()
  c.batch.ct = c.batch.xray = ROWS
  c.epochs = len(meta['phases'])                       # of one step
  c.phases.update(dict(xray=1, ct=2))
  c.model.update(dict(image_size=meta['img2d'], volume_size=tuple(meta['img3d']), dtype=dtype))
  c.views.xray.size = meta['train2d']
  c.head.update(meta['head'])
  c.optim.update(dict(schedule='constant', lr=hyp['lr'], lr_reference_batch=0, weight_decay=hyp['wd'],
                      weight_decay_end=hyp['wd'], freeze_last_layer=0.))
  c.ema.update(dict(momentum=hyp['m'], momentum_end=hyp['m']))
  assert c.optim.clip == hyp['clip'] and c.optim.clip_mode == 'per_tensor'
  return c.lock()


@pytest.mark.slow
def test_three_steps(fixtures):
  meta = json.loads((fixtures / 'parity' / 'pilot_meta.json').read_text())
  arrays, names = np.load(fixtures / 'parity' / 'pilot_trainsteps.npz'), meta['param_names']
  meta['hyp']['niter'] = 1
  meta['steps'] = [{'it': k, 'phase': phase} for k, phase in enumerate(meta['phases'])]
  run = Run(meta, meta['state_keys'], 'float32', config)
  before = porting.to_torch(run.weights)
  for k, _, phase, state, metrics, grads in run.steps():
    ours = np.array([float(metrics[f'train/{name}']) for name in LOSSES[phase]])
    np.testing.assert_allclose(ours, arrays[f'{k}/loss'], rtol=1e-3 if k else 1e-5)
    center = arrays[f'{k}/center']
    np.testing.assert_allclose(state.extra['center'], center, rtol=0, atol=1e-4 * abs(center).max())
    student, teacher = porting.to_torch(state.params), porting.to_torch(state.extra['teacher'])
    for branch, tensors in (('student', student), ('teacher', teacher)):
      norms = [recipe.summary(tensors[n])[2] for n in names]
      np.testing.assert_allclose(norms, arrays[f'{k}/{branch}'][:, 2], rtol=2e-3, err_msg=f'{branch} after step {k}')
    if k == 0:
      gradient_norms(grads, arrays['0/gradnorm_preclip'], names, 1e-3, phase)
      assert all(np.array_equal(student[n], before[n]) for n in names if '3D' in n)
      assert all(int(s.count) == (g != '3d') for g, s in state.opt_state['groups'].items())
