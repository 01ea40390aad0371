"""What the columns of a CSV file, and the keys of a JSON list, mean for the manifest."""
import csv
import io
import re

from data_pipelines import manifest, readers
from data_pipelines.entries import fault, text

# Case, spaces and punctuation of a name do not count; of several columns for one field the earliest name here wins.
NAMES = {
    'path': 'path filepath imagepath imgpath file filename imagefile image img imageindex',
    'id': 'id sampleid',
    'subject': 'subject subjectid patient patientid participant participantid',
    'split': 'split subset',
    'label': 'label labels class target finding findings findinglabels',
    'group': 'group groupid',
    'study': 'study studyid',
    'view': 'view viewposition',
    'text': 'text report',
    'licence': 'licence license',
    'mask': 'mask maskpath segmentation',
    'shape': 'shape',
    'spacing': 'spacing spacingmm'}
SPLITS = {word: split for split, words in (('train', 'train training tr'), ('val', 'val valid validation dev'),
                                           ('test', 'test testing ts')) for word in words.split()}
BINARY = {'0': 0, '1': 1, '0.0': 0, '1.0': 1, 'false': 0, 'true': 1}
UNKNOWN = ('', '-1', '-1.0')    # blank: not mentioned; -1: uncertain (CheXpert)
# columns of 0 and 1 that say nothing about the picture
NO_LABELS = ('age', 'sex', 'gender', 'male', 'female', 'height', 'width', 'weight', 'offset', 'offsetdays',
             'followup', 'days', 'survival', 'index', 'fold')


def plain(name: str) -> str:
  return re.sub('[^a-z0-9]', '', name.lower())


def meanings(names) -> dict[str, str]:
  """{field: the column that holds it}."""
  out = {}
  for field, known in NAMES.items():
    found = [(known.split().index(plain(n)), n) for n in names if plain(n) in known.split()]
    if found:
      out[field] = min(found)[1]
  return out


def fields(raw: dict, where: str, skip=()) -> dict:
  """The fields of a manifest row that one line has; a column without a meaning here keeps its name.

  Args:
    raw: {column: value}; None and '' mean that there is nothing.
    skip: columns that were read already (path, label).
    where: file and line, for the message.

  Raises:
    DataError: IMPORT: a split that is none.
  """
  raw = {name: v for name, v in raw.items() if name not in skip and v is not None and v != ''}
  out, used = {}, set()
  for field, name in meanings(raw).items():
    value = raw[name]
    if field in ('path', 'label'):
      continue
    if field == 'split':
      value = SPLITS.get(str(value).strip().lower())
      if value is None:
        raise fault(where, f'{name} is {str(raw[name])[:80]!r}, expected train, val or test',
                        'correct it or rename the column')
    elif field in ('shape', 'spacing'):
      value = _numbers(value)
    elif field == 'mask' and not is_file(value):
      value = None
    if value is not None:
      out[field] = value
      used.add(name)
  return out | {n if n not in manifest.KNOWN else f'source_{n}': v for n, v in raw.items() if n not in used}


def is_file(value) -> bool:
  return isinstance(value, str) and value.lower().endswith(sum(readers.SUFFIXES.values(), ()))


def _numbers(value) -> list | None:
  """'512x512x41', '[1, 1, 2.5]' or a list -> numbers; None for anything else."""
  if isinstance(value, list):
    return value
  try:
    got = [float(v) for v in re.split(r'[\sx×,;]+', str(value).strip(' ()[]'))]
  except ValueError:
    return None
  return [int(v) if v.is_integer() else v for v in got]


# ---- CSV

