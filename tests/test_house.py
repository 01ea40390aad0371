"""The rules of the house: who may import whom, how large a file may be, what must never be imported."""
import ast
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = (          # a room may import rooms of its own layer and of those before it
    {'drr', 'views', 'models', 'losses', 'sharding', 'optim'},
    {'porting', 'methods'},
    {'state', 'checkpoint', 'writers', 'health', 'autopsy', 'evals', 'report', 'step', 'validate', 'workdir',
     'progress', 'watchdog', 'lifeline', 'processes', 'mirror', 'init_from', 'observer', 'weights', 'best',
     'final_test', 'preflight', 'probe_first', 'boundary'},
    {'train'},
    {'cli', 'main'},
)
NEVER_AT_MODULE_LEVEL = {'torch', 'tensorflow', 'pydicom', 'jinja2', 'matplotlib', 'tokenizers', 'wandb', 'isal',
                         'apache_beam'}
OF_DATA = {'numpy', 'scipy', 'grain', 'nibabel', 'PIL', 'array_record', 'tensorflow_datasets', 'etils', 'fsspec',
           'unimiss_jax', 'data_pipelines'} | set(sys.stdlib_module_names)


def files(*folders):
  return [p for f in folders for p in sorted((ROOT / f).rglob('*.py'))]


def imports(path, module_level_only=False):
  """Full names of imported modules."""
  tree = ast.parse(path.read_text())
  nodes = tree.body if module_level_only else ast.walk(tree)
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f'{node.module}.{a.name}' for a in node.names)


def room(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return parts[1] if parts[0] == 'unimiss_jax' else 'main' if parts[0] == 'main' else None


def layer(name):
  return next((i for i, rooms in enumerate(LAYERS) if name in rooms), None)


def test_lower_rooms_never_import_upper_ones():
  for path in [*files('unimiss_jax'), ROOT / 'main.py']:
    mine = room(path)
    if mine == '__init__':
      continue
    assert layer(mine) is not None, f'{path}: room {mine} has no layer'
    for name in imports(path):
      parts = name.split('.')
      if parts[0] == 'unimiss_jax' and len(parts) > 1 and layer(parts[1]) is not None:
        assert layer(parts[1]) <= layer(mine), f'{path} imports {name}'
      assert parts[0] != 'data_pipelines' or mine in ('train', 'cli', 'main'), f'{path} imports {name}'


def test_the_data_path_stays_light():
  for path in files('data_pipelines'):
    for name in imports(path, module_level_only=True):
      parts = name.split('.')
      assert parts[0] in OF_DATA, f'{path} imports {name}'
      assert parts[0] != 'unimiss_jax' or len(parts) == 1 or parts[1] in ('drr', 'views'), f'{path} imports {name}'
      assert parts[0] != 'grain' or path.name == 'streams.py', f'{path} imports grain'


def test_optional_packages_are_imported_late():
  for path in files('unimiss_jax', 'data_pipelines'):
    if path.name not in ('torch_mit.py', 'torch_mit_pilot.py', 'torch_resnet.py', 'torch_vit.py', 'torch_bert.py'):
      found = {n.split('.')[0] for n in imports(path, module_level_only=True)} & NEVER_AT_MODULE_LEVEL
      assert not found, f'{path} imports {found} at module level'


def test_files_are_of_readable_size():
  for path in [*files('unimiss_jax', 'data_pipelines', 'configs', 'benchmarks'), ROOT / 'main.py']:
    lines = len(path.read_text().splitlines())
    assert lines <= (80 if path.name == 'main.py' else 420), f'{path}: {lines} lines, is a room missing?'
    assert path.stem not in ('utils', 'helpers', 'misc'), path


def test_the_loop_knows_no_method():
  text = (ROOT / 'unimiss_jax' / 'train.py').read_text()
  for path in files('unimiss_jax/methods'):
    if path.stem not in ('__init__', 'base', 'alternation', 'reference'):
      assert not re.search(rf'\b{path.stem}\b', text), path.stem


def test_the_host_maths_does_not_load_jax():
  code = ('import sys; import unimiss_jax.drr, unimiss_jax.views.volume, unimiss_jax.views.image, '
          'data_pipelines.draw, data_pipelines.sample, data_pipelines.sources, data_pipelines.nifti; '
          'bad = {"jax", "flax", "torch", "tensorflow", "grain"} & set(sys.modules); sys.exit(str(bad) if bad else 0)')
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_old_interfaces_are_not_used():
  for path in [*files('unimiss_jax', 'data_pipelines'), ROOT / 'main.py']:
    text = path.read_text()
    for old in ('jax.pmap', 'experimental.pjit', 'experimental.shard_map', 'with mesh:'):
      assert old not in text, f'{path}: {old}'
