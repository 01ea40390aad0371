"""How a process learns that it is one of several; what several do is tested in tests/multiprocess."""
import signal

import pytest

from unimiss_jax import processes


@pytest.fixture(autouse=True)
def alone(monkeypatch):
  for name, _ in processes.SCHEDULERS:
    monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize('name, one, several', [
    ('SLURM_STEP_NUM_TASKS', '1', '4'), ('OMPI_COMM_WORLD_SIZE', '1', '2'),
    ('TPU_WORKER_HOSTNAMES', 'localhost', 't1k-0,t1k-1'), ('MEGASCALE_NUM_SLICES', '1', '2')])
def test_schedulers_are_recognised(monkeypatch, name, one, several):
  assert processes.scheduler() is None
  monkeypatch.setenv(name, one)
  assert processes.scheduler() is None
  monkeypatch.setenv(name, several)
  assert processes.scheduler() == name
  started = []
  monkeypatch.setattr(processes.jax.distributed, 'initialize', lambda *a, **k: started.append((a, k)))
  processes.join()
  assert started == [((None, None, None), {'initialization_timeout': 1800})]


@pytest.mark.parametrize('given, text', [
    (('h:1', None, None), 'all three or none'), ((None, 2, 0), 'all three or none'),
    (('h', 2, 0), 'needs HOST:PORT'), (('h:1', 2, 2), '0 <= I < N'), (('h:1', 2, -1), '0 <= I < N')])
def test_flags_that_contradict_each_other(given, text):
  with pytest.raises(processes.ProcessError, match=text):
    processes.join(*given)


def test_others_that_cannot_be_found(monkeypatch):
  def initialize(*a, **k):
    raise RuntimeError('DEADLINE_EXCEEDED:\n nobody')
  monkeypatch.setattr(processes.jax.distributed, 'initialize', initialize)
  with pytest.raises(processes.ProcessError, match=r'did not find each other \(DEADLINE_EXCEEDED: nobody\). FIX'):
    processes.join('h:1', 2, 0)


def test_a_message_names_a_few():
  assert processes.some(['a']) == 'a' and processes.some(list('abc')) == 'a, b, c'
  assert processes.some(list('abcde')) == 'a, b, c and 2 more'


def test_alone_everything_is_agreed():
  assert processes.main() and processes.gather({'a': 1}) == [{'a': 1}]
  assert processes.me() == ''
  assert processes.on_main(lambda: 5) == 5
  with pytest.raises(KeyError):
    processes.together(lambda: {}['x'])
  stop = processes.StopSignal()
  assert stop.asked(1) is None
  signal.raise_signal(signal.SIGUSR1)
  assert stop.asked(2) == 'SIGUSR1'
  stop.restore()
