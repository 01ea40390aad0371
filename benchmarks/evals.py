"""Cost of the evaluators: a linear probe, the memory of a sliding window over a large scan, surface distances.

  python benchmarks/evals.py [--out=FILE.json]

Probe: 2,000 embeddings of 768 numbers, 14 labels, the penalty chosen by 4 folds. Window: 512 x 512 x 300 voxels, 14
classes, patches of 48 x 192 x 192 that overlap by half, a network that costs nothing; the peak is that of a process of
its own. Surfaces: two bodies in 200^3 voxels, beside the library surface-distance (pip install surface-distance) in the
same run. One thread, CPU seconds.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time

for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
  os.environ[_name] = '1'

import numpy as np  # noqa: E402

from unimiss_jax.evals import probe, segmentation  # noqa: E402

SIZE, CLASSES, PATCH = (300, 512, 512), 14, (48, 192, 192)
GIB = 1 << 30


def seconds(f) -> float:
  began = time.process_time()
  f()
  return time.process_time() - began


def probes() -> dict:
  r = np.random.default_rng(0)
  x = r.normal(size=(2000, 768))
  y = (x[:, :14] + r.normal(size=(2000, 14)) > 0).astype(float)
  return {'ridge_s': seconds(lambda: probe.ridge(x, y, x))}


def window() -> dict:
  volume = np.zeros((*SIZE, 1), np.float32)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  answer = np.full((1, *PATCH, CLASSES), 1 / CLASSES, np.float32)
  cpu = seconds(lambda: segmentation.sliding_window(lambda x: answer, volume, PATCH, .5))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {'peak_gib': peak * 1024 / GIB, 'volume_and_python_gib': before * 1024 / GIB,
          'result_gib': np.prod(SIZE) * CLASSES * 4 / GIB, 'cpu_s': cpu}


def surfaces() -> dict:
  np.Inf = np.inf      # the library was written for numpy 1
  import surface_distance as library
  grid = np.indices((200, 200, 200)) - 100
  a = (grid**2).sum(0) < 70**2
  b = ((grid - 4)**2).sum(0) < 68**2
  mm = (1.5, .8, .8)
  ours = seconds(lambda: segmentation.hd95(a, b, mm))
  theirs = seconds(lambda: library.compute_robust_hausdorff(library.compute_surface_distances(a, b, mm), 95))
  return {'hd95_s': ours, 'library_s': theirs, 'ratio': theirs / ours}


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument('--out', default='')
  p.add_argument('--only', default='', help='window: that part alone, in this process')
  f = p.parse_args()
  if f.only == 'window':
    print(json.dumps(window()))
    return 0
  alone = subprocess.run([sys.executable, __file__, '--only=window'], capture_output=True, text=True, check=True)
  line = json.dumps({'probe': probes(), 'window': json.loads(alone.stdout), 'surfaces': surfaces()})
  print(line)
  if f.out:
    with open(f.out, 'w') as file:
      file.write(line + '\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
