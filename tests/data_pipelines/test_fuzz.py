"""Files that were cut, flipped and overwritten at random: a reader gives what is there or one DataError, soon.

FUZZ=4000 in the environment makes 4,000 of each kind instead of 350.
"""
import gzip
import io
import json
import os
import resource
import time

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from data_pipelines import dicom, importers, manifest, nifti, readers, records
from data_pipelines.errors import DataError
from tests.data_pipelines.dicom_files import dataset, noise, save

COUNT = int(os.environ.get('FUZZ', 350))
SECONDS, MEMORY = 10., 2 << 30


def seeds(folder) -> dict:
  """{kind: (bytes of a whole file, name, what reads it)}."""
  rng = np.random.default_rng(0)
  volume = nib.Nifti1Image(rng.integers(-1000, 1000, (9, 8, 7)).astype(np.int16), np.diag([2., 2., 3., 1.]))
  scaled = nib.Nifti2Image(rng.random((5, 6, 7)).astype(np.float32), np.diag([2., 2., 3., 1.]))
  picture = Image.fromarray(rng.integers(0, 256, (20, 30, 4)).astype(np.uint8))

  def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
  save(folder / 'ct', dataset(noise((12, 10))))
  save(folder / 'cr', dataset(noise((12, 10), low=0).astype(np.uint16), kind='CR'))
  rows = ''.join(json.dumps({'id': str(i), 'path': f'{i}.nii', 'kind': 'volume', 'split': 'train',
                             'label': {'a': i % 2},
                             'shape': [3, 4, 5], 'sha': 'ff', 'findings': ['ORIENT']}) + '\n'
                 for i in range(5))
  for i in range(3):
    (folder / f'{i}.nii').write_bytes(b'x')
  table = 'path,subject,split,Effusion,Mass\n' + ''.join(f'{i}.nii,p{i},train,{i % 2},0\n' for i in range(3))
  datalist = json.dumps({'training': [{'image': f'{i}.nii', 'label': {'a': 1}} for i in range(3)], 'name': 'x'})
  writer = records.Writer(records.folder(folder, 'xray') / records.shard_name('xray', 'train', 0, 1), 'xray')
  for i in range(4):
    writer.write({'id': str(i), 'group': 'g', 'label': '{}', 'bits': 8, 'view': '',
                  'image': rng.integers(0, 9, (20, 30)).astype(np.uint16)})
  writer.close()
  records.finish(folder, 'xray', {'train': [4]}, {'train': 1}, 'x')
  shard = next(folder.rglob('*.array_record-*'))
  one_dicom = lambda path: [dicom.read(s) for s in dicom.series([path]).series]

  def record(path):
    shards = records.Shards(folder, 'xray')
    shards.files = [path]
    return [shards[i] for i in range(4)]
  return {
      'nii': (volume.to_bytes(), 'x.nii', nifti.read), 'nifti 2': (scaled.to_bytes(), 'x.nii', nifti.read),
      'nii.gz': (gzip.compress(volume.to_bytes()), 'x.nii.gz', nifti.read),
      'png': (encoded(picture, 'png'), 'x.png', readers.image),
      'jpeg': (encoded(picture.convert('RGB'), 'jpeg'), 'x.jpg', readers.image),
      'dicom slice': ((folder / 'ct').read_bytes(), 'x', one_dicom),
      'dicom radiograph': ((folder / 'cr').read_bytes(), 'x', dicom.read_image),
      'manifest': (rows.encode(), 'manifest.jsonl', manifest.read), 'csv': (table.encode(), 'x.csv', importers.rows),
      'datalist': (datalist.encode(), 'x.json', importers.rows), 'record': (shard.read_bytes(), 'x.shard', record)}


def mutated(data: bytes, rng) -> bytes:
  """One of: cut, some bytes at random, a run of one value, a piece moved, bits of the first 400 bytes flipped."""
  how, out = rng.integers(5), bytearray(data)
  at = int(rng.integers(len(out)))
  length = int(rng.integers(1, 65))
  if how == 0:
    return bytes(out[:at])
  if how == 1:
    for i in rng.integers(len(out), size=length):
      out[i] = rng.integers(256)
  elif how == 2:
    out[at:at + length] = bytes([rng.choice([0, 255, 127, 128])]) * length
  elif how == 3:
    out[at:at] = out[:length]
  else:
    for i in rng.integers(min(len(out), 400), size=3):
      out[i] ^= 1 << rng.integers(8)
  return bytes(out)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('fuzz')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['nii', 'nifti 2', 'nii.gz', 'png', 'jpeg', 'dicom slice', 'dicom radiograph',
                                  'manifest', 'csv', 'datalist', 'record'])
def test_only_data_errors_soon_and_within_memory(folder, kind, monkeypatch):
  monkeypatch.setattr(records, 'RETRY_S', 0)
  where = folder / kind.replace(' ', '_')
  where.mkdir()
  data, name, read = seeds(where)[kind]
  rng, before, refused = np.random.default_rng(len(kind)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
  path = where / name
  path.write_bytes(data)
  read(str(path))      # the whole file is fine
  for i in range(COUNT):
    path.write_bytes(mutated(data, rng))
    began = time.monotonic()
    try:
      read(str(path))
    except DataError as e:
      refused += 1
      assert '\n' not in str(e)
    assert time.monotonic() - began < SECONDS, (kind, i)
  assert refused > COUNT / 20
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
