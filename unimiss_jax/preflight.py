"""Before a run trains: do all processes mean the same run on the same data, can each of them, and what will it cost?

What differs is one line on every host, with the process and the host that differ from the others.
"""
import ctypes
import hashlib
import json
import logging
import math
import pathlib
import platform
import sys
from typing import NamedTuple

import jax

from unimiss_jax import __version__, processes, sharding, step, validate, workdir
from unimiss_jax.optim import named_leaves
from unimiss_jax.state import parameters

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = 'unimiss_jax', 'data_pipelines'

LEAVES = 6      # that a message lists
MEMINFO, CGROUP = '/proc/meminfo', '/sys/fs/cgroup'
REMEDIES = {
    'config': 'start all processes with the same command',
    'installation': 'install the same on all hosts: the same files, pip install -c requirements.lock -e .',
    'devices': 'give every process as many devices of one kind as the others',
    'records': 'let every host see the same files (the lines above name those that were skipped)',
}


def same_run(config, folder, resume: str) -> None:
  """Raises ProcessError unless all processes have one config, one installation and alike devices."""
  agree({'config': workdir.flat(config.to_dict()) | {'--workdir': str(folder), '--resume': resume},
         'installation': installation(),
         'devices': {'count': jax.local_device_count(), 'kind': jax.local_devices()[0].device_kind}})


def same_records(records: dict) -> None:
  """Raises ProcessError unless all processes see the same {stream or 'manifest': {'count', 'hash'}}."""
  agree({'records': workdir.flat({f'data.{n}': about for n, about in records.items()})})


def installation() -> dict[str, str]:
  """Versions, and a hash of our own files: two copies of a folder may carry the same number."""
  made = hashlib.blake2b(digest_size=8)
  for file in sorted(f for package in SOURCES for f in (ROOT / package).rglob('*.py')):
    made.update(f'{file.relative_to(ROOT)}\n'.encode() + file.read_bytes())
  return workdir.versions() | {'python': platform.python_version(), 'unimiss_jax': __version__,
                               'source': made.hexdigest()}


def agree(facts: dict[str, dict]) -> None:
  """Raises ProcessError, on every process, unless all hold the same {subject of REMEDIES: {name: value}}."""
  text = json.dumps(facts, sort_keys=True)
  if len({*processes.gather(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())}) == 1:
    return
  hosts, theirs = zip(*processes.gather([processes.HOST, facts]))
  for what in facts:
    if found := differences(what, [t[what] for t in theirs], hosts):
      raise processes.ProcessError(found)


def differences(what: str, values: list[dict], hosts) -> str | None:
  """Which processes hold something else than most of them (a tie: than the first), in one line; None = none does.

  Args:
    what: they hold, a key of REMEDIES.
    values: {name: JSON value} of each process.
    hosts: the name of the host of each.
  """
  texts = [json.dumps(v, sort_keys=True) for v in values]
  usual = texts.index(max(texts, key=texts.count))
  odd = {}      # difference -> the processes that have it
  for i, value in enumerate(values):
    if texts[i] != texts[usual]:
      odd.setdefault(_changes(value, values[usual]), []).append(processes.called(i, hosts[i]))
  if not odd:
    return None
  told = '; '.join(f'{processes.some(who)} has {change}' for change, who in list(odd.items())[:processes.SHOWN])
  told += '; others differ in another way' if len(odd) > processes.SHOWN else ''
  return (f'{what} of all processes must be the same, but unlike {processes.called(usual, hosts[usual])} {told}. '
          f'FIX: {REMEDIES[what]}')


def _changes(value: dict, usual: dict) -> str:
  names = [k for k in usual | value if value.get(k) != usual.get(k)]
  told = ', '.join(f'{k} {value.get(k, "(absent)")} instead of {usual.get(k, "(absent)")}' for k in names[:LEAVES])
  return told + (f' and {len(names) - LEAVES} more differences' if len(names) > LEAVES else '')


# ---- what it takes


def check_memory(read_ahead: int) -> None:
  """Warns where the batches that all processes of this host read ahead do not fit into its free memory.

  Args:
    read_ahead: bytes of this process, at most.
  """
  both = processes.gather([processes.HOST, read_ahead])
  here, free = sum(n for host, n in both if host == processes.HOST), free_memory()
  if free is not None and here > free:
    logging.warning('%sbatches read ahead take up to %.1f GB, %.1f GB are free on this host. FIX: lower data.workers '
                    'or batch.*', processes.me(), here / 1e9, free / 1e9)


