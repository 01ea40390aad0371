"""A step that is not finite: which losses and gradients broke, which records it saw, and the batch on disk."""
from __future__ import annotations

import pathlib

import jax
import numpy as np

from unimiss_jax.optim import named_leaves

KEPT = 10      # batches on disk of one run and process; the first ones tell most


def report(folder, step: int, batch: dict, params, metrics: dict) -> str:
  """Writes this process's rows to nan/ below `folder` and says what is known, in one line.

  Args:
    batch: {stream: {field: global array}}; of rows on other processes nothing is said.
    metrics: of the step; train/bad_tensor is a number among named_leaves(params).
  """
  rows = {s: {k: local(x) for k, x in fields.items()} for s, fields in batch.items()}
  told = [what_broke(params, metrics)]
  for stream, fields in rows.items():
    broken = broken_rows(fields)
    ids = fields['id'][broken] if broken.any() else fields['id']
    what = 'records that are not finite themselves' if broken.any() else 'all finite, records'
    told.append(f'{stream}: {what} {", ".join(map(str, ids[:8]))}' + (' ...' if len(ids) > 8 else ''))
  place = pathlib.Path(folder) / 'nan'
  place.mkdir(exist_ok=True)
  if len(list(place.glob(name('*')))) < KEPT:
    with (place / name(step)).open('wb') as f:
      np.savez(f, **{f'{s}/{k}': x for s, fields in rows.items() for k, x in fields.items()})
    told.append(f'batch in nan/{name(step)}')
  return '; '.join(told)


def name(step) -> str:
  """Of the file: '7.npz'; of process 2 of several, which hold other rows, '7_host_2.npz', as its log is called."""
  return f'{step}_host_{jax.process_index()}.npz' if jax.process_count() > 1 else f'{step}.npz'


def what_broke(params, metrics: dict) -> str:
  """Which losses, and how many gradients with the name of one: the first by name, not the first to break."""
  terms = [k[6:] for k, v in metrics.items() if k.startswith('train/') and k.endswith('_loss') and not np.isfinite(v)]
  losses = f'not finite: {", ".join(terms)}' if terms else 'all losses are finite'
  names, count = list(named_leaves(params)), int(metrics.get('train/bad_tensors', 0))
  grads = f'{count} of {len(names)} gradients are not' if count else 'all gradients are finite'
  return f'{losses}; {grads}' + (f', one is that of {names[int(metrics["train/bad_tensor"])]}' if count else '')


def local(x) -> np.ndarray:
  """The rows of a global array that lie on the devices of this process, in order."""
  if not isinstance(x, jax.Array):
    return np.asarray(x)
  parts = {(s.index[0].start or 0) if s.index else 0: s.data for s in x.addressable_shards}
  return np.concatenate([np.atleast_1d(parts[start]) for start in sorted(parts)])


def broken_rows(fields) -> np.ndarray:
  """[B]: whether a number of the row is not finite."""
  out = np.zeros(len(fields['id']), bool)
  for x in fields.values():
    if np.issubdtype(x.dtype, np.inexact):
      out |= ~np.isfinite(x.reshape(len(x), -1)).all(1)
  return out
