"""What is timed: the config of the full-size model, batches of noise, and our step as train.py compiles it."""
import jax
import numpy as np

from configs import unimiss_plus
from unimiss_jax import checkpoint, optim, porting, sharding, step
from unimiss_jax.methods import base

STEPS_PER_EPOCH = 10
EPOCH = 20      # the one that is timed: behind the warm-up and the frozen last layer


def config(preset: str, batch: int, dtype: str = 'float32'):
  """The preset without drop-path, which the PyTorch twin lacks; everything else as it is."""
  c = unimiss_plus.get_config(preset)
  c.unlock()
  c.batch.ct = c.batch.xray = batch
  c.model.update(dict(decoder_drop_path=0., dtype=dtype))
  return c.lock()


def batches(config) -> dict:
  """{phase: {stream: fields}} of noise with the statistics of the real ones; two views of each record."""
  r, m = np.random.default_rng(0), config.model
  rows = lambda n: {'id': np.arange(n, dtype=np.int32), 'rng': np.zeros((n, 2), np.uint32), 'bad': np.zeros(n, bool),
                    'group': np.arange(n, dtype=np.int32)}
  unit = lambda n: r.random((n, 2, m.image_size, m.image_size, m.in_channels[0]), np.float32)
  b, x = config.batch.ct, config.batch.xray
  ct = 0.6 * r.standard_normal((b, 2, *m.volume_size, m.in_channels[1]), np.float32) - 0.4
  return {'ct': {'ct': rows(b) | {'ct': ct.astype(np.float32), 'drr': unit(b)}},
          'xray': {'xray': rows(x) | {'xray': unit(x)}}}


class Ours:
  """State and compiled steps on a mesh of data x fsdp devices. `start` makes the state of the timed epoch."""

  def __init__(self, config, data: int = 1, fsdp: int = 1):
    self.config = config
    records = config.batch.ct * STEPS_PER_EPOCH
    self.method = base.make(config, {'ct': (records, {}), 'xray': (records, {})})
    self.optimiser = optim.of(config, self.method)
    self.mesh = sharding.make_mesh(data, fsdp, jax.devices()[:data * fsdp])
    self.init = step.make_init(config, self.method, self.optimiser)
    self.key = jax.random.key(config.seed)
    abstract = jax.eval_shape(self.init, self.key, {})
    self.placed = sharding.shardings(abstract, self.mesh)
    self.template = checkpoint.template(abstract, self.placed)

  def start(self):
    state = jax.jit(self.init, out_shardings=self.placed)(self.key, {})
    at = jax.device_put(np.int32(EPOCH * STEPS_PER_EPOCH), self.placed.step)
    return state._replace(step=at)

  def weights(self, state) -> dict:
    """Under PyTorch's names."""
    return porting.to_torch(jax.device_get(state.params))

  def schedules(self) -> dict:
    """Learning rate, weight decay and momentum of the timed step."""
    lr, wd = step.schedules(self.config, self.method)
    m = optim.cosine_schedule(self.config.ema.momentum, self.config.ema.momentum_end, self.method.total_steps, 0)
    return {k: float(f(EPOCH * STEPS_PER_EPOCH)) for k, f in (('lr', lr), ('wd', wd), ('momentum', m))}

  def compile(self, phase: str, batch, told: bool = True):
    """As step.compiled does it; told=False: the step gives no metrics but its losses."""
    rows = sharding.batch_sharding(self.mesh)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), batch)
    out = jax.tree.map(lambda x: x.sharding, self.template), sharding.replicated(self.mesh)
    whole = step.make_step(self.config, self.method, self.optimiser, phase, self.mesh)

    def f(state, batch):
      state, metrics = whole(state, batch)
      return state, {k: x for k, x in metrics.items() if told or k.endswith('loss')}
    return jax.jit(f, donate_argnums=0, out_shardings=out).lower(self.template, shapes).compile()
