"""A config is checked once, before anything is read or compiled; every message names leaf, value and remedy."""
import importlib.util
import math

import jax

from unimiss_jax import models
from unimiss_jax.models.mit import REMAT


class ConfigError(ValueError):
  """A leaf that cannot work, in one line."""


CHOICES = {
    'phases.unit': ('epoch', 'step', 'joint'),
    'data.modality': ('ct', 'mr', 'other'),
    'data.on_bad_file': ('skip', 'stop'),
    'data.place': ('host', 'device'),
    'model.remat': REMAT,
    'views.ct.extent': ('output', 'record', 'centre'),
    'views.ct.resize': ('linear', 'area'),
    'views.ct.aug_unit': ('slice', 'volume'),
    'views.ct.gamma_stats': ('fixed', 'bg0197'),
    'views.xray.resize': ('bicubic', 'area'),
    'drr.view': ('axial', 'ap', 'pa', 'lateral'),
    'drr.scope': ('subvolume', 'volume'),
    'drr.kind': ('box', 'linear', 'bspline'),
    'drr.mu': ('water', 'bone_soft', 'minmax'),
    'drr.image': ('line', 'transmission', 'minmax', 'reference'),
    'model.dtype': ('float32', 'bfloat16', 'float64'),
    'model.init': ('released', 'fan_in'),
    'model.pos_interp': ('grid', 'reference'),
    'pos_resize': ('grid', 'flat_zoom'),
    'init_branch': ('', 'student', 'teacher'),
    'optim.name': ('adamw', 'larc'),
    'optim.schedule': ('cosine', 'poly', 'constant'),
    'optim.schedule_unit': ('step', 'epoch', 'dataset'),
    'optim.clip_mode': ('global', 'per_tensor'),
    'optim.decay_exclude': ('1d', 'tokens', ''),
    'optim.freeze_3d': ('mask', 'zero_grad', 'none'),
    'loss.center_updates': ('once', 'sequential'),
    'loss.slice_intensity': ('raw', 'minmax'),
    'loss.slice_pool': ('logits', 'probability', 'feature'),
    'task.kind': ('cls', 'seg'),
    'optim.lr_scaling': ('linear', 'sqrt'),
    'task.features': ('cls', 'mean', 'both'),
    'task.dice': ('soft', 'hard_no_grad'),
    'task.test_view': ('centre', 'windows', 'whole', 'tencrop'),
}
PARTS = ('encoder', 'decoder', 'head')
STREAMS = ('ct', 'xray')
TASKS = ('knn', 'retrieval', 'cls', 'seg', 'studies')
DRR_LOSSES = ('drr', 'recon_drr', 'pair_nce')
SLICE_LOSSES = ('slice', 'slice_slice', 'ct_slice')
LEAST_SLICES = 16             # data_pipelines.judgement.LEAST, which this room may not import
MOST_LEANING = 25.            # degrees: with it, and the window's place, a beam still runs along the axis of its view
MOST_PHANTOMS = 1_000_000     # of the range that is kept for development
PAIRS = ('precrop', 'scale', 'noise_std', 'blur_sigma', 'blur_p', 'blur_unit_p', 'mul', 'mul_p', 'add_p', 'add_unit_p',
         'contrast_p', 'gamma', 'gamma_p', 'ratio')


def leaf(config, path: str):
  for part in path.split('.'):
    config = config[part]
  return config


def has(config, path: str) -> bool:
  """Whether a method's config has a leaf."""
  for part in path.split('.'):
    if part not in config:
      return False
    config = config[part]
  return True


def streams(config) -> tuple[str, ...]:
  """Streams that the phases use."""
  return tuple(s for s in STREAMS if config.phases[s])


