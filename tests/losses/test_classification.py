"""Cross-entropy with unknown labels against torch."""
import numpy as np
import pytest

from unimiss_jax.losses import classification

torch = pytest.importorskip('torch')
RNG = np.random.default_rng(0)


def test_exclusive_equals_torch_and_leaves_unknown_rows_out():
  z, y = RNG.normal(size=(12, 4)).astype(np.float32), RNG.integers(0, 4, 12)
  label = np.eye(4, dtype=np.float32)[y]
  want = torch.nn.functional.cross_entropy(torch.tensor(z), torch.tensor(y))
  assert float(classification.cross_entropy(z, label, True)) == pytest.approx(float(want), rel=1e-6)
  label[:5] = -1
  want = torch.nn.functional.cross_entropy(torch.tensor(z[5:]), torch.tensor(y[5:]))
  assert float(classification.cross_entropy(z, label, True)) == pytest.approx(float(want), rel=1e-6)
  assert float(classification.accuracy(z, label, True)) == pytest.approx((z[5:].argmax(1) == y[5:]).mean())


def test_several_labels_equal_torch_and_leave_unknown_ones_out():
  z, label = RNG.normal(size=(12, 3)).astype(np.float32) * 3, RNG.integers(-1, 2, (12, 3)).astype(np.float32)
  known = label >= 0
  want = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(z[known]), torch.tensor(label[known]))
  assert float(classification.cross_entropy(z, label, False)) == pytest.approx(float(want), rel=1e-6)
  assert float(classification.accuracy(z, label, False)) == pytest.approx(((z > 0) == (label == 1))[known].mean())


@pytest.mark.parametrize('exclusive', [True, False])
def test_nothing_known_is_no_loss_and_no_nan(exclusive):
  z = RNG.normal(size=(4, 3)).astype(np.float32)
  assert float(classification.cross_entropy(z, -np.ones((4, 3), np.float32), exclusive)) == 0


def test_large_logits_stay_finite():
  z = np.array([[300., -300.]], np.float32)
  assert float(classification.cross_entropy(z, np.array([[0., 1.]], np.float32), False)) == pytest.approx(300, rel=1e-6)
