"""Sliding windows against the direct result; overlap in closed form; surfaces against the library surface-distance."""
import numpy as np
import pytest
from scipy import ndimage

from unimiss_jax.evals import segmentation, surface

RNG = np.random.default_rng(0)


# ---- sliding windows

@pytest.mark.parametrize('overlap', [0., .5, .9])
@pytest.mark.parametrize('size, patch', [((13, 21, 9), (8, 8, 4)), ((5, 30, 11), (8, 8, 4)), ((17, 23), (8, 8)),
                                         ((3, 4), (8, 8)), ((8, 8, 4), (8, 8, 4))])
def test_what_is_predicted_voxel_by_voxel_comes_out_as_it_is(size, patch, overlap):
  x = RNG.normal(size=(*size, 2)).astype(np.float32)
  w = RNG.normal(size=(2, 3)).astype(np.float32)
  for mirror in ((), tuple(range(len(size)))):
    got = segmentation.sliding_window(lambda a: a @ w + 1, x, patch, overlap, mirror, batch=3)
    assert got.shape == (*size, 3) and got.dtype == np.float32
    np.testing.assert_allclose(got, x @ w + 1, atol=1e-5)


def test_a_convolution_is_right_where_windows_see_far_enough():
  x = RNG.normal(size=(40, 40, 1)).astype(np.float32)
  kernel = RNG.normal(size=(3, 3)).astype(np.float32)
  blur = lambda a: ndimage.correlate(a, kernel, mode='nearest')
  seen = segmentation.sliding_window(lambda a: np.stack([blur(b[..., 0]) for b in a])[..., None], x, (40, 40), .5)
  np.testing.assert_allclose(seen[..., 0], blur(x[..., 0]), atol=1e-5)
  marked = segmentation.sliding_window(      # the share of a voxel that comes from a window's border
      lambda a: np.pad(np.zeros((len(a), 14, 14, 1)), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.), x,
      (16, 16), .5)
  inside = marked[4:-4, 4:-4]
  assert inside.max() < .05 and marked[0, 0] == pytest.approx(1)      # a Gaussian trusts the middle of a window


def test_the_network_is_called_with_one_shape_and_mirror_images_are_averaged():
  calls = []

  def predict(a):
    calls.append(a.shape)
    return np.broadcast_to(np.arange(4.)[:, None, None], (4, 4, 1)) + 0 * a

  x = np.zeros((10, 7, 1), np.float32)
  got = segmentation.sliding_window(predict, x, (4, 4), .5, batch=3)
  assert set(calls) == {(3, 4, 4, 1)} and got.std() > .1
  even = segmentation.sliding_window(predict, x, (4, 4), 0., mirror=(0,), batch=3)
  np.testing.assert_allclose(even, 1.5, atol=1e-6)


@pytest.mark.parametrize('what', [dict(patch=(4,)), dict(overlap=1.), dict(mirror=(2,)), dict(batch=0)])
def test_arguments_that_do_not_fit(what):
  given = dict(patch=(4, 4), overlap=.5) | what
  with pytest.raises(ValueError, match=next(iter(what))):
    segmentation.sliding_window(lambda a: a, np.zeros((8, 8, 1)), **given)


# ---- overlap

def test_overlap_in_closed_form():
  a, b = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
  a[:4], b[2:6] = True, True
  assert segmentation.dice(a, b) == pytest.approx(.5) and segmentation.iou(a, b) == pytest.approx(1 / 3)
  none = np.zeros_like(a)
  assert segmentation.dice(none, none) == segmentation.iou(none, none) == 1
  assert segmentation.dice(none, none, empty=0.) == 0 and segmentation.dice(a, none) == 0
  assert np.isnan(segmentation.dice(none, none, empty=float('nan')))


def test_the_released_scores_of_radiographs():
  """JSRT: 0.01 in the denominator; empty masks count 0, no mask is a division by zero."""
  a, none = np.ones((4, 4), bool), np.zeros((4, 4), bool)
  assert segmentation.dice(a, a, smooth=.01) == pytest.approx(32 / 32.01, abs=1e-12)
  assert segmentation.iou(a, a, smooth=.01) == pytest.approx(16 / 16.01, abs=1e-12)
  assert segmentation.dice(none, none, smooth=.01) == segmentation.dice(a, none, smooth=.01) == 0


