"""What UniMedI has beside its backbone: the text tower and the projections into the common space. Of a run or of an
exported folder; written for PyTorch users with the proof that the numbers are the same.
"""
from __future__ import annotations

import json
import pathlib
import shutil
from typing import NamedTuple

import numpy as np
from etils import epath

PROJECTIONS = 'projections.safetensors'
TOKENIZER = 'tokenizer_config.json'
FILES = ('text/config.json', 'text/vocab.txt', 'text/model.safetensors', f'text/{TOKENIZER}', PROJECTIONS,
         'torch_bert.py')
LINEAR = ('vision_proj', 'text_proj')
WHAT = {'torch_bert.py': 'the text tower in PyTorch, one file',
        PROJECTIONS: 'vision_proj.weight and text_proj.weight, into the space that images and reports share',
        'text/model.safetensors': 'the text tower, under the names of every PyTorch BERT',
        'text/config.json': 'its fields', 'text/vocab.txt': 'its word pieces',
        f'text/{TOKENIZER}': 'whether reports are lower-cased, and how long they are'}
USE = '''## Text tower

Images and reports meet behind two linear layers; compare them by the cosine.

```python
import torch_bert
text = torch_bert.Bert(**json.load(open('text/config.json'))).eval()
text.load_state_dict(safetensors.torch.load_file('text/model.safetensors'))
project = safetensors.torch.load_file('projections.safetensors')
report = text(ids, mask)[0][:, 0] @ project['text_proj.weight'].T      # ids, mask [B, T]: word pieces of text/vocab.txt
image = output.embedding @ project['vision_proj.weight'].T
slices = net.backbone.choose(volume, {slices})                      # of a volume, as in training, with its slices:
volume = net.backbone.encode(volume=volume, slices=slices)[0] @ project['vision_proj.weight'].T
```

'''


class Towers(NamedTuple):
  """fields and params of a `models.bert.Bert`; projections {'vision_proj', 'text_proj': [C, D], 'log_scale': scalar};
  vocabulary: word pieces; about: {'slices', 'lowercase', 'length'}."""
  fields: dict
  params: dict
  projections: dict
  vocabulary: tuple
  about: dict

  def tokenizer(self):
    from data_pipelines import wordpiece
    return wordpiece.Tokenizer(self.vocabulary, self.about['length'], self.about['lowercase'])


def of(found) -> Towers | None:
  """The towers of `weights.Weights`: of a run of UniMedI, or of its export; None where there is no text tower.

  Raises:
    PortingError: the run's vocabulary, or its config.json, is not there; an exported part is damaged.
  """
  return _of_run(found) if 'text' in found.params else _of_export(epath.Path(found.source))


def _of_run(found) -> Towers:
  from ml_collections import ConfigDict

  from data_pipelines import studies
  from data_pipelines.errors import DataError
  from unimiss_jax.methods import unimedi
  from unimiss_jax.porting import PortingError
  if 'unimedi' not in found.about.get('config', {}):
    raise PortingError(f'{found.source}: the config.json of its run is not there, so the text tower is unknown. FIX: '
                       'put the file back, or name the folder of the run')
  config = ConfigDict(found.about['config'])
  u = config.unimedi
  try:
    tokenizer, fields = studies.vocabulary(config, u.text.length), unimedi.text_fields(u.text)
  except (DataError, ValueError) as e:
    raise PortingError(f'{found.source}: {e}') from e
  kept = {k: np.asarray(x['kernel'] if k in LINEAR else x) for k, x in found.params.items()
          if k in (*LINEAR, 'log_scale', 'logit_bias')}
  return Towers(fields, found.params['text'], kept, tokenizer.vocabulary,
                {'slices': u.slices, 'lowercase': u.text.lowercase, 'length': u.text.length})


def _of_export(file) -> Towers | None:
  from unimiss_jax.porting import bert, torch_files
  folder, about = file.parent, torch_files.about(file).get('studies')
  if not about:
    return None
  fields, params = bert.read(folder / 'text')
  kept = {n.removesuffix('.weight'): x.T if x.ndim == 2 else x
          for n, x in torch_files.read(folder / PROJECTIONS).items()}
  return Towers(fields, params, kept, tuple((folder / 'text' / 'vocab.txt').read_text(encoding='utf-8').splitlines()),
                about)


def slices_of(found) -> int:
  """How many slices of a volume enter as images in what UniMedI trained; 0 in all other weights."""
  run = found.about.get('config', {}).get('unimedi')
  if run:
    return run['slices']
  from unimiss_jax.porting import torch_files
  return torch_files.about(found.source).get('studies', {}).get('slices', 0)


