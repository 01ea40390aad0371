"""From HU to attenuation, and from line integrals to an image in [0, 1].

`water` follows the definition of the Hounsfield scale, with 0.02 per mm for water at diagnostic energies
(chosen by us); `bone_soft` has a steeper slope above water, as a published renderer; `minmax`, for the
attenuation as for the image, is what the released UniMiSS+ code does. Bright is dense, as in a radiograph.
"""
import numpy as np

from unimiss_jax.drr.geometry import array_namespace

MU_WATER = 0.02                       # 1/mm
SOFT, BONE = 0.0192, 0.0573           # 1/mm at 0 and at 1000 HU of bone_soft
SIGNED = np.int16, np.int32
HU_RANGE = -1000, 3000                # padding (-1024 ... -3024) is air, metal is bounded
MODELS = ('water', 'bone_soft', 'minmax')
IMAGES = ('line', 'transmission', 'minmax')


def hu_to_mu(hu, model: str = 'water', mu_water: float = MU_WATER):
  """Attenuation in 1/mm, never negative, of the shape of `hu`; float64 for float64, else float32.

  Args:
    hu: CT numbers, any shape.
    model: 'water', 'bone_soft', or 'minmax' (the range of the whole array becomes 0 ... 1 per mm).
    mu_water: of model 'water'.

  Raises:
    ValueError: unknown model.
  """
  xp = array_namespace(hu)
  hu = xp.asarray(hu)
  dtype = np.float64 if hu.dtype == np.float64 else np.float32
  if model == 'minmax':
    return minmax(hu.astype(dtype))
  hu = hu if hu.dtype in SIGNED else hu.astype(dtype)    # the range must be of the type
  hu = xp.clip(hu, *HU_RANGE).astype(dtype)
  if model == 'water':
    hu += dtype(1000)
    hu *= dtype(mu_water / 1000)    # in place, of the copy
    return hu
  if model == 'bone_soft':
    return dtype(SOFT) + hu * xp.where(hu > 0, dtype((BONE - SOFT) / 1000), dtype(SOFT / 1000))
  raise ValueError(f'attenuation model "{model}" unknown: use one of {", ".join(MODELS)}')


def attenuation(hu, model: str = 'water', mu_water: float = MU_WATER):
  """(array, unit): `hu_to_mu` as array * unit, where integers of model 'water' stay integers, half the memory.

  Args and errors as `hu_to_mu`; multiply line integrals of the array by the unit.
  """
  xp = array_namespace(hu)
  if model == 'water' and hu.dtype in SIGNED:
    return xp.clip(hu, *HU_RANGE) + hu.dtype.type(1000), mu_water / 1000
  return hu_to_mu(hu, model, mu_water), 1.


def transmission(p):
  """Share of the photons that pass, exp(-p)."""
  return array_namespace(p).exp(-p)


def minmax(x):
  """Range of the whole array to [0, 1]; a constant array gives zeros."""
  low, high = x.min(), x.max()
  return (x - low) / array_namespace(x).maximum(high - low, 1e-12)


def to_image(p, mode: str = 'line', p_ref: float = 1., quantize: bool = False):
  """Image in [0, 1], bright = dense.

  Args:
    p: line integrals `[h, w]`.
    mode: 'line', p / p_ref, clipped; 'transmission', the share of photons that is absorbed;
      'minmax', the range of this image.
    p_ref: line integral shown as white by 'line'.
    quantize: 256 levels, as a PNG file of the released code.

  Raises:
    ValueError: unknown mode.
  """
  xp = array_namespace(p)
  if mode == 'line':
    image = xp.clip(p / p_ref, 0, 1)
  elif mode == 'transmission':
    image = 1 - transmission(p)
  elif mode == 'minmax':
    image = minmax(p)
  else:
    raise ValueError(f'image formation "{mode}" unknown: use one of {", ".join(IMAGES)}')
  return xp.floor(image * 255 + .4999) / 255 if quantize else image
