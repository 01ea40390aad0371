"""Zero-shot classification: an image belongs to what is said nearest to it (CLIP, Radford et al. 2021)."""
import numpy as np

from unimiss_jax.evals.classification import scores
from unimiss_jax.evals.knn import auroc, unit


def directions(text, owner, classes: int) -> np.ndarray:
  """Prompts -> a unit vector of each class, the mean over its prompts of unit vectors.

  Args:
    text: [P, D]. owner: [P] class of each prompt; every class has one.
    classes: C.

  Returns:
    [C, D].
  """
  text, owner = unit(text, 0.), np.asarray(owner)
  return unit(np.stack([text[owner == c].mean(0) for c in range(classes)]), 0.)


def zero_shot(images, yes, no, labels, scale: float = 1., classes=()) -> dict[str, float]:
  """Scores of cosines between images and what is said of classes.

  Args:
    images: [N, D].
    yes: [C, D] of `directions`.
    no: likewise what is said where a class is absent: each class is a question of its own. None: classes exclude each
      other, and of each case the nearest one is meant.
    labels: [N, C] of 1, 0 and NaN.
    scale: of the cosines, as trained; ranks do not depend on it.
    classes: names.

  Returns:
    As `classification.scores`.
  """
  images = unit(images, 0.)
  logits = scale * images @ np.asarray(yes).T
  if no is not None:
    p = 1 / (1 + np.exp(np.clip(scale * images @ np.asarray(no).T - logits, -500, 500)))
  else:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
  return scores(p, labels, no is None, classes)


def attributes(images, text, of_class, labels) -> float:
  """Mean AUROC of attributes: what is said of the classes that have one against what is said of the others.

  Args:
    images: [N, D]. text: [K, D], of every class.
    of_class: [K, A] of 0 and 1.
    labels: [N], the classes of the images.
  """
  text, found = unit(text, 0.), []
  for has in np.asarray(of_class, bool).T:
    direction = text[has].mean(0) - text[~has].mean(0)
    found.append(auroc(unit(images, 0.) @ direction, has[labels]))
  return float(np.nanmean(found))
