"""From weights of any kind to a folder that a PyTorch user can trust, and nothing at all from faulty ones."""
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.conftest import ROOT
from tests.e2e import tiny
from unimiss_jax import checkpoint, models, porting, weights
from unimiss_jax.cli import export
from unimiss_jax.models.heads import DINOHead
from unimiss_jax.porting import arch as architectures
from unimiss_jax.porting import parity, torch_files
from unimiss_jax.report import card

torch = pytest.importorskip('torch')
from unimiss_jax.porting import torch_mit  # noqa: E402

SIZES = ((96, 96), (16, 32, 64))      # one of each rank; all four in the slow tests


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
  monkeypatch.setattr(parity, 'SIZES', SIZES)
  yield
  logging.getLogger().handlers = [h for h in logging.getLogger().handlers if type(h) is not logging.StreamHandler]


def noise(shapes, seed):
  rng = np.random.default_rng(seed)
  return {path: jnp.asarray(rng.standard_normal(shape) / max(np.prod(shape[:-1]), 1)**.5
                            if path[-1] == 'kernel' else .1 * rng.standard_normal(shape) + (path[-1] == 'scale'),
                            jnp.float32) for path, shape in shapes.items()}


def network(config, seed):
  head = DINOHead(config.head.out_dim, config.head.hidden_dim, config.head.bottleneck_dim)
  x = jax.ShapeDtypeStruct((1, config.model.embed_dims[-1]), np.float32)
  tree = jax.eval_shape(head.init, jax.random.key(0), x)
  shapes = {path: leaf.shape for path, leaf in flatten_dict(tree['params']).items()}
  return {'backbone': unflatten_dict(noise(architectures.shapes(models.build(config.model)), seed)),
          'head': unflatten_dict(noise(shapes, seed))}


@pytest.fixture(scope='module')
def config():
  return tiny.config(**{'model.pos_interp': 'reference'})


@pytest.fixture(scope='module')
def student(config):
  return network(config, 0)


