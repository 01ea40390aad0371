"""Save, restore, keep, and what happens to a damaged checkpoint."""
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax import checkpoint, sharding

# checkpoint.quiet() spares users this: TensorStore's futures of a torn file sometimes outlive Orbax's event loop.
pytestmark = pytest.mark.filterwarnings(
    'ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning')


def state(value):
  return {'kernel': jnp.full((4, 512), value, jnp.float32), 'step': jnp.int32(value)}


@pytest.fixture
def template():
  mesh = sharding.make_mesh(-1, 1)
  abstract = jax.eval_shape(lambda: state(0))
  return checkpoint.template(abstract, sharding.shardings(abstract, mesh))


@pytest.fixture
def saved(tmp_path):
  c = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=2)
  for i in (1, 2, 3):
    c.save(i, state(i), {'positions': {'ct': 8 * i}, 'config_hash': 'x'})
  c.close()
  return tmp_path


def damage(folder, step):
  for f in (folder / 'checkpoints' / str(step) / 'state').rglob('*'):
    if f.is_file():
      f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])


def test_newest_comes_back_and_old_ones_go(saved, template):
  c = checkpoint.Checkpoints(saved / 'checkpoints', keep=2)
  assert c.steps() == [2, 3]
  got, meta = c.restore(template)
  np.testing.assert_array_equal(got['kernel'], 3.)
  assert int(got['step']) == 3 and meta['positions'] == {'ct': 24}
  c.close()


def test_damage_falls_back_with_one_warning_and_deletes_nothing(saved, template, caplog):
  damage(saved, 3)
  c = checkpoint.Checkpoints(saved / 'checkpoints', keep=2)
  with caplog.at_level(logging.WARNING, logger='root'):
    got, meta = c.restore(template)
  assert int(got['step']) == 2 and meta['positions'] == {'ct': 16}
  lines = [r.getMessage() for r in caplog.records if 'unreadable' in r.getMessage()]
  assert len(lines) == 1 and 'checkpoint 3' in lines[0] and 'continuing from 2' in lines[0]
  assert (saved / 'damaged' / '3-0' / 'state').is_dir()
  c.save(3, state(7), {'positions': {'ct': 24}, 'config_hash': 'x'})      # the step can be saved again
  c.close()
  again = checkpoint.Checkpoints(saved / 'checkpoints', keep=2)
  assert int(again.restore(template)[0]['step']) == 7
  again.close()


def test_strict_refuses_and_nothing_readable_is_an_error(saved, template):
  damage(saved, 3)
  c = checkpoint.Checkpoints(saved / 'checkpoints', keep=2)
  with pytest.raises(checkpoint.CheckpointError, match=r'checkpoints/3 unreadable .* FIX: --resume=auto'):
    c.restore(template, strict=True)
  damage(saved, 2)
  with pytest.raises(checkpoint.CheckpointError, match='checkpoints/2 unreadable'):
    c.restore(template)
  c.close()


def test_another_model_is_refused_and_nothing_is_moved(saved):
  abstract = jax.eval_shape(lambda: {'kernel': jnp.zeros((4, 256)), 'step': jnp.int32(0)})
  other = checkpoint.template(abstract, sharding.shardings(abstract, sharding.make_mesh(-1, 1)))
  c = checkpoint.Checkpoints(saved / 'checkpoints', keep=2)
  with pytest.raises(checkpoint.CheckpointError, match='holds tensors of other names or shapes .* FIX'):
    c.restore(other)
  assert c.steps() == [2, 3]
  c.close()


def test_an_empty_folder_gives_none(tmp_path, template):
  c = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=2)
  assert c.restore(template) is None
  c.close()


def half(folder):
  """What a machine that dies while it writes can leave of a checkpoint that already has its name."""
  for f in list((folder / 'state').rglob('*')):
    if f.is_file() and f.name != '_METADATA':
      f.unlink()


@pytest.mark.parametrize('break_it, reason', [
    (half, 'checkpoint 3 unreadable'),
    (lambda folder: shutil.rmtree(folder / 'state'), 'checkpoint 3 unreadable'),
    (lambda folder: shutil.rmtree(folder / 'meta'), r'checkpoint 3 unreadable \(FileNotFoundError'),
    (lambda folder: (folder / 'meta' / 'metadata').write_text('{"positions"'), r'checkpoint 3 unreadable \(JSONDecode'),
    (lambda folder: (folder / 'meta' / 'metadata').write_text('{"positions": {}}'), r'meta lacks config_hash, shapes'),
])
def test_every_kind_of_damage_falls_back(saved, template, caplog, break_it, reason):
  break_it(saved / 'checkpoints' / '3')
  c = checkpoint.Checkpoints(saved / 'checkpoints', keep=2)
  with caplog.at_level(logging.WARNING, logger='root'):
    assert int(c.restore(template)[0]['step']) == 2
  c.close()
  lines = [r.getMessage() for r in caplog.records if 'unreadable' in r.getMessage()]
  assert len(lines) == 1 and re.search(reason, lines[0]) and (saved / 'damaged' / '3-0').is_dir()


def test_a_save_that_never_ended_is_passed_over(saved, template):
  shutil.copytree(saved / 'checkpoints' / '3', saved / 'checkpoints' / '4.orbax-checkpoint-tmp')
  c = checkpoint.Checkpoints(saved / 'checkpoints', keep=2)
  assert int(c.restore(template)[0]['step']) == 3
  c.save(4, state(4), {})
  c.close()
  assert c.steps() == [3, 4]


def test_a_checkpoint_of_another_run_is_refused_and_left_alone(saved, template):
  c = checkpoint.Checkpoints(saved / 'checkpoints', keep=2)
  with pytest.raises(checkpoint.CheckpointError, match='checkpoints/3 was written by aliens'):
    c.restore(template, accept=lambda meta: 'was written by aliens' if meta['positions'] == {'ct': 24} else None)
  assert c.steps() == [2, 3]
  c.close()


def test_the_next_step_does_not_reach_into_a_save_under_way(tmp_path):
  """The step donates its state; what is being written is a copy."""
  mesh = sharding.make_mesh(-1, 1)
  big = jax.device_put({'kernel': jnp.ones((512, 4096))}, sharding.replicated(mesh))
  c = checkpoint.Checkpoints(tmp_path, keep=1)
  c.save(1, big, {})
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  for _ in range(3):
    big = step(big)
  c.close()
  np.testing.assert_array_equal(checkpoint._read(tmp_path / '1' / 'state', jax.eval_shape(lambda: big))['kernel'], 1.)


def test_newest_and_trained_tensors_of_a_run(tmp_path):
  c = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=2)
  for i in (2, 10):
    c.save(i, {'params': {'backbone': {'kernel': jnp.full((3,), float(i))}}, 'extra': {'center': jnp.zeros(5)}}, {})
  c.close()
  for path in (tmp_path, tmp_path / 'checkpoints', tmp_path / 'checkpoints' / '10'):
    assert checkpoint.newest(path).name == '10'
  assert checkpoint.newest(tmp_path / 'nowhere') is None
  got = checkpoint.read_params(checkpoint.newest(tmp_path))
  assert list(got) == ['backbone/kernel']
  np.testing.assert_array_equal(got['backbone/kernel'], 10.)
