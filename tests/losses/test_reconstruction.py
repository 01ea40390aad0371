"""Target, loss and gradient of the released reconstruction term."""
import jax
import numpy as np

from unimiss_jax.losses import reconstruction


def test_target_loss_and_gradient(fixtures):
  fixture = np.load(fixtures / 'parity' / 'plus_losses.npz')
  with jax.enable_x64(True):
    x, raw = (fixture[f'recon/{k}'].astype(np.float64) for k in ('x', 'dec'))
    target = reconstruction.minmax(x, 1e-6, axes=(1, 2, 3, 4))
    np.testing.assert_allclose(target, fixture['recon/target'], atol=1e-6)
    value, grad = jax.value_and_grad(reconstruction.sigmoid_mse)(raw, target)
  np.testing.assert_allclose(value, fixture['recon/loss'][0], rtol=1e-6)
  want = fixture['recon/grad_dec']
  np.testing.assert_allclose(grad, want, rtol=0, atol=1e-6 * abs(want).max())


def test_minmax_of_a_constant_crop_is_zero_with_eps_and_nan_without():
  x = np.stack([np.full((4, 4), -1.), np.arange(16.).reshape(4, 4)])
  np.testing.assert_allclose(reconstruction.minmax(x, 1e-6, axes=(1, 2))[0], 0)
  np.testing.assert_allclose(reconstruction.minmax(x, 1e-6, axes=(1, 2))[1].ravel(), np.arange(16) / 15, rtol=1e-6)
  assert np.isnan(reconstruction.minmax(x, 0., axes=(1, 2))[0]).all()


def test_baselines_are_the_losses_of_blocks_and_of_one_grey():
  x = np.random.default_rng(2).uniform(size=(2, 3, 8, 12, 1))
  got = reconstruction.baselines('ct', x.astype(np.float32))
  means = x.reshape(2, 3, 2, 4, 3, 4).mean((3, 5))
  blocks = means.repeat(4, 2).repeat(4, 3)
  want = {'blur': ((x[..., 0] - blocks)**2).mean(), 'grey': ((x - x.mean((2, 3), keepdims=True))**2).mean()}
  assert set(got) == {f'collapse/{k}_recon_ct' for k in want}
  for k, v in want.items():
    np.testing.assert_allclose(got[f'collapse/{k}_recon_ct'], v, rtol=1e-5)
