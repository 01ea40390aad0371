"""Weighted nearest neighbours on frozen features, the pulse of a pre-training run.

Features are centred by the mean of the fitting part and scaled to unit length; the score of a test
sample is the share of positives among its k nearest by cosine, weighted by exp(cosine / temperature)
(after Wu et al. 2018, k and temperature chosen by us for small sets).
"""
import numpy as np
from scipy.stats import rankdata


def auroc(scores, labels) -> float:
  """Area under the ROC curve by ranks, ties count half; NaN where only one class is present. [N], [N] 0/1."""
  labels = np.asarray(labels, bool)
  pos, neg = int(labels.sum()), int((~labels).sum())
  if not pos or not neg:
    return float('nan')
  return float((rankdata(scores)[labels].sum() - pos * (pos + 1) / 2) / (pos * neg))


def unit(x, mean):
  x = np.asarray(x, np.float64) - mean
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def scores(fit, fit_labels, test, k: int = 20, temperature: float = 0.1):
  """fit [N, E], fit_labels [N, F] 0/1, test [M, E] -> share of positives [M, F] in [0, 1]."""
  mean = np.asarray(fit, np.float64).mean(0)
  similarity = unit(test, mean) @ unit(fit, mean).T                        # [M, N]
  near = np.argpartition(-similarity, min(k, len(fit)) - 1, axis=1)[:, :k]
  weight = np.exp(np.take_along_axis(similarity, near, 1) / temperature)   # [M, k]
  weight /= weight.sum(1, keepdims=True)
  return (weight[..., None] * np.asarray(fit_labels, np.float64)[near]).sum(1)


def knn_auc(features, labels, fit_mask, k: int = 20) -> dict[str, float]:
  """AUROC of every label on the part that is not `fit_mask`.

  Args:
    features: [N, ...], flattened per sample. labels: {name: [N] 0/1, NaN = not known}. fit_mask: [N] bool.
  """
  x = np.asarray(features).reshape(len(features), -1)
  out = {}
  for name, y in labels.items():
    y = np.asarray(y, float)
    fit, test = fit_mask & np.isfinite(y), ~fit_mask & np.isfinite(y)
    out[name] = auroc(scores(x[fit], y[fit, None], x[test], k)[:, 0], y[test]) if fit.any() and test.any() else np.nan
  return out
