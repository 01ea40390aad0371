"""The line a person watches: loss parts, rates, share of time spent waiting for data, time left."""
import math
import os
import time

import numpy as np

POLL_S = .0005
FORECAST = 20      # steps until it is told what the run will take


class Window:
  """What happened since a phase was last reported."""

  def __init__(self):
    self.seconds, self.wait, self.rows = 0., 0., {}


class Progress:
  """Rows, seconds and waiting of the steps; evaluation, pictures and saves do not count.

  Not part of the state: rates are not reproducible.
  """

  def __init__(self, plan: np.ndarray, names: tuple[str, ...]):
    """plan: phase index of every step of the run, names: what the indices stand for."""
    self.plan, self.names = plan, names
    self.windows = {n: Window() for n in names}
    self.step_seconds = {}     # phase -> running mean, without the first step (compiling, cold caches)
    self.seen = set()
    self.steps = 0             # of this life

  def add(self, phase: str, rows: dict[str, int], wait: float, seconds: float) -> None:
    """One finished step; `seconds` with the waiting."""
    for w in self.windows.values():
      w.seconds += seconds
      w.wait += wait
      for stream, n in rows.items():
        w.rows[stream] = w.rows.get(stream, 0) + n
    if phase in self.seen:
      self.step_seconds[phase] = .9 * self.step_seconds.get(phase, seconds) + .1 * seconds
    self.seen.add(phase)
    self.steps += 1

  def scalars(self, phase: str) -> dict[str, float]:
    """perf/* and data/wait_frac since the last call for this phase."""
    w, self.windows[phase] = self.windows[phase], Window()
    seconds = max(w.seconds, 1e-9)
    return {f'perf/{s}_per_s': n / seconds for s, n in w.rows.items()} | {'data/wait_frac': w.wait / seconds}

  def rest(self, step: int) -> dict[str, int]:
    """Steps of each phase that come after `step` steps."""
    counts = {n: int((self.plan[step:] == i).sum()) for i, n in enumerate(self.names)}
    return {n: count for n, count in counts.items() if count}

  def left(self, step: int) -> str:
    rest = self.rest(step)
    if rest.keys() - self.step_seconds.keys():
      return '?'
    return clock(sum(n * self.step_seconds[name] for name, n in rest.items()))

  def forecast(self, step: int, devices: int, flops: dict[str, float]) -> str:
    """After FORECAST steps of this life, what the rest takes: one line; '' at all other steps, and with nothing left.

    Args:
      flops: {phase: of a step of all devices, nan = not known}.
    """
    rest = self.rest(step)
    timed = {n: count * self.step_seconds[n] / 3600 for n, count in rest.items() if n in self.step_seconds}
    if self.steps != FORECAST or not timed:
      return ''
    hours, later = sum(timed.values()), [n for n in rest if n not in timed]
    speed = [f'{n} {flops[n] / self.step_seconds[n] / devices / 1e12:.3g}' for n in timed
             if not math.isnan(flops[n])]
    return (f'{hours:.3g} hours left for {sum(rest[n] for n in timed)} steps, {hours * devices:.3g} device hours; '
            'evaluations and saves not counted' + (f'; {", ".join(later)} not timed yet' if later else '')
            + (f' | TFLOP/s a device: {", ".join(speed)}' if speed else ''))

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


class Stopwatch:
  """`with Stopwatch() as w:` then w.seconds."""

  def __enter__(self):
    self._began = time.monotonic()
    return self

  def __exit__(self, *_):
    self.seconds = time.monotonic() - self._began


class Cost:
  """What a run has cost, former lives included, each up to its last checkpoint: set `before` to what that one spent."""

  def __init__(self):
    self.began, self.before = time.monotonic(), {}

  def spent(self) -> dict[str, float]:
    """Seconds, and CPU seconds of this process and of those of its workers that have ended."""
    now = {'seconds': time.monotonic() - self.began, 'cpu_seconds': sum(os.times()[:4])}
    return {k: v + self.before.get(k, 0.) for k, v in now.items()}


def logged_steps(plan, every: int) -> set[int]:
  """In each block of `every` steps the first step of each phase: a pure function of the step, so a resumed run
  logs what an undisturbed one does."""
  seen, out = set(), set()
  for i, phase in enumerate(plan):
    if i % every == 0:
      seen = set()
    if phase not in seen:
      seen.add(phase)
      out.add(i)
  return out


def idle(fetched, metrics) -> None:
  """Until the next batch is there, or the devices have nothing to do: what is waited after it is for data."""
  while not fetched.done() and not metrics['train/skipped'].is_ready():
    time.sleep(POLL_S)
