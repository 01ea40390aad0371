"""One whole training step of the full-size model beside PyTorch: forward, loss, backward, AdamW, teacher, centre.

  python benchmarks/step.py [--batch=1] [--rounds=5] [--preset=reference] [--peers=released,lean] [--out=FILE.json]
  python benchmarks/step.py --ops       single operations, forward and backward

Ours is unimiss_jax.step.make_step, compiled and donated as train.py does it. Peers, all with the same weights, batch,
config and arithmetic (every loss of the first steps must agree to 1e-4, or nothing is timed):
  released   the released recipe in eager PyTorch, decoders whose output is thrown away included
  lean       without those, fused AdamW, EMA in one call
  compiled   lean with torch.compile; needs a C++ compiler, and minutes to start
  bare       ours without metrics but the losses: what the metrics cost
Presets: `reference` = the released arithmetic on both sides, `plain` = what our users run (3-D tensors are left alone
in X-ray steps, one centre a step), which the peers then do too. Drop-path is off: the PyTorch model has none.

CPU: one core, one thread, launch.env for all, CPU seconds, rounds in turn; ratio = ours / peer within a round, median
and range. The roofline: operations and bytes of our compiled step by XLA's count, and the operations of the lean peer
by PyTorch's own counter, against a product of matrices and a copy timed in the same rounds; `state` is what an AdamW
step must read and write at least. On an accelerator: wall seconds; --dtype=bfloat16; --trace=DIR writes a profile.
"""
import argparse
import functools
import json
import pathlib
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import contest  # noqa: E402

STEPS = {'ct': 1, 'xray': 4, 'gemm': 4, 'copy': 4}      # of a round
TOLERANCE = 1e-4
START = {'ours': 900., 'released': 300., 'lean': 300., 'compiled': 1800., 'bare': 900.}      # s until ready
GEMM, COPY = 2048, 1 << 28      # side, bytes


def ours(args, folder):
  """Facts and cases of our step."""
  import jax
  import jax.numpy as jnp

  from benchmarks import setting
  made = setting.Ours(setting.config(args.preset, args.batch, args.dtype))
  batches = setting.batches(made.config)
  state = made.start()
  if args.name == 'ours':
    np.savez(folder / 'weights.npz', **made.weights(state))
    (folder / 'schedules.json').write_text(json.dumps(made.schedules()))
  compiled, costs, losses = {}, {}, {}
  for phase in args.phases:
    compiled[phase] = f = made.compile(phase, batches[phase], told=args.name == 'ours')
    memory = f.memory_analysis()
    costs[phase] = {'gflop': f.cost_analysis()['flops'] / 1e9, 'gbyte': f.cost_analysis()['bytes accessed'] / 1e9,
                    'state_bytes': memory.argument_size_in_bytes + memory.output_size_in_bytes,
                    'temp_mib': memory.temp_size_in_bytes / 2**20,
                    'argument_mib': memory.argument_size_in_bytes / 2**20}
  on_device = {p: jax.device_put(batches[p]) for p in args.phases}
  held = [state]

  def run(phase):
    held[0], metrics = compiled[phase](held[0], on_device[phase])
    jax.block_until_ready((held[0], metrics))
    return metrics

  for phase in args.phases:
    losses[phase] = {k[6:]: float(v) for k, v in run(phase).items() if k.endswith('loss')}
  if args.trace and args.name == 'ours':
    with jax.profiler.trace(args.trace):
      for phase in args.phases:
        run(phase)
  a = jnp.full((GEMM, GEMM), .5, args.dtype)
  product, device = jax.jit(jnp.matmul).lower(a, a).compile(), jax.devices()[0]
  cases = {p: functools.partial(run, p) for p in args.phases} | {
      'gemm': lambda: product(a, a).block_until_ready(), 'copy': copying(device.platform)}
  return {'cases': list(cases), 'losses': losses, 'costs': costs, 'platform': device.platform,
          'device': device.device_kind, 'version': jax.__version__}, cases


