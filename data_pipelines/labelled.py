"""Records with labels, for fine-tuning and its tests: phantoms, or the rows of one split of a manifest.

A record is that of sources.py with `label` [C] float32 (1 yes, 0 no, -1 not known), or `mask` uint8: [*S] with 0 =
background and c + 1 = class c where task.exclusive is set, else [*S, C] of 0 and 1. Of a volume that task.spacing_mm
resamples, `truth` is the mask on the grid that it came on and `truth_mm` that grid's spacing; of others mask and truth
are the same.
"""
import os
from concurrent import futures

import numpy as np

from data_pipelines import files, fractions, images, judgement, manifest, phantom, readers, tiles
from data_pipelines.errors import DataError
from data_pipelines.sources import Cache, _digest
from data_pipelines.volume import Volume
from unimiss_jax.views import matrices

KINDS = {'ct': 'volume', 'xray': 'image'}      # stream -> kind of a row
PHANTOM_PARTS = {'train': ('development', 0), 'val': ('development', 500_000), 'test': ('heldout', 0)}
LUNG = ('lung_right', 'lung_left')             # what covers them in a label map counts as lung in an outline
OUTLINES = {'lungs': (*LUNG, 'effusion', 'consolidation', 'nodule', 'distractor'), 'heart': ('heart',),
            'lung_right': ('lung_right',), 'lung_left': ('lung_left',), 'spine': ('spine',), 'liver': ('liver',)}
UNKNOWN = -1.
TILTED = 'OBLIQUE', 'SHEAR', 'GANTRY_TILT'


def source(name: str, config, split: str = 'train'):
  """The labelled records of a stream, of the training split the share data.label_fraction.

  Args:
    name: 'ct' or 'xray'.
    config: the run config; reads seed, data, task.
    split: 'train', 'val' or 'test'.

  Raises:
    DataError: nothing to read, or labels that do not fit.
  """
  return (Rows if config.data.manifest else Phantoms)(name, config, split)


class _Labelled:
  """What both have in common: a list of records of which training sees a share."""

  def __init__(self, name, config, split, groups, classes):
    self.name, self.config, self.task, self.split = name, config, config.task, split
    self.cache, self.failed = Cache(), set()
    share = config.data.label_fraction if split == 'train' else 1.
    self.chosen = fractions.nested(groups, classes, share, config.seed)

  def __len__(self):
    return len(self.chosen)

  def __getitem__(self, i: int) -> dict:
    for shift in range(len(self)):
      j = self.chosen[(i + shift) % len(self)]
      try:
        record, = self.cache.get(j, lambda j=j: (self.make(j),))
        return record | {'index': i, 'bad': shift > 0}
      except DataError as e:
        if self.split != 'train' or self.config.data.on_bad_file == 'stop':
          raise
        if j not in self.failed:
          files.warn(e, 'replaced by the next good record')
          self.failed.add(j)
    raise DataError('SPLIT_EMPTY', self.config.data.manifest, 'not one record can be read any more',
                    'check the disk, then start again')

  @property
  def digest(self) -> str:
    return _digest('\n'.join(row['id'] for row in self.listing()))


