"""The list of all samples: manifest.jsonl, one JSON object a line, and manifest.meta.json beside it.

  {"id": "case-1", "path": "ct/1.nii.gz", "kind": "volume", "label": {"nodule": 1}, "split": "train", "group": "p1"}

Only `path` and `kind` must be there (`id` is the path by default); FIELDS names the others that have a meaning, any
further one is kept. `path`, `paths` and `mask` are absolute or relative to the root in the meta file, or without one to
the manifest; in memory they are ready to open. `label` is a class number, a list of 0/1 or {finding: 0/1}; `group` (by
default the subject) is what a split must not cut. Excluded rows stay in the list; `usable` leaves them out.

The manifest hash, over (id, sha, status, split) of all rows, tells whether a run may go on with a list; `changes`
says why not.
"""
import collections
import datetime
import hashlib
import json
import math
import os
from typing import NamedTuple

from etils import epath

import unimiss_jax
from data_pipelines import files
from data_pipelines.errors import DataError
from data_pipelines.files import read_bytes

LABELLED_KINDS = ('volume', 'image')
KINDS = ('volume', 'subvolume', 'image', 'pair', 'report')
SPLITS = ('train', 'val', 'test')
STATUS = ('ok', 'warn', 'excluded')
NAME = 'manifest.jsonl'
READ_BY = {'ct': ('volume', 'subvolume'), 'xray': ('image',)}    # stream -> kinds of rows that it reads
SHOWN = 8    # names of changed rows of one kind


# ---- what a row may say

def _text(value) -> bool:
  return isinstance(value, str)


def _name(value) -> bool:
  return _integer(value) or isinstance(value, str) and bool(value)


