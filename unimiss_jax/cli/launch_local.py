"""Several processes of main.py on this machine, over loopback: what a cluster does, before one is at hand."""
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from unimiss_jax.cli.arguments import START

POLL_S = .1
GRACE_S = 30      # the others of a failed process say whom they lost and end by themselves, or are killed


def run(command: list[str], processes: int, devices: int) -> int:
  """Runs `python COMMAND` in `processes` processes that share `devices` virtual CPU devices evenly.

  Their lines are printed with their number in front. SIGINT or SIGTERM lets all save and end, a second one kills.

  Returns:
    0, or the exit code of the first process that failed (128 + n of one that signal n killed).
  """
  port, flags = free_port(), []
  env = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=(
      f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices // processes}').strip())
  asked = []
  former = {s: signal.signal(s, lambda number, frame: asked.append(signal.Signals(number)))
            for s in (signal.SIGINT, signal.SIGTERM)}
  started = []
  try:
    for i in range(processes):
      if processes > 1:
        flags = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={i}']
      started.append(subprocess.Popen(
          ['sh', '-c', START, '-', sys.executable, *command, *flags], env=env, stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True))
    readers = [threading.Thread(target=_stream, args=(i, p.stdout), daemon=True) for i, p in enumerate(started)]
    for reader in readers:
      reader.start()
    code = _wait(started, asked)
    for reader in readers:
      reader.join(GRACE_S)
    return code
  finally:
    for p in started:      # an error of ours
      if p.poll() is None:
        p.kill()
    for s, handler in former.items():
      signal.signal(s, handler)


def _wait(started, asked) -> int:
  """Until all have ended; the exit code of the first that failed."""
  first = told = 0
  deadline = math.inf
  while True:
    codes = [p.poll() for p in started]
    failed = [(i, code) for i, code in enumerate(codes) if code]
    if failed and not first:
      i, code = failed[0]
      first, deadline = code if code > 0 else 128 - code, time.monotonic() + GRACE_S
      print(f'process {i} ended with {first}', flush=True)
    if None not in codes:
      return first
    alive = [p for p, code in zip(started, codes) if code is None]
    for number in asked[told:]:
      print(f'{number.name}: {len(alive)} processes {"are killed" if told else "save and end"}', flush=True)
      for p in alive:
        (p.kill if told else p.terminate)()
      told += 1
    if time.monotonic() > deadline:
      for p in alive:
        p.kill()
    time.sleep(POLL_S)


def _stream(i: int, lines) -> None:
  with lines:
    for line in lines:
      sys.stdout.write(f'[{i}] {line.rstrip()}\n')
      sys.stdout.flush()


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]
