"""Before a run trains: who differs is named; what a step costs is what it is by hand; the hours left."""
import hashlib
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines import files
from data_pipelines.errors import DataError
from tests.e2e import tiny
from unimiss_jax import preflight, processes, sharding
from unimiss_jax.progress import FORECAST, Progress

HOSTS = [f'node{i}' for i in range(5)]


@pytest.mark.parametrize('values,told', [
    ([{'seed': 0}] * 5, None),
    ([{'seed': 0}, {'seed': 1}], 'unlike process 0 (node0) process 1 (node1) has seed 1 instead of 0'),
    ([{'seed': 1}, {'seed': 0}, {'seed': 0}], 'unlike process 1 (node1) process 0 (node0) has seed 1 instead of 0'),
    ([{'a': 0}, {'a': 0, 'b': [1]}, {}], 'unlike process 0 (node0) process 1 (node1) has b [1] instead of (absent); '
                                         'process 2 (node2) has a (absent) instead of 0'),
    ([{'a': 0}, {'a': 1}, {'a': 0}, {'a': 1}, {'a': 0}],
     'unlike process 0 (node0) process 1 (node1), process 3 (node3) has a 1 instead of 0'),
    ([dict.fromkeys('abcdefgh', 0), dict.fromkeys('abcdefgh', 1)],
     'a 1 instead of 0, b 1 instead of 0, c 1 instead of 0, d 1 instead of 0, e 1 instead of 0, f 1 instead of 0 and '
     '2 more differences'),
])
def test_those_that_differ_from_most_are_named_with_their_hosts(values, told):
  found = preflight.differences('config', values, HOSTS[:len(values)])
  if told is None:
    assert found is None
  else:
    assert told in found and found.startswith('config of all processes must be the same, but ')
    assert found.endswith('. FIX: start all processes with the same command')


@pytest.fixture
def cluster(monkeypatch):
  """theirs(process, what it is given) -> what it gathers; of three processes this one is 0."""
  def play(theirs):
    monkeypatch.setattr(processes, 'gather', lambda mine: [theirs(i, mine) for i in range(3)])
  return play


def other(value, at, **changed):
  """Process `at` has other facts, so another hash of them."""
  def theirs(i, mine):
    if isinstance(mine, str):
      return f'other than {mine}' if i == at else mine
    return [HOSTS[i], mine[1] | ({value: mine[1][value] | changed} if i == at else {})]
  return theirs


@pytest.mark.parametrize('what,changed,text', [
    ('config', {'optim.lr': 5.}, r'process 2 \(node2\) has optim.lr 5.0 instead of 0.002\. FIX: start all'),
    ('config', {'--workdir': '/y'}, r'process 2 \(node2\) has --workdir /y instead of /x'),
    ('installation', {'jax': '1.0', 'python': '3.9.1'}, r'process 2 \(node2\) has jax 1.0 instead of .*, python 3.9.1 '
                                                        r'instead of .*\. FIX: install the same on all hosts'),
    ('installation', {'source': 'abc'}, r'process 2 \(node2\) has source abc instead of [0-9a-f]{16}\. FIX'),
    ('devices', {'count': 3}, r'process 2 \(node2\) has count 3 instead of 8\. FIX: give every process as many'),
])
def test_processes_that_do_not_mean_the_same_run(cluster, what, changed, text):
  cluster(other(what, 2, **changed))
  with pytest.raises(processes.ProcessError, match=f'^{what} of all processes must be the same, .*{text}'):
    preflight.same_run(tiny.config(), '/x', 'auto')


def test_processes_that_see_other_records(cluster):
  records = {'ct': {'count': 16, 'hash': 'aa'}, 'xray': {'count': 9, 'hash': 'bb'}}
  cluster(lambda i, mine: mine)
  preflight.same_records(records)
  cluster(other('records', 1, **{'data.ct.count': 15, 'data.ct.hash': 'cc'}))
  with pytest.raises(processes.ProcessError, match=r'process 1 \(node1\) has data.ct.count 15 instead of 16, '
                                                   r'data.ct.hash cc instead of aa. FIX: let every host see the same'):
    preflight.same_records(records)


def test_alone_nothing_differs():
  preflight.same_run(tiny.config(), '/x', 'auto')
  assert {'jax', 'jaxlib', 'python', 'unimiss_jax'} <= preflight.installation().keys()


def test_a_changed_file_of_ours_is_another_installation(tmp_path, monkeypatch):
  """As blake2b of names and contents; other places and what is no source do not count."""
  for copy in 'abc':
    for package in preflight.SOURCES:
      (tmp_path / copy / package).mkdir(parents=True)
    (tmp_path / copy / 'unimiss_jax' / 'x.py').write_text('2\n' if copy == 'c' else '1\n')
  (tmp_path / 'b' / 'unimiss_jax' / 'note.txt').write_text('not ours')
  found = []
  for copy in 'abc':
    monkeypatch.setattr(preflight, 'ROOT', tmp_path / copy)
    found.append(preflight.installation()['source'])
  want = [hashlib.blake2b(b'unimiss_jax/x.py\n' + text, digest_size=8).hexdigest() for text in (b'1\n', b'1\n', b'2\n')]
  assert found == want


