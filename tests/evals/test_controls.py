"""What is to be beaten, on cases where place alone, or intensity alone, tells everything or nothing."""
import numpy as np
import pytest

from data_pipelines import cases
from tests.data_pipelines.test_cases import Records, config
from unimiss_jax.evals import controls

RNG = np.random.default_rng(0)


class Organs(Records):
  classes = ('a', 'b')


def volumes(corners, c, whole=False):
  """Volumes [32, 64, 64] with a box of 300 HU at each corner and one of 700 HU beside it, in a body of 0 HU; `whole`:
  slabs, as the map of places rounds the corners of boxes."""
  out = []
  for z, y, x in corners:
    number = np.zeros((32, 64, 64), np.uint8)
    box = np.s_[:, :] if whole else np.s_[z:z + 8, y:y + 16]
    number[*box, x:x + 8], number[*box, x + 8:x + 16] = 1, 2
    mask = number if c.task.exclusive else np.stack([number == 1, number == 2], -1).astype(np.uint8)
    out.append({'volume': np.array([0, 300, 700], np.int16)[number], 'spacing_mm': (1., 1., 1.), 'mask': mask,
                'truth': mask})
  return cases.of(c, 'test', Organs(*out))


@pytest.mark.parametrize('exclusive', [True, False])
def test_a_place_that_never_changes_is_all_that_chance_needs(exclusive):
  c = config('seg3d', **{'task.classes': ('a', 'b'), 'task.exclusive': exclusive})
  here = [(0, 0, 24)]
  found = controls.segment(volumes(here * 3, c, whole=True), volumes(here, c, whole=True), c.task)
  assert found['chance/dice'] == found['chance/dice/a'] == found['raw/dice'] == 1


@pytest.mark.parametrize('exclusive', [True, False])
def test_an_intensity_of_its_own_is_all_that_raw_pixels_need(exclusive):
  c = config('seg3d', **{'task.classes': ('a', 'b'), 'task.exclusive': exclusive})
  corners = [(z, y, x) for z in (0, 8, 16) for y in (0, 24, 48) for x in (8, 32)]
  found = controls.segment(volumes(corners, c), volumes(corners[:4], c), c.task)
  assert found['raw/dice'] == 1 and found['chance/dice'] < .1


def test_a_constant_has_no_ranks_and_brightness_ranks_all():
  """Two findings, of which one is the brightness and the other is nowhere to be seen; some labels are not known."""
  c = config('phantom_cls2d')

  def some(n):
    bright, other = RNG.integers(0, 2, n), RNG.integers(0, 2, n)
    label = np.stack([bright, other], 1).astype(np.float32)
    label[::7, 1] = -1
    return cases.of(c, 'test', Organs(*(
        {'image': np.clip(RNG.normal(90 + 60 * b, 10, (64, 64)), 0, 255).astype(np.uint8), 'label': y}
        for b, y in zip(bright, label))))
  found = controls.classify(some(120), some(60), False)
  assert found['chance/auroc'] == found['chance/auroc/a'] == .5
  assert found['raw/auroc/a'] == 1 and abs(found['raw/auroc/b'] - .5) < 3 * .08      # 3 sd of 26 against 26
