"""Whether what Joint's Transformer over slices learns shows the order of the slices.

  python benchmarks/joint_order.py [--seeds=0,1,2] [--steps=360] [--out=FILE.json]

Every volume holds the same slices, a spot of each of SLICES widths once; half of the volumes go from narrow to wide,
half from wide to narrow, each with slices out of their place by up to WEAVE. So neither a slice nor the mean over the
slices tells the two classes apart. The two views of a volume differ in noise, gain and the places of the spots. The
phases `mask` and `inter` of `configs/joint.py` train a small ResNet and the Transformer on volumes without labels
(AdamW, for LARC hardly moves in so few steps; 16 prototypes and no dropout, else the loss of `inter` may rest for
hundreds of steps where all codes are equally likely); a linear probe then learns from FIT whole volumes and is
tested on TEST others. Beside the feature of the volume stands the mean of its slice embeddings, beside both the same
network untrained. One line of JSON a seed: accuracies, chance .5, and the last losses.
"""
import argparse
import json
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from configs import joint  # noqa: E402
from unimiss_jax import optim, sharding, step, validate  # noqa: E402
from unimiss_jax.boundary import crossed  # noqa: E402
from unimiss_jax.evals import probe  # noqa: E402
from unimiss_jax.methods import base  # noqa: E402

SLICES, SIZE, RECORDS, BATCH = 16, 32, 512, 16
FIT, TEST, ROWS = 256, 512, 64
NOISE = 0.3      # of views whose spots have the height 1
WEAVE = 4.       # places


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument('--seeds', default='0,1,2')
  p.add_argument('--steps', type=int, default=360)
  p.add_argument('--out', default='')
  f = p.parse_args()
  lines = []
  for seed in map(int, f.seeds.split(',')):
    lines.append(json.dumps(run(config(seed, f.steps))))
    print(lines[-1], flush=True)
  if f.out:
    with open(f.out, 'w') as file:
      file.write('\n'.join(lines) + '\n')
  return 0


def config(seed: int, steps: int):
  c = joint.get_config('phantom').unlock()
  c.seed, c.steps = seed, steps
  c.phases.xray = 0
  c.batch.ct = BATCH
  c.joint.update(dict(phases=('mask', 'inter'), shares=(0.2, 0.8), rates=(), volume_queue=0, prototypes=16))
  c.joint.inter.dropout = 0.
  c.model = dict(name='resnet50', depths=(1, 1, 1, 1), width=8, in_channels=(3, 1), image_size=SIZE, dtype='float32',
                 remat='')
  c.views.ct.size = (SLICES, SIZE, SIZE)
  c.optim.warmup_epochs = 0.1 * steps / (RECORDS // BATCH)
  c.eval.tasks = ()
  c.optim.update(dict(name='adamw', lr=2e-3, weight_decay=1e-6, weight_decay_end=1e-6))
  validate.validate(c)
  return c.lock()


def run(c) -> dict:
  began = time.monotonic()
  method = base.make(c, {'ct': (RECORDS, {})})
  optimiser = optim.of(c, method)
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  state = jax.jit(step.make_init(c, method, optimiser))(jax.random.key(c.seed))
  steps = {n: jax.jit(step.make_step(c, method, optimiser, n, mesh), donate_argnums=0) for n in method.phases}
  rng = np.random.default_rng(c.seed)
  learned, probed = Volumes(rng, RECORDS), Volumes(rng, FIT + TEST)
  whole = probed.views(rng, np.arange(FIT + TEST), 1)
  out = {'seed': c.seed, 'steps': c.steps, 'untrained': accuracy(embeddings(method, state, whole), probed.rises)}
  for i in range(c.steps):
    ids = rng.permutation(RECORDS)[:BATCH]
    rows = {'ct': learned.views(rng, ids, 2), 'id': ids.astype(np.int32), 'bad': np.zeros(BATCH, bool),
            'rng': rng.integers(0, 2**32, (BATCH, 2), np.uint32)}
    state = crossed(method, state, i, None)
    state, metrics = steps[method.schedule(i)[0]](state, {'ct': rows})
    out |= {k[6:]: round(float(v), 3) for k, v in metrics.items() if k in ('train/mask_loss', 'train/inter_loss')}
  out['trained'] = accuracy(embeddings(method, state, whole), probed.rises)
  return out | {'seconds': round(time.monotonic() - began)}


class Volumes:
  """n volumes: whether each goes from narrow to wide, and the order of its slices."""

  def __init__(self, rng, n: int):
    self.rises = rng.permutation(np.arange(n) % 2 > 0)
    order = np.argsort(np.arange(SLICES) + rng.uniform(-WEAVE, WEAVE, (n, SLICES)), 1)
    self.order = np.where(self.rises[:, None], order, order[:, ::-1])

  def views(self, rng, ids, count: int):
    """[len(ids), count, SLICES, SIZE, SIZE, 1] float32."""
    wide = (2 + 10 * self.order[ids] / SLICES)[:, None, :, None, None]
    shape = (len(ids), count, SLICES, 1, 1)
    grid = np.arange(SIZE) - (SIZE - 1) / 2
    away = (grid[:, None] - rng.uniform(-3, 3, shape))**2 + (grid - rng.uniform(-3, 3, shape))**2
    spot = rng.uniform(.8, 1.2, (*shape[:2], 1, 1, 1)) * np.exp(-away / wide**2)
    return (spot + NOISE * rng.standard_normal(spot.shape))[..., None].astype(np.float32)


def embeddings(method, state, whole) -> dict:
  """{'volume': feature, 'slices': mean of the slice embeddings} of volumes, [N, width]."""
  embed, slices = (jax.jit(method.predict[n]) for n in ('embed', 'slices'))
  parts = [{'volume': embed(state.params, state.extra, {'ct': whole[i:i + ROWS]})['ct'][:, 0],
            'slices': slices(state.params, state.extra, {'ct': whole[i:i + ROWS]})[:, 0].mean(1)}
           for i in range(0, len(whole), ROWS)]
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def accuracy(found: dict, rises) -> dict:
  right = lambda x: probe.logistic(x[:FIT], rises[:FIT, None], x[FIT:])[:, 0] > .5
  return {k: round(float(np.mean(right(x) == rises[FIT:])), 3) for k, x in found.items()}


if __name__ == '__main__':
  sys.exit(main())