def _integer(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _number(value) -> bool:
  return _integer(value) or isinstance(value, float) and math.isfinite(value)


def _counts(value) -> bool:
  return isinstance(value, list) and bool(value) and all(_integer(v) and v >= 0 for v in value)


def _numbers(value) -> bool:
  return isinstance(value, list) and bool(value) and all(_number(v) for v in value)


def _texts(value) -> bool:
  return isinstance(value, list) and all(_text(v) for v in value)


def _some_texts(value) -> bool:
  return _texts(value) and bool(value) and all(value)


def _record(value) -> bool:
  return isinstance(value, list) and len(value) == 2 and _text(value[0]) and _integer(value[1])


TEXT, NAMED, COUNTS = (_text, 'a text'), (_name, 'a name'), (_counts, 'a list of whole numbers')
NUMBER, NUMBERS = (_number, 'a finite number'), (_numbers, 'a list of finite numbers')
FIELDS = {
    'dataset': NAMED, 'subject': NAMED, 'group': NAMED, 'study': NAMED,
    'mask': TEXT,                                   # label map on the grid of the sample
    'paths': (_some_texts, 'a list of files'),      # of several sequences, on one grid; `path` is the first
    'record': (_record, '[shard file, index]'),     # after preparation
    'shape': COUNTS, 'spacing': NUMBERS, 'orient': TEXT,    # of the source: its axis order, mm, axis codes
    'shape_canon': COUNTS,                                  # [D, H, W] = [S, A, R]
    'hu_min': NUMBER, 'hu_max': NUMBER, 'hu_p1': NUMBER, 'hu_p99': NUMBER,    # scaled, before clipping
    'volume_id': NAMED, 'z0': NUMBER, 'z_offset_mm': NUMBER, 'crop_box': NUMBERS,    # of a sub-volume
    'whole_shape': COUNTS,                          # of the reduced copy of its scan
    'view': TEXT, 'text': TEXT, 'sha': TEXT, 'findings': (_texts, 'a list of codes'), 'licence': TEXT}
KNOWN = ('id', 'kind', 'path', 'split', 'label', 'status', *FIELDS)


def check(row: dict, where: str, *, labelled: bool = False, code: str = 'MANIFEST') -> dict:
  """A copy of a row with names as text, `label` as {name: 0 or 1} and `status`; null fields are left out.

  Args:
    where: file and line, for the message.
    labelled: only volumes and images, with split and label unless they are excluded.
    code: of the error.

  Raises:
    DataError: a field has another type than FIELDS says.
  """
  row = {k: v for k, v in row.items() if v is not None or k not in KNOWN}
  if not (isinstance(row.get('path'), str) and row['path']):
    raise DataError(code, where, f'path is {row.get("path")!r}', 'name the file')
  asked = labelled and row.get('status') != 'excluded'
  for key, allowed, needed in (('kind', LABELLED_KINDS if labelled else KINDS, True), ('split', SPLITS, asked),
                               ('status', STATUS, False)):
    if (needed or key in row) and row.get(key) not in allowed:
      raise DataError(code, where, f'{key} is {_short(row.get(key))}, expected {" or ".join(allowed)}', 'correct it')
  row['id'] = row.get('id', row['path'])
  if not (_name(row['id']) and str(row['id']).isprintable()):
    raise DataError(code, where, f'id is {_short(row["id"])}, expected a printable name', 'correct it')
  for key in FIELDS.keys() & row.keys():
    valid, expected = FIELDS[key]
    if not valid(row[key]):
      raise DataError(code, where, f'{key} is {_short(row[key])}, expected {expected}', 'correct it or leave it out')
  if row.get('paths', [row['path']])[0] != row['path']:
    raise DataError(code, where, f'paths begins with {row["paths"][0]}, expected path, {row["path"]}', 'correct it')
  row |= {k: str(row[k]) for k, kind in FIELDS.items() if kind is NAMED and k in row}
  row['id'] = str(row['id'])
  row.setdefault('status', 'ok')
  if asked or 'label' in row:
    row['label'] = _label(row.get('label'), where, code)
  return row


def _label(label, where: str, code: str) -> dict[str, int]:
  if _integer(label):
    return {f'class_{label}': 1}
  said = {f'label_{i}': value for i, value in enumerate(label)} if isinstance(label, list) else label
  if isinstance(said, dict) and said and all(value in (0, 1) for value in said.values()):
    return {name: int(value) for name, value in said.items()}
  raise DataError(code, where, f'label is {_short(label)}, expected a class number, a list of 0/1 or {{name: 0/1}}',
                  'correct it')


def _short(value) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + '...'


def subject(row: dict) -> str:
  """The subject of a row, under a name that no other data set uses; a row that names none is its own."""
  if 'subject' not in row:
    return row['id']
  return f'{row["dataset"]}/{row["subject"]}' if 'dataset' in row else row['subject']


def number(group: str) -> int:
  """The name of a group as int32, for whom texts are too long."""
  return int.from_bytes(hashlib.blake2b(str(group).encode(), digest_size=4).digest(), 'big') >> 1


def usable(rows) -> list[dict]:
  """Rows that are not excluded."""
  return [r for r in rows if r.get('status') != 'excluded']


# ---- reading

def read(path, *, labelled: bool = True, root=None, torn: bool = False) -> list[dict]:
  """All rows, with `path` and `mask` ready to open, and `group`, `status` and `label` filled in (see `check`).

  Args:
    path: the .jsonl file, or a folder with manifest.jsonl.
    labelled: for evaluation: every row (that is not excluded) must have a split and a label.
    root: of relative paths, instead of what the meta file says.
    torn: let a group be in two splits, for who wants to say so himself.

  Raises:
    DataError: MANIFEST (line, found, expected), LEAK (a group in two splits), UNREADABLE, ZERO_BYTES.
  """
  path = _file(path)
  about = meta(path)
  root = _join(os.path.dirname(path), root if root is not None else about.get('root', ''))
  rows, ids, splits = [], set(), {}
  for number, line in enumerate(_content(path).split('\n'), 1):
    if not line.strip():
      continue
    where = f'{path} line {number}'
    row = check(_object(line, where), where, labelled=labelled)
    if row['id'] in ids:
      raise DataError('MANIFEST', where, f'id "{row["id"]}" occurs twice', 'make ids unique')
    ids.add(row['id'])
    row.setdefault('group', subject(row))
    if row['status'] != 'excluded' and 'split' in row:
      first = splits.setdefault(row['group'], row['split'])
      if first != row['split'] and not torn:
        raise DataError('LEAK', path, f'group {row["group"]}: {first} and {row["split"]}',
                        'put all rows of a group in one split')
    rows.append(_with_paths(row, lambda path: _join(root, path)))
  if not rows:
    raise DataError('MANIFEST', path, 'no rows', 'write one JSON object per line')
  found = digest(rows)
  if about.get('hash', found) != found:
    said = f'{len(rows)} rows with hash {found}, its meta file says {about.get("rows")} rows with {about["hash"]}'
    files.warn(DataError('MANIFEST', path, said, 'write it again if that was not on purpose'), 'used as it is')
  return rows


def meta(path) -> dict:
  """What was written beside a manifest: rows, hash, root, config ...; {} where there is nothing.

  Raises:
    DataError: MANIFEST: it is not an object, or its root is not a text.
  """
  path = _file(path)
  beside = os.path.splitext(path)[0] + '.meta.json'
  if not epath.Path(beside).exists():
    return {}
  about = _object(_content(beside), beside)
  if not isinstance(about.get('root', ''), str):
    raise DataError('MANIFEST', beside, f'root is {_short(about["root"])}', 'name the folder of the paths')
  return about


def _file(path) -> str:
  path = os.fspath(path)
  files.check_storage(path)
  return os.path.join(path, NAME) if not path.endswith('.jsonl') and epath.Path(path).is_dir() else path


def _content(path: str) -> str:
  return read_bytes(path).decode('utf-8', 'replace').lstrip('\ufeff')


def _object(text: str, where: str) -> dict:
  try:
    row = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise DataError('MANIFEST', where, f'not JSON ({e})', 'write one JSON object per line') from e
  if not isinstance(row, dict):
    raise DataError('MANIFEST', where, f'{text[:40]} is not an object', 'write {"path": ..., "kind": ..., ...}')
  return row


def _with_paths(row: dict, change) -> dict:
  """A row with other names of its files."""
  row = row | {k: change(row[k]) for k in ('path', 'mask') if k in row}
  return row | ({'paths': [change(p) for p in row['paths']]} if 'paths' in row else {})


def _join(root: str, path) -> str:
  return str(path) if '://' in str(path) else os.path.join(root, path)


class Listed(NamedTuple):
  """A manifest that a run trains on; `records`, `digest` and `listing` are those that a stream has, too."""
  path: str          # of the .jsonl file
  rows: list[dict]   # all of them

  @property
  def records(self) -> int:
    return len(self.rows)

  @property
  def digest(self) -> str:
    """The manifest hash."""
    return digest(self.rows)

  def listing(self) -> list[dict]:
    return [brief(row) for row in self.rows]

  def training(self, stream: str) -> list[dict]:
    """The usable rows of split train that a stream ('ct' or 'xray') reads, sorted by id.

    Raises:
      DataError: SPLIT_EMPTY, saying what there is instead.
    """
    mine = [r for r in self.rows if r['kind'] in READ_BY[stream]]
    found = sorted((r for r in usable(mine) if r.get('split') == 'train'), key=lambda r: r['id'])
    if not found:
      others = collections.Counter(r['status'] if r['status'] == 'excluded' else r.get('split', 'without split')
                                   for r in mine)
      told = ', '.join(f'{n} {what}' for what, n in sorted(others.items())) or 'none of any split'
      raise DataError('SPLIT_EMPTY', self.path, f'no usable {READ_BY[stream][0]} in split train ({told})',
                      f'give it some, or set phases.{stream}=0')
    return found


def load(path) -> Listed:
  """Reads what data.manifest names: a .jsonl file, or a folder with manifest.jsonl. Raises what `read` raises."""
  return Listed(_file(path), read(path, labelled=False))


# ---- writing

def write(folder, rows, *, root=None, config: dict | None = None, **more) -> str:
  """Writes manifest.jsonl, sorted by id, and manifest.meta.json; each is there whole or not at all.

  Args:
    folder: made if it is not there; local or remote.
    rows: with `path` and `mask` ready to open.
    root: paths below it are written relative to it, others absolute; None: relative to `folder`, so that both may
      move together.
    config: how the rows were made; written with its hash.
    **more: further fields of the meta file.

  Returns:
    The manifest hash.

  Raises:
    DataError: MANIFEST (the row), WRITE.
  """
  folder = epath.Path(folder)
  base = files.absolute(folder if root is None else root)
  rows = sorted((_storable(row) for row in rows), key=lambda r: r['id'])
  twice = next((a['id'] for a, b in zip(rows, rows[1:]) if a['id'] == b['id']), None)
  if twice or not rows:
    raise DataError('MANIFEST', folder, f'id "{twice}" occurs twice' if twice else 'no rows',
                    'make ids unique' if twice else 'give it at least one')
  lines = [_line(_with_paths(row, lambda path: _relative(path, base))) for row in rows]
  about = {'tool': 'unimiss_jax', 'version': unimiss_jax.__version__,
           'created': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
           'rows': len(rows), 'hash': digest(rows)}
  about |= {} if root is None else {'root': base}
  if config is not None:
    about |= {'config': config, 'config_hash': _hash([_dump(config, 'config', sort_keys=True)])}
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / NAME, ''.join(line + '\n' for line in lines))
    _save(folder / 'manifest.meta.json', _dump(about | more, 'meta', indent=1) + '\n')    # a new hash comes last
  except DataError:
    raise
  except Exception as e:    # every storage backend has its own
    raise DataError('WRITE', folder, f'{type(e).__name__}: {e}', 'check space and permissions') from e
  return about['hash']


