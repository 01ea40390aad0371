"""A config is checked once, before anything is read or compiled; every message names leaf, value and remedy."""
import importlib.util
import math


class ConfigError(ValueError):
  """A leaf that cannot work, in one line."""


CHOICES = {
    'phases.unit': ('epoch', 'step', 'joint'),
    'data.modality': ('ct',),
    'data.on_bad_file': ('skip', 'stop'),
    'views.ct.extent': ('output', 'record'),
    'views.ct.resize': ('linear', 'area'),
    'views.ct.aug_unit': ('slice', 'volume'),
    'views.ct.gamma_stats': ('fixed', 'bg0197'),
    'views.xray.resize': ('bicubic', 'area'),
    'drr.view': ('axial', 'ap', 'pa', 'lateral'),
    'drr.scope': ('subvolume', 'volume'),
    'drr.kind': ('box', 'linear', 'bspline'),
    'drr.mu': ('water', 'bone_soft', 'minmax'),
    'drr.image': ('line', 'transmission', 'minmax'),
    'model.dtype': ('float32', 'bfloat16', 'float64'),
    'model.init': ('released', 'fan_in'),
    'model.pos_interp': ('grid', 'reference'),
    'optim.name': ('adamw',),
    'optim.clip_mode': ('global', 'per_tensor'),
    'optim.freeze_3d': ('mask', 'zero_grad', 'none'),
    'loss.center_updates': ('once', 'sequential'),
    'loss.slice_intensity': ('raw', 'minmax'),
}
STREAMS = ('ct', 'xray')


def leaf(config, path: str):
  for part in path.split('.'):
    config = config[part]
  return config


def streams(config) -> tuple[str, ...]:
  """Streams that the phases use."""
  return tuple(s for s in STREAMS if config.phases[s])


def validate(config) -> None:
  """Raises ConfigError for the first fault."""
  if not config.method or importlib.util.find_spec(f'unimiss_jax.methods.{config.method}') is None:
    raise ConfigError(f'method "{config.method}" unknown: use a config file of configs/')
  for path, allowed in CHOICES.items():
    section, _, name = path.rpartition('.')
    if name in leaf(config, section) and (value := leaf(config, path)) not in allowed:
      raise ConfigError(f'{path}="{value}" unknown: use one of {", ".join(allowed)}')
  if bool(config.steps) == bool(config.epochs) or min(config.steps, config.epochs) < 0:
    raise ConfigError(f'steps={config.steps}, epochs={config.epochs}: exactly one of the two must be positive; '
                      'set the other to 0')
  if not streams(config):
    raise ConfigError('phases.ct and phases.xray are both 0: nothing to train on')
  if config.phases.unit == 'joint' and len(streams(config)) < 2:
    raise ConfigError('phases.unit=joint needs phases.ct and phases.xray > 0')
  for s in streams(config):
    if config.batch[s] < 1:
      raise ConfigError(f'batch.{s}={config.batch[s]}: must be at least 1, or set phases.{s}=0')
  for path in ('checkpoint.every', 'checkpoint.keep', 'log.every', 'optim.accum', 'optim.max_skipped',
               'data.phantom_records', 'loss.slices'):
    if leaf(config, path) < 1:
      raise ConfigError(f'{path}={leaf(config, path)}: must be at least 1')
  if not 0 < config.eval.fit < config.eval.records:
    raise ConfigError(f'eval.fit={config.eval.fit}: must lie between 0 and eval.records={config.eval.records}')
  _model(config)


def _model(config) -> None:
  m, loss = config.model, config.loss
  n = len(m.depths)
  for name in ('num_heads', 'sr_ratios'):
    if len(m[name]) != n:
      raise ConfigError(f'model.{name}={tuple(m[name])}: needs {n} numbers, one per stage as model.depths')
  for name in ('decoder_heads', 'decoder_sr_ratios'):
    if len(m[name]) != len(m.decoder_depths):
      raise ConfigError(f'model.{name}={tuple(m[name])}: needs {len(m.decoder_depths)} numbers as model.decoder_depths')
  step = 16 * m.last_stride
  two_d = [('views.xray.size', config.views.xray.size), ('views.drr.size', config.views.drr.size)]
  for path, size in two_d:
    check_size(path, size, step, 64)
  d, h, w = config.views.ct.size
  check_size('views.ct.size depth', d, 4, 16)
  for side in (h, w):
    check_size('views.ct.size', side, step, step)
    if config.phases.ct and loss.slice:
      check_size('views.ct.size (its slices enter the 2D branch: loss.slice > 0)', side, step, 64)
  check_size('model.image_size', m.image_size, step, 64)


def check_size(path, size, multiple, least) -> None:
  """Sizes that the pyramid can halve."""
  if size % multiple or size < least:
    near = max(least, round(size / multiple) * multiple)
    raise ConfigError(f'{path}={size} invalid: must be a multiple of {multiple}, at least {least}; '
                      f'nearest valid {near}')


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


def check_method(config, method) -> None:
  if config.optim.accum > 1 and any(p.couples_samples for p in method.phases.values()):
    raise ConfigError(f'optim.accum={config.optim.accum}: a loss of this run compares samples with each other, '
                      'micro-batches would change it; set optim.accum=1')
