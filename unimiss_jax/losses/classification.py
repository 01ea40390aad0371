"""Cross-entropy of labels that may be unknown. Arrays in, scalar out."""
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, log_softmax

from unimiss_jax.losses.collapse import wide


def cross_entropy(logits, label, exclusive: bool):
  """Mean over what is known of -log p(label).

  Args:
    logits: [B, C].
    label: [B, C] of 1, 0 and -1 (not known).
    exclusive: one class a sample (softmax; a row is known when it has a 1), or each class for itself (sigmoid).
  """
  z, label = wide(logits), wide(label)
  if exclusive:
    known = (label == 1).any(-1)
    loss = -(jnp.maximum(label, 0) * log_softmax(z, -1)).sum(-1)
  else:
    known = label >= 0
    loss = -jnp.where(label == 1, log_sigmoid(z), log_sigmoid(-z))
  return jnp.where(known, loss, 0.).sum() / jnp.maximum(known.sum(), 1)


def accuracy(logits, label, exclusive: bool):
  """Share of the known labels that are hit; threshold 1/2 where classes are not exclusive."""
  if exclusive:
    known, hit = (label == 1).any(-1), logits.argmax(-1) == label.argmax(-1)
  else:
    known, hit = label >= 0, (logits > 0) == (label == 1)
  return jax.lax.stop_gradient((known & hit).sum() / jnp.maximum(known.sum(), 1))