def write(folder, towers: Towers) -> None:
  """Writes FILES."""
  from unimiss_jax.models.bert import Bert
  from unimiss_jax.porting import bert, torch_bert, torch_files
  folder = pathlib.Path(folder)
  fields = {k: getattr(Bert, k) for k in bert.FIELDS} | towers.fields
  bert.write(folder / 'text', towers.params, fields, towers.vocabulary)
  said = {'do_lower_case': towers.about['lowercase'], 'model_max_length': towers.about['length'],
          'tokenizer_class': 'BertTokenizer'}
  (folder / 'text' / TOKENIZER).write_text(json.dumps(said, indent=1) + '\n')
  torch_files.write(folder / PROJECTIONS, _projections(towers))
  shutil.copy(torch_bert.__file__, folder / 'torch_bert.py')


def compare(towers: Towers, tensors: dict, model: dict) -> dict:
  """{input: {stage: difference}}: reports with padding through both text towers, and a volume with its slices.

  Args:
    towers: as they are written.
    tensors, model: of the backbone, as in `porting.parity.compare`.
  """
  import jax
  import torch

  from unimiss_jax.models.bert import Bert
  from unimiss_jax.models.vit import with_slices
  from unimiss_jax.porting import arch, bert, parity, torch_bert, torch_names
  wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float32), tree)
  project = wide(towers.projections)
  length = min(towers.about['length'], 32)
  rng = np.random.default_rng(0)
  ids = rng.integers(0, towers.fields['vocab_size'], (2, length)).astype(np.int32)
  mask = (np.arange(length) < [[length], [length // 2]]).astype(np.int32)
  with jax.default_matmul_precision('highest'):
    ours = Bert(**towers.fields).apply({'params': wide(towers.params)}, ids, mask)
  net = torch_bert.Bert(**towers.fields).eval()
  net.load_state_dict({bert.torch_name(n): torch.tensor(a.T if n.endswith('kernel') else a)
                       for n, a in _named(wide(towers.params)).items()})
  with torch.no_grad():
    last, hidden = net(torch.tensor(ids).long(), torch.tensor(mask))
  there = mask > 0
  found = {f'layer {i}': parity.difference(np.asarray(a)[there], b.numpy()[there])
           for i, (a, b) in enumerate(zip(ours.hidden, hidden))}
  found['projected'] = parity.difference(np.asarray(ours.last[:, 0]) @ project['text_proj'],
                                         last[:, 0].numpy() @ project['text_proj'])
  out = {f'reports of {length} word pieces': found}
  if 3 not in model['dimensions'] or 2 not in model['dimensions']:
    return out
  module, k = arch.model(model['arch']), towers.about['slices']
  size = module.native_size(3)
  x = parity.images(size, module.in_channels[1])
  wide_tensors = {n: np.asarray(a, np.float32) for n, a in tensors.items()}
  params = torch_names.from_torch_tree(wide_tensors)['backbone']
  volume = np.moveaxis(x, 1, -1)
  with jax.default_matmul_precision('highest'):
    mine = jax.jit(lambda p, v: with_slices(module, p, v, k))(params, volume)
  twin = arch.torch_network(model).eval()
  twin.load_state_dict({n: torch.tensor(a) for n, a in wide_tensors.items()})
  with torch.no_grad():
    picked = twin.backbone.choose(torch.tensor(x), k)
    cls, patches = twin.backbone.encode(volume=torch.tensor(x), slices=picked)
  return out | {'x'.join(map(str, size)) + f' with {k} slices': {
      'embedding': parity.difference(np.asarray(mine.cls), cls.numpy()),
      'patches': parity.difference(np.asarray(mine.patches), patches.numpy()),
      'projected': parity.difference(np.asarray(mine.cls) @ project['vision_proj'],
                                     cls.numpy() @ project['vision_proj'])}}


def card(text: str, towers: Towers) -> str:
  """The card of a ViT that has a text tower."""
  text = text.replace('## Preprocessing contract', USE.format(slices=towers.about['slices'])
                      + '## Preprocessing contract')
  for file, what in WHAT.items():
    text = text.replace(f'- `{file}`: \n', f'- `{file}`: {what}\n').replace(
        f'- `{file}`: the weights\n', f'- `{file}`: {what}\n')
  return text


def _projections(towers) -> dict:
  return {f'{n}.weight' if n in LINEAR else n: x.T if n in LINEAR else x for n, x in towers.projections.items()}


def _named(tree) -> dict:
  from unimiss_jax.optim import named_leaves
  return named_leaves(tree)
