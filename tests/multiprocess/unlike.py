"""main.py, of which process 1 differs from the others as $UNLIKE says."""
import os
import sys

from absl import app

import main
from unimiss_jax import workdir
from unimiss_jax.cli.arguments import parse

second = '--process_id=1' in sys.argv
if second and os.environ['UNLIKE'] == 'devices':      # before jax looks for them
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
if second and os.environ['UNLIKE'] == 'installation':
  versions = workdir.versions
  workdir.versions = lambda: versions() | {'jax': '0.0'}


def seeing(argv):
  """data.ct is relative to where a process is."""
  if not second and os.environ['UNLIKE'] == 'data':
    os.chdir(os.environ['SEEN'])
  return main.main(argv)


if __name__ == '__main__':
  sys.exit(app.run(seeing, flags_parser=parse))
