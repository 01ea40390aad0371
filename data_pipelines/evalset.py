"""Samples that training never sees, as un-augmented centre views: phantoms with findings, or a labelled manifest.

Also the few records that the picture sheets show.
"""
import os
from concurrent import futures
from typing import NamedTuple

import numpy as np

from data_pipelines import cases, draw, files, labelled, manifest, phantom, readers, sample, sources, streams, studies
from data_pipelines.errors import DataError

HU_WINDOW, Z_WINDOW = (-1., 1.), (-2., 3.)      # of HU / 1024; of z-scores


class EvalSet(NamedTuple):
  views: dict      # {'ct': [N, 1, D, H, W, C], 'drr': [N, 1, h, w, 3], 'xray': [M, 1, h, w, 3]} float32
  labels: dict     # {'ct': {name: [N] 0/1}, 'xray': {name: [M] 0/1}}
  fit: dict        # {'ct': [N] bool, 'xray': [M] bool}: what kNN may learn from
  paired: bool     # row i of all three is one patient
  name: str
  studies: dict | None = None      # of studies.tests: images whose reports are known


def build(config):
  """What scores are computed on while a run goes on.

  An EvalSet of phantoms of the development range, or of the manifest that eval.knn names; of a task the Cases of its
  validation split. None where there is nothing: phantoms are CT and X-ray, so of a run on another modality only their
  X-rays are used; a task may have no validation split if eval.select is empty.
  """
  if 'task' in config:
    try:
      return cases.of(config, 'val')
    except DataError as e:
      if e.code != 'SPLIT_EMPTY' or config.eval.select:
        raise
      return None
  if 'unimedi' in config:
    made = studies.tests(config, config.eval.records)
    labels = {s: dict(zip(made['named'], made['attributes'][of].T)) for s, of in made['labels'].items()}
    fit = dict.fromkeys(labels, np.arange(config.eval.records) < config.eval.fit)
    return EvalSet(made['views'], labels, fit, False, 'phantom studies', made)
  if config.eval.knn:
    return _from_manifest(config)
  if config.data.modality == 'ct' or config.phases.xray:
    return _phantoms(config)
  files.say(f'no scores: phantoms are CT and X-ray, this run is data.modality={config.data.modality}. FIX: eval.knn='
            'a labelled manifest.jsonl')
  return None


def of_cases(of: cases.Cases, n: int) -> EvalSet:
  """The centre views of up to n cases of a task, spread over them; labels of a classification."""
  records = [of.record(i) for i in np.unique(np.linspace(0, len(of) - 1, n).astype(int))]
  labels = np.stack([r.get('label', ()) for r in records], 1)
  labels = dict(zip(of.classes, np.where(labels == labelled.UNKNOWN, np.nan, labels)))
  return EvalSet({of.stream: np.stack([of.plain(r)[None] for r in records])}, {of.stream: labels}, {}, False, of.name)


def centre_ct(record, config) -> dict:
  return sample.ct_sample(record, draw.ct_centre(config, *sample.sizes(record)), config)


def centre_xray(record, config) -> dict:
  return sample.xray_sample(record, draw.xray_centre(config, record['image'].shape), config)


def _phantoms(config) -> EvalSet:
  n, both = config.eval.records, config.data.modality == 'ct'
  cts = sources.PhantomCT(config.seed, n, part='development', whole=config.drr.scope == 'volume')
  rays = sources.PhantomXray(config.seed, n, part='development')

  def drawn(i):
    return (centre_ct(cts[i], config) if both else {}) | centre_xray(rays[i], config), cts.labels(i)
  with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    rows, found = zip(*pool.map(drawn, range(n)))
  labels = {name: np.array([of[name] for of in found]) for name in phantom.FINDINGS}
  fit = np.arange(n) < config.eval.fit
  of = ('ct', 'xray') if both else ('xray',)
  return EvalSet(_stack(rows), dict.fromkeys(of, labels), dict.fromkeys(of, fit), both, 'phantoms')


def _from_manifest(config) -> EvalSet:
  rows = manifest.usable(manifest.read(config.eval.knn))
  views, labels, fit = {}, {}, {}
  for kind, name in (('volume', 'ct'), ('image', 'xray')):
    part = [r for r in rows if r['kind'] == kind]
    if not part:
      continue
    made = [centre_ct(sources.one_ct(readers.of_row(r), config), config) if kind == 'volume'
            else centre_xray({'image': readers.image(r['path']).array}, config) for r in part]
    views |= _stack(made)
    known = sorted({k for r in part for k in r['label']})
    labels[name] = {k: np.array([_label(r['label'], k) for r in part]) for k in known}
    fit[name] = np.array([r['split'] == 'train' for r in part])
    if fit[name].all() or not fit[name].any():
      raise DataError('SPLIT_EMPTY', config.eval.knn, f'{kind}s: {int(fit[name].sum())} of {len(part)} rows are '
                      'split "train", the rest is the test part', 'give both splits rows')
  return EvalSet(views, labels, fit, False, config.eval.knn)


def _label(label: dict, finding: str) -> float:
  """0 or 1; NaN where a row says nothing about a finding; a row with a class is not of the other classes."""
  return label.get(finding, 0. if finding.startswith('class_') else np.nan)


def preview(config, of, n: int = 4) -> dict:
  """Some records of each stream for the picture sheets, spread over the source.

  Args:
    of: {name: Stream}.

  Returns:
    {stream: {'name': [str], 'centre': {field: [n, 1, ...]}, 'views': {field: [n, 2, ...]}}}; 'ct' also has
    'pixel_mm' [n, 3], size of a voxel (z, y, x) of its centre view, and 'window', what is shown as black and white.
  """
  out = {}
  for name, stream in of.items() if not {'task', 'unimedi'} & set(config) else ():
    which = sorted({int(i) for i in np.linspace(0, stream.records - 1, n)})
    records = [stream.source[i] for i in which]
    centre = [centre_ct(r, config) if name == 'ct' else centre_xray(r, config) for r in records]
    views = [streams.views(name, r, config, np.random.default_rng([config.seed, i])) for i, r in enumerate(records)]
    out[name] = {'name': [r['name'] for r in records], 'centre': _stack(centre), 'views': _stack(views)}
    if name == 'ct':
      boxes = [draw.ct_centre(config, *sample.sizes(r))['ct']['box_size'][0] for r in records]
      out[name]['pixel_mm'] = np.array([b * r['spacing_mm'] for b, r in zip(boxes, records)]) / config.views.ct.size
      out[name]['window'] = HU_WINDOW if config.data.modality == 'ct' else Z_WINDOW
  return out


def _stack(rows) -> dict:
  return {k: np.stack([r[k] for r in rows]) for k in rows[0]}
