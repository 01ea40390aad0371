"""Which modality a step trains on, and where it stands in the schedules: pure functions of the step."""
import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

from unimiss_jax.methods.base import Timeline

TIMELINES = {'step': 'unimiss_jax.methods.alternation', 'epoch': 'unimiss_jax.methods.alternation',
             'dataset': 'unimiss_jax.methods.reference'}


class Times(NamedTuple):
  """When what happens in a run."""
  at: Callable              # step -> (phase name, boundary or None)
  names: tuple              # phases that occur
  total_steps: int
  steps_per_epoch: int      # of epochs of different lengths: the mean
  until: Callable           # epochs, may be a fraction -> steps that they take from the start
  timeline: Timeline


def paired(config, data, order=('ct', 'xray')) -> Times:
  """Epochs of either phase have as many steps as the first stream of `data` has batches: UniMiSS+."""
  if config.optim.schedule_unit == 'dataset':
    raise ValueError('optim.schedule_unit="dataset" is of method unimiss with phases.unit=epoch alone: use step')
  leading = next(iter(data))                  # CT, where there is CT
  steps_per_epoch = max(data[leading][0] // config.batch[leading], 1)
  total = config.steps or config.epochs * steps_per_epoch
  until = lambda epochs: int(round(epochs * steps_per_epoch))
  return Times(*schedule(config.phases, steps_per_epoch, order), total, steps_per_epoch, until,
               Timeline(lambda step: step, total, until))


def own(config, data) -> Times:
  """X-rays first; epochs of a phase have as many steps as its own stream has batches: the pilot UniMiSS."""
  order = 'xray', 'ct'
  if config.phases.unit != 'epoch':
    return paired(config, data, order)
  lengths = {name: max(data[name][0] // config.batch[name], 1) for name in order if config.phases[name]}
  turn = [name for name in lengths for _ in range(config.phases[name])]       # phase of each epoch
  locate = _locate(config.phases, lengths)

  def until(epochs):
    whole, part = divmod(epochs, 1)
    cycles, rest = divmod(int(whole), len(turn))
    steps = cycles * sum(lengths[n] for n in turn) + sum(lengths[n] for n in turn[:rest])
    return int(round(steps + part * lengths[turn[rest]]))

  def at(step):
    index, epoch, inside = locate(step)
    return tuple(lengths)[index], None if inside else ('epoch', epoch)
  total = config.steps or until(config.epochs)
  made = importlib.import_module(TIMELINES[config.optim.schedule_unit]).timeline
  return Times(at, tuple(lengths), total, math.ceil(until(len(turn)) / len(turn)), until,
               made(total, until, locate, [data[name][0] for name in lengths], config.epochs))


def timeline(total, until, locate, records, epochs) -> Timeline:
  """Schedules go by the steps that are taken."""
  return Timeline(lambda step: step, total, until)


def _locate(phases, lengths: dict):
  """step -> (place of its phase in `lengths`, epoch, step within the epoch); traceable."""
  counts = [phases[name] for name in lengths]
  sizes = [count * length for count, length in zip(counts, lengths.values())]

  def locate(step):
    turn, rest = step // sum(sizes), step % sum(sizes)
    index, epoch, inside = 0, turn * sum(counts), 0
    for i, length in enumerate(lengths.values()):
      start = sum(sizes[:i])
      here = (rest >= start) & (rest < start + sizes[i])
      index += here * i
      epoch += here * (sum(counts[:i]) + (rest - start) // length)
      inside += here * ((rest - start) % length)
    return index, epoch, inside
  return locate


def schedule(phases, steps_per_epoch: int, order=('ct', 'xray')):
  """One phase after the other, by whole epochs of one length or by steps, or both at once.

  Args:
    phases: unit ('epoch' | 'step' | 'joint') and the number of units of `ct` and `xray` per turn.
    steps_per_epoch: length of an epoch of either phase.
    order: of the two in a turn.

  Returns:
    (step -> (phase name, boundary or None), names of the phases that occur); the boundary is
    ('epoch', n) at the first step of epoch n.
  """
  if phases.unit == 'joint':
    names, phase = ('joint',), lambda step: 'joint'
  else:
    turn = phases.ct + phases.xray
    length = steps_per_epoch if phases.unit == 'epoch' else 1
    names = tuple(n for n in order if phases[n])
    phase = lambda step: order[(step // length) % turn >= phases[order[0]]]

  def at(step: int):
    epoch, inside = divmod(step, steps_per_epoch)
    return phase(step), None if inside else ('epoch', epoch)
  return at, names
