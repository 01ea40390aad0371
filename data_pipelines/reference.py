"""DRR views as the released UniMiSS+ code has them: cut out of an 8-bit file, on whole pixels, as from a radiograph."""
import numpy as np

from unimiss_jax.drr import geometry, reference
from unimiss_jax.views import image


def radiographs(hu, spacing_mm, params, config) -> list:
  """Views `[h, w]` float32 in [0, 1]; arguments as of `sample.radiographs`.

  The released renderer fixes camera, scaling and 8 bits: of the leaves drr.* only `kind` is read, and `view` must be
  'axial'. A window is the same share of the file as it is of the field. Volumes are turned to the storage order of
  the released examples: against the patient axes, [I, L, P].
  """
  if config.drr.view != 'axial':
    raise ValueError(f'drr.view={config.drr.view}: the released renderer looks along the body axis only; use axial, or '
                     'another drr.image')
  storage = hu[::-1, ::-1, ::-1].transpose(0, 2, 1)
  file = reference.render(storage, np.take(spacing_mm, (0, 2, 1)), kind=config.drr.kind)
  scale = np.array(file.shape) / geometry.field('axial', hu.shape, spacing_mm, config.drr.sod_mm)    # pixels per mm
  views = []
  for p in params:
    size = np.abs(p['pitch_mm']) * config.views.drr.size * scale
    start = p['center_mm'] * scale + (file.shape - size) / 2
    size = np.clip(np.round(size), 1, file.shape)
    start = np.clip(np.round(start), 0, file.shape - size)
    box = dict(box_start=start, box_size=size, flip=np.less(p['pitch_mm'], 0))
    views.append(image.view(file, p | box, config.views.drr))
  return views
