"""A turned, sheared or elastically deformed view, cut from a larger one about the same centre.

The box and the output of a view grow by the margin that the deformed grid reaches beyond it, so corners show what lies
there and not a border; then the grid is sampled linearly. numpy only: these are the augmentations of fine-tuning.
"""
import numpy as np


def grid(matrix, size, field=0.) -> np.ndarray:
  """Where each pixel of a view is taken from, `[n, *size]` float32 in pixels of the view from its centre.

  Args:
    matrix: `[n, n]`, applied to the places of the pixels.
    size: `[n]` of the view.
    field: `[n, *size]` pixels, added.
  """
  axes = np.meshgrid(*(np.arange(m) - (m - 1) / 2 for m in size), indexing='ij')
  return (np.tensordot(matrix, np.stack(axes), 1) + field).astype(np.float32)


def rotation(degrees) -> np.ndarray:
  """`[3, 3]` about the axes z, y, x in turn, or `[2, 2]` of one angle: place p shows what lies at rotation @ p."""
  if len(degrees) == 1:
    c, s = np.cos(np.deg2rad(degrees[0])), np.sin(np.deg2rad(degrees[0]))
    return np.array([[c, -s], [s, c]])
  made = np.eye(3)
  for axis, angle in enumerate(degrees):
    plane = [i for i in range(3) if i != axis]
    turn = np.eye(3)
    turn[np.ix_(plane, plane)] = rotation([angle])
    made = made @ turn
  return made


def elastic(rng, size, alpha: float, sigma: float) -> np.ndarray:
  """`[n, *size]` pixels: uniform noise of [-1, 1] behind a Gaussian of sigma pixels, times alpha (Simard 2003)."""
  from scipy import ndimage  # late: pre-training does not need it
  noise = rng.uniform(-1, 1, (len(size), *size)).astype(np.float32)
  return alpha * np.stack([ndimage.gaussian_filter(x, sigma, mode='constant') for x in noise])


def view(cut, params, size):
  """cut(box_start, box_size, out), the view of a box, on the grid `params['grid']`; as it is where there is none."""
  start, extent = params['box_start'], params['box_size']
  if 'grid' not in params:
    return cut(start, extent, size)
  from scipy import ndimage  # late: pre-training does not need it
  half = (np.array(size) - 1) / 2
  far = np.abs(params['grid']).reshape(len(half), -1).max(1)
  margin = np.ceil(np.maximum(far - half - 1e-4, 0)).astype(int)      # float32 does not end a grid exactly
  larger = extent * (1 + 2 * margin / size)
  x = cut(start - (larger - extent) / 2, larger, tuple(size + 2 * margin))
  at = params['grid'] + (half + margin).reshape(-1, *[1] * len(half))
  return ndimage.map_coordinates(x, at, order=1, mode='nearest')


def labels(mask, params, size) -> np.ndarray:
  """A mask `[*S, ...]` on the grid of `params`, `[*size, ...]`: the label at the centre of each pixel, 0 outside."""
  n, index, inside = len(size), [], True
  for axis in range(n):
    start, extent = float(params['box_start'][axis]), float(params['box_size'][axis])
    at = (params['grid'][axis] + size[axis] / 2) * (extent / size[axis])
    at = np.floor(start + (extent - at if params['flip'][axis] else at)).astype(int)
    inside = inside & (at >= 0) & (at < mask.shape[axis])
    index.append(np.clip(at, 0, mask.shape[axis] - 1))
  found = mask[tuple(index)]
  return np.where(inside.reshape(*inside.shape, *[1] * (found.ndim - n)), found, 0).astype(mask.dtype)
