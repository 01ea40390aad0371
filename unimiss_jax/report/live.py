"""The page of a run while it goes on: written anew when there is something to see, and at its end, whatever ends it."""
from __future__ import annotations

import logging
import sys
import time

from unimiss_jax.report import page, run_files, sections

SHARE = .01         # of the time of a run that the page may cost before its end
GUESS_S = 1.        # of the first page
NOTES = ('Written by the run itself. python -m unimiss_jax.cli.report --workdir=... adds what its network sees '
         '(neighbours, embeddings, attention, dense features) and what differs from the preset.',)


class Live:
  """folder: of a run, local; None on processes that write nothing. chance: {phase: {metric: value}}."""

  def __init__(self, folder, chance: dict):
    self.folder, self.chance, self.began = folder, chance, time.monotonic()
    self.spent, self.last = 0., GUESS_S

  def refresh(self) -> None:
    """Writes the page, unless pages would take more than SHARE of the time."""
    if self.spent + self.last <= SHARE * (time.monotonic() - self.began):
      self._write()

  def finish(self) -> None:
    """Writes the page of a run that is over; an exception that is on its way is named in it."""
    fault = sys.exc_info()[1]
    self._write(f'{type(fault).__name__}: {fault}' if fault else '')

  def _write(self, ended: str = '') -> None:
    if self.folder is None:
      return
    began = time.monotonic()
    try:
      run = run_files.load(self.folder)
      text = page.html([run], [sections.judged(run, self.chance)], self.chance, notes=NOTES, ended=ended)
      page.write(place(self.folder), text)
    except Exception as e:      # a run does not end for its picture
      logging.warning('%s is not written (%s: %s)', place(self.folder), type(e).__name__, e)
    self.last = time.monotonic() - began
    self.spent += self.last


def place(folder):
  """Where the page of a run lies."""
  return run_files.epath.Path(folder) / 'report' / 'index.html'
