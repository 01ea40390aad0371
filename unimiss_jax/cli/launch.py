"""One run on several machines, or on this one: python -m unimiss_jax.cli.launch --nodes=N --config=... --workdir=...

--print=slurm|gke|tpu-vm|local prints the script (for GKE the manifest) that makes the environment and starts main.py on
every node; a run that is preempted saves, and is started again. Without --print, N processes start here, each with its
share of --devices virtual CPU devices.
"""
import math
import os
import re
import sys

from data_pipelines.command import Parser, fail
from unimiss_jax.cli import arguments, launch_local, launch_scripts
from unimiss_jax.cli.arguments import PROGRAM, SETTINGS

USAGE = ('python -m unimiss_jax.cli.launch [--print=slurm|gke|tpu-vm|local] --nodes=N --config=FILE[:preset] '
         '--workdir=DIR [flags of --help] [--config.a.b=value] [--resume=...] [--debug]')
PRINTED = {'slurm': launch_scripts.slurm, 'gke': launch_scripts.gke, 'tpu-vm': launch_scripts.tpu_vm,
           'local': launch_scripts.local}
FLAGS = {      # of which kinds
    'devices': ('local',), 'name': ('slurm', 'gke'), 'folder': ('slurm', 'gke', 'tpu-vm'),
    'setup': ('slurm', 'gke', 'tpu-vm'), 'grace': ('slurm', 'gke'), 'gpus_per_node': ('slurm', 'gke'),
    'cpus': ('slurm', 'gke'), 'memory': ('slurm', 'gke'), 'partition': ('slurm',), 'account': ('slurm',),
    'time': ('slurm',), 'sbatch': ('slurm',), 'image': ('gke',), 'accelerator': ('gke', 'tpu-vm'),
    'topology': ('gke',), 'tpus_per_node': ('gke',), 'namespace': ('gke',), 'volumes': ('gke',),
    'spot': ('gke', 'tpu-vm'), 'tpu': ('tpu-vm',), 'zone': ('tpu-vm',), 'project': ('tpu-vm',), 'version': ('tpu-vm',)}
NEEDED = {'gke': ('image',), 'tpu-vm': ('tpu', 'zone', 'accelerator', 'version')}
FOLDERS = {'gke': '/workspace', 'tpu-vm': 'unimiss_jax'}      # elsewhere the folder of this call, seen by all nodes
DNS = r'[a-z]([-a-z0-9]{0,45}[a-z0-9])?'                      # with the index of a pod at most 63 characters
WORD = r'[\w.,:@%+=/*\[\]-]+'                                 # of an #SBATCH line, or of gcloud


def main(argv=None) -> int:
  p = parser()
  f, rest = p.parse_known_args(argv)
  kind = f.print or 'local'
  for name, kinds in FLAGS.items():
    if getattr(f, name) != p.get_default(name) and kind not in kinds:
      p.error(f'--{name} is for --print={" and ".join(kinds)}, not for {kind}')
    if name in NEEDED.get(kind, ()) and not getattr(f, name):
      p.error(f'--print={kind} needs --{name}')
  if wrong := wrong_value(f, kind, rest):
    p.error(wrong)
  if wrong := wrong_config(f.config, rest):
    return fail(wrong, 2)
  f.folder = f.folder or FOLDERS.get(kind, os.getcwd())
  command = [PROGRAM, f'--config={f.config}', f'--workdir={f.workdir}', *rest]
  if not f.print:
    return launch_local.run(command, f.nodes, f.devices or f.nodes)
  print(PRINTED[kind](f, command), end='')
  return 0


