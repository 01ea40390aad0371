"""An exact ray tracer in float64 (Siddon, Med. Phys. 1985), ours and independent, confirms the stored references."""
import numpy as np
import pytest

from unimiss_jax.drr import hu_to_mu

NAMES = ('box_ax0', 'box_ax1', 'box_ax2', 'ellipsoid', 'smooth_ax0', 'smooth_ax1', 'smooth_ax2', 'chest_slab_ax0',
         'chest_slab_ax1', 'wide_cone_box', 'wide_cone_smooth', 'tilt_20_10', 'tilt_5_3_15', 'bead')


def siddon(volume, spacing, source, targets):
  """Line integrals from a source to targets [N, 3] through piecewise constant voxels."""
  size = np.array(volume.shape)
  ray = targets - source
  crossings = []
  for axis in range(3):
    planes = (np.arange(size[axis] + 1) - size[axis] / 2) * spacing[axis]
    slope = np.where(ray[:, axis] == 0, np.nan, ray[:, axis])
    crossings.append((planes - source[axis]) / slope[:, None])
  alpha = np.concatenate(crossings, 1)
  alpha = np.sort(np.clip(np.where(np.isnan(alpha), 0, alpha), 0, 1), 1)
  middle = (alpha[:, 1:] + alpha[:, :-1]) / 2
  index = np.floor((source + middle[..., None] * ray[:, None]) / spacing + size / 2).astype(int)
  inside = ((index >= 0) & (index < size)).all(-1)
  values = volume[tuple(np.clip(index, 0, size - 1).transpose(2, 0, 1))] * inside
  return (values * np.diff(alpha)).sum(1) * np.linalg.norm(ray, axis=1)


@pytest.mark.parametrize('name', NAMES)
def test_siddon(fixtures, name):
  data = np.load(fixtures / 'drr' / f'{name}.npz')
  volume = data['volume'].astype(float)
  volume = hu_to_mu(volume, mu_water=float(data['mu_water'])) if data['is_hu'] else volume
  h, w = data['siddon64'].shape
  step = max(1, h // 64)    # every fourth row of the large one
  rows = np.arange(0, h, step)
  targets = data['det_origin'] + rows[:, None, None] * data['det_dv'] + np.arange(w)[:, None] * data['det_du']
  image = siddon(volume, data['spacing'], data['source'], targets.reshape(-1, 3)).reshape(len(rows), w)
  expected = data['siddon64'][::step]
  assert np.linalg.norm(image - expected) / np.linalg.norm(expected) < 1e-5
