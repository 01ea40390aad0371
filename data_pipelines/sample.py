"""From a record and drawn parameters to the finished views: the only place where drr and views meet."""
import numpy as np

from unimiss_jax.drr import geometry, project, xray
from unimiss_jax.views import image, volume

# Attenuation of the material that `p_ref = 0` shows at 4/5 of white, when it fills the whole path (1/mm).
MU_FULL = {'water': xray.MU_WATER, 'bone_soft': xray.SOFT, 'minmax': .5}


def ct_sample(record: dict, params: dict, config) -> dict:
  """CT views and DRR views of one CT record.

  Args:
    record: `volume` [D, H, W] HU, axes [S, A, R], `spacing_mm` (z, y, x); with drr.scope='volume' also
      `whole` and `whole_spacing_mm`.
    params: as `draw.ct_pair` or `draw.ct_centre` make them.
    config: the run config.

  Returns:
    {'ct': `[V, D, H, W, 1]` float32, HU / 1024 after augmentation, 'drr': `[V, h, w, 3]` float32 in [0, 1]}.
  """
  cfg = config.drr
  ct = np.stack([volume.view(record['volume'], p, config.views.ct) for p in _views(params['ct'])])
  hu, spacing = ((record['whole'], record['whole_spacing_mm']) if cfg.scope == 'volume' else
                 (record['volume'], record['spacing_mm']))
  mu = xray.hu_to_mu(hu, cfg.mu)
  p_ref = cfg.p_ref or white(cfg.view, mu.shape, spacing, cfg.mu)
  size = (config.views.drr.size,) * 2
  drr = []
  for p in _views(params['drr']):
    source, film = geometry.camera(cfg.view, p['center_mm'], p['pitch_mm'], size, cfg.sdd_mm, cfg.sod_mm,
                                   p['offset_mm'])
    plain = xray.to_image(project(mu, spacing, source, film, cfg.kind), cfg.image, p_ref, cfg.quantize)
    drr.append(image.photometric(plain, p))
  return {'ct': ct[..., None], 'drr': _rgb(drr)}


def xray_sample(record: dict, params: dict, config) -> dict:
  """Views of one radiograph: {'xray': `[V, h, w, 3]` float32 in [0, 1]}.

  Args:
    record: `image` [H, W] uint8 or uint16.
    params: as `draw.xray_pair` or `draw.xray_centre` make them.
    config: the run config.
  """
  return {'xray': _rgb([image.view(record['image'], p, config.views.xray) for p in _views(params['xray'])])}


def white(view: str, shape, spacing_mm, mu: str) -> float:
  """The line integral that is shown as white where the config gives none: 5/4 of a path full of water.

  Args:
    view: name of the DRR view.
    shape, spacing_mm: of the volume that is projected.
    mu: attenuation model.
  """
  march = geometry.VIEWS[view].axes[0]
  return 1.25 * MU_FULL[mu] * shape[march] * spacing_mm[march]


def _views(params: dict) -> list[dict]:
  n = len(next(iter(params.values())))
  return [{name: values[i] for name, values in params.items()} for i in range(n)]


def _rgb(images):    # V x [h, w] -> [V, h, w, 3]
  return np.repeat(np.stack(images)[..., None], 3, axis=-1)
