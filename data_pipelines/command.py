"""What all programs beside main.py share: flags that answer with one line."""
import argparse
import sys


def fail(text: str, code: int) -> int:
  """Prints `ERROR text` on one line; returns the exit code."""
  print('ERROR ' + ' '.join(str(text).split()), file=sys.stderr)
  return code


class Parser(argparse.ArgumentParser):
  """Of the programs beside main.py: `usage` is its one line, a wrong flag exits with 2 and one line."""

  def __init__(self, doc: str, usage: str):
    super().__init__(description=doc, usage=usage, allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

  def several(self, flag: str, known: tuple, default: tuple, **more):
    """A flag whose value is a comma-separated choice of `known`; () = anything."""
    self.add_argument(flag, type=lambda text: self._words(flag, text, known), default=default, **more)

  def _words(self, flag, text, known):
    words = tuple(w for w in text.split(',') if w)
    if unknown := [w for w in words if known and w not in known]:
      self.error(f'{flag}={unknown[0]} unknown: use some of {", ".join(known)}')
    return words

  def error(self, message):
    sys.exit(fail(f'{message}. usage: {self.usage}', 2))
