"""Ends a process that would hang for ever: no step for some minutes, or another process of the run has died."""
import faulthandler
import logging
import os
import sys
import threading
import time

from unimiss_jax.lifeline import Lifeline

GRACE_S = 5      # for a run that ends in an orderly way, where one process is a little earlier than another


class Watchdog:
  """`with Watchdog(minutes, lifeline) as w:` and w.alive() after every step; it counts from the first call.

  0 minutes = only the death of another process counts. No step for so long: the stacks of all threads, exit 1.
  """

  def __init__(self, minutes: float, lifeline: Lifeline | None = None):
    self.seconds, self.lifeline = minutes * 60, lifeline
    self._last = None
    self._over = threading.Event()

  def __enter__(self):
    threading.Thread(target=self._watch, daemon=True, name='watchdog').start()
    return self

  def __exit__(self, *_):
    self._over.set()

  def alive(self):
    self._last = time.monotonic()

  def _watch(self):
    while not self._over.wait(min(self.seconds / 4 or 1., 1.)):
      if self.lifeline and self.lifeline.lost and not self._over.wait(GRACE_S):
        print(f'ERROR {self.lifeline.message()}', file=sys.stderr)
        self._exit()
      if self.seconds and self._last is not None and time.monotonic() - self._last > self.seconds:
        logging.error('no step finished for %.1f min; stacks of all threads follow', self.seconds / 60)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        self._exit()

  def _exit(self):
    logging.shutdown()
    sys.stderr.flush()
    os._exit(1)