def _save(file: epath.Path, text: str) -> None:
  new = file.parent / f'.{file.name}.{os.getpid()}.new'
  try:
    new.write_text(text)
    new.replace(file)
  except BaseException:
    new.unlink(missing_ok=True)
    raise


def _storable(row: dict) -> dict:
  what = f'row {row.get("id", row.get("path"))}'
  return check(json.loads(_dump(row, what)), what)    # tuples and numpy arrays as lists


def _line(row: dict) -> str:
  order = [k for k in KNOWN if k in row] + sorted(row.keys() - set(KNOWN))
  return _dump({k: row[k] for k in order}, f'row {row["id"]}')


def _dump(value, what: str, **style) -> str:
  try:
    return json.dumps(value, allow_nan=False, default=_plain, **style)
  except (TypeError, ValueError, RecursionError) as e:
    raise DataError('MANIFEST', what, f'cannot be written as JSON ({e})', 'give it numbers, texts and lists') from e


def _plain(value):
  if hasattr(value, 'tolist'):    # of numpy
    return value.tolist()
  raise TypeError(f'{type(value).__name__} {_short(value)}')


def _relative(path: str, base: str) -> str:
  path = files.absolute(path)
  return path[len(base.rstrip('/')) + 1:] if path.startswith(base.rstrip('/') + '/') else path


