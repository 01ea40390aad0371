"""Intervals against scipy; groups are drawn whole, pairs alike."""
import numpy as np
import pytest
from scipy import stats

from unimiss_jax.evals import bootstrap


def test_interval_of_a_mean_is_that_of_scipy():
  x = np.random.default_rng(0).normal(size=80)
  want = stats.bootstrap((x,), np.mean, n_resamples=4000, method='percentile', rng=1).confidence_interval
  assert bootstrap.interval(np.mean, x, n=4000) == pytest.approx(tuple(want), abs=.02)


def test_a_group_is_drawn_with_all_its_cases():
  groups = np.array([3, 1, 3, 2, 1, 3])
  for i in bootstrap.draws(groups, 50, 0):
    counts = np.bincount(i, minlength=6)
    assert counts[0] == counts[2] == counts[5] and counts[1] == counts[4]


def test_a_constant_gap_has_no_spread():
  b = np.random.default_rng(0).normal(size=(30, 2))
  mean = lambda x, truth: x.mean()
  assert bootstrap.paired(mean, b + .25, b, b, np.arange(30), n=100) == pytest.approx((.25,) * 3, abs=1e-12)
