"""UniMedI: pictures and volumes of different patients share one ViT, and meet through their reports.

One step holds two static sub-batches, X-rays and CT, each with its report. A slowly moving teacher looks at a whole
volume; the planes that its class token looks at most enter the volume's sequence a second time, as pictures.

vl    image-text: InfoNCE (or SigLIP) over all pairs of the step, X-rays and CT together
icl   self-distillation of the class token: the student does not see all tokens, the teacher does
pcl   self-distillation of the tokens that are hidden from the student
(He et al., ECCV 2024; there is no released code: what its text leaves open is chosen by us, see configs/unimedi.py.)
A term of weight 0 is not built.
"""
import math
import re

import jax
import jax.numpy as jnp
from etils import epath

from unimiss_jax import models
from unimiss_jax.losses import collapse, contrastive, distillation
from unimiss_jax.methods.base import Method, Phase, view_keys, weighted
from unimiss_jax.models import slices
from unimiss_jax.models.bert import Bert
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.models.vit import ViT, class_rows
from unimiss_jax.optim import SKIP, TRAIN, cosine_schedule, named_leaves
from unimiss_jax.porting import PortingError, bert, vit

MAX_LOG_SCALE = math.log(100)
SIGLIP_START = math.log(10), -10.      # log scale, bias; Zhai et al. 2023
STREAMS = ('xray', 'ct')               # in this order everywhere
CHOICES = {'vl_kind': ('info_nce', 'siglip'), 'vl_scope': ('joint', 'per_modality'), 'pcl_domain': ('hidden', 'all'),
           'hidden_mode': ('replace', 'drop'),
           'select': ('teacher', 'random', 'spread'), 'slice_of_plane': ('middle', 'random'),
           'score_layers': slices.LAYERS, 'score_keys': slices.KEYS}
STUDENT_KEYS, HIDDEN_KEY, SLICE_KEY, PLANE_KEY = range(4)      # of the keys of a row


