"""Reading and cleaning of reports, by rules written out, and on real ones."""
import csv
import tarfile

import numpy as np
import pytest

from data_pipelines import reports, wordpiece
from data_pipelines.errors import DataError

XML = '''<?xml version="1.0" encoding="utf-8"?><eCitation><Abstract><AbstractText Label="FINDINGS">Lungs are clear.
</AbstractText><AbstractText Label="IMPRESSION">Normal <b>chest</b> film.</AbstractText></Abstract></eCitation>'''
VOCABULARY = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'lungs', 'are', 'clear', 'normal', 'chest', 'film']


@pytest.mark.parametrize('text, want', [
    ('1. No acute process. 2. Small nodule, 5 mm.', 'no acute process small nodule 5 mm'),
    ('Stable. Heart size is normal.', 'heart size is normal'),                 # a sentence of one word is none
    ('Size 1.5 cm nodule.', '5 cm nodule'),                                    # "1." is a number of a list
    ('No.  Effusion.\nNone seen.', ''),                                        # two words are no report
    ('Derrame\ufffd\ufffdpleural: peque\u00f1o y libre', 'derrame pleural peque\u00f1o y libre'), ('', '')])
def test_cleaning(text, want):
  assert reports.clean(text) == want


def test_case_is_kept_where_it_is_asked_for():
  assert reports.clean('No CHF seen.', lowercase=False) == 'No CHF seen'


def test_files(tmp_path):
  (tmp_path / 'a.xml').write_text(XML)
  (tmp_path / 'b.txt').write_text('Lungs are clear.')
  assert reports.read(tmp_path / 'a.xml').text == 'Normal chest film. Lungs are clear.'      # impression first
  assert reports.read(tmp_path / 'b.txt').text == 'Lungs are clear.'
  for name, content, code in (('c.xml', XML[:80].encode(), 'REPORT'), ('d.txt', b'\xff\xfe\xfa', 'REPORT'),
                              ('e.xml', b'<a></a>', 'REPORT'), ('f.txt', b'', 'ZERO_BYTES')):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name) as e:
      reports.read(tmp_path / name)
    assert e.value.code == code, name


def test_reports_of_rows(tmp_path):
  (tmp_path / 'r.txt').write_text('Normal chest film.')
  rows = [{'id': 'a', 'kind': 'image', 'text': 'Lungs are clear'}, {'id': 'b', 'kind': 'image', 'study': 's'},
          {'id': 'c', 'kind': 'volume', 'study': 't'}]
  said = {'id': 'r', 'kind': 'report', 'study': 's', 'path': str(tmp_path / 'r.txt')}
  found, texts = reports.of_rows(rows, [*rows, said])
  assert [r['id'] for r in found] == ['a', 'b'] and texts == {'a': 'Lungs are clear', 'b': 'Normal chest film.'}
  with pytest.raises(DataError, match='study s has another report'):
    reports.of_rows(rows, [*rows, said, said | {'id': 'q'}])


def test_records_are_tokenised_once_and_told_apart_by_their_text(capsys):
  texts = {'a': 'Lungs are clear', 'b': 'LUNGS are: clear!', 'c': 'Normal.', 'd': 'normal chest film ' * 5}
  kept, out = reports.tokenised(list(texts), texts, wordpiece.Tokenizer(VOCABULARY, 8), 'here')
  assert kept == ['a', 'b', 'd']
  assert out['a']['report'] == out['b']['report'] != out['d']['report']
  assert out['a'] is out['b']
  np.testing.assert_array_equal(out['a']['ids'], [2, 4, 5, 6, 3, 0, 0, 0])
  np.testing.assert_array_equal(out['a']['mask'], [1, 1, 1, 1, 1, 0, 0, 0])
  line = capsys.readouterr()
  assert 'here: 4 reports: 1 longer than 8 word pieces, cut off, 1 empty, left out' in line.out + line.err
  with pytest.raises(DataError, match='not one of 1 reports has 3 words'):
    reports.tokenised(['c'], texts, wordpiece.Tokenizer(VOCABULARY, 8), 'here')


@pytest.mark.realdata
def test_real_reports_are_read_cleaned_and_tokenised(shared, fixtures):
  """Open-i, 2,633 reports in the archive, and the notes of the COVID X-rays."""
  made = wordpiece.read(fixtures / 'unimedi' / 'bert_tiny' / 'vocab.txt', 112)
  texts = {}
  with tarfile.open(shared / 'data' / 'reports' / 'openi_xml.tar.gz') as archive:
    for member in [m for m in archive if m.name.endswith('.xml')][:300]:
      texts[member.name] = reports.parsed(archive.extractfile(member).read(), member.name).text
  with (shared / 'data' / 'cxr' / 'covid' / 'labels.csv').open(newline='') as f:
    texts |= {row['image']: row['clinical_notes'] for row in csv.DictReader(f)}
  kept, out = reports.tokenised(list(texts), texts, made, 'real')
  assert len(kept) > .9 * len(texts) and all(out[n]['ids'].shape == (112,) for n in kept)
  assert all(out[n]['ids'].max() < 156 and out[n]['mask'].sum() > 4 for n in kept)
  assert 1 < len({int(out[n]['report']) for n in kept}) < len(kept)      # "normal chest" is said more than once
