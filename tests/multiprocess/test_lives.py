"""A run that is killed, stopped, moved or starved of disk goes on as if nothing had happened; real processes."""
import re
import signal
import socket
import time

import numpy as np
import pytest

from tests.e2e import tiny
from tests.multiprocess.cluster import Cluster, drawn

STEPS = 10
PREEMPTED = 7


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('lives')


@pytest.fixture(scope='module')
def undisturbed(folder):
  """One process with 8 devices, from start to end."""
  run = Cluster(folder / 'undisturbed')
  assert run.wait() == [0], run.said()
  return folder / 'undisturbed'


def saving(workdir):
  return any(p.name.endswith('tmp') for p in (workdir / 'checkpoints').glob('*'))


def lives(workdir, deaths, rng):
  """Kills a run `deaths` times, the second time inside a save, then lets it end."""
  for death in range(deaths):
    run = Cluster(workdir)
    if death == 1:
      run.until(lambda: saving(workdir))
    else:      # mostly before the next checkpoint, so that no run gets to its end
      run.until_steps(int(rng.integers(0, 3 if death else 4)))
      time.sleep(rng.uniform(0, 1))
    run.kill()
    run.wait()
  run = Cluster(workdir)
  assert run.wait() == [0], run.said()
  return run


@pytest.mark.slow
@pytest.mark.parametrize('deaths', [3, 20])
def test_killed_at_random_moments_equals_undisturbed(undisturbed, folder, deaths):
  workdir = folder / f'killed_{deaths}'
  run = lives(workdir, deaths, np.random.default_rng(deaths))
  assert run.steps() <= STEPS
  assert tiny.metrics(workdir) == tiny.metrics(undisturbed)      # bit for bit
  assert drawn(workdir) == drawn(undisturbed)
  assert all(len(rows_) == 8 for rows_ in drawn(workdir).values())


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_and_one_goes_on(undisturbed, folder):
  """2 processes of 4 devices -> 1 process of 8: the same samples, the same random numbers, the same losses."""
  workdir = folder / 'moved'
  run = Cluster(workdir, f'--preempt_exit_code={PREEMPTED}', processes=2, devices=4)
  run.until_steps(2)
  run.kill(1, signal.SIGTERM)
  assert run.wait() == [PREEMPTED] * 2, run.said()
  at = int(re.search(r'preemption: saved step (\d+)', run.said(0))[1])
  assert max(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == at and 2 < at < STEPS
  run = Cluster(workdir)
  assert run.wait() == [0] and f'resumed step {at}' in run.said(), run.said()
  assert drawn(workdir) == drawn(undisturbed)
  want, got = tiny.metrics(undisturbed), tiny.metrics(workdir)
  assert got.keys() == want.keys()
  for key in list(want)[:3]:      # float32 sums in another order: later ones drift apart
    np.testing.assert_allclose(got[key]['train/loss'], want[key]['train/loss'], rtol=1e-4)


@pytest.mark.slow      # test_lifeline.py holds the same without training
def test_a_dead_process_ends_the_other_with_one_clear_line(folder):
  workdir = folder / 'bereft'
  run = Cluster(workdir, processes=2, devices=4)
  run.until_steps(3)
  run.kill(1)
  assert run.wait()[0] == 1
  lines = [line for line in run.said(0).splitlines() if line.startswith('ERROR ')]
  assert len(lines) == 1 and 'ERROR process 1 ended or was cut off. FIX' in lines[0] and 'FIX' in lines[0], run.said(0)
  assert 'Traceback' not in run.said(0)
  run = Cluster(workdir)
  assert run.wait() == [0] and 'resumed step 2' in run.said(), run.said()


@pytest.mark.slow      # two processes, three lives
def test_a_full_disk_ends_the_run_clearly_and_it_resumes(undisturbed, folder):
  workdir = folder / 'full'
  run = Cluster(workdir, limit=100_000)
  assert run.wait() == [1], run.said()
  last = run.said().splitlines()[-1]
  assert last.startswith('ERROR ') and 'could not be written' in last and 'FIX: make room' in last, run.said()
  assert 'Traceback' not in run.said(), run.said()
  run = Cluster(workdir)
  assert run.wait() == [0], run.said()
  assert tiny.metrics(workdir) == tiny.metrics(undisturbed)


def test_processes_that_were_started_unlike_each_other_say_so(folder):
  """Another config, another seed: nothing is trained, each process names the difference."""
  workdir = folder / 'unlike'
  run = Cluster(workdir, each=['--config.seed=0', '--config.seed=1'], processes=2, devices=4)
  assert run.wait() == [1, 1], run.said()
  host = socket.gethostname()
  want = (f'ERROR config of all processes must be the same, but unlike process 0 ({host}) process 1 ({host}) has '
          'seed 1 instead of 0. FIX: start all processes with the same command')
  assert [errors(run, i) for i in range(2)] == [[want]] * 2, run.said()
  assert not (workdir / 'config.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize('what,text', [
    ('installation', r'installation of all processes must .* process 1 \({host}\) has jax 0.0 instead of \S+. FIX: '
                     r'install the same on all hosts: .*'),
    ('devices', r'devices of all processes must .* process 1 \({host}\) has count 2 instead of 4. FIX: give every .*'),
    ('data', r'process 1 \({host}\): UNREADABLE scans: nothing is there. FIX: check the path; every host must see it')])
def test_a_host_that_is_unlike_the_others_is_named_on_all(folder, what, text):
  """The same command; the second process has another installation, fewer devices, or does not see the data."""
  (folder / 'scans').mkdir(exist_ok=True)
  flags = ['--config.data.ct=scans'] if what == 'data' else []
  run = Cluster(folder / what, *flags, program='tests/multiprocess/unlike.py', processes=2, devices=4, UNLIKE=what,
                SEEN=str(folder))
  assert run.wait() == [1, 1], run.said()
  pattern = 'ERROR ' + text.replace('{host}', re.escape(socket.gethostname()))
  for i in range(2):
    assert len(errors(run, i)) == 1 and re.fullmatch(pattern, errors(run, i)[0]), run.said(i)
    assert 'Traceback' not in run.said(i)


def errors(run, which):
  return [line for line in run.said(which).splitlines() if line.startswith('ERROR ')]
