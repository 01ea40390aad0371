"""main.py, which also appends to <workdir>/drawn_<process>.jsonl what it hands to every step."""
import json
import os
import sys

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
      rows = [[int(i), *map(int, rng)] for i, rng in zip(batch['id'], batch['rng'])]
      f.write(json.dumps({'stream': stream, 'end': end, 'rows': rows}) + '\n')
  return drawn


taken, train.Run.take = train.Run.take, take
if __name__ == '__main__':
  sys.exit(app.run(main.main, flags_parser=parse))
