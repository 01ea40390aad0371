"""Joint: intra-inter contrastive clustering of images and of volumes as sequences of slices (Nguyen et al. 2023).

intra   swapped prediction (SwAV) between two views of an image
mask    hidden slice embeddings are predicted by a Transformer over the slices, the slice encoder stands still
inter   swapped prediction between two views of a volume, the unit mean of the Transformer's tokens
joint   all three in one step
A run is a list of them with their shares of the steps (`joint.phases`, `joint.shares`). The slice encoder is the 2-D
branch of the backbone. Without `mask`, `inter` and `joint` nothing of the Transformer is built: plain 2-D SwAV.
"""
import itertools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimiss_jax import models
from unimiss_jax.losses import clustering, contrastive, reconstruction
from unimiss_jax.methods.base import Method, Phase, view_keys, weighted
from unimiss_jax.models import deformable
from unimiss_jax.models.heads import DINOHead, Prototypes
from unimiss_jax.optim import SKIP, TRAIN

TERMS = {'intra': ('intra',), 'mask': ('mask',), 'inter': ('inter',), 'joint': ('intra', 'mask', 'inter')}
STREAM = {'intra': 'xray', 'mask': 'ct', 'inter': 'ct'}
TRAINS = {'intra': ('encoder', 'head', 'head_prototypes'), 'mask': ('inter', 'mask'),
          'inter': ('encoder', 'slice', 'inter', 'prototypes')}


