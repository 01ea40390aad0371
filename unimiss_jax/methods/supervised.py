"""Fine-tuning and probing: classification or segmentation of labelled images or volumes on a pre-trained backbone.

config.task says what is learned; `params['backbone']` is that of pre-training and `init_from` fills it, the head
(`params['task']`) is new. With task.frozen the encoder is in the group 'fixed': no gradient, no decay, no moments.
Layer-wise rates (optim.layer_decay) as in BEiT (Bao et al. 2022), one step of the pyramid counting as a layer.
A ResNet sees volumes slice by slice: its embedding of a volume is the mean over the slices, a segmentation that of each
slice. Its batch statistics lie in `extra`; with task.frozen they stand still.
"""
import re

import jax
import jax.numpy as jnp

from unimiss_jax import models
from unimiss_jax.losses import classification, segmentation
from unimiss_jax.methods.base import Method, Phase, view_keys, weighted
from unimiss_jax.models.heads import Classifier, GrowingSegmenter, Segmenter, UNet, doublings
from unimiss_jax.models.resnet import ResNet, first_statistics
from unimiss_jax.models.vit import ViT
from unimiss_jax.optim import TRAIN

LAYERS = 6                  # steps of the encoder of a MiT: c0, c1, s1 ... s4; of a ViT: its embedding and its blocks
LEVEL = re.compile(r'transformer/(?:ConvBlock\dD(\d)|patch_embed\dD(\d)|pos_embed\dD(\d)|cls_tokens(\d)|block(\d))')
STAGE = re.compile(r'(?:conv1|bn1|layer(\d))')      # of a ResNet
FIELD = {'ct': 3, 'xray': 2}    # stream -> dimensions


