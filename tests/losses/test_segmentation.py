"""Dice and cross-entropy of label maps: torch and closed forms."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax.losses import segmentation

RNG = np.random.default_rng(0)
MASK = RNG.integers(0, 4, (2, 4, 6, 6))
LOGITS = RNG.normal(size=(2, 4, 6, 6, 4)).astype(np.float32)


def test_cross_entropy_equals_torch():
  torch = pytest.importorskip('torch')
  target = segmentation.targets(MASK, 3, True)
  want = torch.nn.functional.cross_entropy(torch.tensor(LOGITS).movedim(-1, 1), torch.tensor(MASK))
  assert float(segmentation.cross_entropy(LOGITS, target, True)) == pytest.approx(float(want), rel=1e-6)
  both = RNG.integers(0, 2, LOGITS.shape).astype(np.uint8)
  want = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(LOGITS), torch.tensor(both).float())
  assert float(segmentation.cross_entropy(LOGITS, segmentation.targets(both, 4, False), False)) == pytest.approx(
      float(want), rel=1e-6)


def test_dice_is_that_of_the_whole_batch_without_background():
  p = np.exp(LOGITS - LOGITS.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  each = []
  for c in (1, 2, 3):
    t = c == MASK
    each.append((2 * p[..., c][t].sum() + 1e-5) / (p[..., c].sum() + t.sum() + 1e-5))
  found = segmentation.soft_dice(LOGITS, segmentation.targets(MASK, 3, True), True)
  assert float(found) == pytest.approx(1 - np.mean(each), rel=1e-5)


def test_a_perfect_prediction_and_an_absent_class():
  target = segmentation.targets(np.minimum(MASK, 2), 3, True)      # class 3 is nowhere
  assert float(segmentation.soft_dice(100 * target, target, True)) == pytest.approx(0, abs=1e-5)
  assert float(segmentation.cross_entropy(100 * target, target, True)) == pytest.approx(0, abs=1e-6)


def test_the_released_dice_has_no_gradient_and_the_soft_one_has():
  """JSRT: thresholded predictions, so that what is learned from is the cross-entropy alone."""
  target = segmentation.targets(RNG.integers(0, 2, LOGITS.shape).astype(np.uint8), 4, False)
  ce = lambda z: segmentation.cross_entropy(z, target, False)
  both = lambda z, hard: ce(z) + segmentation.soft_dice(z, target, False, hard)
  want = jax.grad(ce)(jnp.asarray(LOGITS))
  np.testing.assert_array_equal(jax.grad(both)(jnp.asarray(LOGITS), True), want)
  assert np.abs(jax.grad(both)(jnp.asarray(LOGITS), False) - want).max() > 1e-4
  hard = 1 - np.mean([2 * ((LOGITS[..., c] > 0) & (target[..., c] > 0)).sum()
                      / ((LOGITS[..., c] > 0).sum() + target[..., c].sum()) for c in range(4)])
  assert float(segmentation.soft_dice(LOGITS, target, False, True)) == pytest.approx(hard, abs=1e-5)


def test_weights_of_five_outputs_are_those_of_the_protocol():
  np.testing.assert_allclose(segmentation.weights(5), np.array([8, 4, 2, 1, 0]) / 15, rtol=1e-12)
  assert segmentation.weights(1) == [1.]


def test_targets_of_coarse_outputs_are_the_nearest_voxels():
  """Nearest neighbour as scipy has it: the voxel at floor((i + 1/2) stride)."""
  x = RNG.integers(0, 9, (1, 4, 8, 8))
  got = segmentation.at_stride(x, (1, 2, 4))
  at = lambda n, s: np.floor((np.arange(n // s) + .5) * s).astype(int)
  np.testing.assert_array_equal(got, x[:, at(4, 1)][:, :, at(8, 2)][:, :, :, at(8, 4)])