@pytest.fixture(scope='module')
def run(config, student, tmp_path_factory):
  """What a run leaves, without running it."""
  folder = tmp_path_factory.mktemp('run')
  c = checkpoint.Checkpoints(folder / 'checkpoints', keep=1)
  c.save(8, {'params': student, 'extra': {'teacher': network(config, 1), 'center': jnp.zeros((1, 32))}},
         {'positions': {'ct': 32, 'xray': 32}, 'records': {'ct': {'count': 16, 'hash': 'c0ffee'}},
          'config_hash': 'beef'})
  c.close()
  (folder / 'config.json').write_text(json.dumps(config.to_dict()))
  (folder / 'env.json').write_text(json.dumps({'devices': ['cpu cpu'], 'hosts': 1, 'packages': {'jax': '1'}}))
  rows = [{'step': 0, 'phase': 'eval', 'eval/knn_auc_ct': .5, 'eval/raw_knn_auc_ct': .6},
          {'step': 8, 'phase': 'eval', 'eval/knn_auc_ct': .75, 'eval/knn_auc_ct/nodule': .7}]
  (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{"step": 9, "torn')
  return folder


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
  out = tmp_path_factory.mktemp('out') / 'model'
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parity, 'SIZES', SIZES)
    export.export(run, out, formats=('safetensors', 'pth', 'stablehlo'), data_license='CC0')
  return out


def same(got, want):
  got, want = flatten_dict(got), flatten_dict(want)
  assert got.keys() == want.keys()
  for path, leaf in want.items():
    np.testing.assert_array_equal(got[path], leaf, err_msg='/'.join(path))


def test_every_way_back_is_bit_exact(exported, run, student, config):
  """JAX -> file -> JAX, by the folder, each file, and the run itself."""
  for source in (exported, exported / 'model.safetensors', exported / 'model.pth', run, run / 'checkpoints' / '8'):
    same(weights.read(source).params, student)
  same(weights.read(run, 'teacher').params, network(config, 1))


def test_the_folder_is_whole(exported):
  assert {p.name for p in exported.iterdir()} == {
      'model.safetensors', 'model.pth', 'config.json', 'README.md', 'parity.json', 'torch_mit.py',
      'forward_2d.stablehlo', 'forward_3d.stablehlo'}
  proof = json.loads((exported / 'parity.json').read_text())
  assert proof['passed'] and set(proof['inputs']) == {
      '96x96', '16x32x64', 'forward_2d.stablehlo', 'forward_3d.stablehlo'}
  assert set(proof['inputs']['96x96']) == {'embedding', 'c0', 'c1', 's1', 's2', 's3', 's4', 'reconstruction', 'logits'}
  assert 0 < proof['worst_max_rel'] < 1e-4


def test_the_model_card(exported):
  text = (exported / 'README.md').read_text()
  front = yaml.safe_load(text.split('---')[1])
  assert front['license'] == 'other' and front['pipeline_tag'] == 'image-feature-extraction'
  assert isinstance(front['tags'], list) and front['library_name'] == 'unimiss_jax'
  for piece in ('Research use only', 'HU, clipped to [-1024, 3071], divided by 1024', '16 x 64 x 64',
                '| ct | built-in phantoms | 16 | c0ffee |', 'Licence of the training data: CC0.', 'step | 8',
                '| knn_auc_ct | 0.750 | 0.500 | 0.600 |', 'the student of its training'):
    assert piece in text, piece


def test_the_contract_of_other_modalities():
  config = tiny.config(**{'data.modality': 'mr', 'data.sequences': '_t1,_flair', 'model.in_channels': (3, 2)})
  told = card.contract(config.to_dict())['volume']
  assert told['tensor'] == '[B, 2, D, H, W] float32' and told['sequences'] == '_t1,_flair'
  assert 'clipped to the 0.5 and 99.5 percentiles of the voxels that are not 0' in told['intensity']


LINES = '''
import sys, numpy as np, torch
x = torch.from_numpy(np.load(sys.argv[1]))
with torch.no_grad():
{lines}
np.savez(sys.argv[2], embedding=output.embedding, reconstruction=output.reconstruction, logits=logits)
bad = {{'jax', 'flax', 'unimiss_jax'}} & set(sys.modules)
sys.exit(str(bad) if bad else 0)
'''


def test_the_four_lines_for_a_pytorch_user_as_they_stand(exported, tmp_path, student, config):
  """The lines of the README, in a process that cannot see this package, against our network."""
  use = card.lines_of('torch_mit', 'UniMiSSPlus')
  assert use in (ROOT / 'README.md').read_text() and use in (exported / 'README.md').read_text()
  lines = '\n'.join('  ' + line for line in use.splitlines())
  module = models.build(config.model)
  for x in (parity.images((64, 64), 3), parity.images((16, 64, 64), 1)):
    np.save(tmp_path / 'x.npy', x)
    code = LINES.format(lines=lines)
    subprocess.run([sys.executable, '-c', code, tmp_path / 'x.npy', tmp_path / 'y.npz'], cwd=exported, check=True,
                   env=os.environ | {'PYTHONPATH': ''})
    got = np.load(tmp_path / 'y.npz')
    want = module.apply({'params': student['backbone']}, np.moveaxis(x, 1, -1))
    for name, value in (('embedding', want.embedding), ('reconstruction', np.moveaxis(want.reconstruction, -1, 1))):
      np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-4 * abs(value).max())


def test_stablehlo_runs_without_this_package(exported, tmp_path):
  x = parity.images((16, 64, 64), 1)
  np.save(tmp_path / 'x.npy', np.concatenate([x, x[:, :, ::-1]]))
  code = '''
import sys, pathlib, numpy as np, jax.export, safetensors.numpy
f = jax.export.deserialize(pathlib.Path('forward_3d.stablehlo').read_bytes())
out = f.call(safetensors.numpy.load_file('model.safetensors'), np.load(sys.argv[1]))
np.savez(sys.argv[2], **out)
bad = {'torch', 'flax', 'unimiss_jax'} & set(sys.modules)
sys.exit(str(bad) if bad else 0)
'''
  subprocess.run([sys.executable, '-c', code, tmp_path / 'x.npy', tmp_path / 'y.npz'], cwd=exported, check=True,
                 env=os.environ | {'PYTHONPATH': ''})
  got = np.load(tmp_path / 'y.npz')
  net = torch_mit.UniMiSSPlus(**json.loads((exported / 'config.json').read_text())['torch'])
  net.load_state_dict({n: torch.tensor(a) for n, a in torch_files.read(exported / 'model.safetensors').items()})
  with torch.no_grad():
    output, logits = net(torch.from_numpy(np.load(tmp_path / 'x.npy')))
  for name, value in (('embedding', output.embedding), ('reconstruction', output.reconstruction), ('logits', logits),
                      ('s4', output.pyramid[5])):
    np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-4 * float(abs(value).max()))