def copying(platform: str):
  """A function that copies COPY bytes to where others are already."""
  if platform == 'cpu':
    a, b = np.ones(COPY, np.uint8), np.ones(COPY, np.uint8)
    return lambda: np.copyto(b, a)
  import jax
  x = jax.numpy.zeros(COPY // 4, np.float32)
  copy, held = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile(), [x]
  return lambda: held.__setitem__(0, copy(held[0]).block_until_ready())


def peer(args, folder):
  import torch
  from torch.utils.flop_counter import FlopCounterMode

  from benchmarks import setting, torch_recipe
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.set_num_threads(1)
  config = setting.config(args.preset, args.batch)
  made = torch_recipe.Recipe(config, np.load(folder / 'weights.npz'),
                             json.loads((folder / 'schedules.json').read_text()), lean=args.name != 'released',
                             compiled=args.name == 'compiled', device=device, dtype=args.dtype)
  batches = setting.batches(config)
  tensors = {p: torch_recipe.views(batches[p], device) for p in args.phases}
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  losses = {p: made.step(p, tensors[p]) for p in args.phases}
  gflop = {}
  for p in args.phases if args.name != 'compiled' else ():
    with FlopCounterMode(display=False) as counter:
      made.step(p, tensors[p])
    gflop[p] = counter.get_total_flops() / 1e9
  cases = {p: lambda p=p: (made.step(p, tensors[p]), wait()) for p in args.phases}
  return {'cases': list(cases), 'losses': losses, 'gflop': gflop, 'version': torch.__version__, 'device': device}, cases


def agree(facts: dict, name: str, limit: float) -> float:
  """The largest relative difference of a loss; raises SystemExit above the limit."""
  pairs = [(phase, k, facts['ours']['losses'][phase][k], v) for phase, losses in facts[name]['losses'].items()
           for k, v in losses.items()]
  worst = max(pairs, key=lambda p: abs(p[2] / p[3] - 1))
  error = abs(worst[2] / worst[3] - 1)
  if not error <= limit:
    sys.exit(f'{name}: not the same work: {worst[1]} of {worst[0]} is {worst[3]}, ours {worst[2]}')
  return contest.rounded(error)


def roofline(phase: str, times: dict, facts: dict) -> dict:
  """What the measured rates allow, beside what was taken."""
  cost, taken = facts['ours']['costs'][phase], float(np.median(times[phase]['ours']))
  gemm = 2 * GEMM**3 / 1e9 / float(np.median(times['gemm']['ours']))         # GFLOP/s
  copy = 2 * COPY / 1e9 / float(np.median(times['copy']['ours']))            # GB/s, read and written
  counted = {'xla': cost['gflop']} | {n: f['gflop'][phase] for n, f in facts.items() if f.get('gflop')}
  least = counted.get('lean', cost['gflop'])
  compute, state = least / gemm, cost['state_bytes'] / 1e9 / copy
  show = {'gflop': counted, 'xla_gbyte': cost['gbyte'], 'state_gbyte': cost['state_bytes'] / 1e9,
          'gemm_gflop_per_s': gemm, 'copy_gbyte_per_s': copy, 'compute_s': compute, 'state_s': state,
          'xla_bytes_s': cost['gbyte'] / copy, 'limit_s': compute + state, 'times_limit': taken / (compute + state),
          'gflop_per_s': least / taken}
  return {k: {n: contest.rounded(x) for n, x in v.items()} if isinstance(v, dict) else contest.rounded(v)
          for k, v in show.items()}


def compare(args) -> dict:
  """Starts the contenders one after the other, checks that they do the same, and times them."""
  contest.one_core()
  limit = TOLERANCE if args.dtype == 'float32' else .05
  lost, contenders = {}, []
  with tempfile.TemporaryDirectory() as folder:
    command = [__file__, f'--folder={folder}', f'--batch={args.batch}', f'--preset={args.preset}',
               f'--dtype={args.dtype}', f'--phases={",".join(args.phases)}', f'--trace={args.trace}']
    try:
      for name in ('ours', *args.peers):
        try:
          contenders.append(contest.Contender(name, command, START[name]))
        except contest.Lost as e:
          if name == 'ours':
            raise
          lost[name] = str(e)
      facts = {c.name: c.facts for c in contenders}
      errors = {n: agree(facts, n, limit) for n in facts if n != 'ours'}
      cpu = facts['ours']['platform'] == 'cpu'
      times = contest.rounds(contenders, {c: STEPS[c] for c in facts['ours']['cases']}, args.rounds,
                             'cpu' if cpu else 'wall')
    finally:
      for c in contenders:
        c.close()
  result = {'unit': 'CPU seconds, one core' if cpu else 'wall seconds', 'preset': args.preset, 'batch': args.batch,
            'dtype': args.dtype, 'rounds': args.rounds, 'device': facts['ours']['device'],
            'versions': {n: f['version'] for n, f in facts.items()}, 'largest_difference_of_a_loss': errors,
            'not_timed': lost}
  for phase in args.phases:
    result[phase] = contest.against('ours', times[phase]) | {
        'roofline': roofline(phase, times, facts),
        'buffers_mib': {k: contest.rounded(facts['ours']['costs'][phase][f'{k}_mib']) for k in ('temp', 'argument')}}
  return result


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--batch', type=int, default=1, help='records of two views each')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--preset', default='reference')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--peers', type=lambda s: [n for n in s.split(',') if n], default=['released', 'lean'])
  parser.add_argument('--phases', type=lambda s: s.split(','), default=['ct', 'xray'])
  parser.add_argument('--trace', default='', metavar='DIR', help='write a profile of one step of each phase')
  parser.add_argument('--ops', action='store_true', help='single operations instead of the step')
  parser.add_argument('--out', help='write the JSON there too')
  parser.add_argument('--folder', type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument('--as', dest='name', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.ops:
    from benchmarks import ops
    if args.name:
      return contest.serve(lambda: ops.side(args.name))
    return contest.show(ops.compare(__file__, args.rounds), args.out)
  if args.name:
    return contest.serve(lambda: (ours if args.name in ('ours', 'bare') else peer)(args, args.folder))
  contest.show(compare(args), args.out)


if __name__ == '__main__':
  main()
