"""The real main.py in two processes, as launch starts them."""
import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.multiprocess.cluster import CONFIG


@pytest.mark.slow
def test_two_processes_of_four_devices_train(tmp_path):
  command = [sys.executable, '-m', 'unimiss_jax.cli.launch', '--nodes=2', '--devices=8', f'--config={CONFIG}',
             f'--workdir={tmp_path}/a run', '--config.steps=22']
  done = subprocess.run(command, cwd=ROOT, env=dict(os.environ, XLA_FLAGS='', PYTHONPATH=str(ROOT)), text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200)
  said, run = done.stdout, tmp_path / 'a run'
  assert done.returncode == 0 and (run / 'DONE').exists(), said
  steps = [r['step'] for r in map(json.loads, (run / 'metrics.jsonl').read_text().splitlines()) if 'train/loss' in r]
  assert sorted(steps) == list(range(22))
  assert {line[:4] for line in said.splitlines()} == {'[0] ', '[1] '}
  assert re.search(r"^\[0\] I .*mesh {'data': 8, 'fsdp': 1}, 2 processes", said, re.M), said
  assert len(re.findall(r'^\[0\] I .* a step of ct [\d.]+ [MG]FLOP, [\d.]+ GB a device; xray [\d.]+ [MG]FLOP, ', said,
                        re.M)) == 1, said
  assert len(re.findall(r'hours left for 2 steps', said)) == 1, said
