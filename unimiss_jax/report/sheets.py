"""Picture sheets: what the network is given, and what it reconstructs. Pillow only.

Display: frontal and sagittal planes with the head up; R and L are the patient's, as in a radiograph
(right of the patient on the left of the picture). Letters stand on un-augmented views only: a drawn
view may be mirrored.
"""
import numpy as np
from etils import epath
from PIL import Image, ImageDraw

TILE = 144          # pixels, longest side of a picture
GAP = 4


def planes(volume) -> list[tuple[np.ndarray, str, str]]:
  """[D, H, W] = [S, A, R] -> middle axial, coronal and sagittal plane, with the letters left and right of it."""
  d, h, w = (n // 2 for n in volume.shape)
  flip = volume[::-1, ::-1, ::-1]
  return [(flip[volume.shape[0] - 1 - d], 'R', 'L'), (flip[:, volume.shape[1] - 1 - h], 'R', 'L'),
          (flip[:, :, volume.shape[2] - 1 - w], 'A', 'P')]


def grey(image, low=0., high=1.) -> np.ndarray:
  return (np.clip((np.asarray(image, np.float32) - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


def tile(image, letters=('', ''), aspect: float = 1.) -> Image.Image:
  """uint8 [H, W] -> picture of TILE x TILE; aspect = height of a pixel / its width."""
  h, w = image.shape[0] * aspect, image.shape[1]
  scale = TILE / max(h, w)
  size = max(1, round(w * scale)), max(1, round(h * scale))
  out = Image.new('L', (TILE, TILE))
  at = (TILE - size[0]) // 2, (TILE - size[1]) // 2
  out.paste(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), at)
  pen = ImageDraw.Draw(out)
  for letter, x in zip(letters, (2, TILE - 9)):
    pen.text((x, 1), letter, fill=255)
  return out


def ct_tiles(volume, window, pixel_mm=None) -> list[Image.Image]:
  """[D, H, W] -> three planes: in true proportion and with letters where the voxel's size (z, y, x) is given, else
  stretched to a square. window: what is shown as black and white."""
  marks = pixel_mm is not None
  z, y, x = pixel_mm if marks else 1 / np.array(volume.shape)
  return [tile(grey(image, *window), (left, right) if marks else ('', ''), aspect)
          for (image, left, right), aspect in zip(planes(volume), (y / x, z / x, z / y))]


def image_tile(image, letters=('', '')) -> Image.Image:
  return tile(grey(image[..., 0]), letters)


def grid(rows: list[list[Image.Image]], head: list[str], names: list[str], title: str) -> Image.Image:
  """Rows of tiles under column heads, a name above every row."""
  step, line = TILE + GAP, 14
  size = GAP + step * max(len(head), *map(len, rows)), 2 * line + GAP + len(rows) * (step + line)
  out = Image.new('L', size, 40)
  pen = ImageDraw.Draw(out)
  pen.text((GAP, 1), title, fill=255)
  for i, text in enumerate(head):
    pen.text((GAP + i * step, line), text, fill=200)
  for r, row in enumerate(rows):
    y = 2 * line + r * (step + line)
    pen.text((GAP, y), names[r], fill=200)
    for i, picture in enumerate(row):
      out.paste(picture, (GAP + i * step, y + line))
  return out


def ct_sheet(preview, reconstruction, view: str, title: str) -> Image.Image:
  """One row a patient: un-augmented planes and DRR, then both views as trained on, each with its reconstruction.

  Without DRR their columns are left out. Of several sequences the first one is shown, and an axial plane of the others.
  """
  centre, views, window = preview['centre'], preview['views'], preview['window']
  drr, sequences = 'drr' in centre, range(1, centre['ct'].shape[-1])
  marks = ('A', 'P') if view == 'lateral' else ('R', 'L')
  plane = {'axial': 0, 'lateral': 2}.get(view, 1) if drr else 0      # of the CT: the one that the DRR looks onto
  head = ['axial', 'coronal', 'sagittal', *(f'sequence {c + 1}' for c in sequences), *['DRR'] * drr]
  for v in (1, 2):
    head += [f'CT view {v}' if drr else f'view {v}', *(['recon.'] if 'ct' in reconstruction else []),
             *[f'DRR view {v}'] * drr, *(['recon.'] if 'drr' in reconstruction else [])]
  rows = []
  for i in range(len(preview['name'])):
    shown = [ct_tiles(x, window, preview['pixel_mm'][i]) for x in np.moveaxis(centre['ct'][i, 0], -1, 0)]
    row = [*shown[0], *(shown[c][0] for c in sequences)] + ([image_tile(centre['drr'][i, 0], marks)] if drr else [])
    for v in range(2):
      x = views['ct'][i, v, ..., 0]
      row.append(ct_tiles(x, window)[plane])
      if 'ct' in reconstruction:
        low, high = x.min(), x.max()      # the target is the crop's own min-max
        row.append(ct_tiles(reconstruction['ct'][i, v, ..., 0] * (high - low) + low, window)[plane])
      if drr:
        row.append(image_tile(views['drr'][i, v]))
      if 'drr' in reconstruction:
        row.append(image_tile(reconstruction['drr'][i, v]))
    rows.append(row)
  return grid(rows, head, preview['name'], title)


def xray_sheet(preview, reconstruction, title: str) -> Image.Image:
  head = ['radiograph']
  for v in (1, 2):
    head += [f'view {v}', *(['recon.'] if 'xray' in reconstruction else [])]
  rows = []
  for i in range(len(preview['name'])):
    row = [image_tile(preview['centre']['xray'][i, 0])]
    for v in range(2):
      row.append(image_tile(preview['views']['xray'][i, v]))
      if 'xray' in reconstruction:
        row.append(image_tile(reconstruction['xray'][i, v]))
    rows.append(row)
  return grid(rows, head, preview['name'], title)


def write(workdir, step: int, preview: dict, reconstruction: dict, view: str) -> dict[str, Image.Image]:
  """report/<stream>_<step>.png for every stream of the preview; view: of the DRR; returns {path: picture}."""
  folder = epath.Path(workdir) / 'report'
  folder.mkdir(parents=True, exist_ok=True)
  out = {}
  for name, part in preview.items():
    title = f'{name}, step {step}'
    sheet = ct_sheet(part, reconstruction, view, title) if name == 'ct' else xray_sheet(part, reconstruction, title)
    path = folder / f'{name}_{step:07}.png'
    with path.open('wb') as f:
      sheet.save(f, 'PNG')
    out[str(path)] = sheet
  return out
