"""Self-distillation loss of DINO (Caron et al., ICCV 2021), as UniMiSS and UniMiSS+ use it: two cross-view terms."""
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
  student, teacher = (x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(2, -1, x.shape[-1])
                      for x in (student, jax.lax.stop_gradient(teacher)))
  target = jax.nn.softmax((teacher - center) / teacher_temp)
  log_p = jax.nn.log_softmax(student / student_temp)
  loss = -(target * log_p[::-1]).sum(-1).mean()
  return loss, center_momentum * center + (1 - center_momentum) * teacher.mean((0, 1))[None]


def mean_probability(logits, temperature, axis: int):
  """Logits whose softmax at this temperature is the mean of those along `axis`; float32 or wider."""
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  log_p = jax.nn.log_softmax(logits / temperature)
  return temperature * (jax.nn.logsumexp(log_p, axis) - jnp.log(logits.shape[axis]))


def center_of_next(before, after):
  """The centre that the next loss of the same step uses: `before`, the one that the step began with."""
  return before


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
