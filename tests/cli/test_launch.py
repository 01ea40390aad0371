"""What launch prints is run with stand-ins for python, srun, scontrol, gcloud; what it starts, with a small main.py."""
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import ROOT
from unimiss_jax.cli import launch, launch_local, launch_scripts

ODD = ["--config.data.ct=/it's/a b/*.nii,$HOME", '--config.data.xray="x" \\ `id` #é']
WORKDIR = "/data/a run's"
CONFIG = '''
class Leaves(dict):
  pass
def get_config(arg=''):
  if arg == 'bad':
    raise ValueError('unknown preset "bad"')
  return {'data': Leaves(ct='', xray=''), 'seed': 0}
'''
# Stands for every Python; one that `-m venv` made writes down what it is called with, and ends as the file "codes" says
PYTHON = '''#!/usr/bin/env bash
case "$1 $2" in
  "-c import"*) [ "${0##*/}" != python3 ]; exit ;;       # python3 is too old
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit ;;
  "-m pip") echo "pip $*" >>"$STAND_INS/log"; exit ;;
esac
exec 8>>"$STAND_INS/lock"; flock 8      # hosts come here at the same time
{ echo "SETTING=$SETTING"; printf '%s\\n' "$@"; echo; } >>"$STAND_INS/argv"
code=$(head -n1 "$STAND_INS/codes"); sed -i 1d "$STAND_INS/codes"
exit "$code"
'''
SRUN = '#!/usr/bin/env bash\necho "srun $*" >>"$STAND_INS/log"\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SAID = '#!/usr/bin/env bash\necho "${0##*/} $*" >>"$STAND_INS/log"\n'
# `compute tpus tpu-vm VERB ...`; states are taken from a file, hosts are folders
GCLOUD = '''#!/usr/bin/env bash
echo "$4 $5" >>"$STAND_INS/log"
for word in "$@"; do
  case "$word" in --worker=*) worker=${word#*=} ;; --command=*) command=${word#*=} ;; esac
done
case "$4" in
  describe) head -n1 "$STAND_INS/states"; sed -i 1d "$STAND_INS/states" ;;
  scp) for i in 0 1; do mkdir -p "$STAND_INS/host$i"; cp "$5" "$STAND_INS/host$i/launch.tgz"; done ;;
  ssh) cd "$STAND_INS/host$worker" && bash -c "$command" ;;
esac
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
  """A folder like ours, and a PATH on which nothing is real."""
  folder = tmp_path / "my project's"
  (folder / 'configs').mkdir(parents=True)
  (folder / 'configs' / 'toy.py').write_text(CONFIG)
  (folder / 'main.py').write_text('')
  (folder / 'launch.env').write_text('SETTING="of launch.env"\n')
  bins = tmp_path / 'stand ins'
  bins.mkdir()
  for name, text in {'python3': PYTHON, 'python3.12': PYTHON, 'srun': SRUN, 'scontrol': SAID, 'gcloud': GCLOUD,
                     'sleep': SAID}.items():
    (bins / name).write_text(text)
    (bins / name).chmod(0o755)
  for name in ('python3.14', 'python3.13', 'python3.11'):      # whatever this machine has
    (bins / name).write_text('#!/bin/sh\nexit 1\n')
    (bins / name).chmod(0o755)
  monkeypatch.setenv('STAND_INS', str(bins))
  monkeypatch.setenv('PATH', f'{bins}:{os.environ["PATH"]}')
  monkeypatch.delenv('PYTHON', raising=False)
  monkeypatch.chdir(folder)
  return folder


def printed(capsys, kind, *flags, workdir=WORKDIR) -> str:
  assert launch.main([f'--print={kind}', '--config=configs/toy.py:a', f'--workdir={workdir}', *flags]) == 0
  return capsys.readouterr().out


def run(project, text, codes, **env) -> tuple[int, list[list[str]], list[str]]:
  """Exit code, what main.py was called with each time, what the stand-ins did."""
  bins = pathlib.Path(os.environ['STAND_INS'])
  (bins / 'codes').write_text('\n'.join(map(str, codes)) + '\n')
  (project / 'script.sh').write_text(text)
  done = subprocess.run(['bash', 'script.sh'], cwd=project, env=dict(os.environ, **env), timeout=60)
  argv, log = ((bins / n).read_text() if (bins / n).exists() else '' for n in ('argv', 'log'))
  return done.returncode, [call.splitlines() for call in argv.split('\n\n') if call], log.splitlines()


def call(*more, workdir=WORKDIR):
  return ['SETTING=of launch.env', 'main.py', '--config=configs/toy.py:a', f'--workdir={workdir}', *ODD, *more]


TPU = ('tpu-vm', '--nodes=2', '--tpu=t', '--zone=z', '--accelerator=v5litepod-8', '--version=v2', '--spot', *ODD)
KINDS = [('slurm', '--nodes=2', '--gpus_per_node=4', '--setup=module load cuda', '--time=1:00:00', *ODD), TPU,
         ('local', '--nodes=2', '--devices=8', *ODD),
         ('gke', '--nodes=2', '--image=i', '--gpus_per_node=8', '--volumes=claim:/data', *ODD)]


@pytest.mark.parametrize('kind', KINDS, ids=lambda k: k[0])
def test_scripts_are_sound(project, capsys, kind):
  text = printed(capsys, *kind, workdir='gs://b/run' if kind[0] == 'tpu-vm' else WORKDIR)
  if kind[0] == 'gke':
    text = next(yaml.safe_load_all(text))['data']['run.sh']
  (project / 'script.sh').write_text(text)
  subprocess.run(['bash', '-n', 'script.sh'], check=True)
  checker = pathlib.Path(sys.executable).with_name('shellcheck')      # of the test extra
  subprocess.run([checker, '--exclude=SC2016', 'script.sh'], check=True)      # a $ of the user, in single quotes


def test_python_that_is_new_enough_makes_the_environment(project, capsys):
  """python3 is too old here, python3.12 is not; once made it is left alone."""
  text = printed(capsys, 'slurm', '--gpus_per_node=2', *ODD)
  assert 'cd ' in text and run(project, text, [0])[2][0] == (
      'pip -m pip install -q -c requirements.lock -e .[cuda]')
  assert sum('pip' in line for line in run(project, text, [0])[2]) == 1


def test_without_such_a_python_it_says_so(project, capsys):
  (pathlib.Path(os.environ['STAND_INS']) / 'python3.12').write_text('#!/bin/sh\nexit 1\n')
  (project / 'script.sh').write_text(printed(capsys, 'slurm'))
  done = subprocess.run(['bash', 'script.sh'], capture_output=True, text=True)
  assert done.returncode == 2 and not (project / '.venv').exists()
  assert 'no Python 3.11 or newer. FIX: install one, with venv, or set PYTHON to its path' in done.stderr


def test_slurm_queues_a_preempted_run_again_and_nothing_else(project, capsys):
  text = printed(capsys, 'slurm', '--nodes=2', '--gpus_per_node=4', '--partition=gpu', '--grace=90',
                 '--sbatch=--qos=high --exclusive', *ODD)
  options = {line[8:] for line in text.splitlines() if line.startswith('#SBATCH ')}
  assert options == {'--job-name=unimiss', '--nodes=2', '--ntasks-per-node=4', '--gpus-per-node=4', '--partition=gpu',
                     '--qos=high', '--exclusive', '--requeue', '--signal=TERM@90', '--open-mode=append'}
  code, calls, log = run(project, text, [75], SLURM_JOB_ID='17')
  assert code == 75 and log[-1] == 'scontrol requeue 17'
  assert calls == [call('--preempt_exit_code=75')]
  assert log[-2].startswith('srun --nodes=2 --ntasks=8 --kill-on-bad-exit=0 .venv/bin/python main.py')
  for wanted in (0, 1, 137):
    assert run(project, text, [wanted])[0] == wanted
  assert sum('scontrol' in line for line in run(project, text, [0])[2]) == 1


# Fields of batch/v1 Job, read in the reference of its API
JOB = {'completions', 'parallelism', 'completionMode', 'backoffLimit', 'podFailurePolicy', 'template'}
POD = {'subdomain', 'restartPolicy', 'terminationGracePeriodSeconds', 'nodeSelector', 'containers', 'volumes'}
CONTAINER = {'name', 'image', 'command', 'resources', 'volumeMounts'}


def test_gke_on_gpus(project, capsys):
  text = printed(capsys, 'gke', '--nodes=3', '--image=img:1', '--gpus_per_node=8', '--accelerator=nvidia-h100-80gb',
                 '--volumes=claim:/data', '--cpus=16', '--memory=64Gi', '--namespace=lab', '--spot',
                 f'--folder={project}', *ODD)
  script, service, job = yaml.safe_load_all(text)
  assert [d['kind'] for d in (script, service, job)] == ['ConfigMap', 'Service', 'Job']
  assert {d['metadata']['namespace'] for d in (script, service, job)} == {'lab'}
  assert job['apiVersion'] == 'batch/v1' and job['spec'].keys() == JOB
  assert job['spec']['completions'] == job['spec']['parallelism'] == 3
  assert job['spec']['completionMode'] == 'Indexed' and job['spec']['backoffLimit'] == 9
  rules = job['spec']['podFailurePolicy']['rules']
  assert [(r['action'], r.get('onExitCodes', {}).get('values')) for r in rules] == [
      ('FailJob', [2]), ('Ignore', [75]), ('Ignore', None)]
  assert all(r['onExitCodes'].keys() == {'containerName', 'operator', 'values'} for r in rules[:2])
  assert rules[2]['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
  pod = job['spec']['template']['spec']
  main, = pod['containers']
  assert pod.keys() == POD and main.keys() == CONTAINER
  assert pod['restartPolicy'] == 'Never'      # podFailurePolicy asks for it
  assert main['name'] == rules[0]['onExitCodes']['containerName'] and main['command'] == ['bash', '/launch/run.sh']
  assert main['resources'] == {'requests': {'cpu': 16, 'memory': '64Gi'}, 'limits': {'nvidia.com/gpu': 8}}
  assert pod['nodeSelector'] == {'cloud.google.com/gke-accelerator': 'nvidia-h100-80gb',
                                 'cloud.google.com/gke-spot': 'true'}
  assert {m['name'] for m in main['volumeMounts']} == {v['name'] for v in pod['volumes']}
  assert {m['mountPath'] for m in main['volumeMounts']} == {'/launch', '/dev/shm', '/data'}
  # pod i is NAME-i.SUBDOMAIN where a service without address, of that name, selects the job
  assert service['spec'] == {'clusterIP': 'None', 'publishNotReadyAddresses': True,
                             'selector': {'job-name': job['metadata']['name']}}
  assert pod['subdomain'] == service['metadata']['name']
  code, calls, _ = run(project, script['data']['run.sh'], [75], JOB_COMPLETION_INDEX='2')
  assert code == 75 and calls == [call('--preempt_exit_code=75', '--coordinator=unimiss-0.unimiss:55527',
                                       '--num_processes=3', '--process_id=2')]


def test_gke_on_tpus_and_on_one_node(project, capsys):
  """GKE tells TPU pods who they are; a pod alone is no part of anything."""
  tpu = list(yaml.safe_load_all(printed(
      capsys, 'gke', '--nodes=4', '--image=i', '--tpus_per_node=4', '--topology=4x4', '--name=run-1',
      '--accelerator=tpu-v5-lite-podslice', workdir='gs://bucket/run')))
  assert 'coordinator' not in tpu[0]['data']['run.sh'] and '.[gcs,tpu]' in tpu[0]['data']['run.sh']
  pod = tpu[2]['spec']['template']['spec']
  assert pod['containers'][0]['resources']['limits'] == {'google.com/tpu': 4} and pod['subdomain'] == 'run-1'
  assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
                                 'cloud.google.com/gke-tpu-topology': '4x4'}
  one = list(yaml.safe_load_all(printed(capsys, 'gke', '--image=i', workdir='gs://bucket/run')))
  assert [d['kind'] for d in one] == ['ConfigMap', 'Job'] and one[1]['spec']['completionMode'] == 'NonIndexed'
  assert 'coordinator' not in one[0]['data']['run.sh'] and 'subdomain' not in one[1]['spec']['template']['spec']


def test_a_tpu_vm_is_made_and_the_run_started_until_it_is_complete(project, capsys):
  """No TPU; saved; taken away in the middle; a host lost (255); complete."""
  text = printed(capsys, *TPU, workdir='gs://b/run')
  states = ['', 'CREATING', 'READY', 'READY', 'PREEMPTED', 'PREEMPTED', '', 'READY', 'READY']
  (pathlib.Path(os.environ['STAND_INS']) / 'states').write_text('\n'.join(states) + '\n')
  code, calls, log = run(project, text, [75, 75, 1, 1, 255, 0, 0, 0])
  assert code == 0 and len(calls) == 8
  assert all(c == call('--preempt_exit_code=75', workdir='gs://b/run') for c in calls)
  verbs = [line.split()[0] for line in log if not line.startswith(('sleep', 'pip'))]
  once = ['scp', *['ssh'] * 2]
  assert [v for v in verbs if v != 'describe'] == ['create', *once, *once, 'delete', 'create', *once, *once]
  hosts = pathlib.Path(os.environ['STAND_INS'])
  assert (hosts / 'host1' / 'unimiss_jax' / 'main.py').exists()


def test_a_run_on_tpu_vms_that_fails_is_not_started_again(project, capsys):
  (pathlib.Path(os.environ['STAND_INS']) / 'states').write_text('READY\n' * 3)
  code, calls, _ = run(project, printed(capsys, *TPU, workdir='gs://b/run'), [1, 1])
  assert code == 1 and len(calls) == 2


def test_what_a_lost_connection_left_behind_on_a_host_goes_first(project, capsys):
  """It holds the lock as long as it lives, and is asked to save."""
  text = printed(capsys, *TPU, workdir='gs://b/run')
  bins = pathlib.Path(os.environ['STAND_INS'])
  (bins / 'states').write_text('READY\n' * 2)
  (bins / 'host0').mkdir()
  code = ('import fcntl, os, signal\nlock = open("launch.lock", "a")\nfcntl.flock(lock, fcntl.LOCK_EX)\n'
          'signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(0)))\n'
          'print(os.getpid(), file=lock, flush=True)\nprint("up", flush=True)\nwhile True: signal.pause()')
  left = subprocess.Popen([sys.executable, '-c', code], cwd=bins / 'host0', stdout=subprocess.PIPE, text=True)
  with left.stdout as said:
    assert said.readline() == 'up\n'
    assert run(project, text, [0, 0])[0] == 0
    assert left.wait(10) == 0 and said.read() == 'saved\n'


def test_what_local_prints_does_what_local_does(project, capsys):
  code, calls, _ = run(project, printed(capsys, 'local', '--nodes=2', '--devices=8', *ODD), [0])
  assert code == 0 and calls == [['SETTING=of launch.env', '-m', 'unimiss_jax.cli.launch', '--nodes=2', '--devices=8',
                                  '--config=configs/toy.py:a', f'--workdir={WORKDIR}', *ODD]]


@pytest.mark.parametrize('flags,text', [
    (['--config=x'], '--workdir'),
    (['--nodes=0'], '--nodes=0: at least 1'),
    (['--devices=3', '--nodes=2'], '--devices=3: 2 processes cannot share them evenly'),
    (['--print=slurm', '--zone=z'], '--zone is for --print=tpu-vm, not for slurm'),
    (['--print=slurm', '--gpus_per_node=-1'], '--gpus_per_node=-1: at least 0'),
    (['--print=slurm', '--sbatch=--qos=x y'], '"y": not for an #SBATCH line'),
    (['--print=slurm', '--partition=a b'], '"a b": not for an #SBATCH line'),
    (['--print=slurm', '--config.data.ct=a\nb'], 'line breaks and control characters cannot be passed on'),
    (['--print=slurm', '--preempt_exit_code=0'], 'unknown argument --preempt_exit_code=0'),
    (['--print=gke'], '--print=gke needs --image'),
    (['--print=gke', '--image=i', '--name=A'], '--name=A: small letters, digits and -'),
    (['--print=gke', '--image=i'], '--workdir=/w: a pod loses its disk'),
    (['--print=gke', '--image=i', '--volumes=c:/work'], '--workdir=/w: a pod loses its disk'),
    (['--print=gke', '--image=i', '--volumes=c:/w/', '--workdir=/w/x', '--nodes=2', '--tpus_per_node=4',
      '--topology=4x4', '--accelerator=a'], '--topology=4x4 has 16 chips, --nodes=2 --tpus_per_node=4 has not'),
    (['--print=tpu-vm', '--tpu=t', '--zone=z', '--accelerator=a', '--version=v'],
     '--workdir=/w: the disk of a TPU VM goes with it, use gs://'),
    (['--confg.seed=1'], 'unknown argument --confg.seed=1'),
    (['--config.sed=1'], 'config key "sed" unknown; did you mean "seed"?'),
    (['--config=configs/toy.py:bad'], '--config=configs/toy.py:bad: unknown preset "bad"'),
    (['--config=configs/none.py'], 'configs/none.py: no such file. FIX: call it in the folder of main.py'),
])
def test_a_wrong_command_is_answered_in_one_line(flags, text, project, capsys):
  given = flags if flags == ['--config=x'] else ['--config=configs/toy.py', '--workdir=/w', *flags]
  try:
    got = launch.main(given)
  except SystemExit as e:
    got = e.code
  err = capsys.readouterr().err.strip()
  assert got == 2 and text in err and len(err.splitlines()) == 1, err


# ---- local


MAIN = '''
import os, signal, sys, time
i = next((int(a[13:]) for a in sys.argv if a.startswith('--process_id=')), 0)
signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), os._exit(75)))
print(sys.argv[1:], os.environ['XLA_FLAGS'], os.environ['JAX_PLATFORMS'], os.environ['SETTING'], flush=True)
open(f'{i}', 'w').close()
if 'wait' in sys.argv or (i != 1 and 'fail' in sys.argv):
  time.sleep(60)
