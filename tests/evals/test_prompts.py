"""Zero-shot scores, counted by hand."""
import numpy as np
import pytest

from unimiss_jax.evals import prompts


def test_prompts_of_a_class_are_averaged_whatever_their_lengths():
  text = np.array([[2., 0], [0, 9], [0, -3]])
  np.testing.assert_allclose(prompts.directions(text, [0, 0, 1], 2), [[.5**.5, .5**.5], [0, -1]])


def test_of_classes_that_exclude_each_other_the_nearest_is_meant():
  images, labels = np.array([[3., 1], [1, 2], [2, 1], [0, 1]]), np.eye(2)[[0, 1, 1, 1]]
  found = prompts.zero_shot(images, np.eye(2), None, labels, 10.)
  assert found['accuracy'] == .75 and found['auroc'] == 1.      # the third is nearer to 0, and less so than the first
  found = prompts.zero_shot(images[:, ::-1], np.eye(2), None, labels, 10.)
  assert found['accuracy'] == .25 and found['auroc'] == 0.


def test_classes_that_may_come_together_are_questions_of_their_own():
  yes, no = np.array([[1., 0], [0, 1]]), np.array([[-1., 0], [0, -1]])
  labels = np.array([[1, 1], [1, 0], [0, np.nan]])
  found = prompts.zero_shot(np.array([[1., 1], [1, -1], [-1, 1]]), yes, no, labels, 5., ('a', 'b'))
  assert found['auroc/a'] == found['auroc/b'] == found['accuracy'] == 1.


def test_attributes_are_the_difference_of_what_is_said():
  text = np.array([[1., 1, 0], [1, -1, 0], [1, 0, 1]])      # all reports share the first axis
  of_class = np.array([[1, 0], [0, 0], [0, 1]])
  images = np.array([[0., 3, 0], [0, -1, 0], [0, 0, 2], [5, 1, 0]])
  assert prompts.attributes(images, text, of_class, np.array([0, 1, 2, 0])) == pytest.approx(1.)
