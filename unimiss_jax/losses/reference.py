"""What released code does and we would not: UniMiSS and UniMiSS+ with the centre of their self-distillation, Joint with
the error of hidden slices."""
import jax


def center_of_next(before, after):
  """The centre that the next loss of the same step uses: `after`, as the last loss has left it.

  So the losses of a step use different centres, and its three updates with the same teacher logits leave only
  momentum^3 of the old one.
  """
  return after


def center_of_step(after: list):
  """The centre that a step leaves behind: as its last loss has left it."""
  return after[-1]


def masked_slices(pred, target, mask):
  """As `reconstruction.masked_slices`, but over all slices, hidden or not, and divided by int(0.1 * N).

  Hidden are ceil(0.1 * N): of 64 slices 7, and the divisor is 6.
  """
  return ((pred - jax.lax.stop_gradient(target))**2).mean((1, 2, 3)).sum() / int(0.1 * mask.shape[1])
