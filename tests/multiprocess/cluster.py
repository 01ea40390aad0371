"""Runs of main.py in real processes over loopback: several of them, stopped or killed at will."""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from tests.conftest import ROOT
from unimiss_jax.cli.launch_local import free_port

CONFIG = 'tests/multiprocess/light.py'
PROGRAM = 'tests/multiprocess/recording.py'


class Cluster:
  """`processes` of main.py, each with `devices` virtual CPU devices, in one workdir.

  limit: bytes of the largest file that they may write (a full disk). each: one more flag for each process.
  """

  def __init__(self, workdir, *flags, config=CONFIG, processes=1, devices=8, x64=False, program=PROGRAM, limit=None,
               each=None, **env):
    self.workdir = pathlib.Path(workdir)
    given = dict(os.environ, JAX_PLATFORMS='cpu', JAX_ENABLE_X64=str(int(x64)), PYTHONPATH=str(ROOT),
                 XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}', **env)
    command = [sys.executable, program, f'--config={config}', f'--workdir={workdir}', *flags]
    if limit:
      command = ['bash', '-c', f'ulimit -f {limit // 1024} && exec "$@"', '-', *command]
    port = free_port()
    self.processes, self.logs, self._cats = [], [], []
    for i in range(processes):
      of = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={i}']
      log = self.workdir.parent / f'{self.workdir.name}_{port}_{i}.txt'
      mine = (of if processes > 1 else []) + (each[i:i + 1] if each else [])
      p = subprocess.Popen(command + mine, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
      with log.open('w') as f:      # cat, because the limit is also that of the log
        self._cats.append(subprocess.Popen(['cat'], stdin=p.stdout, stdout=f))
      p.stdout.close()
      self.processes.append(p)
      self.logs.append(log)

  def wait(self, timeout=400) -> list[int]:
    """Exit codes; whatever is left after `timeout` seconds is killed."""
    end = time.monotonic() + timeout
    try:
      return [p.wait(max(end - time.monotonic(), .1)) for p in self.processes]
    finally:
      for p in self.processes:
        if p.poll() is None:
          p.kill()
      for cat in self._cats:
        cat.wait()

  def until(self, happened, timeout=400):
    """Waits until happened() is true; fails if all processes end before."""
    end = time.monotonic() + timeout
    while not happened():
      assert time.monotonic() < end and any(p.poll() is None for p in self.processes), (
          [p.poll() for p in self.processes], self.said())
      time.sleep(.02)

  def steps(self) -> int:
    """Steps that this life has finished."""
    return len(re.findall(r'^I .* step \d+/', self.said(0), re.M))

  def until_steps(self, n, timeout=400):
    self.until(lambda: self.steps() >= n, timeout)

  def kill(self, which=None, number=signal.SIGKILL):
    for p in self.processes if which is None else [self.processes[which]]:
      p.send_signal(number)

  def said(self, which=None) -> str:
    return '\n'.join(log.read_text() for log in (self.logs if which is None else [self.logs[which]]))


def drawn(workdir) -> dict:
  """{(stream, position after the batch): set of (id, random numbers) of all processes}, as recording.py wrote it.

  Fails if two lives of a run drew different rows for one position.
  """
  out = {}
  for file in pathlib.Path(workdir).glob('drawn_*.jsonl'):
    for line in file.read_text().splitlines():
      try:
        r = json.loads(line)
      except ValueError:      # torn by a kill
        continue
      out.setdefault((r['stream'], r['end']), set()).update(map(tuple, r['rows']))
  return out


def rows(workdir) -> list[dict]:
  """Complete rows of metrics.jsonl of training steps."""
  file = pathlib.Path(workdir) / 'metrics.jsonl'
  out = []
  for line in file.read_text().splitlines() if file.exists() else []:
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if row.get('phase') != 'eval':
      out.append(row)
  return out