class Phantoms(_Labelled):
  """Patients of the embedded benchmark: task.phantoms says how many of each split; the tests have another scanner.

  Their findings are known when they are made, which is too late for shares by class.
  """

  def __init__(self, name, config, split):
    part, first = PHANTOM_PARTS[split]
    self.indices = phantom.INDICES[part][first:first + config.task.phantoms[list(PHANTOM_PARTS).index(split)]]
    self.classes = tuple(config.task.classes) or phantom.FINDINGS
    known = phantom.FINDINGS if config.task.kind == 'cls' else phantom.ORGANS if name == 'ct' else tuple(OUTLINES)
    if unknown := [c for c in self.classes if c not in known]:
      raise DataError('LABEL', 'phantoms', f'task.classes: "{unknown[0]}" is not drawn',
                      f'use some of {", ".join(known)}')
    super().__init__(name, config, split, [str(i) for i in self.indices], [()] * len(self.indices))

  def listing(self) -> list[dict]:
    return [{'id': f'phantom {self.indices[j]} of seed {self.task.world}'} for j in self.chosen]

  def groups(self) -> list[str]:
    return [str(self.indices[j]) for j in self.chosen]

  def grid(self, i: int):
    """Where a prediction is written: the Volume of a scan, (height, width) of a picture."""
    if self.name == 'xray':
      return self.make(self.chosen[i])['image'].shape
    made = phantom.make(self.task.world, self.indices[self.chosen[i]])
    return Volume(made.hu, made.spacing_mm, made.affine, {})

  def make(self, j: int) -> dict:
    index, seed, task = self.indices[j], self.task.world, self.task
    made = phantom.make(seed, index)
    record = {'name': f'phantom {index}', 'group': j}
    record |= ({'volume': made.hu, 'spacing_mm': made.spacing_mm} if self.name == 'ct' else
               {'image': phantom.xray(made, seed, index)})
    if task.kind == 'cls':
      return record | {'label': np.array([made.labels[c] for c in self.classes], np.float32)}
    if self.name == 'ct':
      numbers = np.zeros(len(phantom.ORGANS), np.uint8)
      numbers[[phantom.ORGANS.index(c) for c in self.classes]] = np.arange(1, len(self.classes) + 1)
      return _regridded(record, numbers[made.organs], task)
    number = lambda names: [phantom.ORGANS.index(n) for n in names]
    return record | {'mask': phantom.outlines(made, seed, index, [number(OUTLINES[c]) for c in self.classes])}


