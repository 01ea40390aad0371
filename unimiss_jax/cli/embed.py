"""Scans and radiographs -> one embedding each: python -m unimiss_jax.cli.embed --ckpt=ANY --data=DIR --out=FILE.npz.

Inputs are prepared as the weights were trained. A volume is shown as boxes that cover all of it; its embedding is the
mean over those that hold a body. A file that cannot be used costs its own row, which says why.
"""
import json
import logging
import sys
from functools import cache, partial

import numpy as np

from data_pipelines import files, judgement
from data_pipelines import sequences as together
from data_pipelines.command import Parser, fail
from data_pipelines.errors import DataError
from unimiss_jax.cli import arguments, towers
from unimiss_jax.cli.embed_table import SUFFIXES, Table

SHOWN = 3      # warnings of one code; all are in the table
USAGE = ('python -m unimiss_jax.cli.embed --ckpt=ANY --data=DIR|LIST --out=FILE.npz|FILE.csv [--per_tile] '
         '[--branch=teacher] [--batch=N] [--workers=N] [--modality=ct|mr|other] [--frame=N|all]')


def main(argv=None) -> int:
  p = Parser(__doc__, USAGE)
  p.add_argument('--ckpt', required=True, help='any weights: a run, one checkpoint, an exported folder, .safetensors, '
                 '.pth')
  p.add_argument('--data', required=True, help='folder, glob pattern, CSV, datalist, manifest, BIDS, prepared folder')
  p.add_argument('--out', required=True, help='.npz or .csv to write')
  p.add_argument('--per_tile', action='store_true', help='a row for each tile of a volume')
  p.add_argument('--batch', type=int, default=8, help='tiles or images that the network is given at a time')
  p.add_argument('--workers', type=int, default=2, help='files that are in memory at a time, the one that is embedded '
                 'among them; more read small files faster')
  p.add_argument('--modality', default='', choices=('', *judgement.MODALITIES), help='of volumes; ct refuses values '
                 'that are no HU and leaves out tiles of air; as trained')
  p.add_argument('--sequences', default=None, help=together.FLAG + '; as trained')
  p.add_argument('--frame', type=_frame, default=None, help='of 4-D NIfTI files: a number, or all = a row for each')
  p.add_argument('--spacing', type=_spacing, default=None, help='z,y,x in mm to resample volumes to, where the data of '
                 'training were prepared with such; 0 = as in the file')
  p.add_argument('--tile', type=int, default=None, help='slices of a record, where the training data were prepared '
                 'with another --tile')
  arguments.add_weights(p)
  p.add_argument('--debug', action='store_true', help='show the traceback of an error')
  f = p.parse_args(argv)
  if not f.out.endswith(SUFFIXES):
    p.error(f'--out={f.out}: a name that ends in {" or ".join(SUFFIXES)}')
  if min(f.batch, f.workers) < 1:
    p.error(f'--batch={f.batch}, --workers={f.workers}: 1 or more')

  def work():
    table = embed(f.ckpt, f.data, f.out, per_tile=f.per_tile, branch=f.branch, batch=f.batch, workers=f.workers,
                  modality=f.modality, sequences=f.sequences, frame=f.frame, spacing_mm=f.spacing, tile=f.tile,
                  allow=f.allow, in_chans=f.in_chans, arch=f.arch)
    logging.info(table.summary())
    return 0 if table.count('ok') else 1
  try:
    return arguments.run(work, f.debug)
  except KeyboardInterrupt:
    return fail('interrupted; nothing was written', 130)


def _frame(text: str):
  if text != 'all' and int(text) < 0:
    raise ValueError(text)
  return text if text == 'all' else int(text)


def _spacing(text: str) -> tuple:
  z, y, x = map(float, text.split(','))
  return z, y, x


