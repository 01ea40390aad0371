"""main.py, which also appends to <workdir>/drawn_<process>.jsonl what it hands to every step."""
import json
import os
import sys

import numpy as np
from absl import app, flags

import main
from unimiss_jax import train
from unimiss_jax.cli.arguments import parse


def take(self, phase):
  drawn = taken(self, phase)
  file = os.path.join(self.folder, f'drawn_{flags.FLAGS.process_id or 0}.jsonl')
  with open(file, 'a') as f:
    for stream, batch in drawn.items():
      end = self.streams[stream].position()
      rows = [[int(i), *map(int, rng)] for i, rng in zip(mine(batch['id']), mine(batch['rng']))]
      f.write(json.dumps({'stream': stream, 'end': end, 'rows': rows}) + '\n')
  return drawn


def mine(x):
  """The rows of a global array that lie on the devices of this process."""
  parts = {s.index[0].start or 0: np.asarray(s.data) for s in x.addressable_shards}
  return np.concatenate([parts[start] for start in sorted(parts)])


taken, train.Run.take = train.Run.take, take
if __name__ == '__main__':
  sys.exit(app.run(main.main, flags_parser=parse))
