"""What is kept of a step that is not finite, by one process and by several."""
import jax
import numpy as np
import pytest

from unimiss_jax import autopsy

PARAMS = {'head': {'bias': np.zeros(2)}}
METRICS = {'train/nce_loss': np.nan, 'train/dino_loss': 1., 'train/bad_tensors': 1, 'train/bad_tensor': 0}


def batch(first):
  x = np.ones((3, 2, 4, 4, 1))
  x[1, 0, 2, 2] = np.nan
  return {'xray': {'xray': x, 'id': np.arange(first, first + 3)}}


@pytest.fixture
def process(monkeypatch):
  """(index, count) -> this process is that one from now on."""
  def be(index, count):
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    monkeypatch.setattr(jax, 'process_count', lambda: count)
  return be


def test_every_process_keeps_its_own_rows(process, tmp_path):
  for index in (0, 1):
    process(index, 2)
    told = autopsy.report(tmp_path, 7, batch(10 * index), PARAMS, METRICS)
    assert told == ('not finite: nce_loss; 1 of 1 gradients are not, one is that of head/bias; xray: records that are '
                    f'not finite themselves {10 * index + 1}; batch in nan/7_host_{index}.npz')
  assert sorted(f.name for f in (tmp_path / 'nan').iterdir()) == ['7_host_0.npz', '7_host_1.npz']
  with np.load(tmp_path / 'nan' / '7_host_1.npz') as kept:
    assert list(kept['xray/id']) == [10, 11, 12] and np.isnan(kept['xray/xray'][1, 0, 2, 2]).all()


def test_a_process_keeps_so_many_batches_whatever_the_others_kept(process, tmp_path):
  process(0, 2)
  for step in range(autopsy.KEPT + 1):
    last = autopsy.report(tmp_path, step, batch(0), PARAMS, METRICS)
  assert 'batch in' not in last and len(list((tmp_path / 'nan').iterdir())) == autopsy.KEPT
  process(1, 2)
  assert autopsy.report(tmp_path, 3, batch(0), PARAMS, METRICS).endswith('batch in nan/3_host_1.npz')
  process(0, 1)
  assert autopsy.report(tmp_path / 'nan', 3, batch(0), PARAMS, METRICS).endswith('batch in nan/3.npz')
