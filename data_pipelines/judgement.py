"""Whether a volume or a radiograph that can be read is what it is taken for: its values, its size, its look.

`fit` is what training asks of every scan; `volume` and `radiograph` are the closer look of the doctor. All limits are
chosen by us. Those of LATERAL? and ROTATED? were set on 169 shared radiographs: 6 of 8 lateral and 2 of 2 turned
pictures were found, one frontal picture was taken for a turned one; they are hints and nothing more.
"""
import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

from data_pipelines import intensities
from data_pipelines.errors import DataError
from data_pipelines.finding import Finding, of_error, worst_of_each_code
from data_pipelines.images import Radiograph
from data_pipelines.volume import Volume

MODALITIES = ('ct', 'mr', 'other')
LEAST = 16                        # voxels per axis
LEAST_PIXELS = 32                 # short side of a picture: one token of the last stage
HU_RANGE = (-1024, 3071)
OBLIQUE_DEG = 20.
SLICE_MM, PIXEL_MM = 10., 3.      # refused above, warned above
NONFINITE = .01                   # of the voxels
PADDING = 1e-3                    # of the voxels
METAL = 1e-5                      # of the voxels
TISSUE_HU = (-150, 250)           # every patient has some
BODY_MM = 150.                    # narrowest body with lungs
LUNG_HU = (-950, -400)
LUNGS = .05                       # share of lung in body and lungs; gas in bowels is less
GRID = 96                         # voxels per axis of the grid on which a body is measured
SMALL = 32                        # side of the picture that is compared with its mirror images
TURNED = .45                      # by how much up-down symmetry exceeds left-right symmetry
LATERAL, LATERAL_ASPECT = .45, 1.1    # left-right symmetry below, height to width from
GRID_MM = 1e-2                    # between corners of two volumes on one grid, as a share of the smallest voxel: 1 %


def fit(volume: Volume, path, modality: str = 'ct', least: int = LEAST) -> list[Finding]:
  """Errors and warnings that decide whether a readable volume can be trained on.

  Args:
    modality: 'ct' asks for HU, 'mr' that a DICOM series is no other one.
    least: slices; in-plane it is always LEAST.

  Returns:
    Errors CONSTANT NONFINITE TOO_SMALL OBLIQUE SPACING, with modality 'mr' MODALITY, with modality 'ct'
    HU_UNCALIBRATED HU_INTERCEPT; warnings SPACING HU_PADDING.
  """
  meta, size, out = volume.meta, volume.array.size, []
  low, high = meta['range']
  found = lambda severity, code, *texts: out.append(Finding(severity, code, str(path), *texts))
  if low == high:
    found('ERROR', 'CONSTANT', f'every voxel is {low:g}', 'excluded (min-max would divide by zero)',
          'export it again or remove it')
  if meta['nonfinite'] > NONFINITE * size:
    found('ERROR', 'NONFINITE', f"{100 * meta['nonfinite'] / size:.1f} % of the voxels are not finite, at most 1 %",
          'excluded', 'export it again or remove it')
  shape = meta.get('shape_canon', volume.array.shape)    # straightening adds slices, but nothing to see in them
  if shape[0] < least and min(shape[1:]) >= LEAST:
    single = ' (usable as 2-D with --as=image)' if shape[0] == 1 and 'modality' in meta else ''
    found('ERROR', 'TOO_SMALL', f'{shape[0]} slice{"s" * (shape[0] > 1)}, need >= {least}',
          f'excluded for 3-D{single}', 'take a thicker stack, or remove it')
  elif min(shape[1:]) < LEAST:
    found('ERROR', 'TOO_SMALL', f'{" x ".join(map(str, shape))} voxels (S x A x R), need >= {LEAST} per axis',
          'excluded', 'remove it')
  if meta['oblique_deg'] > OBLIQUE_DEG:
    found('ERROR', 'OBLIQUE', f"axes {meta['oblique_deg']:.1f} deg from the patient axes, at most {OBLIQUE_DEG:g}",
          'excluded', 'export the axial series')
  if max(volume.spacing_mm) > SLICE_MM:
    found('ERROR', 'SPACING', f'voxels of {max(volume.spacing_mm):.2f} mm, at most {SLICE_MM:g}', 'excluded',
          'correct the affine in the header, or use thinner slices')
  elif max(volume.spacing_mm[1:]) > PIXEL_MM * 1.001:
    found('WARN', 'SPACING', f'pixels of {max(volume.spacing_mm[1:]):.2f} mm')
  if modality == 'mr' and meta.get('modality', 'MR') != 'MR':
    found('ERROR', 'MODALITY', f"is {meta['modality']} by its header, not MR", 'excluded', 'leave it out, or use '
          '--modality=other')
  if modality != 'ct' or low == high:
    return out
  if low >= 0 and 1000 < high <= 4095:
    found('ERROR', 'HU_INTERCEPT', f'values {low:g} … {high:g}, no negatives: looks like stored numbers without '
          'intercept -1024', 'excluded', 'subtract 1024, or set scl_inter')
  elif low >= -200 or (high <= 300 and meta['dtype'] in ('uint8', 'int8')):
    found('ERROR', 'HU_UNCALIBRATED', f'values {low:g} … {high:g}, no air; not HU', '',
          'rescale or use --modality=other (in a run: --config.data.modality=other)')
  padding = float((volume.array < HU_RANGE[0]).mean())
  if padding > PADDING:
    found('WARN', 'HU_PADDING', f'{100 * padding:.1f} % of voxels below {HU_RANGE[0]} (minimum {low:g}): '
          'scanner padding, clipped')
  return out


