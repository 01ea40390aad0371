"""What frozen features of a pre-trained encoder are worth on phantoms that nothing has seen.

  python benchmarks/representation.py --run=runs/pre [--out=FILE.json]

The findings, named before any run: effusion side, consolidation lobe and side, cardiomegaly. Nearest neighbours and
linear probes learn from 500 phantoms of the development range and are tested on 512 held-out ones, whose scanner has
another noise; retrieval is among the first 200 of them, by the embeddings and by the projections that the losses
compare. Beside the trained features stand those of the same network before training and raw pixels. One line of JSON.
"""
import argparse
import json
import sys

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import evalset, sources
from unimiss_jax import models, weights
from unimiss_jax.evals import knn, online, probe, retrieval
from unimiss_jax.models.heads import DINOHead

FINDINGS = ('effusion_side', 'consolidation_lobe', 'consolidation_side', 'cardiomegaly')
FIT, TEST, GALLERY, ROWS = 500, 512, 200, 50
FIRST = 600_000      # of the development range: behind what runs evaluate and tasks validate on
COUNTS = 20, 50, 100, 500


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument('--run', required=True, help='folder of a pre-training run on phantoms')
  p.add_argument('--branch', default='student')
  p.add_argument('--out', default='')
  f = p.parse_args()
  found = weights.read(f.run, f.branch)
  config = ConfigDict(found.about['config'])
  views, labels = phantoms(config)
  model = models.build(config.model)
  embed = jax.jit(lambda params, x: model.apply({'params': params}, x, decode=False).embedding)
  fresh = models.init_params(model, jax.random.split(jax.random.key(config.seed))[0])
  features = {'trained': apply(embed, found.params['backbone'], views), 'untrained': apply(embed, fresh, views)}
  raw = {n: online.pooled(x[..., 0], (8, 8, 8) if n == 'ct' else (16, 16)) for n, x in views.items()}
  flat = raw | {'ct': online.pooled(online.shadow(views['ct'][..., 0], config.drr.view), (16, 16))}
  head, key = projection(config), jax.random.split(jax.random.key(config.seed))[1]
  heads = {'trained': found.params['head'], 'untrained': head.init(key, features['trained']['ct'][:1])['params']}
  pairs = {name: {k: np.asarray(head.apply({'params': p}, features[name][k], method='project'))
                  for k in features[name]} for name, p in heads.items()}
  rows = {name: scores(x, x, labels) | {f'{k}/projection': v for k, v in recalls(pairs[name]).items()}
          for name, x in features.items()} | {'raw': scores(raw, flat, labels)}
  line = json.dumps({'run': f.run, 'seed': config.seed, 'source': found.source, 'findings': FINDINGS,
                     'chance_r10': 10 / GALLERY, **rows})
  print(line)
  if f.out:
    with open(f.out, 'w') as file:
      file.write(line + '\n')
  return 0


def phantoms(config) -> tuple:
  """{'ct', 'drr', 'xray': centre views [FIT + TEST, ...]}, labels [FIT + TEST, findings]."""
  whole = config.drr.scope == 'volume'
  views, labels = [], []
  for part, first, n in (('development', FIRST, FIT), ('heldout', 0, TEST)):
    cts = sources.PhantomCT(config.seed, first + n, part=part, whole=whole)
    rays = sources.PhantomXray(config.seed, first + n, part=part)
    for i in range(first, first + n):
      views.append(evalset.centre_ct(cts[i], config) | evalset.centre_xray(rays[i], config))
      labels.append([cts.labels(i)[name] for name in FINDINGS])
  return {k: np.concatenate([v[k] for v in views]) for k in views[0]}, np.array(labels, float)


def apply(embed, params, views) -> dict:
  out = {}
  for name, x in views.items():
    parts = [np.asarray(embed(params, np.concatenate([x[i:i + ROWS], x[:max(0, i + ROWS - len(x))]])))
             for i in range(0, len(x), ROWS)]
    out[name] = np.concatenate(parts)[:len(x)]
  return out


def scores(x: dict, pairs: dict, labels) -> dict:
  """Means over the findings, and each; `pairs`: what retrieval compares."""
  out = {}
  y, truth = labels[:FIT], labels[FIT:]
  for name in ('ct', 'xray'):
    fit, test = x[name][:FIT], x[name][FIT:]
    near = knn.scores(fit, y, test)
    each = {c: knn.auroc(near[:, k], truth[:, k]) for k, c in enumerate(FINDINGS)}
    out[f'knn_auc_{name}'] = float(np.mean(list(each.values())))
    out |= {f'knn_auc_{name}/{c}': v for c, v in each.items()}
    for n in COUNTS:
      z = probe.ridge(fit[:n], y[:n], test)
      out[f'linear_auc_{name}_{n}'] = float(np.mean([knn.auroc(z[:, k], truth[:, k]) for k in range(len(FINDINGS))]))
  return out | recalls(pairs)


def recalls(x: dict) -> dict:
  gallery = {k: v[FIT:FIT + GALLERY] for k, v in x.items()}
  return {f'{q}_to_ct_r10': retrieval.recall(gallery[q], gallery['ct'], 10) for q in ('drr', 'xray')}


def projection(config) -> DINOHead:
  h = config.head
  return DINOHead(out_dim=h.out_dim, hidden_dim=h.hidden_dim, bottleneck_dim=h.bottleneck_dim, last_layer=False,
                  linear_init=config.model.init)


if __name__ == '__main__':
  sys.exit(main())
