"""What a pod would need and how well it would be used: arithmetic on measured figures, as docs/scaling.md shows it.

  python benchmarks/forecast.py [--scaling=FILE.json]

Measured on a CPU (benchmarks/RESULTS.md): FLOPs and memory of compiled steps (from scaling.py, or as below), what the
host spends on a sample and ships of it (input.py). Taken from makers' data sheets: peaks of chips and networks. Nothing
here was run on such a machine; that steps reach 10 or 25 % of the peak is the assumption, not a finding.
"""
import argparse
import json
import pathlib
from typing import NamedTuple

CT_BATCH, XRAY_BATCH = 1024, 4096      # preset pod
GFLOP = {'ct': 433.3, 'xray': 23.0}    # of a record: two views, student and teacher
GRADIENT_MIB = {'ct': 241.5, 'xray': 158.4}      # float32, what must be summed at least; see docs/scaling.md
TEMP_MIB, STATE_MIB = {'ct': 1128, 'xray': 288}, 967      # of a record; of a replica
HOST_MS = {('ct', 'host'): 9.7, ('ct', 'device'): 2.4, ('xray', 'host'): 1.6}
RECORD_MB = {'ct': 3.0, 'xray': .26}   # 24 x 250 x 250 int16; 512 x 512 uint8
SHIPPED_MB = {('ct', 'host'): 1.4, ('ct', 'device'): 3.0, ('xray', 'host'): .22}


class Machine(NamedTuple):
  """tflops: bf16 peak of a chip; hbm: GB/s; link: GB/s that a chip sends in a sum over all; cores: of a host."""
  name: str
  chips: int
  hosts: int
  tflops: float
  hbm: float
  link: float
  cores: int


MACHINES = (Machine('v5e-256', 256, 64, 197., 819., 200., 112),
            Machine('64 H100', 64, 8, 989., 3350., 50., 192))
TILES, STEPS = 20_000, {'ct': 201 * (20_000 // CT_BATCH), 'xray': 50 * (20_000 // CT_BATCH)}      # of a run of pod


def rates(m: Machine, phase: str, share: float) -> float:
  """Records a second at a share of the peak."""
  return share * m.chips * m.tflops * 1e3 / GFLOP[phase]


def needs(m: Machine) -> list[str]:
  """Rows: what a host has to do."""
  out = []
  for phase, place in HOST_MS:
    for share in (.10, .25):
      each = rates(m, phase, share) / m.hosts
      out.append(f'| {m.name} | {phase}, {place} | {share:.0%} | {rates(m, phase, share):,.0f} | {each:,.0f} | '
                 f'{each * HOST_MS[phase, place] / 1e3:.1f} of {m.cores} | {each * RECORD_MB[phase] / 1e3:.2f} | '
                 f'{each * SHIPPED_MB[phase, place] / 1e3:.2f} |')
  return out


def minutes(chips: int, tflops: float, share: float = .25) -> float:
  """Of a run of preset pod on TILES, computing alone."""
  flops = STEPS['ct'] * CT_BATCH * GFLOP['ct'] + STEPS['xray'] * XRAY_BATCH * GFLOP['xray']
  return flops / (chips * tflops * 1e3 * share) / 60


def efficiency(m: Machine) -> list[str]:
  """Rows: a step of preset pod at a quarter of the peak, its sum of gradients and its update."""
  out = []
  for phase, batch in (('ct', CT_BATCH), ('xray', XRAY_BATCH)):
    rows = batch / m.chips
    step = rows * GFLOP[phase] / (.25 * m.tflops)                  # ms
    reduce = 2 * (m.chips - 1) / m.chips * GRADIENT_MIB[phase] * 1.048576 / m.link
    update = 2 * STATE_MIB * 1.048576 / m.hbm                      # every state tensor is read and written
    memory = (STATE_MIB + rows * TEMP_MIB[phase]) / 1024
    out.append(f'| {m.name} | {phase} | {rows:.0f} | {step:.1f} | {reduce:.1f} | {update:.1f} | '
               f'{step / (step + update + reduce):.0%} | {step / (max(step, reduce) + update):.0%} | {memory:.1f} |')
  return out


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--scaling', type=pathlib.Path, help='of scaling.py --out: FLOPs and memory are taken from there')
  f = p.parse_args()
  if f.scaling:
    row = max(json.loads(f.scaling.read_text())['meshes'].items(), key=lambda item: int(item[0].split('x')[0]))[1]
    for phase in GFLOP:
      GFLOP[phase], TEMP_MIB[phase] = row[phase]['gflop'], row[phase]['temp_mib']
  print('| machine | phase, views on | of the peak | records/s | a host | cores a host | read, GB/s a host | '
        'to its chips, GB/s |\n' + '| --- ' * 8 + '|')
  print('\n'.join(line for m in MACHINES for line in needs(m)))
  print('\n| machine | phase | records a chip | compute, ms | sum of gradients, ms | update, ms | efficiency, nothing '
        'overlaps | sum hidden | GiB a chip, float32 |\n' + '| --- ' * 9 + '|')
  print('\n'.join(line for m in MACHINES for line in efficiency(m)))
  print(f'\nminutes of computing for preset pod on {TILES:,} tiles, at 25 %: ' + ', '.join(
      f'{name} {minutes(chips, tflops):.0f}' for name, chips, tflops in (
          ('1 H100', 1, 989.), ('8 H100', 8, 989.), ('64 H100', 64, 989.), ('8 v5e', 8, 197.), ('256 v5e', 256, 197.))))


if __name__ == '__main__':
  main()
