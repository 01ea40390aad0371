"""The DRR files of the released UniMiSS+ code, with its arithmetic.

Its renderer scales a CT sub-volume by its range, samples every ray once per millimetre, both ends
included, and adds up: no attenuation, no share of a step, no obliquity. The file is the shadow alone,
resized, in 8 bits. Here the samples are taken on planes parallel to the slices, whereas there they lie
on spheres about the source; and a ray which enters through a side has its samples in those planes too,
not counted from where it enters. The interior differs by less than 1e-3 (relative L2), pixels of the rim by more.

Volumes are in storage order, as SimpleITK returns them: the headers' directions are never read. numpy only.
"""
import numpy as np

from unimiss_jax.drr import bands, slices, xray
from unimiss_jax.drr.geometry import Detector

CAMERAS = (90., 0., 0.), (0., 90., 0.), (0., 0., 90.)    # turns about the axes of the camera, degrees
SAVED = 1    # the camera whose image is written; it looks along the first axis
SIDE = 224   # of the file, the shorter one


def render(volume_hu, spacing_mm, camera: int = SAVED, kind: str = 'bspline', step_mm: float = 1., side: int = SIDE):
  """The file made from one sub-volume.

  Args:
    volume_hu: `[D, H, W]` any number type and unit.
    spacing_mm: of its axes.
    camera: index of CAMERAS.
    kind: 'bspline' (released) or 'linear'.
    step_mm: between samples of a ray.
    side: pixels of the shorter side, at most; rounding may take one.

  Returns:
    uint8 `[side, >= side]` or `[>= side, side]`; of camera 1 the rows run along the last axis of the volume, the
    columns along the middle one.

  Raises:
    ValueError: the sub-volume is constant.
  """
  volume = xray.minmax(np.asarray(volume_hu, np.float64))
  sums = line_sums(volume, spacing_mm, *pose(CAMERAS[camera]), kind, step_mm)
  return quantize(resize(crop(sums), side))


def pose(turn_deg, shape=(1280, 1280), pixel_mm=(.287, .287), sdd_mm=2000., sod_mm=1800., volume_turn_deg=(90., 0., 0.),
         volume_shift_mm=(0., 0., 0.)):
  """Source and film of one camera, on the axes of the volume.

  The released projection matrix, K [I|0] T(0, 0, -sod) R(turn) [R(volume turn) | shift], sends rays away from the
  volume and then takes both signs of the ray parameter; the film is here where those lines really lie.

  Args:
    turn_deg: of the camera, about three axes, the first one first.
    shape: detector pixels (x, y).
    pixel_mm: likewise.
    sdd_mm, sod_mm: source to detector and to isocentre.
    volume_turn_deg, volume_shift_mm: the volume's own turn, and its shift after that.

  Returns:
    (source_mm, Detector); its rows are the detector's x, its columns y.
  """
  volume_turn = _rotation(volume_turn_deg)
  axes = _rotation(turn_deg) @ volume_turn    # rows: x, y and depth of the camera
  source = sod_mm * axes[2] - volume_shift_mm @ volume_turn
  steps = axes[:2] * np.array(pixel_mm)[:, None]
  corner = (np.array(shape) - 1) / 2
  return source, Detector(tuple(shape), source - sdd_mm * axes[2] - corner @ steps, *steps)


def line_sums(volume, spacing_mm, source_mm, film: Detector, kind: str = 'bspline', step_mm: float = 1.):
  """Sums of samples along rays times the step, `[x, y]`.

  A ray through the slices has its first sample on the face next to the film and its last one on the other face or
  less than a step before it: one more than fit into the thickness, each with its full weight.

  Args:
    volume: `[D, H, W]` float64.
    spacing_mm: of its axes.
    source_mm, film: as from `pose`, the film parallel to two axes of the volume.
    kind: 'bspline' or 'linear'; interpolates along the ray as within the slices.
    step_mm: between samples.
  """
  row, col = (int(np.argmax(np.abs(step))) for step in (film.row_step_mm, film.col_step_mm))
  march = 3 - row - col
  depth, spacing = volume.shape[march], spacing_mm[march]
  count = int(depth * spacing / step_mm + 1e-9) + 1
  at = np.minimum(np.arange(count) * step_mm / spacing, depth)[:, None] - .5    # voxels from the first face
  if source_mm[march] < 0:
    at = depth - 1 - at
  along = bands.weights(kind, at, 1., 0, np.arange(depth), depth, np.float64).sum(0)    # [depth]
  rows, cols, _ = slices.sampling(volume.shape, spacing_mm, source_mm, film, (march, row, col))
  return step_mm * bands.banded(volume.transpose(march, row, col) * along[:, None, None], rows, cols, kind)


def crop(sums):
  """The shadow: rays that meet nothing are cut off, first whole rows, then columns; `[x, y]` in, rows up out."""
  image = sums.T[::-1]
  image = image[image.sum(1) != 0]
  image = image[:, image.sum(0) != 0]
  if not image.size:
    raise ValueError('the sub-volume leaves no shadow: expected values which differ from each other')
  return image


def resize(image, side: int = SIDE):
  """Bilinear with half-pixel centres, without antialias, to side / shorter side; each side is cut to whole pixels."""
  scale = side / min(image.shape)    # computed first: 628 * (224 / 628) is 223.99999999999997, so 223 pixels
  for axis in range(2):
    n, out = image.shape[axis], int(image.shape[axis] * scale)
    at = np.clip((np.arange(out) + .5) * n / out - .5, 0, n - 1)
    low = at.astype(int)
    share = np.expand_dims(at - low, 1 - axis)
    image = image.take(low, axis) * (1 - share) + image.take(np.minimum(low + 1, n - 1), axis) * share
  return image


def quantize(image):
  """8 bits, cut rather than rounded."""
  return (xray.minmax(image) * 255 + .4999).astype(np.uint8)


def _rotation(degrees):
  (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
  about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
  about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
  about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
  return about_z @ about_y @ about_x
