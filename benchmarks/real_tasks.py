"""Small real tasks from a folder of public images: do the pipelines hold, and what do a few patients give?

  python benchmarks/real_tasks.py --data=DIR --weights=RUN --out=DIR [--seeds=0,1,2] [--only=lungs2d,lungs3d,nih]

DIR holds ct/, seg/ and cxr/ as described in its README. Tasks at the sizes of the phantom encoder, each from scratch
and from --weights, a pre-training run on phantoms:
  lungs2d  outlines of the lungs in radiographs with human masks; split by patient and case
  lungs3d  lungs in CT of three patients; each is the test once, the others train, the last weights are tested
  nih      14 labels by nearest neighbours on embeddings, five folds by patient; no training
Far too few patients for any claim. Writes results.json and prints a table; the runs lie beside it, with pictures.
"""
import argparse
import collections
import csv
import json
import pathlib
import subprocess
import sys

import nibabel as nib
import numpy as np

from data_pipelines import manifest, splits
from unimiss_jax.evals import knn

LOBES = 10, 11, 12, 13, 14      # of the lungs in the label map with names
CT = {'ct/nsclc_LUNG1-001.nii.gz': ('seg/nsclc_LUNG1-001_lungthr.nii.gz', ()),
      'ct/nsclcrg_R01-001.nii.gz': ('seg/nsclcrg_R01-001_lungthr.nii.gz', ()),
      'ct/totalseg_example_ct.nii.gz': ('seg/totalseg_example_ct_seg.nii.gz', LOBES)}
STARTS = 'scratch', 'pretrained'
FOLDS = 5


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument('--data', required=True, type=lambda path: pathlib.Path(path).resolve())
  p.add_argument('--weights', required=True, help='a pre-training run on phantoms')
  p.add_argument('--out', required=True, type=pathlib.Path)
  p.add_argument('--seeds', default='0,1,2')
  p.add_argument('--only', default='lungs2d,lungs3d,nih')
  f, more = p.parse_known_args()
  f.out.mkdir(parents=True, exist_ok=True)
  seeds, found = [int(s) for s in f.seeds.split(',')], {}
  if 'lungs2d' in f.only:
    where = lungs2d(f.data, f.out / 'lungs2d')
    found['lungs2d'] = trained(where, 'phantom_seg2d', ['--config.task.threshold=128'], f, seeds, more)
  if 'lungs3d' in f.only:
    for k, where in enumerate(lungs3d(f.data, f.out / 'lungs3d')):
      found[f'lungs3d, patient {k}'] = trained(where, 'phantom_seg3d', ['--config.eval.select='], f, seeds, more)
  if 'nih' in f.only:
    found['nih'] = nih(f)
  (f.out / 'results.json').write_text(json.dumps(found, indent=1))
  for task, rows in found.items():
    for row, values in rows.items():
      print(f'{task:20} {row:12} ' + ' '.join(f'{v:.3f}' for v in values))
  return 0


def lungs2d(data, out) -> pathlib.Path:
  """A manifest of the radiographs that have human masks; rows of one case (an address) are one group."""
  with (data / 'cxr' / 'covid' / 'labels.csv').open() as file:
    rows = [r for r in csv.DictReader(file) if r['mask_v7']]
  uses = collections.Counter(r['url'] for r in rows)
  rows = [{'id': r['image'], 'path': str(data / r['image']), 'mask': str(data / r['mask_v7']), 'kind': 'image',
           'subject': r['patient'], 'case': r['url'] if uses[r['url']] < 6 else r['image']} for r in rows]
  manifest.write(out, splits.assign(splits.groups(rows, group_by=('case',)), (.6, .2, .2)))
  return out


def lungs3d(data, out) -> list:
  """A manifest for each patient as the test; masks of all are brought to 0 and 1."""
  out.mkdir(parents=True, exist_ok=True)
  rows = []
  for k, (scan, (mask, values)) in enumerate(CT.items()):
    image = nib.load(data / mask)
    labels = np.asarray(image.dataobj)
    made = out / f'mask{k}.nii.gz'
    nib.save(nib.Nifti1Image((np.isin(labels, values) if values else labels > 0).astype(np.uint8), image.affine), made)
    rows.append({'id': scan, 'path': str(data / scan), 'mask': str(made), 'kind': 'volume', 'subject': str(k)})
  made = []
  for k in range(len(rows)):
    where = out / f'patient{k}'
    manifest.write(where, [r | {'split': 'test' if i == k else 'train'} for i, r in enumerate(rows)])
    made.append(where)
  return made


def trained(where, preset, leaves, f, seeds, more) -> dict:
  """{row: [test Dice of each seed]}, and those of the controls."""
  out = {}
  for start in STARTS:
    for seed in seeds:
      run = where / f'{start}{seed}'
      given = [f'--config.init_from={f.weights}'] if start == 'pretrained' else []
      subprocess.run([sys.executable, 'main.py', f'--config=configs/finetune.py:{preset}', f'--workdir={run}',
                      f'--config.seed={seed}', f'--config.data.manifest={where}', "--config.task.classes=('lungs',)",
                      '--config.task.overlap=.5', *leaves, *given, *more], check=True)
      found = json.loads((run / 'eval' / 'test.json').read_text())
      out.setdefault(start, []).append(found['scores']['dice'])
      out |= {name: [found['control'][f'{name}/dice']] for name in ('chance', 'raw')}
  return out


def nih(f) -> dict:
  """{features: [mean AUROC of the labels that both kinds of patients have in every fold]}."""
  with (f.data / 'cxr' / 'nih' / 'labels.csv').open() as file:
    rows = sorted(csv.DictReader(file), key=lambda r: pathlib.Path(r['image']).name)
  made = f.out / 'nih.npz'
  subprocess.run([sys.executable, '-m', 'unimiss_jax.cli.embed', f'--ckpt={f.weights}', f'--data={f.data}/cxr/nih',
                  f'--out={made}'], check=True)
  with np.load(made) as table:
    by = {pathlib.Path(path).name: e for path, e in zip(table['path'], table['embedding'])}
  names = list(rows[0])[list(rows[0]).index('source') + 1:]
  x = np.stack([by[pathlib.Path(r['image']).name] for r in rows])
  y = np.array([[float(r[n]) for n in names] for r in rows])
  patients = np.array([r['patient'] for r in rows])
  order = np.random.default_rng(0).permutation(np.unique(patients))
  fold = {p: i % FOLDS for i, p in enumerate(order)}
  part = np.array([fold[p] for p in patients])
  scores = np.zeros_like(y)
  for k in range(FOLDS):
    scores[part == k] = knn.scores(x[part != k], y[part != k], x[part == k])
  each = [knn.auroc(scores[:, c], y[:, c]) for c in range(len(names))]
  return {'embedding': [float(np.nanmean(each))], 'chance': [.5]}


if __name__ == '__main__':
  sys.exit(main())
