"""A view of a CT volume: crop, flip and resize, then the six intensity operations of UniMiSS+.

The operations and their order are those of the released code (batchgenerators transforms with the slices
as channels); what they draw comes as parameters, so that a view is a pure function. All intensities are
HU / 1024, or of MR z-scores, stored as 1024 z. numpy in, numpy out; jax in, jax out.
"""
import numpy as np

from unimiss_jax.drr.geometry import array_namespace
from unimiss_jax.views import matrices, warp

SCALE = 1024.                # HU, or stored number, per unit of intensity
HU_RANGE = -1024, 3071       # 12 bits: what lies outside is padding or metal
TRUNCATE = 4.                # of the Gaussian, in sigmas


def view(volume, params, cfg, pad=None, shape=None):
  """One augmented view `[D, H, W]` float32 of a volume `[D', H', W']` in HU, or of stored z-scores.

  Args:
    volume: any number type.
    params: of one view, as `data_pipelines.draw` makes them:
      box_start, box_size `[3]` in voxels (what lies outside the volume is cfg.pad_hu), flip `[3]`,
      noise_std, noise_key `[2]` uint32, and per output slice `[D]`: blur_sigma, mul, add, contrast, gamma,
      whose neutral values are 0, 1, 0, 1, 1; perhaps a `grid` of warp.py.
    cfg: the leaves views.ct (size, resize, pad_hu, aug_unit, gamma_stats, blur_sigma).
    pad: what lies outside of a volume of z-scores; None: the volume is HU.
    shape: as of `crop_resize`.
  """
  pad, limits = (cfg.pad_hu, HU_RANGE) if pad is None else (pad, None)
  cut = lambda start, size, out: crop_resize(volume, start, size, params['flip'], out, cfg.resize, pad, limits, shape)
  x = warp.view(cut, params, cfg.size)
  x = noise(x, params['noise_std'], params['noise_key'])
  x = blur(x, params['blur_sigma'], cfg.blur_sigma[1])
  x = x * _column(params['mul'])
  x += _column(params['add'])
  x = contrast(x, params['contrast'], cfg.aug_unit)
  return gamma(x, params['gamma'], cfg.aug_unit, cfg.gamma_stats)


def crop_resize(volume, start, size, flip, out, kind: str, pad: float, limits=HU_RANGE, shape=None):
  """The box of a volume, `[*out]` float32, divided by 1024.

  Args:
    volume: `[D', H', W']`.
    start, size: `[3]` in voxels; the box may reach beyond the volume.
    flip: `[3]` booleans.
    out: shape of the view.
    kind: 'linear' or 'area'.
    pad: value beyond the volume.
    limits: that values are clipped to; None: they are not.
    shape: `[3]` of the part, at the start of the axes, which is the volume; None: all of it.
  """
  xp = array_namespace(volume, start, size, flip)
  if xp is np:    # only what the box sees
    volume = volume if shape is None else volume[tuple(map(slice, shape))]
    low = np.clip(np.floor(start), 0, volume.shape).astype(int)
    high = np.clip(np.ceil(np.add(start, size)), low, volume.shape).astype(int)
    volume, start = volume[tuple(slice(a, b) for a, b in zip(low, high))], start - low
  maps = [matrices.resize(kind, start[i], size[i], volume.shape[i], out[i], flip[i]) for i in range(3)]
  if xp is not np and shape is not None:
    maps = [xp.where(xp.arange(m.shape[1]) < n, m, 0) for m, n in zip(maps, shape)]
  whole_slices = xp is np and volume.shape[0] == size[0] == out[0]
  if whole_slices and flip[0]:
    volume = volume[::-1]
  x = (volume if limits is None else xp.clip(volume, *limits)).astype(np.float32)
  x -= xp.float32(pad)    # with the padding as zero, voxels beyond the volume need not exist
  x = matrices.right(matrices.left(maps[1] / np.float32(SCALE), x), maps[2])
  x = x if whole_slices else xp.tensordot(maps[0], x, 1)
  x += xp.float32(pad / SCALE)
  return x


