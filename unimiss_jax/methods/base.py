"""The seam between the train loop and a method: a method is a value made of pure functions."""
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Aux(NamedTuple):
  """What a loss hands out beside its value."""
  mean: Any        # averaged over micro-batches: what a centre needs
  rows: Any        # sample axis first, put back in batch order: what a bank or queue needs
  metrics: dict    # {metric name: scalar}


class Phase(NamedTuple):
  """One kind of step."""
  streams: Mapping[str, int]     # stream name -> global batch of one step
  loss: Callable                 # (params, extra, batch, key, step) -> (loss, Aux)
  update: Callable               # (group, step) -> SKIP | ZERO | TRAIN, traceable
  chance: Mapping[str, float]    # metric name -> its value for a model that knows nothing
  couples_samples: bool = False  # a loss over pairs of samples: refuses optim.accum > 1
  fresh_optimiser: bool = False  # moments and counters start anew where the phase begins


class Timeline(NamedTuple):
  """Where steps stand in the schedules of learning rate, decay and momentum."""
  place: Callable                # step -> place; traceable
  total: int                     # places that the schedules are laid out over
  until: Callable                # epochs, may be a fraction -> places
  factor: Callable = lambda step: 1.    # step -> what the learning rate of its place is multiplied by


class Method(NamedTuple):
  init: Callable                 # (key, params=None) -> (params, extra); params: start from these instead
  groups: Callable               # parameter name -> group; 'fixed' is never trained
  phases: Mapping[str, Phase]
  schedule: Callable             # step -> (phase name, boundary or None): pure, all processes agree;
                                 # ('phase', name) at the first step of a phase, ('epoch', n) of an epoch
  post: Callable                 # (params, extra, aux, step) -> extra, after the optimiser
  weights: Mapping[str, Callable]   # 'student', 'teacher': (params, extra) -> weights
  predict: Mapping[str, Callable]   # 'embed', 'project' (of embeddings), ...: (weights, extra, batch) -> arrays
  total_steps: int
  steps_per_epoch: int
  rate: Callable = lambda group: 1.    # group -> factor of the learning rate
  given: Callable = dict         # () -> {parameter name: array} that a new run starts from, beside init_from
  timeline: Timeline | None = None     # None: places are steps
  between: Callable | None = None      # (state, step, read, boundary) -> state, before the first step of an epoch or
                                       # phase, after any save; read(stream): one pass, see boundary.reader


def timeline(method: Method) -> Timeline:
  return method.timeline or Timeline(lambda step: step, method.total_steps,
                                     lambda epochs: int(round(epochs * method.steps_per_epoch)))


def make(config, data) -> Method:
  """The method that config.method names. data: {stream: (number of records, {field: (shape, dtype)})}."""
  return importlib.import_module(f'unimiss_jax.methods.{config.method}').make(config, data)


def view_keys(rng, n):
  """rng [B, 2] uint32, one key per record -> [B, n] keys, one per view of it."""
  keys = jax.random.wrap_key_data(rng, impl='threefry2x32')
  return jax.vmap(lambda k: jax.random.split(k, n))(keys)


def weighted(terms, mean, metrics):
  """{name: (weight, value)} -> loss = sum of weight * value, and Aux with every part."""
  total = sum(w * v for w, v in terms.values())
  parts = {f'train/{k}': v for k, (_, v) in terms.items()}
  return total, Aux(mean, {}, {'train/loss': total} | parts | metrics)
