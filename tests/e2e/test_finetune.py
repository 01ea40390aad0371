"""Fine-tuning through the one loop: from pre-trained weights, stopped and resumed, ended early, tested at its end."""
import html
import json
import shutil

import jax
import numpy as np
import pytest

from tests.e2e import tiny
from unimiss_jax import checkpoint, train, weights
from unimiss_jax.checkpoint import Checkpoints
from unimiss_jax.cli import report
from unimiss_jax.methods import base
from unimiss_jax.mirror import Mirror
from unimiss_jax.processes import StopSignal

FROZEN = {'task.frozen': True, 'eval.patience': 0}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A checkpoint as pre-training writes it, of noise."""
  folder = tmp_path_factory.mktemp('pretrained')
  config = tiny.config()
  method = base.make(config, {'ct': (16, {}), 'xray': (16, {})})
  params, _ = jax.jit(method.init)(jax.random.key(7))
  saved = Checkpoints(folder / 'checkpoints', 1)
  saved.save(3, {'params': params, 'step': np.int32(3)}, {'positions': {}, 'config_hash': ''})
  saved.close()
  (folder / 'config.json').write_text(json.dumps(config.to_dict()))
  return folder


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, pretrained):
  folder = tmp_path_factory.mktemp('undisturbed')
  assert train.train_and_evaluate(tiny.task(init_from=str(pretrained), **FROZEN), str(folder)) == 0
  return folder


def params(folder):
  return checkpoint.read_params(checkpoint.newest(folder))


def test_the_encoder_is_that_of_the_file_and_stays_it(undisturbed, pretrained):
  given, got = params(pretrained), params(undisturbed)
  same = [n for n in got if n.startswith('backbone/')]
  assert same and all(np.array_equal(given[n], got[n]) for n in same)
  assert {n for n in got if not n.startswith('backbone/')} == {'task/linear/bias', 'task/linear/kernel'}
  state = checkpoint.newest(undisturbed) / 'state'
  assert 'encoder' not in str(sorted(p.name for p in state.iterdir()))


def test_what_the_end_of_a_run_says(undisturbed, pretrained):
  found = json.loads((undisturbed / 'eval' / 'test.json').read_text())
  want = {'task': 'phantom_cls3d', 'kind': 'cls', 'init_from': str(pretrained), 'frozen': True, 'seed': 0,
          'fraction': 1., 'cases': 8, 'fit': 16, 'steps': 8}
  assert {k: found[k] for k in want} == want
  assert found['step'] in (4, 8) and found['loaded'][0] == found['loaded'][1] - 2
  encoder = {n: x for n, x in params(pretrained).items() if '/transformer/' in n}
  assert found['weights_hash'] == weights.digest(encoder)
  assert found['control']['chance/auroc'] == .5 and 0 <= found['control']['raw/auroc'] <= 1
  assert found['interval']['auroc'][0] <= found['scores']['auroc'] <= found['interval']['auroc'][1]
  with np.load(undisturbed / 'eval' / 'test.npz') as table:
    assert table['probability'].shape == table['truth'].shape == (8, 4) and len(set(table['id'])) == 8
    assert ((table['probability'] > 0) & (table['probability'] < 1)).all()
  rows = [json.loads(r) for r in (undisturbed / 'metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows if r.get('phase') == 'eval'] == [0, 4, 8]
  assert all('eval/auroc' in r and 'eval/ece' in r for r in rows if r.get('phase') == 'eval')


def test_a_stopped_run_goes_on_bit_for_bit(undisturbed, pretrained, tmp_path, monkeypatch):
  config = tiny.task(init_from=str(pretrained), **FROZEN)
  asked = StopSignal.asked
  monkeypatch.setattr(StopSignal, 'asked', lambda self, step: 'SIGTERM' if step == 5 else asked(self, step))
  assert train.train_and_evaluate(config, str(tmp_path), preempt_exit_code=9) == 9
  assert not (tmp_path / 'eval').exists()
  monkeypatch.undo()
  assert train.train_and_evaluate(config, str(tmp_path)) == 0
  assert tiny.metrics(tmp_path) == tiny.metrics(undisturbed)
  got, want = params(tmp_path), params(undisturbed)
  assert all(np.array_equal(got[n], want[n]) for n in want)
  scores = lambda folder: {k: v for k, v in json.loads((folder / 'eval' / 'test.json').read_text()).items()
                           if k in ('scores', 'control', 'interval', 'step', 'loaded', 'weights_hash')}
  assert scores(tmp_path) == scores(undisturbed)


def test_a_run_that_no_longer_gets_better_ends_and_stays_ended(pretrained, tmp_path, monkeypatch):
  scores = iter([.5, .6, .55, .58, .59])
  monkeypatch.setattr('unimiss_jax.observer.Observer.scores', lambda self, state, at: {'eval/auroc': next(scores)})
  config = tiny.task(init_from=str(pretrained), steps=32, **FROZEN | {'eval.patience': 2, 'eval.every': 2})
  assert train.train_and_evaluate(config, str(tmp_path)) == 0
  found = json.loads((tmp_path / 'eval' / 'test.json').read_text())
  assert (found['step'], found['steps']) == (2, 6)      # the best of .6 .55 .58; step 0 is not offered
  (tmp_path / 'DONE').unlink()
  run = train.Run(config, str(tmp_path), Mirror(tmp_path), 'auto')
  assert run.best.exhausted(int(run.state.step)) and int(run.state.step) == 6
  run.close(wait=True)


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['phantom_seg3d', 'phantom_seg2d', 'phantom_cls2d'])
def test_the_other_tasks_run_to_their_end(preset, pretrained, tmp_path):
  config = tiny.task(preset, init_from=str(pretrained), **{'eval.save': True, 'task.phantoms': (8, 2, 3), 'steps': 4})
  assert train.train_and_evaluate(config, str(tmp_path)) == 0
  found = json.loads((tmp_path / 'eval' / 'test.json').read_text())
  assert report.main([f'--workdir={tmp_path}']) == 0
  page = (tmp_path / 'report' / 'index.html').read_text()
  what = 'Dense features of a volume: axial slices' if config.phases.ct else 'Attention and dense features: xray'
  assert what in page and 'Embeddings by label' in page and 'not shown (' not in page
  if preset == 'phantom_cls2d':
    assert 'auroc' in found['scores']
    return
  assert found['scores'].keys() >= {'dice', f'dice/{config.task.classes[0]}'} and found['cases'] == 3
  assert found['control']['raw/dice'] > .2
  saved = sorted(p.name for p in (tmp_path / 'eval' / 'predictions').iterdir())
  assert len(saved) == 3 * (1 if preset == 'phantom_seg3d' else 3)
  assert (tmp_path / 'eval' / 'cases.png').stat().st_size > 1000


def test_the_page_of_a_task_whose_data_are_gone(undisturbed, tmp_path):
  """Curves and verdict stand; in place of what the network sees stands what is missing, and where."""
  run, gone = tmp_path / 'run', tmp_path / 'moved <away>'
  shutil.copytree(undisturbed, run)
  config = json.loads((run / 'config.json').read_text())
  config['data']['manifest'] = str(gone)
  (run / 'config.json').write_text(json.dumps(config))
  assert report.main([f'--workdir={run}']) == 0
  page = (run / 'report' / 'index.html').read_text()
  assert f'What the network sees is not shown: UNREADABLE {html.escape(str(gone))}' in page and str(gone) not in page
  assert '8 test cases' in page and 'Embeddings by label' not in page


def test_another_split_is_another_run(undisturbed, tmp_path):
  """What a comparison must not mix has another hash."""
  from data_pipelines import cases
  mine = json.loads((undisturbed / 'eval' / 'test.json').read_text())
  assert mine['split_hash'] == cases.of(tiny.task(), 'test').digest
  assert mine['split_hash'] != cases.of(tiny.task(**{'task.world': 1}), 'test').digest