def test_bfloat16(run, student, tmp_path):
  from safetensors.torch import load_file
  export.export(run, tmp_path / 'half', dtype='bfloat16', parts=('encoder',), formats=('safetensors', 'pth'))
  state = load_file(tmp_path / 'half' / 'model.safetensors')
  want = porting.to_torch(student)
  assert all(t.dtype == torch.bfloat16 and n.startswith('backbone.transformer.') for n, t in state.items())
  for name, tensor in state.items():
    np.testing.assert_array_equal(tensor.float().numpy(), want[name].astype(jnp.bfloat16).astype(np.float32))
  saved = torch.load(tmp_path / 'half' / 'model.pth', weights_only=True)
  assert all(torch.equal(saved[n], t) for n, t in state.items())


@pytest.mark.parametrize('parts, dimension', [
    (('encoder',), None), (('encoder', 'decoder'), '3D'), (('encoder', 'head'), '2D')])
def test_parts_and_dimensions(exported, tmp_path, parts, dimension):
  """What is written loads strictly into the module that config.json describes; a smaller file needs to be named."""
  whole = torch_files.read(exported / 'model.safetensors')
  kept = {n: a for n, a in whole.items() if not dimension or dimension not in n}
  torch_files.write(tmp_path / 'w.safetensors', kept)
  if dimension:
    with pytest.raises(porting.PortingError, match=f'w.safetensors: .*--allow={dimension} or --config.init_allow='):
      export.export(tmp_path / 'w.safetensors', tmp_path / 'out', parts=parts)
  export.export(tmp_path / 'w.safetensors', tmp_path / 'out', parts=parts, allow=(dimension,) if dimension else ())
  state = torch_files.read(tmp_path / 'out' / 'model.safetensors')
  assert state.keys() == {n for n in kept if weights.part_of(n) in parts}
  known = json.loads((tmp_path / 'out' / 'config.json').read_text())
  net = torch_mit.UniMiSSPlus(**known['torch'])
  net.load_state_dict({n: torch.tensor(a) for n, a in state.items()})
  assert known['torch']['decoder'] == ('decoder' in parts)
  assert len(json.loads((tmp_path / 'out' / 'parity.json').read_text())['inputs']) == (1 if dimension else 2)
  if dimension:
    with pytest.raises(ValueError, match=f'these weights are {3 if dimension == "2D" else 2}-D only'):
      net(torch.zeros((1, 3, 64, 64) if dimension == '2D' else (1, 1, 16, 64, 64)))


def test_a_released_dump_becomes_a_folder(exported, tmp_path):
  """The nesting of the released code; its teacher; nothing is known of its training."""
  state = {n: torch.tensor(a) for n, a in torch_files.read(exported / 'model.safetensors').items()}
  torch.save({'student': {f'module.{n}': t for n, t in state.items()}, 'epoch': 400,
              'teacher': {n: t + .01 for n, t in state.items()}}, tmp_path / 'dump.pth')
  export.export(tmp_path / 'dump.pth', tmp_path / 'out', branch='teacher')
  back = torch_files.read(tmp_path / 'out' / 'model.safetensors')
  assert all(np.array_equal(back[n], (t + .01).numpy()) for n, t in state.items())
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert 'Not recorded in the file that the weights came from' in text and 'the teacher of its training' in text
  assert weights.read(tmp_path / 'out').branch == 'teacher'
  with pytest.raises(porting.PortingError, match='holds one network, teacher, no student'):
    weights.read(tmp_path / 'out', 'student')
  torch.save(state, tmp_path / 'flat.pth')
  with pytest.raises(porting.PortingError, match='holds one network, of which nothing says whose, no teacher'):
    weights.read(tmp_path / 'flat.pth', 'teacher')


