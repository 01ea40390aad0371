"""Folders, tables and lists, as they lie on a disk, to rows of the manifest.

`rows(path)` looks at what lies there and takes the importer for it; each is a function path -> rows with `id`
(`<dataset>/<path below the root>`, or the id of the source), `kind`, `path` (ready to open), `dataset`, `subject` and
whatever the source says. Formats: a folder or glob pattern; CSV; the datalist of the Medical Segmentation Decathlon
and of MONAI, and lists of {image, shape, spacing} (3DINO); dataset.json of nnU-Net v2; BIDS; text files with a path a
line (the released list_path2D and list_path3D); our own manifest.

Two scans are of one subject only where the source says so, or `subject_from` does: folders are often sites or splits.
"""
import os
import re

from etils import epath

from data_pipelines import columns, entries, files, manifest, readers
from data_pipelines.entries import DEFAULT, Entry, Options, fault

SECTIONS = {'training': 'train', 'train': 'train', 'validation': 'val', 'val': 'val', 'testing': 'test',
            'test': 'test'}
BIDS = re.compile(r'(sub-[^/]+)/(?:(ses-[^/]+)/)?(?:anat|ct)/[^/]+')
BIDS_MASK = re.compile(r'_(mask|dseg|probseg)\.[^/]*$')
MASK = re.compile(r'/|\.(nii|nii\.gz|png|jpe?g)$', re.I)    # a path; other texts are names of classes
CASE = re.compile(r'(.+)_(\d{4})')


def rows(path, format: str = 'auto', **options) -> list[dict]:
  """Rows of the manifest for what lies at `path`.

  Args:
    path: folder, glob pattern or file.
    format: auto, or one of FORMATS.
    **options: fields of Options.

  Raises:
    DataError: IMPORT (the line or key), EMPTY_DIR, UNREADABLE, ZERO_BYTES; MANIFEST and LEAK of a manifest.
  """
  path, options = os.fspath(path), Options(**options)
  files.check_storage(path.partition('*')[0])
  if format not in ('auto', *FORMATS):
    raise fault(path, f'format is {format!r}', f'choose auto or one of {", ".join(FORMATS)}')
  if options.kind not in (None, 'volume', 'image'):
    raise fault(path, f'kind is {options.kind!r}', 'choose volume or image')
  return FORMATS[detect(path) if format == 'auto' else format](path, options)


def detect(path: str) -> str:
  """Which of FORMATS lies at a path."""
  suffix = os.path.splitext(path)[1].lower()
  by_name = {'.csv': 'csv', '.tsv': 'csv', '.jsonl': 'manifest', '.txt': 'paths', '.lst': 'paths'}
  if '*' in path or ',' in path and not epath.Path(path).exists():
    return 'tree'
  if epath.Path(path).is_dir():
    inside = {p.name for p in epath.Path(path).iterdir()}
    if manifest.NAME in inside:
      return 'manifest'
    if 'dataset.json' in inside:
      return detect(os.path.join(path, 'dataset.json'))
    return 'bids' if 'dataset_description.json' in inside or any(n.startswith('sub-') for n in inside) else 'tree'
  if suffix == '.json':
    data = entries.load(path)
    return 'nnunet' if isinstance(data, dict) and 'channel_names' in data and 'training' not in data else 'datalist'
  return by_name.get(suffix, 'tree')


# ---- folders

def tree(path, options: Options = DEFAULT) -> list[dict]:
  """All volumes and images of a folder or pattern."""
  listed, empty = [], None
  for kind in (options.kind,) if options.kind else ('volume', 'image'):
    found = readers.discover(os.fspath(path), kind)
    listed += [Entry(os.path.basename(i.path), files.absolute(i.path), {'kind': kind}) for i in found.items]
    empty = empty or readers.empty(path, kind, found, 'the import')
  if not listed:
    raise empty
  return of_files(path, listed, options)


