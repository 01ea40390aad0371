"""Single operations of a CT step, forward and backward, ours beside eager PyTorch: `benchmarks/step.py --ops`.

Sizes are those of one record: two crops, 16 slices, 65,536 prototypes. The cotangent is the output itself, gradients go
to inputs and parameters alike. That both sides compute the same is the business of tests/porting/test_torch_mit.py.
"""
import math

from benchmarks import contest

# name: (inputs, outputs, size [B, *S], stride)
CONVOLUTIONS = {
    'conv 3d 1->32, 2x16x96x96': (1, 32, (2, 16, 96, 96), (1, 1, 1)),
    'conv 3d 32->64 stride 1,2,2, 2x16x96x96': (32, 64, (2, 16, 96, 96), (1, 2, 2)),
    'conv 3d 64->64, 2x16x48x48': (64, 64, (2, 16, 48, 48), (1, 1, 1)),
    'conv 3d 64->128 stride 2, 2x16x48x48': (64, 128, (2, 16, 48, 48), (2, 2, 2)),
    'conv 3d 128->128, 2x8x24x24': (128, 128, (2, 8, 24, 24), (1, 1, 1)),
    'conv 3d 128->256 stride 2, 2x8x24x24': (128, 256, (2, 8, 24, 24), (2, 2, 2)),
    'conv 3d 256->256, 2x4x12x12': (256, 256, (2, 4, 12, 12), (1, 1, 1)),
    'conv 3d 320->320, 2x4x6x6': (320, 320, (2, 4, 6, 6), (1, 1, 1)),
    'conv 2d 3->32, 16x96x96': (3, 32, (16, 96, 96), (1, 1)),
    'conv 2d 32->64 stride 2, 16x96x96': (32, 64, (16, 96, 96), (2, 2)),
    'conv 2d 64->64, 16x48x48': (64, 64, (16, 48, 48), (1, 1)),
}
NORMS = {'instance norm + LeakyReLU, 2x16x96x96x32': (2, 16, 96, 96, 32),
         'instance norm + LeakyReLU, 2x16x48x48x64': (2, 16, 48, 48, 64)}
# name: (width, heads, spatial reduction, images, grid)
BLOCKS = {'block of s1, 2x8x24x24x128': (128, 1, 8, 2, (8, 24, 24)),
          'block of s2, 2x4x12x12x256': (256, 2, 4, 2, (4, 12, 12)),
          'block of s3, 2x4x6x6x320': (320, 4, 2, 2, (4, 6, 6)),
          'block of s3, 16x6x6x320': (320, 4, 2, 16, (6, 6))}
HEAD, ADAM, LAST = 'head and loss, 2 views', 'AdamW and EMA, 63.3 M numbers', 'last transposed conv, skip, recon'
TENSORS = [(65536, 256), *[(1024, 1024)] * 44]      # about the model's 63.3 M


def ours() -> tuple:
  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from unimiss_jax import optim
  from unimiss_jax.losses import distillation
  from unimiss_jax.models import heads, layers
  normal = lambda i, shape: jax.random.normal(jax.random.key(i), shape)
  cases, gflop = {}, {}

  def add(name, f, *given):
    def both(*given):
      y, back = jax.vjp(f, *given)
      return y, back(y)
    compiled = jax.jit(both).lower(*given).compile()
    gflop[name] = compiled.cost_analysis()['flops'] / 1e9
    cases[name] = lambda: jax.block_until_ready(compiled(*given))

  def module(name, made, x, *more):
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), x, *more))['params']
    params = jax.tree.map(lambda s: .05 * normal(2, s.shape), shapes)
    add(name, lambda params, x: made.apply({'params': params}, x, *more), params, x)

  for name, (inputs, outputs, size, stride) in CONVOLUTIONS.items():
    module(name, layers.Conv(outputs, (3,) * len(stride), stride), normal(1, (*size, inputs)))
  for name, shape in NORMS.items():
    module(name, nn.Sequential([layers.InstanceNorm(), lambda x: nn.leaky_relu(x, .01)]), normal(1, shape))
  for name, (width, count, ratio, images, grid) in BLOCKS.items():
    module(name, layers.Block(count, 4, ratio, 0), normal(1, (images, 1 + math.prod(grid), width)), grid)

  head = heads.DINOHead()
  params = head.init(jax.random.key(0), jnp.zeros((1, 320)))['params']
  teacher, center = normal(3, (2, 1, 65536)), jnp.zeros((1, 65536))

  def loss(params, x):
    logits = head.apply({'params': params}, x)[:, None]
    return distillation.dino_loss(logits, teacher, center, student_temp=.1, teacher_temp=.04, center_momentum=.9)[0]
  add(HEAD, loss, params, normal(1, (2, 320)))

  def last(params, x, skip):
    up, out = params
    return layers.Conv(1, (1, 1, 1), use_bias=True).apply(
        {'params': out}, layers.TransposedConv(32, (1, 2, 2)).apply({'params': up}, x) + skip)
  up = {'kernel': .1 * normal(1, (1, 2, 2, 64, 32)), 'bias': jnp.zeros(32)}
  out = {'kernel': .1 * normal(1, (1, 1, 1, 32, 1)), 'bias': jnp.zeros(1)}
  add(LAST, last, (up, out), normal(1, (2, 16, 48, 48, 64)), normal(1, (2, 16, 96, 96, 32)))

  adam = optim.adamw(lambda name: 'rest')
  params = {str(i): normal(i, s) for i, s in enumerate(TENSORS)}
  grads = jax.tree.map(lambda p: p * .1, params)
  held = [(params, adam.init(params), jax.tree.map(jnp.copy, params))]

  def update(held, grads):
    params, state, teacher = held
    params, state = adam.update(grads, state, params, {'rest': optim.TRAIN}, 1e-4, .04)
    return params, state, jax.tree.map(lambda t, p: .996 * t + .004 * p, teacher, params)
  compiled = jax.jit(update, donate_argnums=0).lower(held[0], grads).compile()
  gflop[ADAM] = compiled.cost_analysis()['flops'] / 1e9
  cases[ADAM] = lambda: held.__setitem__(0, jax.block_until_ready(compiled(held[0], grads)))
  return {'cases': list(cases), 'gflop': gflop, 'version': jax.__version__,
          'platform': jax.devices()[0].platform}, cases


