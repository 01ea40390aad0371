"""Retrieval among pictures, volumes and reports, counted by hand."""
import numpy as np
import pytest

from unimiss_jax.evals import retrieval


def test_hit_at_1_counts_classes_and_ignores_lengths():
  gallery = np.array([[1., 0], [0, 2], [-3, 0]])
  query = np.array([[5., 1], [1, 9], [-1, 0], [-1, .1]])
  assert retrieval.hit_at_1(query, gallery, [0, 1, 2, 0], [0, 1, 2]) == pytest.approx(.75)


def test_scores_of_studies():
  text = np.eye(3)
  images = {'xray': np.eye(3)[[0, 1, 2, 0]], 'ct': np.eye(3)[[0, 1, 1, 2]]}
  known = {'labels': {'xray': np.array([0, 1, 2, 1]), 'ct': np.array([0, 1, 2, 2])},
           'planes': np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), 'attributes': np.array([[1, 0], [0, 1], [0, 1]])}
  planes = np.array([[0, 1], [3, 5], [0, 1], [6, 2]])
  assert retrieval.studies(images, text, planes, known) == {
      'eval/xray_to_text_r1': .75, 'eval/ct_to_text_r1': .75, 'eval/xray_to_ct_r1': .75, 'eval/slice_recall': .5,
      'eval/xray_zero_shot_auc': pytest.approx(5 / 6), 'eval/ct_zero_shot_auc': 1.}


def test_precision_counts_the_classes_of_the_nearest():
  gallery = np.array([[1., 0], [.9, .1], [0, 1], [.1, .9]])
  query, classes = np.array([[1., .01], [0., 1]]), [0, 1, 1, 1]
  assert [retrieval.precision_at(query, gallery, [0, 1], classes, k) for k in (1, 2, 4)] == [1., .75, .5]
