"""What the network of a run sees: nearest neighbours across dimensions, a map of its embeddings, what it reconstructs,
what its class token looks at, and its dense features, on patients that training never saw.
"""
from __future__ import annotations

import re

import jax
import numpy as np
from PIL import Image, ImageDraw

from unimiss_jax import models
from unimiss_jax.evals.knn import unit
from unimiss_jax.models.slices import middles
from unimiss_jax.porting import arch as architectures
from unimiss_jax.report import figures, sheets
from unimiss_jax.report.figures import Map, Picture

ROWS = 8               # samples of a call
QUERIES, NEAR = 6, 5   # rows and columns of the sheets of neighbours
SHOWN = 4              # samples of reconstructions and of 2-D maps
PLACES = 8             # along a row of the map of dense features, at least
SIDE = 160             # pixels of a frame of a volume
SHAPES = 'circles', 'squares', 'triangles'
CHOSEN = ' Of a volume the brightest of the slices that the teacher chooses.'
OWN, OTHER = (60, 200, 100), (90, 90, 90)      # frames around the own patient and around others


def figures_of(found, method, config, tests, teacher: dict | None = None) -> tuple[list, list]:
  """(figures, notes): all that this network and this evaluation set allow; the notes say what lacks and why.

  Args:
    found: `weights.Weights` of a run.
    method: methods.base.Method of the run.
    config: of the run.
    tests: data_pipelines.evalset.EvalSet.
    teacher: its parameters, where the method's embeddings ask for them beside the student's.
  """
  views = {k: x[:, 0] for k, x in tests.views.items()}
  out, notes = [], [f'Network: {found.branch} of {found.source}; {tests.name}, '
                    + ', '.join(f'{len(x)} {k}' for k, x in views.items()) + '.']

  def attempt(what, make):
    try:
      out.extend(make())
    except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as e:
      notes.append(f'{what}: not shown ({type(e).__name__}: {" ".join(str(e).split())[:160]}).')

  embedded = {}
  extra = {k: x for k, x in found.params.items() if k == 'batch_stats'} | ({'teacher': teacher} if teacher else {})

  def embed():
    apply = jax.jit(method.predict['embed'])
    embedded.update({k: _batched(lambda b, k=k: apply(found.params, extra, {k: b[:, None]})[k][:, 0], x)
                     for k, x in views.items()})
    widths = dict.fromkeys(e.shape[1] for e in embedded.values())      # volumes may have a space of their own
    return [embedding_map({k: e for k, e in embedded.items() if e.shape[1] == w}, tests.labels) for w in widths]

  def near():
    space = embedded
    if 'project' in method.predict:
      space = {k: np.asarray(method.predict['project'](found.params, {}, {k: x[:, None]})[k][:, 0])
               for k, x in embedded.items()}
    if 'planes' in method.predict and 'ct' in views:      # of a volume, the brightest of what the teacher chooses
      planes = jax.jit(method.predict['planes'])
      at = middles(_batched(lambda b: planes(found.params, extra, {'ct': b[:, None]})['ct'][:, 0], views['ct']),
                   config.model.patch_depth)
      chosen = np.stack([x[i].max(0, keepdims=True) for x, i in zip(views['ct'], at)])
      return neighbours(space, views | {'ct': chosen}, tests.paired, 'axial', CHOSEN)
    return neighbours(space, views, tests.paired, config.drr.view)

  attempt('map of embeddings', embed)
  attempt('neighbours', near)
  if 'reconstruct' in method.predict:
    attempt('reconstructions', lambda: reconstructions(method.predict['reconstruct'], found.params, views))
  attempt('attention and dense features', lambda: dense(found, config, views))
  return out, notes


def _batched(f, x) -> np.ndarray:
  """f of rows of one static size."""
  parts = []
  for start in range(0, len(x), ROWS):
    at = np.minimum(np.arange(start, start + ROWS), len(x) - 1)
    parts.append(np.asarray(f(x[at])))
  return np.concatenate(parts)[:len(x)]


def plane(x, view: str = 'pa') -> np.ndarray:
  """uint8 [h, w] of a sample: an image as it is, of a volume [D, H, W, 1] the plane that a DRR of this view shows."""
  if x.ndim == 3:
    return sheets.grey(x[..., 0])
  at = {'axial': 0, 'lateral': 2}.get(view, 1)
  return figures.large(sheets.grey(sheets.planes(x[..., 0])[at][0], -1, 1), (96, 96))


# ---- embeddings

