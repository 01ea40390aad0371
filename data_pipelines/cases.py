"""From a labelled record to what a network is given: the random view it learns from, and the views it is tested by."""
import itertools
import os
import re

import numpy as np
from etils import epath
from PIL import Image

from data_pipelines import draw, labelled, nifti, sample, windows
from unimiss_jax.views import image, matrices, volume, warp


def view(name: str, record: dict, config, rng) -> dict:
  """One random view of a labelled record.

  Args:
    name: 'ct' or 'xray'.
    record: as labelled.source gives it.
    config: the run config; reads views, task.
    rng: np.random.Generator.

  Returns:
    {'ct': [1, D, H, W, C] or 'xray': [1, h, w, 3] float32, and 'label' [C] float32 or 'mask' uint8 [*S] or [*S, C]}.
  """
  if name == 'ct':
    shape = record['volume'].shape[-3:]
    params = draw.ct_view(rng, config, shape, _focus(rng, record, config.task))['ct']
    params = draw.warped(rng, config.task, params, config.views.ct.size, record['spacing_mm'])
    made = _volumes(record, params, config)
  else:
    shape = record['image'].shape
    params = draw.xray_view(rng, config, shape)['xray']
    params = draw.warped(rng, config.task, params, (config.views.xray.size,) * 2, (1., 1.))
    made = pictures(record, params, config)
  if config.task.kind == 'cls':
    return {name: made, 'label': record['label']}
  return {name: made, 'mask': cut(record['mask'], {k: v[0] for k, v in params.items()}, made.shape[1:-1])}


def cut(mask: np.ndarray, params: dict, size) -> np.ndarray:
  """The box of a mask [*S, ...] as a view of `size` shows it: the label at the centre of each pixel, 0 outside."""
  if 'grid' in params:
    return warp.labels(mask, params, size)
  for axis, m in enumerate(size):
    at = matrices.nearest(params['box_start'][axis], params['box_size'][axis], mask.shape[axis], m,
                          params['flip'][axis])
    mask = mask.take(at, axis)
    mask[(slice(None),) * axis + (at < 0,)] = 0
  return mask


def _focus(rng, record, task):
  """Voxel that a patch must hold: of a random class of the mask, in a share task.foreground of the patches."""
  if task.kind == 'cls' or rng.random() >= task.foreground:
    return None
  flat = record['mask'].reshape(*record['mask'].shape[:3], -1)
  present = np.unique(flat)[1:] if task.exclusive else np.flatnonzero(flat.any((0, 1, 2)))
  if not len(present):
    return None
  chosen = rng.choice(present)
  where = np.flatnonzero(flat[..., 0] == chosen if task.exclusive else flat[..., chosen])
  return np.unravel_index(where[rng.integers(len(where))], flat.shape[:3])


def _volumes(record, params, config) -> np.ndarray:    # [V, D, H, W, C]
  return normalised(sample.volumes(record, params, config), config.task, volume.SCALE)


def pictures(record, params, config) -> np.ndarray:
  """Views [V, h, w, 3] of a radiograph with these parameters, normalised as the task wants them."""
  x = np.stack([image.view(record['image'], p, config.views.xray) for p in sample.each(params)])[..., None]
  return np.repeat(normalised(x, config.task, 1.), 3, -1)


def normalised(x, task, scale: float):
  """(value - mean) / std, values in HU for volumes and of [0, 1] for pictures; `scale` = value of 1 in x."""
  low, high = task.clip
  if high > low:
    x = np.clip(x, low / scale, high / scale)
  mean, std = task.normalise
  return ((x - mean / scale) / (std / scale)).astype(np.float32) if std else x


# ---- tests

def of(config, split: str, source=None):
  """The cases of the split of a task; `source` = its records, where they are open already. Raises DataError."""
  name = 'ct' if config.phases.ct else 'xray'
  return Cases(name, config, split, source or labelled.source(name, config, split))


