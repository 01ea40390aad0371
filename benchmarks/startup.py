"""How long a run takes to its first step, cold and with what an earlier run compiled, and what checkpoints cost.

  python benchmarks/startup.py [--configs=phantom,plain] [--out=FILE.json]

Each config runs main.py twice in new folders with one new compilation cache: a few steps, CT and X-rays in turn, no
evaluation, a checkpoint every second step; `plain` with one record a step. One core. Wall and CPU seconds of a process
from its start to the line of the first step; compiling and tracing are what JAX_LOG_COMPILES reports until then (both
phases, and what they need; reading the cache counts as compiling). The share of checkpoints = how long the loop stood
still for a save (median, as the log says) over checkpoint.every steps, as the preset has it, of the mean length of a CT
and an X-ray step (rows of metrics.jsonl). Writing goes on beside the steps and is not in that share.
"""
import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import contest  # noqa: E402
from configs import unimiss_plus  # noqa: E402

STEPS = 8
ALL = {'steps': STEPS, 'epochs': 0, 'phases.unit': 'step', 'eval.tasks': '()', 'eval.select': '', 'checkpoint.every': 2,
       'log.every': 1, 'data.phantom_records': 4 * STEPS}
MORE = {'plain': {'batch.ct': 1, 'batch.xray': 1}}
COMPILED = re.compile(r'Finished XLA compilation of .* in ([\d.e-]+) sec')
TRACED = re.compile(r'Finished (?:tracing|jaxpr to MLIR).* in ([\d.e-]+) sec')
STALL = re.compile(r'the loop stood still for ([\d.]+) s')


def cpu_seconds(pid: int) -> float:
  """User and system time of a running process."""
  fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def start(preset: str, workdir: pathlib.Path, cache: pathlib.Path) -> dict:
  """One run, and what it said."""
  overrides = ALL | MORE.get(preset, {})
  command = [sys.executable, 'main.py', f'--config=configs/unimiss_plus.py:{preset}', f'--workdir={workdir}',
             *(f'--config.{k}={v}' for k, v in overrides.items())]
  env = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_LOG_COMPILES': '1', 'PYTHONPATH': str(ROOT)}
  began, first, lines = time.monotonic(), None, []
  with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                        text=True) as run:
    for line in run.stderr:
      lines.append(line)
      if first is None and f'step 1/{STEPS}' in line:
        first = {'first_step_s': time.monotonic() - began, 'first_step_cpu_s': cpu_seconds(run.pid)}
  if run.returncode or first is None:
    sys.exit(f'{" ".join(command)}\nended with code {run.returncode}:\n{"".join(lines[-20:])}')
  log = (workdir / 'logs' / 'host_0.txt').read_text()      # there each line is once
  add = lambda pattern: sum(map(float, pattern.findall(log[:log.index(f'step 1/{STEPS}')])))
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  batch = json.loads((workdir / 'config.json').read_text())['batch']['ct']
  pairs = [batch / r['perf/ct_per_s'] for r in rows[2:] if r.get('phase') == 'ct']      # an X-ray step, a CT step
  stalls = [float(s) for s in STALL.findall(log)]
  return first | {'compile_s': add(COMPILED), 'trace_s': add(TRACED), 'pairs': pairs, 'stalls': stalls}


def measure(preset: str) -> dict:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    cold, warm = (start(preset, folder / run, folder / 'cache') for run in ('cold', 'warm'))
  every = unimiss_plus.get_config(preset).checkpoint.every
  seconds = float(np.median(cold['pairs'] + warm['pairs'])) / 2
  stall = float(np.median(cold['stalls'] + warm['stalls']))
  keys = 'first_step_s', 'first_step_cpu_s', 'compile_s', 'trace_s'
  shown = lambda d: {k: contest.rounded(d[k]) for k in keys}
  return {'cold': shown(cold), 'warm': shown(warm),
          'warm_over_cold': {k: contest.rounded(warm[k] / cold[k]) for k in keys},
          'checkpoint': {'stall_s': contest.rounded(stall), 'saves': len(cold['stalls'] + warm['stalls']),
                         'every': every, 'mean_step_s': contest.rounded(seconds),
                         'share_of_wall_time': contest.rounded(stall / (stall + every * seconds))}}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--configs', type=lambda s: s.split(','), default=['phantom', 'plain'])
  parser.add_argument('--out', help='write the JSON there too')
  args = parser.parse_args()
  contest.one_core()
  contest.show({'unit': 's'} | {preset: measure(preset) for preset in args.configs}, args.out)


if __name__ == '__main__':
  main()
