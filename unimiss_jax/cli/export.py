"""Any weights -> a folder for PyTorch users, with proof: python -m unimiss_jax.cli.export --workdir=RUN --out=DIR."""
import contextlib
import json
import logging
import pathlib
import shutil
import sys
import tempfile

from etils import epath

from data_pipelines.command import Parser
from unimiss_jax.cli import arguments, towers

FORMATS = ('safetensors', 'pth', 'stablehlo')
PARTS = ('encoder', 'decoder', 'head', 'inter')      # the last: of Joint, what makes volumes of slices
DTYPES = ('float32', 'bfloat16', 'float16')
EXPORTED = ('config.json', 'README.md', 'model.pth', 'model.safetensors', 'parity.json', 'torch_mit.py',
            'torch_mit_pilot.py', 'torch_resnet.py', 'torch_vit.py', 'forward_2d.stablehlo', 'forward_3d.stablehlo',
            *towers.FILES)
USAGE = ('python -m unimiss_jax.cli.export (--workdir=RUN | --ckpt=ANY) --out=DIR [--branch=teacher] '
         '[--parts=encoder,decoder,head,inter] [--format=safetensors,pth,stablehlo]')


def main(argv=None) -> int:
  p = Parser(__doc__, USAGE)
  source = p.add_mutually_exclusive_group(required=True)
  source.add_argument('--workdir', help='a run: its newest checkpoint is taken')
  source.add_argument('--ckpt', help='any weights: a run, one checkpoint, an exported folder, .safetensors, .pth')
  p.add_argument('--out', required=True, help='folder to write')
  p.several('--parts', PARTS, PARTS, help='what to write; what the source lacks is left out with a line')
  p.several('--format', FORMATS, FORMATS[:1], help='safetensors is always written')
  p.add_argument('--dtype', default='float32', choices=DTYPES, help='of the written weights')
  arguments.add_weights(p)
  p.add_argument('--name', default='', help='of the model, for the card')
  p.add_argument('--license', default='other', help='of the weights, as hubs spell it')
  p.add_argument('--data_license', default='not stated', help='of the training data, for the card')
  p.add_argument('--debug', action='store_true', help='show the traceback of an error')
  f = p.parse_args(argv)

  def work():
    export(f.workdir or f.ckpt, f.out, branch=f.branch, parts=f.parts, formats=f.format, dtype=f.dtype, allow=f.allow,
           in_chans=f.in_chans, arch=f.arch, name=f.name, license_id=f.license, data_license=f.data_license)
  return arguments.run(work, f.debug)


