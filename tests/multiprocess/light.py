"""A run that compiles fast and still has what a resume can lose: a teacher, a centre, drop-path, reconstruction."""
from tests.e2e import tiny


def get_config(arg=None):
  """Preset phantom with self-distillation and reconstruction only; 5 steps of each phase; some tensors large enough
  to be split over devices. arg 'float64': in that precision."""
  config = tiny.config(**{
      'steps': 10, 'data.phantom_records': 24, 'checkpoint.every': 2, 'eval.tasks': (), 'log.tensorboard': False,
      **{f'loss.{term}': 0. for term in ('nce', 'pair_nce', 'drr', 'slice', 'recon_drr')}}).unlock()
  config.head.update(dict(out_dim=1024, hidden_dim=256, bottleneck_dim=64))
  config.views.ct.size = config.model.volume_size = (16, 32, 32)
  config.model.dtype = arg or 'float32'
  return config.lock()
