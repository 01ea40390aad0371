"""The loop: pre-training of any method. It knows no method by name.

Order in a step: remember the stream positions, dispatch the step, draw the next batch while the device
works, wait, log, evaluate, save. A checkpoint holds the state after step n and the positions after
the batch of step n, so a resumed run takes the same batches and draws the same random numbers.
"""
import contextlib
import ctypes
import logging
import signal
import sys
from concurrent import futures

import jax
import numpy as np
from etils import epath

from data_pipelines import evalset, streams
from unimiss_jax import checkpoint, optim, sharding, step, validate, workdir
from unimiss_jax.evals import online
from unimiss_jax.methods import base
from unimiss_jax.progress import Progress, Stopwatch, clock
from unimiss_jax.report import sheets, summary
from unimiss_jax.state import own, parameters
from unimiss_jax.watchdog import Watchdog
from unimiss_jax.writers import EVAL, Writer

EVAL_ROWS = 50      # samples per call of the embedding, chosen by us


class TrainError(Exception):
  """The run cannot go on; the message says why and what to do."""


def train_and_evaluate(config, folder: str, resume: str = 'auto', preempt_exit_code: int = 0) -> int:
  """Runs `config` in `folder` to its end, or continues what is there.

  Args:
    config: a locked ConfigDict of configs/.
    folder: workdir, see workdir.py.
    resume: 'auto' falls back from a damaged checkpoint, 'strict' refuses, 'force' accepts another config.
    preempt_exit_code: what to return after a save that SIGTERM or SIGUSR1 asked for.

  Returns:
    The exit code: 0 when the run is complete.

  Raises:
    ConfigError, CheckpointError, DataError, TrainError: one clear line each.
  """
  validate.validate(config)
  validate.check_devices(config, jax.device_count())
  workdir.claim(folder, config, resume)
  stop = StopSignal()
  handler = workdir.log_to(folder)
  run = None
  try:
    if workdir.finished(folder, config):
      logging.info('%s is complete (file DONE), nothing to do; another --workdir starts anew', folder)
      return 0
    run = Run(config, folder, resume)
    with Watchdog(config.log.watchdog_min) as watchdog:
      return run.train(stop, watchdog, preempt_exit_code)
  finally:
    stop.restore()
    if run:
      run.close()
    logging.getLogger().removeHandler(handler)
    handler.close()


class StopSignal:
  """SIGTERM or SIGUSR1 asks for a save and an orderly end after the current step."""

  def __init__(self):
    self.received = None
    self._former = {s: signal.signal(s, self._set) for s in (signal.SIGTERM, signal.SIGUSR1)}

  def _set(self, number, frame):
    self.received = signal.Signals(number).name

  def restore(self):
    for s, handler in self._former.items():
      signal.signal(s, handler)