def export(source, out, *, branch='', parts=PARTS, formats=FORMATS[:1], dtype='float32', allow=(), in_chans='strict',
           arch=None, name='', license_id='other', data_license='not stated') -> dict:
  """Writes the folder `out`; the arguments are the flags above.

  Returns:
    What parity.json holds.

  Raises:
    CheckpointError, PortingError, OSError: no weights were written.
  """
  import jax
  import numpy as np

  from unimiss_jax import weights
  from unimiss_jax.porting import arch as architectures
  from unimiss_jax.porting import convert, parity, to_torch, torch_files
  from unimiss_jax.porting.errors import PortingError
  from unimiss_jax.report import card
  with _needed('PyTorch, against which the weights are proven', 'torch'):
    import torch
  target = epath.Path(out)
  _refuse_foreign(target)
  logging.info('reading %s', source)
  found = weights.read(source, branch, [*allow, *(p for p in PARTS if p not in parts)], in_chans, arch)
  text = towers.of(found)
  of_vision = {part: tree for part, tree in found.params.items() if part in convert.TREES}
  cast = lambda a: np.asarray(a, jax.dtypes.canonicalize_dtype(dtype))
  tensors = {n: cast(a) for n, a in to_torch(of_vision).items() if weights.part_of(n) in parts}
  written = [p for p in PARTS if any(weights.part_of(n) == p for n in tensors)]
  if 'encoder' not in written:
    raise PortingError(f'{found.source}: no encoder in what was asked for. FIX: --parts=encoder,...')
  _refuse_inter(found, written)
  expected = parts if tuple(parts) != PARTS or 'batch_stats' in found.params else [p for p in PARTS if p != 'inter']
  if lacking := [p for p in expected if p not in written]:
    logging.info('not in %s, left out: %s', found.source, ', '.join(lacking))
  if not found.arch:
    raise PortingError(f'{found.source}: the config.json of its run is not there, so heads and sizes are unknown. FIX: '
                       'put the file back, or name the folder of the run')
  if not found.recorded and architectures.twin(found.arch).file == 'torch_vit':
    raise PortingError(f'{found.source}: does not record its heads, and parity cannot tell them. FIX: give '
                       '--arch=\'{"num_heads": [12]}\'')
  model = describe(found, tensors, written)
  convert.check({k: v for k, v in convert.from_tensors(tensors).items() if v}, found.arch, model['dimensions'],
                model.get('inter'))
  arguments.tell_assumed(found, model['arch'])
  logging.info('%d tensors, %.2f M numbers: %s', len(tensors), sum(a.size for a in tensors.values()) / 1e6,
               ', '.join(written))
  about = found.about
  if 'config' in found.about:
    about = {'preprocessing': card.contract(about['config']), 'training': card.training(found)}
  twin = architectures.twin(found.arch)
  config = {'model_type': twin.model_type, 'architecture': twin.architecture, 'architectures': [twin.network],
            'torch': model, 'recorded': found.recorded, 'branch': found.branch, 'dtype': dtype,
            'parameters': sum(a.size for a in tensors.values()), **about}
  if text:
    text = text._replace(params=jax.tree.map(cast, text.params), projections=jax.tree.map(cast, text.projections))
    config['studies'] = text.about

  with tempfile.TemporaryDirectory() as folder:
    here = pathlib.Path(folder)
    written_out = lambda tree: json.dumps(tree, indent=1) + '\n'
    logging.info('comparing JAX and PyTorch %s on %s', torch.__version__,
                 ', '.join('x'.join(map(str, s)) for s in parity.sizes(model) if len(s) in model['dimensions']))
    proof = parity.compare(tensors, model)
    if text:
      proof = parity.joined(proof, towers.compare(text, tensors, model))
    if 'stablehlo' in formats:
      logging.info('StableHLO')
      with _needed('flatbuffers, for --format=stablehlo', 'flatbuffers'):
        from unimiss_jax.porting import stablehlo
        proof = stablehlo.export(here, tensors, model, proof)
    if not proof['passed']:
      if not target.exists():
        target.mkdir(parents=True)
        (target / 'parity.json').write_text(written_out(proof))
      worst = ', '.join(f'{stage} of {size} {proof["inputs"][size][stage]["max_rel"]:.1e}'
                        for size, stage in proof['worst'].items())
      raise PortingError(f'JAX and PyTorch differ by more than {parity.TOLERANCE:g} of the largest value of a stage '
                         f'({worst}); no weights were written')
    logging.info('largest difference %.1e of the largest value of a stage (limit %g)', proof['worst_max_rel'],
                 parity.TOLERANCE)
    torch_files.write(here / torch_files.WEIGHTS, tensors, model)
    if 'pth' in formats:
      torch.save({n: _tensor(torch, a) for n, a in tensors.items()}, here / 'model.pth')
    if text:
      towers.write(here, text)
    file = f'{twin.file}.py'
    shutil.copy(pathlib.Path(architectures.__file__).with_name(file), here / file)
    config['sha'] = torch_files.sha(here / torch_files.WEIGHTS)
    (here / torch_files.ABOUT).write_text(written_out(config))
    (here / 'parity.json').write_text(written_out(proof))
    files = sorted([p.relative_to(here).as_posix() for p in here.rglob('*') if p.is_file()] + ['README.md'])
    told = card.card(name or _name(found, config), config, proof, files, license_id, data_license)
    (here / 'README.md').write_text(towers.card(told, text) if text else told)
    for folder in {(target / file).parent for file in files}:
      folder.mkdir(parents=True, exist_ok=True)
    for file in EXPORTED:      # nothing of an earlier export stays; config.json goes first and comes last
      (target / file).unlink(missing_ok=True)
    for file in sorted(files, key=lambda f: f == torch_files.ABOUT):
      epath.Path(here / file).copy(target / file, overwrite=True)
  logging.info('wrote %s: %s', out, ', '.join(files))
  return proof


