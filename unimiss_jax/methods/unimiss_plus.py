"""UniMiSS+: one pyramid U-shaped Transformer for CT, their DRR and slices, and X-rays.

CT phase      self-distillation CT->CT, DRR->CT, slices->CT (optionally slices->slices and CT->slices, as in the pilot
              UniMiSS); reconstruction of CT and DRR
X-ray phase   self-distillation and reconstruction of real radiographs
(after the released code of UniMiSS+, Xie et al. 2024; loss weights in configs/unimiss_plus.py).
Optional terms of our own: InfoNCE between two views of an instance and between a CT and its DRR; KoLeo; input with
hidden blocks, and reconstruction of these or distillation of their tokens (iBOT, Zhou et al. 2022); SimDINO's coding
rate in place of prototypes; Sinkhorn rounds over the rows of one teacher's modality in place of the moving centre (as
in DINOv2).
A term of weight 0 is not built; without self-distillation there is no teacher and no centre.
"""
import importlib
import math
from functools import partial

import jax
import jax.numpy as jnp

from unimiss_jax import models
from unimiss_jax.losses import clustering, collapse, contrastive, distillation, masking, reconstruction, spread
from unimiss_jax.methods import alternation, objective
from unimiss_jax.methods.base import Aux, Method, Phase, view_keys, weighted
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.optim import SKIP, TRAIN, ZERO, cosine_schedule

DISTILL = ('ct', 'drr', 'slice', 'slice_slice', 'ct_slice', 'xray')
RECONSTRUCT = ('recon_ct', 'recon_drr', 'recon_xray')
FREEZE_3D = {'mask': SKIP, 'zero_grad': ZERO, 'none': TRAIN}
PATCH_ROUNDS = 3      # of Sinkhorn, as in DINOv2
CENTER_UPDATES = {'once': 'unimiss_jax.losses.distillation', 'sequential': 'unimiss_jax.losses.reference'}


