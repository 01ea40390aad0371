"""Volumes whose unit means nothing (MR, and what is neither CT nor MR) -> z-scores as int16, and how to go back.

  z = (clip(value, p0.5, p99.5) - mean) / deviation,    stored = round(1024 z),    value = stored * scale + offset

Percentiles, mean and deviation (both of what was clipped) are those of the foreground of one sequence of one scan: of
MR the voxels that are not 0, as 0 is what scanners and skull stripping leave outside of the body; of others every
voxel. The way back gives each value within the percentiles to half a `scale`. int16 is always wide enough: half a
percent of the foreground lies at either end, so |z| < sqrt(199) by Cantelli's inequality. The network divides by 1024,
as it does HU. The shares are chosen by us.
"""
import numpy as np

from data_pipelines.errors import DataError
from unimiss_jax.views.volume import SCALE

PERCENTILES = .5, 99.5


def standardised(array: np.ndarray, modality: str, path) -> tuple[np.ndarray, dict]:
  """Stored z-scores of one sequence, and what they mean.

  Args:
    array: [D, H, W], finite.
    modality: 'mr' or 'other'.
    path: for the message.

  Returns:
    int16 [D, H, W] and {'scale', 'offset': float32 (see above), 'pad': float32, the stored number that is written where
    a volume is filled up, that of the lower percentile}.

  Raises:
    DataError: CONSTANT.
  """
  low, high, mean, deviation = statistics(array, modality, path)
  scale, offset = np.float32(deviation / SCALE), np.float32(mean)
  stored = lambda values: np.rint((np.clip(values, low, high) - float(offset)) / float(scale))
  out = np.empty(array.shape, np.int16)
  for to, plane in zip(out, array):    # float64, a slice at a time
    to[:] = stored(plane)
  return out, {'scale': scale, 'offset': offset, 'pad': np.float32(stored(low))}


def statistics(array: np.ndarray, modality: str, path) -> tuple[float, float, float, float]:
  """Lower and upper percentile of the foreground, mean and deviation between them. Arguments and error as above."""
  foreground = (lambda plane: plane[plane != 0]) if modality == 'mr' else np.ravel
  values = np.concatenate([foreground(plane) for plane in array])
  if not values.size:
    raise _constant(path, 0)
  low, high = (float(v) for v in np.percentile(values, PERCENTILES, overwrite_input=True))
  size = values.size
  del values
  between = lambda: (np.clip(foreground(plane), low, high).astype(np.float64) for plane in array)
  mean = sum(part.sum() for part in between()) / size
  deviation = np.sqrt(sum(((part - mean) ** 2).sum() for part in between()) / size)
  if not np.float32(deviation / SCALE) > 0:
    raise _constant(path, low)
  return low, high, float(mean), float(deviation)


def _constant(path, value: float) -> DataError:
  return DataError('CONSTANT', path, f'99 % of its foreground have the value {value:g}: nothing to scale',
                   'remove it; a label map is not an image')
