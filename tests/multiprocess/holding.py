"""holding.py PORT N I: joins N processes, holds on to the others, says who is gone."""
import sys
import time

from unimiss_jax import processes
from unimiss_jax.lifeline import Lifeline

if __name__ == '__main__':
  port, n, i = map(int, sys.argv[1:])
  processes.join(f'127.0.0.1:{port}', n, i)
  lifeline = Lifeline()
  processes.meet('held')
  time.sleep(1)      # for the connections
  print('holding', flush=True)
  while not lifeline.lost:
    time.sleep(.05)
  print(lifeline.message(), flush=True)
  processes.leave(1)
