"""What launch prints: shell scripts and a Kubernetes manifest; texts, no process is started.

Saved and asked to go, main.py ends with PREEMPTED here, not with 0: to a scheduler 0 would mean that the run is
complete. Each script starts the run again then, and only then.
"""
import shlex

import yaml

from unimiss_jax.cli.arguments import SETTINGS

PREEMPTED = 75                # EX_TEMPFAIL: try again later
PORT = 55527                  # of process 0 in a pod; the one that jax takes there
RETRIES = 3                   # of each pod, for what may be the fault of a node
OLDEST = 3, 11
PYTHONS = tuple(f'python3.{minor}' for minor in range(14, 10, -1))
LEFT_OUT = '.git', '.venv', '.cache', 'runs'      # not copied to a TPU VM
SHM = {'name': 'shm', 'emptyDir': {'medium': 'Memory'}}


def slurm(f, command) -> str:
  """For sbatch; one task for each GPU, as jax gives a task of Slurm one, else one for each node."""
  tasks = f.gpus_per_node or 1
  options = [f'--job-name={f.name}', f'--nodes={f.nodes}', f'--ntasks-per-node={tasks}']
  options += [f'--gpus-per-node={f.gpus_per_node}'] if f.gpus_per_node else []
  options += [f'--cpus-per-task={f.cpus}'] if f.cpus else []
  options += [f'--{name}={value}' for name, value in (('mem', f.memory), ('partition', f.partition),
                                                      ('account', f.account), ('time', f.time)) if value]
  options += [*f.sbatch.split(), '--requeue', f'--signal=TERM@{f.grace}', '--open-mode=append']
  srun = ['srun', f'--nodes={f.nodes}', f'--ntasks={f.nodes * tasks}', '--kill-on-bad-exit=0',
          *([f'--cpus-per-task={f.cpus}'] if f.cpus else [])]
  return f"""#!/usr/bin/env bash
{chr(10).join(f'#SBATCH {o}' for o in options)}
# sbatch this file, in a folder that all nodes see. Every process gets SIGTERM {f.grace} s before the time is over, and
# when the job is preempted; all save the same step and end with {PREEMPTED}, and the job queues again. Before scancel:
#   scontrol update JobId=ID Requeue=0
set -e
trap 'echo "SIGTERM: waiting for the processes to save"' TERM
{environment(f, command, 'cuda' if f.gpus_per_node else '')}
code=0
{_line([*srun, *_python(command)])} || code=$?
if [ "$code" -eq {PREEMPTED} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def gke(f, command) -> str:
  """For kubectl apply: a Job, what its pods run and, where there are several, the service by which they find pod 0.

  batch/v1 Job with podFailurePolicy (Kubernetes 1.26, stable since 1.31): a pod that saved, or that lost its node, is
  replaced and not counted; a command that cannot work (exit code 2) ends the job; any other failure counts.
  """
  several, chips = f.nodes > 1, f.gpus_per_node or f.tpus_per_node
  kind = 'nvidia.com/gpu' if f.gpus_per_node else 'google.com/tpu'
  flags = []
  if several and not f.tpus_per_node:      # TPU nodes are told by GKE who they are
    flags = [f'--coordinator={f.name}-0.{f.name}:{PORT}', f'--num_processes={f.nodes}']
  script = f"""#!/usr/bin/env bash
