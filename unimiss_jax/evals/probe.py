"""Linear probes on frozen features: ridge regression in closed form, or logistic regression by L-BFGS.

Features are standardised by the fitting part. The strength of the penalty is chosen inside the fitting part, by
cross-validated squared error (ridge) or log loss (logistic), for each label by itself; a case whose label is not known
does not count for it. What is tested is never looked at.
"""
import numpy as np
from scipy import linalg
from scipy.optimize import minimize
from scipy.special import expit

STRENGTHS = 10.**np.arange(-3, 5)      # of the penalty, per feature of unit variance
FOLDS = 4


def standardised(fit, test) -> tuple:
  """Zero mean and unit variance of the fitting part; constant features become 0."""
  fit, test = np.asarray(fit, float), np.asarray(test, float)
  mean, std = fit.mean(0), fit.std(0)
  scale = np.where(std > 1e-8 * np.maximum(np.abs(mean), 1e-8), std, np.inf)
  return (fit - mean) / scale, (test - mean) / scale


def ridge(fit, labels, test, strengths=STRENGTHS, folds: int = FOLDS, seed: int = 0) -> np.ndarray:
  """Scores [M, C] of `test`, about -1 for no and 1 for yes: minimises |Xw + b - y|^2 + strength |w|^2.

  Args:
    fit: [N, E] features. labels: [N, C] of 0, 1 and NaN. test: [M, E].
    strengths: of which each label takes the one with the least error over the folds; one alone is taken as it is.
    seed: of the folds.
  """
  x, z = standardised(fit, test)
  labels = np.asarray(labels, float)
  out = np.zeros((len(z), labels.shape[1]))
  patterns = {}      # labels that are known for the same cases share their matrices
  for c, known in enumerate(np.isfinite(labels).T):
    patterns.setdefault(known.tobytes(), []).append(c)
  for key, columns in patterns.items():
    known = np.frombuffer(key, bool)
    if known.any():
      y = 2 * labels[known][:, columns] - 1
      out[:, columns] = _ridge(x[known], y, z, _best(x[known], y, strengths, folds, seed), strengths)
  return out


def _best(x, y, strengths, folds, seed) -> np.ndarray:
  """Index of the strength of each column, by the error over the folds."""
  if len(strengths) == 1 or len(x) < 2 * folds:
    return np.full(y.shape[1], len(strengths) // 2)
  part = np.random.default_rng(seed).permutation(len(x)) % folds
  error = np.zeros((len(strengths), y.shape[1]))
  for f in range(folds):
    held = part == f
    for i, s in enumerate(_path(x[~held], y[~held], x[held], strengths)):
      error[i] += ((s - y[held])**2).sum(0)
  return error.argmin(0)


def _ridge(x, y, z, best, strengths) -> np.ndarray:
  found = _path(x, y, z, strengths)
  return np.stack([found[i][:, c] for c, i in enumerate(best)], 1)


def _path(x, y, z, strengths) -> list:
  """Predictions [M, C] for every strength, from the smaller of the two Gram matrices."""
  mean_x, mean_y = x.mean(0), y.mean(0)
  x, y, z = x - mean_x, y - mean_y, z - mean_x
  left, gram, right = (z @ x.T, x @ x.T, y) if len(x) <= x.shape[1] else (z, x.T @ x, x.T @ y)
  out = []
  for s in strengths:
    lower = linalg.cholesky(gram + s * np.eye(len(gram)), lower=True, check_finite=False)
    out.append(left @ linalg.cho_solve((lower, True), right, check_finite=False) + mean_y)
  return out


def logistic(fit, labels, test, strengths=STRENGTHS, folds: int = FOLDS, seed: int = 0) -> np.ndarray:
  """Probabilities [M, C] of `test`: minimises sum of log losses + strength / 2 |w|^2, the intercept free.

  Args:
    as of `ridge`; the strength with the least log loss over the folds is taken.
  """
  kernel, bias = layer(fit, labels, strengths, folds, seed)
  return expit(np.asarray(test, float) @ kernel + bias)


def layer(fit, labels, strengths=STRENGTHS, folds: int = FOLDS, seed: int = 0) -> tuple:
  """The probe of `logistic` as a linear layer on plain features: kernel [E, C], bias [C]; 0 for a label never known."""
  x, mean_and_unit = standardised(fit, np.stack([np.zeros(np.shape(fit)[1]), np.ones(np.shape(fit)[1])]))
  offset, scale = mean_and_unit[0], mean_and_unit[1] - mean_and_unit[0]      # z = offset + scale * x
  labels = np.asarray(labels, float)
  kernel, bias = np.zeros((x.shape[1], labels.shape[1])), np.zeros(labels.shape[1])
  for c, known in enumerate(np.isfinite(labels).T):
    a, y = x[known], labels[known, c]
    if not len(y):
      continue
    if len(strengths) == 1 or len(y) < 2 * folds:
      chosen = strengths[len(strengths) // 2]
    else:
      part = np.random.default_rng(seed).permutation(len(y)) % folds
      loss = np.zeros(len(strengths))
      for f in range(folds):
        w = None
        for i in np.argsort(strengths)[::-1]:      # the strongest first; the next one starts where it ended
          w = _logistic(a[part != f], y[part != f], strengths[i], w)
          p = np.clip(expit(a[part == f] @ w[:-1] + w[-1]), 1e-12, 1 - 1e-12)
          loss[i] -= (y[part == f] * np.log(p) + (1 - y[part == f]) * np.log(1 - p)).sum()
      chosen = strengths[loss.argmin()]
    w = _logistic(a, y, chosen)
    kernel[:, c], bias[c] = scale * w[:-1], offset @ w[:-1] + w[-1]
  return kernel, bias


def _logistic(x, y, strength: float, start=None) -> np.ndarray:
  """[E + 1] weights, the intercept last."""
  sign = 2 * y - 1

  def loss(w):
    margin = sign * (x @ w[:-1] + w[-1])
    pull = -sign * expit(-margin)
    return (np.logaddexp(0, -margin).sum() + strength / 2 * w[:-1] @ w[:-1],
            np.append(x.T @ pull + strength * w[:-1], pull.sum()))

  start = np.zeros(x.shape[1] + 1) if start is None else start
  return minimize(loss, start, jac=True, method='L-BFGS-B', options={'maxiter': 1000, 'ftol': 1e-12, 'gtol': 1e-6}).x