def make(config, data, times=alternation.paired) -> Method:
  """The method; times: (config, data) -> when what happens, an `alternation.Times`."""
  loss, more, batch, speed = config.loss, config.extra_loss, config.batch, config.speed
  objective.check_terms(loss, config.phases)
  objective.check_masks(more.mask_ratio)
  objective.check_patches(config)
  distils, masks = any(loss[k] for k in DISTILL), any(more.mask_ratio)
  prototypes = distils and not more.coding_rate
  reconstructs = any(loss[k] for k in RECONSTRUCT)
  times = times(config, data)

  model = models.build(config.model)
  if model.embeds_in_decoder and (reconstructs or masks):
    raise ValueError(f'model.name={config.model.name!r} reconstructs nothing: set loss.recon_ct, loss.recon_drr, '
                     'loss.recon_xray and extra_loss.mask_ratio to 0, or use mit_plus')
  objective.check_local(config, model)
  h = config.head
  head = DINOHead(out_dim=h.out_dim, hidden_dim=h.hidden_dim, bottleneck_dim=h.bottleneck_dim, last_layer=prototypes,
                  linear_init=config.model.get('init', 'released'), dtype=config.model.dtype)
  embed_dim = model.embedding_dim()
  ema_schedule = cosine_schedule(config.ema.momentum, config.ema.momentum_end, times.timeline.total, 0)
  power = batch.ct / config.ema.reference_batch if config.ema.reference_batch else 1.
  momentum = lambda step: ema_schedule(times.timeline.place(step))**power
  teacher_temp = distillation.temperature_schedule(
      loss.warmup_teacher_temp, loss.teacher_temp, loss.teacher_temp_warmup, times.steps_per_epoch)
  centers = importlib.import_module(CENTER_UPDATES[loss.center_updates])

  def init(key, params=None):
    if params is None:
      k_backbone, k_head = jax.random.split(key)
      params = {'backbone': models.init_params(model, k_backbone),
                'head': head.init(k_head, jnp.zeros((1, embed_dim)))['params']}
    if not distils:
      return params, {}
    return params, {'teacher': jax.tree.map(jnp.copy, params), 'center': jnp.zeros((1, h.out_dim))}

  def backbone(params, x, keys=None, decode=False):
    return model.apply({'params': params['backbone']}, x, train=keys is not None,
                       decode=decode or model.embeds_in_decoder, row_keys=keys)

  def views(params, x, keys, decode):
    """x [B, V, ...], keys [B, V] -> embedding [B, V, E], reconstruction [B, n, ...] of the first n = decode views or
    None, tokens [B, V, *grid, E] of the coarsest map. Sample-major: rows stay on their device."""
    decode = decode and (decode, x.shape[1])
    out = backbone(params, x.reshape(-1, *x.shape[2:]), keys.reshape(-1), decode)
    image = out.reconstruction
    image = None if image is None else image.reshape(len(x), -1, *image.shape[1:])
    return out.embedding.reshape(*x.shape[:2], -1), image, unfolded(out.pyramid[-1], x)

  def unfolded(a, x):
    return a.reshape(*x.shape[:2], *a.shape[1:])

  def of_head(params, x, method=None):      # [..., E] -> [..., K]
    flat = head.apply({'params': params['head']}, x.reshape(-1, x.shape[-1]), method=method)
    return flat.reshape(*x.shape[:-1], -1)

  def project(params, embedding):    # [B, 2, E] -> [2, B, D], the head's MLP output
    z = of_head(params, embedding, 'project')
    if h.batch_standardize:
      z = contrastive.standardize(z.reshape(-1, z.shape[-1])).reshape(z.shape)
    return z.swapaxes(0, 1)

  def distil(student, teacher, center, step):
    if not prototypes:
      return spread.simdino(student.swapaxes(0, 1), teacher.swapaxes(0, 1), more.coding_rate), center
    return distillation.dino_loss(
        student.swapaxes(0, 1), teacher.swapaxes(0, 1), center, student_temp=loss.student_temp,
        teacher_temp=sharpness(step), center_momentum=1. if more.sinkhorn else loss.center_momentum)

  def parts(params, small, rng, t, center, step):
    """Small crops [B, V, h, w, 3], whose student follows each view of the teacher, logits t [B, 2, K]."""
    n = small.shape[1]
    e, *_ = views(params, small, view_keys(rng, 2 + n)[:, 2:], 0)
    return distillation.cross_entropy(of_head(params, e)[:, :, None], t[:, None], center, loss.student_temp,
                                      sharpness(step)).mean()

  def views_loss(z, group):          # z [2, B, D], group [B]: tiles of one scan are not each other's negatives
    if loss.shuffle_pairs:           # the control: view 1 of another instance; the own one is no candidate at all
      z, group = jnp.stack([z[0], jnp.roll(z[1], 1, axis=0)]), jnp.stack([group, jnp.roll(group, 1)])
    return contrastive.nt_xent(z, loss.nce_temp, group)

  def gap(z):      # of the pairs that views_loss compares
    return contrastive.gap(z[0], jnp.roll(z[1], 1, axis=0) if loss.shuffle_pairs else z[1])

  def teach(extra, x, step):
    """Teacher logits of two views [B, 2, ...] (their slices: [B, 2 * S, ...], averaged), log codes after Sinkhorn
    rounds, or embeddings where no prototypes compare them; as little of the network as gives an embedding. And the
    tokens of the coarsest map [B, 2 (* S), *grid, E]."""
    out = backbone(extra['teacher'], x.reshape(-1, *x.shape[2:]))
    embedding = out.embedding.reshape(len(x), 2, *((-1,) if x.shape[1] > 2 else ()), embed_dim)
    tokens = unfolded(out.pyramid[-1], x)
    if not prototypes:
      return jax.lax.stop_gradient(embedding if embedding.ndim == 3 else spread.unit(embedding).mean(2)), tokens
    t = jax.lax.stop_gradient(students(extra['teacher'], {'t': embedding}, teacher_temp(step))['t'])
    return codes(t, step, more.sinkhorn) if more.sinkhorn else t, tokens

  def codes(t, step, rounds):
    return clustering.log_sinkhorn(t.reshape(-1, h.out_dim), teacher_temp(step), rounds).reshape(t.shape)

  def patches(params, extra, tokens, seen, mask, step):
    """Tokens of the student where blocks are hidden from it, against those of the teacher, who sees them; the same
    head. As in DINOv2 Sinkhorn rounds, over all tokens (chosen by us; there: the hidden ones), and no centre."""
    t = jax.lax.stop_gradient(codes(of_head(extra['teacher'], seen), step, more.sinkhorn or PATCH_ROUNDS))
    wrong = distillation.cross_entropy(of_head(params, tokens), t, 0., loss.student_temp, 1.)
    gone = masking.of_cells(mask, tokens.shape[2:-1])
    return distillation.mean_of_hidden(*(a.reshape(-1, math.prod(a.shape[2:])) for a in (wrong, gone))).mean()

  def sharpness(step):       # log codes are sharpened already
    return 1. if more.sinkhorn else teacher_temp(step)

  def of_teacher(t, center, step):
    if not prototypes:       # embeddings, which no temperature and no centre touch
      return {'train/momentum': momentum(step)}
    return {'train/momentum': momentum(step), 'train/teacher_temp': teacher_temp(step)} | collapse.teacher(
        t, center, sharpness(step))

  def hidden(x, rng):
    """[B, V, *S, C] -> what the student is shown of it, and where it is hidden [B, V, *S] or None."""
    if not masks:
      return x, None
    keys = jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, 1)))(view_keys(rng, x.shape[1]))    # 0: drop-path
    block = more.mask_block[-(x.ndim - 3):]
    mask = jax.vmap(jax.vmap(lambda k: masking.blocks(k, x.shape[2:-1], block, more.mask_ratio)))(keys)
    return jax.vmap(jax.vmap(masking.hide))(x, mask), mask

  def rebuilt(raw, target, mask):
    return reconstruction.sigmoid_mse(raw, target) if mask is None else masking.sigmoid_mse(raw, target, mask)

  def apart(e):      # [B, 2, E]: the two views of one instance are not to be kept apart
    return (spread.koleo(e[:, 0]) + spread.koleo(e[:, 1])) / 2

  def slices(ct):
    """Every n-th slice of each sequence of a CT crop as an image: [B, 2, D, H, W, C] -> [B, 2 * S, H, W, 3]."""
    x = ct[:, :, ::loss.slices]                                            # [B, 2, S, H, W, C]
    if loss.slice_intensity == 'minmax':
      x = reconstruction.minmax(x, loss.recon_minmax_eps, axes=(2, 3, 4))
    x = jnp.moveaxis(x, -1, 3).reshape(len(x), -1, *x.shape[3:5], 1)
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))

  def pictures(params, rows):
    """What the 2-D branch makes of a CT: embeddings of DRR [B, 2, E], their reconstruction, embeddings of slices
    [B, 2, S, E]; None for what no loss looks at."""
    keys = partial(view_keys, rows['rng'])
    drr, r_drr, cut = None, None, None
    if loss.drr or loss.recon_drr or loss.pair_nce:
      drr = rows['drr']
    if loss.slice or loss.slice_slice:
      cut = slices(rows['ct'])
    decode = 2 * bool(loss.recon_drr)
    if drr is not None and cut is not None and speed.shared_2d and drr.shape[2:] == cut.shape[2:]:
      both = jnp.concatenate([drr, cut], 1), jnp.concatenate([keys(2), keys(cut.shape[1])], 1)
      e, r_drr, _ = views(params, *both, decode)
      drr, cut = e[:, :2], e[:, 2:]
    else:
      if drr is not None:
        drr, r_drr, _ = views(params, drr, keys(2), decode)
      if cut is not None:
        cut, *_ = views(params, cut, keys(cut.shape[1]), 0)
    return drr, r_drr, cut if cut is None else cut.reshape(len(cut), 2, -1, embed_dim)

  def pooled(x, temperature):      # logits of slices [B, 2, S, K]
    return distillation.mean_probability(x, temperature, 2) if loss.slice_pool == 'probability' else x.mean(2)

  def students(params, e: dict, temperature=loss.student_temp) -> dict:
    """{name: embeddings [B, 2, E], of slices [B, 2, S, E]} -> {name: logits [B, 2, K]}, the mean over slices.

    The last layer is linear: unit vectors may be averaged before it, and all names may pass it together.
    """
    if not prototypes:
      return {k: v if v.ndim == 3 else spread.unit(v).mean(2) for k, v in e.items()}
    if loss.slice_pool == 'feature':
      e = {k: v if v.ndim == 3 else v.mean(2) for k, v in e.items()}
    if not speed.shared_head or loss.slice_pool == 'probability':
      x = {k: of_head(params, v) for k, v in e.items()}
      return {k: v if v.ndim == 3 else pooled(v, temperature) for k, v in x.items()}
    z = {k: of_head(params, v, 'unit') for k, v in e.items()}
    z = jnp.stack([v if v.ndim == 3 else v.mean(2) for v in z.values()], 1)      # [B, names, 2, D]
    return dict(zip(e, jnp.moveaxis(of_head(params, z, 'cosines'), 1, 0)))

  def ct_loss(params, extra, batch, key, step):
    rows = batch['ct']
    terms, mean = {}, {}
    x_ct, m_ct = hidden(rows['ct'], rows['rng'])
    x_drr, m_drr = hidden(rows['drr'], jax.random.key_data(view_keys(rows['rng'], 1))[:, 0]) if 'drr' in rows else (
        None, None)      # other places than of the CT
    e_ct, r_ct, tokens = views(params, x_ct, view_keys(rows['rng'], 2), 2 * bool(loss.recon_ct))
    metrics = embedding_health(e_ct)
    e_drr, r_drr, e_slice = pictures(params, rows | {'drr': x_drr})
    on = {name: term for name, term in objective.ct_terms(loss).items() if term[0]}
    if on:
      shown = {'ct': lambda: rows['ct'], 'slice': lambda: slices(rows['ct'])}
      t = {name: teach(extra, shown[name](), step) for name in dict.fromkeys(teacher for *_, teacher in on.values())}
      t, seen = ({name: both[i] for name, both in t.items()} for i in (0, 1))
      metrics |= of_teacher(next(iter(t.values())), extra['center'], step)
      e = {'ct': e_ct, 'drr': e_drr, 'slice': e_slice}
      s = students(params, {name: e[name] for name in dict.fromkeys(student for _, student, _ in on.values())})
      center, after = extra['center'], {}      # of each teacher
      for name, (weight, student, teacher) in on.items():
        value, after[teacher] = distil(s[student], t[teacher], center, step)
        center = centers.center_of_next(center, after[teacher])
        terms[f'{name}_loss'] = (weight, value)
      mean['center'] = centers.center_of_step(list(after.values()))
      metrics |= divergence(terms, metrics)
    if more.patch:
      terms['patch_loss'] = (more.patch, patches(params, extra, tokens, seen['ct'], m_ct, step))
    if loss.recon_ct:
      target = reconstruction.minmax(rows['ct'], loss.recon_minmax_eps, axes=(2, 3, 4))
      metrics |= reconstruction.baselines('ct', target)
      terms['recon_ct_loss'] = (loss.recon_ct, rebuilt(r_ct, target, m_ct))
    if loss.recon_drr:
      metrics |= reconstruction.baselines('drr', rows['drr'])
      terms['recon_drr_loss'] = (loss.recon_drr, rebuilt(r_drr, rows['drr'], m_drr))
    if more.koleo:
      terms['koleo_loss'] = (more.koleo, apart(e_ct))
    if loss.nce or loss.pair_nce:
      z_ct = project(params, e_ct)
    if loss.nce:
      terms['nce_loss'] = (loss.nce, views_loss(z_ct, rows['group']))
      metrics['collapse/nce_gap'] = gap(z_ct)
    if loss.pair_nce:
      z_drr = project(params, e_drr)
      partner = jnp.roll(z_drr, 1, axis=1) if loss.shuffle_pairs else z_drr
      scan = None if loss.shuffle_pairs else rows['group']
      pair = partial(contrastive.info_nce, log_scale=-math.log(loss.nce_temp), report_id=scan)
      metrics['collapse/pair_nce_gap'] = contrastive.gap(z_ct[0], partner[0])
      terms['pair_nce_loss'] = (loss.pair_nce, (pair(z_ct[0], partner[0]) + pair(z_ct[1], partner[1])) / 2)
    return weighted(terms, mean, metrics)

  def xray_loss(params, extra, batch, key, step):
    rows = batch['xray']
    terms, mean = {}, {}
    x, mask = hidden(rows['xray'], rows['rng'])
    e, r, tokens = views(params, x, view_keys(rows['rng'], 2), 2 * bool(loss.recon_xray))
    metrics = embedding_health(e)
    if loss.xray:
      t, seen = teach(extra, rows['xray'], step)
      metrics |= of_teacher(t, extra['center'], step)
      value, mean['center'] = distil(of_head(params, e) if prototypes else e, t, extra['center'], step)
      share = 1 / (1 + more.local.crops)      # of the two views in the pairs of a student's crop and a teacher's view
      terms['dino_loss'] = (loss.xray * share, value)
      metrics |= divergence(terms, metrics)
      if more.local.crops:
        small = parts(params, rows['local'], rows['rng'], t, extra['center'], step)
        terms['local_loss'] = (loss.xray * (1 - share), small)
      if more.patch:
        terms['patch_loss'] = (more.patch, patches(params, extra, tokens, seen, mask, step))
    if loss.recon_xray:
      metrics |= reconstruction.baselines('xray', rows['xray'])
      terms['recon_xray_loss'] = (loss.recon_xray, rebuilt(r, rows['xray'], mask))
    if more.koleo:
      terms['koleo_loss'] = (more.koleo, apart(e))
    if loss.nce:
      z = project(params, e)
      metrics['collapse/nce_gap'] = gap(z)
      terms['nce_loss'] = (loss.nce, views_loss(z, rows['group']))
    return weighted(terms, mean, metrics)

  def joint_loss(params, extra, batch, key, step):
    """Both phases in one step: the losses add up, the centre sees the mean of both teachers."""
    l_ct, a_ct = ct_loss(params, extra, batch, key, step)
    l_x, a_x = xray_loss(params, extra, batch, key, step)
    centers = [a.mean['center'] for a in (a_ct, a_x) if 'center' in a.mean]
    mean = {'center': sum(centers) / len(centers)} if centers else {}
    return l_ct + l_x, Aux(mean, {}, a_ct.metrics | of_xray(a_x.metrics) | {'train/loss': l_ct + l_x})

  def update(phase):
    def mode(group, step):
      if group == '3d' and phase == 'xray':
        return FREEZE_3D[config.optim.freeze_3d]
      if group == 'last_layer':
        return jnp.where(step < times.until(config.optim.freeze_last_layer), SKIP, TRAIN)
      return TRAIN
    return mode

  def groups(name):
    decoder = name.startswith('backbone/') and not name.startswith('backbone/transformer/')
    if name.endswith('weight_g') or decoder and not (reconstructs or model.embeds_in_decoder):
      return 'fixed'
    if name.startswith('head/') and not (prototypes or loss.nce or loss.pair_nce):
      return 'fixed'
    return '3d' if '3D' in name else 'last_layer' if 'last_layer' in name else 'rest'

  def post(params, extra, aux, step):
    if not distils:
      return extra
    m = momentum(step)
    ema = lambda t, p: (m * t + (1 - m) * p).astype(t.dtype)
    return {'teacher': jax.tree.map(ema, extra['teacher'], params),
            'center': aux.mean.get('center', extra['center'])}

  def embed(weights, extra, batch):
    """{'ct': [B, V, ...], 'drr', 'xray': those present} -> the same names with [B, V, E]."""
    one = lambda x: backbone(weights, x.reshape(-1, *x.shape[2:])).embedding.reshape(*x.shape[:2], -1)
    return {k: one(x) for k, x in batch.items()}

  def compare(weights, extra, batch):
    """{name: embeddings [B, V, E]} -> {name: [B, V, D]}: the space in which the losses compare views."""
    return {k: of_head(weights, e, 'project') for k, e in batch.items()}

  def reconstruct(weights, extra, batch):
    """As embed, but the reconstruction in [0, 1], shaped like the input."""
    one = lambda x: jax.nn.sigmoid(
        backbone(weights, x.reshape(-1, *x.shape[2:]), decode=True).reconstruction).reshape(x.shape)
    return {k: one(x) for k, x in batch.items() if loss[f'recon_{k}']}

  chance = {n: objective.chance(config, batch[n], n) for n in ('ct', 'xray')}
  build = {'ct': Phase({'ct': batch.ct}, ct_loss, update('ct'), chance['ct']),
           'xray': Phase({'xray': batch.xray}, xray_loss, update('xray'), chance['xray']),
           'joint': Phase({'ct': batch.ct, 'xray': batch.xray}, joint_loss, update('joint'),
                          chance['ct'] | of_xray(chance['xray']))}
  couples = bool(loss.nce or loss.pair_nce or loss.center_updates != 'once' or more.koleo or more.coding_rate or
                 more.sinkhorn or more.patch)
  return Method(
      init=init, groups=groups, schedule=times.at, post=post,
      phases={n: build[n]._replace(couples_samples=couples) for n in times.names},
      weights={'student': lambda params, extra: params}
      | ({'teacher': lambda params, extra: extra['teacher']} if distils else {}),
      predict={'embed': embed} | ({'project': compare} if prototypes or loss.nce or loss.pair_nce else {})
      | ({'reconstruct': reconstruct} if reconstructs else {}),
      total_steps=times.total_steps, steps_per_epoch=times.steps_per_epoch, timeline=times.timeline)


def embedding_health(e):
  """Scalars of embeddings [B, 2, E]."""
  flat = jax.lax.stop_gradient(e.reshape(-1, e.shape[-1]))
  return {'collapse/feature_std': collapse.feature_std(flat), 'collapse/rankme': collapse.rankme(flat)}


def divergence(terms, metrics) -> dict:
  """What the cross-entropy of the two views has beside the teacher's own entropy: the mean of KL(teacher | student)."""
  if 'dino_loss' not in terms or 'collapse/teacher_entropy' not in metrics:
    return {}
  return {'collapse/kl': terms['dino_loss'][1] - metrics['collapse/teacher_entropy']}


def of_xray(metrics) -> dict:
  """Names of X-ray metrics beside those of CT in one row: 'train/xray_nce_loss'."""
  return {k.replace('/', '/xray_', 1): v for k, v in metrics.items()}
