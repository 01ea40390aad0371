"""What an importer finds in a source, and its rows: names, subjects, and a look at every path."""
import dataclasses
import json
import os
import posixpath
import re
from typing import NamedTuple

from etils import epath

from data_pipelines import files, manifest, readers
from data_pipelines.errors import DataError
from data_pipelines.files import read_bytes

PARENTS = 3    # a list may name its files from a folder so far above it
TILE = re.compile(r'_dep\d+(?=\.[^/]*$)')    # tiles of the released preparation: one volume, one subject


@dataclasses.dataclass(frozen=True)
class Options:
  """What the user may say about a source.

  Attributes:
    root: of relative paths; None: the folder of the list, or the first one above it that holds the first file.
    dataset: name before every id; None: that of the source, or of its folder.
    kind: 'volume' or 'image'; None: by the file's name.
    subject_from: 'file' (each its own), 'folder' (the name of the folder that holds it), or a regular expression
      with one group, searched in the path below the root. A subject that the source names comes first.
    labels: columns of a CSV that are findings; None: all that hold only 0 and 1.
    lost: whether files that are not there keep their rows.
  """
  root: str | None = None
  dataset: str | None = None
  kind: str | None = None
  subject_from: str = 'file'
  labels: tuple[str, ...] | None = None
  lost: bool = False


DEFAULT = Options()


class Entry(NamedTuple):
  where: str      # 'line 7', 'training[3]'
  path: str       # as the source has it
  fields: dict    # further fields of the row


def fault(path, reason: str, remedy: str) -> DataError:
  return DataError('IMPORT', path, reason, remedy)


def text(path) -> str:
  """The content of a text file. Raises DataError: UNREADABLE, ZERO_BYTES, IMPORT."""
  try:
    return read_bytes(path).decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise fault(path, f'not UTF-8 (byte {e.start})', 'save it as UTF-8') from e


def load(path):
  """The content of a JSON file. Raises DataError: UNREADABLE, ZERO_BYTES, IMPORT."""
  try:
    return json.loads(text(path))
  except (ValueError, RecursionError) as e:
    raise fault(path, f'not JSON ({e})', 'correct it') from e


def rows(source, entries, folder: str, options: Options, name=None) -> list[dict]:
  """Entries to rows of the manifest.

  Args:
    source: the list or folder, for messages.
    entries: what it names.
    folder: that relative paths are relative to, if options and files do not say otherwise.
    name: of the data set, as the source has it.

  Raises:
    DataError: IMPORT: no entries; a path that is not there, leads out of the root, is of no kind or occurs twice; a
      field of the wrong type.
  """
  if not entries:
    raise fault(source, 'names no files', 'give it at least one')
  root = files.absolute(options.root) if options.root is not None else _root(entries, folder)
  dataset = options.dataset or (name if isinstance(name, str) and name else os.path.basename(folder)) or 'data'
  dataset = ''.join(c if c.isprintable() and c != '/' else '_' for c in dataset)
  there = (lambda path: True) if options.lost else _there(root)
  subject, out, seen, lost = _subject(options.subject_from, source), [], {}, []
  for where, path, more in entries:
    where, more = f'{source} {where}', dict(more)
    file, below = _locate(path, root, where)
    if 'mask' in more:
      more['mask'] = _locate(more['mask'], root, where)[0]
    lost += [(where, p) for p in (file, more.get('mask')) if p and not there(p)]
    kind = more.pop('kind', None) or options.kind or _kind(file, where)
    row = {'id': f'{dataset}/{more.pop("id", below)}', 'kind': kind, 'path': file, 'dataset': dataset}
    row |= {'subject': more['subject'] if 'subject' in more else subject(below, where)} | more
    if 'group' in more:    # of no other data set
      row['group'] = f'{dataset}/{more["group"]}'
    if row['id'] in seen:
      raise fault(where, f'id "{row["id"]}" occurs twice, first at {seen[row["id"]]}', 'name each file once')
    seen[row['id']] = where
    out.append(manifest.check(row, where, code='IMPORT'))
  if lost:
    count = len({where for where, _ in lost})
    raise fault(lost[0][0], f'{lost[0][1]} is not there ({count} of {len(entries)} are missing)',
                'give the folder that paths are relative to as root, or copy the files')
  return out


def _root(entries, folder: str) -> str:
  first = next((e.path for e in entries if not _whole(e.path)), None)
  above = folder
  for _ in range(PARENTS + 1):
    if first is None or '://' in folder and '://' not in above:
      break
    if epath.Path(os.path.join(above, first)).exists():
      return above
    above = os.path.dirname(above)
  return folder


def _whole(path: str) -> bool:
  return '://' in path or os.path.isabs(path)


def _there(root: str):
  """f(path) -> whether it exists; an object store is listed once."""
  if '://' not in root:
    there = lambda path: epath.Path(path).exists() if '://' in path else os.path.exists(path)
    return lambda path: there(path.partition('::')[0])      # a DICOM series of a folder that holds several
  found = set(files.below(root))
  found |= {os.path.dirname(f) for f in found}
  return lambda path: path.partition('::')[0] in found or not path.startswith(root) and epath.Path(path).exists()


def _locate(path: str, root: str, where: str) -> tuple[str, str]:
  """The path to open, and its name in the data set: below the root, or all of an absolute path elsewhere."""
  if '\\' in path and '/' not in path:    # written on Windows
    path = path.replace('\\', '/')
  if _whole(path):
    file, base = files.absolute(path), root.rstrip('/') + '/'
    below = file[len(base):] if file.startswith(base) else file.partition('://')[2] or file.lstrip('/')
    below = posixpath.basename(file) if file == root else below    # a DICOM series alone
  else:
    below = posixpath.normpath(path)
    file = os.path.join(root, below)
    if below.split('/')[0] == '..':
      raise fault(where, f'{path} leads out of {root}', 'give a root above all files')
  if not path or not below.isprintable():
    raise fault(where, f'path is {path[:80]!r}', 'name the file')
  return file, below


def _kind(file: str, where: str) -> str:
  for kind, format in readers.BY_NAME.items():
    if file.lower().endswith(readers.SUFFIXES[format]):
      return kind
  if file.lower().endswith('.dcm'):    # one file is one picture
    return 'image'
  if epath.Path(file).is_dir():        # a DICOM series
    return 'volume'
  raise fault(where, f'{file} may be a volume or an image', 'say which as kind')


def _subject(how: str, source):
  if how == 'file':
    return lambda name, where: TILE.sub('', name)
  if how == 'folder':
    return lambda name, where: posixpath.basename(posixpath.dirname(name)) or TILE.sub('', name)
  try:
    pattern = re.compile(how)
  except (re.error, TypeError) as e:
    raise fault(source, f'subject_from {how!r}: {e}', "take file, folder or a pattern like '(patient[0-9]+)'") from e
  if pattern.groups != 1:
    raise fault(source, f'subject_from {how!r} has {pattern.groups} groups, not one', 'put ( ) round the subject')

  def match(name, where):
    found = pattern.search(name)
    if not (found and found[1]):
      raise fault(where, f'subject_from {how!r} does not match {name}', 'correct the pattern')
    return found[1]
  return match
