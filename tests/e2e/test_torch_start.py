"""A torch dump starts a run: the first loss is PyTorch's own, and what the run ends with goes back to PyTorch."""
import logging

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from data_pipelines import streams
from tests.e2e import tiny
from unimiss_jax import init_from, models, train, weights
from unimiss_jax.cli import export
from unimiss_jax.optim import named_leaves
from unimiss_jax.porting import arch, from_torch, parity, positions, torch_files

torch = pytest.importorskip('torch')
from unimiss_jax.porting import torch_mit  # noqa: E402


def config(**more):
  return tiny.config(**{'steps': 3, 'phases.xray': 0,
                        'loss.nce': 0., 'loss.pair_nce': 0., 'loss.slice': 0., 'loss.drr': .5,
                        'loss.xray': 0., 'loss.recon_xray': 0., 'eval.tasks': (),
                        'model.decoder_drop_path': 0., **more})


def dino(student, teacher, c):
  """Two cross-view terms, as specified; the centre is zero at the first step."""
  target = torch.softmax(teacher / c.loss.teacher_temp, -1)
  log = torch.log_softmax(student / c.loss.student_temp, -1)
  return -((target[:, 0] * log[:, 1]).sum(-1).mean() + (target[:, 1] * log[:, 0]).sum(-1).mean()) / 2


def first_loss(net, rows, c) -> float:
  """Of the CT phase: CT and DRR against the teacher (= the student), both reconstructions."""
  def views(x):
    x = torch.from_numpy(np.moveaxis(np.asarray(x), -1, 2))      # [B, 2, C, *S]
    output, logits = net(x.flatten(0, 1))
    return x, logits.unflatten(0, x.shape[:2]), torch.sigmoid(output.reconstruction).unflatten(0, x.shape[:2])
  ct, s_ct, r_ct = views(rows['ct'])
  drr, s_drr, r_drr = views(rows['drr'])
  low, high = (f(ct, (2, 3, 4, 5), keepdim=True) for f in (torch.amin, torch.amax))
  l = c.loss
  return float(l.ct * dino(s_ct, s_ct, c) + l.drr * dino(s_drr, s_ct, c)
               + l.recon_ct * ((r_ct - (ct - low) / (high - low))**2).mean() + l.recon_drr * ((r_drr - drr)**2).mean())


@pytest.mark.slow
def test_dump_to_run_to_export_and_back(tmp_path, monkeypatch, caplog):
  c = config(init_from=str(tmp_path / 'dump.pth'))
  fields = arch.of_config(c.model.to_dict())
  torch.manual_seed(0)
  net = torch_mit.UniMiSSPlus(fields, {k: c.head[k] for k in ('out_dim', 'hidden_dim', 'bottleneck_dim')})
  torch.save({'student': {f'module.{n}': t for n, t in net.state_dict().items()}, 'epoch': 1}, tmp_path / 'dump.pth')

  stream = streams.build(c, ('ct',), 0, 1)['ct']
  rows = stream.next()
  stream.close()
  with torch.no_grad():
    want = first_loss(net, rows, c)
  with caplog.at_level(logging.INFO):
    assert train.train_and_evaluate(c, str(tmp_path / 'run')) == 0
  tensors = len(net.state_dict())
  assert any(m.endswith(f'dump.pth": loaded {tensors}/{tensors} tensors') for m in caplog.messages)
  assert tiny.metrics(tmp_path / 'run')[0, 'ct']['train/loss'] == pytest.approx(want, rel=1e-4)

  monkeypatch.setattr(parity, 'SIZES', ((64, 64), (16, 64, 64)))
  export.export(tmp_path / 'run', tmp_path / 'out')
  trained = torch_files.read(tmp_path / 'out' / 'model.safetensors')
  net.load_state_dict({n: torch.tensor(a) for n, a in trained.items()}, strict=True)
  moved = [n for n, t in torch.load(tmp_path / 'dump.pth', weights_only=True)['student'].items()
           if not np.array_equal(trained[n.removeprefix('module.')], t.numpy())]
  assert len(moved) > 200
  assert weights.read(tmp_path / 'out').about['training']['step'] == 3


@pytest.mark.parametrize('how', ['grid', 'flat_zoom'])
def test_position_tables_of_another_size(tmp_path, caplog, how):
  """A run of other native sizes: the tables of the file are resized in the way that was asked for."""
  c = config(init_from=str(tmp_path / 'w.pth'), pos_resize=how)
  fields = arch.of_config(c.model.to_dict())
  theirs = fields | dict(image_size=96, volume_size=(16, 96, 96))
  net = torch_mit.MiTPlus(**theirs)
  torch.save(net.state_dict(), tmp_path / 'w.pth')
  with caplog.at_level(logging.INFO):
    given = init_from.read(c, {'backbone': unflatten_dict(models.param_shapes(models.build(c.model)))})
  assert '14 position tables resized' in caplog.text and how in caplog.text
  want = positions.resize(from_torch(net.state_dict())['backbone'], theirs, fields, how)
  for name, leaf in named_leaves({'backbone': want}).items():
    np.testing.assert_array_equal(given[name], leaf)
  assert given['backbone/transformer/pos_embed2D1'].shape == (1, 1 + 16 * 16, 8)
