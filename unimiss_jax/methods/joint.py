"""Joint: intra-inter contrastive clustering of images and of volumes as sequences of slices (Nguyen et al. 2023).

intra   clustering of views of an image
mask    hidden slice embeddings are predicted by a Transformer over the slices, the slice encoder stands still
inter   clustering of views of a volume, the unit mean of the Transformer's tokens
joint   all three in one step
A run is a list of them with their shares of the steps (`joint.phases`, `joint.shares`); each starts with a fresh
optimiser and has the whole schedule. `joint.objective`: swav = swapped prediction with Sinkhorn codes,
shared out over the rows of a full queue too; deepcluster = cross-entropy to k-means clusters of the last epoch
(`clusters.py`), an epoch being a pass over the term's own stream. Small crops of an image (`joint.local`) predict the
codes of its two views and have none.
The slice encoder is the 2-D branch of a MiT+, or a ResNet, whose batch statistics lie in `extra`. Without `mask`,
`inter` and `joint` nothing of the Transformer is built: the plain 2-D baselines.
"""
import functools
import importlib
import itertools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unimiss_jax import models
from unimiss_jax.losses import clustering, collapse, contrastive
from unimiss_jax.methods import clusters
from unimiss_jax.methods.base import Aux, Method, Phase, Timeline, view_keys, weighted
from unimiss_jax.models import deformable, resnet, slicewise
from unimiss_jax.models.heads import DINOHead, Prototypes
from unimiss_jax.models.layers import wide
from unimiss_jax.optim import SKIP, TRAIN

TERMS = {'intra': ('intra',), 'mask': ('mask',), 'inter': ('inter',), 'joint': ('intra', 'mask', 'inter')}
STREAM = {'intra': 'xray', 'mask': 'ct', 'inter': 'ct'}
TRAINS = {'intra': ('encoder', 'head', 'head_prototypes'), 'mask': ('inter', 'mask'),
          'inter': ('encoder', 'slice', 'inter', 'prototypes')}
DROPOUT = 1 << 20     # what makes its keys of those of views; keys split from them, one a slice, are fewer
MASK_LOSS = {'masked_only': 'unimiss_jax.losses.reconstruction', 'released': 'unimiss_jax.losses.reference'}


