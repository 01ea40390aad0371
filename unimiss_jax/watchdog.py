"""Ends a process that hangs: no step for some minutes -> the stacks of all threads, exit 1."""
import faulthandler
import logging
import os
import sys
import threading
import time


class Watchdog:
  """`with Watchdog(minutes) as w:` and w.alive() after every step; it counts from the first call. 0 minutes = off."""

  def __init__(self, minutes: float):
    self.seconds = minutes * 60
    self._last = None
    self._over = threading.Event()

  def __enter__(self):
    if self.seconds:
      threading.Thread(target=self._watch, daemon=True, name='watchdog').start()
    return self

  def __exit__(self, *_):
    self._over.set()

  def alive(self):
    self._last = time.monotonic()

  def _watch(self):
    while not self._over.wait(min(self.seconds / 4, 10.)):
      if self._last is not None and time.monotonic() - self._last > self.seconds:
        logging.error('no step finished for %.1f min; stacks of all threads follow', self.seconds / 60)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        os._exit(1)