def embed(ckpt, data, out, *, per_tile=False, branch='', batch=8, workers=2, modality='', sequences=None, frame=None,
          spacing_mm=None, tile=None, allow=(), in_chans='strict', arch=None) -> Table:
  """Writes the embeddings of all samples of `data`; the arguments are the flags above.

  Returns:
    The table; it was written if a row of it is 'ok'.

  Raises:
    CheckpointError, PortingError: the weights cannot be used. DataError: there is nothing to read. OSError: `out`
    cannot be written.
  """
  from data_pipelines import inference
  from unimiss_jax import weights
  files.single_threaded_blas()
  found = weights.read(ckpt, branch, ['decoder', 'head', *allow], in_chans, arch)
  network, about = _network(found, batch)
  how, ends = _how(found, about, modality, sequences, None if frame == 'all' else frame, spacing_mm, tile)
  samples, lines = inference.listed(data, frame == 'all', ends)
  for line in lines:
    files.say(line)
  widths = {network.widths[s.kind] for s in samples if s.kind in network.widths} or set(network.widths.values())
  if len(widths) > 1:
    raise DataError('WIDTH', str(data), f'embeddings of images have {network.widths["image"]} numbers and those of '
                    f'volumes {network.widths["volume"]} with these weights', 'embed images and volumes each by itself')
  table = Table(out, widths.pop(), per_tile, about)
  progress, told = files.Progress('embed', len(samples)), {}

  def tell(line):
    progress.end()      # so that no line is written over another
    files.say(line)

  for sample, seen in inference.ahead(samples, how, workers):
    done, row = len(table.rows), table.add(sample)
    if isinstance(seen, DataError):
      row.fail(seen)
      tell(f'ERROR {seen}')
    else:
      row.warnings = seen.warnings
      for line in seen.warnings:
        code = line.split()[1]
        told[code] = told.get(code, 0) + 1
        if told[code] <= SHOWN:
          tell(line)
      for k, box in enumerate(seen.boxes):
        network.give(seen.view(k), partial(row.take, box))
        progress.reach(done + k / len(seen.boxes))
    progress.reach(done + 1)
    del seen      # its voxels, before those of the next file come
  network.end()
  progress.end()
  if table.count('ok'):
    table.write()
  return table


def _network(found, batch: int):
  """-> the encoder, and what the table says of it."""
  from unimiss_jax import weights
  from unimiss_jax.porting import arch as architectures
  from unimiss_jax.porting.errors import PortingError
  from unimiss_jax.report import card
  if not found.arch:
    raise PortingError(f'{found.source}: the config.json of its run is not there, so heads and sizes are unknown. FIX: '
                       'put the file back, or name the folder of the run')
  fields = architectures.fields(found.arch)
  arguments.tell_assumed(found, fields)
  views, recorded = card.views(found)
  if not recorded:
    logging.warning('%s does not record its preprocessing: assuming that of preset plain, %s', found.source,
                    json.dumps(views))
  module = architectures.model(found.arch)
  inputs = {kind: (tuple(v['size']), module.in_channels[1]) if kind == 'volume' else ((v['size'],) * 2, 3)
            for kind, v in views.items()}
  for kind, (size, channels) in inputs.items():
    try:
      module.check(size, channels)
    except ValueError as e:
      raise PortingError(f'{found.source}, {kind}s: {e}. FIX: of a file with other channels, --in_chans=sum or '
                         '--in_chans=repeat') from e
  encoder = {n: x for n, x in found.params['backbone'].items() if architectures.in_encoder((n,))}
  used = {'backbone': encoder} | {part: found.params[part] for part in ('batch_stats', *('slice', 'inter') * bool(
      found.inter)) if part in found.params}
  about = {'checkpoint': found.source, 'branch': found.branch, 'arch': fields,
           'weights_hash': weights.digest(used), 'views': views, 'recorded': recorded}
  slices = towers.slices_of(found)
  return Network(module, used, batch, slices, found.inter), about | ({'slices': slices} if slices else {})