def theirs() -> tuple:
  import torch
  from torch import nn

  from unimiss_jax.porting import torch_mit
  torch.set_num_threads(1)
  torch.manual_seed(0)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.set_default_device(device)
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  cases = {}

  def add(name, f, params, *given):
    inputs = [p for p in params if p.requires_grad] + [x.requires_grad_() for x in given]

    def run():
      y = f(*given)
      torch.autograd.grad(y, inputs, y.detach())
      wait()
    cases[name] = run

  def first(size, channels):
    return torch.randn(size[0], channels, *size[1:])

  for name, (inputs, outputs, size, stride) in CONVOLUTIONS.items():
    made = torch_mit.CONV[len(stride)](inputs, outputs, 3, stride, 1, bias=False)
    add(name, made, made.parameters(), first(size, inputs))
  for name, (*size, channels) in NORMS.items():
    made = nn.Sequential(nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(.01))
    add(name, made, made.parameters(), first(size, channels))
  for name, (width, count, ratio, images, grid) in BLOCKS.items():
    made = torch_mit.Block(width, count, 4, ratio, (len(grid),))
    add(name, lambda x, made=made, grid=grid: made(x, grid), made.parameters(),
        torch.randn(images, 1 + math.prod(grid), width))

  head, teacher, center = torch_mit.DINOHead(), torch.randn(2, 65536), torch.zeros(1, 65536)

  def loss(x):
    q = ((teacher - center) / .04).softmax(-1)
    p = (head(x) / .1).log_softmax(-1)
    return -(q * p.flip(0)).sum(-1).mean()
  add(HEAD, loss, head.parameters(), torch.randn(2, 320))

  up, out = nn.ConvTranspose3d(64, 32, (1, 2, 2), (1, 2, 2)), nn.Conv3d(32, 1, 1)
  add(LAST, lambda x, skip: out(up(x) + skip), [*up.parameters(), *out.parameters()], torch.randn(2, 64, 16, 48, 48),
      torch.randn(2, 32, 16, 96, 96))

  params = [nn.Parameter(torch.randn(s)) for s in TENSORS]
  copies = [p.detach().clone() for p in params]
  for p in params:
    p.grad = .1 * p.detach()
  adam = torch.optim.AdamW(params, lr=1e-4, weight_decay=.04)

  @torch.no_grad()
  def update():
    adam.step()
    for t, p in zip(copies, params):
      t.mul_(.996).add_(.004 * p)
    wait()
  cases[ADAM] = update
  return {'cases': list(cases), 'version': torch.__version__}, cases


def side(name: str) -> tuple:
  return (ours if name == 'ours' else theirs)()


def compare(script: str, n: int) -> dict:
  contest.one_core()
  contenders = []
  try:
    for name in ('ours', 'torch'):
      contenders.append(contest.Contender(name, [script, '--ops'], 900.))
    facts = contenders[0].facts
    cpu = facts['platform'] == 'cpu'
    times = contest.rounds(contenders, dict.fromkeys(facts['cases'], 3), n, 'cpu' if cpu else 'wall')
  finally:
    for c in contenders:
      c.close()
  rows = {name: contest.against('ours', t) | {'gflop': contest.rounded(facts['gflop'][name])}
          for name, t in times.items()}
  return {'unit': 'CPU seconds, one core' if cpu else 'wall seconds', 'rounds': n,
          'versions': {c.name: c.facts['version'] for c in contenders}} | rows
