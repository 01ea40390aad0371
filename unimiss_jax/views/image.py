"""A view of a radiograph: crop, flip and resize, then photometric operations; the latter serve DRR too.

The order is that of the released code (torchvision): random-resized crop, flip, colour jitter, Gaussian
blur of kernel 23. Its saturation, hue and grayscale operations do nothing to grey images and are left out.
Gamma and noise, off by default, stand between jitter and blur (chosen by us). numpy in, numpy out; jax in,
jax out.
"""
import numpy as np

from unimiss_jax.drr.geometry import array_namespace
from unimiss_jax.views import matrices, warp
from unimiss_jax.views.volume import noise

BLUR_RADIUS = 11    # kernel 23, whatever sigma is


def view(image, params, cfg):
  """One augmented view `[size, size]` float32 in [0, 1] of a radiograph `[H, W]`.

  Args:
    image: uint8, uint16 (full range = 1) or floats in [0, 1].
    params: of one view: box_start, box_size `[2]` in pixels, flip `[2]`, and those of `photometric`;
      perhaps a `grid` of warp.py.
    cfg: the leaves views.xray (size, resize).
  """
  kind = 'area' if 'grid' in params and cfg.resize == 'bicubic' else cfg.resize    # its box is no whole pixels
  cut = lambda start, size, out: crop_resize(image, start, size, params['flip'], out, kind)
  x = warp.view(cut, params, (cfg.size, cfg.size))
  return photometric(x, params)


def crop_resize(image, start, size, flip, out, kind: str):
  """The box of an image, `[*out]` float32 in [0, 1]; integer boxes inside the image for 'bicubic'."""
  xp = array_namespace(image, start, size, flip)
  if xp is np:    # only what the box sees
    low = np.clip(np.floor(start), 0, image.shape).astype(int)
    high = np.clip(np.ceil(np.add(start, size)), low, image.shape).astype(int)
    image, start = image[low[0]:high[0], low[1]:high[1]], start - low
  rows, cols = (matrices.resize(kind, start[i], size[i], image.shape[i], out[i], flip[i]) for i in range(2))
  white = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1
  x = image.astype(np.float32) / np.float32(white)    # first: 8 bits, stored as 16, give the very same numbers
  x = matrices.right(x, cols)
  return xp.clip(matrices.left(rows, xp.clip(x, 0, 1)), 0, 1)    # Pillow: columns first, overshoot cut after each


def photometric(x, params):
  """Brightness and contrast in drawn order, gamma, noise, blur; the result is clipped to [0, 1].

  Args:
    x: `[h, w]` float32 in [0, 1].
    params: scalars brightness, contrast (factors), contrast_first (bool), gamma, noise_std, blur_sigma
      (neutral: 1, 1, any, 1, 0, 0) and noise_key `[2]` uint32.
  """
  xp = array_namespace(x, params)
  swap, bright, spread = params['contrast_first'], params['brightness'], params['contrast']
  if xp is np:
    x = brightness(contrast(x, spread), bright) if swap else contrast(brightness(x, bright), spread)
  else:
    x = xp.where(swap, brightness(contrast(x, spread), bright), contrast(brightness(x, bright), spread))
  x = noise(x ** params['gamma'], params['noise_std'], params['noise_key'])
  return xp.clip(blur(x, params['blur_sigma']), 0, 1)


def brightness(x, factor):
  return array_namespace(x, factor).clip(x * factor, 0, 1)


def contrast(x, factor):
  """Blend with the mean grey of the image."""
  mean = x.mean()
  return array_namespace(x, factor).clip(mean + (x - mean) * factor, 0, 1)


def blur(x, sigma):
  """Gaussian of kernel 23, edges mirrored about the outermost pixels, as torchvision; 0 = none."""
  xp = array_namespace(x, sigma)
  if xp is np and sigma == 0:
    return x
  rows, cols = (matrices.blur(xp.asarray(sigma)[None], n, BLUR_RADIUS, 'whole')[0] for n in x.shape)
  return xp.matmul(xp.matmul(rows, x), cols.T)