class Rows(_Labelled):
  """Rows of data.manifest of one kind and split. All files are checked once at the start.

  Raises:
    DataError: SPLIT_EMPTY, LEAK (a patient, or a file under two names, in two splits), LABEL (a row without one, or
      with several that exclude each other; a class that no row has), MASK_GRID, MASK_VALUE, and those of the readers;
      with data.on_bad_file='skip' files that cannot be read are left out of the training split alone, and those that
      fail later are replaced there by the next good one.
  """

  def __init__(self, name, config, split):
    self.path, self.task = config.data.manifest, config.task
    every = [r for r in manifest.usable(manifest.read(self.path, labelled=False)) if r['kind'] == KINDS[name]]
    self.rows = [r for r in every if r.get('split') == split]
    if not self.rows:
      raise DataError('SPLIT_EMPTY', self.path, f'{split}: 0 of {len(every)} usable rows of kind {KINDS[name]}',
                      f'give some rows "split": "{split}"')
    self.name, self.modality = name, config.data.modality
    field = 'label' if config.task.kind == 'cls' else 'mask'
    if lacking := [r['id'] for r in self.rows if field not in r]:
      raise DataError('LABEL', self.path, f'{len(lacking)} rows of split {split} have no {field}: '
                      f'{", ".join(lacking[:4])}', 'give them one, or "status": "excluded"')
    self.classes = tuple(config.task.classes)
    if field == 'label':
      self.classes = self.classes or tuple(sorted({k for r in every for k in r.get('label', ())}))
      _check_labels(self.path, split, self.classes, self.rows, config.task.exclusive)
    if not self.classes:
      raise DataError('LABEL', self.path, 'task.classes is empty', 'name the classes of the label maps, 1 first')
    if split == 'train':      # it comes first
      _check_twins(self.path, every)
    self._leave_out(split, config.data.on_bad_file)
    super().__init__(name, config, split, [r['group'] for r in self.rows],
                     [[c for c in self.classes if r.get('label', {}).get(c)] for r in self.rows])
    self._number = {g: k for k, g in enumerate(sorted({r['group'] for r in self.rows}))}

  def listing(self) -> list[dict]:
    return [{k: self.rows[j][k] for k in ('id', 'sha', 'status', 'split') if k in self.rows[j]} for j in self.chosen]

  def groups(self) -> list[str]:
    return [self.rows[j]['group'] for j in self.chosen]

  def grid(self, i: int):
    """As Phantoms.grid, of the file."""
    path = self.rows[self.chosen[i]]['path']
    return readers.volume(path) if self.name == 'ct' else images.upright(readers.image(path))

  def make(self, j: int) -> dict:
    row = self.rows[j]
    record = {'name': row['id'], 'group': self._number[row['group']]}
    if self.name == 'xray':
      picture = readers.image(row['path'])
      record['image'] = picture.array
      if self.task.kind == 'cls':
        return record | self._label(row)
      mask = self._map(images.labels(row['mask'], picture), row['mask'])
      return record | {'mask': shrunk(mask, picture.array.shape)}
    item = readers.of_row(row)
    found, arrays, intensity, warnings = tiles.opened(item, self.modality)
    record |= {'volume': np.stack(arrays) if intensity else arrays[0], 'spacing_mm': found[0].spacing_mm, **intensity}
    if self.task.kind == 'cls':
      return self._label(row) | _regridded(record, None, self.task)
    if tilted := [w for w in warnings if w.split()[1] in TILTED]:
      raise DataError(tilted[0].split()[1], row['path'], 'is tilted: its label map cannot be interpolated',
                      'resample both on a straight grid')
    mask = readers.volume(row['mask'], hu=False)
    if fault := judgement.mask_grid(mask.meta['grid'], found[0].meta['grid'], row['mask']):
      raise fault.error
    return _regridded(record, self._map(mask.array, row['mask']), self.task)

  def _label(self, row) -> dict:
    said = [_said(row, c, self.task.exclusive) for c in self.classes]
    return {'label': np.array([UNKNOWN if value is None else value for value in said], np.float32)}

  def _map(self, mask: np.ndarray, path) -> np.ndarray:
    """Values of a file -> classes: [*S], or [*S, C] where they are not exclusive."""
    n, task = len(self.classes), self.task
    if task.threshold:
      mask = (mask >= task.threshold).astype(np.uint8)
    if task.mask_values:
      chosen = [np.isin(mask, np.atleast_1d(v)) for v in task.mask_values]
      out = np.stack(chosen, -1).astype(np.uint8)
      return out if not task.exclusive else np.where(out.any(-1), out.argmax(-1) + 1, 0).astype(np.uint8)
    if (wrong := np.setdiff1d(mask, np.arange(n + 1))).size:
      raise DataError('MASK_VALUE', path, f'holds {", ".join(f"{v:g}" for v in wrong[:6])}, expected 0 to {n} '
                      f'({", ".join(self.classes)})',
                      'set task.mask_values (which values each class has) or task.threshold')
    mask = mask.astype(np.uint8)
    return mask if task.exclusive else (mask[..., None] == np.arange(1, n + 1)).astype(np.uint8)

  def _shows(self, mask: np.ndarray, c: int) -> bool:
    return bool((mask == c + 1 if self.task.exclusive else mask[..., c]).any())

  def _leave_out(self, split, on_bad_file) -> None:
    """Reads every file once; of pictures that train without a mask the headers alone."""
    seen = set()

    def one(j):
      try:
        if split == 'train' and self.name == 'xray' and self.task.kind == 'cls':
          readers.check_image(readers.item(self.rows[j]['path'], 'image'))
        else:
          mask = self.make(j).get('mask')
          seen.update(c for c in range(len(self.classes)) if mask is not None and self._shows(mask, c))
      except DataError as e:
        return e
    self._number = {r['group']: 0 for r in self.rows}
    progress = files.Progress(f'{split}: checking files and labels', len(self.rows))
    kept = []
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      for row, fault in zip(self.rows, pool.map(one, range(len(self.rows)))):
        progress.advance()
        if fault and (split != 'train' or on_bad_file == 'stop' or fault.code.startswith('MASK')):
          raise fault
        if fault:
          files.warn(fault, 'left out')
        else:
          kept.append(row)
    if not kept:
      raise DataError('SPLIT_EMPTY', self.path, f'{split}: none of {len(self.rows)} files is usable',
                      'see the lines above')
    lost = [c for k, c in enumerate(self.classes) if k not in seen]
    if self.task.kind == 'seg' and split == 'train' and lost:
      raise DataError('LABEL', self.path, f'no mask of split {split} shows {", ".join(lost)}',
                      'correct task.classes, task.mask_values or task.threshold, or the masks')
    self.rows = kept


