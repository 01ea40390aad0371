"""A classifier or a segmenter on the cases of a split: scores, and a table with a row a case.

Cases (data_pipelines.cases.Cases) hand out records, views and working images; `logits` maps [N, *S, C] to [N, K] or
[N, *S, K]. Segmentations are compared on the grid that the labels came on.
"""
from typing import NamedTuple

import numpy as np
from scipy.special import expit, softmax

from unimiss_jax.evals import classification, segmentation
from unimiss_jax.views import matrices

ROWS = 32        # views that are gathered before the network is asked
BATCH = 8        # windows, likewise


class Outcome(NamedTuple):
  """scores: {name: value}; table: {column: [N, ...]} with `id`, `group` and, of a classification, `probability` [N, C]
  and `truth` [N, C] (NaN = not known), of a segmentation `dice`, `iou`, `hd95`, `nsd` [N, C]."""
  scores: dict
  table: dict


def probabilities(logits, exclusive: bool):
  return softmax(logits, -1) if exclusive else expit(logits)


def classify(logits, cases, exclusive: bool) -> Outcome:
  """The mean probability over the views of each case."""
  found, truth, waiting, views = [], [], [], 0

  def flush():
    nonlocal waiting, views
    p = probabilities(logits(np.concatenate(waiting)), exclusive)
    found.extend(part.mean(0) for part in np.split(p, np.cumsum([len(w) for w in waiting])[:-1]))
    waiting, views = [], 0

  for i in range(len(cases)):
    record = cases.record(i)
    truth.append(np.where(record['label'] < 0, np.nan, record['label']))
    waiting.append(cases.views(record))
    views += len(waiting[-1])
    if views >= ROWS or i + 1 == len(cases):
      flush()
  probability, truth = np.array(found), np.array(truth)
  return Outcome(classification.scores(probability, truth, exclusive, cases.classes), _rows(cases) | {
      'probability': probability, 'truth': truth, 'exclusive': np.array(exclusive)})


def segment(logits, cases, task, *, distances: bool = False, keep=lambda i, record, labels: None) -> Outcome:
  """Sliding windows over every case.

  Args:
    task: config.task; reads exclusive, overlap, mirror, tolerance_mm.
    distances: all measures; else Dice alone, as distances take longer than all the rest.
    keep: called with (number, record, predicted label map).
  """
  found = []
  for i in range(len(cases)):
    record = cases.record(i)
    predicted = label_map(window(logits, cases, record, task), truth(record).shape, task.exclusive)
    keep(i, record, predicted)
    masks = [one_by_one(x, len(cases.classes), task.exclusive) for x in (predicted, truth(record))]
    spacing = record.get('truth_mm', (1.,) * masks[0][0].ndim)
    found.append([segmentation.measures(p, t, spacing, task.tolerance_mm) if distances else
                  {'dice': segmentation.dice(p, t)} for p, t in zip(*masks)])
  table = _rows(cases) | {name: np.array([[c[name] for c in row] for row in found]) for name in found[0][0]}
  return Outcome(summary(table, cases.classes, 'mm' if cases.stream == 'ct' else 'px'), table)


def window(logits, cases, record, task) -> np.ndarray:
  """Probabilities [*S, K] of a case on its working grid."""
  image = cases.working(record)
  axes = tuple(range(image.ndim - 1))
  predict = lambda x: probabilities(logits(x), task.exclusive)
  return segmentation.sliding_window(predict, image, cases.size, task.overlap, mirror=axes if task.mirror else (),
                                     batch=BATCH if cases.stream == 'ct' else 1)      # a picture is one window


def truth(record) -> np.ndarray:
  """The labels of a record on the grid that they came on."""
  return record.get('truth', record.get('mask'))


def label_map(probability, shape, exclusive: bool) -> np.ndarray:
  """[*S, K] on one grid -> labels as of data_pipelines.labelled on the grid [*shape]; linear, plane by plane."""
  n = len(shape) if exclusive else len(shape) - 1
  size = shape[:n]
  maps = [matrices.resize('linear', 0, a, a, b).astype(probability.dtype) for a, b in zip(probability.shape, size)]
  decide = lambda p: p.argmax(0).astype(np.uint8) if exclusive else np.moveaxis(p > .5, 0, -1).astype(np.uint8)
  plane = lambda x: decide(maps[-2] @ np.moveaxis(x, -1, 0) @ maps[-1].T)
  if n == 2:
    return plane(probability)
  out = np.empty(shape, np.uint8)
  for z, row in enumerate(maps[0]):
    used = np.flatnonzero(row)
    out[z] = plane(np.tensordot(row[used], probability[used], 1))
  return out


def one_by_one(labels, classes: int, exclusive: bool) -> list:
  """Label map -> a boolean mask of each class."""
  return [labels == c + 1 if exclusive else labels[..., c] > 0 for c in range(classes)]


def summary(table, classes, unit: str = 'mm') -> dict[str, float]:
  """Means over cases: 'dice' (of the classes), 'dice/<class>', likewise 'iou', 'nsd' and, where it is finite,
  'hd95_<unit>'."""
  mean = lambda v: float(np.mean(v[np.isfinite(v)])) if np.isfinite(v).any() else float('nan')
  out = {}
  for column, name in (('dice', 'dice'), ('iou', 'iou'), ('hd95', f'hd95_{unit}'), ('nsd', 'nsd')):
    if column in table:
      of = {c: mean(v) for c, v in zip(classes, table[column].T)}
      out |= {name: mean(np.array(list(of.values())))} | {f'{name}/{c}': v for c, v in of.items()}
  return out


def _rows(cases) -> dict:
  ids = np.array([row['id'] for row in cases.source.listing()])
  return {'id': ids, 'group': np.array(cases.groups)}
