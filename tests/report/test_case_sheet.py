"""Pictures of the best and the worst case: which cases, which slice, which side, whose colours."""
import numpy as np

from unimiss_jax.report import case_sheet


def test_the_worst_the_median_and_the_best():
  assert case_sheet.ranks(np.array([.5, .1, .9, .7, np.nan])) == [('worst', 1), ('median', 3), ('best', 2)]
  assert case_sheet.ranks(np.array([np.nan])) == []


def test_the_coronal_slice_with_most_of_the_truth_right_on_the_left_and_head_up():
  image, mask = np.zeros((20, 12, 16), np.uint8), np.zeros((20, 12, 16), np.uint8)
  mask[15:, 7, 10:] = 1                                # superior, right: R runs to the end of the last axis
  image[:, 7] = 200
  shown, flat = case_sheet.plane(image, mask)
  assert shown.shape == (20, 16) and (shown == 200).all()
  assert flat[:5, :6].all() and flat.sum() == mask.sum()


def test_outlines_have_the_colours_of_the_legend_and_proportions_those_of_the_voxels():
  mask = np.zeros((10, 20), np.uint8)
  mask[2:8, 4:9], mask[2:8, 12:18] = 1, 2
  made = case_sheet.overlay(np.zeros((10, 20), np.uint8), mask, 2, True, aspect=2.)
  assert made.size == (224, 224)
  colours = {tuple(c) for c in np.asarray(made).reshape(-1, 3)}
  assert colours == {(0, 0, 0), *case_sheet.COLOURS[:2]}
  sheet = case_sheet.segmentation([('case', np.zeros((10, 20), np.uint8), mask, mask, None)], ('a', 'b'), True)
  assert sheet.width == 3 * 228 + 4
