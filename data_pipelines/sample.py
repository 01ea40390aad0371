"""From a record and drawn parameters to the finished views: the only place where drr and views meet."""
import importlib

import numpy as np

from data_pipelines import draw
from unimiss_jax.drr import geometry, project, xray
from unimiss_jax.views import image, volume

# With drr.p_ref = 0, white is this multiple of a path full of water: a slab of the trunk is all body, with bone above
# water; across the trunk the path begins and ends in air. Looked at on chest and abdomen CT: nothing of note saturates.
WHITE = {'axial': 1.25, 'ap': 1., 'pa': 1., 'lateral': 1.1}
MU_WATER = {'water': xray.MU_WATER, 'bone_soft': xray.SOFT, 'minmax': .5}    # 1/mm, by attenuation model
DRR_LOSSES = 'drr', 'recon_drr', 'pair_nce'
# drr.image -> where the views are made
RADIOGRAPHS = dict.fromkeys(('line', 'transmission', 'minmax'), __name__) | {'reference': 'data_pipelines.reference'}


def needs_drr(config) -> bool:
  """Whether a loss of the run looks at DRR: rendering them is the dearest part of a CT sample."""
  return 'loss' not in config or any(config.loss.get(name, 1.) for name in DRR_LOSSES)


def ct_sample(record: dict, params: dict, config, drr: bool = True) -> dict:
  """CT views and DRR views of one CT record; the views of a record of another modality.

  Args:
    record: `volume` [D, H, W] HU, axes [S, A, R], `spacing_mm` (z, y, x); with drr.scope='volume' also
      `whole` and `whole_spacing_mm`. Of another modality `volume` [C, D, H, W] and `pad` [C], see intensities.py.
      `shape`, `whole_shape` [3]: of the part, at the start of the axes, which is the volume; absent: all of it.
    params: as `draw.ct_pair` or `draw.ct_centre` make them.
    config: the run config.
    drr: False leaves the DRR views out; of another modality there are none.

  Returns:
    {'ct': `[V, D, H, W, C]` float32, HU / 1024 or z-scores, after augmentation, 'drr': `[V, h, w, 3]` float32 in
    [0, 1]}. The sequences of a record share their draws; only the noise of each is its own.
  """
  ct = volumes(record, params['ct'], config)
  if 'drr' not in params or not drr:
    return {'ct': ct}
  names = (('whole', 'whole_spacing_mm', 'whole_shape') if config.drr.scope == 'volume' else
           ('volume', 'spacing_mm', 'shape'))
  given = [record[name] for name in names if name in record]
  render = importlib.import_module(RADIOGRAPHS[config.drr.image]).radiographs
  return {'ct': ct, 'drr': _rgb(render(*given[:2], each(params['drr']), config, *given[2:]))}


def volumes(record: dict, params: dict, config):
  """CT views [V, D, H, W, C] float32 of one record; `params`: the views, as 'ct' of `draw.ct_pair`."""
  sequences, pads = (record['volume'], record['pad']) if 'pad' in record else ([record['volume']], [None])
  xp, shape = geometry.array_namespace(record['volume']), record.get('shape')
  return xp.stack([xp.stack([volume.view(x, p | {'noise_key': p['noise_key'] + np.uint32(c)}, config.views.ct, pad,
                                         shape)
                             for c, (x, pad) in enumerate(zip(sequences, pads))], -1) for p in each(params)])


def sizes(record) -> tuple:
  """Shape and spacing of a CT record, and of the whole scan where it carries that."""
  whole = record.get('whole')
  rest = () if whole is None else (whole.shape, record['whole_spacing_mm'])
  return (record['volume'].shape[-3:], record['spacing_mm'], *rest)


def radiographs(hu, spacing_mm, params, config, shape=None) -> list:
  """DRR views `[h, w]` float32 in [0, 1] of one volume.

  Args:
    hu: `[D, H, W]`.
    spacing_mm: (z, y, x).
    params: the views, as 'drr' of `draw.ct_pair`.
    config: the run config; reads drr, views.drr.
    shape: `[3]` of the part of `hu` which is the volume; the rest holds values of it, as the model 'minmax' needs.
  """
  cfg, xp = config.drr, geometry.array_namespace(hu)
  extent = hu.shape if shape is None else shape
  mu, unit = xray.attenuation(hu, cfg.mu)
  p_ref = cfg.p_ref or white(cfg.view, extent, spacing_mm, cfg.mu)
  # The window is given on the isocentre plane, so the image does not depend on where behind a wide volume the film is.
  corner = xp.linalg.norm(xp.asarray(extent) * xp.asarray(spacing_mm)) / 2
  size = (config.views.drr.size,) * 2
  views = []
  for p in params:
    tilt = p['tilt_deg'] if cfg.tilt_deg else np.zeros(3)    # known to be none, even where numbers are traced
    leaning = xp.linalg.norm(xp.sin(xp.deg2rad(tilt[:2])))    # brings the film closer on one side
    sdd = xp.maximum(cfg.sdd_mm, cfg.sod_mm + corner + leaning * xp.linalg.norm(p['center_mm']))
    source, film = geometry.camera(cfg.view, p['center_mm'], p['pitch_mm'], size, sdd, cfg.sod_mm, p['offset_mm'],
                                   tilt)
    march = geometry.VIEWS[cfg.view].axes[0]
    line_integrals = project(mu, spacing_mm, source, film, cfg.kind, shape, march) * np.float32(unit)
    views.append(image.photometric(xray.to_image(line_integrals, cfg.image, p_ref, cfg.quantize), p))
  return views


def xray_sample(record: dict, params: dict, config) -> dict:
  """Views of one radiograph: {'xray': `[V, h, w, 3]` float32 in [0, 1]}, and 'local', its small crops, where drawn.

  Args:
    record: `image` [H, W] uint8 or uint16.
    params: as `draw.xray_pair` or `draw.xray_centre` make them.
    config: the run config.
  """
  leaves = {'xray': config.views.xray, 'local': draw.local(config)}
  return {name: _rgb([image.view(record['image'], p, leaves[name]) for p in each(params[name])]) for name in params}


def white(view: str, shape, spacing_mm, mu: str) -> float:
  """The line integral that is shown as white where the config gives none.

  Args:
    view: name of the DRR view.
    shape, spacing_mm: of the volume that is projected.
    mu: attenuation model.
  """
  return WHITE[view] * MU_WATER[mu] * path_mm(view, shape, spacing_mm)


def path_mm(view: str, shape, spacing_mm) -> float:
  """Thickness of the volume along the beam."""
  march = geometry.VIEWS[view].axes[0]
  return shape[march] * spacing_mm[march]


def each(params: dict) -> list[dict]:
  """Parameters of several views -> those of each view."""
  n = len(next(iter(params.values())))
  return [{name: values[i] for name, values in params.items()} for i in range(n)]


def _rgb(images):    # V x [h, w] -> [V, h, w, 3]
  xp = geometry.array_namespace(images)
  return xp.repeat(xp.stack(images)[..., None], 3, axis=-1)