def embedding_map(embedded: dict, labels: dict) -> Map:
  """The two first principal components of all embeddings together, each kind centred by its own mean.

  Args:
    embedded: {'ct', 'drr', 'xray': [N, E]}. labels: {'ct', 'xray': {name: [N]}}; a DRR has those of its CT.
  """
  kinds = list(embedded)
  x = np.concatenate([unit(e, e.mean(0)) for e in embedded.values()])
  _, s, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
  share = (s**2 / max((s**2).sum(), 1e-12))[:2]
  of = {k: labels.get('ct' if k == 'drr' else k, {}) for k in kinds}
  names = sorted(set().union(*of.values())) or ['(no label)']
  value = lambda k, name, i: float(of[k][name][i]) if name in of[k] and np.isfinite(of[k][name][i]) else None
  each = [(k, i) for k in kinds for i in range(len(embedded[k]))]
  shapes = ', '.join(f'{k}: {shape}' for k, shape in zip(kinds, SHAPES))
  note = (f'First two principal components ({share[0]:.0%} and {share[1]:.0%} of the variance), each kind centred. '
          f'{shapes}; blue: without the finding, orange: with it.')
  return Map('Embeddings by label', note, [[round(float(v), 4) for v in p] for p in (x - x.mean(0)) @ axes[:2].T],
             [k for k, _ in each], [str(i) for _, i in each],
             {name: [value(k, name, i) for k, i in each] for name in names})


def neighbours(space: dict, views: dict, paired: bool, view: str, more: str = '') -> list[Picture]:
  """Sheets: some images and the volumes nearest to them, and back.

  Args:
    space: {kind: [N, D]}, where they are compared, by cosine, each kind centred by its own mean.
    paired: row i of all kinds is one patient.
    more: a sentence for the note.
  """
  out = []
  for query, gallery, own in (('xray', 'ct', paired), ('drr', 'ct', True), ('ct', 'xray', paired)):
    if not {query, gallery} <= space.keys() or space[query].shape[1] != space[gallery].shape[1]:
      continue
    q, g = (unit(space[k], space[k].mean(0)) for k in (query, gallery))
    order = np.argsort(-(q @ g.T), 1)
    rows = np.linspace(0, len(q) - 1, min(QUERIES, len(q))).astype(int)
    rank = [int(np.flatnonzero(order[i] == i)[0]) + 1 for i in rows] if own else []
    tiles = [[(plane(views[query][i], view), None)]
             + [(plane(views[gallery][j], view), own and i == j) for j in order[i, :NEAR]] for i in rows]
    names = [f'{query} {i}' + (f': own {gallery} is number {r}' if own else '')
             for i, r in zip(rows, rank or [0] * len(rows))]
    note = f'Left the {query}, then the {NEAR} nearest of {len(g)} {gallery}' + (
        '; the own patient in a green frame.' if own else '.') + more
    out.append(Picture(f'Nearest neighbours: {query} to {gallery}', note, figures.encoded(_sheet(tiles, names))))
  return out


def _sheet(rows, names) -> Image.Image:
  """Rows of (uint8 [h, w], own or not, None = no frame) with a name above each."""
  side, gap, line = sheets.TILE, 6, 16
  out = Image.new('RGB', (gap + max(map(len, rows)) * (side + gap), len(rows) * (side + gap + line)), (28, 28, 28))
  pen = ImageDraw.Draw(out)
  for r, (row, name) in enumerate(zip(rows, names)):
    y = r * (side + gap + line)
    pen.text((gap, y + 2), name, fill=(230, 230, 230))
    for c, (picture, own) in enumerate(row):
      x = gap + c * (side + gap)
      if own is not None:
        pen.rectangle((x - 3, y + line - 3, x + side + 2, y + line + side + 2), fill=OWN if own else OTHER)
      out.paste(Image.fromarray(figures.large(picture, (side, side))), (x, y + line))
  return out


# ---- reconstructions

def reconstructions(reconstruct, params, views: dict) -> list[Picture]:
  """Input, reconstruction and their difference, of a volume its middle coronal plane."""
  out, apply = [], jax.jit(lambda p, b: reconstruct(p, {}, b))
  for kind, x in views.items():
    given = x[:SHOWN]
    made = apply(params, {kind: given[:, None]}).get(kind)
    if made is None:
      continue
    made, tiles, errors = np.asarray(made)[:, 0], [], []
    for one, again in zip(given, made):
      if one.ndim == 4:
        one = (one - one.min()) / max(np.ptp(one), 1e-6)      # the target is the crop's own min-max
        one, again = (sheets.planes(v[..., 0])[1][0] for v in (one, again))
      else:
        one, again = one[..., 0], again[..., 0]
      errors.append(float(np.mean((one - again)**2)))
      shown = [sheets.grey(one), sheets.grey(again), figures.heat(np.abs(one - again) / .25)]
      tiles.append([(figures.large(t, (96, 96)), None) for t in shown])
    names = [f'{kind} {i}: mean squared error {e:.4f}' for i, e in enumerate(errors)]
    out.append(Picture(f'Reconstruction: {kind}', 'Input, reconstruction, absolute difference (black 0, light yellow '
                       '0.25 of the range).', figures.encoded(_sheet(tiles, names))))
  return out


# ---- attention and dense features

