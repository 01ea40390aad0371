"""Who must stay together, and which of train, val and test they go to.

A group is everything that is linked: rows of one subject, duplicates, and what shares a column that the user names.
Splits are dealt to groups, by a hash of the group's name: nobody moves when others come or go.
"""
import collections
import hashlib
import math
import os
import urllib.parse

from data_pipelines import columns, entries, manifest
from data_pipelines.errors import DataError

WIDE_URL = 20     # rows that share an address; beyond that it is a collection, not a case
CODE_HOSTS = ('github.com', 'gitlab.com', 'bitbucket.org')    # owner/name is a repository
SHOWN = 8         # names in a message


# ---- groups

def groups(rows, duplicates=(), group_by=()) -> list[dict]:
  """Copies of the rows with `group`: the union of subject, duplicates, an earlier group, and columns.

  A group is named by its first subject, so that another scan of somebody in it does not rename it.

  Args:
    duplicates: ids that show the same picture, [(id, id, ...)].
    group_by: columns whose value links rows. An address (http...) links rows of all data sets, unless it is that of a
      whole collection (shared by more than 20 rows, without a path, or a repository of a code host); any other value
      links rows of one data set.

  Raises:
    DataError: MANIFEST: an id of `duplicates` is not in the list, or no row has a column of `group_by`.
  """
  rows = [dict(r) for r in rows]
  parent = list(range(len(rows)))
  by_id = {r['id']: i for i, r in enumerate(rows)}

  def find(i):
    while parent[i] != i:
      parent[i] = parent[parent[i]]
      i = parent[i]
    return i

  for members in _links(rows, by_id, duplicates, group_by):
    for i in members[1:]:
      parent[find(i)] = find(members[0])
  together = collections.defaultdict(list)
  for i in range(len(rows)):
    together[find(i)].append(rows[i])
  for members in together.values():
    name = min([r['group'] for r in members if r.get('group')] or map(manifest.subject, members))
    for row in members:
      row['group'] = name
  return rows


def _links(rows, by_id, duplicates, group_by):
  """Lists of indices that belong together."""
  sharing = collections.defaultdict(list)
  for i, row in enumerate(rows):
    sharing['subject', manifest.subject(row)].append(i)
    if row.get('group'):
      sharing['group', row['group']].append(i)
  yield from sharing.values()
  for ids in duplicates:
    unknown = [i for i in ids if i not in by_id]
    if unknown:
      raise DataError('MANIFEST', unknown[0], 'is said to be a duplicate, but no row has this id', 'give ids of rows')
    yield [by_id[i] for i in ids]
  for column in [group_by] if isinstance(group_by, str) else group_by:
    sharing = collections.defaultdict(list)
    for i, row in enumerate(rows):
      value = str(row.get(column) or '').strip()
      if value:
        url = _address(value)
        if not url:
          sharing[row.get('dataset'), value].append(i)
        elif not _collection(url):
          sharing[url].append(i)
    if not any(row.get(column) for row in rows):
      raise DataError('MANIFEST', f'column "{column}"', 'no row has it', 'name a column of the source')
    yield from (same for key, same in sharing.items() if isinstance(key, tuple) or len(same) <= WIDE_URL)


def _address(value: str) -> str:
  """An address as host/path?query, however it is written; '' for other values."""
  try:
    parts = urllib.parse.urlsplit(value)
    host = (parts.hostname or '').removeprefix('www.')
  except ValueError:
    return ''
  if parts.scheme not in ('http', 'https') or not host:
    return ''
  return f'{host}{parts.path.rstrip("/")}' + (f'?{parts.query}' if parts.query else '')


def _collection(url: str) -> bool:
  """Whether an address has no path, or is a repository of a code host."""
  host, *path = url.split('/')
  return not path and '?' not in host or host in CODE_HOSTS and len(path) <= 2


# ---- splits

def assign(rows, fractions=(.8, .1, .1), seed: int = 0, override=None, keep: bool = True) -> list[dict]:
  """Copies of the rows with `split`, the same for all rows of a group.

  In this order: the override, the split that the source gives to the group, the hash of seed and group. (Rows without
  a group are grouped by subject.)

  Args:
    fractions: of groups, for train, val, test; 0 leaves a split out.
    override: {group or id: split}, or a file: CSV with columns group (or id) and split, or a JSON object. An id
      stands for its whole group.
    keep: False ignores the splits of the source.

  Raises:
    DataError: LEAK (the group), SPLIT_EMPTY (what was excluded), SPLIT (fractions), IMPORT (the override).
  """
  shares = checked(fractions)
  rows = [r | {'group': r.get('group') or manifest.subject(r)} for r in rows]
  if not keep:
    rows = [{k: v for k, v in r.items() if k != 'split'} for r in rows]
  said = _override(override, rows)
  _no_leak(r for r in rows if r['group'] not in said)
  for row in manifest.usable(rows):
    if row.get('split'):
      said.setdefault(row['group'], row['split'])
  rows = [r | {'split': said.get(r['group']) or _dealt(seed, r['group'], shares)} for r in rows]
  _no_empty(rows, shares)
  return rows


