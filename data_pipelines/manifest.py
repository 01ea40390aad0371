"""A labelled manifest.jsonl for evaluation: one JSON object a line.

  {"id": "case-1", "path": "ct/1.nii.gz", "kind": "volume", "label": {"nodule": 1}, "split": "train", "group": "p1"}

`path` is absolute or relative to the manifest; `kind` volume or image; `label` a class number, a list of 0/1 or
{finding: 0/1}; `split` train, val or test; `id` defaults to the path, `group` (the patient) to the id.
"""
import json
import os

from data_pipelines.errors import DataError
from data_pipelines.files import read_bytes

KINDS = ('volume', 'image')
SPLITS = ('train', 'val', 'test')


def read(path) -> list[dict]:
  """All rows, with `path` ready to open and `label` as {name: 0 or 1}; a class number c becomes {'class_c': 1}.

  Raises:
    DataError: MANIFEST (line, found, expected), LEAK (a group in two splits), UNREADABLE, ZERO_BYTES.
  """
  rows, ids, splits = [], set(), {}
  for number, line in enumerate(read_bytes(path).decode('utf-8', 'replace').splitlines(), 1):
    if not line.strip():
      continue
    row = _row(line, f'{path} line {number}', os.path.dirname(os.fspath(path)))
    if row['id'] in ids:
      raise DataError('MANIFEST', f'{path} line {number}', f'id "{row["id"]}" occurs twice', 'make ids unique')
    ids.add(row['id'])
    if splits.setdefault(row['group'], row['split']) != row['split']:
      raise DataError('LEAK', path, f'group {row["group"]}: {splits[row["group"]]} and {row["split"]}',
                      'put all rows of a group in one split')
    rows.append(row)
  if not rows:
    raise DataError('MANIFEST', path, 'no rows', 'write one JSON object per line')
  return rows


def _row(line: str, where: str, folder: str) -> dict:
  try:
    row = json.loads(line)
  except ValueError as e:
    raise DataError('MANIFEST', where, f'not JSON ({e})', 'write one JSON object per line') from e
  if not isinstance(row, dict):
    raise DataError('MANIFEST', where, f'{line[:40]} is not an object', 'write {"path": ..., "kind": ..., ...}')
  if not (isinstance(row.get('path'), str) and row['path']):
    raise DataError('MANIFEST', where, f'path is {row.get("path")!r}', 'name the file')
  for key, allowed in (('kind', KINDS), ('split', SPLITS)):
    if row.get(key) not in allowed:
      raise DataError('MANIFEST', where, f'{key} is {row.get(key)!r}, expected {" or ".join(allowed)}', 'correct it')
  row['id'] = str(row.get('id', row['path']))
  row['group'] = str(row.get('group', row['id']))
  row['label'] = _label(row.get('label'), where)
  if '://' not in row['path']:
    row['path'] = os.path.join(folder, row['path'])
  return row


def _label(label, where: str) -> dict[str, int]:
  if isinstance(label, int) and not isinstance(label, bool):
    return {f'class_{label}': 1}
  if isinstance(label, list):
    label = {f'label_{i}': value for i, value in enumerate(label)}
  if isinstance(label, dict) and label and all(value in (0, 1) for value in label.values()):
    return {name: int(value) for name, value in label.items()}
  raise DataError('MANIFEST', where, f'label is {label!r}, expected a class number, a list of 0/1 or {{name: 0/1}}',
                  'correct it')
