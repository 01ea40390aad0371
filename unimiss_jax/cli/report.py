"""A run, or several beside each other, as one HTML file: python -m unimiss_jax.cli.report --workdir=DIR.

The page needs no connection. Verdict, curves, picture sheets, scores, config and history come from the files of the
run; what its network sees (nearest neighbours across dimensions, map of embeddings, reconstructions, attention, dense
features) from its newest checkpoint. A folder that is no run, as that of a sweep, stands for all runs below it.
"""
import json
import logging
import pathlib
import sys

from data_pipelines.command import Parser, fail
from unimiss_jax.cli import arguments

USAGE = ('python -m unimiss_jax.cli.report --workdir=DIR [--workdir=DIR2 ...] [--out=FILE.html] [--no_model] '
         '[--records=N] [--branch=student|teacher]')
MOST_RUNS = 60
WITHOUT = 'Without --no_model the page also shows what the network sees.'
ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(argv=None) -> int:
  p = Parser(__doc__, USAGE)
  p.add_argument('--workdir', action='append', required=True, help='folder of a run, or of a sweep; may be repeated: '
                 'the first run is shown in full')
  p.add_argument('--out', default='', help='file to write; "" = report/index.html of the folder, of several folders '
                 'report/compared.html of the first')
  p.add_argument('--no_model', action='store_true', help='leave out what needs the network')
  p.add_argument('--records', type=int, default=60, help='samples of the evaluation set that the network is shown')
  p.add_argument('--branch', default='', choices=('', 'student', 'teacher'), help='"" = the teacher of a '
                 'self-distillation, else the student')
  p.add_argument('--debug', action='store_true', help='show the traceback of an error')
  f = p.parse_args(argv)
  if f.records < 10:
    p.error(f'--records={f.records}: 10 or more')
  return arguments.run(lambda: report(f.workdir, f.out, not f.no_model, f.records, f.branch), f.debug)


def report(folders: list, out: str = '', model: bool = True, records: int = 60, branch: str = '') -> int:
  """Writes the page; arguments are the flags above. Returns the exit code."""
  from unimiss_jax.report import live, page, run_files, sections  # late: a usage error should not wait for jax
  found = [run for folder in folders for run in run_files.below(folder)]
  if not found:
    return fail(f'{", ".join(map(str, folders))}: no run there, none has a config.json. FIX: name the --workdir of a '
                'run or of a sweep', 1)
  if len(found) > MOST_RUNS:
    logging.warning('%d runs: the first %d are shown', len(found), MOST_RUNS)
    found = found[:MOST_RUNS]
  runs = [run_files.load(folder, name) for folder, name in zip(found, run_files.names(found))]
  presets = [preset_of(run) for run in runs]
  configs = [whole(run, preset) for run, preset in zip(runs, presets)]
  chances = [chance_of(config, run) for config, run in zip(configs, runs)]
  verdicts = [sections.judged(run, chance) for run, chance in zip(runs, chances)]
  shown, notes = seen(runs[0], configs[0], records, branch) if model else ((), [WITHOUT])
  place = (run_files.epath.Path(out) if out else live.place(folders[0]) if len(folders) == 1
           else live.place(folders[0]).with_name('compared.html'))
  text = page.html(runs, verdicts, chances[0], sections.flat(presets[0]) if presets[0] else None, shown, notes)
  page.write(place, text)
  for run, v in zip(runs, verdicts):
    logging.info('%s%s', f'{run.name}: ' if len(runs) > 1 else '', v.line)
  logging.info('report: %s (%.1f MB)', place, len(text.encode()) / 1e6)
  return 0


