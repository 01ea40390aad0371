"""The last lines of a run: what changed from start to end, beside what chance would give."""
import json

from etils import epath

KNN = ('eval/knn_auc_ct', 'eval/knn_auc_xray')
RECALL = ('eval/drr_to_ct_r10', 'eval/xray_to_ct_r10')
TASK = {'eval/auroc': .5, 'eval/dice': None}      # of validation cases; their chance, where it is known
STUDIES = dict.fromkeys(('eval/xray_to_text_r1', 'eval/ct_to_text_r1', 'eval/xray_to_ct_r1'), 1 / 32) | dict.fromkeys(
    (f'eval/{s}_{k}_auc' for k in ('zero_shot', 'probe') for s in ('xray', 'ct')), .5) | {
    'eval/slice_recall': None}                    # of phantom studies, 32 classes


def rows(folder) -> list[dict]:
  """The rows of metrics.jsonl; none where there is no such file, and not the line that a crash has torn."""
  file = epath.Path(folder) / 'metrics.jsonl'
  lines = file.read_text().splitlines() if file.exists() else []
  return [json.loads(line) for line in lines if line.endswith('}')]


def table(metrics: list[dict], chance: dict[str, dict[str, float]], tests: int = 0) -> list[str]:
  """Lines: loss parts per phase, then evaluations.

  Args:
    metrics: rows of metrics.jsonl. chance: {phase: {metric: value}}. tests: size of the retrieval gallery.
  """
  number = lambda v: f'{v:9.3f}' if v is not None else f'{"-":>9}'
  line = lambda name, *values: f'{name:28}' + ''.join(map(number, values))
  out = [f'{"":28}{"start":>9}{"end":>9}{"chance":>9}']
  for phase, levels in chance.items():
    part = [r for r in metrics if r.get('phase') == phase]
    for name in sorted({k for r in part for k in r if k.startswith('train/') and k.endswith('_loss')}):
      out.append(line(f'{phase} {name[6:]}', part[0].get(name), part[-1].get(name), levels.get(name)))
  evals = [r for r in metrics if r.get('phase') == 'eval']
  if evals:
    first, last = evals[0], evals[-1]
    known = known_chance(tests)
    for name in (n for n in known if n in first and n in last):
      level = known[name]
      raw = first.get(name.replace('eval/', 'eval/raw_', 1))
      out.append(line(name[5:], first[name], last[name], level) + (f'   raw pixels {raw:.3f}' if raw else ''))
  return out


def known_chance(tests: int) -> dict:
  """{score that a summary tells: what chance gives, None = not known}; tests: size of the retrieval gallery."""
  return dict.fromkeys(KNN, 0.5) | dict.fromkeys(RECALL, min(1., 10 / tests) if tests else None) | TASK | STUDIES


def tested(found: dict) -> list[str]:
  """Lines of eval/test.json: scores beside those of a predictor without an input and of raw pixels; classes one by one
  for the first measure alone."""
  score = lambda name: [found['scores'].get(name), found['control'].get(f'chance/{name}'),
                        found['control'].get(f'raw/{name}')]
  title = f'{found["cases"]} test cases'
  rows = [f'{title:28}{"test":>9}{"chance":>9}{"raw pix.":>9}']
  main = next(iter(found['scores']))
  for name in (n for n in found['scores'] if '/' not in n or n.startswith(f'{main}/')):
    rows.append(f'{name:28}' + ''.join(f'{"-":>9}' if v is None else f'{v:9.3f}' for v in score(name)))
  return rows


def show(folder, method, tests: int = 0) -> None:
  """Prints the folder, the table, the scores of a test, and the picture files."""
  metrics = rows(folder)
  print(f'\nrun folder: {folder}')
  print('\n'.join(table(metrics, {n: p.chance for n, p in method.phases.items()}, tests)))
  test = epath.Path(folder) / 'eval' / 'test.json'
  if test.exists():
    print('\n'.join(tested(json.loads(test.read_text()))))
  pictures = sorted(p for place in ('report', 'eval') for p in (epath.Path(folder) / place).glob('*.png'))
  print('pictures: ' + ', '.join(str(p) for p in pictures))
  print(f'report: {epath.Path(folder) / "report" / "index.html"}')
