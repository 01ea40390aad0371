"""Views with labels: image and mask move together, patches hold what they should, test views cover a case."""
import numpy as np
import pytest

from configs import finetune
from data_pipelines import cases, draw, phantom
from unimiss_jax.views import image as pictures


def config(preset, **leaves):
  c = finetune.get_config(preset)
  c.unlock()
  for name, value in leaves.items():
    section, _, leaf = name.rpartition('.')
    part = c
    for key in section.split('.'):
      part = part[key]
    part[leaf] = value
  return c


CALM = dict(noise_std=(0., 0.), blur_p=(0., 0.), mul_p=(0., 0.), add_p=(0., 0.), contrast_p=(0., 0.), gamma_p=(0., 0.))


def squares(shape, size):
  """A checkerboard of 0 and 1."""
  return (sum(np.indices(shape) // size) % 2).astype(np.uint8)


def test_a_volume_and_its_mask_are_cut_flipped_and_resized_alike():
  c = config('phantom_seg3d', **{f'views.ct.{k}': v for k, v in CALM.items()}, **{
      'views.ct.flip_p': .5, 'views.ct.scale': (.7, 1.3), 'task.classes': ('square',)})
  mask = squares((40, 96, 96), 8)
  record = {'volume': mask.astype(np.int16) * 1000, 'mask': mask, 'spacing_mm': (1., 1., 1.)}
  rng = np.random.default_rng(0)
  for _ in range(6):
    made = cases.view('ct', record, c, rng)
    image, label = made['ct'][0, ..., 0] * 1024, made['mask']
    assert image.shape == label.shape == tuple(c.views.ct.size)
    sure = abs(image - 500) > 300                     # away from the edges, where the image is between both
    assert sure.mean() > .4 and 0 < label.mean() < 1
    np.testing.assert_array_equal(label[sure], image[sure] > 500)


def test_a_picture_and_its_outlines_are_cut_flipped_and_resized_alike():
  c = config('phantom_seg2d', **{'views.xray.flip_p': .5, 'views.xray.updown_p': .5, 'views.xray.jitter_p': 0.,
                                 'views.xray.blur_p': (0., 0.), 'views.xray.noise_std': (0., 0.),
                                 'views.xray.gamma_p': (0., 0.)})
  mask = np.stack([squares((128, 120), 16), 1 - squares((128, 120), 16)], -1)
  record = {'image': mask[..., 0] * 255, 'mask': mask}
  rng = np.random.default_rng(0)
  for _ in range(6):
    made = cases.view('xray', record, c, rng)
    image, label = made['xray'][0, ..., 0], made['mask']
    sure = abs(image - .5) > .3
    assert sure.mean() > .5
    np.testing.assert_array_equal(label[..., 0][sure], image[sure] > .5)
    np.testing.assert_array_equal(label.sum(-1), 1)


def test_no_label_is_off_by_half_a_voxel():
  """Between the cells of a checkerboard a linear (or area) resize passes 1/2 just where the nearest cell changes, on
  each axis for itself: mask and thresholded image are equal everywhere."""
  still = {f'views.ct.{k}': v for k, v in CALM.items()}
  c = config('phantom_seg3d', **still, **{'views.ct.flip_p': .5, 'views.ct.scale': (.7, 1.3), 'task.classes': ('one',)})
  mask = squares((40, 96, 96), 8)
  record = {'volume': mask.astype(np.int16) * 1000, 'mask': mask, 'spacing_mm': (1., 1., 1.)}
  flat = config('phantom_seg2d', **{'views.xray.flip_p': .5, 'views.xray.updown_p': .5, 'views.xray.jitter_p': 0.,
                                    'views.xray.blur_p': (0., 0.), 'views.xray.noise_std': (0., 0.),
                                    'views.xray.gamma_p': (0., 0.)})
  board = squares((128, 120), 8)
  picture = {'image': board * 255, 'mask': board[..., None]}
  rng = np.random.default_rng(1)
  for _ in range(8):
    made = cases.view('ct', record, c, rng)
    image, label = made['ct'][0, ..., 0] * 1.024, made['mask'] > 0
    clear = abs(image - .5) > 1e-4
    assert clear.mean() > .9
    np.testing.assert_array_equal((image > .5)[clear], label[clear])
    made = cases.view('xray', picture, flat, rng)
    image, label = made['xray'][0, ..., 0], made['mask'][..., 0] > 0
    clear = abs(image - .5) > 1e-4
    assert clear.mean() > .9
    np.testing.assert_array_equal((image > .5)[clear], label[clear])


def test_what_lies_outside_of_a_small_volume_is_background():
  c = config('phantom_seg3d', **{f'views.ct.{k}': v for k, v in CALM.items()}, **{'views.ct.scale': (1., 1.)})
  record = {'volume': np.zeros((8, 30, 30), np.int16), 'mask': np.ones((8, 30, 30), np.uint8),
            'spacing_mm': (1., 1., 1.)}
  made = cases.view('ct', record, c, np.random.default_rng(0))
  assert made['mask'].sum() == 8 * 30 * 30
  np.testing.assert_allclose(made['ct'][0, ..., 0][made['mask'] == 0], -1, atol=1e-6)      # air


def test_patches_lie_round_the_classes_as_often_as_asked():
  c = config('phantom_seg3d', **{'task.foreground': 1., 'task.classes': ('rare', 'rarer')})
  mask = np.zeros((40, 120, 120), np.uint8)
  mask[30, 100, 7], mask[2, 3, 110] = 1, 2
  record = {'volume': np.zeros(mask.shape, np.int16), 'mask': mask, 'spacing_mm': (1., 1., 1.)}
  rng, config_ = np.random.default_rng(0), c
  count = np.zeros(3)
  for _ in range(200):
    at = cases._focus(rng, record, config_.task)
    params = draw.ct_view(rng, config_, mask.shape, at)['ct']
    start, size = params['box_start'][0], params['box_size'][0]
    assert ((start <= at) & (np.array(at) < start + size)).all()
    assert ((start >= np.minimum(0, mask.shape - size)) & (start <= np.maximum(0, mask.shape - size))).all()
    count[mask[at]] += 1
  assert count[0] == 0 and abs(count[1] - 100) < 3 * np.sqrt(50)
  c.task.foreground = .25
  assert abs(np.mean([cases._focus(rng, record, c.task) is not None for _ in range(2000)]) - .25) < 3 * .01


def test_units_of_clip_and_normalise():
  c = config('phantom_cls3d', **{'task.clip': (-1024., 325.), 'task.normalise': (158.58, 324.70)})
  x = np.array([-1024., 0., 325., 3071.], np.float32) / 1024
  want = (np.array([-1024., 0., 325., 325.]) - 158.58) / 324.70
  np.testing.assert_allclose(cases.normalised(x, c.task, 1024.), want, atol=1e-5)
  assert want.min() == pytest.approx(-3.642, abs=1e-3) and want.max() == pytest.approx(.513, abs=1e-3)
  c.task.clip = c.task.normalise = (0., 0.)
  np.testing.assert_array_equal(cases.normalised(x, c.task, 1024.), x)


class Records:
  """Stands for a labelled source."""
  classes = ('a',)

  def __init__(self, *records):
    self.records = records

  def __len__(self):
    return len(self.records)

  def __getitem__(self, i):
    return self.records[i]

  def groups(self):
    return [str(i) for i in range(len(self.records))]

  def listing(self):
    return [{'id': f'case {i}'} for i in range(len(self.records))]


def forty_views(image):
  """Ten crops (five and their mirror images) of a picture [64, 64], each as it is and mirrored three ways: [40, 224,
  224], normalised."""
  wide, room = 56, 8                                  # 224 of 256
  forty = []
  for mirrored in (image, image[:, ::-1]):
    for a, b in ((0, 0), (0, room), (room, 0), (room, room), (room // 2, room // 2)):
      crop = mirrored[a:a + wide, b:b + wide]
      forty += [crop[::up, ::left] for up in (1, -1) for left in (1, -1)]
  as_seen = lambda x: pictures.crop_resize(x, (0, 0), x.shape, (False, False), (224, 224), 'bicubic')
  return np.array([(as_seen(x) - .5056) / .252 for x in forty])


def test_twenty_views_twice_are_the_forty_of_the_released_test():
  c = config('chestxr')
  image = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
  tests = cases.of(c, 'test', Records({'image': image, 'label': np.zeros(3)}))
  views = tests.views(tests.record(0))
  distance = np.abs(views[:, None, ..., 0] - forty_views(image)[None]).max((2, 3))      # [20, 40]
  assert views.shape == (20, 224, 224, 3)
  np.testing.assert_array_equal((distance < 1e-5).sum(1), 2)
  np.testing.assert_array_equal((distance < 1e-5).sum(0), 1)


def test_windows_cover_a_volume_and_the_centre_is_one_view():
  c = config('cls3d', **{'views.ct.extent': 'output', 'views.ct.size': (16, 32, 32), 'task.test_view': 'windows'})
  volume = np.zeros((40, 70, 32), np.int16)
  volume[0, 0, 0] = volume[39, 69, 31] = 1000
  tests = cases.of(c, 'test', Records({'volume': volume, 'spacing_mm': (1., 1., 1.), 'label': np.zeros(1)}))
  views = tests.views(tests.record(0))
  assert views.shape[1:] == (16, 32, 32, 1) and (views > .5).any((1, 2, 3, 4)).sum() == 2
  c.task.test_view = 'centre'
  assert cases.of(c, 'test', tests.source).views(tests.record(0)).shape[0] == 1


def test_outlines_lie_where_the_radiograph_shows_the_organ():
  """The lungs are darker than what is round them; right is on the left of the picture."""
  made = phantom.make(0, 3)
  lungs = [[phantom.ORGANS.index('lung_right')], [phantom.ORGANS.index('lung_left')]]
  mask = phantom.outlines(made, 0, 3, lungs)
  image = phantom.xray(made, 0, 3).astype(float)
  assert mask.shape == (128, 128, 2) and (mask.mean((0, 1)) > .03).all()
  columns = [np.average(np.arange(128), weights=m.sum(0)) for m in np.moveaxis(mask, -1, 0)]
  assert columns[0] + 20 < columns[1]
  both = mask.any(-1)
  middle = np.s_[40:80, 20:108]
  assert image[middle][both[middle]].mean() < image[middle][~both[middle]].mean()
