"""The test cases with the best, the middle and the worst score: the image, the truth and what was predicted."""
import numpy as np
from PIL import Image, ImageDraw

from unimiss_jax.report import sheets

SIDE = 224          # pixels, longest side of a picture
COLOURS = ((230, 60, 60), (70, 140, 240), (250, 190, 40), (90, 200, 120), (200, 100, 220), (60, 200, 210),
           (240, 130, 50), (150, 170, 60), (250, 120, 170), (130, 110, 240))


def ranks(scores) -> list[tuple[str, int]]:
  """(name, number) of the best, the middle and the worst of [N] scores; NaN are left out."""
  order = np.argsort(scores)[:int(np.isfinite(scores).sum())]
  if not len(order):
    return []
  found = {'worst': order[0], 'median': order[len(order) // 2], 'best': order[-1]}
  return [(name, int(i)) for name, i in found.items()]


def plane(image, *masks) -> tuple:
  """The slice of volumes [D, H, W(, C)] that holds most of the first mask, head up and the patient's right on the left;
  pictures [H, W(, C)] stay as they are."""
  if image.ndim == 2:
    return image, *masks
  covered = (masks[0] > 0).reshape(*masks[0].shape[:3], -1).any(-1)
  axis = 1 if image.shape[0] > 8 else 0                      # coronal, where there are slices enough
  at = int(covered.sum(tuple(a for a in range(3) if a != axis)).argmax())
  take = lambda x: np.take(x, at, axis)[::-1, ::-1]
  return take(image), *(take(m) for m in masks)


def overlay(image, mask, classes: int, exclusive: bool, aspect: float = 1.) -> Image.Image:
  """uint8 [H, W] with the outline of every class in its colour; aspect = height of a pixel / its width."""
  h, w = image.shape[0] * aspect, image.shape[1]
  size = tuple(max(1, round(n * SIDE / max(h, w))) for n in (w, h))
  rgb = np.repeat(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))[..., None], 3, -1).copy()
  for c in range(classes):
    one = mask == c + 1 if exclusive else mask[..., c] > 0
    big = np.asarray(Image.fromarray(one.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
    inner = big.copy()
    inner[1:-1, 1:-1] &= big[2:, 1:-1] & big[:-2, 1:-1] & big[1:-1, 2:] & big[1:-1, :-2]
    inner[[0, -1]] = inner[:, [0, -1]] = False
    rgb[big & ~inner] = COLOURS[c % len(COLOURS)]
  return Image.fromarray(rgb)


def segmentation(rows, classes, exclusive: bool) -> Image.Image:
  """One row a case: image, truth, prediction.

  Args:
    rows: (title, image uint8 [*S], truth, predicted, spacing_mm or None) of each case; label maps as of
      data_pipelines.labelled.
    classes: names.
    exclusive: as of task.exclusive.
  """
  step, line = SIDE + sheets.GAP, 16
  legend = line * -(-len(classes) // 4)
  out = Image.new('RGB', (3 * step + sheets.GAP, len(rows) * (step + line) + 2 * line + legend), (40, 40, 40))
  pen = ImageDraw.Draw(out)
  for k, name in enumerate(classes):
    at = sheets.GAP + (k % 4) * 3 * step // 4, line * (k // 4) + 2
    pen.rectangle((*at, at[0] + 10, at[1] + 10), fill=COLOURS[k % len(COLOURS)])
    pen.text((at[0] + 14, at[1]), name, fill=(255, 255, 255))
  for k, text in enumerate(('image', 'truth', 'predicted')):
    pen.text((sheets.GAP + k * step, legend + 2), text, fill=(200, 200, 200))
  for r, (title, image, truth, predicted, spacing) in enumerate(rows):
    shown, *masks = plane(image, truth, predicted)
    aspect = 1. if spacing is None or image.ndim == 2 else spacing[0] / spacing[2] if image.shape[0] > 8 else 1.
    y = legend + line + r * (step + line)
    pen.text((sheets.GAP, y + 2), title, fill=(255, 255, 255))
    for k, mask in enumerate((None, *masks)):
      mask = np.zeros_like(masks[0]) if mask is None else mask
      made = overlay(shown, mask, len(classes), exclusive, aspect)
      out.paste(made, (sheets.GAP + k * step, y + line))
      for letter, x in (('R', 2), ('L', made.width - 9)) if image.ndim == 3 else ():
        pen.text((sheets.GAP + k * step + x, y + line + 1), letter, fill=(255, 255, 255))
  return out
