"""Joint with all three phases, of a size that compiles fast, in float64."""
from tests.e2e import test_joint


def get_config(arg):
  """arg: swav, with a queue and small crops | deepcluster."""
  leaves = (dict(image_clusters=(4, 4, 4)) if arg == 'deepcluster' else
            dict(image_queue=8, volume_queue=8, local=dict(crops=2, size=64, scale=(.1, .3))))
  config = test_joint.config(f'phantom,objective={arg}', **leaves).unlock()
  config.model.dtype = 'float64'
  config.log.tensorboard = False
  return config.lock()
