"""Without any `reference.py` everything works but the preset of that name and tests/parity."""
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMPORT_ALL = '''
import importlib, importlib.util, pkgutil, sys
import main
for package in ('configs', 'unimiss_jax', 'data_pipelines'):
  top = importlib.import_module(package)
  for module in pkgutil.walk_packages(top.__path__, package + '.'):
    twin = module.name.endswith(('.torch_mit', '.torch_mit_pilot', '.torch_resnet', '.torch_vit', '.torch_bert'))
    if not twin or importlib.util.find_spec('torch'):
      importlib.import_module(module.name)
assert not {name for name in sys.modules if name.endswith('.reference')} & {
    'unimiss_jax.drr.reference', 'unimiss_jax.losses.reference', 'unimiss_jax.methods.reference',
    'unimiss_jax.models.reference', 'unimiss_jax.porting.reference', 'data_pipelines.reference'}
'''
BUILD = '''
import jax, numpy as np
from configs import unimiss_plus
from unimiss_jax import optim, sharding, step, validate
from unimiss_jax.methods import base

config = unimiss_plus.get_config(sys.argv[1]).unlock()
config.batch.ct = config.batch.xray = 2
config.model.update(dict(embed_dims=(4, 4, 8, 8, 8, 8), decoder_dims=(8, 8, 8, 4, 4), depths=(1, 1, 1, 1),
                         num_heads=(1, 1, 1, 1), decoder_heads=(1, 1, 1)))
config.head.update(dict(out_dim=32, hidden_dim=16, bottleneck_dim=8))
validate.validate(config)
method = base.make(config, {'ct': (4, {}), 'xray': (4, {})})
tx = optim.adamw(method.groups)
state = jax.eval_shape(step.make_init(config, method, tx), jax.random.key(0))
like = lambda dtype, *shape: jax.ShapeDtypeStruct((2, *shape), dtype)
views = {'ct': {'ct': like('float32', 2, 16, 96, 96, 1), 'drr': like('float32', 2, 96, 96, 3)},
         'xray': {'xray': like('float32', 2, 96, 96, 3)}}
for phase, fields in views.items():
  rows = fields | {'id': like('int32'), 'rng': like('uint32', 2), 'bad': like('bool')}
  f = step.make_step(config, method, tx, phase, sharding.make_mesh(1, 1, jax.devices()[:1]))
  after, metrics = jax.eval_shape(f, state, {phase: rows})
  assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
  assert 'train/dino_loss' in metrics
'''


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
  """The program without its reference.py files."""
  folder = tmp_path_factory.mktemp('tree')
  for name in ('unimiss_jax', 'data_pipelines', 'configs'):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('reference.py', '__pycache__'))
  shutil.copy(ROOT / 'main.py', folder)
  return folder


def python(folder, code, preset='plain'):
  return subprocess.run([sys.executable, '-W', 'error', '-c', code, preset], cwd=folder, capture_output=True, text=True)


def test_everything_else_works_without_it(copy):
  assert {p.parent.name for f in ('unimiss_jax', 'data_pipelines') for p in (ROOT / f).rglob('reference.py')} == {
      'drr', 'losses', 'methods', 'models', 'porting', 'data_pipelines'}
  assert not list(copy.rglob('reference.py'))
  run = python(copy, IMPORT_ALL + BUILD)
  assert run.returncode == 0, run.stderr[-2000:]


def test_the_preset_alone_needs_it(copy):
  code = 'import sys' + BUILD
  run = python(copy, code, 'reference')
  assert run.returncode and "No module named 'unimiss_jax.losses.reference'" in run.stderr, run.stderr[-2000:]
  run = python(ROOT, code, 'reference')
  assert run.returncode == 0, run.stderr[-2000:]
