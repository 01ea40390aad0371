"""Scores against scikit-learn, on random scores with ties and on degenerate labels."""
import numpy as np
import pytest

from unimiss_jax.evals import classification

metrics = pytest.importorskip('sklearn.metrics')
RNG = np.random.default_rng(0)


def cases(n=200, c=3, ties=True):
  p = RNG.random((n, c))
  return np.round(p, 1) if ties else p


@pytest.mark.parametrize('ties', [False, True])
def test_multilabel_equals_scikit_learn(ties):
  p, t = cases(ties=ties), RNG.integers(0, 2, (200, 3)).astype(float)
  found = classification.scores(p, t, exclusive=False, classes='abc')
  want = {'auroc': metrics.roc_auc_score(t, p, average='macro'),
          'ap': metrics.average_precision_score(t, p, average='macro'),
          'accuracy': np.mean([metrics.accuracy_score(t[:, i], p[:, i] >= .5) for i in range(3)]),
          'sensitivity': metrics.recall_score(t, p >= .5, average='macro'),
          'specificity': np.mean([metrics.recall_score(1 - t[:, i], p[:, i] < .5) for i in range(3)]),
          'balanced_accuracy': np.mean([metrics.balanced_accuracy_score(t[:, i], p[:, i] >= .5) for i in range(3)])}
  want |= {f'auroc/{n}': metrics.roc_auc_score(t[:, i], p[:, i]) for i, n in enumerate('abc')}
  want |= {f'ap/{n}': metrics.average_precision_score(t[:, i], p[:, i]) for i, n in enumerate('abc')}
  for name, value in want.items():
    assert found[name] == pytest.approx(value, abs=1e-12), name
  assert found['classes_scored'] == 3


def test_multiclass_equals_scikit_learn():
  p = cases(ties=False)
  p /= p.sum(1, keepdims=True)
  y = RNG.integers(0, 3, 200)
  found = classification.scores(p, np.eye(3)[y], exclusive=True)
  assert found['auroc'] == pytest.approx(metrics.roc_auc_score(y, p, multi_class='ovr', average='macro'), abs=1e-12)
  assert found['ap'] == pytest.approx(metrics.average_precision_score(np.eye(3)[y], p, average='macro'), abs=1e-12)
  assert found['accuracy'] == pytest.approx(metrics.accuracy_score(y, p.argmax(1)), abs=1e-12)
  assert found['balanced_accuracy'] == pytest.approx(metrics.balanced_accuracy_score(y, p.argmax(1)), abs=1e-12)
  assert found['sensitivity'] == pytest.approx(metrics.recall_score(y, p.argmax(1), average='macro'), abs=1e-12)


def test_of_two_classes_the_second_is_the_positive_one():
  q, y = cases(c=1)[:, 0], RNG.integers(0, 2, 200)
  found = classification.scores(np.stack([1 - q, q], 1), np.eye(2)[y], exclusive=True)
  assert found['auroc'] == pytest.approx(metrics.roc_auc_score(y, q), abs=1e-12)
  assert found['ap'] == pytest.approx(metrics.average_precision_score(y, q), abs=1e-12)
  guess = q > .5                                # argmax; a tie is the first class
  assert found['sensitivity'] == pytest.approx(metrics.recall_score(y, guess), abs=1e-12)
  assert found['specificity'] == pytest.approx(metrics.recall_score(1 - y, ~guess), abs=1e-12)


def test_what_is_not_known_does_not_count_and_one_class_has_no_auroc():
  p, t = cases(), RNG.integers(0, 2, (200, 3)).astype(float)
  t[:50, 0] = np.nan
  t[:, 2] = 1
  found = classification.scores(p, t, exclusive=False)
  assert found['auroc/0'] == pytest.approx(metrics.roc_auc_score(t[50:, 0], p[50:, 0]), abs=1e-12)
  assert np.isnan(found['auroc/2']) and found['classes_scored'] == 2
  assert found['auroc'] == pytest.approx((found['auroc/0'] + found['auroc/1']) / 2, abs=1e-12)
  t[:, :2] = 0
  found = classification.scores(p, t, exclusive=False)
  assert np.isnan(found['auroc']) and found['classes_scored'] == 0


def test_calibration_error_in_closed_form():
  confidence = np.repeat([.1, .45, .9], [10, 20, 10])
  correct = np.r_[np.ones(1), np.zeros(9), np.ones(18), np.zeros(2), np.ones(9), np.zeros(1)]
  assert classification.calibration_error(confidence, correct, 10) == pytest.approx(20 * (.9 - .45) / 40, abs=1e-12)
  assert classification.calibration_error(np.ones(4), np.ones(4)) == 0