def read(path, needed) -> tuple[list[str], list]:
  """The header and the lines of a CSV file whose delimiter is a comma, a semicolon, a tab or a bar.

  Args:
    needed: fields of NAMES; the header must have a column for one of them.

  Returns:
    Column names and [(line number, {column: text without blanks around it})]; empty lines are left out.

  Raises:
    DataError: IMPORT (the line), UNREADABLE, ZERO_BYTES.
  """
  content = text(path)
  header, delimiter = _header(content, path, needed)
  reader = csv.reader(io.StringIO(content, newline=''), delimiter=delimiter, strict=True)
  lines = []
  try:
    next(reader)
    for cells in reader:
      if any(c.strip() for c in cells):
        if len(cells) != len(header):
          raise fault(f'{path} line {reader.line_num}', f'{len(cells)} columns, the header has {len(header)}',
                      'correct the line; quote texts with delimiters')
        lines.append((reader.line_num, dict(zip(header, (c.strip() for c in cells)))))
  except csv.Error as e:
    raise fault(f'{path} line {reader.line_num}', str(e), 'correct the line') from e
  return header, lines


def _header(content: str, path, needed) -> tuple[list[str], str]:
  tried = []
  for delimiter in ',;\t|':
    try:
      cells = [c.strip() for c in next(csv.reader(io.StringIO(content, newline=''), delimiter=delimiter))]
    except (csv.Error, StopIteration):
      continue
    tried.append((any(n in meanings(cells) for n in needed), len(cells), delimiter, cells))
  found, _, delimiter, header = max(tried) if tried else (False, 0, '', ['nothing'])
  if not found:
    raise fault(f'{path} line 1', f'no column with the {" or ".join(needed)} (found {", ".join(header)[:200]})',
                f'call it {" or ".join(needed)}')
  if len(set(header)) < len(header):
    raise fault(f'{path} line 1', 'two columns have one name', 'rename one')
  return header, delimiter


# ---- labels

def labels(header, lines, wanted, path) -> tuple[list, set]:
  """Labels of a table.

  Columns of nothing but 0 and 1 (blank or -1: unknown) are findings; without any, one column with class numbers
  or with names, several of them in a cell separated by |, ; or commas.

  Args:
    lines: [(line number, {column: text})].
    wanted: the columns that are findings, or None to find them.
    path: of the file, for the message.

  Returns:
    One label ({finding: 0 or 1}, a class number, or None) a line, and the columns they were taken from.

  Raises:
    DataError: IMPORT: a wanted column is not there, or has another value.
  """
  if wanted is None:
    known = set(meanings(header).values())
    wanted = [c for c in header if c not in known and plain(c) not in NO_LABELS and _binary(c, lines)]
  for column in wanted:
    if column not in header:
      raise fault(path, f'no column "{column}" (found {", ".join(header)})', 'correct labels')
    for number, cells in lines:
      if cells[column].lower() not in (*BINARY, *UNKNOWN):
        raise fault(f'{path} line {number}', f'{column} is "{cells[column]}", expected 0, 1 or nothing',
                        'correct it')
  if wanted:
    said = [{c: BINARY[cells[c].lower()] for c in wanted if cells[c].lower() in BINARY} for _, cells in lines]
    return [label or None for label in said], set(wanted)
  column = meanings(header).get('label')
  if column is None:
    return [None] * len(lines), set()
  return named([cells[column] for _, cells in lines]), {column}


def _binary(column: str, lines) -> bool:
  values = {cells[column].lower() for _, cells in lines}
  return values <= {*BINARY, *UNKNOWN} and bool(values & BINARY.keys())


def named(texts: list[str]) -> list:
  """Cells with class numbers -> numbers; with names -> {name: 0 or 1} over all names; '' -> None.

  'No Finding' means that no name applies.
  """
  said = [t.strip() for t in texts]
  if all(re.fullmatch(r'\d{1,9}', t) for t in said if t):
    return [int(t) if t else None for t in said]
  mark = next((m for m in '|;,' if any(m in t for t in said)), '|')
  split = [{name.strip() for name in t.split(mark)} - {''} for t in said]
  names = sorted({name for cell in split for name in cell if plain(name) != 'nofinding'})
  return [{name: int(name in cell) for name in names} or None if cell else None for cell in split]
