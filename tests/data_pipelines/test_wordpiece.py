"""WordPiece against the ids of PyTorch's tokenizer, and against the package `tokenizers` where it is installed."""
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import wordpiece
from data_pipelines.errors import DataError

ODD = ('Caf\u00e9-au-lait, na\u00efve: 3.5cm\u00b2!', '\u80ba\u90e8 nodule\u3000left', 'a\x00b\x07c\ufffdd', 'x' * 101,
       'Don\'t_know $5 ^up', '  tabs\tand\nlines ', '\u0130stanbul \u1e9e', '[SEP')


@pytest.fixture(scope='module')
def reference(fixtures):
  return json.loads((fixtures / 'unimedi' / 'bert_tiny' / 'tokenizer_reference.json').read_text())


@pytest.fixture(scope='module')
def vocabulary(fixtures):
  return fixtures / 'unimedi' / 'bert_tiny' / 'vocab.txt'


@pytest.mark.parametrize('fast', [False, True])
def test_ids_and_masks_equal_the_reference(reference, vocabulary, fast):
  if fast:
    pytest.importorskip('tokenizers')
  made = wordpiece.read(vocabulary, reference['max_len'], reference['lowercase'], size=156)
  made = pickle.loads(pickle.dumps(wordpiece.Tokenizer(made.vocabulary, made.length, made.lowercase, fast)))
  for text, tokens, ids, mask in zip(*(reference[k] for k in ('texts', 'tokens', 'ids', 'attention_mask'))):
    got, there = made(text)
    assert made.tokens(got) == tokens
    np.testing.assert_array_equal(got, ids)
    np.testing.assert_array_equal(there, mask)
  assert made.count(reference['texts'][5]) > 24 and made.count('') == 2


@pytest.mark.parametrize('lowercase', [True, False])
def test_odd_texts_are_read_as_the_library_reads_them(vocabulary, lowercase):
  pytest.importorskip('tokenizers')
  more = [*'\'_$^I[3.5d²ï肺é', 'Cafe', 'cafe', 'cm', '##t', 'Don', 'st', 'ss', 'ẞ', 'SEP', 'sep']
  known = list(dict.fromkeys([*vocabulary.read_text().split(), *more]))
  own, library = (wordpiece.Tokenizer(known, 40, lowercase, fast) for fast in (False, True))
  for text in ODD:
    assert own.tokens(own(text)[0]) == library.tokens(library(text)[0]), repr(text)


def test_case_is_kept_or_not_as_asked():
  known = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'No', 'no', 'n', '##odule', '\u00e9', 'e']
  keep = wordpiece.Tokenizer(known, 6, lowercase=False, fast=False)
  lower = wordpiece.Tokenizer(known, 6, lowercase=True, fast=False)
  assert keep.tokens(keep('No NO \u00e9')[0]) == ['[CLS]', 'No', '[UNK]', '\u00e9', '[SEP]', '[PAD]']
  assert lower.tokens(lower('No NO \u00e9')[0]) == ['[CLS]', 'no', 'no', 'e', '[SEP]', '[PAD]']


def test_mistakes_are_named(vocabulary, tmp_path):
  for make, code, what in (
      (lambda: wordpiece.read(vocabulary, 24, size=155), 'VOCABULARY', '156 word pieces, the network has 155'),
      (lambda: wordpiece.read(vocabulary, 24, lowercase=False), 'CASING', 'no word piece has an upper-case letter'),
      (lambda: wordpiece.read(tmp_path / 'none.txt', 24), 'UNREADABLE', 'none.txt')):
    with pytest.raises(DataError, match=what) as e:
      make()
    assert e.value.code == code
  (tmp_path / 'v.txt').write_text('a\nb\n')
  with pytest.raises(DataError, match=r'none of them is \[PAD\], \[UNK\], \[CLS\], \[SEP\]'):
    wordpiece.read(tmp_path / 'v.txt', 24)


def test_no_network_is_asked(vocabulary):
  """With every socket refused."""
  code = ('import socket\ndef refuse(*a, **k): raise RuntimeError("network")\n'
          'socket.socket.connect = socket.getaddrinfo = refuse\n'
          f'from data_pipelines import wordpiece\nassert wordpiece.read({str(vocabulary)!r}, 8)("clear lungs")[0][1]')
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('said, lowercase, ok', [(True, True, True), (True, False, False), (False, True, False)])
def test_case_must_be_what_the_weights_say_of_it(said, lowercase, ok, tmp_path):
  (tmp_path / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\nLungs\nlungs\n')
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'do_lower_case': said}))
  if ok:
    assert wordpiece.read(tmp_path / 'vocab.txt', 8, lowercase).lowercase == lowercase
    return
  what = f'CASING .*do_lower_case={said}, the run lowercase={lowercase}.*set lowercase={said}'
  with pytest.raises(DataError, match=what):
    wordpiece.read(tmp_path / 'vocab.txt', 8, lowercase)
