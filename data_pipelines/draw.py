"""The random numbers of a view: everything that augmentation decides, as plain arrays.

Drawing is apart from applying, so that a view depends on the generator alone (keyed by seed and stream
position) and host and device apply the same numbers. Distributions are those of the released UniMiSS+
code (batchgenerators for CT, torchvision for 2D); `extent='record'`, gamma and noise of 2D views, source
jitter, tilt and paired windows are ours.

All functions return {group: {name: array}} with a leading axis of views (2; centre views 1); groups are
'ct', 'drr', 'xray' or 'local', names and units those of `unimiss_jax.views` and of `drr.geometry.camera`.
"""
import math
import types

import numpy as np

from unimiss_jax.drr import geometry
from unimiss_jax.views import warp

ATTEMPTS = 10    # of a random-resized crop, before the largest allowed central one is taken


def ct_pair(rng, config, shape, spacing_mm, whole_shape=None, whole_spacing_mm=None) -> dict:
  """Two CT views and two DRR views of one record; of other modalities there are no DRR.

  Args:
    rng: np.random.Generator.
    config: the run config; reads data.modality, views.ct, views.drr, drr.
    shape: of the tile `[D, H, W]`.
    spacing_mm: of the tile, (z, y, x).
    whole_shape, whole_spacing_mm: of the scan that is projected with drr.scope='volume'.

  Raises:
    ValueError: scope='volume' without the whole scan; paired windows where the tile is not the whole.
  """
  ct = _volumes(rng, config.views.ct, shape)
  if config.data.modality != 'ct':
    return {'ct': ct}
  field = _field(config, shape, spacing_mm, whole_shape, whole_spacing_mm)
  if config.drr.paired_window:
    window = _paired(config, ct, shape, spacing_mm, whole_shape, whole_spacing_mm)
  else:
    window = _windows(rng, config.views.drr, field)
  jitter, tilt = config.drr.source_jitter_mm, config.drr.tilt_deg
  drr = dict(window, offset_mm=rng.uniform(-jitter, jitter, (2, 2)), **_photometry(rng, config.views.drr),
             tilt_deg=rng.uniform(-tilt, tilt, (2, 3)))
  return {'ct': ct, 'drr': drr}


def reach(cfg, shape) -> tuple:
  """How many voxels per axis both CT views of a volume of this shape span together, at most; cfg: views.ct."""
  if cfg.extent == 'centre':
    return tuple(np.minimum(cfg.size, shape).tolist())
  if cfg.extent == 'record' or not any(cfg.precrop):
    return tuple(shape)
  block = [max(n, int(n * cfg.precrop[1])) for n in cfg.size[1:]]
  return (shape[0], *np.minimum(block, shape[1:]).tolist())


def xray_pair(rng, config, shape) -> dict:
  """Two views of one radiograph `[H, W]`, and its small crops: random-resized crops on whole pixels."""
  out, small = {'xray': _pictures(rng, config.views.xray, shape)}, local(config)
  return out | {'local': _pictures(rng, small, shape, small.crops)} if small else out


def local(config):
  """Leaves of the small crops: of views.xray, but for `size`, `scale` and `crops` of extra_loss.local or joint.local;
  None without them."""
  of = next((dict(config[s].local) for s in ('joint', 'extra_loss') if s in config), {})
  return types.SimpleNamespace(**{**config.views.xray, **of}) if of.get('crops') else None


def ct_view(rng, config, shape, focus=None) -> dict:
  """One CT view, for a record with labels: the first of a pair.

  Args:
    focus: voxel (z, y, x) that the box must hold, at a random place of it; None = anywhere. Only extent='output'.
  """
  params = {name: values[:1] for name, values in _volumes(rng, config.views.ct, shape).items()}
  if focus is not None:
    size = params['box_size'][0]      # whole voxels, as the start
    room = np.minimum(0, shape - size), np.maximum(0, shape - size)
    start = np.subtract(focus, rng.integers(0, size.astype(int)))
    params['box_start'] = np.clip(start, *room)[None].astype(np.float32)
  return {'ct': params}


