"""BERT (Devlin et al. 2019), the text tower of UniMedI, in PyTorch: one file that needs torch alone.

Names and shapes are those of every PyTorch BERT, so the same file of weights also loads elsewhere. Nothing is random:
training and evaluation mode agree.

  net = Bert(**json.load(open('export/text/config.json')))
  net.load_state_dict(safetensors.torch.load_file('export/text/model.safetensors'))
  last, hidden = net(ids, mask)                              # [B, T] integers each; a report is last[:, 0]
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Bert(nn.Module):
  """ids [B, T], mask [B, T] (0 = padding), types [B, T] (None: all 0) -> (last [B, T, C], all layers' outputs).

  Args: as in config.json; those that change nothing here are ignored.
  """

  def __init__(self, vocab_size: int = 28996, hidden_size: int = 768, num_hidden_layers: int = 12,
               num_attention_heads: int = 12, intermediate_size: int = 3072, max_position_embeddings: int = 512,
               type_vocab_size: int = 2, layer_norm_eps: float = 1e-12, **_):
    super().__init__()
    c = hidden_size
    self.embeddings = nn.ModuleDict({
        'word_embeddings': nn.Embedding(vocab_size, c), 'position_embeddings': nn.Embedding(max_position_embeddings, c),
        'token_type_embeddings': nn.Embedding(type_vocab_size, c), 'LayerNorm': nn.LayerNorm(c, layer_norm_eps)})
    layers = (Layer(c, num_attention_heads, intermediate_size, layer_norm_eps) for _ in range(num_hidden_layers))
    self.encoder = nn.ModuleDict({'layer': nn.ModuleList(layers)})

  def forward(self, ids, mask=None, types=None):
    e, places = self.embeddings, torch.arange(ids.shape[1], device=ids.device)
    x = e['word_embeddings'](ids) + e['position_embeddings'](places)
    x = e['LayerNorm'](x + e['token_type_embeddings'](torch.zeros_like(ids) if types is None else types))
    there = None if mask is None else mask[:, None, None] > 0            # of keys, not of queries
    hidden = [x]
    for layer in self.encoder['layer']:
      x = layer(x, there)
      hidden.append(x)
    return x, tuple(hidden)


class Layer(nn.Module):
  """Self-attention and MLP, each followed by the norm of its sum with its input."""

  def __init__(self, c: int, heads: int, hidden: int, eps: float):
    super().__init__()
    out = lambda inputs: nn.ModuleDict({'dense': nn.Linear(inputs, c), 'LayerNorm': nn.LayerNorm(c, eps)})
    self.heads = heads
    self.attention = nn.ModuleDict({'self': nn.ModuleDict({n: nn.Linear(c, c) for n in ('query', 'key', 'value')}),
                                    'output': out(c)})
    self.intermediate = nn.ModuleDict({'dense': nn.Linear(c, hidden)})
    self.output = out(hidden)

  def forward(self, x, there):
    b, t, c = x.shape
    q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in self.attention['self'].values())
    y = F.scaled_dot_product_attention(q, k, v, there).transpose(1, 2).reshape(b, t, c)
    end = self.attention['output']
    x = end['LayerNorm'](x + end['dense'](y))
    y = self.output['dense'](F.gelu(self.intermediate['dense'](x)))
    return self.output['LayerNorm'](x + y)
