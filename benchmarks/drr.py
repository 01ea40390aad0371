"""Speed of the DRR projector on one core beside two peers, every image with a geometry of its own.

  python benchmarks/drr.py [--peer=PYTHON] [--images=40] [--rounds=3] [--jax] [--out=FILE.json]

Cases: a 24 x 250 x 250 slab shown axially at 96 x 96 (training) and 256 x 256, and a 65 x 128 x 128 chest from behind.
Ours (`box`, `linear`) builds its weights for every image; inputs are float32 attenuation for all. Peers: a march with
scipy.ndimage.map_coordinates, one sample per slice plane, and DiffDRR 0.6.1 (Siddon, and trilinear with one sample per
slice) on the same rays, in the interpreter --peer, which needs: pip install diffdrr==0.6.1. `error` is the relative L2
distance to our image of the same signal model (map_coordinates, trilinear: linear; Siddon: box), so that speed is
compared on the same picture: rays and their weights agree, voxel and pixel models differ.

One core, one thread; CPU seconds of the process, best and median of rounds which take turns. `floor_ms` = bytes of the
volume / bandwidth of a plain copy in this run: what reading the volume once costs.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
  os.environ[_name] = '1'

import numpy as np  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# name: (shape, spacing in mm, view, pixels of a side)
CASES = {'slab_96': ((24, 250, 250), (1., 1., 1.), 'axial', 96),
         'slab_256': ((24, 250, 250), (1., 1., 1.), 'axial', 256),
         'chest_96': ((65, 128, 128), (4., 3., 3.), 'pa', 96)}


def volume(shape) -> np.ndarray:
  """A smooth random body in 1/mm with noise: nothing that an implementation could skip."""
  rng = np.random.default_rng(0)
  z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij')
  body = .02 * (y ** 2 + x ** 2 < .8) * (1 + .3 * np.sin(9 * x) * np.cos(7 * y + z))
  return (body + .002 * rng.random(shape)).astype(np.float32)


def cameras(case: str, images: int) -> list:
  """(source, detector) of random windows: area share U(.3, 1), aspect 3/4 .. 4/3, source moved by up to 20 mm."""
  from unimiss_jax.drr import geometry
  shape, spacing, view, side = CASES[case]
  rng, field = np.random.default_rng(1), np.array(geometry.field(view, shape, spacing))
  out = []
  for _ in range(images):
    aspect = np.exp(rng.uniform(-.28, .28))
    size = np.minimum(np.sqrt(field.prod() * rng.uniform(.3, 1) * np.array([1 / aspect, aspect])), field)
    center = rng.uniform(-.5, .5, 2) * (field - size)
    out.append(geometry.camera(view, center, size / side, (side, side), offset_mm=rng.uniform(-20, 20, 2)))
  return out


def targets(film) -> np.ndarray:
  """Centres of all pixels `[h, w, 3]` in mm."""
  rows, cols = (np.arange(n)[:, None] * np.array(step) for n, step in zip(film.shape, film[2:]))
  return np.array(film.origin_mm) + rows[:, None] + cols


def march(mu, spacing, source, film, axis: int) -> np.ndarray:
  """Trilinear samples where the rays cross the slice planes."""
  from scipy import ndimage
  source, spacing = np.array(source), np.array(spacing)
  ray = targets(film) - source                                      # [h, w, 3]
  z = (np.arange(mu.shape[axis]) - (mu.shape[axis] - 1) / 2) * spacing[axis]
  t = (z[:, None, None] - source[axis]) / ray[..., axis]             # [K, h, w]
  centre = (np.array(mu.shape) - 1) / 2
  at = [(source[i] + t * ray[..., i]) / spacing[i] + centre[i] for i in range(3)]
  step = np.linalg.norm(ray, axis=-1) / abs(ray[..., axis]) * spacing[axis]
  return ndimage.map_coordinates(mu, np.array(at, np.float32), order=1, prefilter=False).sum(0) * step


def diffdrr(folder: pathlib.Path, images: int) -> dict:
  """CPU ms per image of DiffDRR's two renderers on the rays of rays.npz; its first images."""
  import torch
  from diffdrr.renderers import Siddon, Trilinear
  torch.set_num_threads(1)
  data = np.load(folder / 'rays.npz')
  mu = torch.from_numpy(data['volume'])
  out, first = {}, {}
  for name, render, more in (('diffdrr_trilinear', Trilinear(), {'n_points': mu.shape[int(data['axis'])]}),
                             ('diffdrr_siddon', Siddon(), {})):
    times = []
    for i, (source, target, length) in enumerate(zip(data['source'][:images], data['target'], data['length'])):
      began = time.process_time()
      with torch.no_grad():
        image = render(mu, torch.from_numpy(source), torch.from_numpy(target), torch.from_numpy(length), **more)
      times.append(time.process_time() - began)
      first.setdefault(name, image.numpy().reshape(data['shape']) if not i else None)
    out[name] = float(np.mean(times)) * 1e3
  np.savez(folder / 'first.npz', **first)
  return out


