"""Weights of a BERT from a local folder (config.json, vocab.txt, model.safetensors or pytorch_model.bin) <-> ours.

Names are those of PyTorch's BERT; the layout of 2019 ('bert.' before every name, LayerNorm.gamma and .beta, heads
'cls.') is understood. Nothing is ever looked up on the network.
"""
from __future__ import annotations

import json
import re

import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from unimiss_jax.models import param_shapes
from unimiss_jax.models.bert import Bert
from unimiss_jax.optim import named_leaves
from unimiss_jax.porting import torch_files
from unimiss_jax.porting.errors import PortingError, check_tensors

FIELDS = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size',
          'max_position_embeddings', 'type_vocab_size', 'layer_norm_eps')
FILES = 'model.safetensors', 'pytorch_model.bin'
UNUSED = re.compile(r'cls\.|.*position_ids$')
MODULES = {'query': 'attention.self.query', 'key': 'attention.self.key', 'value': 'attention.self.value',
           'attention_output': 'attention.output.dense', 'attention_norm': 'attention.output.LayerNorm',
           'intermediate': 'intermediate.dense', 'output': 'output.dense', 'output_norm': 'output.LayerNorm'}


def read(folder, num_layers: int | None = None, pooler: bool = False) -> tuple[dict, dict]:
  """Fields of `models.bert.Bert` and parameters for it.

  Args:
    folder: local or remote.
    num_layers: the first so many layers alone; None = all.
    pooler: whether the layer on the first token is taken as well.

  Returns:
    ({field: value}, nested dict of float32 (or float64, if the file has it) arrays).

  Raises:
    PortingError: not a folder of a BERT; tensors that are missing, unexpected or mis-shaped, by name; a vocabulary
      that is not as long as the table of words.
  """
  folder = epath.Path(folder)
  fields = fields_of(folder, num_layers) | {'pooler': pooler}
  _check_vocabulary(folder, fields['vocab_size'])
  path = next((folder / name for name in FILES if (folder / name).exists()), None)
  if path is None:
    raise PortingError(f'{folder}: no {" and no ".join(FILES)} there. FIX: name the folder of a BERT')
  found = {}
  for name, tensor in torch_files.read(path).items():
    name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name.removeprefix('bert.'))
    name = re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name)
    if not UNUSED.match(name) and not _left_out(name, fields):
      found[name] = np.asarray(tensor)
  wanted = {torch_name(n): (n, x.shape) for n, x in _shapes(fields).items()}
  check_tensors(path, found, {name: shape[::-1] if ours.endswith('kernel') else shape
                              for name, (ours, shape) in wanted.items()})
  wide = lambda x: x.astype(np.promote_types(x.dtype, np.float32))
  return fields, unflatten_dict({tuple(ours.split('/')): wide(found[name].T if ours.endswith('kernel') else found[name])
                                 for name, (ours, _) in wanted.items()})


def write(folder, params, fields: dict, vocabulary) -> None:
  """Parameters of a `Bert` -> the folder that `read` reads, and that PyTorch's BERT loads.

  Args:
    folder: made where it is not there.
    params: nested dict.
    fields: of the network.
    vocabulary: word pieces in the order of their ids.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  about = {k: fields[k] for k in FIELDS} | {'architectures': ['BertModel'], 'model_type': 'bert', 'hidden_act': 'gelu'}
  (folder / 'config.json').write_text(json.dumps(about, indent=1))
  (folder / 'vocab.txt').write_text('\n'.join(vocabulary) + '\n')
  torch_files.write(folder / FILES[0], {torch_name(n): np.asarray(x).T if n.endswith('kernel') else np.asarray(x)
                                        for n, x in named_leaves(params).items()})


def torch_name(name: str) -> str:
  """'layer_0/query/kernel' -> 'encoder.layer.0.attention.self.query.weight'."""
  *path, leaf = name.split('/')
  end = 'bias' if leaf == 'bias' else 'weight'
  if layer := re.fullmatch(r'layer_(\d+)', path[0]):
    return f'encoder.layer.{layer[1]}.{MODULES[path[1]]}.{end}'
  if path[0] == 'pooler':
    return f'pooler.dense.{end}'
  return f'embeddings.{"LayerNorm" if path[0] == "embeddings_norm" else path[0]}.{end}'


def fields_of(folder, num_layers: int | None = None) -> dict:
  """Fields of the `Bert` in a folder; arguments and errors as of `read`."""
  folder = epath.Path(folder)
  path = folder / 'config.json'
  try:
    about = json.loads(path.read_text())
    fields = {k: about[k] for k in FIELDS}
  except OSError as e:
    raise PortingError(f'{path}: cannot be read ({type(e).__name__}). FIX: name the folder of a BERT') from e
  except (ValueError, TypeError, KeyError) as e:
    raise PortingError(f'{path}: not the config of a BERT ({type(e).__name__}: {e}). FIX: name the folder of a BERT'
                       ) from e
  for key, allowed in (('model_type', 'bert'), ('hidden_act', 'gelu'), ('position_embedding_type', 'absolute')):
    if (value := about.get(key, allowed)) != allowed:
      raise PortingError(f'{path}: {key} is "{value}", expected "{allowed}". FIX: take weights of a BERT')
  layers = fields['num_hidden_layers']
  if num_layers is not None and not 0 < num_layers <= layers:
    raise PortingError(f'{folder}: has {layers} layers, {num_layers} are wanted. FIX: set the number of layers to '
                       f'at most {layers}')
  return fields | {'num_hidden_layers': num_layers or layers}


def _check_vocabulary(folder, size: int) -> None:
  path = folder / 'vocab.txt'
  try:
    n = len(path.read_text(encoding='utf-8').splitlines())
  except OSError as e:
    raise PortingError(f'{path}: cannot be read ({type(e).__name__}). FIX: put the vocabulary of the weights there'
                       ) from e
  if n != size:
    raise PortingError(f'{path}: {n} word pieces, the table of words has {size} rows. FIX: take the vocab.txt that '
                       'belongs to the weights')


def _shapes(fields) -> dict:
  return {'/'.join(path): x for path, x in param_shapes(Bert(**fields)).items()}


def _left_out(name: str, fields) -> bool:
  """A layer that is not wanted, or the pooler."""
  layer = re.match(r'encoder\.layer\.(\d+)\.', name)
  return bool(layer and int(layer[1]) >= fields['num_hidden_layers']) or (
      name.startswith('pooler.') and not fields['pooler'])
