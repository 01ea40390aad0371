"""ResNet against PyTorch with the same weights: evaluation, training mode, gradients; names and sizes of ResNet-50."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax import models, porting
from unimiss_jax.models.resnet import ResNet, first_statistics
from unimiss_jax.porting.errors import PortingError

torch = pytest.importorskip('torch')
from unimiss_jax.porting import torch_resnet  # noqa: E402

TINY = dict(depths=(1, 2), width=4)


def close(x, y, tolerance=1e-9):
  np.testing.assert_allclose(x, y.detach().numpy(), rtol=0, atol=tolerance)


def bare(trees):
  """PyTorch's names and arrays of a ResNet alone."""
  return {n.removeprefix('backbone.'): x for n, x in porting.to_torch(trees).items()}


def nhwc(x):
  return x.permute(0, 2, 3, 1)


@pytest.fixture
def twins():
  """(ours, variables, theirs, images), float64; statistics and scales are not those of a fresh network."""
  with jax.enable_x64(True):
    torch.manual_seed(0)
    theirs = torch_resnet.ResNet(**TINY).double()
    with torch.no_grad():
      for name, x in theirs.state_dict().items():
        if x.is_floating_point() and ('bn' in name or 'downsample.1' in name):
          x += .3 * torch.rand_like(x)
    ours = ResNet(**TINY, dtype=jnp.float64)
    found = porting.from_torch(theirs.state_dict(), TINY)
    variables = {'params': found['backbone'], 'batch_stats': found['batch_stats']}
    yield ours, variables, theirs, torch.randn(2, 3, 48, 64, dtype=torch.float64)


def test_values_and_gradients_are_those_of_pytorch(twins):
  ours, variables, theirs, x = twins
  images = nhwc(x).numpy()
  out = jax.jit(ours.apply)(variables, images)
  embedding, maps, _ = theirs.eval()(x)
  close(out.embedding, embedding)
  assert out.reconstruction is None and len(out.pyramid) == 3
  for a, b in zip(out.pyramid, maps):
    close(a, nhwc(b))

  weights = np.random.default_rng(0).normal(size=embedding.shape)

  @jax.jit
  def step(params):
    def loss(params):
      out, new = ours.apply({'params': params, 'batch_stats': variables['batch_stats']}, images, train=True,
                            mutable=['batch_stats'])
      return (out.embedding * weights).sum(), new['batch_stats']
    return jax.grad(loss, has_aux=True)(params)
  grads, statistics = step(variables['params'])
  (theirs.train()(x).embedding * torch.from_numpy(weights)).sum().backward()
  made = bare({'backbone': grads, 'batch_stats': statistics})
  for name, p in theirs.named_parameters():
    close(made[name], p.grad, 1e-8)
  for name, b in theirs.named_buffers():
    if name.endswith('mean'):          # of the variance PyTorch keeps the unbiased one
      close(made[name], b)


def test_weights_survive_the_way_to_pytorch_and_back(twins):
  ours, variables, theirs, _ = twins
  there = bare({'backbone': variables['params'], 'batch_stats': variables['batch_stats']})
  assert sorted(there) == sorted(n for n in theirs.state_dict() if 'num_batches' not in n)
  theirs.load_state_dict({k: torch.from_numpy(v) for k, v in there.items()})
  file = {'state_dict': {f'module.encoder.{k}': v for k, v in theirs.state_dict().items()}}
  file['state_dict']['module.fc.weight'] = torch.ones(2)
  for arch in (TINY, None):      # None: as the tensors show it
    found = porting.from_torch(file, arch)
    jax.tree.map(np.testing.assert_array_equal, found,
                 {'backbone': variables['params'], 'batch_stats': variables['batch_stats']})
  with pytest.raises(PortingError, match=r'9 missing: backbone.layer2.2.bn1.bias'):
    porting.from_torch(there, TINY | {'depths': (1, 3)})
  with pytest.raises(PortingError, match=r'backbone.layer1.0.bn3.running_mean'):
    porting.from_torch({k: v for k, v in there.items() if k != 'layer1.0.bn3.running_mean'}, TINY)
  with pytest.raises(PortingError, match=r'mis-shaped: .*backbone.conv1.weight \(7, 7, 3, 4\) expected \(7, 7, 3, 8\)'):
    porting.from_torch(there, TINY | {'width': 8})


def test_resnet_50_has_the_published_number_of_parameters():
  model = models.build({'name': 'resnet50'})
  shapes = models.param_shapes(model)
  assert sum(s.size for s in shapes.values()) == 25_557_032 - 1000 * 2049     # torchvision's, less its classifier
  assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: first_statistics(model)))) == 53_120
  assert shapes['layer1_0', 'downsample_0', 'kernel'].shape == (1, 1, 64, 256)
  assert model.initial(('conv1', 'kernel'), {('conv1', 'kernel'): (7, 7, 3, 64)}) == ('normal', (2 / 49 / 64)**.5)


@pytest.mark.slow
def test_recomputed_blocks_change_nothing(twins):
  ours, variables, _, x = twins
  x = nhwc(x).numpy()
  grad = lambda m: jax.jit(jax.grad(lambda p: (m.apply(
      {**variables, 'params': p}, x, train=True, mutable=['batch_stats'])[0].embedding**2).sum()))(variables['params'])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), grad(ours),
               grad(ours.clone(remat='blocks')))


def test_what_it_does_not_take_is_named():
  for shape in ((1, 16, 48, 48, 1), (1, 16, 48, 3), (1, 48, 48, 1)):
    with pytest.raises(ValueError, match='at least 32 x 32'):
      jax.eval_shape(lambda x: ResNet(**TINY).init(jax.random.key(0), x), jnp.zeros(shape))
