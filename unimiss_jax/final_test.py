"""The end of a fine-tuning run: its best weights on the test split, controls, a row a case, pictures.

Writes below the run's folder: eval/test.json (scores, controls, cost and all that makes rows of a comparison equal),
eval/test.npz (a row a case) and, with eval.save, eval/predictions/.
"""
import hashlib
import json
import logging
import time

import numpy as np

from unimiss_jax import workdir
from unimiss_jax.evals import bootstrap, classification, controls, supervised
from unimiss_jax.report import case_sheet, sheets
from unimiss_jax.report.results import ROW_LEAVES


def recipe_hash(config) -> str:
  """Of all leaves that rows of one comparison must share: all but ROW_LEAVES."""
  leaves = {k: v for k, v in workdir.binding(workdir.flat(config.to_dict())).items() if k not in ROW_LEAVES}
  leaves |= {f'eval.{k}': config.eval[k] for k in ('select', 'patience', 'every')}      # which weights are tested
  return hashlib.blake2b(json.dumps(leaves, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def run(config, logits, fit, cases, about: dict, folder, write=None) -> dict:
  """Tests, writes and returns the scores.

  Args:
    config: of the run.
    logits: [N, *S, C] -> [N, ...], of the weights under test.
    fit, cases: Cases of the training and of the test split.
    about: more fields of test.json.
    folder: local folder of the run; None = another process writes.
    write: (path, label map, number of the case) -> None, for eval.save.
  """
  started, task = time.time(), config.task
  if task.kind == 'cls':
    outcome = supervised.classify(logits, cases, task.exclusive)
    control = controls.classify(fit, cases, task.exclusive)
  else:
    keep = lambda i, record, labels: write(i, labels) if write and folder else None
    outcome = supervised.segment(logits, cases, task, distances=True, keep=keep)
    control = controls.segment(fit, cases, task)
  main = 'auroc' if task.kind == 'cls' else 'dice'
  logging.info('test on %d cases (%.0f s): %s %.3f | chance %.3f | raw pixels %.3f', len(cases), time.time() - started,
               main, outcome.scores[main], control[f'chance/{main}'], control[f'raw/{main}'])
  column, score = ((outcome.table['probability'], lambda p, t: classification.scores(p, t, task.exclusive)[main])
                   if task.kind == 'cls' else (outcome.table['dice'], lambda d, t: np.nanmean(d)))
  low, high = bootstrap.interval(score, column, outcome.table.get('truth', column), groups=outcome.table['group'])
  logging.info('95 %% interval over the test cases: %s %.3f to %.3f', main, low, high)
  found = {'task': config.preset, 'kind': task.kind, 'init_from': config.init_from, 'frozen': bool(task.frozen),
           'seed': config.seed, 'fraction': config.data.label_fraction, 'cases': len(cases), 'fit': len(fit),
           'classes': list(cases.classes), 'split_hash': cases.digest, 'recipe_hash': recipe_hash(config),
           'interval': {main: [low, high]},
           'scores': outcome.scores, 'control': control} | about
  if folder:
    place = folder / 'eval'
    place.mkdir(parents=True, exist_ok=True)
    if task.kind == 'seg':
      _sheet(logits, cases, outcome.table, task).save(place / 'cases.png')
    with (place / 'test.npz').open('wb') as f:
      np.savez(f, **outcome.table)
    (place / 'test.json').write_text(json.dumps(found, indent=1))
  return found


def _sheet(logits, cases, table, task):
  """Best, median and worst case by mean Dice."""
  rows = []
  for name, i in case_sheet.ranks(table['dice'].mean(1)):
    record = cases.record(i)
    mask, image = record['mask'], record['image' if 'image' in record else 'volume']
    predicted = supervised.label_map(supervised.window(logits, cases, record, task), mask.shape, task.exclusive)
    rows.append((f'{name}: {table["id"][i]}, Dice {table["dice"][i].mean():.3f}', sheets.grey(image, *_window(image)),
                 mask, predicted, record.get('spacing_mm')))
  return case_sheet.segmentation(rows, cases.classes, task.exclusive)


def _window(image) -> tuple:
  """Grey values shown as black and white: all of a picture, soft tissue and lung of a CT."""
  return (0, np.iinfo(image.dtype).max) if image.ndim == 2 else (-1000, 600)