def volume(volume: Volume, path, modality: str = 'ct', least: int = LEAST, counts: np.ndarray | None = None
           ) -> list[Finding]:
  """All that a look at a readable volume tells.

  Args:
    modality, least: as of `fit`.
    counts: `histogram(volume.array)`, if it is known.

  Returns:
    Those of `fit`; ORIENT; with modality 'ct' HU_IMPLAUSIBLE HU_CLIPPED METAL BODY_SIZE, else CONSTANT of the
    foreground.
  """
  out, (low, high) = fit(volume, path, modality, least), volume.meta['range']
  found = lambda severity, code, *texts: out.append(Finding(severity, code, str(path), *texts))
  if volume.meta['axcodes'] != 'RAS':
    straight = volume.array.shape == volume.meta['shape_canon']
    found('INFO', 'ORIENT', f"stored {volume.meta['axcodes']}, reoriented {'exactly ' if straight else ''}to RAS")
  if low == high:
    return worst_of_each_code(out)
  if modality != 'ct':
    try:
      intensities.statistics(volume.array, modality, path)
    except DataError as e:
      out.append(of_error(e))
    return worst_of_each_code(out)
  counts = histogram(volume.array) if counts is None else counts
  uncalibrated = any(f.code in ('HU_UNCALIBRATED', 'HU_INTERCEPT') for f in out)
  if not uncalibrated and not counts[TISSUE_HU[0] + 2**15:TISSUE_HU[1] + 2**15 + 1].any():
    found('WARN', 'HU_IMPLAUSIBLE', f'all values {low:g} … {high:g}: no soft tissue', '',
          'check slope and intercept')
  if (low, high) == (-1024, 1024):
    found('INFO', 'HU_CLIPPED', 'clipped to +-1024 by its source')
  metal = counts[HU_RANGE[1] + 2**15:].sum() / volume.array.size
  if metal > METAL:
    found('INFO', 'METAL', f'{100 * metal:.3f} % of voxels at the upper limit ({HU_RANGE[1]} HU or more)')
  size = None if uncalibrated else body_mm(volume)
  if size and size[0] < BODY_MM:
    spacing = ' x '.join(f'{s:.3g}' for s in volume.spacing_mm[::-1])
    found('WARN', 'BODY_SIZE', f'body {size[0]:.0f} x {size[1]:.0f} mm at {spacing} mm',
          'header spacing probably wrong', 'correct the affine in the header')
  return worst_of_each_code(out)


