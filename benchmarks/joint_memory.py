"""Memory of a step of Joint on volumes with the slices of a batch all at once and in parts, of the full-size model.

  python benchmarks/joint_memory.py [--parts=1,4,16] [--remat=,blocks] [--batch=1] [--phase=inter] [--out=FILE.json]

Preset `plain` of `configs/joint.py`: ResNet-50, two views of 64 slices of 128 x 128 a volume, the whole step with its
gradients and LARC. What the compiled step says of itself: temporary buffers, and its arguments (the state, which is
donated, and the batch). Nothing runs: a row costs its compilation. One line of JSON a row, in MiB.
"""
import argparse
import json
import pathlib
import sys
import time

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import joint  # noqa: E402
from unimiss_jax import optim, sharding, step, validate  # noqa: E402
from unimiss_jax.methods import base  # noqa: E402

MIB, RECORDS = 1 << 20, 3072


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument('--parts', default='1,4,16')
  p.add_argument('--remat', default=',blocks', help='values of model.remat, comma separated')
  p.add_argument('--batch', type=int, default=1, help='volumes')
  p.add_argument('--phase', default='inter', choices=('inter', 'mask'))
  p.add_argument('--out', default='')
  f = p.parse_args()
  lines = []
  for remat in f.remat.split(','):
    for parts in map(int, f.parts.split(',')):
      lines.append(json.dumps(row(f.phase, f.batch, parts, remat)))
      print(lines[-1], flush=True)
  if f.out:
    pathlib.Path(f.out).write_text('\n'.join(lines) + '\n')
  return 0


def row(phase: str, batch: int, parts: int, remat: str) -> dict:
  c = joint.get_config('plain').unlock()
  c.batch.ct, c.joint.slice_parts, c.model.remat = batch, parts, remat
  validate.validate(c)
  method = base.make(c, {'ct': (RECORDS, {}), 'xray': (RECORDS, {})})
  optimiser = optim.of(c, method)
  state = jax.eval_shape(step.make_init(c, method, optimiser), jax.random.key(0), {})
  like = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype)
  rows = {'ct': like(np.float32, 2, *c.views.ct.size, 1), 'id': like(np.int32), 'bad': like(bool),
          'rng': like(np.uint32, 2)}
  began, mesh = time.monotonic(), sharding.make_mesh(1, 1, jax.devices()[:1])
  one_step = step.make_step(c, method, optimiser, phase, mesh)
  memory = jax.jit(one_step, donate_argnums=0).lower(state, {'ct': rows}).compile().memory_analysis()
  return {'phase': phase, 'volumes': batch, 'remat': remat, 'parts': parts,
          'temp': round(memory.temp_size_in_bytes / MIB), 'argument': round(memory.argument_size_in_bytes / MIB),
          'compiled_in_s': round(time.monotonic() - began)}


if __name__ == '__main__':
  sys.exit(main())