def test_a_card_does_not_take_the_scores_of_another_step(run, tmp_path):
  scores = [{'step': 4, 'phase': 'eval', 'eval/knn_auc_ct': .9}]
  assert card._evaluation(scores, 8) == {} and card._evaluation(scores, 4)['eval/knn_auc_ct']['value'] == .9


class Payload:

  def __reduce__(self):
    return os.system, ('touch /dev/null',)


def broken(kind, exported, folder):
  """A faulty source of this kind."""
  tensors = torch_files.read(exported / 'model.safetensors')
  block = 'backbone.transformer.block2.0.attn.q.bias'
  path = folder / 'w.safetensors'
  if kind == 'text':
    path.write_text('no weights')
    return path
  if kind == 'truncated':
    path.write_bytes((exported / 'model.safetensors').read_bytes()[:-100])
    return path
  if kind == 'payload':
    torch.save({'student': Payload()}, path)
    return path
  if kind == 'nested number':
    torch.save({'student': 3}, path)
    return path
  if kind == '2D only':
    torch_files.write(path, {n: a for n, a in tensors.items() if '3D' not in n})
    return path
  if kind == 'no folder':
    return folder / 'nothing'
  if kind == 'empty folder':
    return folder
  if kind == 'not finite':
    tensors[block] = tensors[block] * np.nan
  else:
    kernel = 'backbone.transformer.patch_embed2D2.proj.conv.weight'
    tensors |= {'missing': {}, 'a head of another network': {'head.mlp.0.weight': np.zeros((16, 9), np.float32)},
                'mis-shaped kernel': {kernel: np.zeros((9, 4, 3, 3))},
                'whole numbers': {block: np.zeros(8, np.int32)}, 'extra': {'backbone.odd.weight': np.zeros(3)},
                'mis-shaped': {block: np.zeros(9)},
                'head': {'head.mlp.2.weight': np.zeros((7, 7))}}[kind]
  torch_files.write(path, {n: a for n, a in tensors.items() if kind != 'missing' or n != block})
  return path


@pytest.mark.parametrize('kind, text', [
    ('missing', r'1 missing: backbone.transformer.block2.0.attn.q.bias'),
    ('extra', r'1 unexpected: backbone.odd.weight'),
    ('a head of another network', r'1 mis-shaped: head.mlp.0.weight'),
    ('mis-shaped kernel', r'1 mis-shaped: backbone.transformer.patch_embed2D2.proj.conv.weight'),
    ('whole numbers', 'of type int32, weights are floating-point numbers'),
    ('payload', 'refused: its pickle wants to call posix.system'), ('nested number', 'holds a int where names'),
    ('2D only', 'FIX: this is a 2D-only file'),
    ('mis-shaped', r'1 mis-shaped: backbone.transformer.block2.0.attn.q.bias \(9,\) expected \(8,\)'),
    ('head', r'1 mis-shaped: head.mlp.2.weight \(7, 7\) expected \(16, 16\)'), ('text', 'neither a file of torch.save'),
    ('truncated', 'damaged safetensors'), ('no folder', 'no such file'),
    ('empty folder', 'no checkpoint and no model.saf'),
    ('not finite', '1 tensors hold values that are not finite, the first is .*block2_0/attn/q/bias')])
def test_faulty_weights_give_one_line_and_nothing_else(exported, tmp_path, capsys, kind, text):
  source = broken(kind, exported, tmp_path)
  assert export.main([f'--ckpt={source}', f'--out={tmp_path / "out"}']) == 1
  error = capsys.readouterr().err
  assert error.startswith('ERROR ') and error.count('\n') == 1 and 'Traceback' not in error
  assert re.search(text, error), error
  assert not (tmp_path / 'out' / 'model.safetensors').exists()
  assert not (tmp_path / 'out').exists()


