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
from unimiss_jax.evals import controls, supervised

ROW_LEAVES = ('init_from', 'init_branch', 'init_parts', 'init_allow', 'pos_resize', 'seed', 'task.frozen', 'task.encoder_rate', 'optim.layer_decay',
              'data.label_fraction')      # what rows of a comparison may differ in


def recipe_hash(config) -> str:
  """Of all leaves that rows of one comparison must share."""
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
  found = {'task': config.preset, 'kind': task.kind, 'init_from': config.init_from, 'frozen': bool(task.frozen),
           'seed': config.seed, 'fraction': config.data.label_fraction, 'cases': len(cases), 'fit': len(fit),
           'classes': list(cases.classes), 'split_hash': cases.digest, 'recipe_hash': recipe_hash(config),
           'cpu_seconds': time.process_time(), 'scores': outcome.scores, 'control': control} | about
  if folder:
    place = folder / 'eval'
    place.mkdir(parents=True, exist_ok=True)
    with (place / 'test.npz').open('wb') as f:
      np.savez(f, **outcome.table)
    (place / 'test.json').write_text(json.dumps(found, indent=1))
  return found