def make(config, data) -> Method:
  j, batch = config.joint, config.batch
  check(config)
  leading = next(iter(data))                  # CT, where there is CT
  steps_per_epoch = max(data[leading][0] // batch[leading], 1)
  total = config.steps or config.epochs * steps_per_epoch
  starts = [round(total * s) for s in itertools.accumulate((0., *j.shares))][:-1]
  begins = dict(zip(j.phases, starts))
  terms_of_run = {t for p in j.phases for t in TERMS[p]}
  volumes = bool(terms_of_run & {'mask', 'inter'})

  model = models.build(config.model)
  head = DINOHead(config.head.out_dim, config.head.hidden_dim, config.head.bottleneck_dim,
                  linear_init=config.model.init, dtype=config.model.dtype)
  widths = config.model.embed_dims[2:]
  inter = deformable.InterEncoder(dtype=jnp.dtype(config.model.dtype), **j.inter)
  new = {'head': (head, (1, config.model.embed_dims[-1]))}
  if volumes:
    new |= {'slice': (nn.Dense(j.width), (1, sum(widths) + widths[-1])), 'inter': (inter, (1, 4, j.width))}
  if 'mask' in terms_of_run:
    new['mask'] = deformable.MaskedSlices(j.width), (1, 1, j.width)
  if 'inter' in terms_of_run:
    new['prototypes'] = Prototypes(j.prototypes), (1, j.width)

  def init(key, params=None):
    if params is None:
      keys = jax.random.split(key, len(new) + 1)
      params = {'backbone': models.init_params(model, keys[0])}
      params |= {name: m.init(k, jnp.zeros(shape))['params'] for k, (name, (m, shape)) in zip(keys[1:], new.items())}
    return params, {}

  def of(name, params, x, **given):
    return new[name][0].apply({'params': params[name]}, x, **given)

  def images(params, x, keys=None):
    """x [B, V, H, W, C] -> what the backbone makes of them, [B * V, ...]."""
    return model.apply({'params': params['backbone']}, x.reshape(-1, *x.shape[2:]), train=keys is not None,
                       decode=False, row_keys=None if keys is None else keys.reshape(-1))

  def slices(params, x, keys=None):
    """Volumes x [B, V, D, H, W, 1] -> embeddings of their slices [B, V, D, width]; keys [B, V]."""
    b, v, d = x.shape[:3]
    keys = None if keys is None else jax.vmap(lambda k: jax.random.split(k, d))(keys.reshape(-1))
    flat = jnp.repeat(x.reshape(b * v, d, *x.shape[3:]), 3, -1)
    z = deformable.pooled_levels(images(params, flat, keys).pyramid[2:])
    return of('slice', params, z).reshape(b, v, d, -1)

  def features(params, z, key=None):
    """[B, V, D, width] -> unit features of the volumes [B, V, width]."""
    flat = z.reshape(-1, *z.shape[2:])
    tokens = of('inter', params, flat, train=key is not None, rngs={} if key is None else {'dropout': key})
    return deformable.volume_feature(tokens).reshape(*z.shape[:2], -1)

  def swapped(logits):
    """[B, V, K] -> loss."""
    return clustering.swapped_loss(logits.swapaxes(0, 1), range(logits.shape[1]), j.temp, j.eps, j.rounds)[0]

  def intra(params, rows, key):
    x = rows['xray']
    z = images(params, x, view_keys(rows['rng'], x.shape[1])).embedding
    z = of('head', params, z, method='project')
    z = deformable.unit(contrastive.standardize(z) if config.head.batch_standardize else z)
    return swapped(of('head', params, z, method='cosines').reshape(*x.shape[:2], -1))

  def mask(params, rows, key):
    z = jax.lax.stop_gradient(slices(params, rows['ct']))
    b, v, d = z.shape[:3]
    draw = lambda k: deformable.draw_mask(k, jnp.ones(d, bool), j.mask_ratio)
    hidden = jax.vmap(draw)(view_keys(rows['rng'], 1)[:, 0])           # [B, D], both views alike
    given = of('mask', params, z, mask=jnp.broadcast_to(hidden[:, None], z.shape[:3]), method='hide')
    tokens = of('inter', params, given.reshape(b * v, d, -1), train=True, rngs={'dropout': key})
    pred = of('mask', params, tokens).reshape(z.shape)
    return reconstruction.masked_slices(pred.swapaxes(0, 1), z.swapaxes(0, 1), hidden)

  def volume(params, rows, key):
    x = rows['ct']
    z = slices(params, x, view_keys(rows['rng'], x.shape[1]))
    return swapped(of('prototypes', params, features(params, z, key)))

  losses = {'intra': intra, 'mask': mask, 'inter': volume}
  chances = {'intra': math.log(config.head.out_dim), 'inter': math.log(j.prototypes)}

  def phase(name):
    def loss(params, extra, rows, key, step):
      keys = dict(zip(TERMS['joint'], jax.random.split(key, 3)))
      return weighted({f'{t}_loss': (1., losses[t](params, rows[STREAM[t]], keys[t])) for t in TERMS[name]}, {}, {})

    def update(group, step):
      if not any(group in TRAINS[t] for t in TERMS[name]):
        return SKIP
      return jnp.where(step < begins[name] + j.freeze_prototypes, SKIP, TRAIN) if 'prototypes' in group else TRAIN
    streams = {STREAM[t]: batch[STREAM[t]] for t in TERMS[name]}
    chance = {f'train/{t}_loss': chances[t] for t in TERMS[name] if t in chances}
    return Phase(streams, loss, update, chance, couples_samples=name != 'mask')

  def schedule(step):
    at = max(i for i, start in enumerate(starts) if start <= step)
    return j.phases[at], None if step % steps_per_epoch else ('epoch', step // steps_per_epoch)

  def groups(name):
    part, _, rest = name.partition('/')
    if part == 'backbone':
      return 'encoder' if rest.startswith('transformer/') and '3D' not in rest else 'fixed'
    if name.endswith('weight_g'):
      return 'fixed'
    return 'head_prototypes' if 'last_layer' in name else part

  def embed(weights, extra, rows):
    """{'ct': [B, V, ...], 'drr', 'xray': those present} -> the same names with [B, V, E]."""
    flat = lambda x: images(weights, x).embedding.reshape(*x.shape[:2], -1)
    return {k: features(weights, slices(weights, x)) if k == 'ct' else flat(x) for k, x in rows.items()
            if k != 'ct' or volumes}

  return Method(
      init=init, groups=groups, phases={n: phase(n) for n in dict.fromkeys(j.phases)}, schedule=schedule,
      post=lambda params, extra, aux, step: extra, weights={'student': lambda params, extra: params},
      predict={'embed': embed}, total_steps=total, steps_per_epoch=steps_per_epoch)


def check(config) -> None:
  """Raises ValueError for phases that cannot be; warns of codes that must be almost even."""
  j = config.joint
  if unknown := set(j.phases) - set(TERMS):
    raise ValueError(f'joint.phases: "{min(unknown)}" unknown: use some of {", ".join(TERMS)}')
  if len(set(j.phases)) != len(j.phases) or len(j.phases) != len(j.shares) or abs(sum(j.shares) - 1) > 1e-6:
    raise ValueError(f'joint.phases={tuple(j.phases)}, joint.shares={tuple(j.shares)}: every phase comes once and has '
                     'a share of the steps, together 1')
  streams = {STREAM[t] for p in j.phases for t in TERMS[p]}
  for s in ('ct', 'xray'):
    if bool(config.phases[s]) != (s in streams):
      raise ValueError(f'phases.{s}={config.phases[s]}: with joint.phases={tuple(j.phases)} it must be '
                       f'{int(s in streams)}')
  for leaf, term, k in (('head.out_dim', 'intra', config.head.out_dim), ('joint.prototypes', 'inter', j.prototypes)):
    b = config.batch[STREAM[term]]
    if any(term in TERMS[p] for p in j.phases) and k > b:
      logging.warning('%s=%d prototypes for batch.%s=%d: none gets a whole sample, so that the codes are almost even. '
                      'FIX: at most %d prototypes, or a larger batch', leaf, k, STREAM[term], b, b)
