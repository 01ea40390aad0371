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
  """Teacher logits [..., K], centre [1, K] -> `choices` of its softmax, and the norm of the centre."""
  entropy, batch_entropy, used = choices(wide(logits) - center, temperature)
  return {'collapse/teacher_entropy': entropy, 'collapse/batch_entropy': batch_entropy,
          'collapse/prototypes_used': used, 'collapse/center_norm': jnp.linalg.norm(wide(center))}


def choices(logits, temperature) -> tuple:
  """Logits [..., K] -> mean entropy of their softmax (ln K = uniform, 0 = one prototype), entropy of its mean over all
  rows (0 = all rows on one prototype), and of the prototypes that could be the first choice of a row, as many as rows,
  the share that is."""
  z = wide(logits) / temperature
  p = softmax(z, -1)
  q = p.reshape(-1, p.shape[-1]).mean(0)
  first = jnp.zeros(p.shape[-1], bool).at[jnp.argmax(z, -1).ravel()].set(True).sum()
  return (-(p * log_softmax(z, -1)).sum(-1).mean(), -(q * jnp.log(q + 1e-12)).sum(),
          first / min(z.size // z.shape[-1], z.shape[-1]))