# ---- comparing

def brief(row: dict) -> dict:
  """What of a row makes the manifest hash."""
  return {k: row[k] for k in ('id', 'sha', 'status', 'split') if k in row}


def _state(row: dict) -> list:
  return [row['id'], row.get('sha'), row.get('status') or 'ok', row.get('split')]


def _hash(texts) -> str:
  made = hashlib.blake2b(digest_size=16)
  for text in texts:
    made.update(text.encode() + b'\n')
  return made.hexdigest()


def digest(rows) -> str:
  """The manifest hash (32 hex digits) over the sorted (id, sha, status, split); no path and no other field counts."""
  return _hash(json.dumps(state) for state in sorted(map(_state, rows), key=json.dumps))


def changes(old, new) -> str:
  """What tells two lists of rows apart: '2 removed: a, b; 1 moved split: d'; '' where they hash the same."""
  before, after = ({r['id']: _state(r) for r in rows} for rows in (old, new))
  both = sorted(before.keys() & after.keys())
  differ = lambda i: [k for k in both if before[k][i] != after[k][i]]
  found = (('removed', sorted(before.keys() - after.keys())), ('changed content', differ(1)),
           ('changed status', differ(2)), ('moved split', differ(3)), ('added', sorted(after.keys() - before.keys())))
  return '; '.join(f'{len(ids)} {what}: {", ".join(ids[:SHOWN])}{", ..." * (len(ids) > SHOWN)}'
                   for what, ids in found if ids)
