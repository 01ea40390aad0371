"""CPU cost of one CT sample on the host, stage by stage, beside the stack of the released UniMiSS+ code.

  python benchmarks/input.py [--peer=PYTHON] [--samples=40] [--rounds=3] [--out=FILE.json]

One sample: decode a 24 x 250 x 250 int16 record from memory, two 3-D views of 16 x 96 x 96, two axial DRR views of
96 x 96, all augmentation of configs/unimiss_plus.py:plain. The peer (nibabel, OpenCV, batchgenerators 0.25, Pillow)
makes the same two 3-D views and reads its DRR from a PNG file in memory; gunzip is timed apart and not counted. It
runs in the interpreter --peer, which needs: pip install torch nibabel opencv-python-headless 'batchgenerators==0.25.*'

One core, one thread; CPU seconds of the process, median over rounds of the mean over samples; both take turns.
`stream` is what a row of a batch costs and ships, by data.place, with and without DRR.
`floor_ms` of a stage = bytes that it must read and write / bandwidth of a plain copy from main memory; of the noise
the fastest bare generator of numpy. It is a yardstick: what stays in the cache moves faster than that copy.
"""
import argparse
import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
  os.environ[_name] = '1'

import numpy as np  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPE, VIEW, SIDE = (24, 250, 250), (16, 96, 96), 96
SPACING_MM = (2.5, 1.5, 1.5)
NO_DRR = dict(drr=0., recon_drr=0., pair_nce=0.)
PLACES = {'host': ('host', {}), 'device': ('device', {}), 'host, no DRR': ('host', NO_DRR),
          'device, no DRR': ('device', NO_DRR)}      # data.place, leaves of loss


class Clock:
  """CPU seconds per stage, summed over samples."""

  def __init__(self):
    self.seconds = {}

  @contextmanager
  def __call__(self, stage):
    began = time.process_time()
    yield
    self.seconds[stage] = self.seconds.get(stage, 0.) + time.process_time() - began


def chest() -> np.ndarray:
  """A phantom on the grid of the record."""
  from scipy import ndimage

  from data_pipelines import phantom
  hu = phantom.make(0, 0).hu[::2].astype(np.float32)
  zoomed = ndimage.zoom(hu, np.divide(SHAPE, hu.shape), order=1, grid_mode=True, mode='nearest')
  return np.clip(np.rint(zoomed), -1024, 3071).astype(np.int16)


# ---- ours

def ours(raw: bytes, samples: int, seed: int):
  """-> (ms per sample through the stream's own functions, {stage: ms})."""
  from configs import unimiss_plus
  from data_pipelines import draw, sample
  from unimiss_jax.drr import geometry, project, xray
  from unimiss_jax.views import image, volume

  config = unimiss_plus.get_config('plain')
  decode = lambda: np.frombuffer(raw, np.int16).reshape(SHAPE)

  def whole(rng):
    record = {'volume': decode(), 'spacing_mm': SPACING_MM}
    return sample.ct_sample(record, draw.ct_pair(rng, config, SHAPE, SPACING_MM), config)

  def staged(rng, clock):
    with clock('decode'):
      hu = decode()
    with clock('draw'):
      params = draw.ct_pair(rng, config, SHAPE, SPACING_MM)
    cfg, views = config.views.ct, []
    for p in ({k: v[i] for k, v in params['ct'].items()} for i in range(2)):
      with clock('3d crop, flip, resize'):
        x = volume.crop_resize(hu, p['box_start'], p['box_size'], p['flip'], cfg.size, cfg.resize, cfg.pad_hu)
      with clock('3d noise'):
        x = volume.noise(x, p['noise_std'], p['noise_key'])
      with clock('3d blur'):
        x = volume.blur(x, p['blur_sigma'], cfg.blur_sigma[1])
      with clock('3d brightness'):
        x = x * p['mul'][:, None, None] + p['add'][:, None, None]
      with clock('3d contrast'):
        x = volume.contrast(x, p['contrast'], cfg.aug_unit)
      with clock('3d gamma'):
        views.append(volume.gamma(x, p['gamma'], cfg.aug_unit, cfg.gamma_stats))
    with clock('drr attenuation'):
      mu, unit = xray.attenuation(hu, config.drr.mu)
    p_ref, images = sample.white(config.drr.view, SHAPE, SPACING_MM, config.drr.mu), []
    for p in ({k: v[i] for k, v in params['drr'].items()} for i in range(2)):
      with clock('drr projection'):
        source, film = geometry.camera(config.drr.view, p['center_mm'], p['pitch_mm'], (SIDE, SIDE),
                                       config.drr.sdd_mm, config.drr.sod_mm, p['offset_mm'])
        line_integrals = project(mu, SPACING_MM, source, film, config.drr.kind) * np.float32(unit)
        plain = xray.to_image(line_integrals, config.drr.image, p_ref)
      with clock('2d augmentation'):
        images.append(image.photometric(plain, p))
    with clock('stack'):
      return np.stack(views)[..., None], np.repeat(np.stack(images)[..., None], 3, -1)

  a, b = whole(np.random.default_rng(seed)), staged(np.random.default_rng(seed), Clock())
  assert np.array_equal(a['ct'], b[0]) and np.array_equal(a['drr'], b[1]), 'the stages are not the sample any more'
  rng = np.random.default_rng(seed)
  began = time.process_time()
  for _ in range(samples):
    whole(rng)
  total = (time.process_time() - began) / samples * 1e3
  clock, rng = Clock(), np.random.default_rng(seed)
  for _ in range(samples):
    staged(rng, clock)
  return total, {k: v / samples * 1e3 for k, v in clock.seconds.items()}