def preset_of(run) -> dict | None:
  """The config that the run's preset gives, None where that is not at hand.

  Only files of the project's own configs/ are executed, whatever the folder of the run names.
  """
  method, preset = run.config.get('method'), run.config.get('preset')
  if not all(isinstance(x, str) and x.isidentifier() for x in (method, preset)):
    return None
  named = arguments.config_file(map(str, run.env.get('command') or ())) or ''
  file, _, arg = named.partition(':')
  stem = pathlib.Path(file).stem
  try:
    candidates = {p.stem: p for p in (ROOT / 'configs').glob('*.py')}
    for path, given in ((candidates.get(stem), arg), (candidates.get(method), preset)):
      if path:
        made = arguments.module(str(path)).get_config(*([given] if given else [])).to_dict()
        if (made.get('method'), made.get('preset')) == (method, preset):
          return json.loads(json.dumps(made))      # tuples as lists, as config.json has them
  except Exception as e:      # a config of another time
    logging.warning('%s: the preset %s of %s cannot be built (%s)', run.name, preset, method, e)
  return None


def whole(run, preset: dict | None):
  """The run's config, with leaves that it did not know yet from its preset."""
  from ml_collections import ConfigDict
  merge = lambda a, b: {k: merge(a.get(k, {}), v) if isinstance(v, dict) and isinstance(a.get(k, {}), dict) else v
                        for k, v in {**a, **b}.items()}
  tuples = lambda v: {k: tuples(x) for k, x in v.items()} if isinstance(v, dict) else (
      tuple(map(tuples, v)) if isinstance(v, list) else v)
  known, name = preset or {}, run.config.get('model', {}).get('name')
  if known.get('model', {}).get('name') != name:      # `:plain,model=vit_tiny`: its leaves are another network's
    known = {k: v for k, v in known.items() if k != 'model'}
  return ConfigDict(tuples(merge(known, run.config)))


def chance_of(config, run) -> dict:
  """{phase: {metric: value for a network that tells nothing apart}}; {} for a task, whose classes lie with its data,
  and where the config makes no method any more."""
  if 'task' in config:
    return {}
  try:
    return {n: p.chance for n, p in method_of(config, run).phases.items()}
  except Exception as e:
    logging.warning('%s: chance levels are not known (%s: %s)', run.name, type(e).__name__, e)
    return {}


def method_of(config, run, fields: dict | None = None):
  """The method of a run, of streams as long as they were; fields: {field: (shape, dtype)} of a row, of a task."""
  from unimiss_jax import workdir
  from unimiss_jax.methods import base
  listed = workdir.records(run.folder)
  streams = [s for s in ('ct', 'xray') if config.phases.get(s) or s in listed]
  return base.make(config, {s: (len(listed.get(s, ())) or config.data.phantom_records, fields or {}) for s in streams})


def seen(run, config, records: int, branch: str) -> tuple:
  """(figures, notes): what the newest checkpoint sees in the evaluation set; the notes say what lacks."""
  from data_pipelines import evalset
  from data_pipelines.errors import DataError
  from unimiss_jax import weights
  from unimiss_jax.checkpoint import CheckpointError
  from unimiss_jax.report import insight
  try:
    distils = 'collapse/teacher_entropy' in {k for r in run.rows for k in r}
    reads = 'unimedi' in config      # its teacher has no text tower, and chooses the planes that the student is shown
    found = weights.read(run.folder, branch or ('teacher' if distils and not reads else 'student'))
    teacher = weights.read(run.folder, 'teacher').params if reads else None
    config.eval.records = min(records, config.eval.records)
    config.eval.fit = config.eval.records // 2
    tests, fields = evalset.build(config), {}
    if tests is None:
      return (), ['What the network sees is not shown: there is no evaluation set.']
    if 'task' in config:
      fields = {k: ((len(tests.classes),), 'float32') for k in ('label', 'mask')}
      tests = evalset.of_cases(tests, records)
    method = method_of(config, run, fields)
  except (CheckpointError, DataError, ValueError, AttributeError, OSError) as e:      # leaves of another time, too
    return (), [f'What the network sees is not shown: {e}']
  return insight.figures_of(found, method, config, tests, teacher)


if __name__ == '__main__':
  sys.exit(main())
