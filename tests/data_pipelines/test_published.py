"""Released splits: counts of the lists, names that are recognised, and the doctor that applies them."""
import collections
import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines import doctor, manifest, published
from data_pipelines.errors import DataError


def test_the_list_of_ricord_has_the_released_counts():
  counts = collections.Counter((a['split'], a['label']) for a in published._listed().values())
  assert counts == {('train', 1): 120, ('train', 0): 74, ('val', 1): 29, ('val', 0): 23, ('test', 1): 61,
                    ('test', 0): 23}


@pytest.mark.parametrize('path, split, label', [
  ('a/MIDRC-RICORD-1A/ID440808-000012_date01-04-2004_605.000000-THORAX-PE-ART-AXIAL-3X3-.1783.nii.gz', 'train', 1),
  ('tcia/MIDRC-RICORD-1A/MIDRC-RICORD-1A-440808-000012/01-04-2004-NA-CT/605.000000-THORAX PE ART AXIAL 3X3-.1783',
   'train', 1),
  ('MIDRC-RICORD-1A-440808-000012/01-04-2004-NA-CT/605.000000-THORAX PE ART AXIAL 3X3-.1783/1-001.dcm', 'train', 1),
  ('MIDRC-RICORD-1A/IDSITE2-000046_date02-02-2002_3.000000-NA-82731.nii.gz', 'train', 1),
  ('MIDRC-RICORD-1B/ID440808-000100_date05-31-2003_3.000000-ARTERIAL-AXIAL-THIN-14840.nii.gz', 'val', 0),
  ('MIDRC-RICORD-1B/IDSITE2-000455_date12-29-1998_3.000000-NA-07474.nii.gz', 'test', 0)])
def test_series_of_ricord_are_known_by_their_names(path, split, label):
  rows, _ = published.apply([{'path': path}], 'ricord')
  assert (rows[0]['split'], rows[0]['label']) == (split, label)


def test_others_are_left_out_and_told():
  rows, told = published.apply([{'path': p} for p in ('x/JPCLN001.png', 'x/JPCNN044.png', 'x/other1.png')], 'jsrt')
  assert [r.get('split') for r in rows] == ['train', 'test', None]
  assert rows[2]['status'] == 'excluded' and rows[2]['findings'] == ['UNLISTED']
  assert [f.code for f in told] == ['UNLISTED', 'SPLIT_PART']
  assert 'released with 124 train, 123 test; here 1 train, 1 test' in told[1].reason


def test_a_whole_data_set_is_nothing_to_speak_of():
  names = [f'JPCLN{n:03d}.png' for n in range(1, 155)] + [f'JPCNN{n:03d}.png' for n in range(1, 94)]
  assert published.apply([{'path': n} for n in names], 'jsrt')[1] == []


def test_no_file_of_the_list_is_an_error():
  with pytest.raises(DataError, match='none of 1 files is in the released split .194 train, 52 val, 84 test'):
    published.apply([{'path': 'ID440808-000012_1-THORAX-99999.nii.gz'}], 'ricord')


def test_the_doctor_writes_the_split_of_chestxr(tmp_path, capsys):
  rng = np.random.default_rng(0)
  for name in ('train/covid/a.png', 'train/normal/b.png', 'validation/covid/c.png', 'spare/d.png'):
    path = tmp_path / 'data' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (96, 96), dtype=np.uint8)).save(path)
  code = doctor.main([str(tmp_path / 'data'), '--split=chestxr', f'--manifest={tmp_path / "m"}', '--workers=0'])
  out = capsys.readouterr().out
  assert code == 0 and 'SPLIT_PART' in out and 'UNLISTED' in out
  rows = manifest.usable(manifest.read(tmp_path / 'm' / 'manifest.jsonl', labelled=False))
  assert {r['id']: r['split'] for r in rows} == {
      'data/train/covid/a.png': 'train', 'data/train/normal/b.png': 'train', 'data/validation/covid/c.png': 'test'}
  assert json.loads((tmp_path / 'm' / 'manifest.meta.json').read_text())['config']['split'] == 'chestxr'
