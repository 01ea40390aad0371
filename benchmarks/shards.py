"""A random CT sample from prepared shards, beside nibabel on .nii.gz and beside arrays that lie in memory.

  python benchmarks/shards.py [--samples=200] [--rounds=5] [--out=FILE.json]

Eight phantom scans of 80 x 256 x 256 (about 5 MB as .nii.gz), prepared with the defaults. A sample is a record (24
slices) and then either a box of 16 x 96 x 96 cut out of it, or the first 3-D view of configs/unimiss_plus.py:plain
(crop, resize, augmentation). CPU seconds of one thread, median over rounds of the mean over samples, all in turns.
Also: memory of a stream over 1,000 and over 10,000 records of 24 x 16 x 16.
"""
import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
  os.environ[_name] = '1'

import numpy as np  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPE, BOX = (80, 256, 256), (16, 96, 96)


def scans(folder, count):
  import nibabel as nib
  from scipy import ndimage

  from data_pipelines import phantom
  for i in range(count):
    hu = phantom.make(0, i).hu[::2].astype(np.float32)
    hu = ndimage.zoom(hu, np.divide(SHAPE, hu.shape), order=1, grid_mode=True, mode='nearest')
    hu += np.random.default_rng(i).normal(0, 15, hu.shape)      # without noise gzip would be too good
    nib.save(nib.Nifti1Image(np.rint(hu).astype(np.int16).transpose(2, 1, 0)[::-1], np.diag([-1.4, 1.4, 3., 1.])),
             folder / f'{i}.nii.gz')


def measure(ways, samples, rounds) -> dict:
  """{way: CPU milliseconds of a sample}."""
  seconds = {name: [] for name in ways}
  for r in range(rounds):
    for name, way in ways.items():
      rng = np.random.default_rng(r)
      n = max(2, samples // 40) if name.startswith('nibabel') else samples
      began = time.process_time()
      for _ in range(n):
        way(rng)
      seconds[name].append((time.process_time() - began) / n)
  return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}


def rss() -> float:
  """MB of this process."""
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def memory(folder, count) -> float:
  """MB that 60 batches of a stream over `count` small records add, in a process of its own."""
  import subprocess
  code = f'''
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.shards import rss, small
from configs import unimiss_plus
from data_pipelines import streams
small({str(folder)!r}, {count})
config = unimiss_plus.get_config('phantom').unlock()
config.data.ct, config.batch.ct = {str(folder)!r}, 8
config.views.ct.size, config.views.drr.size = (8, 16, 16), 16
config.drr.scope = 'subvolume'
before = rss()
stream = streams.build(config, ['ct'])['ct']
for _ in range(60): stream.next()
print(rss() - before)
stream.close()
'''
  done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
  return float(done.stdout.split()[-1])


def small(folder, count) -> None:
  """A prepared folder of `count` tiny records."""
  from data_pipelines import manifest, records
  rng, shards = np.random.default_rng(0), 4
  lengths = [count // shards] * shards
  for s, n in enumerate(lengths):
    writer = records.Writer(records.folder(folder, 'ct') / records.shard_name('ct', 'train', s, shards), 'ct')
    for i in range(n):
      name = f'{s}-{i}'
      writer.write({'id': name, 'group': name, 'label': '{}', 'volume_id': name, 'z0': 0, 'whole': 0,
                    'volume': rng.integers(-1000, 1000, (24, 16, 16)).astype(np.int16),
                    'spacing_mm': np.float32([3, 2, 2])})
    writer.close()
  records.finish(folder, 'ct', {'train': lengths}, {'train': count}, 'small')
  manifest.write(folder, [{'id': 'all', 'path': 'x', 'kind': 'subvolume', 'split': 'train'}])


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument('--samples', type=int, default=200)
  p.add_argument('--rounds', type=int, default=5)
  p.add_argument('--out')
  f = p.parse_args()
  import nibabel as nib

  from configs import unimiss_plus
  from data_pipelines import draw, prepare, prepared
  from unimiss_jax.views import volume
  config = unimiss_plus.get_config('plain')
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / 'files').mkdir()
    scans(folder / 'files', 8)
    files = sorted((folder / 'files').iterdir())
    prepare.main([str(folder / 'files'), f'--out={folder / "out"}', '--workers=0'])
    source = prepared.PreparedCT(str(folder / 'out'))
    held = [source[i] for i in range(len(source))]
    pick = lambda rng: int(rng.integers(len(source)))

    def box(array, rng):
      at = [int(rng.integers(n - b + 1)) for n, b in zip(array.shape, BOX)]
      return array[tuple(slice(a, a + b) for a, b in zip(at, BOX))].astype(np.float32)

    def view(record, rng):
      params = draw.ct_pair(rng, config, record['volume'].shape, record['spacing_mm'])['ct']
      return volume.view(record['volume'], {k: v[0] for k, v in params.items()}, config.views.ct)

    def nifti(rng):
      array = np.asarray(nib.load(files[int(rng.integers(len(files)))]).dataobj)
      return array.transpose(2, 1, 0)
    ways = {'shards, box': lambda rng: box(source[pick(rng)]['volume'], rng),
            'memory, box': lambda rng: box(held[pick(rng)]['volume'], rng),
            'nibabel .nii.gz, box': lambda rng: box(nifti(rng), rng),
            'shards, view': lambda rng: view(source[pick(rng)], rng),
            'memory, view': lambda rng: view(held[pick(rng)], rng)}
    ms = measure(ways, f.samples, f.rounds)
    sizes = {n: memory(folder / f'small{n}', n) for n in (1000, 10000)}
  out = {'ms': ms, 'record_MB': held[0]['volume'].nbytes / 1e6,
         'nibabel_over_shards': ms['nibabel .nii.gz, box'] / ms['shards, box'],
         'shards_over_memory_view': ms['shards, view'] / ms['memory, view'],
         'shards_over_memory_box': ms['shards, box'] / ms['memory, box'], 'stream_MB': sizes}
  print(json.dumps(out, indent=1))
  if f.out:
    pathlib.Path(f.out).write_text(json.dumps(out))


if __name__ == '__main__':
  main()