def streamed(hu: np.ndarray, samples: int, place: str, **leaves) -> tuple[float, int]:
  """(CPU ms, bytes) of a row that comes through the stream: threads, random numbers, batching included.

  place: data.place. leaves: of loss.
  """
  from configs import unimiss_plus
  from data_pipelines import streams

  class Source:
    read, largest = 0, {'volume': SHAPE}

    def __len__(self):
      return 1000

    def __getitem__(self, i):
      self.read += 1
      return {'volume': hu, 'spacing_mm': SPACING_MM, 'index': i, 'bad': False}

  config, source = unimiss_plus.get_config('plain'), Source()
  with config.unlocked():
    config.batch.ct, config.data.place = 4, place
    config.loss.update(leaves)
  stream = streams.Stream('ct', config, source)
  stream.next()
  began, read = time.process_time(), source.read
  while source.read - read < samples:
    stream.next()
  out = (time.process_time() - began) / (source.read - read) * 1e3
  stream.close()
  return out, sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in stream.spec.values())


def floors() -> tuple[float, dict]:
  """(copy bandwidth in GB/s, {stage: ms}): best of several runs."""
  a = np.ones(64 << 20, np.uint8)
  b = np.empty_like(a)

  def seconds(f, n):
    f()
    best = np.inf
    for _ in range(n):
      began = time.process_time()
      f()
      best = min(best, time.process_time() - began)
    return best

  bandwidth = 2 * a.nbytes / seconds(lambda: np.copyto(b, a), 10)
  view, record = 4 * int(np.prod(VIEW)), 2 * int(np.prod(SHAPE))
  crop = 2 * VIEW[0] * 96 * 96    # int16; a crop factor of 1 on average
  image = 4 * SIDE * SIDE
  touched = {'3d crop, flip, resize': 2 * (crop + view), '3d blur': 2 * 2 * view, '3d brightness': 2 * 2 * view,
             '3d contrast': 2 * 2 * view, '3d gamma': 2 * 2 * view, 'drr attenuation': record * 3,
             'drr projection': 2 * record * 2, '2d augmentation': 2 * 2 * image, 'stack': 2 * (2 * view + 4 * image)}
  out = {k: v / bandwidth * 1e3 for k, v in touched.items()}
  x = np.empty(VIEW, np.float32)
  out['3d noise'] = np.inf
  for kind in (np.random.PCG64, np.random.Philox, np.random.SFC64):
    random = np.random.Generator(kind(0))
    once = seconds(lambda r=random: [r.standard_normal(out=x, dtype=np.float32) for _ in range(2)], 20)
    out['3d noise'] = min(out['3d noise'], once * 1e3)
  return bandwidth / 1e9, out