def xray_view(rng, config, shape) -> dict:
  """One view of a radiograph `[H, W]`, for a record with labels: the first of a pair."""
  return {'xray': {name: values[:1] for name, values in _pictures(rng, config.views.xray, shape).items()}}


def warped(rng, task, params, size, spacing_mm) -> dict:
  """The parameters of one view with a `grid` where one is drawn: turned and sheared in millimetres, deformed in pixels.

  Args:
    task: the leaves rotate, shear, warp_p, elastic, elastic_sigma, elastic_p.
    params: of one view, as ct_view or xray_view give them.
    size: of the view.
    spacing_mm: of the record, along its axes.
  """
  n, matrix, field = len(size), np.eye(len(size)), 0.
  if any(task.rotate[:2 * n - 3]) or task.shear:
    angles, shear = rng.uniform(-1, 1, 2 * n - 3) * task.rotate[:2 * n - 3], rng.uniform(-1, 1) * task.shear
    if rng.random() < task.warp_p:
      turn = warp.rotation(angles)
      turn[-2, -1] += math.tan(math.radians(shear))
      pixel = params['box_size'][0] * spacing_mm / size      # mm
      matrix = turn * pixel / pixel[:, None]
  if task.elastic_p and rng.random() < task.elastic_p:
    field = warp.elastic(rng, size, rng.uniform(*task.elastic), rng.uniform(*task.elastic_sigma))
  if np.array_equal(matrix, np.eye(n)) and np.isscalar(field):
    return params
  return params | {'grid': warp.grid(matrix, size, field)[None]}


def xray_whole(shape) -> dict:
  """All of a radiograph as one view, whatever its aspect."""
  return {'xray': dict(box_start=np.zeros((1, 2), np.float32), box_size=np.array([shape], np.float32),
                       flip=np.zeros((1, 2), bool), **_plain())}