def make(config, data) -> Method:
  task, (stream, (records, spec)) = config.task, next(iter(data.items()))
  batch = config.batch[stream]
  steps_per_epoch = task.epoch_steps or max(records // batch, 1)
  total = config.steps or config.epochs * steps_per_epoch
  model = models.build(config.model)
  blocks, counts = model.depths[0] if isinstance(model, ViT) else 0, isinstance(model, ResNet)
  segments, other = task.kind == 'seg', {2: '3D', 3: '2D'}[FIELD[stream]]
  if segments and model.embeds_in_decoder:
    raise ValueError(f'model.name={config.model.name!r} has no maps to segment: use mit_plus')
  if segments:
    classes = len(task.classes) if task.exclusive else spec['mask'][0][-1]
    steps = (doublings(model.kernel(FIELD[stream])) if blocks else
             unet_widths(model.width, config.views[stream].size) if counts else model.decoder_dims)
    level_weights = segmentation.weights(len(steps) if task.deep_supervision else 1)
    level_weights = [w for w in level_weights if w]
    how = dict(outputs=classes + task.exclusive, levels=len(level_weights), dtype=config.model.dtype)
    head = GrowingSegmenter(steps, **how) if blocks else UNet(steps, **how) if counts else Segmenter(**how)
  else:
    classes = spec['label'][0][-1]
    head = Classifier(classes, task.features, config.model.dtype)

  def init(key, params=None):
    if params is None:
      k_backbone, k_head = jax.random.split(key)
      decoded = segments and not blocks and not counts
      empty = [jnp.zeros((1, 1, c)) for c in (model.decoder_dims if decoded else model.embed_dims[-1:])]
      if segments and blocks:
        empty = [jnp.zeros((1,) * (FIELD[stream] + 1) + model.embed_dims[-1:])]
      elif segments and counts:
        empty = [jnp.zeros((1, 2**i, 2**i, c)) for i, c in zip(range(len(steps))[::-1], model.embed_dims)]
      empty = (empty,) if segments else (jnp.zeros((1, model.embed_dims[-1])), empty[0])
      params = {'backbone': models.init_params(model, k_backbone), 'task': head.init(k_head, *empty)['params']}
    return params, {'batch_stats': first_statistics(model)} if counts else {}

  def encode(params, extra, x, keys=None):
    """x [B, *S, C] -> what `models.encode` gives; of a ResNet and volumes, of their slices [B * D, ...]. It needs no
    keys of its own: nothing is drawn."""
    if counts and x.ndim == 5:
      b, d = x.shape[:2]
      x = jnp.repeat(x.reshape(b * d, *x.shape[2:]), model.in_channels[0], -1)
    return models.encode(model, params['backbone'], extra.get('batch_stats', {}), x,
                         None if counts and task.frozen else keys)

  def embedding(out, rows: int):
    """[rows, E], and a map [rows, ..., C]: the mean over the slices, and those of all."""
    together = lambda a: a.reshape(rows, -1, *a.shape[1:])
    if not counts or len(out.embedding) == rows:
      return out.embedding, out.pyramid[-1]
    return together(out.embedding).mean(1), together(out.pyramid[-1])

  def logits(params, extra, x, keys=None):
    """x [B, *S, C] -> [B, K], or [[B, *S, K] of every level]; and the batch statistics after it."""
    if segments and not blocks and not counts:
      maps = model.apply({'params': params['backbone']}, x, train=keys is not None, row_keys=keys,
                         method='decoder_maps')
      return head.apply({'params': params['task']}, maps), {}
    out, stats = encode(params, extra, x, keys)
    if not segments:
      return head.apply({'params': params['task']}, *embedding(out, len(x))), stats
    levels = head.apply({'params': params['task']}, out.pyramid)
    if counts and x.ndim == 5:
      levels = [z.reshape(*x.shape[:2], *z.shape[1:]) for z in levels]
    return levels, stats

  def loss(params, extra, batch, key, step):
    rows = batch[stream]
    z, stats = logits(params, extra, rows[stream][:, 0], view_keys(rows['rng'], 1)[:, 0])
    mean = {'batch_stats': stats} if stats else {}
    if not segments:
      value = classification.cross_entropy(z, rows['label'], task.exclusive)
      return weighted({'ce_loss': (1., value)}, mean,
                      {'train/accuracy': classification.accuracy(z, rows['label'], task.exclusive)})
    full = z[0].shape[1:-1]
    strides = [[a // b for a, b in zip(full, out.shape[1:-1])] for out in z]
    goals = [segmentation.targets(segmentation.at_stride(rows['mask'], s), classes, task.exclusive) for s in strides]
    hard = task.dice == 'hard_no_grad'
    terms = {'ce_loss': (task.ce_weight, lambda out, goal: segmentation.cross_entropy(out, goal, task.exclusive)),
             'dice_loss': (task.dice_weight, lambda out, goal: segmentation.soft_dice(out, goal, task.exclusive, hard))}
    return weighted({name: (weight, sum(w * f(out, goal) for w, out, goal in zip(level_weights, z, goals)))
                     for name, (weight, f) in terms.items() if weight}, mean, {})

  def groups(name):
    part, _, rest = name.partition('/')
    if part == 'task':
      return 'head'
    if counts:
      return 'fixed' if task.frozen else f'encoder_{stage(rest)}' if config.optim.layer_decay != 1 else 'encoder'
    used = blocks or not segments or not rest.startswith('transformer/final_norm')
    if other in rest or rest.endswith('mask_token') or not used or rest.startswith('recon_conv'):
      return 'fixed'
    if not rest.startswith('transformer/'):
      return 'decoder' if segments else 'fixed'
    return 'fixed' if task.frozen else f'encoder_{layer(rest, blocks)}' if config.optim.layer_decay != 1 else 'encoder'

  def rate(group):
    if not group.startswith('encoder'):
      return 1.
    layers = blocks + 1 if blocks else len(model.embed_dims) if counts else LAYERS
    depth = layers - int(group.partition('_')[2] or layers)
    return task.encoder_rate * config.optim.layer_decay**depth

  def of_task(weights, extra, batch):
    """{stream: [B, V, *S, C]} -> {stream: [B, V, K] or [B, V, *S, K]}."""
    x = batch[stream]
    z, _ = logits(weights, extra, x.reshape(-1, *x.shape[2:]))
    z = z[0] if segments else z
    return {stream: z.reshape(*x.shape[:2], *z.shape[1:])}

  def embed(weights, extra, batch):
    """{stream: [B, V, *S, C]} -> {stream: [B, V, E]}."""
    x = batch[stream]
    flat = x.reshape(-1, *x.shape[2:])
    return {stream: embedding(encode(weights, extra, flat)[0], len(flat))[0].reshape(*x.shape[:2], -1)}

  chance = {} if segments else {'train/ce_loss': float(jnp.log(classes if task.exclusive else 2))}
  return Method(
      init=init, groups=groups, rate=rate,
      phases={stream: Phase({stream: batch}, loss, lambda group, step: TRAIN, chance,
                             couples_samples=segments or counts and not task.frozen)},
      schedule=lambda step: (stream, None if step % steps_per_epoch else ('epoch', step // steps_per_epoch)),
      post=lambda params, extra, aux, step: extra | aux.mean,
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


def stage(name: str) -> int:
  """Step that a parameter of a ResNet belongs to: 0 of the stem, i of layer i."""
  return int(STAGE.match(name)[1] or 0)


def unet_widths(stem: int, size) -> tuple:
  """Channels of the U-Net on a ResNet with such a stem: 256, 128, 64, 32, 16 on a ResNet-50 (chosen by us).

  Raises:
    ValueError: views of `size` that do not halve five times.
  """
  sides = size[1:] if hasattr(size, '__len__') else (size,)
  if wrong := [s for s in sides if s % 32]:
    near = max(round(wrong[0] / 32), 1) * 32
    raise ValueError(f'views of {wrong[0]} pixels: a U-Net on a ResNet takes multiples of 32, the nearest is {near}')
  return tuple(max(4 * stem >> i, 4) for i in range(5))