def write_rays(folder: pathlib.Path, mu, spacing, views, axis: int) -> None:
  """The rays in voxel units, as DiffDRR's renderers take them: voxel i is centred on i."""
  centre = (np.array(mu.shape) - 1) / 2
  grid = [targets(film).reshape(1, -1, 3) for _, film in views]
  source = [np.array(s).reshape(1, 1, 3) for s, _ in views]
  length = [np.linalg.norm(t - s, axis=-1)[:, None] for s, t in zip(source, grid)]
  narrow = lambda arrays: np.array(arrays, np.float32)
  np.savez(folder / 'rays.npz', volume=mu, axis=axis, shape=views[0][1].shape, length=narrow(length),
           source=narrow([s / spacing + centre for s in source]), target=narrow([t / spacing + centre for t in grid]))


def seconds(f, n: int) -> float:
  f()
  best = np.inf
  for _ in range(n):
    began = time.process_time()
    f()
    best = min(best, time.process_time() - began)
  return best


def bandwidth() -> float:
  """Bytes per second that a copy reads."""
  a = np.ones(64 << 20, np.uint8)
  b = np.empty_like(a)
  return a.nbytes / seconds(lambda: np.copyto(b, a), 10)


def run_case(case: str, args, found: bool) -> dict:
  from unimiss_jax.drr import geometry, project
  shape, spacing, view, _ = CASES[case]
  mu, views, axis = volume(shape), cameras(case, args.images), geometry.VIEWS[view].axes[0]
  slow = max(1, args.images // 10)    # images of the slow ones
  forms = {'ours_box': (lambda s, f: project(mu, spacing, s, f, 'box'), args.images),
           'ours_linear': (lambda s, f: project(mu, spacing, s, f, 'linear'), args.images),
           'map_coordinates': (lambda s, f: march(mu, spacing, s, f, axis), slow)}
  if args.jax:
    forms |= jax_forms(mu, spacing, view)
  times, first = {}, {name: f(*views[0]) for name, (f, _) in forms.items()}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    if found:
      write_rays(folder, mu, spacing, views[:slow], axis)
    for _ in range(args.rounds):
      for form, (f, n) in forms.items():
        began = time.process_time()
        for camera in views[:n]:
          f(*camera)
        times.setdefault(form, []).append((time.process_time() - began) / n * 1e3)
      if found:
        done = subprocess.run([args.peer, __file__, f'--run_peer={folder}', f'--images={slow}'], capture_output=True,
                              check=True, text=True)
        for form, ms in json.loads(done.stdout.splitlines()[-1]).items():
          times.setdefault(form, []).append(ms)
    if found:
      first |= dict(np.load(folder / 'first.npz'))
  ours = float(np.min(times['ours_box']))
  result = {'floor_ms': round(mu.nbytes / args.bandwidth * 1e3, 3), 'volume_mb': round(mu.nbytes / 1e6, 1)}
  for form, ms in times.items():
    model = first['ours_box' if form in ('ours_box', 'diffdrr_siddon', 'jax_box') else 'ours_linear']
    result[form] = {'ms': round(min(ms), 3), 'median_ms': round(float(np.median(ms)), 3),
                    'images_per_s': round(1e3 / min(ms), 1), 'times_ours_box': round(min(ms) / ours, 2),
                    'error': float(f'{np.linalg.norm(first[form] - model) / np.linalg.norm(model):.1e}')}
  return result


def jax_forms(mu, spacing, view: str) -> dict:
  """The device form on the default device, wall clock where that is no CPU; compiled once for all views."""
  import jax

  from unimiss_jax.drr import Detector, geometry, project
  _, row, col = geometry.VIEWS[view].axes
  on_device = jax.device_put(mu)

  @jax.jit
  def render(source, origin, pitch, side):
    steps = [tuple(p if i == axis else 0. for i in range(3)) for axis, p in zip((row, col), pitch)]
    return project(on_device, spacing, source, Detector(side.shape, origin, *steps))

  def run(source, film):
    return np.asarray(render(source, film.origin_mm, (film.row_step_mm[row], film.col_step_mm[col]),
                             np.empty(film.shape, np.int8)))

  return {'jax_box': (run, 10)}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', default=sys.executable, help='Python with diffdrr')
  parser.add_argument('--images', type=int, default=40)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--jax', action='store_true', help='also the einsum form, on the default device')
  parser.add_argument('--out', help='write the JSON there too')
  parser.add_argument('--run_peer', metavar='FOLDER', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  if args.run_peer:
    print(json.dumps(diffdrr(pathlib.Path(args.run_peer), args.images)))
    return
  version = subprocess.run([args.peer, '-c', 'import diffdrr, torch; print(diffdrr.__version__, torch.__version__)'],
                           capture_output=True, text=True)
  found = version.returncode == 0
  args.bandwidth = bandwidth()
  result = {'unit': 'CPU ms per image, one core', 'images': args.images, 'rounds': args.rounds,
            'peer': version.stdout.strip().replace(' ', ', torch ') if found else 'diffdrr is not in --peer',
            'copy_reads_gb_per_s': round(args.bandwidth / 1e9, 1)}
  result |= {case: run_case(case, args, found) for case in CASES}
  text = json.dumps(result, indent=2)
  print(text)
  if args.out:
    pathlib.Path(args.out).write_text(text + '\n')


if __name__ == '__main__':
  main()