def parser() -> Parser:
  p = Parser(__doc__, USAGE)
  p.add_argument('--print', choices=tuple(PRINTED), help='print a script instead of starting processes here')
  p.add_argument('--nodes', type=int, default=1, help='machines; here: processes')
  p.add_argument('--config', required=True, help='as of main.py')
  p.add_argument('--workdir', required=True, help='as of main.py; all nodes see it')
  p.add_argument('--devices', type=int, default=0, help='local: CPU devices of all processes together; 0: one each')
  p.add_argument('--name', default='unimiss', help='of the job')
  p.add_argument('--folder', default='', help='of main.py on the nodes')
  p.add_argument('--setup', default='', help='a shell command that comes first on every node: module load cuda')
  p.add_argument('--grace', type=int, default=120, help='seconds that a save may take when the job must go')
  p.add_argument('--gpus_per_node', type=int, default=0, help='slurm: a process for each; gke: one process for all')
  p.add_argument('--cpus', type=int, default=0, help='cores of a process')
  p.add_argument('--memory', default='', help='of a node: slurm 64G, gke 64Gi')
  p.add_argument('--partition', default='', help='slurm')
  p.add_argument('--account', default='', help='slurm')
  p.add_argument('--time', default='', help='slurm: D-HH:MM:SS; a save is asked for --grace seconds before')
  p.add_argument('--sbatch', default='', help='slurm: further options, --qos=high --constraint=a100')
  p.add_argument('--image', default='', help='gke: container image with the project at --folder')
  p.add_argument('--accelerator', default='', help='gke: nvidia-h100-80gb or tpu-v5-lite-podslice, as the nodes are '
                 'labelled; tpu-vm: v5litepod-16')
  p.add_argument('--topology', default='', help='gke: of the TPU slice, 4x4')
  p.add_argument('--tpus_per_node', type=int, default=0, help='gke: chips of a TPU node')
  p.add_argument('--namespace', default='', help='gke')
  p.several('--volumes', (), (), help='gke: persistent volume claims and where they are mounted, CLAIM:/data,...')
  p.add_argument('--spot', action='store_true', help='gke, tpu-vm: on machines that may be taken away')
  p.add_argument('--tpu', default='', help='tpu-vm: name; made where it is not there')
  p.add_argument('--zone', default='', help='tpu-vm')
  p.add_argument('--project', default='', help='tpu-vm: of Google Cloud')
  p.add_argument('--version', default='', help='tpu-vm: runtime version, v2-alpha-tpuv5-lite')
  return p


def wrong_value(f, kind: str, rest) -> str | None:
  """What cannot be launched so."""
  values = [*(v for v in vars(f).values() if isinstance(v, str)), *f.volumes, *rest]
  if broken := [v for v in values if not v.isprintable()]:
    return f'{broken[0]!r}: line breaks and control characters cannot be passed on'
  passed = r'--config\.[\w.]+=.*|--resume=\w+|--debug' + ('' if f.print else r'|--preempt_exit_code=\d+')
  if unknown := [a for a in rest if not re.fullmatch(passed, a)]:
    return f'unknown argument {unknown[0]}'
  if f.nodes < 1:
    return f'--nodes={f.nodes}: at least 1'
  if negative := [k for k, v in vars(f).items() if isinstance(v, int) and v < 0]:
    return f'--{negative[0]}={getattr(f, negative[0])}: at least 0'
  if f.devices % f.nodes:
    return f'--devices={f.devices}: {f.nodes} processes cannot share them evenly'
  if kind == 'slurm':
    words = (f.name, f.partition, f.account, f.time, f.memory, *f.sbatch.split())
    if bad := [w for w in words if w and not re.fullmatch(WORD, w)] + [w for w in f.sbatch.split() if w[0] != '-']:
      return f'"{bad[0]}": not for an #SBATCH line'
  if kind == 'gke':
    return _wrong_gke(f)
  if kind == 'tpu-vm':
    if bad := [w for w in (f.tpu, f.zone, f.project, f.accelerator, f.version) if w and not re.fullmatch(WORD, w)]:
      return f'"{bad[0]}": not a name of Google Cloud'
    if '://' not in f.workdir:
      return f'--workdir={f.workdir}: the disk of a TPU VM goes with it, use gs://'
  return None


def _wrong_gke(f) -> str | None:
  if not re.fullmatch(DNS, f.name):
    return f'--name={f.name}: small letters, digits and -, at most 47'
  if bad := [v for v in f.volumes if not re.fullmatch(r'[-a-z0-9.]+:/.+', v)]:
    return f'--volumes={bad[0]}: needs CLAIM:/folder'
  mounted = tuple(v.partition(':')[2].rstrip('/') + '/' for v in f.volumes)
  if '://' not in f.workdir and not f.workdir.startswith(mounted):
    return f'--workdir={f.workdir}: a pod loses its disk, use gs:// or a folder of --volumes'
  if f.gpus_per_node and f.tpus_per_node:
    return '--gpus_per_node and --tpus_per_node: one of them'
  if bool(f.tpus_per_node) != bool(f.topology) or f.tpus_per_node and not f.accelerator:
    return 'a TPU slice needs --accelerator, --topology and --tpus_per_node'
  if f.topology:
    chips = math.prod(map(int, f.topology.split('x'))) if re.fullmatch(r'\d+(x\d+)+', f.topology) else 0
    if chips != f.nodes * f.tpus_per_node:
      return f'--topology={f.topology} has {chips} chips, --nodes={f.nodes} --tpus_per_node={f.tpus_per_node} has not'
  return None


def wrong_config(file: str, rest) -> str | None:
  """What main.py would refuse on every node."""
  for needed in (PROGRAM, SETTINGS, file.partition(':')[0]):
    if not os.path.exists(needed):
      return f'{needed}: no such file. FIX: call it in the folder of {PROGRAM}'
  try:
    return arguments.unknown_key(file, rest)
  except Exception as e:      # whatever a config file raises
    return f'--config={file}: {e}'


if __name__ == '__main__':
  sys.exit(main())
