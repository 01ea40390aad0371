"""Does a picture find its own volume? Recall@k across modalities."""
import numpy as np

from unimiss_jax.evals.knn import unit


def recall(query, gallery, k: int) -> float:
  """Share of queries whose own row of the gallery is among the k nearest by cosine; chance is k / N.

  Args:
    query, gallery: [N, E], row i belongs to the same patient; each is centred by its own mean.
    A tie with the own row counts against it.
  """
  q = unit(query, np.mean(query, 0))
  g = unit(gallery, np.mean(gallery, 0))
  similarity = q @ g.T
  own = np.diag(similarity)[:, None]
  rank = (~(similarity < own)).sum(1) - 1      # so written, features that are not numbers retrieve nothing
  return float((rank < k).mean())
