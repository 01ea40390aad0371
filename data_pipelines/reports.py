"""Radiology reports: file or row of a manifest -> cleaned text -> ids for the text tower.

Cleaning is that of MGCA (Wang et al. 2022): impression, then findings; cut into sentences at full stops and at numbers
of lists ("1."), of which the runs of letters and digits are kept; a sentence of one word is none, a report of fewer
than three words is empty.
"""
import collections
import re
import xml.etree.ElementTree as xml

import numpy as np

from data_pipelines import files, manifest
from data_pipelines.errors import DataError

SECTIONS = ('impression', 'findings')      # in this order, as MGCA
SENTENCE_END = re.compile(r'[0-9]+\.|\.')
LEAST_OF_SENTENCE, LEAST_OF_REPORT = 2, 3      # words


class Report(dict):
  """What a report says by section, {'impression': text, 'findings': text, ...}."""

  @property
  def text(self) -> str:
    return ' '.join(self[s] for s in SECTIONS if self.get(s)) or ' '.join(self.values())


def read(path) -> Report:
  """A report of a file: plain text (one section, 'findings'), or the XML of Open-i.

  Raises:
    DataError: UNREADABLE, ZERO_BYTES; REPORT: neither text nor such an XML.
  """
  return parsed(files.read_bytes(path), path)


def parsed(data: bytes, path) -> Report:
  """As `read`, of the bytes of a file; `path` is for messages."""
  if not data.lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'<'):
    try:
      return Report(findings=data.decode('utf-8-sig'))
    except UnicodeDecodeError as e:
      raise DataError('REPORT', path, f'is no UTF-8 text ({e.reason})', 'save it as UTF-8') from e
  try:
    found = xml.fromstring(data).iter('AbstractText')
    sections = {str(e.get('Label', 'findings')).lower(): ''.join(e.itertext()).strip() for e in found}
  except xml.ParseError as e:
    raise DataError('REPORT', path, f'is no XML ({e})', 'copy it again, or save it as plain text') from e
  if not sections:
    raise DataError('REPORT', path, 'has no AbstractText', 'save it as plain text')
  return Report({k: v for k, v in sections.items() if v})


def clean(text: str, lowercase: bool = True) -> str:
  """Text -> its sentences of words, separated by spaces; '' where fewer than three words are left.

  Decimals ("1.5 cm") are cut at their point, as in MGCA; letters of any language are kept, which MGCA drops.
  """
  sentences = [re.findall(r'\w+', part) for part in SENTENCE_END.split(text.replace('\ufffd', ' '))]
  words = [word for s in sentences if len(s) >= LEAST_OF_SENTENCE for word in s]
  if len(words) < LEAST_OF_REPORT:
    return ''
  return ' '.join(words).lower() if lowercase else ' '.join(words)


def of_rows(rows, every) -> tuple[list[dict], dict]:
  """Rows of images or volumes that have a report, and {id: its text, not cleaned}.

  A row says it as `text`, or names a `study` of which `every` has a row of kind report, with `text` or a file.

  Raises:
    DataError: two reports of one study; those of `read`.
  """
  of_study = {}
  for row in every:
    if row['kind'] == 'report' and 'study' in row:
      other = of_study.setdefault(row['study'], row)
      if other is not row:
        raise DataError('REPORT', row['id'], f'study {row["study"]} has another report, {other["id"]}',
                        'exclude one of them')
  texts = {}
  for row in rows:
    source = row if 'text' in row else of_study.get(row.get('study'))
    if source is not None:
      texts[row['id']] = source['text'] if 'text' in source else read(source['path']).text
  return [r for r in rows if r['id'] in texts], texts


def joined(rows) -> list[dict]:
  """Rows with the `text` of their report, not cleaned; the rows of kind report that said it are gone.

  Raises:
    DataError: those of `of_rows`.
  """
  every = manifest.usable(rows)
  mine, texts = of_rows([r for r in every if r['kind'] != 'report'], every)
  told = {r['study'] for r in mine if 'text' not in r}
  return [r | ({'text': texts[r['id']]} if r['id'] in texts else {}) for r in rows
          if r['kind'] != 'report' or r.get('study') not in told]


def tokenised(names, texts, tokenizer, where) -> tuple[list, dict]:
  """Reports -> what a stream hands out of them, once at the start; what several records say is tokenised once.

  Args:
    names: of the records, in order.
    texts: {name: text}.
    tokenizer: of wordpiece.py.
    where: file or folder that the reports are of, for messages.

  Returns:
    (names of those that are not empty, {name: {'ids' int32 [T], 'mask' int32 [T], 'report' int32}}); records of the
    same cleaned text share `report`. What was left out or cut off is told in one line.

  Raises:
    DataError: REPORT: not one report is left.
  """
  kept, out, known, found = [], {}, {}, collections.Counter()
  for name in names:
    text = clean(texts[name], tokenizer.lowercase)
    if not text:
      found['empty, left out'] += 1
      continue
    if text not in known:
      ids, mask = tokenizer(text)
      known[text] = ({'ids': ids, 'mask': mask, 'report': np.int32(manifest.number(text))},
                     tokenizer.count(text) > tokenizer.length)
    out[name], long = known[text]
    found[f'longer than {tokenizer.length} word pieces, cut off'] += long
    kept.append(name)
  told = ', '.join(f'{n} {what}' for what, n in found.items() if n)
  files.say(f'{where}: {len(names)} reports' + (f': {told}' if told else ''))
  if not kept:
    raise DataError('REPORT', where, f'not one of {len(names)} reports has {LEAST_OF_REPORT} words',
                    'give rows a text, or a study with a row of kind report')
  return kept, out
