"""The released training recipe of UniMiSS+ in PyTorch: the peer of benchmarks/step.py and memory.py.

Losses, order, optimiser and freezing as in the released code; the network is porting/torch_mit.py, which equals it. It
follows the same config as our step: centre after each loss or once, 3-D tensors in X-ray steps with zero gradients (as
PyTorch 1.8 left them) or skipped. The last layer trains: the epochs in which it is frozen are not timed.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from unimiss_jax.porting import torch_mit


class Recipe:
  """Student, teacher, centre and AdamW.

  Args:
    config: of unimiss_plus.
    weights: {released name: array} that student and teacher start from.
    schedules: lr, wd, momentum of the step.
    lean: False = as released: teacher and slices run through the decoder, whose output is thrown away, and optimiser
      and EMA go from tensor to tensor. True = encoder alone there, fused AdamW, EMA in one call for all tensors.
    compiled: torch.compile of both networks.
    device, dtype: where, and of the activations: bfloat16 = autocast.
  """

  def __init__(self, config, weights: dict, schedules: dict, lean: bool = False, compiled: bool = False,
               device: str = 'cpu', dtype: str = 'float32'):
    self.loss, self.momentum, self.lean = config.loss, schedules['momentum'], lean
    self.sequential = config.loss.center_updates == 'sequential'
    self.keep_zeros = config.optim.freeze_3d == 'zero_grad'
    self.device, self.narrow = device, dtype != 'float32'
    arch = {k: v for k, v in config.model.to_dict().items() if k in vars(torch_mit.Arch())} | {'pos_interp': 'grid'}
    head = {k: config.head[k] for k in ('out_dim', 'hidden_dim', 'bottleneck_dim')}
    tensors = {k: torch.tensor(np.asarray(v)) for k, v in weights.items()}
    nets = [torch_mit.UniMiSSPlus(arch, head) for _ in range(2)]
    for net in nets:
      net.load_state_dict(tensors)
      net.to(device)
    nets[1].requires_grad_(False)
    self.parameters = [list(net.parameters()) for net in nets]
    trained = [(n, p) for n, p in nets[0].named_parameters() if p.requires_grad]
    plain = lambda n, p: n.endswith('.bias') or p.ndim == 1
    self.optimiser = torch.optim.AdamW(
        [{'params': [p for n, p in trained if not plain(n, p)], 'weight_decay': schedules['wd']},
         {'params': [p for n, p in trained if plain(n, p)], 'weight_decay': 0.}],
        lr=schedules['lr'], eps=config.optim.eps, fused=lean or None)
    self.student, self.teacher = (torch.compile(n, dynamic=False) if compiled else n for n in nets)
    self.center = torch.zeros(1, config.head.out_dim, device=device)

  def step(self, phase: str, batch: dict) -> dict:
    """One training step on tensors of `views`: {name of a loss: its value}."""
    self.optimiser.zero_grad(set_to_none=not self.keep_zeros)
    terms = self.losses(phase, batch)
    total = sum(weight * value for weight, value in terms.values())
    total.backward()
    self.optimiser.step()
    self.follow()
    return {'loss': float(total.detach())} | {name: float(v.detach()) for name, (_, v) in terms.items()}

  def losses(self, phase: str, batch: dict) -> dict:
    """{name: (weight, value)}; moves the centre."""
    with torch.autocast(self.device, torch.bfloat16, self.narrow):
      return self.ct(**batch) if phase == 'ct' else self.xray(**batch)

  def ct(self, ct, drr) -> dict:
    """ct [2B, 1, D, H, W], drr [2B, 3, H, W], view 0 first."""
    w, center = self.loss, self.center
    t = self.teach(ct)
    out_ct, s_ct = self.student(ct)
    out_drr, s_drr = self.student(drr)
    slices = ct[:, 0, ::w.slices]                                      # [2B, S, H, W]
    images = slices.reshape(-1, 1, *slices.shape[2:]).expand(-1, 3, -1, -1)
    s_slice = self.student(images, not self.lean)[1].reshape(*slices.shape[:2], -1).mean(1)
    terms = {}
    for name, student in (('ct', s_ct), ('drr', s_drr), ('slice', s_slice)):
      terms['dino_loss' if name == 'ct' else f'{name}_loss'] = w[name], self.distil(student, t, center)
      if self.sequential:
        center = self.center
    low, high = ct.amin((1, 2, 3, 4), True), ct.amax((1, 2, 3, 4), True)
    target = (ct - low) / (high - low).clamp_min(w.recon_minmax_eps)
    return terms | {'recon_ct_loss': (w.recon_ct, restored(out_ct, target)),
                    'recon_drr_loss': (w.recon_drr, restored(out_drr, drr))}

  def xray(self, xray) -> dict:
    """xray [2B, 3, H, W], view 0 first."""
    t = self.teach(xray)
    out, s = self.student(xray)
    return {'dino_loss': (self.loss.xray, self.distil(s, t, self.center)),
            'recon_xray_loss': (self.loss.recon_xray, restored(out, xray))}

  @torch.no_grad()
  def teach(self, x):
    return self.teacher(x, not self.lean)[1].float()

  def distil(self, student, teacher, center):
    """Cross-view terms of logits [2B, K]; the centre is that of the teacher's mean, once or after each call."""
    w = self.loss
    q = ((teacher - center) / w.teacher_temp).softmax(-1).chunk(2)
    p = (student.float() / w.student_temp).log_softmax(-1).chunk(2)
    self.center = w.center_momentum * center + (1 - w.center_momentum) * teacher.mean(0, True)
    return sum(-(q[i] * p[1 - i]).sum(-1).mean() for i in (0, 1)) / 2

  @torch.no_grad()
  def follow(self):
    """The teacher."""
    student, teacher = self.parameters
    if self.lean:
      torch._foreach_lerp_(teacher, student, 1 - self.momentum)
      return
    for p, t in zip(student, teacher):
      t.mul_(self.momentum).add_((1 - self.momentum) * p)

  def state(self) -> list:
    """Every tensor that outlives a step: parameters, gradients, moments, teacher, centre."""
    student, teacher = self.parameters
    moments = [t for of in self.optimiser.state.values() for t in of.values() if torch.is_tensor(t)]
    return [*student, *teacher, *moments, *(p.grad for p in student if p.grad is not None), self.center]


def restored(output, target):
  """MSE of the sigmoid."""
  return F.mse_loss(output.reconstruction.float().sigmoid(), target)


def views(batch: dict, device: str = 'cpu') -> dict:
  """{stream: {field: [B, 2, *S, C]}} -> {field: [2B, C, *S]}, view 0 first."""
  images = {k: v for rows in batch.values() for k, v in rows.items() if k in ('ct', 'drr', 'xray')}
  return {k: torch.tensor(np.moveaxis(v.swapaxes(0, 1).reshape(-1, *v.shape[2:]), -1, 1).copy(), device=device)
          for k, v in images.items()}