def ct_centre(config, shape, spacing_mm, whole_shape=None, whole_spacing_mm=None) -> dict:
  """The plain centre view, for evaluation: no augmentation, one view.

  CT: the whole record (extent='record') or a central box of the output's size. DRR: the largest central
  window of an allowed aspect.
  """
  cfg = config.views.ct
  size = np.array(shape if cfg.extent == 'record' else cfg.size)
  start = -((size - shape) // 2)
  depth = cfg.size[0]
  neutral = dict(blur_sigma=0, mul=1, add=0, contrast=1, gamma=1)
  ct = dict(box_start=start[None].astype(np.float32), box_size=size[None].astype(np.float32),
            flip=np.zeros((1, 3), bool), noise_std=np.zeros(1, np.float32), noise_key=np.zeros((1, 2), np.uint32),
            **{k: np.full((1, depth), v, np.float32) for k, v in neutral.items()})
  if config.data.modality != 'ct':
    return {'ct': ct}
  _, size_mm = _largest(_field(config, shape, spacing_mm, whole_shape, whole_spacing_mm), config.views.drr.ratio)
  drr = dict(center_mm=np.zeros((1, 2)), pitch_mm=np.array(size_mm)[None] / config.views.drr.size,
             offset_mm=np.zeros((1, 2)), tilt_deg=np.zeros((1, 3)), **_plain())
  return {'ct': ct, 'drr': drr}


def xray_centre(config, shape) -> dict:
  """The largest central crop of an allowed aspect, without augmentation, one view."""
  start, size = _largest(shape, config.views.xray.ratio)
  size = np.round(size)
  start = np.floor((np.array(shape) - size) / 2)
  return {'xray': dict(box_start=start[None].astype(np.float32), box_size=size[None].astype(np.float32),
                       flip=np.zeros((1, 2), bool), **_plain())}


def _volumes(rng, cfg, shape) -> dict:
  """Parameters of two CT views."""
  return dict(_boxes(rng, cfg, shape), flip=rng.random((2, 3)) < cfg.flip_p, **_intensities(rng, cfg))


def _pictures(rng, cfg, shape, views: int = 2) -> dict:
  """Parameters of views of a radiograph."""
  boxes = [_random_resized(rng, cfg, shape, whole=True) for _ in range(views)]
  leftright = rng.random(views) < cfg.flip_p
  updown = rng.random(views) < cfg.updown_p if cfg.updown_p else np.zeros(views, bool)
  return dict(box_start=np.array([b[0] for b in boxes], np.float32),
              box_size=np.array([b[1] for b in boxes], np.float32), flip=np.stack([updown, leftright], 1),
              **_photometry(rng, cfg, views))


def _boxes(rng, cfg, shape) -> dict:
  """Boxes of the two CT views in voxels; they may reach beyond a volume that is too small."""
  shape, out = np.array(shape), np.array(cfg.size)
  if cfg.extent == 'record':
    size = rng.uniform(*cfg.scale, (2, 3)) * shape
    start = rng.random((2, 3)) * (shape - size)
  elif cfg.extent == 'output':
    lack = np.maximum(np.maximum(out, (0, *cfg.pad_to)) - shape, 0)    # padding: both ends in depth, one in-plane
    room = shape[1:] + lack[1:]
    block = _crop_size(rng, cfg.precrop, out[1:], room, 1) if any(cfg.precrop) else room[None]
    corner = rng.integers(0, room - block + 1)
    size = _crop_size(rng, cfg.scale, out[1:], block[0], 2)
    start = corner + rng.integers(0, block - size + 1)
    depth = rng.integers(0, shape[0] + lack[0] - out[0] + 1, 2) - lack[0] // 2
    start, size = np.column_stack([depth, start]), np.column_stack([np.full(2, out[0]), size])
  elif cfg.extent == 'centre':
    start, size = np.tile(-((out - shape) // 2), (2, 1)), np.tile(out, (2, 1))
  else:
    raise ValueError(f'views.ct.extent "{cfg.extent}" unknown: use output, record or centre')
  return dict(box_start=start.astype(np.float32), box_size=size.astype(np.float32))


def _crop_size(rng, factors, out, room, views: int):
  """`[views, 2]` whole pixels: out * U(factors); where that does not fit, the size of the output."""
  size = (out * rng.uniform(*factors, (views, 2))).astype(int)
  return np.where(size >= room, out, size)


def _intensities(rng, cfg) -> dict:
  """Per-slice parameters `[2, D]` of the CT operations; with aug_unit='volume' all slices share one draw."""
  depth = cfg.size[0]
  n = depth if cfg.aug_unit == 'slice' else 1
  share = np.array([cfg.blur_p, cfg.mul_p, cfg.add_p, cfg.contrast_p, cfg.gamma_p])
  blur, mul, add, contrast, gamma = rng.random((5, 2, 1)) < share[..., None]
  of_unit = rng.random((2, 2, n)) < np.array([cfg.blur_unit_p, cfg.add_unit_p])[..., None]
  u = rng.random((4, 2, n))

  def per_slice(on, value, neutral):
    return np.broadcast_to(np.where(on, value, neutral).astype(np.float32), (2, depth))

  return dict(
      noise_std=rng.uniform(*cfg.noise_std, 2).astype(np.float32),
      noise_key=rng.integers(0, 2 ** 32, (2, 2), np.uint32),
      blur_sigma=per_slice(blur & of_unit[0], _between(cfg.blur_sigma, u[0]), 0),
      mul=per_slice(mul, _between(cfg.mul, u[1]), 1),
      add=per_slice(add & of_unit[1], cfg.add_std * rng.standard_normal((2, n)), 0),
      contrast=per_slice(contrast, _about_one(cfg.contrast, u[2]), 1),
      gamma=per_slice(gamma, _about_one(cfg.gamma, u[3]), 1))


def _photometry(rng, cfg, views: int = 2) -> dict:
  """Parameters `[views]` of `views.image.photometric`; pairs of probabilities go to the views in turn."""
  u = rng.random((9, views))
  jitter = u[0] < cfg.jitter_p

  def factor(extent, u):
    return np.where(jitter, _between((max(0., 1 - extent), 1 + extent), u), 1).astype(np.float32)

  return dict(
      brightness=factor(cfg.brightness, u[1]), contrast=factor(cfg.contrast, u[2]), contrast_first=u[3] < .5,
      gamma=np.where(u[4] < np.resize(cfg.gamma_p, views), _about_one(cfg.gamma, u[5]), 1).astype(np.float32),
      noise_std=_between(cfg.noise_std, u[6]).astype(np.float32),
      noise_key=rng.integers(0, 2 ** 32, (views, 2), np.uint32),
      blur_sigma=np.where(u[7] < np.resize(cfg.blur_p, views), _between(cfg.blur_sigma, u[8]), 0).astype(np.float32))


def _plain() -> dict:
  """Photometry that changes nothing, one view."""
  one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
  return dict(brightness=one, contrast=one, contrast_first=np.zeros(1, bool), gamma=one, noise_std=zero,
              noise_key=np.zeros((1, 2), np.uint32), blur_sigma=zero)


def _between(limits, u):
  return limits[0] + (limits[1] - limits[0]) * u


def _about_one(limits, u):
  """Half of the draws uniform below 1, half above."""
  low, high = min(limits[0], 1), max(limits[1], 1)
  return np.where(u < .5, _between((low, 1), 2 * u), _between((1, high), 2 * u - 1))


def _field(config, shape, spacing_mm, whole_shape, whole_spacing_mm) -> tuple[float, float]:
  if config.drr.scope == 'volume':
    if whole_shape is None or whole_spacing_mm is None:
      raise ValueError('drr.scope is "volume" but the record has no whole scan: use drr.scope=subvolume or '
                       'records with whole and whole_spacing_mm')
    shape, spacing_mm = whole_shape, whole_spacing_mm
  elif config.drr.scope != 'subvolume':
    raise ValueError(f'drr.scope "{config.drr.scope}" unknown: use subvolume or volume')
  return geometry.field(config.drr.view, shape, spacing_mm, config.drr.sod_mm)


def _windows(rng, cfg, field) -> dict:
  """Random-resized crops of the DRR field as geometry; a mirrored view has a negative column pitch."""
  boxes = [_random_resized(rng, cfg, field) for _ in range(2)]
  center = [np.add(start, np.divide(size, 2)) - np.divide(field, 2) for start, size in boxes]
  sign = np.stack([np.ones(2), np.where(rng.random(2) < cfg.flip_p, -1, 1)], 1)
  return dict(center_mm=np.array(center), pitch_mm=sign * np.array([b[1] for b in boxes]) / cfg.size)


def _paired(config, ct, shape, spacing_mm, whole_shape, whole_spacing_mm) -> dict:
  """The physical window of each CT view, with its flips."""
  extent = np.multiply(shape, spacing_mm)
  if config.drr.scope == 'volume' and not np.allclose(extent, np.multiply(whole_shape, whole_spacing_mm), rtol=.01):
    raise ValueError('drr.paired_window needs to know where the tile lies in the whole scan: use drr.scope=subvolume')
  displayed = list(geometry.VIEWS[config.drr.view].axes[1:])
  center = (ct['box_start'] + ct['box_size'] / 2 - np.array(shape) / 2) * spacing_mm
  pitch = np.where(ct['flip'], -1, 1) * ct['box_size'] * spacing_mm / config.views.drr.size
  return dict(center_mm=-center[:, displayed], pitch_mm=pitch[:, displayed])    # the display runs against the axes


def _random_resized(rng, cfg, field, whole: bool = False):
  """(start, size) of a crop of a field (height, width): area share uniform, aspect log-uniform (torchvision)."""
  logs = np.log(cfg.ratio)
  for _ in range(ATTEMPTS):
    area = field[0] * field[1] * rng.uniform(*cfg.scale)
    aspect = math.exp(rng.uniform(*logs))    # width / height
    size = math.sqrt(area / aspect), math.sqrt(area * aspect)
    size = tuple(round(s) for s in size) if whole else size
    if all(0 < s <= f for s, f in zip(size, field)):
      room = [f - s for s, f in zip(size, field)]
      return (rng.integers(0, np.add(room, 1)) if whole else rng.random(2) * room), size
  start, size = _largest(field, cfg.ratio)
  return (np.floor(start), np.round(size)) if whole else (start, size)


def _largest(field, ratio):
  """(start, size) of the largest central window whose width / height lies within `ratio`."""
  field = np.array(field, float)
  aspect = np.clip(field[1] / field[0], *ratio)
  size = np.minimum(field, [field[1] / aspect, field[0] * aspect])
  return (field - size) / 2, size