def test_a_proof_that_fails_writes_the_proof_alone(exported, tmp_path, monkeypatch, capsys):
  forward = parity.forward
  monkeypatch.setattr(parity, 'forward', lambda model: lambda t, x: {
      k: 1.001 * v if k == 's2' else v for k, v in forward(model)(t, x).items()})
  assert export.main([f'--ckpt={exported}', f'--out={tmp_path / "out"}']) == 1
  told = capsys.readouterr().err
  assert 'ERROR JAX and PyTorch differ by more than 0.0001 of the largest value of a stage (s2 of 96x96 1.0e-03' in told
  assert [p.name for p in (tmp_path / 'out').iterdir()] == ['parity.json']
  proof = json.loads((tmp_path / 'out' / 'parity.json').read_text())
  worst = max(proof['inputs']['96x96'], key=lambda s: proof['inputs']['96x96'][s]['max_rel'])
  assert not proof['passed'] and worst == 's2'


def test_a_folder_of_something_else_is_not_written_to(exported, tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(OSError, match=r'holds other things than an export \(thesis.tex\). FIX: use another folder'):
    export.export(exported, tmp_path)


def test_a_run_is_not_written_into(exported, run):
  """Its config.json would be replaced, and it could never be resumed."""
  before = (run / 'config.json').read_bytes()
  with pytest.raises(OSError, match='holds other things than an export'):
    export.export(exported, run)
  assert (run / 'config.json').read_bytes() == before and not (run / 'model.safetensors').exists()


def test_nothing_of_an_earlier_export_stays(exported, tmp_path):
  out = tmp_path / 'out'
  shutil.copytree(exported, out)
  export.export(exported, out, parts=('encoder',))
  assert {p.name for p in out.iterdir()} == {
      'model.safetensors', 'config.json', 'README.md', 'parity.json', 'torch_mit.py'}


def test_a_part_that_was_exported_alone_is_read_again(exported, tmp_path):
  """By the commands of this package, without naming once more what was left out by name."""
  export.export(exported, tmp_path / 'part', parts=('encoder',))
  assert weights.read(tmp_path / 'part').parts == ('encoder',)
  export.export(tmp_path / 'part', tmp_path / 'again', parts=('encoder',))
  a, b = (torch_files.recorded(tmp_path / name / 'model.safetensors') for name in ('part', 'again'))
  assert a == b
  same(weights.read(tmp_path / 'again').params, weights.read(tmp_path / 'part').params)


HEADS = {'num_heads': (1, 1, 2, 4), 'volume_size': (64, 32, 32)}


def test_heads_and_depth_are_written_down_or_the_guess_is_told(tmp_path, caplog):
  """They leave no trace in shapes: the file carries them; a file that does not is exported with a warning."""
  config = tiny.config(**{f'model.{k}': v for k, v in HEADS.items()})
  params = network(config, 0)
  tensors = porting.to_torch(params)
  arch = architectures.fields(architectures.of_config(config.model.to_dict()))
  torch_files.write(tmp_path / 'known.safetensors', tensors, {'arch': arch})
  found = weights.read(tmp_path / 'known.safetensors')
  assert found.recorded and all(tuple(found.arch[k]) == v for k, v in HEADS.items())
  torch_files.write(tmp_path / 'bare.safetensors', tensors)
  with caplog.at_level(logging.WARNING):
    export.export(tmp_path / 'bare.safetensors', tmp_path / 'guess')
  assert "does not record heads and the depth of volumes: assuming {'num_heads': [1, 2, 4, 8]" in caplog.text
  assert 'Parity cannot tell' in (tmp_path / 'guess' / 'README.md').read_text()
  export.export(tmp_path / 'bare.safetensors', tmp_path / 'told', arch={k: list(v) for k, v in HEADS.items()})
  saved = json.loads((tmp_path / 'told' / 'config.json').read_text())
  assert all(tuple(saved['torch']['arch'][k]) == v for k, v in HEADS.items()) and saved['recorded']
  assert 'Parity cannot tell' not in (tmp_path / 'told' / 'README.md').read_text()


def test_input_channels_through_the_command(exported, tmp_path, capsys):
  tensors = torch_files.read(exported / 'model.safetensors')
  for name in ('backbone.transformer.ConvBlock2D0.0.conv.weight', 'backbone.recon_conv2D.weight',
               'backbone.recon_conv2D.bias'):
    tensors[name] = tensors[name].sum(1, keepdims=True) if 'Block' in name else tensors[name][:1]
  torch_files.write(tmp_path / 'grey.safetensors', tensors)
  source = tmp_path / 'grey.safetensors'
  assert export.main([f'--ckpt={source}', f'--out={tmp_path / "out"}', '--in_chans=repeat']) == 0
  saved = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert saved['torch']['arch']['in_channels'] == [3, 1]
  assert torch_files.read(tmp_path / 'out' / 'model.safetensors')['backbone.recon_conv2D.weight'].shape[0] == 3


def test_a_run_without_a_teacher(tmp_path, student):
  c = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=1)
  c.save(1, {'params': student, 'extra': {}}, {})
  c.close()
  with pytest.raises(checkpoint.CheckpointError, match='has no teacher: the run has no self-distillation'):
    weights.read(tmp_path, 'teacher')
  with pytest.raises(porting.PortingError, match='config.json'):
    export.export(tmp_path, tmp_path / 'out')