class Cases:
  """The patients of one split, one after the other.

  Attributes:
    classes: names.
    stream: 'ct' or 'xray'.
    size: [D, H, W] or [h, w] of what the network is given.
  """

  def __init__(self, stream: str, config, split: str, source):
    self.stream, self.config, self.name, self.source = stream, config, f'{split} cases', source
    self.classes, self.groups = self.source.classes, self.source.groups()
    self.size = tuple(config.views.ct.size) if stream == 'ct' else (config.views.xray.size,) * 2

  def __len__(self):
    return len(self.source)

  @property
  def digest(self) -> str:
    return self.source.digest

  def record(self, i: int) -> dict:
    return self.source[i]

  def views(self, record) -> np.ndarray:
    """What a case is classified by: [V, *size, C]; the mean over the views counts."""
    return self._of_volume(record) if self.stream == 'ct' else self._of_picture(record)

  def plain(self, record) -> np.ndarray:
    """The centre view alone, [*size, C]."""
    if self.stream == 'ct':
      return _volumes(record, draw.ct_centre(self.config, *_geometry(record))['ct'], self.config)[0]
    return pictures(record, draw.xray_centre(self.config, record['image'].shape)['xray'], self.config)[0]

  def working(self, record) -> np.ndarray:
    """What a case is segmented on: [D, H, W, C] at task.spacing_mm, or the whole picture as [*size, 3]."""
    if self.stream == 'xray':
      return pictures(record, draw.xray_whole(record['image'].shape)['xray'], self.config)[0]
    x = np.moveaxis(record['volume'].reshape(-1, *record['volume'].shape[-3:]), 0, -1) / np.float32(volume.SCALE)
    return normalised(x, self.config.task, volume.SCALE)

  def save(self, i: int, labels: np.ndarray, folder) -> None:
    """Writes a predicted label map beside the others: NIfTI on the grid of the scan's file, PNG on the pixels of the
    picture's file; a file for each class where they are not exclusive. Raises DataError."""
    name = re.sub(r'[^\w.-]+', '_', self.source.listing()[i]['id'])
    parts = {'': labels} if self.config.task.exclusive else {
        f'_{c}': labels[..., k] for k, c in enumerate(self.classes)}
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    for end, part in parts.items():
      path = os.path.join(folder, name + end)
      if self.stream == 'ct':
        nifti.write(f'{path}.nii.gz', part, self.source.grid(i))
      else:
        Image.fromarray(labelled.shrunk(part, self.source.grid(i))).save(f'{path}.png')

  def _of_volume(self, record):
    shape, cfg = record['volume'].shape[-3:], self.config.views.ct
    params = draw.ct_centre(self.config, *_geometry(record))['ct']
    if self.config.task.test_view == 'windows':
      starts = [windows.spread(n, m, max(m // 2, 1)) for n, m in zip(shape, cfg.size)]
      corners = np.array(list(itertools.product(*starts)), np.float32)
      params = {k: np.repeat(v, len(corners), 0) for k, v in params.items()} | {'box_start': corners}
    return _volumes(record, params, self.config)

  def _of_picture(self, record):
    shape, how = record['image'].shape, self.config.task.test_view
    if how == 'centre':
      return self.plain(record)[None]
    params = draw.xray_whole(shape)['xray']
    if how != 'tencrop':
      return pictures(record, params, self.config)
    flips = np.array(list(itertools.product((False, True), repeat=2)))       # 5 crops x 4 flips: 20 distinct views
    wide = np.round(np.array(shape) * (self.size[0] / TEN_CROP_OF))          # whole pixels, as bicubic wants them
    corners = [np.floor(np.multiply(at, shape - wide)) for at in ((0, 0), (0, 1), (1, 0), (1, 1), (.5, .5))]
    params = {k: np.repeat(v, 20, 0) for k, v in params.items()}
    params |= {'box_start': np.repeat(np.array(corners, np.float32), 4, 0), 'flip': np.tile(flips, (5, 1)),
               'box_size': np.repeat(wide[None].astype(np.float32), 20, 0)}
    return pictures(record, params, self.config)


def _geometry(record) -> tuple:
  return record['volume'].shape[-3:], record['spacing_mm']


TEN_CROP_OF = 256.      # pixels of the picture that crops of views.xray.size are cut from
