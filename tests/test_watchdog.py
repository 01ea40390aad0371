"""A process that hangs ends by itself; one that works does not."""
import subprocess
import sys
import time

from tests.conftest import ROOT
from unimiss_jax.watchdog import Watchdog

HANGING = '''
import time
from unimiss_jax.watchdog import Watchdog
with Watchdog(.6 / 60) as w:
  for _ in range({steps}):
    time.sleep(.05)
    w.alive()
  def hanging():
    time.sleep({hangs})
  hanging()
'''


def run(steps, hangs):
  return subprocess.run([sys.executable, '-c', HANGING.format(steps=steps, hangs=hangs)], cwd=ROOT, timeout=60,
                        capture_output=True, text=True)


def test_no_step_for_too_long_shows_all_stacks_and_ends_with_1():
  began = time.monotonic()
  got = run(steps=3, hangs=50)
  assert got.returncode == 1 and time.monotonic() - began < 30
  assert 'no step finished for 0.0 min; stacks of all threads follow' in got.stderr and 'in hanging' in got.stderr


def test_steps_keep_it_quiet_and_it_waits_for_the_first():
  assert run(steps=30, hangs=0).returncode == 0      # 1.5 s
  assert run(steps=0, hangs=2).returncode == 0       # compiling takes as long as it takes


def test_it_can_be_off():
  with Watchdog(0) as w:
    w.alive()
