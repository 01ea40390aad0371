"""The last lines of a run: what changed from start to end, beside what chance would give."""
import json

from etils import epath

KNN = ('eval/knn_auc_ct', 'eval/knn_auc_xray')
RECALL = ('eval/drr_to_ct_r10', 'eval/xray_to_ct_r10')


def rows(folder) -> list[dict]:
  return [json.loads(r) for r in (epath.Path(folder) / 'metrics.jsonl').read_text().splitlines()]


def table(metrics: list[dict], chance: dict[str, dict[str, float]], tests: int = 0) -> list[str]:
  """Lines: loss parts per phase, then evaluations. chance: {phase: {metric: value}}; tests: gallery size of retrieval."""
  out = [f'{"":34}{"start":>8}{"end":>8}{"chance":>8}']
  for phase, levels in chance.items():
    part = [r for r in metrics if r.get('phase') == phase]
    for name in sorted({k for r in part for k in r if k.startswith('train/') and k.endswith('loss')}):
      if name != 'train/loss' and part[0].get(name) is not None and part[-1].get(name) is not None:
        level = f'{levels[name]:8.3f}' if name in levels else f'{"-":>8}'
        out.append(f'{phase + " " + name[6:]:34}{part[0][name]:8.3f}{part[-1][name]:8.3f}{level}')
  evals = [r for r in metrics if r.get('phase') == 'eval']
  if evals:
    first, last = evals[0], evals[-1]
    for name in (*KNN, *RECALL):
      if name in first and name in last:
        level = 0.5 if name in KNN else 10 / tests if tests else None
        raw = first.get(name.replace('eval/', 'eval/raw_', 1))
        out.append(f'{name[5:]:34}{first[name]:8.3f}{last[name]:8.3f}{f"{level:8.3f}" if level else f"{"-":>8}"}'
                   + (f'   raw pixels {raw:.3f}' if raw is not None else ''))
  return out


def show(folder, method, tests: int = 0) -> None:
  """Prints the folder, the table and the newest picture files."""
  metrics = rows(folder)
  print(f'\nrun folder: {folder}')
  print('\n'.join(table(metrics, {n: p.chance for n, p in method.phases.items()}, tests)))
  pictures = sorted((epath.Path(folder) / 'report').glob('*.png'))
  print('pictures: ' + ', '.join(str(p) for p in pictures))