def validate(config) -> None:
  """Raises ConfigError for the first fault."""
  if not config.method or importlib.util.find_spec(f'unimiss_jax.methods.{config.method}') is None:
    raise ConfigError(f'method "{config.method}" unknown: use a config file of configs/')
  if config.log.wandb and importlib.util.find_spec('wandb') is None:
    raise ConfigError(f'log.wandb="{config.log.wandb}" needs the package wandb. FIX: pip install -e ".[wandb]", or set '
                      'log.wandb to ""')
  for path, allowed in CHOICES.items():
    if has(config, path) and (value := leaf(config, path)) not in allowed:
      raise ConfigError(f'{path}="{value}" unknown: use one of {", ".join(allowed)}')
  if bool(config.steps) == bool(config.epochs) or min(config.steps, config.epochs) < 0:
    raise ConfigError(f'steps={config.steps}, epochs={config.epochs}: exactly one of the two must be positive; '
                      'set the other to 0')
  if not streams(config):
    raise ConfigError('phases.ct and phases.xray are both 0: nothing to train on')
  if config.phases.unit == 'joint' and len(streams(config)) < 2:
    raise ConfigError('phases.unit=joint needs phases.ct and phases.xray > 0')
  if config.optim.schedule_unit == 'dataset' and config.method != 'unimiss':
    raise ConfigError(f'optim.schedule_unit="dataset" is of method unimiss alone, this is {config.method}: use step')
  for s in STREAMS:
    if config.phases[s] < 0:
      raise ConfigError(f'phases.{s}={config.phases[s]}: must be at least 0')
    if config.phases[s] and config.batch[s] < 1:
      raise ConfigError(f'batch.{s}={config.batch[s]}: must be at least 1, or set phases.{s}=0')
  if config.data.manifest and (two := [s for s in STREAMS if config.data[s]]):
    raise ConfigError(f'data.manifest="{config.data.manifest}" says what is trained on, and so does '
                      f'data.{two[0]}="{config.data[two[0]]}": set one of them to ""')
  for path in ('checkpoint.every', 'checkpoint.keep', 'log.every', 'optim.accum', 'optim.max_skipped',
               'data.phantom_records', 'data.views_per_read', 'loss.slices'):
    if has(config, path) and leaf(config, path) < 1:
      raise ConfigError(f'{path}={leaf(config, path)}: must be at least 1')
  for path in ('log.watchdog_min', 'log.images_every', 'eval.every', 'data.workers', 'optim.clip',
               'optim.warmup_epochs', 'eval.patience', 'task.epoch_steps'):
    if has(config, path) and leaf(config, path) < 0:
      raise ConfigError(f'{path}={leaf(config, path)}: must be at least 0')
  if (tile := config.data.tile) % 2 or 0 != tile < LEAST_SLICES:
    raise ConfigError(f'data.tile={tile}: an even number from {LEAST_SLICES}, or 0 for whole scans')
  if unknown := set(config.eval.tasks) - set(TASKS):
    raise ConfigError(f'eval.tasks: "{min(unknown)}" unknown: use some of {", ".join(TASKS)}')
  if config.eval.records > MOST_PHANTOMS:
    raise ConfigError(f'eval.records={config.eval.records}: at most {MOST_PHANTOMS}')
  for section in ('ct', 'xray', 'drr'):
    for name in set(PAIRS) & set(config.views[section]):
      if len(config.views[section][name]) != 2:
        raise ConfigError(f'views.{section}.{name}={tuple(config.views[section][name])}: needs two numbers')
  if not 0 < config.eval.fit < config.eval.records:
    raise ConfigError(f'eval.fit={config.eval.fit}: must lie between 0 and eval.records={config.eval.records}')
  if config.eval.patience and not (config.eval.select and config.eval.every):
    raise ConfigError(f'eval.patience={config.eval.patience}: needs eval.select and eval.every')
  if unknown := set(config.init_parts) - set(PARTS):
    raise ConfigError(f'init_parts: "{min(unknown)}" unknown: use some of {", ".join(PARTS)}')
  if 'task' in config:
    _task(config)
  _modality(config)
  _place(config)
  _model(config)