def make(config, data) -> Method:
  u, batch, h = config.unimedi, config.batch, config.head
  model = models.build(config.model)
  check(config, model)
  names = [s for s in STREAMS if s in data]
  distils = bool(u.icl or u.pcl)
  leading = next(iter(data))                  # CT, where there is CT
  steps_per_epoch = max(data[leading][0] // batch[leading], 1)
  total = config.steps or config.epochs * steps_per_epoch
  width, depth = config.model.embed_dims[0], config.model.patch_depth
  fields, text_weights = text_tower(config)
  given = lambda: text_weights | vision_weights(config, model)
  text = Bert(**fields, dtype=config.model.dtype)
  head = DINOHead(h.out_dim, h.hidden_dim, h.bottleneck_dim, linear_init=config.model.init, dtype=config.model.dtype)
  momentum = cosine_schedule(config.ema.momentum, config.ema.momentum_end, total, 0)
  taught = ('backbone', 'head') if distils else ('backbone',)      # what the teacher has; no text tower

  def init(key, params=None):
    if params is None:
      keys = jax.random.split(key, 5)
      project = lambda key, n: {'kernel': jax.random.normal(key, (n, u.embed_dim)) * n**-0.5}
      scale, bias = SIGLIP_START if u.vl_kind == 'siglip' else (-math.log(u.temp), None)
      params = {'backbone': models.init_params(model, keys[0]), 'text': models.init_params(text, keys[1]),
                'vision_proj': project(keys[2], width), 'text_proj': project(keys[3], fields['hidden_size']),
                'log_scale': jnp.full((), scale)} | ({} if bias is None else {'logit_bias': jnp.full((), bias)})
      if distils:
        params['head'] = head.init(keys[4], jnp.zeros((1, width)))['params']
    extra = {'teacher': {k: jax.tree.map(jnp.copy, params[k]) for k in taught}}
    if distils:
      extra |= {'center': jnp.zeros((1, h.out_dim)), 'center_patch': jnp.zeros((1, 1, h.out_dim))}
    return params, extra

  def encode(params, given, keys=None, hidden=None, kept=None):
    return model.apply({'params': params['backbone']}, **given, hidden=hidden, kept=kept, train=keys is not None,
                       row_keys=keys, method='encode')

  def of_head(params, x):      # [..., C] -> [..., K]
    flat = head.apply({'params': params['head']}, x.reshape(-1, x.shape[-1]))
    return flat.reshape(*x.shape[:-1], -1)

  def planes_of(extra, volume, keys, step):
    """The chosen planes of each volume, [B, k] int32; no gradient passes."""
    planes = volume.shape[1] // depth
    evenly = jnp.broadcast_to(slices.spread(planes, u.slices), (len(volume), u.slices))
    if u.select == 'spread':
      return evenly
    if u.select == 'random':
      s = jax.vmap(lambda key: jax.random.uniform(key, (planes,)))(keys)
    else:
      _, rows = class_rows(model, jax.lax.stop_gradient(extra['teacher']['backbone']), volume=volume)
      _, s = slices.scores(rows, planes, u.score_layers, u.score_keys)
    return jnp.where(step < u.warmup_steps, evenly, slices.select(s, u.slices))

  def sequence(extra, name, rows, step):
    """What `encode` is given of one stream's rows."""
    x = rows[name][:, 0]
    if name == 'xray':
      return {'image': x}
    keys = view_keys(rows['rng'], 4)
    planes = planes_of(extra, x, keys[:, PLANE_KEY], step)
    cut = (slices.random_slices(planes, depth, keys[:, SLICE_KEY]) if u.slice_of_plane == 'random' else
           slices.middles(planes, depth))
    return {'volume': x, 'slices': cut}

  def teach(extra, given):
    """Logits of class token [B, K] and of all tokens [B, P, K], and how much the class token looks at each, [B, P]."""
    teacher = jax.lax.stop_gradient(extra['teacher'])
    if u.guided:
      out, rows = class_rows(model, teacher['backbone'], **given)
      looks = rows[..., 1:].mean((1, 2))
    else:
      out, looks = encode(teacher, given), None
    return of_head(teacher, out.cls), of_head(teacher, out.patches), looks

  def written(params, rows):      # [B, D]
    out = text.apply({'params': params['text']}, rows['ids'], rows['mask'])
    return out.last[:, 0] @ params['text_proj']['kernel']

  def language(params, image, said, report, counts):
    """Image-text loss; rows of X-rays come first, counts of each stream."""
    if u.shuffle_reports:
      said, report = jnp.roll(said, 1, 0), jnp.roll(report, 1, 0)
    scale = jnp.clip(params['log_scale'], 0, MAX_LOG_SCALE)

    def one(image, said, report):
      if u.vl_kind == 'siglip':
        return contrastive.siglip(image, said, params['log_scale'], params['logit_bias'])
      return contrastive.info_nce(image, said, scale, report_id=report if u.multi_positive else None)
    if u.vl_scope == 'joint':
      return one(image, said, report)
    ends = [sum(counts[:i + 1]) for i in range(len(counts))]
    parts = [one(image[e - n:e], said[e - n:e], report[e - n:e]) * n for n, e in zip(counts, ends)]
    return sum(parts) / ends[-1]

  def loss(params, extra, batch, key, step):
    classes, each, teachers, patch_teachers, images = [], [], [], [], []
    for name in names:
      rows = batch[name]
      keys, given = view_keys(rows['rng'], 4), sequence(extra, name, rows, step)
      hidden = kept = None
      if distils:
        t_cls, t_patch, looks = teach(extra, given)
        hidden = hidden_tokens(keys[:, HIDDEN_KEY], t_patch.shape[1], u.hidden, looks)
        teachers.append(t_cls)
        patch_teachers.append(t_patch)
        if u.hidden_mode == 'drop':
          kept, hidden = visible(hidden, u.hidden), None
          t_patch = jnp.take_along_axis(t_patch, kept[..., None], 1)
      out = encode(params, given, keys[:, STUDENT_KEYS], hidden, kept)
      images.append(out.cls)
      if u.icl:
        classes.append(distillation.cross_entropy(of_head(params, out.cls), t_cls, extra['center'],
                                                  config.loss.student_temp, config.loss.teacher_temp))
      if u.pcl:
        ce = distillation.cross_entropy(of_head(params, out.patches), t_patch, extra['center_patch'],
                                        config.loss.student_temp, u.patch_teacher_temp)
        each.append(ce.mean(1) if kept is not None or u.pcl_domain == 'all' else
                    distillation.mean_of_hidden(ce, hidden))
    cls = jnp.concatenate(images)
    metrics = {'collapse/feature_std': collapse.feature_std(jax.lax.stop_gradient(cls)),
               'train/log_scale': params['log_scale']}
    terms, mean = {}, {}
    if u.vl:
      together = {k: jnp.concatenate([batch[n][k] for n in names]) for k in ('ids', 'mask', 'report')}
      looked, said = cls @ params['vision_proj']['kernel'], written(params, together)
      metrics['collapse/vl_gap'] = contrastive.gap(looked, jnp.roll(said, 1, 0) if u.shuffle_reports else said)
      terms['vl_loss'] = (u.vl, language(params, looked, said, together['report'], [len(x) for x in images]))
    if u.icl:
      terms['icl_loss'] = (u.icl, jnp.concatenate(classes).mean())
    if u.pcl:
      terms['pcl_loss'] = (u.pcl, jnp.concatenate(each).mean())
    if distils:
      metrics |= collapse.teacher(jnp.concatenate(teachers), extra['center'], config.loss.teacher_temp)
      m = config.loss.center_momentum
      mean = {'center': distillation.moved_center(extra['center'], teachers, m),
              'center_patch': distillation.moved_center(extra['center_patch'], patch_teachers, m)}
    return weighted(terms, mean, metrics)

  def groups(name):
    part, _, rest = name.partition('/')
    if name.endswith('weight_g') or (part == 'text' and frozen(rest, u.text.freeze_layers)):
      return 'fixed'
    if not u.vl and part in ('text', 'text_proj', 'vision_proj', 'log_scale', 'logit_bias'):
      return 'fixed'
    if 'mask_token' in rest and (not distils or u.hidden_mode == 'drop') or '3D' in rest and 'ct' not in names:
      return 'fixed'
    return 'last_layer' if 'last_layer' in name else 'text' if part == 'text' else 'rest'

  def update(group, step):
    if group != 'last_layer':
      return TRAIN
    return jnp.where(step < round(config.optim.freeze_last_layer * steps_per_epoch), SKIP, TRAIN)

  def post(params, extra, aux, step):
    m = momentum(step)
    ema = lambda t, p: (m * t + (1 - m) * p).astype(t.dtype)
    return extra | {'teacher': jax.tree.map(ema, extra['teacher'], {k: params[k] for k in taught})} | aux.mean

  def embed(weights, extra, batch):
    """{'ct': [B, V, ...], 'xray': those present} -> {stream: [B, V, C]}; slices as the teacher chooses them."""
    out = {}
    for name, x in batch.items():
      flat = x.reshape(-1, *x.shape[2:])
      given = {'image': flat}
      if name == 'ct':
        planes = planes_of(extra, flat, jax.random.split(jax.random.key(0), len(flat)), u.warmup_steps)
        given = {'volume': flat, 'slices': slices.middles(planes, depth)}
      out[name] = encode(weights, given).cls.reshape(*x.shape[:2], -1)
    return out

  project = lambda weights, extra, batch: {k: e @ weights['vision_proj']['kernel'] for k, e in batch.items()}

  def planes(weights, extra, batch):
    """{'ct': [B, V, ...]} -> {'ct': [B, V, k]}: the planes that the teacher chooses, whatever u.select says."""
    x = batch['ct']
    flat = x.reshape(-1, *x.shape[2:])
    n = flat.shape[1] // depth
    s = slices.scores(class_rows(model, extra['teacher']['backbone'], volume=flat)[1], n, u.score_layers,
                      u.score_keys)[1]
    return {'ct': slices.select(s, u.slices).reshape(*x.shape[:2], -1)}

  def read(weights, extra, batch):
    """{'ids', 'mask': [B, T]} -> {'text': [B, D]}."""
    return {'text': written(weights, batch)}

  pairs = sum(batch[n] for n in names)
  chance = {'train/vl_loss': math.log(pairs)} if u.vl and u.vl_kind == 'info_nce' and u.vl_scope == 'joint' else {}
  chance |= {f'train/{k}_loss': math.log(h.out_dim) for k in ('icl', 'pcl') if u[k]}
  return Method(
      init=init, groups=groups, post=post,
      phases={'joint': Phase({n: batch[n] for n in data}, loss, update, chance, couples_samples=True)},
      schedule=lambda step: ('joint', None if step % steps_per_epoch else ('epoch', step // steps_per_epoch)),
      weights={'student': lambda params, extra: params},
      predict={'embed': embed, 'project': project, 'text': read} | ({'planes': planes} if 'ct' in names else {}),
      total_steps=total, steps_per_epoch=steps_per_epoch, given=given)


def check(config, model) -> None:
  """Raises ValueError for a leaf that cannot work."""
  u = config.unimedi
  for name, allowed in CHOICES.items():
    if u[name] not in allowed:
      raise ValueError(f'unimedi.{name}="{u[name]}" unknown: use one of {", ".join(allowed)}')
  if not isinstance(model, ViT):
    raise ValueError(f'model.name={config.model.name}: a sequence of a volume and some of its slices needs a ViT, use '
                     'vit_b16 or vit_tiny')
  if not (u.vl or u.icl or u.pcl):
    raise ValueError('unimedi.vl, unimedi.icl and unimedi.pcl are all 0: give one of them a weight')
  if not 0 < u.hidden < 1 and (u.icl or u.pcl):
    raise ValueError(f'unimedi.hidden={u.hidden}: a share between 0 and 1')
  planes = config.views.ct.size[0] // config.model.patch_depth
  if config.phases.ct and not 0 < u.slices <= planes:
    raise ValueError(f'unimedi.slices={u.slices}: a volume of views.ct.size has {planes} planes, use 1 to {planes}')
  if config.data.place != 'host':
    raise ValueError(f'data.place="{config.data.place}": views of studies are made on the host; set data.place=host')
  if u.multi_positive and u.vl_kind == 'siglip':
    raise ValueError('unimedi.multi_positive=True, unimedi.vl_kind="siglip": positives of several reports are of '
                     'info_nce; set one of them otherwise')


def hidden_tokens(keys, count: int, share: float, looks=None):
  """[B, count] bool: which tokens the student does not see, the same number in every row.

  Args:
    keys: [B].
    count: tokens of a sequence.
    share: of them that are hidden.
    looks: [B, count]; those with the smallest values are hidden; None = random ones.
  """
  if looks is None:
    looks = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
  rank = jnp.argsort(jnp.argsort(looks, -1), -1)
  return rank < round(share * count)


def visible(hidden, share: float):
  """[B, K] int32: the tokens that `hidden_tokens` of this share leaves, in ascending order."""
  count = hidden.shape[1]
  return jnp.argsort(hidden, 1, stable=True)[:, :count - round(share * count)].astype(jnp.int32)


def frozen(name: str, layers: int) -> bool:
  """Whether a parameter of the text tower is not trained: of the first layers, and then the tables below them, too."""
  layer = re.match(r'layer_(\d+)/', name)
  return layers < 0 or (int(layer[1]) < layers if layer else layers > 0)


def vision_weights(config, model) -> dict:
  """{parameter name: array} of unimedi.vision_init. Raises ValueError for what it lacks."""
  path = config.unimedi.vision_init
  try:
    return {f'backbone/{n}': x for n, x in vit.read(path, model).items()} if path else {}
  except PortingError as e:
    raise ValueError(f'unimedi.vision_init: {e}') from e


def text_tower(config) -> tuple[dict, dict]:
  """Fields of the BERT, and {parameter name: array} that it starts from.

  Raises:
    ValueError: what the folder of weights lacks, or a text that is longer than its positions.
  """
  t, weights = config.unimedi.text, {}
  words = vocabulary_size(t)
  if t.init_from:
    try:
      fields, tree = bert.read(t.init_from, t.num_layers)
    except PortingError as e:
      raise ValueError(f'unimedi.text.init_from: {e}') from e
    weights = {f'text/{name}': x for name, x in named_leaves(tree).items()}
  else:
    fields = text_fields(t)
  if not fields['vocab_size'] or words not in (0, fields['vocab_size']):
    raise ValueError(f'unimedi.text.vocab={t.vocab!r} has {words} word pieces, the table of words has '
                     f'{fields["vocab_size"]} rows: they must be the same number; vocab_size=0 takes that of the file')
  if not 2 < t.length <= fields['max_position_embeddings']:
    raise ValueError(f'unimedi.text.length={t.length}: the network has {fields["max_position_embeddings"]} positions; '
                     'set it to at most that, and to 3 at least')
  return fields, weights


def text_fields(text) -> dict:
  """Fields of the BERT that unimedi.text describes, or of the one in its folder. Raises PortingError."""
  if text.init_from:
    return bert.fields_of(text.init_from, text.num_layers)
  return dict(vocab_size=text.vocab_size or vocabulary_size(text), hidden_size=text.width,
              num_hidden_layers=text.num_layers, num_attention_heads=text.heads, intermediate_size=text.mlp,
              max_position_embeddings=text.positions)


def vocabulary_size(text) -> int:
  """Lines of unimedi.text.vocab, 0 where none is named. Raises ValueError for a file that is not there."""
  try:
    return len(epath.Path(text.vocab).read_text(encoding='utf-8').splitlines()) if text.vocab else 0
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f'unimedi.text.vocab={text.vocab!r} cannot be read ({type(e).__name__}): name a vocab.txt') from e
