"""Memory of a training step of the full-size model per batch size, beside PyTorch.

  python benchmarks/memory.py [--batches=1,2,4] [--preset=reference] [--peer=released] [--out=FILE.json]

Ours: what the compiled step says of itself, temporary buffers + arguments (the state, which is donated, and the batch);
`peak_memory_in_bytes` is of no use on CPU, where it is the arguments alone. Nothing runs: a size costs its compilation.
PyTorch, in a process of its own per batch size and phase, default malloc, third step: `tensors` = the state that it
holds (parameters, gradients, moments, teacher) + the highest sum of what its allocator handed out during the step (as
the profiler records it; scratch memory that oneDNN and MKL take by themselves is not in it); `resident` = the growth of
the process's peak resident memory since before the model was built (what malloc wastes and the libraries is in it).
The slope is what a record more costs, from the smallest to the largest batch. One core, one thread.
"""
import argparse
import json
import os
import pathlib
import re
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import contest  # noqa: E402

MIB = 1 << 20


def ours(args) -> tuple:
  from benchmarks import setting
  found = {}
  for batch in args.batches:
    made = setting.Ours(setting.config(args.preset, batch))
    for phase, rows in setting.batches(made.config).items():
      memory = made.compile(phase, rows).memory_analysis()
      found.setdefault(phase, {})[batch] = {'temp': memory.temp_size_in_bytes / MIB,
                                            'argument': memory.argument_size_in_bytes / MIB}
  return {'mib': found}, {}


def peer(args) -> tuple:
  import torch

  from benchmarks import setting, torch_recipe
  from unimiss_jax.porting import torch_mit
  torch.set_num_threads(1)
  phase, batch = args.only.split(':')
  before = resident('VmRSS')
  config = setting.config(args.preset, int(batch))
  weights = torch_mit.UniMiSSPlus().state_dict()
  made = torch_recipe.Recipe(config, weights, {'lr': 1e-5, 'wd': .04, 'momentum': .996},
                             lean=args.peer != 'released')
  del weights
  for p in made.parameters[0]:
    p.grad = torch.zeros_like(p) if p.requires_grad else None
  made.optimiser.step()      # a run has had steps of both phases: moments of all tensors
  tensors = torch_recipe.views(setting.batches(config)[phase])
  for _ in range(2):
    made.step(phase, tensors)
  made.optimiser.zero_grad(set_to_none=not made.keep_zeros)      # or old gradients would count beside new ones
  held = sum(t.nbytes for t in made.state()) + sum(t.nbytes for t in tensors.values())
  peak = resident('VmHWM')
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
    made.step(phase, tensors)
  with tempfile.NamedTemporaryFile(suffix='.json') as file:
    profile.export_chrome_trace(file.name)
    events = [e for e in json.loads(pathlib.Path(file.name).read_text())['traceEvents'] if e.get('name') == '[memory]']
  live = np.cumsum([e['args']['Bytes'] for e in sorted(events, key=lambda e: e['ts'])])
  return {'tensors': (held + max(live.max(), 0)) / MIB, 'held': held / MIB, 'resident': peak - before}, {}


def resident(name: str) -> float:
  """A line of /proc/self/status in MiB."""
  return int(re.search(rf'{name}:\s+(\d+)', pathlib.Path('/proc/self/status').read_text()).group(1)) / 1024


def facts(name: str, argv: list) -> dict:
  one = contest.Contender(name, argv, 1800.)
  one.close()
  return one.facts


def beside(found: dict, argv: list, peer: str, case: str) -> dict:
  """Our buffers of a phase and batch size, and what PyTorch takes, where it is installed."""
  total = found['temp'] + found['argument']
  row = {k: round(v) for k, v in found.items()} | {'total': round(total)}
  try:
    theirs = facts(peer, [*argv, f'--only={case}'])
  except contest.Lost as e:
    return row | {'not_measured': str(e)}
  return row | {f'torch_{k}': round(v) for k, v in theirs.items()} | {
      f'ratio_to_{k}': contest.rounded(total / theirs[k]) for k in ('tensors', 'resident')}


def compare(args) -> dict:
  contest.one_core()
  argv = [__file__, f'--batches={",".join(map(str, args.batches))}', f'--preset={args.preset}', f'--peer={args.peer}']
  mine = facts('ours', argv)['mib']
  os.environ.pop('GLIBC_TUNABLES', None)
  rows = {phase: {batch: beside(found, argv, args.peer, f'{phase}:{batch}') for batch, found in sizes.items()}
          for phase, sizes in mine.items()}
  for sizes in rows.values():
    first, last = min(sizes, key=int), max(sizes, key=int)
    if first != last:
      sizes['per_record'] = {k: round((sizes[last][k] - sizes[first][k]) / (int(last) - int(first)))
                             for k in ('total', 'torch_tensors', 'torch_resident') if k in sizes[first]}
  return {'unit': 'MiB', 'preset': args.preset, 'peer': args.peer} | rows


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--batches', type=lambda s: [int(n) for n in s.split(',')], default=[1, 2, 4])
  parser.add_argument('--preset', default='reference')
  parser.add_argument('--peer', default='released', choices=('released', 'lean'))
  parser.add_argument('--out', help='write the JSON there too')
  parser.add_argument('--only', metavar='PHASE:BATCH', help=argparse.SUPPRESS)
  parser.add_argument('--as', dest='name', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.name:
    return contest.serve(lambda: (ours if args.name == 'ours' else peer)(args))
  contest.show(compare(args), args.out)


if __name__ == '__main__':
  main()
