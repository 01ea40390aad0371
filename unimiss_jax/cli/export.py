"""Any weights -> a folder for PyTorch users, with proof: python -m unimiss_jax.cli.export --workdir=RUN --out=DIR."""
import contextlib
import json
import logging
import pathlib
import shutil
import sys
import tempfile

from etils import epath

from unimiss_jax.cli.arguments import Parser, fail

FORMATS = ('safetensors', 'pth', 'stablehlo')
PARTS = ('encoder', 'decoder', 'head')
DTYPES = ('float32', 'bfloat16', 'float16')
USAGE = ('python -m unimiss_jax.cli.export (--workdir=RUN | --ckpt=ANY) --out=DIR [--branch=teacher] '
         '[--parts=encoder,decoder,head] [--format=safetensors,pth,stablehlo]')


def main(argv=None) -> int:
  p = Parser(__doc__, USAGE)
  source = p.add_mutually_exclusive_group(required=True)
  source.add_argument('--workdir', help='a run: its newest checkpoint is taken')
  source.add_argument('--ckpt', help='any weights: a run, one checkpoint, an exported folder, .safetensors, .pth')
  p.add_argument('--out', required=True, help='folder to write')
  p.add_argument('--branch', default='student', choices=('student', 'teacher'), help='of a self-distillation')
  p.several('--parts', PARTS, PARTS, help='what to write; what the source lacks is left out with a line')
  p.several('--format', FORMATS, FORMATS[:1], help='safetensors is always written')
  p.add_argument('--dtype', default='float32', choices=DTYPES, help='of the written weights')
  p.several('--allow', (), (), help='parts (decoder, head) or pieces of names that may be missing or surplus; 3D takes '
            'a 2D-only file, 2D a 3D-only one')
  p.add_argument('--in_chans', default='strict', choices=('strict', 'sum', 'repeat'),
                 help='what to do with other input channels than 3 and 1')
  p.add_argument('--name', default='', help='of the model, for the card')
  p.add_argument('--license', default='other', help='of the weights, as hubs spell it')
  p.add_argument('--data_license', default='not stated', help='of the training data, for the card')
  p.add_argument('--debug', action='store_true', help='show the traceback of an error')
  f = p.parse_args(argv)
  logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout, force=True)
  for noisy in ('jax', 'absl', 'orbax'):
    logging.getLogger(noisy).setLevel(logging.ERROR)
  from unimiss_jax.checkpoint import CheckpointError  # late: a usage error should not wait for jax
  from unimiss_jax.porting.errors import PortingError
  try:
    export(f.workdir or f.ckpt, f.out, f.branch, f.parts, f.format, f.dtype, f.allow, f.in_chans, f.name, f.license,
           f.data_license)
  except (CheckpointError, PortingError, OSError) as e:
    if f.debug:
      raise
    return fail(e, 1)
  return 0


