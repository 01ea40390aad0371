"""What a run says of its time."""
from unimiss_jax import progress


def test_what_former_lives_have_cost_counts():
  cost = progress.Cost()
  mine = cost.spent()
  cost.before = {'seconds': 100., 'cpu_seconds': 7.}
  after = cost.spent()
  assert 100 <= after['seconds'] - mine['seconds'] < 160 and 7 <= after['cpu_seconds'] - mine['cpu_seconds'] < 60
