"""Fine-tuning and probing: classification or segmentation of labelled images or volumes on a pre-trained backbone.

config.task says what is learned; `params['backbone']` is that of pre-training and `init_from` fills it, the head
(`params['task']`) is new. With task.frozen the encoder is in the group 'fixed': no gradient, no decay, no moments.
Layer-wise rates (optim.layer_decay) as in BEiT (Bao et al. 2022), one step of the pyramid counting as a layer.
"""
import re

import jax
import jax.numpy as jnp

from unimiss_jax import models
from unimiss_jax.losses import classification, segmentation
from unimiss_jax.methods.base import Method, Phase, view_keys, weighted
from unimiss_jax.models.heads import Classifier, GrowingSegmenter, Segmenter, doublings
from unimiss_jax.models.vit import ViT
from unimiss_jax.optim import TRAIN

LAYERS = 6                  # steps of the encoder of a MiT: c0, c1, s1 ... s4; of a ViT: its embedding and its blocks
LEVEL = re.compile(r'transformer/(?:ConvBlock\dD(\d)|patch_embed\dD(\d)|pos_embed\dD(\d)|cls_tokens(\d)|block(\d))')
FIELD = {'ct': 3, 'xray': 2}    # stream -> dimensions


def make(config, data) -> Method:
  task, (stream, (records, spec)) = config.task, next(iter(data.items()))
  batch = config.batch[stream]
  steps_per_epoch = task.epoch_steps or max(records // batch, 1)
  total = config.steps or config.epochs * steps_per_epoch
  model = models.build(config.model)
  blocks = model.depths[0] if isinstance(model, ViT) else 0
  segments, other = task.kind == 'seg', {2: '3D', 3: '2D'}[FIELD[stream]]
  if segments and model.embeds_in_decoder:
    raise ValueError(f'model.name={config.model.name!r} has no maps to segment: use mit_plus')
  if segments:
    classes = len(task.classes) if task.exclusive else spec['mask'][0][-1]
    steps = doublings(model.kernel(FIELD[stream])) if blocks else model.decoder_dims
    level_weights = segmentation.weights(len(steps) if task.deep_supervision else 1)
    level_weights = [w for w in level_weights if w]
    how = dict(outputs=classes + task.exclusive, levels=len(level_weights), dtype=config.model.dtype)
    head = GrowingSegmenter(steps, **how) if blocks else Segmenter(**how)
  else:
    classes = spec['label'][0][-1]
    head = Classifier(classes, task.features, config.model.dtype)

  def init(key, params=None):
    if params is None:
      k_backbone, k_head = jax.random.split(key)
      decoded = segments and not blocks
      empty = [jnp.zeros((1, 1, c)) for c in (model.decoder_dims if decoded else model.embed_dims[-1:])]
      if segments and blocks:
        empty = [jnp.zeros((1,) * (FIELD[stream] + 1) + model.embed_dims[-1:])]
      empty = (empty,) if segments else (jnp.zeros((1, model.embed_dims[-1])), empty[0])
      params = {'backbone': models.init_params(model, k_backbone), 'task': head.init(k_head, *empty)['params']}
    return params, {}

  def logits(params, x, keys=None):
    """x [B, *S, C] -> [B, K], or [[B, *S, K] of every level]."""
    given = dict(train=keys is not None, row_keys=keys)
    apply = lambda **how: model.apply({'params': params['backbone']}, x, **given, **how)
    if segments:
      maps = apply(decode=False).pyramid if blocks else apply(method='decoder_maps')
      return head.apply({'params': params['task']}, maps)
    out = apply(decode=False)
    return head.apply({'params': params['task']}, out.embedding, out.pyramid[-1])

  def loss(params, extra, batch, key, step):
    rows = batch[stream]
    z = logits(params, rows[stream][:, 0], view_keys(rows['rng'], 1)[:, 0])
    if not segments:
      value = classification.cross_entropy(z, rows['label'], task.exclusive)
      return weighted({'ce_loss': (1., value)}, {},
                      {'train/accuracy': classification.accuracy(z, rows['label'], task.exclusive)})
    full = z[0].shape[1:-1]
    strides = [[a // b for a, b in zip(full, out.shape[1:-1])] for out in z]
    goals = [segmentation.targets(segmentation.at_stride(rows['mask'], s), classes, task.exclusive) for s in strides]
    hard = task.dice == 'hard_no_grad'
    terms = {'ce_loss': (task.ce_weight, lambda out, goal: segmentation.cross_entropy(out, goal, task.exclusive)),
             'dice_loss': (task.dice_weight, lambda out, goal: segmentation.soft_dice(out, goal, task.exclusive, hard))}
    return weighted({name: (weight, sum(w * f(out, goal) for w, out, goal in zip(level_weights, z, goals)))
                     for name, (weight, f) in terms.items() if weight}, {}, {})

  def groups(name):
    part, _, rest = name.partition('/')
    if part == 'task':
      return 'head'
    used = blocks or not segments or not rest.startswith('transformer/final_norm')
    if other in rest or rest.endswith('mask_token') or not used or rest.startswith('recon_conv'):
      return 'fixed'
    if not rest.startswith('transformer/'):
      return 'decoder' if segments else 'fixed'
    return 'fixed' if task.frozen else f'encoder_{layer(rest, blocks)}' if config.optim.layer_decay != 1 else 'encoder'

  def rate(group):
    if not group.startswith('encoder'):
      return 1.
    layers = blocks + 1 if blocks else LAYERS
    depth = layers - int(group.partition('_')[2] or layers)
    return task.encoder_rate * config.optim.layer_decay**depth

  def of_task(weights, extra, batch):
    """{stream: [B, V, *S, C]} -> {stream: [B, V, K] or [B, V, *S, K]}."""
    x = batch[stream]
    z = logits(weights, x.reshape(-1, *x.shape[2:]))
    z = z[0] if segments else z
    return {stream: z.reshape(*x.shape[:2], *z.shape[1:])}

  def embed(weights, extra, batch):
    """{stream: [B, V, *S, C]} -> {stream: [B, V, E]}."""
    x = batch[stream]
    out = model.apply({'params': weights['backbone']}, x.reshape(-1, *x.shape[2:]), decode=False)
    return {stream: out.embedding.reshape(*x.shape[:2], -1)}

  chance = {} if segments else {'train/ce_loss': float(jnp.log(classes if task.exclusive else 2))}
  return Method(
      init=init, groups=groups, rate=rate,
      phases={stream: Phase({stream: batch}, loss, lambda group, step: TRAIN, chance, couples_samples=segments)},
      schedule=lambda step: (stream, None if step % steps_per_epoch else ('epoch', step // steps_per_epoch)),
      post=lambda params, extra, aux, step: extra,
      weights={'student': lambda params, extra: params},
      predict={'logits': of_task, 'embed': embed},
      total_steps=total, steps_per_epoch=steps_per_epoch)


def layer(name: str, blocks: int = 0) -> int:
  """Step that a parameter of the encoder belongs to: 0 (c0) to 5 (s4) of a pyramid; 0 (tokens, tables) to `blocks`."""
  if blocks:
    found = re.match(r'transformer/block1_(\d+)/', name)
    return int(found[1]) + 1 if found else blocks if name.startswith('transformer/final_norm') else 0
  found = LEVEL.match(name)
  if not found:                   # final_norm
    return LAYERS - 1
  conv, *later = found.groups()
  return int(conv) if conv else int(next(g for g in later if g)) + 1