def dense(found, config, views: dict) -> list[Picture]:
  """Of images a sheet, of one volume a browser through its slices: input, what the class token looks at in the last
  block (mean of the heads), and the three principal components of the deepest map with enough places as colours."""
  model = models.build(config.model)
  apply = jax.jit(lambda p, x: model.apply(p, x, decode=False, mutable=['intermediates']))
  params = {'params': {k: v for k, v in found.params['backbone'].items() if architectures.in_encoder((k,))}}
  params |= {k: x for k, x in found.params.items() if k == 'batch_stats'}
  out = []
  for kind in (k for k in ('xray', 'ct') if k in views and (k == 'xray' or 'joint' not in config)):
    x = views[kind][:SHOWN if kind == 'xray' else 1]
    (_, pyramid, _), more = apply(params, x)
    maps = np.asarray(next((m for m in pyramid[::-1] if m.shape[-2] >= PLACES), pyramid[-1]))
    looked = _class_row(more.get('intermediates', {}), pyramid[-1].shape[1:-1])
    rgb = components(maps)
    parts = ['input'] + ['attention of the class token'] * (looked is not None) + ['principal components of features']
    note = f'From the left: {", ".join(parts)}; grids {looked.shape[1:] if looked is not None else "-"} and ' \
           f'{maps.shape[1:-1]}.'
    if kind == 'xray':
      tiles = [[(sheets.grey(one[..., 0]), None)] + ([(figures.heat(looked[i]), None)] if looked is not None else [])
               + [(rgb[i], None)] for i, one in enumerate(x)]
      out.append(Picture('Attention and dense features: xray', note, figures.encoded(
          _sheet(tiles, [f'xray {i}' for i in range(len(x))]))))
    else:
      out += [_browser(name, axis, x[0, ..., 0], None if looked is None else looked[0], rgb[0], note)
              for axis, name in enumerate(('axial', 'coronal', 'sagittal'))]
  return out


def components(maps) -> np.ndarray:
  """[N, *S, C] -> [N, *S, 3] uint8: the three first principal components over all places, 2 to 98 % of each."""
  x = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
  x = x - x.mean(0)
  _, axes = np.linalg.eigh(x.T @ x)
  y = x @ axes[:, ::-1][:, :3]
  y = y * np.where(np.abs(y.max(0)) < np.abs(y.min(0)), -1, 1)      # a sign that does not hang on the solver
  low, high = np.percentile(y, (2, 98), axis=0)
  return (np.clip((y - low) / np.maximum(high - low, 1e-9), 0, 1) * 255).astype(np.uint8).reshape(*maps.shape[:-1], -1)


def _class_row(sown: dict, grid: tuple) -> np.ndarray | None:
  """[N, *grid] in [0, 1] from what the attentions kept, [N, heads, 1 + places] each: of the last block that looks at
  this grid; None where there is no class token."""
  kept = [(jax.tree_util.keystr(path), row) for path, row in jax.tree_util.tree_flatten_with_path(sown)[0]]
  rows = [np.asarray(row).mean(1)[:, 1:] for path, row in sorted(kept, key=lambda k: _natural(k[0]))
          if 'class_row' in path and row.shape[-1] == int(np.prod(grid)) + 1]
  if not rows:
    return None
  row = rows[-1].reshape(-1, *grid)
  axes = tuple(range(1, row.ndim))
  return (row - row.min(axes, keepdims=True)) / np.maximum(np.ptp(row, axis=axes, keepdims=True), 1e-12)


def _natural(text: str) -> list:
  """Key that orders block2 before block10."""
  return [int(t) if t.isdigit() else t for t in re.split(r'(\d+)', text)]


def _browser(name, axis, volume, looked, rgb, note) -> Picture:
  """A strip of frames along an axis of [S, A, R], oriented as in sheets, stretched to a square."""
  frames, n = [], volume.shape[axis]
  cut = lambda v, i: np.take(v[::-1, ::-1, ::-1], min(i * v.shape[axis] // n, v.shape[axis] - 1), axis)
  step = max(n // 48, 1)
  for i in range(0, n, step):
    parts = [sheets.grey(cut(volume, i), -1, 1)]
    parts += [figures.heat(cut(looked, i))] if looked is not None else []
    frame = Image.fromarray(np.concatenate([_rgb(figures.large(p, (SIDE, SIDE))) for p in [*parts, cut(rgb, i)]], 1))
    pen = ImageDraw.Draw(frame)
    for letter, x in zip('AP' if axis == 2 else 'RL', (2, SIDE - 9)):
      pen.text((x, 1), letter, fill=(255, 255, 255))
    frames.append(np.asarray(frame))
  strip = figures.encoded(figures.strip(frames))
  return Picture(f'Dense features of a volume: {name} slices', note, strip, len(frames), 1.5)


def _rgb(x) -> np.ndarray:
  return x if x.ndim == 3 else np.repeat(x[..., None], 3, -1)