# ---- the released stack

def peer(folder: pathlib.Path, samples: int, seed: int):
  """-> ({stage: ms}) of the released recipe, from the libraries that it uses."""
  import cv2
  import nibabel as nib
  from batchgenerators.transforms import color_transforms as color
  from batchgenerators.transforms import noise_transforms as noise
  from PIL import Image, ImageEnhance, ImageFilter

  cv2.setNumThreads(1)
  raw, packed, png = ((folder / n).read_bytes() for n in ('x.nii', 'x.nii.gz', 'x.png'))
  rng = np.random.default_rng(seed)
  np.random.seed(seed)

  def operations(unit, mul, add):
    return [('3d noise', noise.GaussianNoiseTransform(data_key='image')),
            ('3d blur', noise.GaussianBlurTransform((.1, 2.), different_sigma_per_channel=True, p_per_channel=unit,
                                                    p_per_sample=.8, data_key='image')),
            ('3d brightness', color.BrightnessMultiplicativeTransform((.75, 1.25), p_per_sample=mul, data_key='image')),
            ('3d brightness', color.BrightnessTransform(0., .4, True, p_per_sample=add, p_per_channel=.8,
                                                        data_key='image')),
            ('3d contrast', color.ContrastAugmentationTransform(data_key='image')),
            ('3d gamma', color.GammaTransform((.7, 1.5), False, per_channel=True, retain_stats=True,
                                              p_per_sample=mul, data_key='image'))]

  three_d = [operations(.8, .8, .8), operations(.5, 1., .5)]

  def crop(volume, low, high):
    size = [int(SIDE * f) for f in rng.uniform(low, high, 2)]
    size = [s if s < n else SIDE for s, n in zip(size, volume.shape[1:])]
    y, x = (rng.integers(0, n - s + 1) for n, s in zip(volume.shape[1:], size))
    return volume[:, y:y + size[0], x:x + size[1]]

  def two_d(image, blur_p):
    area, aspect = image.width * image.height * rng.uniform(.3, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = (min(int(s), n) for s, n in zip((np.sqrt(area * aspect), np.sqrt(area / aspect)), image.size))
    x, y = rng.integers(0, image.width - w + 1), rng.integers(0, image.height - h + 1)
    image = image.crop((x, y, x + w, y + h)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if rng.random() < .5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < .8:
      for enhance, extent in ((ImageEnhance.Brightness, .4), (ImageEnhance.Contrast, .4), (ImageEnhance.Color, .2)):
        image = enhance(image).enhance(rng.uniform(1 - extent, 1 + extent))
      h, s, v = image.convert('HSV').split()
      image = Image.merge('HSV', (Image.fromarray(np.asarray(h) + np.uint8(rng.integers(25))), s, v)).convert('RGB')
    if rng.random() < .8:
      image = image.convert('L').convert('RGB')
    if rng.random() < blur_p:
      image = image.filter(ImageFilter.GaussianBlur(rng.uniform(.1, 2)))
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 255

  def one(clock):
    with clock('decode'):
      volume = nib.Nifti1Image.from_bytes(raw).get_fdata()
      volume = np.pad(volume, [(0, max(0, 256 - n)) for n in volume.shape[:2]] + [(0, 0)]).transpose(2, 0, 1)
    views = []
    with clock('3d crop, flip, resize'):
      block = crop(volume, 1.4, 1.8) / 1024.
    for chain in three_d:
      with clock('3d crop, flip, resize'):
        depth = rng.integers(0, SHAPE[0] - VIEW[0] + 1)
        x = crop(block, .8, 1.2)[depth:depth + VIEW[0]]
        x = x[tuple(slice(None, None, -1 if rng.random() < .8 else 1) for _ in range(3))]
        x = cv2.resize(x.transpose(1, 2, 0), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
        x = x.astype(np.float32)[None].copy()
      for stage, operation in chain:
        with clock(stage):
          x = operation(image=x)['image']
      views.append(x)
    with clock('drr from a file'):
      image = Image.open(io.BytesIO(png)).convert('RGB')
    with clock('2d augmentation'):
      images = [two_d(image, p) for p in (.5, 1.)]
    with clock('stack'):
      return np.stack(views), np.stack(images)

  one(Clock())
  clock, rounds = Clock(), range(samples)
  for _ in rounds:
    one(clock)
  out = {k: v / samples * 1e3 for k, v in clock.seconds.items()}
  clock = Clock()
  for _ in range(5):
    with clock('gunzip'):
      gzip.decompress(packed)
  return out, clock.seconds['gunzip'] / 5 * 1e3


def write_inputs(folder: pathlib.Path, hu: np.ndarray) -> None:
  import nibabel as nib
  from PIL import Image
  nifti = nib.Nifti1Image(np.ascontiguousarray(hu.transpose(2, 1, 0)), np.diag([*SPACING_MM[::-1], 1.]))
  nib.save(nifti, folder / 'x.nii')
  nib.save(nifti, folder / 'x.nii.gz')
  mean = hu.astype(np.float32).mean(0)
  Image.fromarray(np.rint((mean - mean.min()) / np.ptp(mean) * 255).astype(np.uint8)).save(folder / 'x.png')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', default=sys.executable, help='Python with batchgenerators')
  parser.add_argument('--samples', type=int, default=40)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--out', help='write the JSON there too')
  parser.add_argument('--run_peer', metavar='FOLDER', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  if args.run_peer:
    print(json.dumps(peer(pathlib.Path(args.run_peer), args.samples, 0)))
    return
  hu = chest()
  needs = [args.peer, '-c', 'import batchgenerators, cv2, nibabel, PIL']
  found = subprocess.run(needs, capture_output=True).returncode == 0
  mine, theirs, rows = [], [], {}
  with tempfile.TemporaryDirectory() as folder:
    write_inputs(pathlib.Path(folder), hu)
    for _ in range(args.rounds):
      mine.append(ours(hu.tobytes(), args.samples, 0))
      for name, (place, leaves) in PLACES.items():
        rows.setdefault(name, []).append(streamed(hu, args.samples, place, **leaves))
      if found:
        run = [args.peer, __file__, f'--run_peer={folder}', f'--samples={args.samples}']
        done = subprocess.run(run, capture_output=True, check=True, text=True)
        theirs.append(json.loads(done.stdout.splitlines()[-1]))
  median = lambda tables: {k: round(float(np.median([t[k] for t in tables])), 3) for k in tables[0]}
  bandwidth, floor = floors()
  total = float(np.median([t for t, _ in mine]))
  commit = subprocess.run(['git', '-C', str(ROOT), 'describe', '--always', '--dirty'], capture_output=True, text=True)
  result = {'sample': 'CT: two 3-D and two DRR views', 'commit': commit.stdout.strip() or None,
            'samples': args.samples, 'rounds': args.rounds,
            'ours_ms': round(total, 2), 'ours_samples_per_s': round(1e3 / total, 1),
            'stream': {name: {'ms': round(float(np.median([ms for ms, _ in got])), 2), 'bytes': got[0][1]}
                       for name, got in rows.items()}, 'stages_ms': median([s for _, s in mine]),
            'floor_ms': {k: round(v, 3) for k, v in floor.items()}, 'floor_sum_ms': round(sum(floor.values()), 2),
            'copy_gb_per_s': round(bandwidth, 1), 'peer': None}
  if found:
    stages = median([s for s, _ in theirs])
    peer_ms = sum(stages.values())
    result['peer'] = {'ms': round(peer_ms, 2), 'samples_per_s': round(1e3 / peer_ms, 1), 'stages_ms': stages,
                      'gunzip_ms_not_counted': round(float(np.median([g for _, g in theirs])), 2),
                      'times_ours': round(peer_ms / total, 2),
                      'times_ours_by_round': [round(sum(p[0].values()) / o[0], 2) for p, o in zip(theirs, mine)]}
  text = json.dumps(result, indent=2)
  print(text)
  if args.out:
    pathlib.Path(args.out).write_text(text + '\n')


if __name__ == '__main__':
  main()
