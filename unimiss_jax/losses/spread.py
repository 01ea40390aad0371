"""Terms that keep embeddings apart without prototypes: KoLeo, and the coding rate in the place of DINO's head."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def unit(x, eps: float = 1e-8):
  """[..., E] -> of length 1; float32 or wider."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + eps)


def koleo(x, eps: float = 1e-8):
  """-mean log of the distance to the nearest other of [N, E] unit vectors (Sablayrolles et al. 2019, as in DINOv2).

  Which is nearest is not differentiated. All rows of the global batch are candidates, however it is sharded.
  """
  x = unit(x)
  near = jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -2., jax.lax.stop_gradient(x @ x.T)), -1)
  return -jnp.log(jnp.linalg.norm(x - x[near] + eps, axis=-1) + eps).mean()


def coding_rate(x, eps: float = .5):
  """Rate of [N, E] unit vectors at the distortion eps, log det(I + E / (N eps^2) X^T X) / 2 (Ma et al. 2007); nats."""
  x = unit(x)
  n, d = x.shape
  gram = x @ x.T if n < d else x.T @ x      # either has the same determinant
  return .5 * jnp.linalg.slogdet(jnp.eye(len(gram), dtype=x.dtype) + d / (n * eps**2) * gram)[1]


def simdino(student, teacher, weight: float, eps: float = .5):
  """SimDINO (Wu et al. 2025): distance of view i to the teacher's view j != i, less the coding rate of the student.

  Args:
    student, teacher: embeddings [2, B, E]; no gradient reaches the teacher.
    weight: of the rate, which is divided by its largest value, that of rows spread evenly over r = min(2 B, E)
      directions, r ln(1 + E / (r eps^2)) / 2 (chosen by us: the weight then does not depend on sizes).

  Returns:
    Mean of |s - t|^2 / 2 (0 ... 2) - weight * share of the largest rate.
  """
  s, t = unit(student), jax.lax.stop_gradient(unit(teacher))
  apart = .5 * ((s - t[::-1])**2).sum(-1).mean()
  rows = s.reshape(-1, s.shape[-1])
  n, d = rows.shape
  r = min(n, d)
  return apart - weight * coding_rate(rows, eps) / (.5 * r * jnp.log1p(d / (r * eps**2)))
