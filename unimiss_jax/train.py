"""The loop: pre-training of any method. It knows no method by name.

Order in a step: remember the stream positions, dispatch the step, draw the next batch and bring it to the devices
while they work, wait, log, evaluate, save. Accelerators get the next step while they work on one, unless there is
something to evaluate or to save. A checkpoint holds the state after step n and the positions after the batch of step n,
so a resumed run takes the same batches and draws the same random numbers.
"""
import collections
import contextlib
import logging
import math
import time
from concurrent import futures

import jax
import numpy as np

from data_pipelines import cases, evalset, files, manifest, prepared, streams
from unimiss_jax import (
    autopsy,
    boundary,
    checkpoint,
    final_test,
    health,
    init_from,
    optim,
    preflight,
    probe_first,
    processes,
    sharding,
    step,
    validate,
    workdir,
)
from unimiss_jax.best import Best
from unimiss_jax.lifeline import Lifeline
from unimiss_jax.methods import base
from unimiss_jax.mirror import Mirror
from unimiss_jax.observer import Observer
from unimiss_jax.progress import Cost, Progress, Stopwatch, clock, idle, logged_steps
from unimiss_jax.report import summary
from unimiss_jax.report.live import Live
from unimiss_jax.state import own, parameters
from unimiss_jax.watchdog import Watchdog
from unimiss_jax.writers import EVAL, Writer

AHEAD = {'cpu': 0}    # steps that are worked on when the next one is dispatched, else 1; two on CPU may starve each
                      # other's collectives of threads
HOST_ONLY = 'train/skipped_in_a_row', 'train/bad_tensor', 'train/bad_tensors'    # metrics that are no curve
STORES = ('gs://',)      # where orbax writes, beside local folders


class TrainError(Exception):
  """The run cannot go on; the message says why and what to do."""


def train_and_evaluate(config, folder: str, resume: str = 'auto', preempt_exit_code: int = 0) -> int:
  """Runs `config` in `folder` to its end, or continues what is there.

  Args:
    config: a locked ConfigDict of configs/.
    folder: workdir, see workdir.py.
    resume: 'auto' falls back from a damaged checkpoint, 'strict' refuses, 'force' accepts another config or other
      records.
    preempt_exit_code: what to return after a save that SIGTERM or SIGUSR1 asked for.

  Returns:
    The exit code: 0 when the run is complete.

  Raises:
    ConfigError, CheckpointError, DataError, TrainError, ProcessError: one clear line each.
  """
  lifeline = Lifeline()
  stop = processes.StopSignal()
  with Watchdog(config.log.watchdog_min, lifeline) as watchdog, lifeline.watched():
    try:
      code = _life(config, folder, resume, preempt_exit_code, stop, watchdog)
      processes.meet('end')
      return code
    finally:
      stop.restore()
      lifeline.close()


def _life(config, folder, resume, preempt_exit_code, stop, watchdog) -> int:
  preflight.same_run(config, folder, resume)
  processes.together(lambda: check(config, folder))
  processes.on_main(lambda: workdir.claim(folder, config, resume))
  processes.together(lambda: workdir.seen(folder, config))
  if processes.on_main(lambda: workdir.finished(folder, config)):
    logging.info('%s is complete (file DONE), nothing to do; another --workdir starts anew', folder)
    return 0
  mirror = processes.together(lambda: Mirror(folder, workdir.continued()))
  handler = workdir.log_to(mirror.local)
  run, ended = None, False
  try:
    run = Run(config, folder, mirror, resume)
    code = run.train(stop, watchdog, preempt_exit_code)
    ended = True
    return code
  except TrainError:      # all processes see it at the same step
    ended = True
    raise
  finally:
    if run:
      run.close(wait=ended or jax.process_count() == 1)
    logging.getLogger().removeHandler(handler)
    handler.close()
    mirror.close()


def check(config, folder) -> None:
  """What can be known before anything is read or compiled."""
  validate.validate(config)
  validate.check_devices(config, jax.device_count())
  for path in (folder, config.init_from, config.data.manifest, config.eval.knn):
    files.check_storage(path)
  if '://' in str(folder) and not str(folder).startswith(STORES):
    raise validate.ConfigError(f'--workdir={folder}: checkpoints cannot be written there. FIX: use a local folder or '
                               'gs://')
  of_streams = [part for s in validate.streams(config) for part in prepared.weights(config.data[s])]
  for path in (*of_streams, config.data.manifest, config.eval.knn):
    if path:
      files.check_there(path)


