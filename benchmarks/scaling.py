"""What a step asks of the network and of each device on 1 to 64 devices, from steps compiled ahead of time.

  python benchmarks/scaling.py [--meshes=1x1,2x1,8x1,1x8,64x1,8x8] [--preset=plain] [--rows=1] [--out=FILE.json]

Nothing is run: each mesh of data x fsdp is compiled in a process with as many virtual CPU devices, with the same number
of records per device. Counted in the program of one device: collectives by kind, the bytes that go into them, and how
many a device must send for them (an all-reduce of n bytes over d devices sends 2 n (d - 1) / d, the others (d - 1) / d
of the whole); temporary buffers and arguments; seconds of compiling. Backends place collectives a little otherwise:
counts are those of the CPU's compiler, the bytes are the algorithm's.
"""
import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 1 << 20
KINDS = 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute'
WIDTH = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'f32': 4, 's32': 4, 'u32': 4, 'f64': 8,
         's64': 8, 'u64': 8}
CALL = re.compile(rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\((.*)$')
ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]<=|mesh\[(.*?)\] \{(.*?)\})")


def collectives(text: str, devices: int) -> dict[str, dict]:
  """{kind: number of calls, bytes of their results in one device, bytes that it sends} of a compiled program."""
  found = {}
  for line in text.splitlines():
    if call := CALL.search(line):
      shape, kind, rest = call.groups()
      n = sum(WIDTH[t] * math.prod(int(d) for d in dims.split(',') if d) for t, dims in ARRAY.findall(shape))
      d = members(rest) or devices
      share = (d - 1) / d
      sent = {'all-reduce': 2 * share, 'all-gather': share, 'reduce-scatter': d - 1, 'all-to-all': share,
              'collective-permute': 1}[kind]      # a reduce-scatter's result is the d-th part
      row = found.setdefault(kind, {'calls': 0, 'mib': 0., 'sent_mib': 0.})
      row['calls'] += 1
      row['mib'] += n / MIB
      row['sent_mib'] += n * sent / MIB
  return found


def members(text: str) -> int:
  """Devices of a group of a collective, in any of the three ways in which a program writes it; 0 = all."""
  if not (found := GROUP.search(text)):
    return 0
  ids, count, mesh, axes = found.groups()
  if mesh is None:
    return int(count or 0) or (len(ids.split(',')) if ids else 0)
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
  return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", axes))


def measure(preset: str, data: int, fsdp: int, rows: int) -> dict:
  from benchmarks import setting
  from unimiss_jax import preflight, sharding
  config = setting.config(preset, rows * data * fsdp)
  ours = setting.Ours(config, data, fsdp)
  found = {'state_mib': sharding.bytes_per_device(ours.template) / MIB}
  for phase, batch in setting.batches(config).items():
    began = time.perf_counter()
    compiled = ours.compile(phase, batch)
    memory, cost = compiled.memory_analysis(), preflight.cost(compiled, data * fsdp)
    found[phase] = {'compile_s': time.perf_counter() - began, 'gflop': cost.flops / 1e9 / (data * fsdp),
                    'temp_mib': memory.temp_size_in_bytes / MIB, 'argument_mib': memory.argument_size_in_bytes / MIB,
                    'collectives': collectives(compiled.as_text(), data * fsdp)}
  return found


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument('--meshes', default='1x1,2x1,4x1,8x1,16x1,32x1,64x1,1x8,8x8')
  p.add_argument('--preset', default='plain')
  p.add_argument('--rows', type=int, default=1, help='records per device')
  p.add_argument('--out', type=pathlib.Path)
  p.add_argument('--only', help=argparse.SUPPRESS)
  f = p.parse_args()
  if f.only:
    print(json.dumps(measure(f.preset, *map(int, f.only.split('x')), f.rows)))
    return 0
  found = {}
  for mesh in f.meshes.split(','):
    n = math.prod(map(int, mesh.split('x')))
    env = os.environ | {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={n}',
                        'JAX_PLATFORMS': 'cpu'}
    env.pop('JAX_COMPILATION_CACHE_DIR', None)      # compiling is counted
    argv = [sys.executable, __file__, f'--only={mesh}', f'--preset={f.preset}', f'--rows={f.rows}']
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found[mesh] = json.loads(done.stdout.splitlines()[-1])
    for phase, row in found[mesh].items():
      if isinstance(row, dict):
        calls = ', '.join(f'{v["calls"]} {k} of {v["mib"]:.1f} MiB (sends {v["sent_mib"]:.1f})'
                          for k, v in row['collectives'].items())
        print(f'{mesh:>6} {phase:4} {row["gflop"]:7.1f} GFLOP, {row["argument_mib"]:.0f} + {row["temp_mib"]:.0f} MiB a '
              f'device, compiled in {row["compile_s"]:.0f} s; {calls or "no collective"}', flush=True)
    if f.out:
      f.out.write_text(json.dumps({'preset': f.preset, 'rows': f.rows, 'meshes': found}, indent=1))
  return 0


if __name__ == '__main__':
  sys.exit(main())