def make(config, data) -> Method:
  j, batch = config.joint, config.batch
  records = {name: data[name][0] for name in data}
  leading = next(iter(data))                  # CT, where there is CT
  steps_per_epoch = max(records[leading] // batch[leading], 1)
  total = config.steps or config.epochs * steps_per_epoch
  starts = [round(total * s) for s in itertools.accumulate((0., *j.shares))][:-1]
  check(config, records)
  begins = dict(zip(j.phases, starts))
  terms_of_run = {t for p in j.phases for t in TERMS[p]}
  volumes, deep = bool(terms_of_run & {'mask', 'inter'}), j.objective == 'deepcluster'

  model = models.build(config.model)
  counts_batches = isinstance(model, resnet.ResNet)
  head = DINOHead(config.head.out_dim, config.head.hidden_dim, config.head.bottleneck_dim, last_layer=not deep,
                  linear_init=config.model.get('init', 'fan_in'), dtype=config.model.dtype)
  inter = deformable.InterEncoder(dtype=jnp.dtype(config.model.dtype), **j.inter)
  new, stored = {}, wide(config.model.dtype)
  if 'intra' in terms_of_run:
    new['head'] = head, (1, model.embed_dims[-1])
  if volumes:
    slices_given = j.inter.slices if j.inter.axis == 'feature' else j.inter.downsample
    new |= {'slice': (nn.Dense(j.width, param_dtype=stored), (1, slicewise.levels_width(model))),
            'inter': (inter, (1, slices_given, j.width))}
  if 'mask' in terms_of_run:
    new['mask'] = deformable.MaskedSlices(j.width, stored), (1, 1, j.width)
  if 'inter' in terms_of_run and not deep:
    new['prototypes'] = Prototypes(j.prototypes, stored), (1, j.width)
  banks = {'intra': (config.head.bottleneck_dim, j.image_clusters), 'inter': (j.width, j.volume_clusters)}
  banks = {t: b for t, b in banks.items() if deep and t in terms_of_run}
  turns = {t: clusters.turns(records[STREAM[t]], batch[STREAM[t]]) for t in banks}
  queues = {'intra': (j.image_queue, config.head.bottleneck_dim), 'inter': (j.volume_queue, j.width)}
  queues = {t: (rows // batch[STREAM[t]], width) for t, (rows, width) in queues.items()
            if rows and not deep and t in terms_of_run}
  places = turns | {t: steps for t, (steps, _) in queues.items()}      # of steps in a bank or queue

  def init(key, params=None):
    if params is None:
      keys = jax.random.split(key, len(new) + 1)
      params = {'backbone': models.init_params(model, keys[0])}
      params |= {name: m.init(k, jnp.zeros(shape))['params'] for k, (name, (m, shape)) in zip(keys[1:], new.items())}
    extra = {t: clusters.empty(records[STREAM[t]], batch[STREAM[t]], *b) for t, b in banks.items()}
    extra |= {t: clusters.queue(steps, batch[STREAM[t]], width) for t, (steps, width) in queues.items()}
    return params, extra | ({'batch_stats': resnet.first_statistics(model)} if counts_batches else {})

  def of(name, params, x, **given):
    return new[name][0].apply({'params': params[name]}, x, **given)

  def images(params, extra, x, keys=None):
    """x [B, V, H, W, C] -> what the backbone makes of them, [B * V, ...], and the batch statistics after it."""
    x, keys = x.reshape(-1, *x.shape[2:]), None if keys is None else keys.reshape(-1)
    out, stats = models.encode(model, params['backbone'], extra.get('batch_stats', {}), x, keys)
    return out, {'batch_stats': stats} if stats else {}

  def slices(params, extra, x, keys=None):
    """Volumes x [B, V, D, H, W, 1] -> embeddings of their slices [B, V, D, width], and statistics; keys [B, V]."""
    b, v, d = x.shape[:3]
    keys = None if keys is None else jax.vmap(lambda k: jax.random.split(k, d))(keys.reshape(-1)).reshape(-1)
    found, stats = slicewise.levels(model, params['backbone'], extra.get('batch_stats', {}),
                                    x.reshape(b * v * d, *x.shape[3:]), keys, j.slice_parts)
    return of('slice', params, found).reshape(b, v, d, -1), {'batch_stats': stats} if stats else {}

  def transformed(params, z, rng=None):
    """[B, V, D, width] -> tokens of the volumes, alike; rng [B, 2] of the records: with dropout, of each view its own,
    wherever its row lies."""
    flat = z.reshape(-1, *z.shape[2:])
    if rng is None:
      return of('inter', params, flat).reshape(z.shape)
    keys = jax.vmap(lambda k: jax.random.fold_in(k, DROPOUT))(view_keys(rng, z.shape[1]).reshape(-1))
    one = lambda z, key: of('inter', params, z[None], train=True, rngs={'dropout': key})[0]
    return jax.vmap(one)(flat, keys).reshape(z.shape)

  def features(params, z, rng=None):
    """[B, V, D, width] -> unit features of the volumes [B, V, width]."""
    tokens = transformed(params, z, rng)
    return deformable.volume_feature(tokens.reshape(-1, *z.shape[2:])).reshape(*z.shape[:2], -1)

  def unit_images(params, extra, rows):
    """What is clustered: unit [B, V, bottleneck], and statistics."""
    crops = [rows[n] for n in ('xray', 'local') if n in rows]
    keys, found, stats = view_keys(rows['rng'], sum(x.shape[1] for x in crops)), [], extra
    for x in crops:      # of one size
      mine, keys = keys[:, :x.shape[1]], keys[:, x.shape[1]:]
      out, stats = images(params, stats, x, mine)
      found.append(out.embedding.reshape(*x.shape[:2], -1))
    x = jnp.concatenate(found, 1)
    z = of('head', params, x.reshape(-1, x.shape[-1]), method='project')
    z = deformable.unit(contrastive.standardize(z) if config.head.batch_standardize else z)
    return z.reshape(*x.shape[:2], -1), stats

  def unit_volumes(params, extra, rows):
    """What is clustered: unit [B, V, width], and statistics."""
    x = rows['ct']
    z, stats = slices(params, extra, x, view_keys(rows['rng'], x.shape[1]))
    z = features(params, z, rows['rng'])
    flat = z.reshape(-1, z.shape[-1])
    return (deformable.unit(contrastive.standardize(flat)).reshape(z.shape) if j.standardize_volumes else z), stats

  units = {'intra': unit_images, 'inter': unit_volumes}

  def clustered(term, params, extra, rows):
    """-> loss, batch statistics, {term: rows of its bank}, {metric: what the clusters are like}."""
    z, stats = units[term](params, extra, rows)
    if deep:
      kept = {term: (z[:, :clusters.CROPS], rows['id'])}
      told = {f'clusters/{term}_{k}': v for k, v in extra[term]['told'].items()}
      return clusters.loss(extra[term], z, rows['id'], j.temp), stats, kept, told
    cosines = lambda x: of('head', params, x, method='cosines') if term == 'intra' else of('prototypes', params, x)
    logits = cosines(z).swapaxes(0, 1)
    names = (f'clusters/{term}_{k}' for k in ('entropy', 'batch_entropy', 'used'))
    told = dict(zip(names, collapse.choices(jax.lax.stop_gradient(logits), j.temp)))
    swapped = lambda queue=None: clustering.swapped_loss(logits, range(clusters.CROPS), j.temp, j.eps, j.rounds,
                                                         queue)[0]
    if term not in queues:
      return swapped(), stats, {}, told
    former = extra[term]
    value = jax.lax.cond(clusters.full(former), lambda: swapped(cosines(former['bank_rows'])), swapped)
    return value, stats, {term: (jax.lax.stop_gradient(z[:, :clusters.CROPS]), rows['id'])}, told

  def mask(params, extra, rows):
    z = jax.lax.stop_gradient(slices(params, extra, rows['ct'])[0])
    d = z.shape[2]
    draw = lambda k: deformable.draw_mask(k, jnp.ones(d, bool), j.mask_ratio)
    hidden = jax.vmap(draw)(view_keys(rows['rng'], 1)[:, 0])           # [B, D], both views alike
    given = of('mask', params, z, mask=jnp.broadcast_to(hidden[:, None], z.shape[:3]), method='hide')
    pred = of('mask', params, transformed(params, given, rows['rng']))
    loss = importlib.import_module(MASK_LOSS[j.mask_loss]).masked_slices
    return loss(pred.swapaxes(0, 1), z.swapaxes(0, 1), hidden), {}, {}, {}

  losses = {'mask': mask} | {t: functools.partial(clustered, t) for t in units}
  even = lambda counts: sum(map(math.log, counts)) / len(counts)
  chances = {'intra': even(j.image_clusters if deep else (config.head.out_dim,)),
             'inter': even(j.volume_clusters if deep else (j.prototypes,))}

  def phase(name):
    def loss(params, extra, rows, key, step):
      found = {t: losses[t](params, extra, rows[STREAM[t]]) for t in TERMS[name]}
      told = dict(kv for *_, told in found.values() for kv in told.items())
      value, aux = weighted({f'{t}_loss': (1., found[t][0]) for t in found}, {}, told)
      stats = [s for _, s, *_ in found.values() if s]
      mean = jax.tree.map(lambda *x: sum(x) / len(x), *stats) if stats else {}
      return value, Aux(mean, dict(kv for *_, kept, _ in found.values() for kv in kept.items()), aux.metrics)

    def update(group, step):
      if not any(group in TRAINS[t] for t in TERMS[name]):
        return SKIP
      return jnp.where(step < begins[name] + j.freeze_prototypes, SKIP, TRAIN) if 'prototypes' in group else TRAIN
    streams = {STREAM[t]: batch[STREAM[t]] for t in TERMS[name]}
    chance = {f'train/{t}_loss': chances[t] for t in TERMS[name] if t in chances}
    return Phase(streams, loss, update, chance, couples_samples=name != 'mask', fresh_optimiser=True)

  def place(step):
    """(number of the phase, step since it began)."""
    xp = jnp if isinstance(step, jax.Array) else np
    at = (xp.asarray(step)[..., None] >= xp.asarray(starts)).sum(-1) - 1
    return at, step - xp.asarray(starts)[at]

  def stretched(step):
    """Every phase has the whole schedule: its steps are laid over all places."""
    at, inside = place(step)
    xp = jnp if isinstance(step, jax.Array) else np
    return xp.floor(inside * xp.asarray(total / np.maximum(np.diff([*starts, total]), 1))[at])

  def factor(step):
    """Of the learning rate, in the phase of this step."""
    xp = jnp if isinstance(step, jax.Array) else np
    return xp.asarray(j.rates or (1.,) * len(starts))[place(step)[0]]

  def due(step):
    """Terms whose epoch begins at this step."""
    at, inside = place(step)
    return [t for t in TERMS[j.phases[at]] if t in turns and inside % turns[t] == 0]

  def schedule(step):
    name = j.phases[place(step)[0]]
    if step == begins[name]:
      return name, ('phase', name)
    return name, ('epoch', step // steps_per_epoch) if step % steps_per_epoch == 0 or due(step) else None

  def post(params, extra, aux, step):
    extra, inside = extra | aux.mean, place(step)[1]
    return extra | {t: clusters.write(extra[t], *kept, inside % places[t]) for t, kept in aux.rows.items()}

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def filled(term, params, bank, others, rows, turn):
    z, _ = units[term](params, others, rows)
    return clusters.write(bank, z[:, :clusters.CROPS], rows['id'], turn)

  def between(state, step, read, boundary):
    """Clusters of the last epoch; before the first one of a phase the bank is filled by a pass without training."""
    extra, key = state.extra, jax.random.fold_in(jax.random.key(config.seed), step)
    for t in due(step):
      bank, others = extra[t], {k: x for k, x in extra.items() if k == 'batch_stats'}
      if boundary[0] == 'phase':
        at = jax.tree.map(lambda x: x.sharding, bank)
        bank = jax.tree.map(jnp.copy, bank)
        for turn, rows in enumerate(read(STREAM[t])):
          bank = filled(t, state.params, bank, others, rows, turn)
        bank = jax.device_put(bank, at)
      extra = extra | {t: clusters.renewed(bank, key, j.kmeans_rounds)}
    return state._replace(extra=extra)

  def groups(name):
    part, _, rest = name.partition('/')
    if part == 'backbone':
      return 'encoder' if counts_batches or rest.startswith('transformer/') and '3D' not in rest else 'fixed'
    if name.endswith('weight_g'):
      return 'fixed'
    return 'head_prototypes' if 'last_layer' in name else part

  def embed(weights, extra, rows):
    """{'ct': [B, V, ...], 'drr', 'xray': those present} -> the same names with [B, V, E]; of a volume the feature of
    the Transformer, or in a run that knows images alone the mean over its slices."""
    flat = lambda x: images(weights, extra, x)[0].embedding.reshape(*x.shape[:2], -1)

    def of_volumes(x):
      if volumes:
        return features(weights, slices(weights, extra, x)[0])
      b, v, d = x.shape[:3]
      grey = jnp.repeat(x.reshape(b, v * d, *x.shape[3:]), model.in_channels[0], -1)
      return flat(grey).reshape(b, v, d, -1).mean(2)
    return {k: of_volumes(x) if k == 'ct' else flat(x) for k, x in rows.items()}

  predict = {'embed': embed}
  if volumes:
    predict['slices'] = lambda weights, extra, rows: slices(weights, extra, rows['ct'])[0]      # [B, V, D, width]
  return Method(
      init=init, groups=groups, phases={n: phase(n) for n in dict.fromkeys(j.phases)}, schedule=schedule, post=post,
      weights={'student': lambda params, extra: params}, predict=predict, total_steps=total,
      steps_per_epoch=steps_per_epoch, between=between if banks else None,
      timeline=Timeline(stretched, total, lambda epochs: int(round(epochs * steps_per_epoch)), factor))


def check(config, records: dict) -> None:
  """Raises ValueError for phases that cannot be; warns of codes that must be almost even."""
  j, size = config.joint, config.views.ct.size
  for leaf, known in (('objective', ('swav', 'deepcluster')), ('mask_loss', tuple(MASK_LOSS))):
    if j[leaf] not in known:
      raise ValueError(f'joint.{leaf}="{j[leaf]}" unknown: use one of {", ".join(known)}')
  if unknown := set(j.phases) - set(TERMS):
    raise ValueError(f'joint.phases: "{min(unknown)}" unknown: use some of {", ".join(TERMS)}')
  if len(set(j.phases)) != len(j.phases) or len(j.phases) != len(j.shares) or abs(sum(j.shares) - 1) > 1e-6:
    raise ValueError(f'joint.phases={tuple(j.phases)}, joint.shares={tuple(j.shares)}: every phase comes once and has '
                     'a share of the steps, together 1')
  if j.rates and len(j.rates) != len(j.phases):
    raise ValueError(f'joint.rates={tuple(j.rates)}: one for each of joint.phases={tuple(j.phases)}, or ()')
  terms = {t for p in j.phases for t in TERMS[p]}
  streams = {STREAM[t] for t in terms}
  for s in ('ct', 'xray'):
    if bool(config.phases[s]) != (s in streams):
      raise ValueError(f'phases.{s}={config.phases[s]}: with joint.phases={tuple(j.phases)} it must be '
                       f'{int(s in streams)}')
  if 'ct' in streams and j.inter.kind == 'dat':
    leaf, length = ('views.ct.size', size[0]) if j.inter.axis == 'slice' else ('joint.width', j.width)
    step = j.inter.downsample
    if length % step:
      what = f'{length} slices of views.ct.size={tuple(size)}' if leaf != 'joint.width' else f'joint.width={length}'
      raise ValueError(f'{what} are no multiple of joint.inter.downsample={step}: use {length // step * step or step} '
                       f'or {-(-length // step) * step}')
  if 'ct' in streams and j.inter.axis == 'feature' and j.inter.slices != size[0]:
    raise ValueError(f'joint.inter.axis="feature" is made for joint.inter.slices={j.inter.slices}, views.ct.size='
                     f'{tuple(size)} has {size[0]}: let them be equal')
  if 'ct' in streams and (j.slice_parts < 1 or size[0] % j.slice_parts):
    fit = ', '.join(str(n) for n in range(1, size[0] + 1) if size[0] % n == 0)
    raise ValueError(f'joint.slice_parts={j.slice_parts} does not divide the {size[0]} slices of views.ct.size='
                     f'{tuple(size)}: use one of {fit}')
  if 'intra' in terms and j.local.crops:
    try:
      models.build(config.model).check((j.local.size,) * 2, config.model.in_channels[0])
    except ValueError as e:
      raise ValueError(f'joint.local.size: {e}') from e
  if j.objective == 'deepcluster':
    for leaf, term in (('image_clusters', 'intra'), ('volume_clusters', 'inter')):
      if term in terms and (not j[leaf] or not 0 < max(j[leaf]) <= records[STREAM[term]]):
        raise ValueError(f'joint.{leaf}={tuple(j[leaf])}: a number for every head, none above the '
                         f'{records[STREAM[term]]} records of data.{STREAM[term]}')
    return
  for leaf, term, k, queue in (('head.out_dim', 'intra', config.head.out_dim, 'image_queue'),
                               ('joint.prototypes', 'inter', j.prototypes, 'volume_queue')):
    b, held = config.batch[STREAM[term]], j[queue]
    if term in terms and (held % b or held < 0):
      raise ValueError(f'joint.{queue}={held} rows are no multiple of batch.{STREAM[term]}={b}: use '
                       f'{max(held, 0) // b * b} or {(max(held, 0) // b + 1) * b}')
    if term in terms and k > b + held:
      logging.warning('%s=%d prototypes for batch.%s=%d and joint.%s=%d: none gets a whole sample, so that the codes '
                      'are almost even. FIX: joint.%s=%d, or at most %d prototypes', leaf, k, STREAM[term], b, queue,
                      held, queue, -(-(k - b) // b) * b, b + held)
