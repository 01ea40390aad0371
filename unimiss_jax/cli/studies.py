"""Scores of a run of UniMedI on labelled data: python -m unimiss_jax.cli.studies --ckpt=RUN --data=MANIFEST.

Zero-shot classification by prompts, retrieval of reports and of volumes by radiographs, linear probes; one JSON.

  prompts.json   {"effusion": ["there is a pleural effusion"], "normal": ["lungs are clear"]}: classes that exclude each
                 other; or {"effusion": {"yes": [...], "no": [...]}}: each a question of its own
"""
import json
import logging
import pathlib
import sys
import tempfile

import numpy as np
from etils import epath

from data_pipelines import manifest, reports
from data_pipelines.command import Parser
from data_pipelines.errors import DataError
from unimiss_jax.cli import arguments, towers

STREAMS = {'image': 'xray', 'volume': 'ct'}
NEAREST = (1, 5, 10)
FEWEST = 10      # cases of a score, at least; chosen by us
USAGE = 'python -m unimiss_jax.cli.studies --ckpt=RUN|EXPORT --data=MANIFEST [--prompts=FILE.json] [--out=FILE.json]'


def main(argv=None) -> int:
  p = Parser(__doc__, USAGE)
  p.add_argument('--ckpt', required=True, help='a run of UniMedI, one checkpoint of it, or its exported folder')
  p.add_argument('--data', required=True, help='manifest.jsonl, or its folder; rows may have label, text, study, split')
  p.add_argument('--prompts', default='', help='JSON: what is said of each class')
  p.add_argument('--out', default='', help='.json to write; \'\' = the screen alone')
  p.add_argument('--batch', type=int, default=8, help='images that the network is given at a time')
  arguments.add_weights(p)
  p.add_argument('--debug', action='store_true', help='show the traceback of an error')
  f = p.parse_args(argv)

  def work():
    found = score(f.ckpt, f.data, f.prompts, batch=f.batch, branch=f.branch)
    if f.out:
      epath.Path(f.out).write_text(json.dumps(found, indent=1) + '\n')
    for name, value in found.items():
      logging.info('%-40s %s', name, f'{value:9.3f}' if isinstance(value, float) else f'{value:9d}')
  return arguments.run(work, f.debug)


def score(ckpt, data, prompts='', *, batch: int = 8, branch: str = '') -> dict:
  """{name: value}, what the rows of the manifest allow to be computed.

  '<xray|ct>_zero_shot/...': as `evals.classification.scores`, of all rows with a label; '<xray|ct>_to_text_r<k>': R@k
  of their own reports among those of all rows that say something else; 'xray_to_ct_p<k>': share of volumes of the same
  class among the k nearest, of rows with one class; '<xray|ct>_probe/...': of a logistic probe of the encoder, fitted
  to split train, on split test; '..._cases': how many they are of.

  Raises:
    CheckpointError, PortingError, DataError: weights, manifest or prompts cannot be used. OSError: likewise.
  """
  from unimiss_jax import weights
  from unimiss_jax.porting.errors import PortingError
  found = weights.read(ckpt, branch)
  parts = towers.of(found)
  if parts is None:
    raise PortingError(f'{found.source}: has no text tower. FIX: name a run of UniMedI (its student), or its export')
  data = str(data)
  rows, listed = embeddings(ckpt, data, batch, branch), manifest.usable(manifest.read(data, labelled=False))
  out, of_kind = {}, {}
  classes, told = said(prompts) if prompts else (tuple(sorted({c for r in listed for c in r.get('label', ())})), {})
  yes, no = ((_directions(parts, told, way) for way in ('yes', 'no')) if told else (None, None))
  for kind, stream in STREAMS.items():
    mine = [r for r in listed if r['kind'] == kind and r['id'] in rows]
    if not mine:
      continue
    x = np.stack([rows[r['id']] for r in mine])
    space = x @ parts.projections['vision_proj']
    labels = np.array([[r.get('label', {}).get(c, np.nan) for c in classes] for r in mine], float)
    of_kind[stream] = space, labels
    out |= _zero_shot(stream, space, labels, yes, no, classes, np.exp(parts.projections['log_scale']))
    out |= _reports(stream, space, mine, listed, parts)
    out |= _probe(stream, x, labels, mine, classes)
  if len(of_kind) == 2:
    out |= _across(*of_kind['xray'], *of_kind['ct'])
  if not out:
    raise DataError('LABEL', data, 'no row has what a score needs', 'give rows label or text, and name --prompts')
  return out


def embeddings(ckpt, data, batch: int, branch: str) -> dict:
  """{id: [C]} of the samples that could be used."""
  from unimiss_jax.cli import embed
  with tempfile.TemporaryDirectory() as folder:
    table = embed.embed(ckpt, data, str(pathlib.Path(folder) / 'x.npz'), batch=batch, branch=branch)
  logging.info(table.summary())
  return {row.id: row.lines()[0][2] for row in table.rows if row.status == 'ok'}