def export(source, out, branch='student', parts=PARTS, formats=FORMATS[:1],
           dtype='float32', allow=(), in_chans='strict', name='', license_id='other',
           data_license='not stated') -> dict:
  """Writes the folder `out`; the arguments are the flags above.

  Returns:
    What parity.json holds.

  Raises:
    CheckpointError, PortingError: nothing was written, but parity.json if that was the reason.
  """
  import jax
  import numpy as np

  from unimiss_jax import weights
  from unimiss_jax.porting import parity, to_torch, torch_files
  from unimiss_jax.porting.errors import PortingError
  from unimiss_jax.report import card
  with _needs_torch():
    import torch

    from unimiss_jax.porting import torch_mit
  _own(out)
  logging.info('reading %s', source)
  unasked = [p for p in weights.PARTS if p not in parts]
  found = weights.read(source, branch, [*allow, *unasked], in_chans)
  if found.arch is None:
    raise PortingError(f'{found.source}: the config.json of its run is not there, so heads and sizes are unknown. FIX: '
                       'put the file back, or name the folder of the run')
  tensors = {n: np.asarray(a, jax.dtypes.canonicalize_dtype(dtype)) for n, a in to_torch(found.params).items()
             if weights.part_of(n) in parts}
  have = {weights.part_of(n) for n in tensors}
  if 'encoder' not in have:
    raise PortingError(f'{found.source}: no encoder in what was asked for. FIX: --parts=encoder,...')
  if lacking := [p for p in parts if p not in have]:
    logging.info('not in %s, left out: %s', found.source, ', '.join(lacking))
  model = describe(found, tensors, have)
  logging.info('%d tensors, %.2f M numbers: %s', len(tensors), sum(a.size for a in tensors.values()) / 1e6,
               ', '.join(p for p in weights.PARTS if p in have))
  about = found.about
  if 'config' in about:
    about = {'preprocessing': card.contract(about['config']), 'training': card.training(found)}
  config = {'model_type': 'mit_plus', 'architecture': 'MiT+', 'architectures': ['UniMiSSPlus'], 'torch': model,
            'branch': branch, 'dtype': dtype, 'parameters': sum(a.size for a in tensors.values()), **about}

  logging.info('comparing JAX and PyTorch %s on %s', torch.__version__,
               ', '.join('x'.join(map(str, s)) for s in parity.SIZES if len(s) in model['dimensions']))
  proof = parity.compare(tensors, model)
  text = lambda tree: json.dumps(tree, indent=1) + '\n'
  if not proof['passed']:
    epath.Path(out).mkdir(parents=True, exist_ok=True)
    (epath.Path(out) / 'parity.json').write_text(text(proof))
    raise PortingError(f'JAX and PyTorch differ by {proof["worst_max_rel"]:.1e} of the largest value, the limit is '
                       f'{parity.TOLERANCE:g}: {out}/parity.json says where; no weights were written')
  logging.info('largest difference %.1e of the largest value of a stage (limit %g)', proof['worst_max_rel'],
               parity.TOLERANCE)

  with tempfile.TemporaryDirectory() as folder:
    here = pathlib.Path(folder)
    torch_files.write(here / torch_files.WEIGHTS, tensors)
    if 'pth' in formats:
      torch.save({n: _tensor(torch, a) for n, a in tensors.items()}, here / 'model.pth')
    if 'stablehlo' in formats:
      logging.info('StableHLO')
      with _needs_flatbuffers():
        from unimiss_jax.porting import stablehlo
        for file, blob in stablehlo.export(tensors, model).items():
          (here / file).write_bytes(blob)
    shutil.copy(torch_mit.__file__, here / 'torch_mit.py')
    (here / torch_files.ABOUT).write_text(text(config))
    (here / 'parity.json').write_text(text(proof))
    files = sorted([p.name for p in here.iterdir()] + ['README.md'])
    (here / 'README.md').write_text(
        card.card(name or _name(found, config), config, proof, files, license_id, data_license))
    target = epath.Path(out)
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
      epath.Path(here / file).copy(target / file, overwrite=True)
  logging.info('wrote %s: %s', out, ', '.join(files))
  return proof


def describe(found, tensors, have) -> dict:
  """Keyword arguments of `torch_mit.UniMiSSPlus` for these tensors."""
  arch = {k: list(v) if isinstance(v, tuple) else v for k, v in found.arch.items()}
  arch['pos_interp'] = 'grid'      # 'reference' gives the same at the native sizes and nothing sound at others
  shape = lambda name: tensors[f'head.{name}'].shape
  head = None
  if 'head' in have:
    head = {'in_dim': shape('mlp.0.weight')[1], 'hidden_dim': shape('mlp.0.weight')[0],
            'bottleneck_dim': shape('mlp.4.weight')[0], 'last_layer': 'head.last_layer.weight_v' in tensors}
    if head['last_layer']:
      head['out_dim'] = shape('last_layer.weight_v')[0]
  return {'arch': arch, 'head': head, 'decoder': 'decoder' in have,
          'dimensions': [n for n in (2, 3) if f'backbone.transformer.ConvBlock{n}D0.0.conv.weight' in tensors]}


def _own(out):
  """Raises OSError for a folder that holds something else than an export."""
  folder = epath.Path(out)
  if folder.exists() and any(folder.iterdir()) and not ((folder / 'config.json').exists()
                                                        or (folder / 'parity.json').exists()):
    raise OSError(f'--out={out} is not empty and holds no export. FIX: use another folder')


def _name(found, config) -> str:
  how = config.get('training', {})
  return f'{how["method"]} {how["preset"]}' if how else epath.Path(found.source).stem


def _tensor(torch, array):
  if array.dtype.name == 'bfloat16':
    import numpy as np
    return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
  return torch.tensor(array)


@contextlib.contextmanager
def _needs_torch():
  try:
    yield
  except ImportError as e:
    raise OSError('PyTorch is needed: the weights are proven against it. FIX: pip install torch') from e


@contextlib.contextmanager
def _needs_flatbuffers():
  try:
    yield
  except ImportError as e:
    raise OSError(f'--format=stablehlo needs flatbuffers ({e}). FIX: pip install flatbuffers') from e


if __name__ == '__main__':
  sys.exit(main())