def describe(found, tensors, parts) -> dict:
  """Keyword arguments of the PyTorch network for these tensors. Raises PortingError for a head that sees nothing."""
  from unimiss_jax.porting.arch import fields, model
  from unimiss_jax.porting.errors import PortingError
  if 'head' in parts and 'decoder' not in parts and model(found.arch).embeds_in_decoder:
    raise PortingError(f'{found.source}: its head reads the class token of the decoder. FIX: --parts=encoder, or with '
                       'decoder and head')
  arch = fields(found.arch)
  if 'pos_interp' in arch:
    arch['pos_interp'] = 'grid'      # 'reference' is the same at the native sizes only
  shape = lambda name: tensors[f'head.{name}'].shape
  head = None
  if 'head' in parts:
    head = {'in_dim': shape('mlp.0.weight')[1], 'hidden_dim': shape('mlp.0.weight')[0],
            'bottleneck_dim': shape('mlp.4.weight')[0], 'last_layer': 'head.last_layer.weight_v' in tensors}
    if head['last_layer']:
      head['out_dim'] = shape('last_layer.weight_v')[0]
  slicewise = {'inter': {k: list(v) if isinstance(v, tuple) else v for k, v in found.inter.items()}}
  dimensions = [n for n in found.dimensions if n == 2 or not found.inter or 'inter' in parts]
  return {'arch': arch, 'head': head, 'decoder': 'decoder' in parts, 'dimensions': dimensions} | (
      slicewise if 'inter' in parts else {})


def _refuse_inter(found, parts) -> None:
  """Raises PortingError for a Transformer over slices that no PyTorch file holds."""
  from unimiss_jax.porting.arch import twin
  from unimiss_jax.porting.errors import PortingError
  if 'inter' not in parts:
    return
  known = twin(found.arch)
  why = (f'stands on the 2-D branch of a {known.architecture}, and {known.file}.py does not hold it'
         if known.file != 'torch_resnet' else
         'attends along features, as the released code' if found.inter['axis'] != 'slice' else
         'samples as the released code' if found.inter['sampler'] != 'interp' and found.inter['kind'] == 'dat' else '')
  if why:
    raise PortingError(f'{found.source}: its Transformer over slices {why}. FIX: --parts=encoder,head writes what it '
                       'has for images; unimiss_jax.cli.embed embeds volumes with the run itself')


def _refuse_foreign(folder):
  """Raises OSError for a folder that holds something else than an export."""
  names = {p.name for p in folder.iterdir()} if folder.exists() else set()
  if other := sorted(names - {*(n.partition('/')[0] for n in EXPORTED), '__pycache__'}):
    raise OSError(f'--out={folder} holds other things than an export ({", ".join(other[:3])}). FIX: use another folder')


def _name(found, config) -> str:
  how = config.get('training', {})
  return f'{how["method"]} {how["preset"]}' if how else epath.Path(found.source).stem


def _tensor(torch, array):
  if array.dtype.name == 'bfloat16':
    import numpy as np
    return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
  return torch.tensor(array)


@contextlib.contextmanager
def _needed(what: str, package: str):
  try:
    yield
  except ImportError as e:
    raise OSError(f'{what} is not installed ({e}). FIX: pip install {package}') from e


if __name__ == '__main__':
  sys.exit(main())