def of_files(path, listed: list[Entry], options: Options = DEFAULT) -> list[dict]:
  """Rows of the files that were found in a folder or by a pattern; their paths are absolute."""
  common = '/'.join(os.path.commonprefix([e.path.split('/')[:-1] for e in listed])) or '/'
  whole = '*' not in str(path) and epath.Path(path).is_dir()
  return entries.rows(path, listed, files.absolute(path) if whole else common, options)


def bids(path, options: Options = DEFAULT) -> list[dict]:
  """sub-*/[ses-*/]anat|ct/ of a folder; derivatives and label maps are left out."""
  root, listed = files.absolute(path), []
  for file in sorted(files.below(root)):
    name = file[len(root) + 1:]
    found = BIDS.fullmatch(name)
    if found and columns.is_file(name) and not BIDS_MASK.search(name):
      session = {'study': found[2]} if found[2] else {}
      listed.append(Entry(name, name, {'subject': found[1]} | session))
  return entries.rows(path, listed, root, options)


def nnunet(path, options: Options = DEFAULT) -> list[dict]:
  """nnU-Net v2: dataset.json (or its folder) with imagesTr, imagesTs, labelsTr; a row for each channel of a case."""
  path = _dataset_json(path)
  folder, data = os.path.dirname(files.absolute(path)), entries.load(path)
  wanted = (('channel_names', dict, 'an object'), ('file_ending', str, 'a text'), ('numTraining', int, 'a number'))
  for key, kind, what in wanted:
    if not isinstance(data, dict) or not isinstance(data.get(key), kind) or not data[key]:
      raise fault(f'{path} {key}', f'missing or not {what}', 'write the dataset.json of nnU-Net v2')
  listed, cases = [], {}
  there = {f[len(folder) + 1:] for f in files.below(folder)}
  for name in sorted(there):
    part, _, file = name.partition('/')
    if part not in ('imagesTr', 'imagesTs') or not file.endswith(data['file_ending']):
      continue
    found = CASE.fullmatch(file[:-len(data['file_ending'])])
    if not found:
      raise fault(f'{path} {name}', 'is not named CASE_0000', 'name it after its case and channel')
    cases.setdefault((part, found[1]), []).append(name)
  for (part, case), names in cases.items():
    if len(names) != len(data['channel_names']):
      raise fault(f'{path} {part}/{case}', f'{len(names)} files for {len(data["channel_names"])} channels',
                  'copy the missing ones or correct channel_names')
    mask = f'labels{part[-2:]}/{case}{data["file_ending"]}'
    more = {'subject': case, 'split': columns.SPLITS[part[-2:].lower()]} | ({'mask': mask} if mask in there else {})
    listed += [Entry(name, name, dict(more)) for name in names]
  count = sum(part == 'imagesTr' for part, _ in cases)
  if count != data['numTraining']:
    raise fault(f'{path} numTraining', f'is {data["numTraining"]}, imagesTr has {count} cases',
                'copy the missing ones or correct it')
  return entries.rows(path, listed, folder, options, data.get('name'))


# ---- lists

def table(path, options: Options = DEFAULT) -> list[dict]:
  """CSV with a column of paths; delimiter and meaning of the columns (`columns.NAMES`) are found out."""
  header, lines = columns.read(path, ('path',))
  labels, used = columns.labels(header, lines, options.labels, path)
  column, listed = columns.meanings(header)['path'], []
  used.add(column)
  for (number, cells), label in zip(lines, labels):
    more = columns.fields(cells, f'{path} line {number}', used)
    listed.append(Entry(f'line {number}', cells[column], more | ({} if label is None else {'label': label})))
  return entries.rows(path, listed, os.path.dirname(files.absolute(path)), options)


