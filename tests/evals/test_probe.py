"""Probes against scikit-learn; the penalty is chosen without the test part."""
import numpy as np
import pytest

from unimiss_jax.evals import probe

linear_model = pytest.importorskip('sklearn.linear_model')
RNG = np.random.default_rng(0)


def problem(n=120, e=20, c=3):
  x = RNG.normal(size=(n + 50, e)) * RNG.uniform(.1, 5, e) + RNG.normal(size=e)
  y = (x @ RNG.normal(size=(e, c)) + RNG.normal(size=(n + 50, c)) * 3 > 0).astype(float)
  return x[:n], y[:n], x[n:]


@pytest.mark.parametrize('n, e', [(120, 20), (30, 64)])
def test_ridge_equals_scikit_learn(n, e):
  fit, y, test = problem(n, e)
  x, z = probe.standardised(fit, test)
  for strength in (.1, 10., 1000.):
    want = linear_model.Ridge(alpha=strength).fit(x, 2 * y - 1).predict(z)
    np.testing.assert_allclose(probe.ridge(fit, y, test, [strength]), want, atol=1e-6)


def test_logistic_equals_scikit_learn():
  fit, y, test = problem()
  x, z = probe.standardised(fit, test)
  for strength in (1., 100.):
    found = probe.logistic(fit, y, test, [strength])
    for c in range(3):
      model = linear_model.LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000).fit(x, y[:, c])
      np.testing.assert_allclose(found[:, c], model.predict_proba(z)[:, 1], atol=1e-5)


def test_the_penalty_of_each_label_has_the_least_error_over_the_folds():
  fit, y, test = problem(100, 40)
  y[:, 1] = RNG.integers(0, 2, 100)                       # nothing to learn: the strongest penalty wins
  x, z = probe.standardised(fit, test)
  part = np.random.default_rng(0).permutation(100) % 4
  for c in range(3):
    error = [sum(((linear_model.Ridge(alpha=s).fit(x[part != f], 2 * y[part != f, c] - 1).predict(x[part == f])
                   - (2 * y[part == f, c] - 1))**2).sum() for f in range(4)) for s in probe.STRENGTHS]
    best = probe.STRENGTHS[int(np.argmin(error))]
    want = linear_model.Ridge(alpha=best).fit(x, 2 * y[:, c] - 1).predict(z)
    np.testing.assert_allclose(probe.ridge(fit, y, test)[:, c], want, atol=1e-6)


def test_what_is_not_known_is_left_out_for_its_label_alone():
  fit, y, test = problem()
  y[:40, 0] = np.nan
  found = probe.ridge(fit, y, test, [10.])
  x, z = probe.standardised(fit, test)
  np.testing.assert_allclose(found[:, 0], linear_model.Ridge(alpha=10.).fit(x[40:], 2 * y[40:, 0] - 1).predict(z),
                             atol=1e-6)
  np.testing.assert_allclose(found[:, 1], linear_model.Ridge(alpha=10.).fit(x, 2 * y[:, 1] - 1).predict(z), atol=1e-6)
  y[:, 2] = np.nan
  assert (probe.ridge(fit, y, test)[:, 2] == 0).all() and (probe.logistic(fit, y, test, [1.])[:, 2] == .5).all()


def test_constant_features_change_nothing():
  fit, y, test = problem()
  more = lambda x: np.concatenate([x, np.full((len(x), 2), 7.)], 1)
  np.testing.assert_allclose(probe.ridge(more(fit), y, more(test), [1.]), probe.ridge(fit, y, test, [1.]), atol=1e-8)