def test_a_volume_is_not_the_mean_of_its_slices():
  """The released 3D score pools all slices; a small slice must not count as much as a large one."""
  truth, pred = np.zeros((2, 10, 10), bool), np.zeros((2, 10, 10), bool)
  truth[0, :9], pred[0, :9] = True, True
  truth[1, 0, 0] = True
  assert segmentation.iou(pred, truth) == pytest.approx(90 / 91)
  assert segmentation.iou(pred, truth, axis=(1, 2)) == pytest.approx([1., 0.])


# ---- surfaces

def blobs(shape, seed):
  noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
  return noise > np.quantile(noise, .7)


def masks():
  for shape in ((14, 16, 12), (20, 24)):
    full, none, one = np.ones(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
    one[tuple(n // 2 for n in shape)] = True
    corner = np.zeros(shape, bool)
    corner[tuple(slice(0, 3) for _ in shape)] = True
    noise = [np.random.default_rng(s).random(shape) > .5 for s in (1, 2)]      # every code occurs
    yield from ((blobs(shape, 0), blobs(shape, 1)), (full, one), (one, corner), (noise[0], noise[1]), (full, full),
                (corner, blobs(shape, 3)), (none, none), (one, none), (none, full))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')      # of the library's own
@pytest.mark.parametrize('spacing', [(1., 1., 1.), (3., .7, 1.9)])
def test_distances_equal_those_of_the_library(spacing, monkeypatch):
  library = pytest.importorskip('surface_distance')
  monkeypatch.setattr(np, 'Inf', np.inf, raising=False)      # it was written for numpy 1
  for pred, truth in masks():
    mm = spacing[:pred.ndim]
    found = library.compute_surface_distances(truth, pred, mm)
    if not pred.any() or not truth.any():
      want = 0. if not pred.any() and not truth.any() else np.inf
      assert segmentation.hd95(pred, truth, mm) == want
      assert segmentation.nsd(pred, truth, mm, 1.) == float(want == 0)
      continue
    assert segmentation.hd95(pred, truth, mm) == pytest.approx(library.compute_robust_hausdorff(found, 95), abs=1e-3)
    for tolerance in (0., .9, 2.5):
      assert segmentation.nsd(pred, truth, mm, tolerance) == pytest.approx(
          library.compute_surface_dice_at_tolerance(found, tolerance), abs=1e-6)


def test_areas_of_simple_bodies():
  """A plane, and a half space at 45 degrees: area per voxel of the cut, whatever the spacing."""
  mm = (2., 3., 5.)
  table = surface.areas(mm)
  assert table[0] == table[255] == 0
  plane = sum(1 << k for k in range(8) if k & 1 == 0)           # all corners with i0 = 0
  assert table[plane] == pytest.approx(3 * 5)
  edge = 1 << 0 | 1 << 4                                        # two corners along the last axis
  assert table[edge] == pytest.approx(5 * np.hypot(1., 1.5))
  assert table[1] == pytest.approx(.5 * np.linalg.norm(np.cross([1., -1.5, 0], [1., 0, -2.5])))
  np.testing.assert_allclose(table, table[255 - np.arange(256)], rtol=1e-12)


def test_a_shifted_box_is_as_far_as_it_was_shifted():
  a = np.zeros((20, 20, 20), bool)
  a[4:14, 4:14, 4:14] = True
  assert segmentation.hd95(np.roll(a, 3, 0), a, (2., 1., 1.)) == pytest.approx(6.)
  assert segmentation.nsd(np.roll(a, 3, 0), a, (2., 1., 1.), 6.) == 1


def test_a_share_that_is_reached_but_for_the_last_digit_is_reached():
  area = np.r_[np.full(19, 1 / 3), 1 / 3]
  assert surface.percentile(np.arange(20.), area, .95) == 18.


def test_a_small_volume_is_filled_up_with_its_least_value():
  seen = []
  x = np.full((4, 4, 1), 7., np.float32)
  segmentation.sliding_window(lambda a: seen.append(a.copy()) or a, x - 8 * np.eye(4)[..., None], (8, 8), .5)
  assert seen[0].min() == -1 and (seen[0][0, :2] == -1).all()
