"""Self-distillation of DINO (Caron et al., ICCV 2021). `dino_loss` is that of UniMiSS and UniMiSS+, two cross-view
terms; the pieces below it serve one view with hidden tokens (iBOT, Zhou et al. 2022; UniMedI, He et al. 2024)."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def dino_loss(student, teacher, center, *, student_temp, teacher_temp, center_momentum):
  """Cross-entropy between the teacher's view i and the student's view j != i, mean over terms and samples.

  No gradient reaches the teacher. The loss uses the centre as it is given.

  Args:
    student, teacher: logits [2, B, K], or [2B, K] with view 0 first.
    center: [1, K], subtracted from the teacher's logits.
    student_temp, teacher_temp: temperatures.
    center_momentum: weight of the old centre.

  Returns:
    (loss, new centre [1, K]); the mean of both is over the global batch.
  """
  student, teacher = (_wide(x).reshape(2, -1, x.shape[-1]) for x in (student, jax.lax.stop_gradient(teacher)))
  loss = cross_entropy(student[::-1], teacher, center, student_temp, teacher_temp).mean()
  return loss, center_momentum * center + (1 - center_momentum) * teacher.mean((0, 1))[None]


def mean_probability(logits, temperature, axis: int):
  """Logits whose softmax at this temperature is the mean of those along `axis`; float32 or wider."""
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  log_p = jax.nn.log_softmax(logits / temperature)
  return temperature * (jax.nn.logsumexp(log_p, axis) - jnp.log(logits.shape[axis]))


def cross_entropy(student, teacher, center, student_temp, teacher_temp):
  """Logits [..., K] of both, centre [..., K] -> [...]; no gradient reaches the teacher."""
  target = jax.lax.stop_gradient(jax.nn.softmax(_from_top(_wide(teacher) - center) / teacher_temp))
  return -(target * jax.nn.log_softmax(_from_top(_wide(student)) / student_temp)).sum(-1)


def mean_of_hidden(values, hidden):
  """[B, P] of all tokens -> [B], the mean over those that are hidden; 0 where none is.

  So that a sequence with one hidden token weighs as much as one with many.
  """
  return jnp.where(hidden, values, 0).sum(-1) / jnp.maximum(hidden.sum(-1), 1)


def mean_of_rows(values, valid=None):
  """[B] -> mean over the rows that are valid; 0 where none is."""
  return values.mean() if valid is None else mean_of_hidden(values, valid)


def moved_center(center, teachers, momentum, valids=None):
  """The centre after a step: momentum * old + (1 - momentum) * mean over all teacher logits together.

  Args:
    center: [..., K], leading axes 1.
    teachers: logits [B, ..., K] of each sub-batch.
    momentum: weight of the old centre; 1 where not one row is valid.
    valids: of each sub-batch [B] bool, or None.
  """
  total, count = 0., 0.
  for x, valid in zip(teachers, valids or [None] * len(teachers)):
    x = jax.lax.stop_gradient(_wide(x))
    each = jnp.ones(len(x), x.dtype) if valid is None else valid.astype(x.dtype)
    total += (x * each.reshape(-1, *[1] * (x.ndim - 1))).reshape(-1, x.shape[-1]).sum(0)
    count += each.sum() * (x[0].size // x.shape[-1])
  new = momentum * center + (1 - momentum) * total / jnp.maximum(count, 1)
  return jnp.where(count > 0, new, center)


def _from_top(x):
  """Shifted so that the largest is 0: a small temperature then enlarges no rounding of what counts."""
  return x - jax.lax.stop_gradient(x.max(-1, keepdims=True))


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def center_of_next(before, after):
  """The centre that the next loss of the same step uses: `before`, the one that the step began with."""
  return before


def center_of_step(after: list):
  """The centre that a step leaves behind, of those that its teachers' logits give: their mean."""
  return sum(after) / len(after)


def temperature_schedule(warmup: float, final: float, warmup_epochs: float, steps_per_epoch: int):
  """Teacher temperature: constant within an epoch, from `warmup` (first) to `final` (last of the warm-up epochs).

  Returns:
    step -> temperature; traceable.
  """
  last = max(warmup_epochs - 1, 1)

  def temperature(step):
    epoch = jnp.asarray(step // steps_per_epoch, float)
    return jnp.where(epoch < warmup_epochs, warmup + (final - warmup) * jnp.minimum(epoch / last, 1), final)
  return temperature
