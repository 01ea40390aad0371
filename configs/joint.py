"""Joint: clustering of images, then of volumes as sequences of slices; one 2-D encoder.

  python main.py --config=configs/joint.py --workdir=runs/joint

presets
  phantom   intra, mask and inter one after the other, on embedded phantoms within minutes on a CPU
  joint     the same, all three terms in every step
  swav2d    the baseline: the intra phase alone, nothing of volumes is built
"""
from ml_collections import ConfigDict

from configs import common

PRESETS = ('phantom', 'joint', 'swav2d')


def get_config(arg: str | None = None) -> ConfigDict:
  preset, _ = common.parse_arg(arg, PRESETS)
  c = base()
  c.preset = preset
  if preset == 'joint':
    c.joint.update(dict(phases=('joint',), shares=(1.,)))
  if preset == 'swav2d':
    c.joint.update(dict(phases=('intra',), shares=(1.,)))
    c.phases.ct = 0
    c.eval.tasks = ()
  return c.lock()


def base() -> ConfigDict:
  """Sizes of the phantoms. Values not said to be the paper's are chosen by us."""
  c = common.base()
  c.method = 'joint'
  c.steps = 600
  c.batch.update(dict(ct=8, xray=16))
  c.joint = ConfigDict(dict(
      phases=('intra', 'mask', 'inter'), shares=(0.5, 0.2, 0.3),    # in this order; shares of the steps
      width=64,                   # of slice embeddings and Transformer; 640 in the released code
      inter=dict(layers=2, hidden=72, kind='dat', axis='slice', sampler='interp', heads=4, head_dim=16, groups=4,
                 downsample=4, dropout=0.1, final_dropout=True, slices=16),    # see models/deformable.py
      mask_ratio=0.1,             # of the slices; the rest as in the released code
      prototypes=4,               # of volumes; those of images are head.out_dim
      temp=0.1, eps=0.05, rounds=3,
      freeze_prototypes=20,       # steps at the start of a phase
  ))
  c.loss = ConfigDict(dict(drr=0., recon_drr=0., pair_nce=0.))      # no DRR are rendered
  c.head.update(dict(out_dim=16, hidden_dim=256, bottleneck_dim=64, batch_standardize=True))    # else it collapses
  c.model.update(dict(embed_dims=(4, 8, 32, 64, 80, 80), depths=(1, 1, 1, 1), decoder_dims=(80, 64, 32, 8, 4),
                      image_size=64, volume_size=(16, 64, 64), conv_residual=True, last_stride=1, final_norm=True,
                      init='fan_in'))
  c.views.ct.update(dict(size=(16, 64, 64), extent='record', precrop=(0., 0.), scale=(0.7, 1.0), resize='area',
                         aug_unit='volume'))
  c.views.xray.update(dict(size=64, scale=(0.5, 1.0), resize='area'))
  c.optim.update(dict(name='larc', lr=0.5, lr_reference_batch=0, min_lr=0., warmup_epochs=1., weight_decay=1e-6,
                      weight_decay_end=1e-6))
  c.eval.tasks = ('knn',)
  c.checkpoint.every = 200
  c.log.every = 20
  return c