class Run:
  """Everything of one run that lives in memory, built in the order in which it depends on each other."""

  def __init__(self, config, folder, mirror, resume):
    self.config, self.folder, self.mirror = config, folder, mirror
    self.main, self.cost = processes.main(), Cost()
    self.writer, self.judge = None, None      # of the first process
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    self.streams = processes.together(
        lambda: streams.build(config, validate.streams(config), jax.process_index(), jax.process_count()))
    listed = [s.manifest for s in self.streams.values() if s.manifest]
    self.lists = ({'manifest': listed[0]} if listed else {}) | self.streams
    self.records = {n: {'count': s.records, 'hash': s.digest} for n, s in self.lists.items()}
    preflight.same_records(self.records)
    self.read_ahead = sum(s.read_ahead for s in self.streams.values())
    preflight.check_memory(self.read_ahead)
    validate.check_channels(config, {n: s.fields for n, s in self.streams.items()})
    self.method = validate.made(base.make, config, {n: (s.records, s.fields) for n, s in self.streams.items()})
    validate.check_method(config, self.method)
    self.total = self.method.total_steps
    self.optimiser = optim.of(config, self.method)

    init = step.make_init(config, self.method, self.optimiser)
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(init, key, {})
    placed = sharding.shardings(abstract, self.mesh)
    processes.together(lambda: preflight.check_state(checkpoint.template(abstract, placed)))
    self.checkpoints = checkpoint.Checkpoints(checkpoint.absolute(folder) / 'checkpoints', config.checkpoint.keep)
    self.best = Best(checkpoint.absolute(folder) / 'best', config.eval) if config.eval.select else None
    self.template = template = checkpoint.template(abstract, placed)
    restored = self.checkpoints.restore(template, resume == 'strict',
                                        self.refusal if resume != 'force' else lambda meta: None)
    processes.on_main(lambda: workdir.keep_records(folder, {n: s.listing() for n, s in self.lists.items()}))
    if restored is None:
      if config.init_from:
        processes.together(lambda: files.check_there(config.init_from))
      given = processes.together(lambda: validate.made(self.method.given))
      counted = {k: x for k, x in abstract.extra.items() if k == 'batch_stats'}
      given |= init_from.read(config, abstract.params | counted) if config.init_from else {}
      self.loaded = {'loaded': [len(given), len(jax.tree.leaves((abstract.params, counted)))],
                     'weights_hash': init_from.encoder_hash(given)}
      self.state = jax.jit(init, out_shardings=placed)(key, given)
    else:
      state, meta = restored
      self.cost.before = meta.get('cost', {})
      self.loaded = {k: meta[k] for k in ('loaded', 'weights_hash') if k in meta}
      self.state = own(state)
      for name, stream in self.streams.items():
        stream.seek(meta['positions'].get(name, 0))      # --resume=force may have turned a stream on
      logging.info('resumed step %d | data index %s', int(self.state.step),
                   ', '.join(f'{n} {p}' for n, p in meta['positions'].items()))
    pool = futures.ThreadPoolExecutor(1)      # compiles while phantoms are drawn and evaluated; one at a time: memory
    self.steps = {n: pool.submit(step.compiled, config, self.method, self.optimiser, n, self.mesh, self.streams,
                                 template) for n in self.method.phases}
    pool.shutdown(wait=False)

  def refusal(self, meta) -> str | None:
    """Why a checkpoint is not this run's."""
    force = 'or --resume=force to go on with what is there now'
    if meta['config_hash'] != workdir.config_hash(self.config):
      return f'was written by another config. FIX: use a new --workdir, {force}'
    for name, mine in self.records.items():
      theirs = meta.get('records', {}).get(name)
      if theirs and theirs != mine:
        what = manifest.changes(workdir.records(self.folder).get(name, []), self.lists[name].listing())
        back = 'it back' if name == 'manifest' else 'the files back (lines above name the skipped ones)'
        return (f'was written with other records of data.{name} ({theirs["count"]} then, {mine["count"]} now; '
                f'{what or "their order or content differs"}): samples would not be the same. FIX: bring {back}, '
                f'{force}')
    return None

  def train(self, stop, watchdog, preempt_exit_code) -> int:
    """The loop from where the state stands; returns the exit code."""
    config, total = self.config, self.total
    start = int(self.state.step)
    over = lambda at: bool(self.best) and self.best.exhausted(at)
    chance = {n: p.chance for n, p in self.method.phases.items()}
    if self.main:
      self.writer = Writer(self.mirror.local, start, config.log.tensorboard, config.log.wandb, config.to_dict())
      self.judge = health.Judge(config, chance, summary.rows(self.mirror.local))
    self.live = Live(self.mirror.local if self.main else None, chance)
    preflight.describe(config, self.method, self.state, self.streams, self.read_ahead, self.mesh)
    self.observer = Observer(config, self.method, self.mesh, evalset.build(config) if config.eval.tasks else None,
                             evalset.preview(config, self.streams))
    tests = cases.of(config, 'test') if 'task' in config else None      # a fault of theirs must not wait for the end
    plan = [self.method.schedule(i)[0] for i in range(total)]
    names = tuple(self.method.phases)
    self.progress = Progress(np.array([names.index(p) for p in plan], int), names)
    logged = logged_steps(plan, config.log.every) | {total - 1}
    processes.meet('evaluation set')
    if start == 0:
      if 'task' in config and config.task.probe_first:
        self.state = probe_first.start(self.state, self.observer, self.fit(tests.stream))
      self.evaluate(0)
    steps = {n: s.result() for n, s in self.steps.items()}
    moved = {n: jax.jit(step.make_moved(config, self.method, self.optimiser, n)) for n in steps}
    costs = {n: preflight.cost(s, self.mesh.size) for n, s in steps.items()}
    self.flops = {n: c.flops for n, c in costs.items()}
    logging.info('a step of %s', preflight.told(costs))
    processes.meet('compiled')
    preflight.trim_memory()
    fetcher = futures.ThreadPoolExecutor(1)     # draws the next batch while the device works
    batch = self.take(plan[start]) if start < total else None
    ahead = AHEAD.get(jax.default_backend(), 1)
    running = collections.deque()
    self.settled = time.monotonic()
    read = boundary.reader(self.streams, config.batch, self.mesh)
    for i in range(start, start if over(start) else total):
      name, after = plan[i], i + 1
      positions = {n: s.position() for n, s in self.streams.items()}
      self.state = boundary.crossed(self.method, self.state, i, read)
      self.state, metrics = steps[name](self.state, batch)
      if i in logged:
        metrics |= moved[name](self.state, metrics['train/skipped'])
      given = batch
      fetched = fetcher.submit(self.take, plan[after]) if after < total else None
      if not ahead:
        jax.block_until_ready(metrics)
      elif fetched:
        idle(fetched, metrics)
      with Stopwatch() as waiting:
        batch = fetched.result() if fetched else None
      running.append((i, name, metrics, waiting.seconds, given))
      watchdog.alive()
      last, asked = after == total, stop.asked(after)
      due = [last or every and after % every == 0
             for every in (config.eval.every, config.log.images_every, config.checkpoint.every)]
      event = asked or any(due)
      while len(running) > (0 if event else ahead):
        self.settle(*running.popleft(), logged)
      if not event:
        continue
      if due[0]:
        self.evaluate(after, positions)
        if not last and over(after):
          logging.info('%s did not rise in %d evaluations: the run ends', config.eval.select, config.eval.patience)
          last = True
      if last or due[1]:
        self.pictures(after)
      if last or asked or due[2]:
        self.save(after, positions)
      if asked and not last:
        self.checkpoints.wait()
        logging.info('%s: saved step %d; the same command continues from there', asked, after)
        return preempt_exit_code
      watchdog.alive()
      if last:
        break
      self.live.refresh()
      self.settled = time.monotonic()
    self.checkpoints.wait()
    if self.best:
      self.best.checkpoints.wait()
    if tests:
      self.test(tests, watchdog)
    self.mirror.flush()
    if self.main:
      workdir.finish(self.folder, config)
      summary.show(self.folder, self.method, self.observer.tests())
    return 0

  def take(self, phase):
    """The next batch of a phase, on the devices."""
    rows = {s: self.streams[s].next() for s in self.method.phases[phase].streams}
    return sharding.to_devices(rows, self.mesh)

  def settle(self, i, phase, metrics, waited, batch, logged):
    """Counts step i, and tells what is to be told of it."""
    skipped, began = int(metrics['train/skipped']), self.settled
    self.settled = time.monotonic()
    self.progress.add(phase, self.method.phases[phase].streams, waited, self.settled - began)
    if skipped or i in logged:
      self.checkpoints.check()
      self.log(i, phase, metrics)
    if skipped:
      self.skipped(i, phase, metrics, batch)
    every = self.config.log.health_every
    if self.main and every and ((i + 1) % every == 0 or i + 1 == self.total):
      found, told = self.judge.verdict(i + 1)
      logging.log(logging.WARNING if found else logging.INFO, told)
    if forecast := self.progress.forecast(i + 1, self.mesh.size, self.flops):
      logging.info(forecast)

  def log(self, i, phase, metrics):
    """One row of metrics.jsonl and one line: the values of step i, rates since the last line."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items() if k not in HOST_ONLY}
    perf = self.progress.scalars(phase) | {health.DONE: (i + 1) / self.total}
    if self.main:
      self.writer.write_scalars(i, values | perf, phase)
      self.judge.add(i, phase, {k: v for k, v in values.items() if math.isfinite(v)} | perf)
      logging.info(self.progress.line(i + 1, phase, values, perf))
      self.mirror.push()

  def skipped(self, i, phase, metrics, batch):
    row = int(metrics['train/skipped_in_a_row'])
    seen = autopsy.report(self.mirror.local, i, batch, self.state.params, jax.device_get(metrics))
    logging.warning('step %d %s: loss or gradient is not finite; step skipped (%d in a row, %d end the run); %s',
                    i, phase, row, self.config.optim.max_skipped, seen)
    if row >= self.config.optim.max_skipped:
      kept = self.checkpoints.steps()
      raise TrainError(f'step {i} {phase}: {row} steps in a row were not finite; the last good checkpoint is '
                       f'{kept[-1] if kept else "none"}. FIX: lower optim.lr, set optim.clip, or check the data')

  def evaluate(self, at: int, positions=None):
    if not self.observer.evalset:
      return
    with Stopwatch() as watch:
      values = self.observer.scores(self.state, at)
    if self.main:
      cost = {f'perf/{k}': v for k, v in self.cost.spent().items()}
      self.writer.write_scalars(at, values | cost, EVAL)
      self.judge.add(at, EVAL, values)
    short = {k: v for k, v in values.items() if k.count('/') == 1}
    logging.info('eval step %d on %s (%s): %s', at, self.observer.evalset.name, clock(watch.seconds),
                 ', '.join(f'{k[5:]} {v:.3f}' for k, v in short.items()))
    if positions is not None and self.best:
      self.best.offer(at, self.state, values, self.about(positions))

  def test(self, tests, watchdog):
    """The best weights, or the last ones, on the test split."""
    restored = self.best.restore(self.template) if self.best else None
    state = restored[0] if restored else self.state
    fit = self.fit(tests.stream)
    watchdog.alive()
    about = self.loaded | {'step': int(state.step), 'steps': int(self.state.step),
                           'parameters': parameters(state.params)} | self.cost.spent()
    local = self.mirror.local if self.main else None
    save = lambda i, labels: tests.save(i, labels, local / 'eval' / 'predictions')
    final_test.run(self.config, self.observer.logits(state, tests), fit, tests, about, local,
                   save if self.config.eval.save else None)

  def fit(self, stream):
    return cases.of(self.config, 'train', self.streams[stream].source)

  def pictures(self, at: int):
    reconstructions = self.observer.reconstructions(self.state)
    if self.main:
      made = self.observer.sheets(self.mirror.local, at, reconstructions)
      if made:
        self.writer.write_images(at, {f'sheets/{name}': image for name, (_, image) in made.items()})
        logging.info('pictures: %s', ', '.join(path for path, _ in made.values()))

  def save(self, at: int, positions):
    self.mirror.flush()
    with Stopwatch() as watch:
      self.checkpoints.save(at, self.state, self.about(positions))
    logging.info('checkpoint of step %d: the loop stood still for %.2f s, the files are written meanwhile', at,
                 watch.seconds)

  def about(self, positions) -> dict:
    """What a checkpoint says of itself."""
    return {'format': 1, 'positions': positions, 'records': self.records, 'cost': self.cost.spent(),
            'config_hash': workdir.config_hash(self.config), 'versions': workdir.versions()} | self.loaded

  def end(self, checkpoints):
    try:
      checkpoints.close()
    except checkpoint.CheckpointError as e:      # what ended the run is told already, or was this very error
      logging.error(e)

  def close(self, wait: bool):
    """Ends threads. With wait, what was being saved is saved, whatever else went wrong; without other processes that
    take part it cannot be."""
    with contextlib.ExitStack() as stack:
      if self.writer:
        stack.callback(self.live.finish)
      for checkpoints in (self.checkpoints, self.best and self.best.checkpoints):
        if checkpoints and wait:
          stack.callback(self.end, checkpoints)
      for stream in self.streams.values():
        stack.callback(stream.close)
      if self.writer:
        stack.callback(self.writer.close)
