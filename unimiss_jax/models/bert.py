"""BERT (Devlin et al. 2019): the text tower. Post-norm blocks, exact (erf) GELU, LayerNorm epsilon 1e-12.

Fields are named as in the config.json of a folder of weights, which `porting.bert` reads. There is no dropout: reports
are not repeated often enough to be learned by heart, and rows need no random numbers of their own here.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimiss_jax.models.layers import gelu, layer_norm, linear, wide

INIT_STD = 0.02


class BertOutput(NamedTuple):
  """last [B, T, C]; pooled [B, C] or None; hidden: the embedding and every layer's output, [B, T, C] each."""
  last: jax.Array
  pooled: jax.Array | None
  hidden: tuple


class Bert(nn.Module):
  """ids [B, T] int, mask [B, T] (0 = padding), types [B, T] (None: all 0) -> BertOutput.

  With the collection 'intermediates' mutable every layer also leaves its attention [B, H, T, T] as 'attention'.

  Attributes:
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings,
      type_vocab_size, layer_norm_eps: as in config.json.
    pooler: whether there is a tanh layer on the first token.
    dtype: of the run; parameters, norms and softmax are never narrower than float32.
  """
  vocab_size: int = 28996
  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  pooler: bool = False
  dtype: Any = jnp.float32
  input_dtype = jnp.int32      # not a field: what `models.param_shapes` calls it with

  @nn.compact
  def __call__(self, ids, mask=None, types=None) -> BertOutput:
    t = ids.shape[1]
    if t > self.max_position_embeddings:
      raise ValueError(f'texts of {t} word pieces: this network has positions for {self.max_position_embeddings}')
    table = lambda n, name: nn.Embed(n, self.hidden_size, dtype=self.dtype, param_dtype=wide(self.dtype), name=name)
    norm = lambda name: layer_norm(self.layer_norm_eps, self.dtype, name)
    x = table(self.vocab_size, 'word_embeddings')(ids)
    x += table(self.type_vocab_size, 'token_type_embeddings')(jnp.zeros_like(ids) if types is None else types)
    x += table(self.max_position_embeddings, 'position_embeddings')(jnp.arange(t))
    x = norm('embeddings_norm')(x)
    least = jnp.finfo(wide(self.dtype)).min
    bias = None if mask is None else jnp.where(mask[:, None, None, :] > 0, 0., least)      # of keys, not of queries
    hidden = [x]
    for i in range(self.num_hidden_layers):
      x = Layer(self.num_attention_heads, self.intermediate_size, self.layer_norm_eps, self.dtype,
                name=f'layer_{i}')(x, bias)
      hidden.append(x)
    pooled = jnp.tanh(linear(self.hidden_size, self.dtype, 'pooler')(x[:, 0])) if self.pooler else None
    return BertOutput(x, pooled, tuple(hidden))

  def input_shapes(self) -> tuple:
    return ((1, 2),)

  def initial(self, path: tuple, shapes: dict) -> tuple[str, float]:
    """How a parameter starts: tables N(0, 0.02), matrices N(0, 1 / sqrt(fan_in)), norms 1, biases 0.

    BERT's 0.02 for matrices is made for widths of 768; narrow networks would hardly hear their own attention.
    """
    if path[-1] in ('scale', 'bias'):
      return 'constant', float(path[-1] == 'scale')
    return 'normal', INIT_STD if path[-1] == 'embedding' else shapes[path][0]**-0.5


class Layer(nn.Module):
  """Self-attention and MLP, each followed by the norm of its sum with its input."""
  heads: int
  hidden: int
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x, bias):                               # [B, T, C], [B, 1, 1, T] or None
    b, t, c = x.shape
    q, k, v = (linear(c, self.dtype, name)(x).reshape(b, t, self.heads, -1) for name in ('query', 'key', 'value'))
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=wide(self.dtype)) * (c // self.heads)**-0.5
    weights = nn.softmax(scores if bias is None else scores + bias)
    self.sow('intermediates', 'attention', weights)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights.astype(self.dtype), v).reshape(b, t, c)
    norm = lambda name: layer_norm(self.epsilon, self.dtype, name)
    x = norm('attention_norm')(x + linear(c, self.dtype, 'attention_output')(y))
    y = linear(c, self.dtype, 'output')(gelu(linear(self.hidden, self.dtype, 'intermediate')(x)))
    return norm('output_norm')(x + y)
