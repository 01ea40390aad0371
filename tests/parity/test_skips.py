"""What the released code computes and throws away is not computed here; loss and gradients are the same."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.trainstep import built
from unimiss_jax import models
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.optim import TRAIN, named_leaves


def unskipped(config):
  """The loss of a CT step written out: every branch through the whole network, slices through the whole head."""
  model, h, w = models.build(config.model), config.head, config.loss
  head = DINOHead(h.out_dim, h.hidden_dim, h.bottleneck_dim)

  def network(params, x):           # [2B, ...], view 0 first -> logits [2B, K], reconstruction
    out = model.apply({'params': params['backbone']}, x)
    return head.apply({'params': params['head']}, out.embedding), out.reconstruction

  def dino(student, teacher, center):
    q = jax.nn.softmax((teacher - center) / w.teacher_temp).reshape(2, -1, h.out_dim)
    log_p = jax.nn.log_softmax(student / w.student_temp).reshape(2, -1, h.out_dim)
    return -((q[0] * log_p[1]).sum(-1).mean() + (q[1] * log_p[0]).sum(-1).mean()) / 2

  def loss(params, extra, ct, drr):
    ct, drr = (jnp.concatenate([x[:, 0], x[:, 1]]) for x in (ct, drr))
    t, unused = network(extra['teacher'], ct)
    t = jax.lax.stop_gradient(t + 0 * unused.mean())
    s_ct, r_ct = network(params, ct)
    s_drr, r_drr = network(params, drr)
    slices = ct[:, ::w.slices]                                                 # [2B, S, H, W, 1]
    s_slice, unused = network(params, jnp.tile(slices.reshape(-1, *slices.shape[2:]), 3))
    s_slice = (s_slice + 0 * unused.mean((1, 2, 3))[:, None]).reshape(*slices.shape[:2], -1).mean(1)
    low, high = (f((1, 2, 3, 4), keepdims=True) for f in (ct.min, ct.max))
    total, center = 0, extra['center']
    for weight, student in ((w.ct, s_ct), (w.drr, s_drr), (w.slice, s_slice)):
      total += weight * dino(student, t, center)
      center = w.center_momentum * center + (1 - w.center_momentum) * t.mean(0)
    total += w.recon_ct * ((jax.nn.sigmoid(r_ct) - (ct - low) / (high - low))**2).mean()
    return total + w.recon_drr * ((jax.nn.sigmoid(r_drr) - drr)**2).mean()
  return loss


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_the_whole_computation(fixtures):
  with jax.enable_x64(True):
    run = built(fixtures, 'plus_tiny_trainsteps_f64', 'float64').run
    state, batch = run.start(), run.batch('ct')
    center = np.random.default_rng(0).normal(size=state.extra['center'].shape)
    state = state._replace(extra=state.extra | {'center': jnp.asarray(center)})
    modes = dict.fromkeys(state.opt_state['groups'], np.int32(TRAIN))
    _, metrics, ours = run.step('ct')(state, batch, modes)
    whole = jax.jit(jax.value_and_grad(unskipped(run.config)))
    value, theirs = whole(state.params, state.extra, batch['ct']['ct'], batch['ct']['drr'])
    np.testing.assert_allclose(metrics['train/loss'], value, rtol=1e-12)
    ours, theirs = named_leaves(ours), named_leaves(theirs)
    largest = max(np.linalg.norm(x) for x in theirs.values())
    for name, x in theirs.items():
      error = np.linalg.norm(ours[name] - x) / max(np.linalg.norm(x), 1e-4 * largest)
      assert error < 1e-12, (name, error)
  moved = {n for n, x in theirs.items() if np.any(x)}
  assert {n for n in theirs if 'Dec' in n or 'recon' in n or 'Transpose' in n} <= moved    # decoders of CT and DRR
