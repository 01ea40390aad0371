"""The head that a classifier starts with, against scikit-learn."""
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from unimiss_jax import probe_first
from unimiss_jax.evals import probe
from unimiss_jax.state import TrainState

RNG = np.random.default_rng(2)


class Cases:
  """130 cases of 5 numbers on different scales; labels are not known everywhere."""
  stream = 'ct'

  def __init__(self):
    self.x = (RNG.normal(size=(130, 5)) * (1, 10, .01, 1, 3) + (0, 100, 0, 5, 0)).astype(np.float32)
    score = (self.x - self.x.mean(0)) / self.x.std(0) @ RNG.normal(size=(5, 2)) + RNG.normal(size=(130, 2))
    self.y = np.where(RNG.uniform(size=score.shape) < .2, -1, score > 0).astype(np.float32)

  def __len__(self):
    return len(self.x)

  def record(self, i):
    return {'label': self.y[i], 'x': self.x[i]}

  def plain(self, record):
    return record['x']


def test_the_head_is_the_probe_of_the_known_labels(monkeypatch):
  monkeypatch.setattr(probe.layer, '__defaults__', ([3.], *probe.layer.__defaults__[1:]))
  cases, asked = Cases(), []

  def embedding(state, stream, views):
    asked.append((stream, len(views)))
    return views

  linear = {'kernel': jnp.zeros((5, 2)), 'bias': jnp.ones(2)}
  state = TrainState(jnp.zeros((), jnp.int32), {'backbone': {'w': jnp.ones(3)}, 'task': {'linear': linear}}, {}, {})
  found = probe_first.start(state, SimpleNamespace(embedding=embedding), cases)
  assert asked == [('ct', 50), ('ct', 50), ('ct', 30)] and found.params['backbone'] is state.params['backbone']
  head, x = found.params['task']['linear'], cases.x.astype(float)
  for c in range(2):
    known = cases.y[:, c] >= 0
    scale = StandardScaler().fit(x)
    model = LogisticRegression(C=1 / 3, tol=1e-10, max_iter=10_000).fit(scale.transform(x[known]),
                                                                        cases.y[known, c])
    np.testing.assert_allclose(expit(x @ np.asarray(head['kernel'], float) + np.asarray(head['bias'], float))[:, c],
                               model.predict_proba(scale.transform(x))[:, 1], atol=1e-4)
