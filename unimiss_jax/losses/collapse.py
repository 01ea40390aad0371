"""Scalars that show a collapse long before a downstream score does. Arrays in, scalars out."""
import jax.numpy as jnp
from jax.nn import log_softmax, softmax


def wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def feature_std(features):
  """[N, E] -> mean over dimensions of the std over samples of unit-length features, times sqrt(E): 1 = isotropic."""
  x = wide(features)
  x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return x.std(0).mean() * jnp.sqrt(x.shape[-1])


def rankme(features, eps=1e-7):
  """[N, E] -> effective rank exp(entropy of the normalised singular values), 1 ... min(N, E) (Garrido et al. 2023)."""
  x = wide(features)
  gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
  s = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram), 0.))
  p = s / jnp.maximum(s.sum(), 1e-12) + eps
  return jnp.exp(-(p * jnp.log(p)).sum())


def teacher(logits, center, temperature) -> dict:
  """Teacher logits [..., K], centre [1, K] -> mean entropy of its softmax (ln K = uniform, 0 = one prototype),
  entropy of the batch mean (0 = all samples on one prototype), norm of the centre, and of the prototypes that could be
  the first choice of a row, as many as rows, the share that is."""
  z = (wide(logits) - center) / temperature
  p = softmax(z, -1)
  q = p.reshape(-1, p.shape[-1]).mean(0)
  first = jnp.zeros(p.shape[-1], bool).at[jnp.argmax(z, -1).ravel()].set(True).sum()
  return {'collapse/teacher_entropy': -(p * log_softmax(z, -1)).sum(-1).mean(),
          'collapse/batch_entropy': -(q * jnp.log(q + 1e-12)).sum(),
          'collapse/prototypes_used': first / min(z.size // z.shape[-1], z.shape[-1]),
          'collapse/center_norm': jnp.linalg.norm(wide(center))}
