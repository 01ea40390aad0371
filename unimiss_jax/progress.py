"""The line a person watches: loss parts, rates, share of time spent waiting for data, time left."""
import time

import numpy as np


class Progress:
  """Counts rows and seconds between two lines. Not part of the state: rates are not reproducible."""

  def __init__(self, plan: np.ndarray, names: tuple[str, ...]):
    """plan: phase index of every step of the run, names: what the indices stand for."""
    self.plan, self.names = plan, names
    self.seconds = dict.fromkeys(names, 0.)     # per phase, over the last window with that phase
    self.start = self.began = time.monotonic()
    self.reset()

  def reset(self):
    self.start, self.wait, self.rows = time.monotonic(), 0., {}
    self.spent = {n: [0., 0] for n in self.names}

  def add(self, phase: str, rows: dict[str, int], wait: float, seconds: float):
    for stream, n in rows.items():
      self.rows[stream] = self.rows.get(stream, 0) + n
    self.wait += wait
    self.spent[phase][0] += seconds
    self.spent[phase][1] += 1

  def scalars(self) -> dict[str, float]:
    """perf/* and data/wait_frac since the last call."""
    elapsed = max(time.monotonic() - self.start, 1e-9)
    out = {f'perf/{s}_per_s': n / elapsed for s, n in self.rows.items()}
    out['data/wait_frac'] = min(self.wait / elapsed, 1.)
    for n, (seconds, steps) in self.spent.items():
      if steps:
        self.seconds[n] = seconds / steps
    self.reset()
    return out

  def left(self, step: int) -> str:
    rest = self.plan[step:]
    return clock(sum(self.seconds[n] * int((rest == i).sum()) for i, n in enumerate(self.names)))

  def line(self, step: int, phase: str, metrics: dict, perf: dict) -> str:
    parts = ' '.join(f'{k[6:].removesuffix("_loss")} {v:.3f}' for k, v in metrics.items()
                     if k.startswith('train/') and k.endswith('loss'))
    rates = ' '.join(f'{k[5:-6]} {v:.1f}/s' for k, v in perf.items() if k.startswith('perf/'))
    return (f'step {step}/{len(self.plan)} {phase:5} {parts} | {rates} | data wait {perf["data/wait_frac"]:4.0%} | '
            f'left {self.left(step)}')


def clock(seconds: float) -> str:
  m, s = divmod(int(seconds + 0.5), 60)
  h, m = divmod(m, 60)
  return f'{h}:{m:02}:{s:02}' if h else f'{m}:{s:02}'
