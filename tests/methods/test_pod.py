"""The preset for large batches sees the samples of `plain`, and its rates scale as its sources say."""
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablations, unimiss_plus
from tests.e2e import tiny
from unimiss_jax import step, validate
from unimiss_jax.methods import base

RECORDS = 6 * 1024


def made(preset, **overrides):
  config = unimiss_plus.get_config(preset)
  config.unlock()
  config = tiny.changed(config, overrides)
  return config, base.make(config, {'ct': (RECORDS, {}), 'xray': (RECORDS, {})})


def samples(config, method, until=None):
  """{phase: samples seen before a step}."""
  phases = [method.schedule(i)[0] for i in range(until or method.total_steps)]
  return {p: phases.count(p) * config.batch[p] for p in ('ct', 'xray')}


def test_it_sees_what_plain_sees():
  plain, pod = made('plain'), made('pod')
  validate.validate(pod[0])
  want, found = samples(*plain), samples(*pod)
  assert want == {'ct': 201 * RECORDS, 'xray': 201 * RECORDS}
  assert found == {'ct': 201 * RECORDS, 'xray': 200 * RECORDS}
  warm = [int(round(c.optim.warmup_epochs * m.steps_per_epoch)) for c, m in (plain, pod)]
  seen = [sum(samples(*run, until=n).values()) for run, n in zip((plain, pod), warm)]
  assert seen[1] == pytest.approx(seen[0], rel=.1) and warm[1] < warm[0] / 5


@pytest.mark.parametrize('batch', [96, 384, 1024])
def test_rates_of_a_batch(batch):
  """After the warm-up: lr sqrt(B / 96) of plain's 3e-4. A teacher forgets per sample, not per step."""
  config, method = made('pod', **{'batch.ct': batch, 'optim.min_lr': 0., 'optim.warmup_epochs': 0.})
  lr, _ = step.schedules(config, method)
  np.testing.assert_allclose(float(lr(0)), 3e-4 * (batch / 96)**.5, rtol=1e-5)
  params, teacher = {'w': jnp.ones(3)}, {'w': jnp.zeros(3)}
  kept = method.post(params, {'teacher': teacher, 'center': jnp.zeros((1, 4))}, base.Aux({}, {}, {}),
                     jnp.zeros((), jnp.int32))['teacher']['w']
  np.testing.assert_allclose(1 - np.asarray(kept), .996**(batch / 96), rtol=1e-5)


def test_plain_scales_as_released():
  config, method = made('plain', **{'batch.ct': 384, 'optim.warmup_epochs': 0.})
  assert float(step.schedules(config, method)[0](0)) == pytest.approx(8e-4 * 384 / 256, rel=1e-5)


def test_the_earned_recipe_is_the_last_rung_that_suits_the_sizes_of_plain():
  """And pod takes it, too."""
  _, method = made('base')
  assert set(method.phases['ct'].chance) == {'train/nce_loss', 'train/pair_nce_loss'}
  ladder = ablations.GRIDS['base']
  out = ablations.FALLEN + ablations.PHANTOMS_ALONE
  last = [row for row in ladder['rows'] if row not in out][-1]
  base_, pod = (unimiss_plus.get_config(p) for p in ('base', 'pod,recipe=base'))
  for leaf, value in ladder['rows'][last].items():
    if leaf.split('.')[0] in ('loss', 'extra_loss', 'model', 'drr') or leaf == 'head.batch_standardize':
      assert validate.leaf(base_, leaf) == validate.leaf(pod, leaf) == value, leaf
  assert pod.batch.ct == 1024 and base_.batch.ct == 96 and base_.model.embed_dims == made('plain')[0].model.embed_dims
  with pytest.raises(ValueError, match='recipe=base: of preset pod alone'):
    unimiss_plus.get_config('plain,recipe=base')