def check_state(state) -> None:
  """Raises ConfigError, with the numbers, where the state alone exceeds what the devices have free.

  Args:
    state: tree of jax.ShapeDtypeStruct with shardings.
  """
  need, free = sharding.bytes_per_device(state), device_memory()
  if free is None or need <= free:
    return
  name, x = max(named_leaves(state).items(), key=lambda item: sharding.bytes_per_device(item[1]))
  raise validate.ConfigError(
      f'the state takes {need / 1e9:.3g} GB a device, {free / 1e9:.3g} GB are free; the largest part is {name} '
      f'{x.shape}, {sharding.bytes_per_device(x) / 1e9:.3g} GB. FIX: use more devices, or make that part smaller')


def device_memory() -> int | None:
  """Bytes of one local device; of a CPU, its share of what the host has left. None where it is not known."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit')
  free = free_memory()
  return free and free // jax.local_device_count()


def free_memory(meminfo=MEMINFO, cgroup=CGROUP) -> int | None:
  """Bytes that this host, or this container, has left; None where it does not say."""
  found = []
  try:
    lines = dict(line.split(':', 1) for line in pathlib.Path(meminfo).read_text().splitlines() if ':' in line)
    found.append(int(lines['MemAvailable'].split()[0]) * 1024)
  except (OSError, KeyError, ValueError):
    pass
  try:
    limit, used = (int((pathlib.Path(cgroup) / f'memory.{name}').read_text()) for name in ('max', 'current'))
    stat = dict(line.split() for line in (pathlib.Path(cgroup) / 'memory.stat').read_text().splitlines())
    found.append(limit - used + int(stat['inactive_file']))      # files that were read and can be dropped
  except (OSError, KeyError, ValueError):      # 'max': no limit
    pass
  return min(found, default=None)


class Cost(NamedTuple):
  """Of one step. flops: of all devices together, a loop (micro-batches) counted once; nan = not known. bytes: of one
  device, what goes in and what is needed meanwhile; None = not known."""
  flops: float
  bytes: int | None


def cost(compiled, devices: int) -> Cost:
  """What XLA says of a compiled step, which is the program of one of `devices`."""
  flops = (compiled.cost_analysis() or {}).get('flops', math.nan)
  memory = compiled.memory_analysis()
  return Cost(flops * devices if flops > 0 else math.nan,
              memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes)


def told(costs: dict[str, Cost]) -> str:
  """'ct 1.23 TFLOP, 4.5 GB a device; xray ...' of {phase: its cost}."""
  return '; '.join(f'{name} {"? " if math.isnan(c.flops) else _si(c.flops)}FLOP, '
                   f'{"?" if c.bytes is None else f"{c.bytes / 1e9:.3g}"} GB a device' for name, c in costs.items())


def _si(x: float) -> str:
  for power, letter in ((15, 'P'), (12, 'T'), (9, 'G'), (6, 'M')):
    if x >= 10 ** power:
      return f'{x / 10 ** power:.3g} {letter}'
  return f'{x:.3g} '


def trim_memory() -> None:
  """Gives freed memory back to the system, where glibc can: compiling leaves it gigabytes that nothing uses again."""
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
  if trim:
    trim(0)


def describe(config, method, state, streams, read_ahead: float, mesh) -> None:
  """Logs what begins: sizes, data, devices, rate, and the losses of a network that tells nothing apart."""
  total, (lr, _) = method.total_steps, step.schedules(config, method)
  levels = {f'{n} {k[6:]} {v:.3f}' for n, p in method.phases.items() for k, v in p.chance.items()}
  logging.info('%s, preset %s | %.2f M parameters, state %.3g GB a device | %d steps, %d an epoch | %s, '
               'up to %.2g GB of them read ahead | mesh %s, %d processes | learning rate %.2e',
               config.method, config.preset, parameters(state.params) / 1e6, sharding.bytes_per_device(state) / 1e9,
               total, method.steps_per_epoch, ', '.join(f'{s.records} {n} records' for n, s in streams.items()),
               read_ahead / 1e9, dict(mesh.shape), jax.process_count(),
               max(float(lr(i)) for i in range(0, total, max(total // 1000, 1))))
  if levels:
    logging.info('chance level: %s', ', '.join(sorted(levels)))
