"""Radiographs: one picture in every mode is one array; broken files give one line."""
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images
from data_pipelines.errors import DataError


def picture(height=60, width=50):
  grey = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.uint8)
  grey[0, 0] = 255
  return grey


def save(path, array, mode=None, **kw):
  image = Image.fromarray(array)
  (image.convert(mode) if mode else image).save(path, **kw)
  return path


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'P'])
def test_modes_of_one_picture_are_equal(tmp_path, mode):
  grey = picture()
  read = images.read(save(tmp_path / 'x.png', grey, mode))
  assert read.array.dtype == np.uint8 and read.meta['mode'] == mode and not read.meta['warnings']
  np.testing.assert_array_equal(read.array, grey)


def test_sixteen_bits_are_kept(tmp_path):
  deep = np.random.default_rng(1).integers(0, 65536, (40, 30)).astype(np.uint16)
  deep[0, 0] = 65535
  read = images.read(save(tmp_path / 'x.png', deep))
  assert read.array.dtype == np.uint16
  np.testing.assert_array_equal(read.array, deep)
  same = images.read(save(tmp_path / 'y.png', picture().astype(np.uint16) * 257))
  np.testing.assert_allclose(same.array / 65535, picture() / 255, atol=1 / 65535)


@pytest.mark.parametrize('bits', [8, 10, 12, 14])
def test_shallow_numbers_in_a_deep_file_get_full_scale(tmp_path, bits):
  top = (1 << bits) - 1
  stored = np.linspace(0, top, 64 * 32).round().astype(np.uint16).reshape(64, 32)
  read = images.read(save(tmp_path / 'x.png', stored))
  np.testing.assert_allclose(read.array / 65535, stored / top, atol=1 / 65535)


def test_alpha_is_put_on_black_and_reported(tmp_path):
  grey = picture()
  alpha = np.full_like(grey, 255)
  alpha[:30] = 51    # a fifth
  read = images.read(save(tmp_path / 'x.png', np.stack([grey] * 3 + [alpha], -1)))
  np.testing.assert_array_equal(read.array[30:], grey[30:])
  np.testing.assert_allclose(read.array[:30], grey[:30] / 5, atol=.5)
  assert read.meta['warnings'] == [
      f'WARN MODE {tmp_path / "x.png"}: 50.0 % of the pixels are transparent; put on black']


def test_colour_becomes_luminance_with_a_warning(tmp_path):
  rgb = np.zeros((20, 20, 3), np.uint8)
  rgb[...] = 200, 100, 50
  read = images.read(save(tmp_path / 'x.png', rgb))
  assert abs(int(read.array[0, 0]) - (.299 * 200 + .587 * 100 + .114 * 50)) <= 1
  assert 'MODE' in read.meta['warnings'][0] and '100.0 %' in read.meta['warnings'][0]


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
  grey = np.zeros((40, 24), np.uint8)
  grey[:20, :12] = 255    # bright upper left corner of the upright picture
  undo = {1: grey, 2: grey[:, ::-1], 3: grey[::-1, ::-1], 4: grey[::-1], 5: grey.T, 6: np.rot90(grey, 1),
          7: grey[::-1, ::-1].T, 8: np.rot90(grey, -1)}
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = Image.fromarray(np.ascontiguousarray(undo[orientation]))
  stored.save(tmp_path / 'x.png', exif=exif)
  np.testing.assert_array_equal(images.read(tmp_path / 'x.png').array, grey)
  assert images.check(tmp_path / 'x.png') == grey.shape


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_large_pictures_are_reduced_without_aliasing(tmp_path, dtype):
  top = np.iinfo(dtype).max
  fine = ((np.indices((1100, 1536)).sum(0) % 2) * top).astype(dtype)    # a chessboard: grey when reduced
  read = images.read(save(tmp_path / 'x.png', fine))
  assert read.array.shape == (512, round(1536 * 512 / 1100)) and read.array.dtype == dtype
  assert images.check(tmp_path / 'x.png') == read.array.shape
  assert np.abs(read.array[4:-4, 4:-4] / top - .5).max() < .03
  small = images.read(save(tmp_path / 'y.png', picture(512, 600)))
  np.testing.assert_array_equal(small.array, picture(512, 600))


def test_inverted_look_is_reported_and_not_changed(tmp_path):
  grey = np.full((100, 100), 240, np.uint8)
  grey[20:80, 20:80] = 40
  read = images.read(save(tmp_path / 'x.png', grey))
  np.testing.assert_array_equal(read.array, grey)
  assert read.meta['warnings'][0].startswith('WARN INVERTED? ')


def test_jpeg(tmp_path):
  smooth = np.add.outer(np.arange(100), np.arange(120)).astype(np.uint8)
  read = images.read(save(tmp_path / 'x.JPEG', smooth, 'RGB', format='jpeg', quality=95))
  assert np.abs(read.array.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize('reader', [images.read, images.check])
def test_missing_empty_and_foreign_files(tmp_path, reader):
  (tmp_path / 'empty.png').write_bytes(b'')
  (tmp_path / 'text.png').write_text('hello')
  for name, code in (('none.png', 'UNREADABLE'), ('empty.png', 'ZERO_BYTES'), ('text.png', 'NOT_IMAGE')):
    with pytest.raises(DataError) as e:
      reader(tmp_path / name)
    assert e.value.code == code and name in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['png', 'jpeg'])
def test_damage_gives_a_picture_or_one_clear_error(tmp_path, kind):
  rng = np.random.default_rng(3)
  buffer = io.BytesIO()
  Image.fromarray(picture()).save(buffer, kind)
  path = tmp_path / 'x'
  path.write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])
  with pytest.raises(DataError, match='TRUNCATED'):
    images.read(path)
  for _ in range(100):
    data = bytearray(buffer.getvalue())
    for at in rng.integers(0, len(data), 4):
      data[at] = rng.integers(256)
    path.write_bytes(data)
    try:
      images.check(path)
      assert images.read(path).array.ndim == 2
    except DataError as e:
      assert '\n' not in str(e)


@pytest.mark.realdata
def test_real_radiographs(shared):
  files = sorted((shared / 'data/cxr/covid/images').iterdir())
  reads = [images.read(f) for f in files[::3]]
  assert all(r.array.ndim == 2 and min(r.array.shape) <= 512 for r in reads)
  assert {r.meta['mode'] for r in reads} == {'L', 'RGB', 'RGBA'}
  assert sum('coloured' in w for f in files for w in images.read(f).meta['warnings']) == 12