def said(path) -> tuple[tuple, dict]:
  """Classes, and {'yes', 'no': [prompts of each class]} of a file; 'no' is absent where classes exclude each other.

  Raises:
    DataError: PROMPTS: not such a file.
  """
  try:
    found = json.loads(epath.Path(path).read_text(encoding='utf-8'))
    two = {isinstance(v, dict) for v in found.values()}
    if len(two) != 1:
      raise ValueError('some classes say yes and no, others do not' if two else 'no classes')
    ways = ('yes', 'no') if two == {True} else ('yes',)
    told = {way: [v[way] if two == {True} else v for v in found.values()] for way in ways}
    if not all(texts and all(isinstance(t, str) and t for t in texts) for each in told.values() for texts in each):
      raise ValueError('every class needs a list of texts')
  except (ValueError, AttributeError, TypeError, KeyError) as e:
    raise DataError('PROMPTS', path, f'no prompts: {type(e).__name__} {e}', 'write {"class": ["text", ...], ...}, or '
                    '{"class": {"yes": [...], "no": [...]}, ...}') from e
  return tuple(found), told


def embed_text(parts, texts) -> np.ndarray:
  """Texts, cleaned as reports are -> [N, D] in the common space."""
  import jax

  from unimiss_jax.models.bert import Bert
  tokenizer = parts.tokenizer()
  pairs = [tokenizer(reports.clean(t, tokenizer.lowercase) or t) for t in texts]
  run = jax.jit(lambda params, ids, mask: Bert(**parts.fields).apply({'params': params}, ids, mask).last[:, 0])
  out, size = [], min(64, len(pairs))
  for start in range(0, len(pairs), size):
    some = pairs[start:start + size]
    full = some + some[-1:] * (size - len(some))
    out.append(np.asarray(run(parts.params, *map(np.stack, zip(*full))))[:len(some)])
  return np.concatenate(out) @ parts.projections['text_proj']


def _directions(parts, told, way):
  from unimiss_jax.evals import prompts
  if way not in told:
    return None
  owner = [c for c, texts in enumerate(told[way]) for _ in texts]
  return prompts.directions(embed_text(parts, [t for texts in told[way] for t in texts]), owner, len(told[way]))


def _zero_shot(stream, space, labels, yes, no, classes, scale) -> dict:
  from unimiss_jax.evals import prompts
  known = np.isfinite(labels).any(1)
  if yes is None or known.sum() < FEWEST:
    return {}
  found = prompts.zero_shot(space[known], yes, no, labels[known], scale, classes)
  return {f'{stream}_zero_shot/{k}': v for k, v in found.items()} | {f'{stream}_zero_shot_cases': int(known.sum())}


def _reports(stream, space, mine, listed, parts) -> dict:
  """R@k of the report of each row among the different texts."""
  from unimiss_jax.evals.knn import unit
  _, texts = reports.of_rows(mine, listed)
  texts = {i: reports.clean(t, parts.about['lowercase']) for i, t in texts.items()}
  rows = [(x, texts[r['id']]) for x, r in zip(space, mine) if texts.get(r['id'])]
  gallery = sorted({t for _, t in rows})
  if len(gallery) < FEWEST:
    return {}
  own = np.array([gallery.index(t) for _, t in rows])
  similarity = unit(np.stack([x for x, _ in rows]), 0.) @ unit(embed_text(parts, gallery), 0.).T
  rank = (similarity >= similarity[np.arange(len(own)), own][:, None]).sum(1) - 1      # a tie counts against it
  return {f'{stream}_to_text_r{k}': float((rank < k).mean()) for k in NEAREST} | {
      f'{stream}_to_text_reports': len(gallery)}


def _probe(stream, x, labels, mine, classes) -> dict:
  from unimiss_jax.evals import classification, probe
  fit, test = (np.array([r.get('split') == s for r in mine]) & np.isfinite(labels).any(1) for s in ('train', 'test'))
  if min(fit.sum(), test.sum()) < FEWEST:
    return {}
  found = classification.scores(probe.logistic(x[fit], labels[fit], x[test]), labels[test], False, classes)
  return {f'{stream}_probe/{k}': v for k, v in found.items()} | {f'{stream}_probe_cases': int(test.sum())}


def _across(pictures, of_pictures, volumes, of_volumes) -> dict:
  """Of those rows that have one class and no doubt."""
  from unimiss_jax.evals import retrieval
  one = lambda labels: np.isfinite(labels).all(1) & (np.nansum(labels, 1) == 1)
  a, b = one(of_pictures), one(of_volumes)
  if min(a.sum(), b.sum()) < FEWEST:
    return {}
  classes = of_pictures[a].argmax(1), of_volumes[b].argmax(1)
  return {f'xray_to_ct_p{k}': retrieval.precision_at(pictures[a], volumes[b], *classes, k) for k in NEAREST}


if __name__ == '__main__':
  sys.exit(main())
