"""Splits of the released UniMiSS and UniMiSS+ code: `doctor --split=ricord|chestxr|jsrt`.

  ricord    the lists of 194, 52 and 84 series of 137, 45 and 45 patients, and their classes (1A = 1, 1B = 0). A series
            is known by patient and the last five characters of its name, as the archive names it
            (440808-000012, 605.000000-THORAX PE ART AXIAL 3X3-.1783); the list here holds hashes of the two.
  chestxr   folder train trains, folder validation tests
  jsrt      JPCLN and JPCNN of odd number train, of even number test

What is in no list is left out of the manifest. No split of BCV was released.
"""
import collections
import functools
import hashlib
import pathlib
import re

from data_pipelines import manifest
from data_pipelines.errors import DataError
from data_pipelines.finding import Finding

LIST = pathlib.Path(__file__).with_name('published_ricord.txt')
PATIENT = re.compile(r'(?:ID|RICORD-1[AB]-|(?<![\w.]))((?:\d{6}|SITE2)-\d{6})(?!\d)')
JSRT = re.compile(r'JPC[LN]N(\d{3})(?!\d)', re.IGNORECASE)
TAIL = 5      # characters of the end of a series' name that tell it from the patient's others
RELEASED = {'ricord': (194, 52, 84), 'chestxr': (17_958, 0, 3_432), 'jsrt': (124, 0, 123)}


def apply(rows, name: str) -> tuple[list[dict], list[Finding]]:
  """Copies of the rows with the split of the released list, those in none excluded (UNLISTED), and what to know of it.

  Args:
    rows: of a manifest, or of the doctor.
    name: of RELEASED.

  Raises:
    DataError: SPLIT: not one usable row is in the list.
  """
  out, found, unlisted = [], collections.Counter(), 0
  for row in rows:
    about = _RULES[name](row['path'])
    if about:
      row = {'label': about['label']} | row if 'label' in about else dict(row)
      row['split'] = about['split']
      found[row['split']] += row.get('status') != 'excluded'
    else:
      unlisted += row.get('status') != 'excluded'
      codes = dict.fromkeys([*row.get('findings', ()), 'UNLISTED'])
      row = row | {'status': 'excluded', 'findings': [*codes]}
    out.append(row)
  here, there = (', '.join(f'{n} {s}' for n, s in zip(counts, manifest.SPLITS) if n)
                 for counts in ([found[s] for s in manifest.SPLITS], RELEASED[name]))
  if not here:
    raise DataError('SPLIT', name, f'none of {len(out)} files is in the released split ({there})',
                    'keep the names that the archive gives to files and folders, or split by --split=.8,.1,.1')
  told = [Finding('WARN', 'UNLISTED', f'--split={name}', f'{unlisted} usable files are not in it', 'left out',
                  'split by --split=.8,.1,.1 to use them')] * bool(unlisted)
  if here != there:
    told.append(Finding('WARN', 'SPLIT_PART', f'--split={name}', f'released with {there}; here {here}', '',
                        'compare with published numbers only when it is whole'))
  return out, told


def _ricord(path: str) -> dict | None:
  patient = PATIENT.search(path)
  if not patient:
    return None
  *_, folder, name = ['', *path.rstrip('/').split('/')]      # of a DICOM series the folder, of its files that above
  found = [_listed().get(key(patient[1], n)) for n in (re.sub(r'(\.nii)?(\.gz)?$', '', name), folder)]
  return found[0] or found[1]


def key(patient: str, series: str) -> str:
  """What the list holds of a series: 12 hexadecimal digits."""
  return hashlib.sha256(f'{patient}/{series[-TAIL:]}'.encode()).hexdigest()[:12]


@functools.cache
def _listed() -> dict[str, dict]:
  """{key: split and label}; a line of the file is split, class, keys."""
  known = {}
  for line in LIST.read_text().splitlines():
    if line and not line.startswith('#'):
      split, label, *keys = line.split()
      known |= dict.fromkeys(keys, {'split': split, 'label': int(label)})
  return known


def _chestxr(path: str) -> dict | None:
  folders = [part.lower() for part in path.split('/')[:-1]]
  for folder in reversed(folders):
    if folder in ('train', 'validation'):
      return {'split': 'train' if folder == 'train' else 'test'}
  return None


def _jsrt(path: str) -> dict | None:
  number = JSRT.search(path.rsplit('/', 1)[-1])
  return {'split': 'train' if int(number[1]) % 2 else 'test'} if number else None


_RULES = {'ricord': _ricord, 'chestxr': _chestxr, 'jsrt': _jsrt}
