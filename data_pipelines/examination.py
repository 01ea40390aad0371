"""One sample, read to its end -> what the doctor keeps of it: findings, numbers, what tells duplicates, a picture.

`examine` is a pure function without state, so any process may do any sample. It never raises: whatever goes wrong is
a finding.
"""
import time
import warnings
from typing import NamedTuple

import numpy as np

from data_pipelines import duplicates, finding, judgement, readers, sequences, thumbnails
from data_pipelines.errors import DataError
from data_pipelines.finding import Finding


class Job(NamedTuple):
  """A sample to look at.

  Attributes:
    row: of the manifest; `path`, `kind` and, if they are there, `paths`, `mask` and `view` are used.
    item: what was found at its path; None: it has to be found.
    fault: why it cannot be read, where that is known already.
    modality: 'ct', 'mr' or 'other'.
    format: of readers.item.
    as_slice: a DICOM file with one CT slice that is used as a picture.
    picture: whether to draw a thumbnail.
    resample_gaps: as of dicom.read.
  """
  row: dict
  item: readers.Item | None = None
  fault: DataError | None = None
  modality: str = 'ct'
  format: str = 'auto'
  as_slice: bool = False
  picture: bool = False
  resample_gaps: bool = False

  @property
  def shown(self) -> str:
    return self.item.path if self.item else self.row['path']


class Result(NamedTuple):
  """What a look at a sample gave.

  Attributes:
    findings: errors first, one per code.
    facts: sha, seconds; of what could be read also the manifest's shape, spacing, orient, shape_canon, hu_* (of the
      first sequence) and, of pictures, mode.
    slices: duplicates.slice_hashes of a volume.
    small: judgement.small of a picture.
    picture: PNG.
  """
  findings: list[Finding]
  facts: dict
  slices: tuple | None = None
  small: np.ndarray | None = None
  picture: bytes | None = None


def examine(job: Job) -> Result:
  """Reads and judges one sample (and its label map)."""
  began, facts, path = time.perf_counter(), {}, job.shown
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')    # of Pillow and NumPy; what matters is said by a finding
      result = _examine(job, facts)
  except DataError as e:
    result = Result([finding.of_error(e)], facts)
  except Exception as e:    # whatever a reader did not foresee is this file's fault alone
    unforeseen = Finding('ERROR', 'READER', path, f'unforeseen {type(e).__name__}: {str(e)[:300]}', 'excluded',
                         'leave the file out, and report this line')
    result = Result([unforeseen], facts)
  facts['seconds'] = round(time.perf_counter() - began, 3)
  return result


def _examine(job: Job, facts: dict) -> Result:
  if job.fault:
    raise job.fault
  if job.row['kind'] not in ('volume', 'image'):
    return Result([], facts)
  item = job.item or readers.of_row(job.row, job.format)
  facts['sha'] = readers.sha(item)
  if job.row['kind'] == 'image' and not job.as_slice:
    return _radiograph(job, item, facts)
  return _volume(job, item, facts)


def _volume(job: Job, item: readers.Item, facts: dict) -> Result:
  volume, *further = sequences.read(item, job.modality, job.resample_gaps)
  counts, least = judgement.histogram(volume.array), 1 if job.as_slice else judgement.LEAST
  findings = [finding.of_warning(text, item.path) for text in volume.meta['warnings']]
  findings += judgement.volume(volume, item.path, job.modality, least, counts)
  for other, part in zip(further, item.further):
    findings += [finding.of_warning(text, part.path) for text in other.meta['warnings']]
    findings += judgement.volume(other, part.path, job.modality, least)
  del further
  low, high = volume.meta['range']
  p1, p50, p99 = judgement.percentiles(volume.array, counts)
  (_, affine), grid = volume.meta['grid'], volume.meta['grid']
  facts |= {'shape': list(volume.meta['shape']), 'orient': volume.meta['axcodes'],
            'spacing': [round(float(s), 6) for s in np.linalg.norm(affine[:3, :3], axis=0)],
            'shape_canon': list(map(int, volume.meta['shape_canon'])),
            'hu_min': low, 'hu_p1': p1, 'hu_p50': p50, 'hu_p99': p99, 'hu_max': high}
  picture = thumbnails.of_volume(volume, job.modality) if job.picture else None
  slices = small = None
  if job.as_slice:
    small = judgement.small(volume.array[0])
  else:
    slices = duplicates.slice_hashes(volume.array)
  del volume    # before its label map comes
  if job.row.get('mask'):
    findings += _mask(job, grid)
  return Result(finding.worst_of_each_code(findings), facts, slices, small, picture)


def _mask(job: Job, grid) -> list[Finding]:
  path = job.row['mask']
  try:
    found = judgement.mask_grid(readers.volume(path).meta['grid'], grid, path)
  except DataError as e:
    found = finding.of_error(e)
  return [found] if found else []


def _radiograph(job: Job, item: readers.Item, facts: dict) -> Result:
  image = readers.image(item)
  findings = [finding.of_warning(text, item.path) for text in image.meta['warnings']]
  findings += judgement.radiograph(image, item.path, job.row.get('view'))
  width, height = image.meta['size']
  facts |= {'shape': [int(height), int(width)], 'mode': image.meta['mode']}
  if job.row.get('mask'):
    findings += _picture_mask(job, (width, height))
  return Result(finding.worst_of_each_code(findings), facts, None, judgement.small(image.array),
                thumbnails.of_radiograph(image.array) if job.picture else None)


def _picture_mask(job: Job, size) -> list[Finding]:
  path = job.row['mask']
  try:
    found = readers.image(path).meta['size']
  except DataError as e:
    return [finding.of_error(e)]
  if tuple(found) == tuple(size):
    return []
  return [Finding('ERROR', 'MASK_GRID', path, f'{found[0]} x {found[1]} pixels, its image {size[0]} x {size[1]}',
                  'excluded', 'resample it on the grid of its image')]
