"""Every row of every grid of pre-trainings changes something, is a valid run, and its state and steps can be built."""
import functools

import jax
import pytest

from configs import ablations
from data_pipelines import streams
from tests.e2e.tiny import changed
from unimiss_jax import optim, sharding, step, validate
from unimiss_jax.cli import sweep
from unimiss_jax.methods import base

ROWS = [(g, r) for g, grid in ablations.GRIDS.items() for r in grid['rows']]
SEEN = ('core', 'only_2d'), ('schedule', 'joint')    # steps too; of the others in slow tests


def config(grid, row):
  entry = ablations.GRIDS[grid]
  leaves = dict(entry['rows'][row])
  c = sweep.preset(leaves.pop('config', entry['config']))
  c.unlock()
  return changed(c, leaves)


@functools.cache
def built(grid, row):
  """(config, method, {stream: stream}) as train.py makes them."""
  c = config(grid, row)
  validate.validate(c)
  found = streams.build(c, validate.streams(c), 0, 1)
  try:
    method = validate.made(base.make, c, {n: (s.records, s.fields) for n, s in found.items()})
    validate.check_method(c, method)
    return c, method, {n: dict(s.spec) for n, s in found.items()}
  finally:
    for s in found.values():
      s.close()


def state_of(c, method):
  tx = optim.of(c, method)
  return tx, jax.eval_shape(step.make_init(c, method, tx), jax.random.key(0), {})


def lowered(c, method, specs, phase):
  tx, state = state_of(c, method)
  batch = {s: {k: jax.ShapeDtypeStruct((n, *shape), dtype) for k, (shape, dtype) in specs[s].items()}
           for s, n in method.phases[phase].streams.items()}
  f = step.make_step(c, method, tx, phase, sharding.make_mesh(1, 1, jax.devices()[:1]), {})
  return jax.jit(f).lower(state, batch)


@pytest.mark.parametrize('grid', ablations.GRIDS)
def test_rows_differ_from_their_base(grid):
  sweep.check_rows(grid, ablations.GRIDS[grid])


def test_a_row_that_changes_nothing_or_an_unknown_leaf_is_refused():
  grid = ablations.grid({'same': {'loss.nce': 1.0}})
  with pytest.raises(sweep.SweepError, match='toy: row same changes nothing of base: loss.nce'):
    sweep.check_rows('toy', grid)
  with pytest.raises(sweep.SweepError, match='toy: row typo sets a leaf that .* has not: .*ncee'):
    sweep.check_rows('toy', ablations.grid({'typo': {'loss.ncee': 1.0}}))


def test_a_ladder_keeps_what_has_not_fallen_out():
  found = ablations.ladder({'loss.nce': 0.}, {'a': {'loss.ct': 1.}, 'b': {'loss.ct': 2.}, 'c': {'loss.xray': 1.}},
                           out=('b',), common={'steps': 4})
  assert found['rows'] == {
      'start': {'steps': 4, 'loss.nce': 0.}, 'a': {'steps': 4, 'loss.nce': 0., 'loss.ct': 1.},
      'b': {'steps': 4, 'loss.nce': 0., 'loss.ct': 2.},
      'c': {'steps': 4, 'loss.nce': 0., 'loss.ct': 1., 'loss.xray': 1.}}
  assert found['base'] == 'start' and found['against'] == {'a': 'start', 'b': 'a', 'c': 'a'}
  again = ablations.ladder({}, {'a': {'loss.ct': 1.}, 'b': {'loss.ct': 1.}})
  with pytest.raises(sweep.SweepError, match='toy: row b changes nothing of a: loss.ct'):
    sweep.check_rows('toy', again)


def test_terms_are_left_out_one_by_one():
  found = ablations.left_out({'loss.nce': 0., 'loss.ct': 0.}, {'a': {'loss.ct': 1.}, 'b': {'loss.ct': 2.}, 'c': {
      'loss.nce': 1.}}, out=('b',), common={'steps': 4})
  whole = {'steps': 4, 'loss.nce': 1., 'loss.ct': 1.}
  assert found['base'] == 'recipe' and found['rows'] == {
      'recipe': whole, 'start': {'steps': 4, 'loss.nce': 0., 'loss.ct': 0.}, 'no_a': whole | {'loss.ct': 0.},
      'no_c': whole | {'loss.nce': 0.}}
  ladder, held = ablations.GRIDS['base'], ablations.GRIDS['base_held_out']
  last = [row for row in ladder['rows'] if row not in ablations.FALLEN][-1]
  assert held['rows']['recipe'] == ladder['rows'][last] and not set(held['seeds']) & set(ladder['seeds'])


@pytest.mark.parametrize('grid, row', ROWS)
def test_a_row_is_a_run(grid, row):
  c, method, _ = built(grid, row)
  _, state = state_of(c, method)
  assert jax.tree.leaves(state.params)


@pytest.mark.parametrize('grid, row', [pytest.param(*r, marks=() if r in SEEN else pytest.mark.slow) for r in ROWS])
def test_the_steps_of_a_row_can_be_built(grid, row):
  c, method, specs = built(grid, row)
  for phase in method.phases:
    state, metrics = lowered(c, method, specs, phase).out_info
    assert metrics['train/loss'].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize('row, phase', [('no_slices', 'ct'), ('no_reconstruction', 'ct'), ('no_drr', 'ct'),
                                        ('no_reconstruction', 'xray')])
def test_a_term_of_weight_0_is_not_in_the_program(row, phase):
  """By the floating-point operations of the lowered step."""
  flops = lambda row: lowered(*built('core', row), phase).cost_analysis()['flops']
  assert flops(row) < .97 * flops('unimiss_plus')