set -e
{environment(f, command, 'cuda' if f.gpus_per_node else 'tpu' if f.tpus_per_node else '')}
exec {_line([*_python(command), *flags])}{' --process_id="$JOB_COMPLETION_INDEX"' if flags else ''}
"""
  selector = {'cloud.google.com/gke-spot': 'true'} if f.spot else {}
  if f.accelerator:
    selector[f'cloud.google.com/gke-{"tpu-" if f.tpus_per_node else ""}accelerator'] = f.accelerator
  if f.topology:
    selector['cloud.google.com/gke-tpu-topology'] = f.topology
  asked = ({'cpu': f.cpus} if f.cpus else {}) | ({'memory': f.memory} if f.memory else {})
  claims = [(f'claim-{i}', *v.split(':', 1)) for i, v in enumerate(f.volumes)]
  container = {
      'name': 'main', 'image': f.image, 'command': ['bash', '/launch/run.sh'],
      'resources': {'requests': asked, 'limits': {kind: chips} if chips else {}},
      'volumeMounts': [{'name': 'launch', 'mountPath': '/launch'}, {'name': 'shm', 'mountPath': '/dev/shm'},
                       *({'name': name, 'mountPath': path} for name, _, path in claims)]}
  pod = {
      **({'subdomain': f.name} if several else {}), 'restartPolicy': 'Never',
      'terminationGracePeriodSeconds': f.grace, 'nodeSelector': selector, 'containers': [container],
      'volumes': [{'name': 'launch', 'configMap': {'name': f.name}}, SHM,
                  *({'name': name, 'persistentVolumeClaim': {'claimName': claim}} for name, claim, _ in claims)]}
  exits = lambda action, code: {'action': action,
                                'onExitCodes': {'containerName': 'main', 'operator': 'In', 'values': [code]}}
  rules = [exits('FailJob', 2), exits('Ignore', PREEMPTED),
           {'action': 'Ignore', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]}]
  job = {'completions': f.nodes, 'parallelism': f.nodes, 'completionMode': 'Indexed' if several else 'NonIndexed',
         'backoffLimit': RETRIES * f.nodes, 'podFailurePolicy': {'rules': rules}, 'template': {'spec': pod}}
  meta = {'name': f.name} | ({'namespace': f.namespace} if f.namespace else {})
  made = [{'apiVersion': 'v1', 'kind': 'ConfigMap', 'metadata': meta, 'data': {'run.sh': script}}]
  if several:
    made.append({'apiVersion': 'v1', 'kind': 'Service', 'metadata': meta, 'spec': {
        'clusterIP': 'None', 'publishNotReadyAddresses': True, 'selector': {'job-name': f.name}}})
  made.append({'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': meta, 'spec': job})
  return ('# kubectl apply -f this file. A pod that must go gets SIGTERM: all save the same step, end with '
          f'{PREEMPTED} and are replaced.\n'
          + yaml.dump_all(made, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True))


def tpu_vm(f, command) -> str:
  """For a machine with gcloud: makes the TPU where it is not there, copies the project, runs it, and again."""
  at = [f'--zone={f.zone}', *([f'--project={f.project}'] if f.project else [])]
  kind = [f'--accelerator-type={f.accelerator}', f'--version={f.version}', *(['--spot'] if f.spot else [])]
  folder = shlex.quote(f.folder)
  return f"""#!/usr/bin/env bash
# bash this file in the folder of main.py, on a machine that stays up and has gcloud. It starts the run again until that
# is complete: on the same TPU after a save or a lost connection, on a new one where the TPU was taken away. Stopped
# here, the run goes on there; bash this file again to follow it.
TPU={f.tpu} NODES={f.nodes} PREEMPTED={PREEMPTED}
AT=({shlex.join(at)})
KIND=({shlex.join(kind)})
LEFT_OUT=({shlex.join(f'--exclude=./{name}' for name in LEFT_OUT)})

# On each host. A process that an earlier connection left behind is told to save and to go.
read -r -d '' RUN <<'END_OF_RUN'
set -e
exec 9>>launch.lock
if ! flock -n 9; then
  kill -TERM "$(cat launch.lock)"
  flock -w 600 9
fi
echo "$$" >launch.lock
mkdir -p {folder}
tar -xzf launch.tgz -C {folder}
{environment(f, command, 'tpu')}
exec {_line(_python(command))}
END_OF_RUN
{TPU_LOOP}"""


TPU_LOOP = """
tpu() {      # VERB, then its further arguments
  gcloud compute tpus tpu-vm "$1" "${@:2}" "${AT[@]}"
}

state() {
  tpu describe "$TPU" --format='value(state)' 2>/dev/null
}

