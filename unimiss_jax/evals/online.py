"""The evaluations that accompany a run: kNN on labels and retrieval of a CT by its DRR or X-ray.

All on un-augmented centre views of samples that training never sees; raw down-sampled pixels are
the control that a feature has to beat.
"""
import numpy as np

from unimiss_jax.evals.knn import knn_auc
from unimiss_jax.evals.retrieval import recall


def run(features: dict, evalset, tasks, pairs: dict | None = None) -> dict[str, float]:
  """Scores {'eval/...': value}; the set says what can be computed.

  Args:
    features: {'ct' | 'drr' | 'xray': [N, E]}, embeddings.
    evalset: of data_pipelines.evalset.
    tasks: of 'knn', 'retrieval'.
    pairs: {name: [N, D]}, what retrieval compares: a loss that brings a DRR to its CT does so behind the head, and
      embeddings before it may stay apart. Their own retrieval is then 'eval/..._r10/embedding'. None = the embeddings.
  """
  out, pairs = {}, features if pairs is None else pairs
  for name in ('ct', 'xray'):
    if 'knn' in tasks and name in features and evalset.labels.get(name):
      values = knn_auc(features[name], evalset.labels[name], evalset.fit[name])
      out[f'eval/knn_auc_{name}'] = float(np.nanmean(list(values.values())))
      out |= {f'eval/knn_auc_{name}/{finding}': v for finding, v in values.items()}
  if 'retrieval' in tasks and 'ct' in features:
    for query in ('drr', 'xray'):
      if query in features and (query == 'drr' or evalset.paired):
        test = ~evalset.fit['ct']
        if test.sum() > 10:
          spaces = {'': pairs} | ({'/embedding': features} if pairs is not features else {})
          out |= {f'eval/{query}_to_ct_r10{end}': recall(x[query][test], x['ct'][test], 10)
                  for end, x in spaces.items()}
  return out


def control(evalset, tasks, view: str) -> dict[str, float]:
  """The same scores from raw down-sampled pixels, as 'eval/raw_...': what a feature has to beat.

  kNN: CT 8x8x8, of several sequences the first; images 16x16. Retrieval: the mean of the CT along the direction of the
  DRR against the image, 16x16.
  """
  pixels = {name: x[:, 0, ..., 0] for name, x in evalset.views.items()}
  knn = {n: pooled(x, (8, 8, 8) if n == 'ct' else (16, 16)) for n, x in pixels.items()}
  values = run(knn, evalset, [t for t in tasks if t == 'knn'])
  if 'ct' in pixels:
    flat = {n: pooled(shadow(x, view) if n == 'ct' else x, (16, 16)) for n, x in pixels.items()}
    values |= run(flat, evalset, [t for t in tasks if t == 'retrieval'])
  return {k.replace('eval/', 'eval/raw_', 1): v for k, v in values.items()}


def shadow(ct, view: str):
  """[N, D, H, W] = [S, A, R] -> [N, h, w]: means along the rays of a DRR view, displayed as it is."""
  axis = {'axial': 1, 'lateral': 3}.get(view, 2)
  return ct.mean(axis)[:, ::-1, ::-1]


def pooled(x, shape):
  """[N, ...] -> [N, prod(shape)] by means over nearly equal blocks."""
  for axis, n in enumerate(shape, 1):
    edges = np.linspace(0, x.shape[axis], n + 1).astype(int)
    counts = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    x = np.add.reduceat(x, edges[:-1], axis) / counts
  return x.reshape(len(x), -1)
