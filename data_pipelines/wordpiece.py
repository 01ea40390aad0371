"""WordPiece (as BERT reads text) from a local vocab.txt: text -> ids and mask of a fixed length.

The package `tokenizers` does the work where it is installed, else `pieces` below: the same ids. Casing is explicit: a
cased vocabulary does not say whether its network was trained on lower-cased text, and many were.
"""
import contextlib
import functools
import json
import os
import unicodedata

import numpy as np

from data_pipelines import files
from data_pipelines.errors import DataError

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
LONGEST_WORD = 100      # characters; longer ones are unknown, as in BERT
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
       (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))      # every character is a word


class Tokenizer:
  """text -> (ids int32 [length], mask int32 [length]): [CLS] pieces [SEP] [PAD] ...; what does not fit is cut off.

  Attributes:
    vocabulary: word pieces in the order of their ids.
    length: of the result; at least 2.
    lowercase: whether text is lower-cased and loses its accents.
  """

  def __init__(self, vocabulary, length: int, lowercase: bool = True, fast: bool | None = None):
    """fast: None = the package `tokenizers` where it is there; True and False ask for one of the two."""
    self.vocabulary, self.length, self.lowercase, self.fast = tuple(vocabulary), length, lowercase, fast
    self.ids = {piece: i for i, piece in enumerate(self.vocabulary)}

  def __reduce__(self):    # worker processes make their own; what `tokenizers` holds stays here
    return type(self), (self.vocabulary, self.length, self.lowercase, self.fast)

  def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    inner = self._encode(text)[:self.length - 2]
    ids = np.full(self.length, self.ids['[PAD]'], np.int32)
    ids[:len(inner) + 2] = [self.ids['[CLS]'], *inner, self.ids['[SEP]']]
    return ids, (np.arange(self.length) < len(inner) + 2).astype(np.int32)

  def count(self, text: str) -> int:
    """Word pieces of the whole text, with [CLS] and [SEP]."""
    return len(self._encode(text)) + 2

  def tokens(self, ids) -> list[str]:
    return [self.vocabulary[i] for i in ids]

  @functools.cached_property
  def _encode(self):
    """text -> ids of its pieces; the last one is kept, as whoever counts them also wants them."""
    library = _library(self.vocabulary, self.lowercase) if self.fast is not False else None
    if library is not None:
      return functools.lru_cache(1)(lambda text: library.encode(text, add_special_tokens=False).ids)
    if self.fast:
      raise ImportError('the package tokenizers is not installed')
    return functools.lru_cache(1)(lambda text: [self.ids[p] for p in pieces(text, self.ids, self.lowercase)])


def read(path, length: int, lowercase: bool = True, size: int | None = None) -> Tokenizer:
  """The tokenizer of a vocab.txt, one word piece a line.

  Args:
    path: local or remote.
    length, lowercase: as of `Tokenizer`.
    size: rows of the network's table of words, where it is known.

  Raises:
    DataError: UNREADABLE, ZERO_BYTES; VOCABULARY: not a vocabulary, or not of this size; CASING: case is to be kept,
      and the vocabulary has none, or a tokenizer_config.json beside it says otherwise than `lowercase`.
  """
  try:
    vocabulary = files.read_bytes(path).decode('utf-8').splitlines()
  except UnicodeDecodeError as e:
    raise DataError('VOCABULARY', path, f'is no UTF-8 text ({e.reason})', 'name a vocab.txt') from e
  if missing := [s for s in SPECIAL if s not in vocabulary]:
    raise DataError('VOCABULARY', path, f'{len(vocabulary)} lines, none of them is {", ".join(missing)}',
                    'name the vocab.txt of a BERT')
  if size is not None and len(vocabulary) != size:
    raise DataError('VOCABULARY', path, f'{len(vocabulary)} word pieces, the network has {size}',
                    'take the vocab.txt that belongs to the weights')
  if not lowercase and not any(_cased(p) for p in vocabulary):
    raise DataError('CASING', path, 'no word piece has an upper-case letter, and text is to keep its case: every '
                    'capital would be unknown', 'set lowercase=True')
  if (told := _said_of_case(path)) not in (None, lowercase):
    raise DataError('CASING', path, f'its tokenizer_config.json says do_lower_case={told}, the run '
                    f'lowercase={lowercase}', f'set lowercase={told}, or take that file away')
  return Tokenizer(vocabulary, length, lowercase)


def pieces(text: str, known, lowercase: bool) -> list[str]:
  """Word pieces of a text: words at spaces, punctuation and CJK characters; of each the longest known starts.

  Args:
    text: any; control characters vanish.
    known: container of pieces; inner ones begin with '##'.
    lowercase: see `Tokenizer`.
  """
  out = []
  for word in _words(text, lowercase):
    found = _split(word, known) if len(word) <= LONGEST_WORD else None
    out += found or ['[UNK]']
  return out


def _words(text: str, lowercase: bool) -> list[str]:
  kept = []
  for c in text:
    if c in '\0\ufffd' or c not in '\t\n\r' and unicodedata.category(c).startswith('C'):
      continue
    kept.append(' ' if c.isspace() else f' {c} ' if any(a <= ord(c) <= b for a, b in CJK) else c)
  text = ''.join(kept)
  if lowercase:      # `tokenizers` takes accents away first
    text = ''.join(c for c in unicodedata.normalize('NFD', text) if unicodedata.category(c) != 'Mn').lower()
  return ''.join(f' {c} ' if _is_punctuation(c) else c for c in text).split()


def _split(word: str, known) -> list[str] | None:
  out, start = [], 0
  while start < len(word):
    for end in range(len(word), start, -1):
      piece = ('##' if start else '') + word[start:end]
      if piece in known:
        break
    else:
      return None
    out.append(piece)
    start = end
  return out


def _is_punctuation(c: str) -> bool:
  """Unicode's, and all of ASCII that is neither letter nor digit nor space."""
  return unicodedata.category(c).startswith('P') or c.isascii() and c.isprintable() and not c.isalnum() and c != ' '


def _said_of_case(path) -> bool | None:
  """`do_lower_case` of the tokenizer_config.json beside a vocabulary, if there is one that says it."""
  with contextlib.suppress(DataError, ValueError, AttributeError):
    said = json.loads(files.read_bytes(os.path.join(os.path.dirname(str(path)), 'tokenizer_config.json')))
    return said.get('do_lower_case')
  return None


def _cased(piece: str) -> bool:
  return piece not in (*SPECIAL, '[MASK]') and not piece.startswith('[unused') and piece != piece.lower()


def _library(vocabulary, lowercase):
  """The reader of the package `tokenizers`, or None where it is not installed."""
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')      # its threads do not survive a fork
  try:
    from tokenizers import BertWordPieceTokenizer
  except ImportError:
    return None
  return BertWordPieceTokenizer({p: i for i, p in enumerate(vocabulary)}, lowercase=lowercase)