def _said(row, name: str, exclusive: bool) -> float | None:
  """1, 0, or None where a row says nothing of a class; a row with a class number is not of the other classes."""
  return row['label'].get(name, 0 if exclusive or name.startswith('class_') else None)


def _check_labels(path, split, classes, rows, exclusive: bool) -> None:
  """Raises DataError LABEL where a split says nothing that can be learned or tested."""
  said = {r['id']: [_said(r, c, exclusive) for c in classes] for r in rows}
  if exclusive and (odd := [name for name, values in said.items() if sum(values) != 1]):
    raise DataError('LABEL', path, f'{len(odd)} rows of split {split} have none or several of the classes '
                    f'{", ".join(classes)}: {", ".join(odd[:4])}', 'correct task.classes, or set task.exclusive=False')
  seen = [set(values) - {None} for values in zip(*said.values())]
  if lost := [c for c, v in zip(classes, seen) if not v or split == 'train' and exclusive and v == {0}]:
    raise DataError('LABEL', path, f'no row of split {split} says anything of class {", ".join(lost)}',
                    'correct task.classes, or the labels')
  if split != 'test' and all(len(v) < 2 for v in seen):
    raise DataError('LABEL', path, f'split {split} has one class only', 'give it rows of every class')


def _check_twins(path, rows) -> None:
  """Raises DataError LEAK where two splits hold the same file; what is alike but not equal is for the doctor."""
  rows = [r for r in rows if 'split' in r]
  first = {}
  if len({r['split'] for r in rows}) > 1:
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      for row, sha in zip(rows, pool.map(_sha, rows)):
        twin = first.setdefault(sha, row) if sha else row
        if twin['split'] != row['split']:
          raise DataError('LEAK', path, f'{twin["id"]} ({twin["split"]}) and {row["id"]} ({row["split"]}) are the same '
                          'file', 'exclude one of them, or put both in one split')


def _sha(row) -> str | None:
  """The content hash of a row; None where there is nothing to read, which `_leave_out` will say."""
  try:
    return row.get('sha') or files.sha(readers.item(row['path'], row['kind']).files)
  except DataError:
    return None


def _regridded(record: dict, mask, task) -> dict:
  """A volume, and its mask if there is one, at task.spacing_mm."""
  volume, given_mm = record['volume'], record['spacing_mm']
  parts, (spacing_mm, *_) = zip(*(tiles.resampled(x, given_mm, task.spacing_mm) for x in volume.reshape(
      -1, *volume.shape[-3:])))
  record |= {'volume': np.stack(parts) if volume.ndim > 3 else parts[0], 'spacing_mm': spacing_mm}
  if mask is None:
    return record
  return record | {'mask': shrunk(mask, parts[0].shape), 'truth': mask, 'truth_mm': given_mm}


def shrunk(mask: np.ndarray, shape) -> np.ndarray:
  """[*S, ...] -> [*shape, ...]: the label at the centre of each new voxel."""
  for axis, (n, m) in enumerate(zip(mask.shape, shape)):
    if n != m:
      mask = mask.take(matrices.nearest(0, n, n, m), axis)
  return mask