sys.exit(9 if 'fail' in sys.argv else 0)
'''


@pytest.fixture
def toy(project, monkeypatch):
  (project / 'main.py').write_text(MAIN)
  monkeypatch.setattr(launch_local, 'GRACE_S', .5)
  monkeypatch.setenv('XLA_FLAGS', '--mine')
  return project


def test_processes_share_the_devices_and_their_lines_are_told_apart(toy, capfd):
  assert launch.main(['--nodes=2', '--devices=8', '--config=configs/toy.py', f'--workdir={WORKDIR}', ODD[0]]) == 0
  said = sorted(capfd.readouterr().out.splitlines())
  port = said[0].split('127.0.0.1:')[1].split("'")[0]
  for i, line in enumerate(said):
    flags = ['--config=configs/toy.py', f'--workdir={WORKDIR}', ODD[0], f'--coordinator=127.0.0.1:{port}',
             '--num_processes=2', f'--process_id={i}']
    assert line == f'[{i}] {flags} --mine --xla_force_host_platform_device_count=4 cpu of launch.env'


def test_the_first_failure_is_the_exit_code_and_stops_the_others(toy, capfd):
  began = time.monotonic()
  assert launch_local.run(['main.py', 'fail'], 3, 3) == 9
  assert time.monotonic() - began < 20 and 'process 1 ended with 9\n' in capfd.readouterr().out


def test_a_signal_lets_all_save(toy):
  command = 'from unimiss_jax.cli import launch_local; raise SystemExit(launch_local.run(["main.py", "wait"], 2, 2))'
  p = subprocess.Popen([sys.executable, '-c', command], env=dict(os.environ, PYTHONPATH=str(ROOT)), text=True,
                       stdout=subprocess.PIPE)
  end = time.monotonic() + 30
  while not all((toy / name).exists() for name in '01'):
    assert time.monotonic() < end
    time.sleep(.02)
  p.send_signal(signal.SIGINT)
  out, _ = p.communicate(timeout=30)
  assert p.returncode == 75 and 'SIGINT: 2 processes save and end' in out, out
  assert '[0] saved' in out and '[1] saved' in out


def test_the_code_of_a_preempted_run_is_no_other():
  """Of main.py: 0 complete, 1 failed, 2 usage, 130 interrupted; 126 and more are the shell's."""
  assert launch_scripts.PREEMPTED not in {0, 1, 2, *range(126, 256)}
