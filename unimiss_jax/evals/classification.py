"""Scores of classifiers: ranks, thresholds, calibration; defined as in scikit-learn, which tests compare with.

A class without a positive or without a negative case has no AUROC and no average precision: NaN, left out of means.
"""
import numpy as np

from unimiss_jax.evals.knn import auroc

BINS = 15      # of the calibration error (Guo et al. 2017)


def average_precision(scores, labels) -> float:
  """Sum of precision times gain in recall over the distinct thresholds, highest first; NaN without a positive.

  Args:
    scores, labels: [N], labels 0 or 1.
  """
  order = np.argsort(-np.asarray(scores, float), kind='stable')
  s, y = np.asarray(scores, float)[order], np.asarray(labels, float)[order]
  if not y.sum():
    return float('nan')
  last = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)      # of each run of equal scores
  hits = np.cumsum(y)[last]
  return float((np.diff(hits, prepend=0) / y.sum() * hits / (last + 1)).sum())


def calibration_error(confidence, correct, bins: int = BINS) -> float:
  """Expected calibration error over bins of equal width: mean of |share correct - mean confidence|, by cases.

  Args:
    confidence: [N] in [0, 1]. correct: [N] 0 or 1, what the confidence is about.
  """
  which = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
  gap = np.bincount(which, np.asarray(correct, float) - np.asarray(confidence, float), bins)
  return float(np.abs(gap).sum() / max(len(which), 1))


def scores(probability, truth, exclusive: bool, classes=(), threshold: float = .5) -> dict[str, float]:
  """All scores: means over classes, and 'auroc/<class>', 'ap/<class>'.

  Args:
    probability: [N, C].
    truth: [N, C] of 1, 0 and NaN (not known: the case does not count for that class).
    exclusive: one class a case, predicted by argmax; of two classes the second is the positive one, so that auroc, ap,
      sensitivity and specificity speak of it alone. Else each class by itself, predicted from `threshold` on.
    classes: names; () = 0, 1, ...

  Returns:
    auroc, ap, accuracy, balanced_accuracy, sensitivity, specificity, ece, classes_scored (that have an AUROC).
  """
  p, t = np.asarray(probability, float), np.asarray(truth, float)
  names = [str(c) for c in classes] or [str(c) for c in range(p.shape[1])]
  if exclusive:
    known = np.isfinite(t).all(1)
    p, t = p[known], t[known]
    hit = p.argmax(1) == t.argmax(1)
    guess = p.argmax(1)[:, None] == np.arange(p.shape[1])
    accuracy, ece = hit.mean() if len(hit) else np.nan, calibration_error(p.max(1), hit)
    if p.shape[1] == 2:
      p, t, guess, names = p[:, 1:], t[:, 1:], guess[:, 1:], names[1:]
  else:
    guess = p >= threshold
  columns = [(p[k, c], t[k, c], guess[k, c]) for c, k in enumerate(np.isfinite(t).T)]
  ranks, precision = ({n: f(q, y) for n, (q, y, _) in zip(names, columns)} for f in (auroc, average_precision))
  sensitivity = [_share(g[y == 1]) for _, y, g in columns]
  specificity = [_share(~g[y == 0]) for _, y, g in columns]
  if not exclusive:
    accuracy = _mean([_share(g == (y == 1)) for _, y, g in columns])
    ece = _mean([calibration_error(q, y) for q, y, _ in columns])
  balanced = _mean(sensitivity) if exclusive and len(columns) > 1 else _mean(np.add(sensitivity, specificity) / 2)
  out = {'auroc': _mean(ranks.values()), 'ap': _mean(precision.values()), 'accuracy': float(accuracy),
         'balanced_accuracy': balanced, 'sensitivity': _mean(sensitivity), 'specificity': _mean(specificity),
         'ece': float(ece), 'classes_scored': int(np.isfinite(list(ranks.values())).sum())}
  if len(names) > 1:
    out |= {f'auroc/{n}': v for n, v in ranks.items()} | {f'ap/{n}': v for n, v in precision.items()}
  return out


def _share(hits) -> float:
  return float(np.mean(hits)) if len(hits) else float('nan')


def _mean(values) -> float:
  values = np.array([v for v in values if np.isfinite(v)], float)
  return float(values.mean()) if len(values) else float('nan')
