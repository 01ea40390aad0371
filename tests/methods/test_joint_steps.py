"""Whole steps of Joint, all three terms at once, in float64: clustering by a plain loop; on any number of devices."""
import jax
import numpy as np
import pytest

from tests.methods.test_joint import tiny
from unimiss_jax import models, optim, sharding, step
from unimiss_jax.methods import base
from unimiss_jax.models.heads import DINOHead

pytestmark = pytest.mark.slow
BATCH, STEPS, HELD = 12, 4, 2      # rows; steps; steps in a queue
RECORDS = {'ct': (48, {}), 'xray': (48, {})}


def config():
  c = tiny('joint', image_queue=HELD * BATCH, volume_queue=HELD * BATCH, local=dict(crops=2, size=64, scale=(.1, .3)))
  c.steps, c.model.dtype, c.joint.inter.dropout = STEPS, 'float64', 0.
  c.batch.update(dict(ct=BATCH, xray=BATCH))
  c.optim.warmup_epochs = 0.
  return c


def batch(i):
  r = np.random.default_rng(i)
  rows = lambda: {'rng': r.integers(0, 2**32, (BATCH, 2), np.uint32), 'bad': np.zeros(BATCH, bool),
                  'id': (BATCH * i + np.arange(BATCH)).astype(np.int32) % 48}
  return {'ct': rows() | {'ct': r.uniform(-1, 1, (BATCH, 2, 16, 64, 64, 1))},
          'xray': rows() | {'xray': r.random((BATCH, 2, 64, 64, 3)), 'local': r.random((BATCH, 2, 64, 64, 3))}}


def run(devices):
  """[(params before, metrics)] of the steps, and (params after them, {})."""
  c = config()
  method = base.make(c, RECORDS)
  optimiser = optim.of(c, method)
  mesh = sharding.make_mesh(devices, 1, jax.devices()[:devices])
  init, key, out = step.make_init(c, method, optimiser), jax.random.key(0), []
  placed = sharding.shardings(jax.eval_shape(init, key, {}), mesh)
  state = jax.jit(init, out_shardings=placed)(key, {})
  assert devices == 1 or not state.extra['intra']['bank_rows'].sharding.is_fully_replicated
  f = jax.jit(step.make_step(c, method, optimiser, 'joint', mesh), out_shardings=(placed, sharding.replicated(mesh)))
  for i in range(STEPS):
    before = jax.device_get(state.params)
    state, metrics = f(state, sharding.to_devices(batch(i), mesh))
    out.append((before, {k: float(v) for k, v in metrics.items()}))
  return [*out, (jax.device_get(state.params), {})]


@pytest.fixture(scope='module')
def one():
  with jax.enable_x64(True):
    return run(1)


# ---- a plain loop

def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def standardised(z):
  flat = z.reshape(-1, z.shape[-1])
  return unit((z - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-8))


def codes(scores, former, c):
  """Sinkhorn-Knopp as SwAV has it, the rows of the queue in front."""
  q = np.exp(np.concatenate([*former, scores]) / c.joint.eps)
  for _ in range(c.joint.rounds):
    q /= q.sum(0) * q.shape[1]
    q /= q.sum(1, keepdims=True) * len(q)
  return (q * len(q))[-len(scores):]


def swapped(z, former, prototypes, c):
  """Unit z [B, V, D], those of former steps, and the directions [D, K] -> loss."""
  w, total = prototypes / np.linalg.norm(prototypes, axis=0), []
  for a in range(2):
    q = codes(z[:, a] @ w, [f[:, a] @ w for f in former], c)
    for v in range(z.shape[1]):
      if v != a:
        x = z[:, v] @ w / c.joint.temp
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        total.append(-(q * log_p).sum(1).mean())
  return np.mean(total)


def test_losses_with_queues_and_small_crops(one):
  with jax.enable_x64(True):
    c = config()
    method, model = base.make(c, RECORDS), models.build(c.model)
    head = DINOHead(c.head.out_dim, c.head.hidden_dim, c.head.bottleneck_dim, linear_init=c.model.init, dtype='float64')
    encode = jax.jit(lambda p, x: models.encode(model, p['backbone'], {}, x)[0].embedding)
    project = jax.jit(lambda p, x: head.apply({'params': p['head']}, x, method='project'))
    volumes = jax.jit(lambda p, x: method.predict['embed'](p, {}, {'ct': x})['ct'])
    former = {'intra': [], 'inter': []}
    for i, (params, metrics) in enumerate(one[:-1]):
      rows = batch(i)
      crops = [rows['xray'][n][:, k] for n in ('xray', 'local') for k in range(2)]
      z = {'intra': standardised(np.stack([np.asarray(project(params, encode(params, x))) for x in crops], 1)),
           'inter': standardised(np.asarray(volumes(params, rows['ct']['ct'])))}
      directions = {'intra': params['head']['last_layer'], 'inter': params['prototypes']}
      for term, found in z.items():
        held = former[term][-HELD:] if len(former[term]) >= HELD else []
        want = swapped(found, held, np.asarray(directions[term]['weight_v']).reshape(-1, found.shape[-1]).T, c)
        assert metrics[f'train/{term}_loss'] == pytest.approx(want, rel=1e-9), (i, term)
        former[term].append(found[:, :2])
      assert metrics['train/loss'] == pytest.approx(sum(metrics[f'train/{t}_loss'] for t in ('mask', *z)), rel=1e-9)


@pytest.mark.parametrize('devices', (2, 3, 4, 6))
def test_on_more_devices_it_is_the_same(devices, one):
  with jax.enable_x64(True):
    found = run(devices)
  first, last = (optim.named_leaves(one[i][0]) for i in (0, -1))
  moved = max(np.abs(first[n] - last[n]).max() / np.abs(first[n]).max() for n in first if first[n].any())
  assert moved > 1e-4      # ten thousand times what is allowed below
  for (params, metrics), (want, numbers) in zip(found, one, strict=True):
    assert metrics.keys() == numbers.keys()
    for name, value in numbers.items():
      assert metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    for name, x in optim.named_leaves(want).items():
      np.testing.assert_allclose(optim.named_leaves(params)[name], x, rtol=1e-8, atol=1e-10, err_msg=name)
