"""Contenders in processes of their own that take turns on one core, and what their times say.

A contender is this same script with `--as=NAME`: it calls `serve` with its cases and then does what it is told, one
line of JSON per request. So each has the memory and the allocator for itself, while the rounds alternate and what else
runs on the machine meets all of them alike.
"""
import json
import os
import pathlib
import select
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
THREADS = 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'


class Lost(Exception):
  """A contender that ended or did not answer in time."""


def one_core() -> None:
  """This process and those it starts: one core, one thread, the settings of launch.env where none are given."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  os.environ.update(dict.fromkeys(THREADS, '1'))
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')      # an accelerator is shared with the peer
  settings()


def settings() -> None:
  """Those of launch.env, for the processes that this one starts."""
  said = subprocess.run(['sh', '-c', 'set -a; . ./launch.env; env -0'], cwd=ROOT, capture_output=True, text=True,
                        check=True)
  ours = dict(line.split('=', 1) for line in said.stdout.split('\0') if '=' in line)
  os.environ.update({k: ours[k] for k in ('GLIBC_TUNABLES', 'XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')})


class Contender:
  """A started process; `facts` is what it said when it was ready."""

  def __init__(self, name: str, argv, seconds: float):
    self.name = name
    self._process = subprocess.Popen([sys.executable, *argv, f'--as={name}'], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, cwd=ROOT, bufsize=0)
    self._rest = b''
    self.facts = self._answer(seconds)

  def run(self, case: str, seconds: float = 600.) -> dict:
    """Does one repetition: {'cpu': seconds, 'wall': seconds}."""
    self._process.stdin.write((case + '\n').encode())
    return self._answer(seconds)

  def _answer(self, seconds):
    end = time.monotonic() + seconds
    while b'\n' not in self._rest:
      ready, _, _ = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0))
      part = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b''
      if not part:
        self._process.kill()
        raise Lost(f'{self.name}: ' + (f'ended with code {self._process.wait()}' if ready
                                       else f'no answer within {seconds:.0f} s'))
      self._rest += part
    line, self._rest = self._rest.split(b'\n', 1)
    return json.loads(line)

  def close(self):
    self._process.stdin.close()
    try:
      self._process.wait(60)
    except subprocess.TimeoutExpired:
      self._process.kill()


def serve(prepare) -> None:
  """The other side. prepare() -> (facts, {case: function without arguments that returns when its work is done}).

  Whatever a library prints goes to stderr.
  """
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  say = lambda value: print(json.dumps(value), file=out, flush=True)
  facts, cases = prepare()
  say(facts)
  for line in sys.stdin:
    wall, cpu = time.monotonic(), time.process_time()
    cases[line.strip()]()
    say({'cpu': time.process_time() - cpu, 'wall': time.monotonic() - wall})


def rounds(contenders, cases: dict, n: int, clock: str) -> dict:
  """{case: {contender: seconds of each of n rounds}}; in a round each does each case `cases[case]` times, in turn.

  A contender does the cases that its facts list. Every turn begins with one that is not counted: while others had
  theirs, a virtual machine gives the memory back that this one had freed, and the kernel takes seconds to get it again
  (5 s of sleep: 2.6 s of system time in the next CT step, .1 s in the one after). A training has no such pauses.
  """
  times = {}
  for i in range(n + 1):
    for case, repeat in cases.items():
      for c in contenders:
        if case in c.facts['cases']:
          took = [c.run(case)[clock] for _ in range(1 + repeat)][1:]
          if i:
            times.setdefault(case, {}).setdefault(c.name, []).append(float(np.mean(took)))
  return times


def summary(x) -> str:
  return f'{rounded(np.median(x))} ({rounded(min(x))} .. {rounded(max(x))})'


def against(ours: str, times: dict) -> dict:
  """Seconds of each contender of {name: seconds of each round}, and ours over theirs within a round: median, lowest and
  highest; a ratio below 1 is faster."""
  ratios = {n: np.divide(times[ours], t) for n, t in times.items() if n != ours}
  return {'seconds': {n: summary(t) for n, t in times.items()}, 'ratio': {n: summary(r) for n, r in ratios.items()}}


def rounded(x) -> float:
  return float(f'{x:.3g}')


def show(result: dict, out: str | None) -> None:
  text = json.dumps(result, indent=2)
  print(text)
  if out:
    pathlib.Path(out).write_text(text + '\n')