def histogram(array: np.ndarray) -> np.ndarray:
  """int64 [65536]: how many voxels have the value index - 32768, rounded; slice by slice, as a copy may be large."""
  out = np.zeros(1 << 16, np.int64)
  for plane in array:
    if plane.dtype != np.int16:
      plane = np.clip(np.rint(plane), -2**15, 2**15 - 1).astype(np.int16)
    out += np.bincount((plane.ravel() ^ np.int16(-2**15)).view(np.uint16), minlength=1 << 16)
  return out


def percentiles(array: np.ndarray, counts: np.ndarray, shares=(1, 50, 99)) -> list[float]:
  """Exact for int16 (the smallest value that this share of the voxels does not exceed); of float32 from a sample.

  Args:
    counts: histogram(array).
  """
  if array.dtype == np.int16:
    below = np.cumsum(counts)
    return [float(np.searchsorted(below, max(1, below[-1] * s / 100)) - 2**15) for s in shares]
  step = max(1, round((array.size / 2e5) ** (1 / 3)))
  return [float(v) for v in np.percentile(array[::step, ::step, ::step], shares)]


def body_mm(volume: Volume) -> tuple[float, float] | None:
  """(right-left, anterior-posterior) extent of a body with lungs; None without lungs or where the picture cuts it.

  Lungs are air that no other air connects to the border of a slice, unless most of that is emptier than lungs (a head
  in its holder). Widths are taken in the slices and rows that pass through them, which leaves the couch out.
  """
  steps = [max(1, -(-n // GRID)) for n in volume.array.shape]
  hu = volume.array[tuple(slice(None, None, s) for s in steps)]
  (_, dy, dx), tissue = (s * mm for s, mm in zip(steps, volume.spacing_mm)), hu > LUNG_HU[1]
  cross = ndimage.generate_binary_structure(2, 1)
  air, count = ndimage.label(~tissue, np.stack([0 * cross, cross, 0 * cross]))    # slice by slice
  outside = np.zeros(count + 1, bool)
  outside[0] = True
  for edge in (air[:, 0], air[:, -1], air[:, :, 0], air[:, :, -1]):
    outside[edge] = True
  enclosed = ~outside[air]
  lungs = enclosed & (hu > LUNG_HU[0])
  total = np.count_nonzero(lungs)
  if not total or total < LUNGS * (total + np.count_nonzero(tissue)) or 2 * total < np.count_nonzero(enclosed):
    return None
  widths, depths = [], []
  for plane, lung in zip(tissue, lungs):
    if np.count_nonzero(lung) < total / len(lungs) / 2:    # the tips of the lungs
      continue
    rows = np.flatnonzero(lung.any(1))
    columns = np.flatnonzero(plane[rows[0]:rows[-1] + 1].any(0))
    if columns[0] == 0 or columns[-1] == plane.shape[1] - 1:
      return None
    parts, _ = ndimage.label(plane)
    body = np.flatnonzero((parts == np.bincount(parts.ravel())[1:].argmax() + 1).any(1))
    widths.append((columns[-1] + 1 - columns[0]) * dx)
    depths.append((body[-1] + 1 - body[0]) * dy)
  return (float(np.median(widths)), float(np.median(depths))) if widths else None


# ---- radiographs

def small(array: np.ndarray) -> np.ndarray:
  """[H, W] -> float32 [32, 32], box means, whatever the aspect: what pictures are compared by."""
  return np.asarray(Image.fromarray(array.astype(np.float32)).resize((SMALL, SMALL), Image.Resampling.BOX))


def radiograph(image: Radiograph, path, view: str | None = None) -> list[Finding]:
  """All that a look at a readable radiograph tells, besides its reader's warnings.

  Args:
    view: as the source has it; LATERAL? is not asked of a view that is known.

  Returns:
    Errors CONSTANT TOO_SMALL; MODE MONO1; hints ROTATED? LATERAL?.
  """
  out, (width, height) = [], image.meta['size']
  found = lambda severity, code, *texts: out.append(Finding(severity, code, str(path), *texts))
  if image.array.min() == image.array.max():
    found('ERROR', 'CONSTANT', f'every pixel is {image.array.min()}', 'excluded', 'export it again or remove it')
    return out
  if min(width, height) < LEAST_PIXELS:
    found('ERROR', 'TOO_SMALL', f'{width} x {height} pixels, need >= {LEAST_PIXELS} a side', 'excluded', 'remove it')
  mode = image.meta['mode']
  if mode.startswith('MONOCHROME1'):
    found('INFO', 'MONO1', f'inverted ({mode.partition(" ")[2]})')
  elif mode in ('RGBA', 'LA', 'PA'):
    found('INFO', 'MODE', f'{mode}, alpha constant 255', 'one channel kept')
  elif mode.startswith('I;16'):
    found('INFO', 'MODE', '16 bit', 'kept, stretched to full scale')
  elif mode not in ('L', '1') and not mode.startswith('MONOCHROME'):
    found('INFO', 'MODE', f'{mode}, all grey', 'one channel kept')
  across, along = symmetry(small(image.array))
  if across < LATERAL and height >= LATERAL_ASPECT * width:
    if not view:
      found('WARN', 'LATERAL?', f'looks like a side view (left-right symmetry {across:.2f})', 'not changed',
            'say its view in the list')
  elif along - across > TURNED:
    found('WARN', 'ROTATED?', f'looks turned by 90 deg (left-right symmetry {across:.2f}, up-down {along:.2f})',
          'not changed', 'turn it upright, or leave it out')
  return out


def symmetry(picture: np.ndarray) -> tuple[float, float]:
  """Correlation of a picture [n, n] with its left-right and with its up-down mirror image."""
  centred = picture - picture.mean()
  power = max(float((centred ** 2).sum()), 1e-12)
  return tuple(float((centred * mirror).sum()) / power for mirror in (centred[:, ::-1], centred[::-1]))


# ---- label maps

def mask_grid(grid, of_image, path) -> Finding | None:
  """MASK_GRID where a label map does not lie on the grid of its image, in whatever axis order each is stored.

  Args:
    grid, of_image: (shape, affine [4, 4] to RAS mm), as of Volume.meta.
    path: of the label map.
  """
  text = grid_differs(grid, of_image, 'its image')
  if not text:
    return None
  return Finding('ERROR', 'MASK_GRID', str(path), text, 'excluded', 'resample it on the grid of its image')


def grid_differs(grid, of_other, other: str) -> str:
  """In what a grid is not that of another volume, in words; '' where they are one. Arguments as of mask_grid."""
  (shape, affine), (expected, goal) = _in_ras(*grid), _in_ras(*of_other)
  shown = lambda shape: ' x '.join(map(str, shape))
  if shape != expected:
    return f'shape {shown(shape)}, {other} {shown(expected)} (R x A x S)'
  corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]).T
  corners[:3] *= np.array(shape)[:, None] - 1
  size = np.linalg.norm(goal[:3, :3], axis=0)
  if np.abs((affine - goal) @ corners).max() <= GRID_MM * size.min():
    return ''
  shift = np.linalg.solve(goal[:3, :3], affine[:3, 3] - goal[:3, 3])    # in voxels R, A, S
  if np.abs((affine - goal)[:3, :3]).max() > 1e-3 * size.min():
    mine = np.round(np.linalg.norm(affine[:3, :3], axis=0), 3)
    return f'voxels of {shown(mine)} mm, {other} {shown(np.round(size, 3))} mm, or other directions'
  axis = int(np.abs(shift).argmax())
  return f'origin differs by {abs(shift[axis]):.3g} {("columns", "rows", "slices")[axis]} from {other}'


def _in_ras(shape, affine) -> tuple[tuple, np.ndarray]:
  turn = nib.io_orientation(affine)
  order = np.argsort(turn[:, 0])
  return tuple(int(shape[i]) for i in order), affine @ nib.orientations.inv_ornt_aff(turn, shape)