def test_the_cost_of_a_step_by_hand():
  """A product of [64, 128] and [128, 256] over 8 devices: 2 m k n operations; a device holds all weights, its rows."""
  mesh = sharding.make_mesh(8, 1)
  rows, all_ = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=rows)
  w = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=all_)
  found = preflight.cost(jax.jit(lambda w, x: x @ w, out_shardings=rows).lower(w, x).compile(), 8)
  assert found == preflight.Cost(2 * 64 * 128 * 256, 4 * (128 * 256 + 64 // 8 * 128))
  assert preflight.told({'ct': found}) == 'ct 4.19 MFLOP, 0.000135 GB a device'
  assert preflight.told({'ct': preflight.Cost(1.5e12, 3 * 10 ** 9), 'xray': preflight.Cost(math.nan, None)}) == (
      'ct 1.5 TFLOP, 3 GB a device; xray ? FLOP, ? GB a device')


class Silent:
  """A backend that says nothing."""
  cost_analysis = memory_analysis = lambda self: None


def test_a_cost_that_nobody_knows():
  found = preflight.cost(Silent(), 8)
  assert math.isnan(found.flops) and found.bytes is None


def test_free_memory_is_that_of_the_host_or_of_the_container(tmp_path):
  info, cgroup = tmp_path / 'meminfo', tmp_path
  assert preflight.free_memory(info, cgroup) is None
  info.write_text('MemTotal:  900 kB\nMemAvailable:     500 kB\n')
  assert preflight.free_memory(info, cgroup) == 500 * 1024
  (tmp_path / 'memory.max').write_text('400000\n')
  (tmp_path / 'memory.current').write_text('150000\n')
  (tmp_path / 'memory.stat').write_text('anon 1000\ninactive_file 50000\n')
  assert preflight.free_memory(info, cgroup) == 300000
  (tmp_path / 'memory.max').write_text('max\n')
  assert preflight.free_memory(info, cgroup) == 500 * 1024


def test_what_is_read_ahead_must_fit_together(cluster, monkeypatch, caplog):
  """Two of the three processes are on this host."""
  cluster(lambda i, mine: [mine[0] if i < 2 else 'far', mine[1]])
  monkeypatch.setattr(preflight, 'free_memory', lambda: 7 * 10 ** 9)
  preflight.check_memory(3 * 10 ** 9)
  assert not caplog.records
  preflight.check_memory(4 * 10 ** 9)
  assert caplog.records[0].levelno == logging.WARNING
  assert 'take up to 8.0 GB, 7.0 GB are free on this host. FIX: lower data.workers or batch.*' in caplog.text


@pytest.mark.parametrize('path,there', [
    ('', True), ('a.nii', True), ('*.nii', True), ('**/b.nii', True), ('c.nii', False), ('*.png', False)])
def test_data_that_is_not_there(tmp_path, path, there):
  (tmp_path / 'x').mkdir()
  for name in ('a.nii', 'x/b.nii'):
    (tmp_path / name).touch()
  if there:
    files.check_there(tmp_path / path)
  else:
    with pytest.raises(DataError) as e:
      files.check_there(tmp_path / path)
    assert str(e.value) == (
        f'UNREADABLE {tmp_path}/{path}: nothing is there. FIX: check the path; every host must see it')


def test_data_that_is_not_there_in_an_object_store(memory):
  files.write_text(f'{memory}/ct/a.nii', 'x')
  for path in ('ct', 'ct/a.nii', 'ct/*.nii'):
    files.check_there(f'{memory}/{path}')
  for path in ('xray', 'ct/*.png'):
    with pytest.raises(DataError, match='nothing is there'):
      files.check_there(f'{memory}/{path}')


def test_the_hours_left_are_told_once():
  """ct takes 2 s, xray 1 s; after step 20 what is left of 150, on 16 devices."""
  plan = np.tile([0, 0, 1], 50)
  progress = Progress(plan, ('ct', 'xray'))
  told = []
  for i, p in enumerate(plan[:30]):
    progress.add(('ct', 'xray')[p], {}, 0., (2., 1.)[p])
    told.append(progress.forecast(i + 1, 16, {'ct': 64e12, 'xray': math.nan}))
  assert [i + 1 for i, line in enumerate(told) if line] == [FORECAST]
  rest = np.bincount(plan[FORECAST:])
  hours = (rest[0] * 2 + rest[1]) / 3600
  assert told[FORECAST - 1] == (
      f'{hours:.3g} hours left for {150 - FORECAST} steps, {hours * 16:.3g} device hours; evaluations and saves not '
      'counted | TFLOP/s a device: ct 2')


def test_a_phase_that_has_not_come_yet_is_left_out_of_the_hours():
  progress = Progress(np.repeat([0, 1], 100), ('ct', 'xray'))
  for i in range(FORECAST):
    progress.add('ct', {}, 0., 36.)
    told = progress.forecast(i + 1, 1, {'ct': math.nan, 'xray': math.nan})
  assert told == ('0.8 hours left for 80 steps, 0.8 device hours; evaluations and saves not counted; '
                  'xray not timed yet')
  assert progress.left(20) == '?'
