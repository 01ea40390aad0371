"""The head of a classifier starts as the linear probe of its training cases (LP-FT, Kumar et al., ICLR 2022).

A head that starts at random sends large gradients into a pre-trained encoder until it has learned; this one has learned
before the first step. With task.frozen the run is a linear probe that gradient descent goes on with.
"""
import jax
import numpy as np

from unimiss_jax import processes
from unimiss_jax.evals import probe

CASES = 50      # views in memory at a time


def start(state, observer, cases):
  """The state with `params/task/linear` of the probe on the embeddings of `cases` (data_pipelines.cases.Cases)."""
  rows, labels, waiting = [], [], []
  for i in range(len(cases)):
    record = cases.record(i)
    waiting.append(cases.plain(record))
    labels.append(record['label'])
    if len(waiting) == CASES or i + 1 == len(cases):
      rows.append(observer.embedding(state, cases.stream, np.stack(waiting)))
      waiting = []
  features, labels = np.concatenate(rows), np.array(labels)
  known = np.where(labels < 0, np.nan, labels)
  fitted = processes.on_main(lambda: [part.tolist() for part in probe.layer(features, known)])
  old = state.params['task']['linear']
  new = {}
  for name, value in zip(('kernel', 'bias'), fitted):
    value = np.asarray(value, old[name].dtype)
    new[name] = jax.make_array_from_callback(value.shape, old[name].sharding, lambda index, v=value: v[index])
  return state._replace(params=state.params | {'task': state.params['task'] | {'linear': new}})