def _how(found, about, modality, sequences, frame, spacing_mm, tile):
  """What inference.py needs, from the checkpoint where the flags do not say otherwise; noted in `about`."""
  from ml_collections import ConfigDict

  from data_pipelines import inference, tiles
  volume, image = (ConfigDict(about['views'][kind]) if kind in about['views'] else None for kind in ('volume', 'image'))
  cut = volume.get('tile', tiles.TILE) if volume else tiles.TILE      # exported before it was recorded: the only one
  used = {'modality': modality or (volume.modality if volume else 'ct'),
          'spacing_mm': spacing_mm or tuple(volume.spacing_mm if volume else (0., 0., 0.)),
          'tile': cut if tile is None else tile, 'frame': frame, 'channels': about['arch']['in_channels'][1]}
  ends = together.parse((volume.sequences if volume else '') if sequences is None else sequences)
  about |= used | {'sequences': ends}
  known = [text for text, there in (('volumes', volume), ('images', image)) if there]
  logging.info('%s%s: encoder of %s', found.source, f' ({found.branch})' * bool(found.branch), ' and '.join(known))
  return inference.How(volume, image and ConfigDict({'views': {'xray': image}, 'task': image}), **used), ends


@cache
def _forward(module, slices: int, inter):
  import jax

  from unimiss_jax import models
  from unimiss_jax.models import slicewise
  from unimiss_jax.models.vit import with_slices

  def run(params, x):
    if inter and x.ndim == 5:      # in as many parts as there are volumes, for the memory
      return slicewise.embed(module, inter, params, x, len(x)).embedding
    if slices and x.ndim == 5:
      return with_slices(module, params['backbone'], x, slices).cls
    return models.encode(module, params['backbone'], params.get('batch_stats', {}), x)[0].embedding
  return jax.jit(run)


class Network:
  """The encoder, in batches of one static size for each kind of input.

  Args:
    module: the backbone.
    params: {'backbone': encoder, 'batch_stats', 'slice', 'inter': where there are such}.
    batch: rows.
    slices: of a volume, those that the class token looks at most, which enter as images, too (UniMedI).
    inter: fields of the Transformer through which the slices of a volume go (Joint), or {}.

  Attributes:
    widths: {'image', 'volume': numbers of an embedding}.
  """

  def __init__(self, module, params, batch: int, slices: int = 0, inter=()):
    import jax
    import jax.numpy as jnp

    from unimiss_jax.porting import arch as architectures
    self._batch = batch
    self.widths = {'image': module.embed_dims[-1], 'volume': inter['width'] if inter else module.embed_dims[-1]}
    self._params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    self._forward = _forward(module, slices, architectures.inter_encoder(inter) if inter else None)
    self._waiting = {}      # shape of an input -> [(input, who takes its embedding)]
    self._running = None    # (embeddings that the device is computing, who takes them)

  def give(self, x: np.ndarray, take) -> None:
    """Has `take(embedding [E] float32)` called for an input, sooner or later, in the order of inputs of its shape."""
    waiting = self._waiting.setdefault(x.shape, [])
    waiting.append((x, take))
    if len(waiting) == self._batch:
      self._run(self._waiting.pop(x.shape))

  def end(self) -> None:
    """Embeds what still waits."""
    for waiting in self._waiting.values():
      self._run(waiting)
    self._waiting = {}
    self._deliver()

  def _run(self, waiting) -> None:
    rows = [x for x, _ in waiting]
    rows += rows[-1:] * (self._batch - len(rows))
    started = self._forward(self._params, np.stack(rows)), [take for _, take in waiting]
    self._deliver()      # of the batch before: views are cut while the device computes
    self._running = started

  def _deliver(self) -> None:
    if self._running:
      for embedding, take in zip(np.asarray(self._running[0]), self._running[1]):
        take(embedding)
    self._running = None


if __name__ == '__main__':
  sys.exit(main())