ready() {      # returns when the TPU is; one that was taken away cannot be started again
  while :; do
    case "$(state)" in
      READY) return ;;
      PREEMPTED | TERMINATED) tpu delete "$TPU" --quiet ;;
      STOPPED) tpu start "$TPU" ;;
      '') tpu create "$TPU" "${KIND[@]}" || sleep 60 ;;
      *) sleep 30 ;;
    esac
  done
}

host() {      # host $1, its number before each line; returns the exit code of main.py, 255 where the connection broke
  tpu ssh "$TPU" --worker="$1" --command="$RUN" 2>&1 |
    while IFS= read -r line; do printf '[%s] %s\\n' "$1" "$line"; done
  return "${PIPESTATUS[0]}"
}

work() {      # all hosts; 0: complete, 255: to be started again, else what went wrong
  local i code again='' wrong=0 processes=()
  tpu scp "$archive" "$TPU:launch.tgz" --worker=all || return 255
  for ((i = 0; i < NODES; i++)); do
    host "$i" &
    processes+=("$!")
  done
  for i in "${processes[@]}"; do
    wait "$i"
    code=$?
    case "$code" in
      0) ;;
      "$PREEMPTED" | 255) again=yes ;;
      *) wrong=$code ;;
    esac
  done
  [ -z "$again" ] || return 255
  return "$wrong"
}

folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
archive=$folder/launch.tgz
tar -czf "$archive" "${LEFT_OUT[@]}" . || exit 1
while :; do
  ready
  work
  code=$?
  if [ "$code" -eq 0 ]; then
    echo "complete. $TPU costs until it is deleted"
    exit 0
  elif [ "$code" -ne 255 ] && [ "$(state)" = READY ]; then
    exit "$code"
  fi
  echo 'starting again'
  sleep 30
done
"""


def local(f, command) -> str:
  """What launch does without --print, with the environment made before."""
  flags = [f'--nodes={f.nodes}', *([f'--devices={f.devices}'] if f.devices else [])]
  return f"""#!/usr/bin/env bash
set -e
{environment(f, command)}
exec {_line(['.venv/bin/python', '-m', 'unimiss_jax.cli.launch', *flags, *command[1:]])}
"""


def environment(f, command, extra: str = '') -> str:
  """Shell lines: into the folder, an environment with Python and the project, what launch.env sets."""
  extras = [e for e in ('gcs' if 'gs://' in ' '.join(command) else '', extra) if e]
  ready = '-'.join(['.venv/.ready', *extras])      # without extras the one that make writes
  what = shlex.quote(f'.[{",".join(extras)}]') if extras else '.'
  return f"""{f.setup + chr(10) if f.setup else ''}cd {shlex.quote(f.folder)}
if [ ! -e {ready} ]; then
  for python in "${{PYTHON:-python3}}" {' '.join(PYTHONS)} none; do
    "$python" -c 'import sys; sys.exit(sys.version_info < {OLDEST})' 2>/dev/null && break
  done
  if [ "$python" = none ]; then
    echo "ERROR $HOSTNAME: no Python {'.'.join(map(str, OLDEST))} or newer. FIX: install one, with venv," \\
      "or set PYTHON to its path" >&2
    exit 2
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install -q -c requirements.lock -e {what}
  touch {ready}
fi
set -a
# shellcheck source=/dev/null
. ./{SETTINGS}
set +a"""


def _python(command) -> list[str]:
  return ['.venv/bin/python', *command, f'--preempt_exit_code={PREEMPTED}']


def _line(words) -> str:
  """A command, a word a line where it is long."""
  words = [shlex.quote(w) for w in words]
  return (' ' if sum(map(len, words)) < 100 else ' \\\n  ').join(words)


class _Dumper(yaml.SafeDumper):
  """Texts of several lines stay readable."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    'tag:yaml.org,2002:str', text, style='|' if '\n' in text else None))
_Dumper.ignore_aliases = lambda self, data: True
