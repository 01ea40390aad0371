"""What a trained network has to beat: a predictor that sees nothing, and one that sees raw pixels alone.

Classification: the share of each class in the training cases; ridge regression of down-sampled pixels. Segmentation:
how often each class stands at a place of the image; the same times a normal law of its intensity (naive Bayes). Both
learn from the very cases that the network learned from. Chosen by us.
"""
import numpy as np

from unimiss_jax.evals import classification, probe, supervised
from unimiss_jax.evals.online import pooled
from unimiss_jax.views import matrices

PIXELS = {2: (16, 16), 3: (8, 16, 16)}      # of the raw features
PLACES = {2: (32, 32), 3: (16, 32, 32)}     # of the map of places


def classify(fit, cases, exclusive: bool) -> dict[str, float]:
  """{'chance/<score>', 'raw/<score>'} on `cases`, learned from the cases `fit`."""
  (x, y), (test, truth) = _pixels(fit), _pixels(cases)
  known = np.where(y < 0, np.nan, y)
  share = np.nan_to_num(np.nanmean(known, 0), nan=.5)
  truth = np.where(truth < 0, np.nan, truth)
  score = lambda p: classification.scores(p, truth, exclusive, cases.classes)
  constant = np.broadcast_to(share, (len(test), len(share)))
  z = probe.ridge(x, known, test)
  raw = supervised.probabilities(4 * z, exclusive)      # a regression of -1 and 1 has no scale of its own
  return {f'chance/{k}': v for k, v in score(constant).items()} | {f'raw/{k}': v for k, v in score(raw).items()}


def _pixels(cases) -> tuple:
  rows, labels = [], []
  for i in range(len(cases)):
    record = cases.record(i)
    view = cases.plain(record)[None, ..., 0]
    rows.append(pooled(view, PIXELS[view.ndim - 1])[0])
    labels.append(record['label'])
  return np.array(rows), np.array(labels)


def segment(fit, cases, task) -> dict[str, float]:
  """{'chance/dice', 'raw/dice', and of each class} on `cases`, learned from the cases `fit`."""
  n = len(cases.classes)
  grid = PLACES[len(cases.size)]
  place, moments = 0., 0.
  for i in range(len(fit)):
    record = fit.record(i)
    image, masks = fit.working(record)[..., 0], _columns(record['mask'], n, task.exclusive)
    image = image if image.shape == masks.shape[:-1] else _resized(image, masks.shape[:-1])
    moments += np.stack([masks.sum(tuple(range(image.ndim))), np.tensordot(image, masks, image.ndim),
                         np.tensordot(image**2, masks, image.ndim)], -1)
    place += _resized(masks.astype(np.float32), grid)
  place = np.clip(place / len(fit), 1e-4, None)
  mean = moments[:, 1] / np.maximum(moments[:, 0], 1)
  std = np.sqrt(np.maximum(moments[:, 2] / np.maximum(moments[:, 0], 1) - mean**2, 1e-4))
  mean, std = mean.astype(np.float32), std.astype(np.float32)      # large volumes have many voxels and many classes
  out = {}
  for name, seen in (('chance', False), ('raw', True)):
    dice = []
    for i in range(len(cases)):
      record = cases.record(i)
      image = cases.working(record)[..., 0]
      p = _resized(place, image.shape)
      if seen:
        p = p * np.exp(-.5 * ((image[..., None] - mean) / std)**2) / std
      p = p if task.exclusive else p[..., n:] / (p[..., n:] + np.maximum(p[..., :n], 1e-9))
      labels = supervised.label_map(p, supervised.truth(record).shape, task.exclusive)
      both = [supervised.one_by_one(x, n, task.exclusive) for x in (labels, supervised.truth(record))]
      dice.append([supervised.segmentation.dice(a, b) for a, b in zip(*both)])
    found = supervised.summary({'dice': np.array(dice)}, cases.classes)
    out |= {f'{name}/{k}': v for k, v in found.items()}
  return out


def _columns(mask, classes: int, exclusive: bool):
  """Background and each class [*S, 1 + classes]; of classes for themselves what is not of each, then each
  [*S, 2 * classes]."""
  columns = np.stack(supervised.one_by_one(mask, classes, exclusive), -1)
  return np.concatenate([~columns.any(-1, keepdims=True) if exclusive else ~columns, columns], -1)


def _resized(x, shape):
  for axis, m in enumerate(shape):
    matrix = matrices.resize('area' if m < x.shape[axis] else 'linear', 0, x.shape[axis], x.shape[axis], m)
    x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
  return x
