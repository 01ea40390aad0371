"""The peer of benchmarks/step.py does the same work: its losses and its centre are ours."""
import jax
import numpy as np
import pytest

from configs import unimiss_plus
from unimiss_jax import porting

torch = pytest.importorskip('torch')
from benchmarks import setting, torch_recipe  # noqa: E402
from unimiss_jax.porting import torch_mit  # noqa: E402

TINY = dict(embed_dims=(4, 8, 8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), decoder_dims=(8, 8, 8, 8, 4),
            image_size=64, volume_size=(16, 64, 64))
HEAD = dict(out_dim=64, hidden_dim=16, bottleneck_dim=8)


@pytest.mark.parametrize('phase, preset', [pytest.param('ct', 'reference', marks=pytest.mark.slow), ('xray', 'plain')])
def test_losses_and_centre_are_ours(phase, preset):
  c = unimiss_plus.get_config(preset)
  c.unlock()
  c.batch.ct = c.batch.xray = 2
  c.model.update(TINY | {'decoder_drop_path': 0.})
  c.head.update(HEAD)
  made = setting.Ours(c.lock())
  torch.manual_seed(0)
  weights = torch_mit.UniMiSSPlus(TINY, HEAD).state_dict()
  params = porting.from_torch(weights, TINY)
  extra = {'teacher': params, 'center': np.random.default_rng(1).normal(size=(1, 64)).astype(np.float32)}
  batch = setting.batches(c)[phase]
  given = params, extra, batch, made.key, 0
  quick = {'xla_backend_optimization_level': 0}      # compiling is most of this test
  loss, aux = jax.jit(made.method.phases[phase].loss).lower(*given).compile(quick)(*given)
  peer = torch_recipe.Recipe(c, weights, made.schedules(), lean=preset == 'plain')
  peer.center = torch.tensor(extra['center'])
  with torch.no_grad():
    terms = peer.losses(phase, torch_recipe.views(batch))
  assert {f'train/{k}' for k in terms} == {k for k in aux.metrics if k.endswith('_loss')}
  for name, (_, value) in terms.items():
    np.testing.assert_allclose(aux.metrics[f'train/{name}'], float(value), rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(loss, float(sum(w * v for w, v in terms.values())), rtol=1e-5)
  np.testing.assert_allclose(aux.mean['center'], peer.center, rtol=1e-5, atol=1e-6)
