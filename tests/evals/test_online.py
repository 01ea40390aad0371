"""kNN, AUROC and recall against scikit-learn and by hand."""
from types import SimpleNamespace

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from unimiss_jax.evals import knn, online, retrieval

RNG = np.random.default_rng(0)


def test_auroc_equals_sklearn_with_ties():
  y = RNG.integers(0, 2, 200)
  s = RNG.integers(0, 12, 200) + y
  np.testing.assert_allclose(knn.auroc(s, y), roc_auc_score(y, s), rtol=1e-12)
  assert np.isnan(knn.auroc(s, np.ones(200)))


def test_knn_scores_equal_a_search_by_sklearn():
  fit, test = RNG.normal(size=(60, 7)) + 3, RNG.normal(size=(9, 7)) + 3
  labels = RNG.integers(0, 2, (60, 2))
  a = (fit - fit.mean(0)) / np.linalg.norm(fit - fit.mean(0), axis=1, keepdims=True)
  b = (test - fit.mean(0)) / np.linalg.norm(test - fit.mean(0), axis=1, keepdims=True)
  distance, index = NearestNeighbors(n_neighbors=20, metric='cosine').fit(a).kneighbors(b)
  w = np.exp((1 - distance) / 0.1)
  want = (w[..., None] * labels[index]).sum(1) / w.sum(1)[:, None]
  np.testing.assert_allclose(knn.scores(fit, labels, test), want, rtol=1e-9)


def test_recall_of_identity_chance_and_ties():
  x = RNG.normal(size=(200, 16))
  assert retrieval.recall(x, 3 * x + .01 * RNG.normal(size=x.shape) + 5, 1) == 1.      # centred, scale-free
  assert retrieval.recall(np.full((20, 4), np.nan), np.full((20, 4), np.nan), 10) == 0.
  assert abs(retrieval.recall(x, RNG.normal(size=(200, 16)), 10) - 0.05) < 0.05
  assert retrieval.recall(np.ones((200, 4)), np.ones((200, 4)), 10) == 0.      # a collapsed encoder retrieves nothing
  shifted = np.roll(x, 1, axis=0)
  assert retrieval.recall(x, shifted, 1) < 0.05


def test_pooling_is_a_mean_over_blocks():
  x = RNG.normal(size=(2, 8, 16))
  np.testing.assert_allclose(online.pooled(x, (4, 4)), x.reshape(2, 4, 2, 4, 4).mean((2, 4)).reshape(2, -1))


def test_retrieval_looks_at_what_the_losses_compare():
  x = RNG.normal(size=(40, 8))
  fit = {'ct': np.arange(40) < 10, 'xray': np.zeros(40, bool)}
  apart = SimpleNamespace(labels={}, fit=fit, paired=True)
  embeddings = {'ct': x, 'drr': RNG.permutation(x), 'xray': RNG.permutation(x)}
  pairs = {'ct': x, 'drr': x + .01, 'xray': x * 2}
  got = online.run(embeddings, apart, ('retrieval',), pairs)
  assert got['eval/drr_to_ct_r10'] == got['eval/xray_to_ct_r10'] == 1.
  assert got['eval/drr_to_ct_r10/embedding'] < .7 and got.keys() == {
      f'eval/{q}_to_ct_r10{end}' for q in ('drr', 'xray') for end in ('', '/embedding')}
  assert online.run(pairs, apart, ('retrieval',)).keys() == {f'eval/{q}_to_ct_r10' for q in ('drr', 'xray')}
