"""A random CT sample from prepared shards, beside nibabel on .nii.gz and beside arrays that lie in memory; and the
memory that a worker of doctor and prepare takes.

  python benchmarks/shards.py [--samples=200] [--rounds=5] [--out=FILE.json]
  python benchmarks/shards.py --memory [--file=PATH] [--out=FILE.json]

Eight phantom scans of 80 x 256 x 256 (about 5 MB as .nii.gz), prepared with the defaults. A sample is a record (24
slices) and then either a box of 16 x 96 x 96 cut out of it, or the first 3-D view of configs/unimiss_plus.py:plain
(crop, resize, augmentation). CPU seconds of one thread, median over rounds of the mean over samples, all in turns.
Also: memory of a stream over 1,000 and over 10,000 records of 24 x 16 x 16.

--memory: peak of a process over one file (and over two, one after the other), less what it held before, over the int16
size of the volume: as it is stored, or as it is straightened or resampled where that is larger; 120 x 384 x 384 voxels
in the ways that files come, or --file.
"""
import argparse
import gzip
import json
import os
import pathlib
import statistics
import subprocess
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
  manifest.write(folder, [{'id': 'all', 'path': 'x', 'kind': 'subvolume', 'split': 'train'}], shards={})


# ---- memory of doctor and prepare

WORKER = f'''
import pathlib, sys, tempfile
sys.path.insert(0, {str(ROOT)!r})
import nibabel as nib, numpy as np
from data_pipelines import doctor, files, prepare
files.single_threaded_blas()
memory = lambda what: int(pathlib.Path('/proc/self/status').read_text().partition(what + ':')[2].split()[0]) << 10
def work(what, path, flags):
  if what == 'doctor':
    doctor.examine(path, workers=0, pictures=True)
  else:
    with tempfile.TemporaryDirectory() as out:
      assert prepare.main([path, '--out=' + out, '--workers=0', '--num_shards=1', *flags]) == 0
with tempfile.TemporaryDirectory() as folder:      # imports and caches
  small = np.random.default_rng(0).integers(-1000, 1000, (20, 20, 24)).astype(np.int16)
  nib.save(nib.Nifti1Image(small, np.diag([2., 2., 3., 1.])), folder + '/a.nii.gz')
  work(sys.argv[1], folder, [])
before = memory('VmRSS')
pathlib.Path('/proc/self/clear_refs').write_text('5')      # the peak begins anew
work(sys.argv[1], sys.argv[2], sys.argv[3:])
print(memory('VmHWM') - before)
'''
WAYS = {'doctor': ('doctor',), 'prepare': ('prepare',), 'prepare --tile=0': ('prepare', '--tile=0')}
SPACINGS = {'--spacing=1,.8,.8': 2, '--spacing=2,.4,.4': 4, '--spacing=4,1.6,1.6': 1}      # output over input, or 1


def peak(path, *how) -> int:
  """Bytes that a process of its own takes for the file."""
  done = subprocess.run([sys.executable, '-c', WORKER, how[0], str(path), *how[1:]], check=True, capture_output=True,
                        text=True)
  return int(done.stdout.split()[-1])


def kinds(folder) -> dict:
  """{name: file, or folder with two}: smooth HU with noise, 0.8 x 0.8 x 2 mm."""
  import nibabel as nib
  from scipy import ndimage
  rng, shape = np.random.default_rng(0), (384, 384, 120)
  hu = ndimage.zoom(rng.normal(0, 500, (24, 24, 8)), (16, 16, 15), order=1)
  hu = np.clip(hu + rng.normal(0, 10, shape), -1024, 2000)
  straight = np.diag([-.8, -.8, 2., 1.])
  sheared, turned, (c, s) = straight.copy(), np.eye(4), (np.cos(.2), np.sin(.2))
  sheared[1, 2], turned[1:3, 1:3] = .67, [[c, -s], [s, c]]
  affines = {'': straight, ' sheared': sheared, ' oblique': turned @ straight}
  out = {}
  for kind, how in (('int16', ''), ('int16', ' sheared'), ('int16', ' oblique'), ('int32', ''), ('float32', ''),
                    ('float32', ' sheared'), ('float64', ''), ('uint8 x 7.11', ' sheared')):
    dtype, _, slope = kind.partition(' x ')
    raw = (hu + 1024) / float(slope) if slope else hu
    image = nib.Nifti1Image((np.rint(raw) if dtype[:5] != 'float' else raw).astype(dtype), affines[how])
    where = folder / (kind + how).replace(' ', '_')
    where.mkdir()
    data = bytearray(image.to_bytes())
    if slope:
      header = image.header.copy()
      header['scl_slope'], header['scl_inter'], header['vox_offset'] = float(slope), -1024, 352
      data[:348] = header.binaryblock
    (where / 'a.nii.gz').write_bytes(gzip.compress(data, 1))
    out[kind + how] = where / 'a.nii.gz'
  twice = folder / 'int16' / 'b.nii.gz'
  twice.write_bytes((folder / 'int16' / 'a.nii.gz').read_bytes())
  return out | {'int16, two files': folder / 'int16'}


def memories(file=None) -> dict:
  """{kind of file: {way: peak over size}}."""
  from data_pipelines import readers

  def size(path):
    volume = readers.volume(path / 'a.nii.gz' if path.is_dir() else path)
    return 2 * max(volume.array.size, int(np.prod(volume.meta['shape_canon'])))
  with tempfile.TemporaryDirectory() as folder:
    found = {file: pathlib.Path(file)} if file else kinds(pathlib.Path(folder))
    out = {name: {way: peak(path, *how) / size(path) for way, how in WAYS.items()} for name, path in found.items()}
    if not file:
      path = found['int16']
      out |= {f'int16 {flag}': {'prepare': peak(path, 'prepare', flag) / size(path) / larger}
              for flag, larger in SPACINGS.items()}
  return out


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument('--samples', type=int, default=200)
  p.add_argument('--rounds', type=int, default=5)
  p.add_argument('--memory', action='store_true')
  p.add_argument('--file')
  p.add_argument('--out')
  f = p.parse_args()
  out = memories(f.file) if f.memory else samples(f)
  print(json.dumps(out, indent=1))
  if f.out:
    pathlib.Path(f.out).write_text(json.dumps(out))


def samples(f) -> dict:
  """Milliseconds of a sample on each way, and what a stream holds."""
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
  return {'ms': ms, 'record_MB': held[0]['volume'].nbytes / 1e6,
          'nibabel_over_shards': ms['nibabel .nii.gz, box'] / ms['shards, box'],
          'shards_over_memory_view': ms['shards, view'] / ms['memory, view'],
          'shards_over_memory_box': ms['shards, box'] / ms['memory, box'], 'stream_MB': sizes}


if __name__ == '__main__':
  main()