class Run:
  """Everything of one run that lives in memory, built in the order in which it depends on each other."""

  def __init__(self, config, folder, resume):
    self.config, self.folder = config, folder
    self.main = jax.process_index() == 0
    self.writer = self.evalset = None
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    self.streams = streams.build(config, validate.streams(config), jax.process_index(), jax.process_count())
    self.method = validate.made(base.make, config, {n: (s.records, s.spec) for n, s in self.streams.items()})
    validate.check_method(config, self.method)
    self.total = self.method.total_steps
    self.optimiser = optim.adamw(self.method.groups, clip=config.optim.clip, clip_mode=config.optim.clip_mode)

    init = step.make_init(config, self.method, self.optimiser)
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(init, key)
    placed = sharding.shardings(abstract, self.mesh)
    self.checkpoints = checkpoint.Checkpoints(folder, config.checkpoint.keep)
    template = checkpoint.template(abstract, placed)
    restored = self.checkpoints.restore(template, strict=resume == 'strict')
    if restored is None:
      self.state = jax.jit(init, out_shardings=placed)(key)
    else:
      state, meta = restored
      self.state = own(state)
      for name, stream in self.streams.items():
        stream.seek(meta['positions'].get(name, 0))      # --resume=force may have turned a stream on
      logging.info('resumed step %d | data index %s', int(self.state.step),
                   ', '.join(f'{n} {p}' for n, p in meta['positions'].items()))
    pool = futures.ThreadPoolExecutor(1)      # compiles while phantoms are drawn and evaluated; one at a time: memory
    self.steps = {n: pool.submit(self.compile, n, template) for n in self.method.phases}
    pool.shutdown(wait=False)
    branch = 'teacher' if 'teacher' in self.method.weights else 'student'
    weights = self.method.weights[branch]
    self.predict = {n: jax.jit(lambda s, b, f=f: f(weights(s.params, s.extra), s.extra, b))
                    for n, f in self.method.predict.items()}

  def compile(self, phase, state):
    """The step of a phase for the shapes of `state` and of the streams; it donates its state."""
    rows = sharding.batch_sharding(self.mesh)
    batch = {s: {k: jax.ShapeDtypeStruct((n, *shape), dtype, sharding=rows)
                 for k, (shape, dtype) in self.streams[s].spec.items()}
             for s, n in self.method.phases[phase].streams.items()}
    out = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(self.mesh)
    f = step.make_step(self.config, self.method, self.optimiser, phase, self.mesh)
    return jax.jit(f, donate_argnums=0, out_shardings=out).lower(state, batch).compile()

  def train(self, stop, watchdog, preempt_exit_code) -> int:
    config, total = self.config, self.total
    start = int(self.state.step)
    if self.main:
      self.writer = Writer(self.folder, start, config.log.tensorboard)
      self.describe()
      self.evalset = evalset.build(config) if config.eval.tasks else None
      self.preview = evalset.preview(config, self.streams)
    plan = [self.method.schedule(i)[0] for i in range(total)]
    names = tuple(self.method.phases)
    progress = Progress(np.array([names.index(p) for p in plan], int), names)
    logged = logged_steps(plan, config.log.every)
    if start == 0:
      self.evaluate(0)
    steps = {n: s.result() for n, s in self.steps.items()}
    trim_memory()
    fetcher = futures.ThreadPoolExecutor(1)     # draws the next batch while the device works
    batch = self.take(plan[start]) if start < total else None
    for i in range(start, total):
      name, after = plan[i], i + 1
      positions = {n: s.position() for n, s in self.streams.items()}
      with Stopwatch() as whole:
        self.state, metrics = steps[name](self.state, sharding.to_devices(batch, self.mesh))
        fetched = fetcher.submit(self.take, plan[after]) if after < total else None
        jax.block_until_ready(metrics)
        with Stopwatch() as waiting:
          batch = fetched.result() if fetched else None
      watchdog.alive()
      progress.add(name, self.method.phases[name].streams, waiting.seconds, whole.seconds)
      skipped, last, asked = int(metrics['train/skipped']), after == total, stop.received
      if skipped or last or i in logged:
        self.log(i, name, metrics, progress)
      if skipped:
        self.skipped(i, name, metrics)
      if last or config.eval.every and after % config.eval.every == 0:
        self.evaluate(after)
      if last or config.log.images_every and after % config.log.images_every == 0:
        self.pictures(after)
      if last or asked or after % config.checkpoint.every == 0:
        self.save(after, positions)
      if asked and not last:
        self.checkpoints.wait()
        logging.info('%s: saved step %d; the same command continues from there', asked, after)
        return preempt_exit_code
      watchdog.alive()
    self.checkpoints.wait()
    if self.main:
      workdir.finish(self.folder, config)
      tests = int((~self.evalset.fit['ct']).sum()) if self.evalset and 'ct' in self.evalset.fit else 0
      summary.show(self.folder, self.method, tests)
    return 0

  def take(self, phase):
    return {s: self.streams[s].next() for s in self.method.phases[phase].streams}

  def describe(self):
    lr, _ = step.schedules(self.config, self.method)
    levels = {f'{n} {k[6:]} {v:.3f}' for n, p in self.method.phases.items() for k, v in p.chance.items()}
    logging.info('%s, preset %s | %.2f M parameters | %d steps, %d an epoch | %s | mesh %s | learning rate %.2e',
                 self.config.method, self.config.preset, parameters(self.state.params) / 1e6, self.total,
                 self.method.steps_per_epoch,
                 ', '.join(f'{s.records} {n} records' for n, s in self.streams.items()),
                 dict(self.mesh.shape), max(float(lr(i)) for i in range(0, self.total, max(self.total // 1000, 1))))
    if levels:
      logging.info('chance level: %s', ', '.join(sorted(levels)))

  def log(self, i, phase, metrics, progress):
    """One row of metrics.jsonl and one line: the values of step i, rates since the last line."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items() if k != 'train/skipped_in_a_row'}
    perf = progress.scalars(phase)
    if self.main:
      self.writer.write_scalars(i, values | perf, phase)
      logging.info(progress.line(i + 1, phase, values, perf))

  def skipped(self, i, phase, metrics):
    row = int(metrics['train/skipped_in_a_row'])
    logging.warning('step %d %s: loss or gradient is not finite; step skipped (%d in a row, %d end the run)',
                    i, phase, row, self.config.optim.max_skipped)
    if row >= self.config.optim.max_skipped:
      kept = self.checkpoints.steps()
      raise TrainError(f'step {i} {phase}: {row} steps in a row were not finite; the last good checkpoint is '
                       f'{kept[-1] if kept else "none"}. FIX: lower optim.lr, set optim.clip, or check the data')

  def evaluate(self, at: int):
    if not self.evalset:
      return
    with Stopwatch() as watch:
      features = {k: self.embed(k, x) for k, x in self.evalset.views.items()}
      values = online.run(features, self.evalset, self.config.eval.tasks)
    values = {k: v for k, v in values.items() if np.isfinite(v)}
    if at == 0:
      values |= online.control(self.evalset, self.config.eval.tasks, self.config.drr.view)
    self.writer.write_scalars(at, values, EVAL)
    short = {k: v for k, v in values.items() if k.count('/') == 1}
    logging.info('eval step %d on %s (%s): %s', at, self.evalset.name, clock(watch.seconds),
                 ', '.join(f'{k[5:]} {v:.3f}' for k, v in short.items()))

  def embed(self, name, x):
    """[N, 1, ...] -> [N, E] in calls of one static size."""
    out = []
    for at in range(0, len(x), EVAL_ROWS):
      part = x[at:at + EVAL_ROWS]
      padded = np.concatenate([part, np.repeat(part[-1:], EVAL_ROWS - len(part), 0)])
      out.append(np.asarray(self.predict['embed'](self.state, {name: padded})[name])[:len(part), 0])
    return np.concatenate(out)

  def pictures(self, at: int):
    if not self.main:
      return
    reconstruction = {}
    if 'reconstruct' in self.predict:
      for part in self.preview.values():
        reconstruction |= jax.device_get(self.predict['reconstruct'](self.state, part['views']))
    made = sheets.write(self.folder, at, self.preview, reconstruction, self.config.drr.view)
    self.writer.write_images(at, {f'sheets/{epath.Path(p).stem.split("_")[0]}': np.stack([np.asarray(s)] * 3, -1)
                                  for p, s in made.items()})
    logging.info('pictures: %s', ', '.join(made))

  def save(self, at: int, positions):
    self.checkpoints.save(at, self.state, {
        'format': 1, 'positions': positions, 'config_hash': workdir.config_hash(self.config),
        'versions': workdir.versions()})

  def close(self):
    """Ends threads; what was being saved is saved, whatever else went wrong."""
    with contextlib.ExitStack() as stack:
      stack.callback(self.checkpoints.close)
      for stream in self.streams.values():
        stack.callback(stream.close)
      if self.writer:
        stack.callback(self.writer.close)


def trim_memory() -> None:
  """Gives freed memory back to the system, where glibc can: compiling leaves it gigabytes that nothing uses again."""
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
  if trim:
    trim(0)


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
