"""The embedded default data: a seeded, random-access thorax as a CT, with labels, a radiograph and a report.

Seven findings, each with probability 1/2 and independent of the others:

| label | 1 against 0 |
|---|---|
| nodule | sphere against rod or plate of equal volume |
| effusion_side | right against left; always present |
| consolidation_lobe | upper against lower; always present |
| consolidation_side | right against left |
| cardiomegaly | heart 1.28-1.45 against .90-1.05 |
| scoliosis | lateral curve of 20-30 mm against less than 4 mm |
| reticular | lung texture of 4.5 against 14 mm, same variance |

Pose, body, contrast, noise and a bright distractor are drawn independently of the labels, and so is the amount of
each finding. All of it is chosen by us; nothing is derived from patients.
"""
from typing import NamedTuple

import numpy as np

from data_pipelines.phantom import chest as body
from data_pipelines.phantom import frame, organs, parenchyma, skeleton
from data_pipelines.phantom.chest import ORGANS
from data_pipelines.phantom.dictation import report
from data_pipelines.phantom.radiograph import outlines, xray

__all__ = ['FINDINGS', 'INDICES', 'ORGANS', 'Phantom', 'make', 'outlines', 'report', 'xray']

FINDINGS = ('nodule', 'effusion_side', 'consolidation_lobe', 'consolidation_side', 'cardiomegaly', 'scoliosis',
            'reticular')
INDICES = {'ct': range(0, 10_000_000), 'xray': range(10_000_000, 20_000_000),
           'development': range(20_000_000, 21_000_000), 'heldout': range(21_000_000, 22_000_000)}


class Phantom(NamedTuple):
  hu: np.ndarray                      # int16 [D, H, W] = [S, A, R], clipped to [-1024, 3071]
  spacing_mm: tuple[float, float, float]    # (z, y, x)
  affine: np.ndarray                  # [4, 4]: indices (z, y, x, 1) to RAS mm
  organs: np.ndarray                  # uint8 [D, H, W], values index ORGANS
  labels: dict[str, int]              # finding -> 0 or 1


def make(seed: int, index: int, kernel: str | None = None) -> Phantom:
  """Patient number `index` of the world `seed`: the same in any order and any process.

  Args:
    index: which patient; `INDICES` keeps uses apart.
    kernel: noise of the scanner, 'train' or 'heldout'; None = 'heldout' for the held-out indices only.

  Raises:
    ValueError: an unknown kernel.
  """
  kernel = kernel or ('heldout' if index in INDICES['heldout'] else 'train')
  if kernel not in parenchyma.KERNELS:
    raise ValueError(f'phantom kernel "{kernel}" unknown: expected one of {", ".join(parenchyma.KERNELS)}')
  rng = np.random.default_rng([seed, index])
  labels = dict(zip(FINDINGS, rng.integers(0, 2, len(FINDINGS)).tolist()))
  place = frame.place(rng)
  chest = body.draw(rng, place, labels['scoliosis'])
  canvas, cage = body.paint_body(rng, place, chest)
  dome = body.diaphragm(chest, place)
  right = body.lungs(chest, canvas, cage, dome, rng.uniform(.85, 1.2))
  organs.paint_abdomen(rng, canvas, chest, cage, dome)
  heart = organs.paint_heart(rng, canvas, chest, labels['cardiomegaly'])
  hila = organs.paint_vessels(rng, canvas, chest, heart)
  skeleton.paint(rng, canvas, chest, cage)
  parenchyma.fill_lungs(rng, canvas, labels, right, hila)
  parenchyma.paint_nodule(rng, canvas, labels['nodule'])
  parenchyma.paint_distractor(rng, canvas, chest)
  noise = parenchyma.window(rng, parenchyma.KERNELS[kernel][rng.integers(len(parenchyma.KERNELS[kernel]))])
  hu = canvas.hu + np.float32(rng.uniform(12, 35)) * noise
  hu = np.rint(np.clip(hu, -1024, 3071, out=hu), out=hu).astype(np.int16)
  return Phantom(hu, frame.SPACING_MM, affine(), canvas.organs, labels)


def affine() -> np.ndarray:
  """Indices (z, y, x, 1) to RAS mm, the volume's centre at 0."""
  matrix = np.zeros((4, 4))
  for row, axis in enumerate((2, 1, 0)):               # R from x, A from y, S from z
    matrix[row, axis] = frame.SPACING_MM[axis]
    matrix[row, 3] = -frame.SPACING_MM[axis] * (frame.SHAPE[axis] - 1) / 2
  matrix[3, 3] = 1
  return matrix