def checked(fractions) -> list[float]:
  """The shares of train, val and test as numbers. Raises DataError SPLIT."""
  try:
    shares = [float(f) for f in fractions]
  except (TypeError, ValueError):
    shares = []
  if len(shares) != 3 or not all(0 <= s <= 1 for s in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
    raise DataError('SPLIT', 'fractions', f'{fractions!r}', 'give train, val and test numbers that add up to 1')
  return shares


def _dealt(seed: int, group: str, shares) -> str:
  made = hashlib.blake2b(f'{seed}\n{group}'.encode('utf-8', 'surrogatepass'), digest_size=8)
  place, last = int.from_bytes(made.digest()) / 2**64, [n for n, s in zip(manifest.SPLITS, shares) if s][-1]
  for name, share in zip(manifest.SPLITS, shares):
    if place < share:
      return name
    place -= share
  return last    # what rounding leaves over


def _override(override, rows) -> dict[str, str]:
  """{group: split}."""
  if override is None:
    return {}
  source = 'override' if isinstance(override, dict) else os.fspath(override)
  if isinstance(override, dict):
    pairs = [(str(k), v, source) for k, v in override.items()]
  else:
    pairs = _pairs(source)
  group_of = {r['id']: r['group'] for r in rows} | {r['group']: r['group'] for r in rows}
  said = {}
  for key, split, where in pairs:
    if not isinstance(split, str) or split not in manifest.SPLITS:
      raise DataError('IMPORT', where, f'{key}: split is {split!r}', 'write train, val or test')
    if key not in group_of:
      raise DataError('IMPORT', where, f'{key} is neither a group nor an id of the list', 'correct or remove it')
    if said.setdefault(group_of[key], split) != split:
      raise DataError('LEAK', where, f'group {group_of[key]}: {said[group_of[key]]} and {split}',
                      'give a group one split')
  return said


def _pairs(path: str) -> list[tuple]:
  """[(group or id, split, place for messages)] of an override file."""
  if path.lower().endswith('.json'):
    data = entries.load(path)
    if not isinstance(data, dict):
      raise entries.fault(path, 'not an object', 'write {"group or id": "train", ...}')
    return [(k, v, f'{path} {k}') for k, v in data.items()]
  out = []
  for number, cells in columns.read(path, ('group', 'id'))[1]:
    where = f'{path} line {number}'
    found = columns.fields(cells, where)
    out.append((found.get('group') or found.get('id') or '', found.get('split'), where))
  return out


def _no_leak(rows) -> None:
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in manifest.usable(rows):
    if row.get('split'):
      found[row['group']][row['split']].append(row['id'])
  torn = {g: s for g, s in sorted(found.items()) if len(s) > 1}
  if torn:
    group, by_split = next(iter(torn.items()))
    rest = [g for g in torn if g != group]
    more = f'; {len(rest)} more groups: {", ".join(rest[:SHOWN])}{", ..." * (len(rest) > SHOWN)}' if rest else ''
    told = ' and '.join(f'{s} ({", ".join(by_split[s][:SHOWN])}{", ..." * (len(by_split[s]) > SHOWN)})'
                        for s in manifest.SPLITS if s in by_split)
    raise DataError('LEAK', f'group {group}', told + more, 'correct the splits of the source, exclude rows, or give '
                    'the group one split by an override')


def _no_empty(rows, shares) -> None:
  for name, share in zip(manifest.SPLITS, shares):
    mine = [r for r in rows if r['split'] == name]
    out = [r for r in mine if r.get('status') == 'excluded']
    if share and len(out) == len(mine):
      codes = collections.Counter(code for r in out for code in dict.fromkeys(r.get('findings') or ['no code']))
      told = ', '.join(f'{n} {code}' for code, n in sorted(codes.items(), key=lambda c: (-c[1], c[0])))
      many = f'{len(out)} excluded: {told}' if out else 'none excluded'
      raise DataError('SPLIT_EMPTY', name, f'0 samples after exclusion ({many}); '
                      f'{len({r["group"] for r in rows})} groups in all', 'add data, take another seed or fractions '
                      '(0 leaves a split out), name its groups in an override, or deal anew (keep=False)')