def datalist(path, options: Options = DEFAULT) -> list[dict]:
  """JSON: training, validation and test lists of paths or of {image, label, ...}, or one such list.

  `label` is a class, findings, or the path of a label map; several files in `image` are of one subject.
  """
  path = _dataset_json(path)
  data = entries.load(path)
  if not isinstance(data, list | dict):
    raise fault(path, 'neither a list nor an object', 'write {"training": [{"image": ..., "label": ...}, ...]}')
  parts = {'': data} if isinstance(data, list) else {k: data[k] for k in SECTIONS if k in data}
  if not parts:
    raise fault(path, f'none of the keys {", ".join(SECTIONS)}', 'name the lists training, validation, test')
  listed = []
  for key, part in parts.items():
    if not isinstance(part, list):
      raise fault(f'{path} {key}', 'is not a list', 'write a list of {"image": ..., "label": ...}')
    for i, item in enumerate(part):
      listed += _item(item, f'{key}[{i}]', path, {'split': SECTIONS[key]} if key else {})
  texts = [e.fields.get('label') for e in listed]
  if any(isinstance(t, str) for t in texts):    # names of classes
    for e, label in zip(listed, columns.named([t if isinstance(t, str) else '' for t in texts])):
      if isinstance(e.fields.get('label'), str):
        e.fields['label'] = label
  name = data.get('name') if isinstance(data, dict) else None
  return entries.rows(path, listed, os.path.dirname(files.absolute(path)), options, name)


def _item(item, where: str, path, more: dict) -> list[Entry]:
  item = {'image': item} if isinstance(item, str | list) else item
  meaning = columns.meanings(item) if isinstance(item, dict) else {}
  read = {meaning.get('path'), meaning.get('label')}
  images = _flat(item[meaning['path']]) if 'path' in meaning else []
  if not images or not all(isinstance(i, str) and i for i in images):
    raise fault(f'{path} {where}', 'has no image', 'write a path or {"image": path, ...}')
  more = columns.fields(item, f'{path} {where}', read) | more
  if len(images) > 1:
    more = {'subject': images[0]} | {k: v for k, v in more.items() if k != 'id'}
  label = item.get(meaning.get('label'))
  masks = [label] if isinstance(label, str) else label
  if not (isinstance(masks, list) and masks and all(isinstance(m, str) and MASK.search(m) for m in masks)):
    return [Entry(where, i, dict(more) if label is None else more | {'label': label}) for i in images]
  if len(masks) not in (1, len(images)):
    raise fault(f'{path} {where}', f'{len(masks)} label maps for {len(images)} images', 'give one, or one for each')
  return [Entry(where, i, more | {'mask': masks[min(k, len(masks) - 1)]}) for k, i in enumerate(images)]


def _flat(value) -> list:
  out, left = [], [value]
  while left:
    value = left.pop(0)
    left = [*value, *left] if isinstance(value, list) else left
    out += [] if isinstance(value, list) else [value]
  return out


def paths(path, options: Options = DEFAULT) -> list[dict]:
  """A text file with a path a line; after a blank may follow a class number or the path of a label map."""
  folder, listed = os.path.dirname(files.absolute(path)), []
  for number, line in enumerate(entries.text(path).split('\n'), 1):
    file, more = line.strip(), {}
    head, _, last = file.rpartition(' ' if '\t' not in file else '\t')
    if head.strip() and re.fullmatch(r'\d{1,9}', last):
      file, more = head.strip(), {'label': int(last)}
    elif columns.is_file(head.strip()) and columns.is_file(last):
      file, more = head.strip(), {'mask': last}
    if file and not file.startswith('#'):
      listed.append(Entry(f'line {number}', file, more))
  return entries.rows(path, listed, folder, options)


def ours(path, options: Options = DEFAULT) -> list[dict]:
  """Our own manifest, as it is."""
  return manifest.read(path, labelled=False, root=options.root)


def _dataset_json(path) -> str:
  return os.path.join(path, 'dataset.json') if epath.Path(path).is_dir() else os.fspath(path)


FORMATS = {'tree': tree, 'csv': table, 'datalist': datalist, '3dino': datalist, 'nnunet': nnunet, 'bids': bids,
           'paths': paths, 'manifest': ours}