def noise(x, std, key):
  """Adds white Gaussian noise drawn from `key` `[2]` uint32. numpy and jax draw different noise of one law."""
  if array_namespace(x, std, key) is np:
    if std == 0:
      return x
    y = _normal(key, x.shape, np.float32(std))
    y += x
    return y
  import jax
  return x + std * jax.random.normal(jax.random.wrap_key_data(key, impl='threefry2x32'), x.shape, x.dtype)


def blur(x, sigma, max_sigma: float):
  """In-plane Gaussian of `sigma` `[D]` pixels per slice (0 = none), as scipy `gaussian_filter` in 2D.

  Edges are mirrored and filters end at 4 sigma; `max_sigma` bounds sigma, so that shapes are static.
  """
  xp = array_namespace(x, sigma)
  radius = int(TRUNCATE * max_sigma + .5)
  which = np.flatnonzero(sigma) if xp is np else slice(None)
  filters = {n: matrices.blur(sigma[which], n, radius, 'half', TRUNCATE) for n in x.shape[1:]}
  y = xp.matmul(matrices.left(filters[x.shape[1]], x[which]), filters[x.shape[2]])    # symmetric matrices
  if xp is not np:
    return y
  x = x.copy()
  x[which] = y
  return x


def contrast(x, factor, unit: str = 'slice'):
  """Spreads about the mean of each unit ('slice' or 'volume') by `factor` `[D]`, clipped to its range.

  The slices of a unit share their factor.
  """
  xp, units = array_namespace(x, factor), _units(x, unit)
  factor = factor[:len(units), None]
  low, high, mean = (f(1, keepdims=True) for f in (units.min, units.max, units.mean))
  y = units * factor
  y += mean * (1 - factor)
  return xp.clip(y, low, high).reshape(x.shape)


def gamma(x, exponent, unit: str = 'slice', stats: str = 'fixed'):
  """Power law on the range of each unit; mean and standard deviation are then restored.

  Args:
    x: `[D, H, W]`.
    exponent: `[D]`; the slices of a unit share it.
    unit: 'slice' or 'volume'.
    stats: 'fixed'; 'bg0197' restores the mean before the deviation, so that the mean is scaled with it, as
      batchgenerators 0.19.7 does.
  """
  xp, units = array_namespace(x, exponent), _units(x, unit)
  if xp is np and (exponent == 1).all():
    return x
  low, mean = units.min(1, keepdims=True), units.mean(1, keepdims=True)
  extent = units.max(1, keepdims=True) - low + np.float32(1e-7)
  y = units - low
  y *= 1 / extent
  y **= exponent[:len(units), None]
  y -= y.mean(1, keepdims=True)
  scale = _norm(units - mean) / (extent * _norm(y) + np.float32(1e-8))    # of y * extent + low
  y *= extent * scale
  y += mean * scale if stats == 'bg0197' else mean
  return y.reshape(x.shape)


def _normal(key, shape, std):
  """Gaussian noise by Box and Muller (1958), in vector instructions: a third of the time of numpy's own."""
  half = -(-int(np.prod(shape)) // 2)
  bits = np.random.SFC64(key).random_raw(half).view(np.int32).reshape(2, half)    # [2, half]
  radius, angle = bits.astype(np.float32)
  np.abs(radius, out=radius)
  radius += 1
  radius *= np.float32(2 ** -31)    # uniform in (0, 1], fine near 0
  np.log(radius, out=radius)
  radius *= -2 * std * std
  np.sqrt(radius, out=radius)
  angle *= np.float32(np.pi * 2 ** -31)
  y = np.empty((2, half), np.float32)
  np.cos(angle, out=y[0])
  np.sin(angle, out=y[1])
  y *= radius
  return y.reshape(-1)[:np.prod(shape)].reshape(shape)


def _units(x, unit: str):    # [D, H, W] -> [D or 1, pixels]
  if unit not in ('slice', 'volume'):
    raise ValueError(f'aug_unit "{unit}" unknown: use slice or volume')
  return x.reshape(len(x) if unit == 'slice' else 1, -1)


def _norm(centred):    # standard deviation [U, 1] of what has no mean
  xp = array_namespace(centred)
  return xp.sqrt(xp.vecdot(centred, centred) / np.float32(centred.shape[1]))[:, None]


def _column(per_slice):    # [D] -> [D, 1, 1]
  return per_slice[:, None, None]