def _task(config) -> None:
  task, data = config.task, config.data
  if len(streams(config)) != 1:
    raise ConfigError('a task learns from one kind of image: set one of phases.ct and phases.xray to 0')
  if not 0 < data.label_fraction <= 1:
    raise ConfigError(f'data.label_fraction={data.label_fraction}: must lie in (0, 1]')
  if data.label_fraction < 1 and config.epochs and not task.epoch_steps:
    raise ConfigError(f'data.label_fraction={data.label_fraction}, epochs={config.epochs}: fewer labels would mean '
                      'fewer steps. FIX: set steps and epochs=0, or task.epoch_steps')
  if data.ct or data.xray:
    raise ConfigError('data.ct and data.xray have no labels: name a labelled data.manifest')
  if task.kind == 'seg' and config.phases.ct and config.views.ct.extent != 'output':
    raise ConfigError(f'views.ct.extent="{config.views.ct.extent}": a segmentation of volumes cuts patches, use output')
  views = (('centre', 'whole', 'tencrop') if config.phases.xray else
           ('centre', 'whole') if config.views.ct.extent == 'record' else ('centre', 'windows'))
  if task.kind == 'cls' and task.test_view not in views:
    raise ConfigError(f'task.test_view="{task.test_view}": here it is one of {", ".join(views)}')
  if task.probe_first and (task.kind != 'cls' or task.features != 'cls'):
    raise ConfigError(f'task.probe_first with task.kind="{task.kind}", task.features="{task.features}": a probe '
                      'is made for kind cls and features cls alone')
  if task.kind == 'seg' and not (task.ce_weight or task.dice_weight):
    raise ConfigError('task.ce_weight=0, task.dice_weight=0: nothing to learn from, give one a weight')
  if task.threshold and len(task.classes) != 1:
    raise ConfigError(f'task.threshold={task.threshold}: for one class, task.classes has {len(task.classes)}')
  if task.mask_values and len(task.mask_values) != len(task.classes):
    raise ConfigError(f'task.mask_values has {len(task.mask_values)} entries, task.classes {len(task.classes)}: '
                      'one for each')
  if not 0 <= task.overlap < 1 or not 0 <= task.foreground <= 1:
    raise ConfigError(f'task.overlap={task.overlap}, task.foreground={task.foreground}: shares, below 1')
  if min(task.phantoms) < 1 or len(task.phantoms) != 3:
    raise ConfigError(f'task.phantoms={tuple(task.phantoms)}: needs three numbers, training, validation, test')


def _modality(config) -> None:
  """What is no CT has no HU, so no DRR, and its sequences are the channels of the model."""
  data, channels = config.data, tuple(config.model.in_channels)
  count = len([end for end in data.sequences.split(',') if end.strip()])
  if len(channels) != 2 or channels[0] != 3 or channels[1] < 1:
    raise ConfigError(f'model.in_channels={channels}: images have 3 channels, volumes one for each sequence; use (3, '
                      f'{count or 1})')
  if data.modality == 'ct' and (count or channels[1] > 1):
    raise ConfigError(f'data.sequences="{data.sequences}", model.in_channels={channels}: CT has one sequence; use '
                      'data.modality=mr, or data.sequences="" and model.in_channels=(3, 1)')
  if count and count != channels[1]:
    raise ConfigError(f'data.sequences="{data.sequences}" names {count}, model.in_channels={channels}: use '
                      f'model.in_channels=(3, {count})')
  if data.modality == 'ct' or not config.phases.ct:
    return
  terms = [name for name in DRR_LOSSES if has(config, f'loss.{name}')]
  if on := [f'loss.{name}={config.loss[name]:g}' for name in terms if config.loss[name]]:
    raise ConfigError(f'{", ".join(on)}: DRR are made from HU, which data.modality={data.modality} has not; set '
                      f'{" and ".join(term.partition("=")[0] for term in on)} to 0')
  if not (data.ct or data.manifest):
    raise ConfigError(f'data.modality={data.modality} with data.ct="": phantoms are CT; name a folder in data.ct')


def _place(config) -> None:
  """What the device can make views of."""
  data, drr = config.data, config.drr
  for name, count in (('ct', 3), ('whole', 3), ('xray', 2)):
    shape = tuple(data.device_shape[name])
    if len(shape) != count or min(shape) < 0:
      raise ConfigError(f'data.device_shape.{name}={shape}: needs {count} numbers, none below 0')
  if data.place == 'host':
    return
  if 'task' in config:
    raise ConfigError('data.place="device": views of a task are made on the host alone; set data.place=host')
  if drr.image == 'reference':
    raise ConfigError('data.place="device", drr.image="reference": the released renderer runs on the host alone; set '
                      'data.place=host, or another drr.image')
  leaning = drr.tilt_deg + math.degrees(math.atan(drr.source_jitter_mm / drr.sod_mm))
  if leaning > MOST_LEANING:
    raise ConfigError(f'data.place="device", drr.tilt_deg={drr.tilt_deg:g}, drr.source_jitter_mm='
                      f'{drr.source_jitter_mm:g}: the beam leans by up to {leaning:.3g} degrees in each direction, at '
                      f'most {MOST_LEANING:g} there; set them lower, or data.place=host')


