"""What the writer hands on to Weights & Biases, to a stand-in that writes down what it is told."""
import sys
import types

import numpy as np
import pytest

from configs import unimiss_plus
from unimiss_jax import validate, writers


class Run:
  def __init__(self):
    self.told, self.ended = [], False

  def define_metric(self, name, step_metric):
    assert (name, step_metric) == ('*', 'step')

  def log(self, values):
    self.told.append(values)

  def finish(self):
    self.ended = True


@pytest.fixture
def wandb(monkeypatch):
  module = types.ModuleType('wandb')
  module.begun = []
  module.init = lambda **given: module.begun.append((given, Run())) or module.begun[-1][1]
  module.Settings = lambda **given: given
  module.Image = lambda x: ('image', x.shape)
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return module


def test_numbers_and_pictures_of_both_lives_go_to_one_run(wandb, tmp_path):
  for first in (0, 3):
    writer = writers.Writer(tmp_path, first, False, 'mine', {'seed': 1})
    writer.write_scalars(first, {'train/loss': np.float32(2), 'train/bad': np.nan}, 'ct')
    writer.write_images(first, {'sheet': np.zeros((4, 5, 3), np.uint8)})
    writer.close()
  (one, first), (two, second) = wandb.begun
  assert one['id'] == two['id'] and one['resume'] == 'allow'
  assert one['project'] == 'mine' and one['config'] == {'seed': 1}
  assert first.told == [{'train/loss/ct': 2., 'step': 0}, {'sheet': ('image', (4, 5, 3)), 'step': 0}]
  assert second.told[0]['step'] == 3 and first.ended and second.ended


def test_a_run_that_cannot_be_begun_there_is_told(wandb, tmp_path, caplog):
  def refuse(**given):
    raise OSError('no network')
  wandb.init = refuse
  writer = writers.Writer(tmp_path, 0, False, 'mine')
  writer.write_scalars(0, {'train/loss': 1.})
  writer.close()
  assert 'no network). FIX: WANDB_MODE=offline' in caplog.text and (tmp_path / 'metrics.jsonl').read_text()


def test_the_package_is_asked_for_before_anything_runs(monkeypatch):
  c = unimiss_plus.get_config('phantom')
  c.log.wandb = 'mine'
  find = validate.importlib.util.find_spec
  monkeypatch.setattr(validate.importlib.util, 'find_spec', lambda name: None if name == 'wandb' else find(name))
  with pytest.raises(validate.ConfigError, match=r'log.wandb="mine" needs the package wandb. FIX: pip install'):
    validate.validate(c)