@pytest.mark.parametrize('flags, text', [
    ([], '--out'), (['--out=x'], 'one of the arguments --workdir --ckpt is required'),
    (['--ckpt=x', '--workdir=y', '--out=z'], 'not allowed with'),
    (['--ckpt=x', '--out=z', '--part=head'], '--part=head'),
    (['--ckpt=x', '--out=z', '--format=onnx'], '--format=onnx unknown: use some of safetensors, pth, stablehlo'),
    (['--ckpt=x', '--out=z', '--parts=neck'], '--parts=neck unknown: use some of encoder, decoder, head')])
def test_usage_is_told_with_exit_code_2(flags, text):
  command = [sys.executable, '-m', 'unimiss_jax.cli.export', *flags]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 2 and text in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.slow
def test_the_demo_network_at_all_sizes(tmp_path, monkeypatch):
  """Residual units, last stride 1, final norm, a head without prototypes."""
  from configs import unimiss_plus
  monkeypatch.undo()
  config = unimiss_plus.get_config('phantom')
  params = network(config, 0)
  params['head'].pop('last_layer')
  arch = architectures.fields(architectures.of_config(config.model.to_dict()))
  torch_files.write(tmp_path / 'w.safetensors', porting.to_torch(params), {'arch': arch})
  proof = export.export(tmp_path / 'w.safetensors', tmp_path / 'out', formats=('stablehlo',))
  assert proof['passed'] and set(proof['inputs']) == {
      '96x96', '128x160', '16x96x96', '32x64x96', 'forward_2d.stablehlo', 'forward_3d.stablehlo'}


@pytest.mark.slow
def test_the_full_model_at_all_sizes(tmp_path, monkeypatch):
  """63.3 M parameters through the program as a user calls it: loads strictly, every stage agrees."""
  monkeypatch.undo()
  torch.manual_seed(0)
  net = torch_mit.UniMiSSPlus()
  torch.save({'student': {f'module.{n}': t for n, t in net.state_dict().items()}}, tmp_path / 'dump.pth')
  subprocess.run([sys.executable, '-m', 'unimiss_jax.cli.export', f'--ckpt={tmp_path / "dump.pth"}',
                  f'--out={tmp_path / "out"}', '--format=safetensors,stablehlo'], check=True, cwd=ROOT)
  proof = json.loads((tmp_path / 'out' / 'parity.json').read_text())
  assert proof['passed'] and set(proof['inputs']) == {
      '96x96', '128x160', '16x96x96', '32x64x96', 'forward_2d.stablehlo', 'forward_3d.stablehlo'}
  from safetensors.torch import load_file
  state = load_file(tmp_path / 'out' / 'model.safetensors')
  assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())