def _pyramid(m) -> None:
  """Lengths and divisibility of a MiT or MiT+."""
  stages, decoder = len(m.depths), len(m.decoder_depths)
  stem = 0 if m.name in ('mit_small', 'mit_tiny') else 2         # levels finer than s1
  and_two = ', and two for the finer levels' * bool(stem)
  for name, n, like in (('embed_dims', stages + stem, 'depths' + and_two), ('num_heads', stages, 'depths'),
                        ('sr_ratios', stages, 'depths'), ('decoder_heads', decoder, 'decoder_depths'),
                        ('decoder_dims', decoder + stem, 'decoder_depths' + and_two), ('volume_size', 3, 'D, H, W'),
                        ('decoder_sr_ratios', decoder, 'decoder_depths')):
    if len(m[name]) != n:
      raise ConfigError(f'model.{name}={tuple(m[name])}: needs {n} numbers, as model.{like}')
  if stages != 4 or decoder != 3:
    raise ConfigError(f'model.depths={tuple(m.depths)}, model.decoder_depths={tuple(m.decoder_depths)}: '
                      'the pyramid has 4 stages and 3 on the way back')
  for dims, heads in (('embed_dims', 'num_heads'), ('decoder_dims', 'decoder_heads')):
    for d, n in zip(m[dims][stem:] if dims == 'embed_dims' else m[dims], m[heads]):
      if d % n:
        raise ConfigError(f'model.{heads}={tuple(m[heads])}: {n} heads do not divide the width {d} of model.{dims}')


def _model(config) -> None:
  """The architecture, and sizes of all inputs by the model's own rule."""
  m = config.model
  if 'decoder_depths' in m:
    _pyramid(m)
  elif on := [f'loss.{k}' for k in ('recon_ct', 'recon_drr', 'recon_xray') if has(config, f'loss.{k}')
              and config.loss[k]]:
    raise ConfigError(f'model.name={m.name} has no decoder, it reconstructs nothing: set {" and ".join(on)} to 0')
  if m.dtype == 'float64' and not jax.config.jax_enable_x64:
    raise ConfigError('model.dtype="float64" needs the environment variable JAX_ENABLE_X64=1')
  if len(config.views.ct.size) != 3:
    raise ConfigError(f'views.ct.size={tuple(config.views.ct.size)}: needs 3 numbers, D, H, W')
  model = made(models.build, m)
  sizes = {'model.image_size': (m.image_size,) * 2, 'model.volume_size': m.get('volume_size', config.views.ct.size),
           'views.ct.size': config.views.ct.size, 'views.drr.size': (config.views.drr.size,) * 2,
           'views.xray.size': (config.views.xray.size,) * 2}
  for term in SLICE_LOSSES:
    if config.phases.ct and has(config, f'loss.{term}') and config.loss[term]:
      sizes[f'views.ct.size (its slices enter the 2D branch, loss.{term} > 0)'] = config.views.ct.size[1:]
  for path, size in sizes.items():
    try:
      model.check(size, model.in_channels[len(size) - 2])
    except ValueError as e:
      raise ConfigError(f'{path}: {e}') from e


def made(make, *args):
  """make(*args), a ValueError of which is the config's fault."""
  try:
    return make(*args)
  except ValueError as e:
    raise ConfigError(str(e)) from e


def check_devices(config, devices: int) -> None:
  """The mesh fits the devices, and each of them holds the same number of rows of every (micro-)batch."""
  data, fsdp = config.mesh.data, config.mesh.fsdp
  fixed = [s for s in (data, fsdp) if s != -1]
  if not fixed or min(fixed) < 1 or devices % math.prod(fixed) or len(fixed) == 2 and data * fsdp != devices:
    raise ConfigError(f'mesh.data={data}, mesh.fsdp={fsdp} does not fit {devices} devices: '
                      f'their product must be {devices}; use -1 for one of them to fill')
  n = devices * config.optim.accum
  for s in streams(config):
    b = config.batch[s]
    if b % n:
      low = b // n * n
      what = f'{devices} devices' + (f' x {config.optim.accum} micro-batches' if config.optim.accum > 1 else '')
      use = f'{low} or {low + n}' if low else f'{n}'
      raise ConfigError(f'batch.{s}={b} not divisible by {what}: use {use}')


def check_channels(config, spec: dict) -> None:
  """The volumes have as many sequences as the model has channels.

  Args:
    spec: {stream: {field: (shape, dtype)}} of one row.
  """
  if 'ct' in spec and (count := spec['ct']['ct'][0][-1]) != config.model.in_channels[1]:
    raise ConfigError(f'model.in_channels={tuple(config.model.in_channels)}: the volumes of data.ct have {count} '
                      f'sequence{"s" * (count > 1)}; use model.in_channels=(3, {count})')


def check_method(config, method) -> None:
  if config.optim.accum > 1 and any(p.couples_samples for p in method.phases.values()):
    raise ConfigError(f'optim.accum={config.optim.accum}: a loss of this run compares samples with each other, '
                      'micro-batches would change it; set optim.accum=1')
