"""Joint: clustering of images, then of volumes as sequences of slices; one 2-D encoder.

  python main.py --config=configs/joint.py --workdir=runs/joint
  python main.py --config=configs/joint.py:plain,objective=swav,schedule=baseline_2d --workdir=runs/swav

presets
  phantom         intra, mask and inter one after the other, on embedded phantoms within minutes on a CPU; swav
  joint           the same, all three terms in every step
  swav2d          the baseline at that size: the intra phase alone, nothing of volumes is built
  deepcluster2d   the same, of the other objective
  plain           sizes and rates of the released code, ResNet-50, its defects mended; made for accelerators. Volumes
                  are not resized: the middle 128 x 128 of 64 slices; shards are made by prepare --tile=64
  reference       with its attention along features, its mask loss, no queue, and volumes not standardised; the middle
                  64 slices of a whole scan (prepare --tile=0)
objective   swav | deepcluster; '' = that of the preset
model       resnet50: a small one in place of MiT+ in the presets for phantoms; '' = that of the preset
schedule    released = intra, mask, inter | no_mask | joint | baseline_2d = intra alone; '' = that of the preset
"""
from ml_collections import ConfigDict

from configs import common

PRESETS = ('phantom', 'joint', 'swav2d', 'deepcluster2d', 'plain', 'reference')
SCHEDULES = {'released': ('intra', 'mask', 'inter'), 'no_mask': ('intra', 'inter'), 'joint': ('joint',),
             'baseline_2d': ('intra',)}
OF_PRESET = {'joint': ('swav', 'joint'), 'swav2d': ('swav', 'baseline_2d'),
             'deepcluster2d': ('deepcluster', 'baseline_2d'), 'plain': ('deepcluster', 'released'),
             'reference': ('deepcluster', 'released')}
EPOCHS = {'intra': 105, 'mask': 100, 'inter': 100, 'joint': 305}      # of the released code


def get_config(arg: str | None = None) -> ConfigDict:
  preset, given = common.parse_arg(arg, PRESETS, objective='', schedule='', model='')
  objective, schedule = OF_PRESET.get(preset, ('swav', 'released'))
  objective, schedule = given['objective'] or objective, given['schedule'] or schedule
  if schedule not in SCHEDULES:
    raise ValueError(f'schedule={schedule} unknown: use one of {", ".join(SCHEDULES)}')
  c = base()
  c.preset = preset
  shares = {'intra': 0.5, 'mask': 0.2, 'inter': 0.3, 'joint': 1.}
  if preset in ('plain', 'reference'):
    paper(c, objective, schedule)
    shares = EPOCHS
  else:
    phantom(c)
  if preset == 'reference':
    c.joint.inter.update(dict(axis='feature', sampler='collapse'))
    c.data.tile = 0
    c.joint.update(dict(mask_loss='released', standardize_volumes=False, image_queue=0, volume_queue=0))
  if given['model'] not in ('', 'resnet50'):
    raise ValueError(f'model={given["model"]} unknown: use resnet50')
  if given['model'] and c.model.name != given['model']:
    c.model = common.resnet(small=True)
    c.model.image_size = c.views.xray.size
  phases = SCHEDULES[schedule]
  total = sum(shares[p] for p in phases)
  c.joint.update(dict(objective=objective, phases=phases, shares=tuple(shares[p] / total for p in phases)))
  if preset not in ('plain', 'reference') and 'intra' in phases and 'inter' in phases:
    c.joint.rates = tuple(0.1 if p == 'inter' else 1. for p in phases)      # else it takes away what intra learned
    c.joint.update(dict(volume_queue=32, prototypes=16))      # tried together with those rates
    c.joint.inter.dropout = 0.      # else the loss of inter may rest at that of equal codes: docs/experiments.md
  if schedule == 'baseline_2d':
    c.phases.ct = 0
  return c.lock()


def paper(c: ConfigDict, objective: str, schedule: str) -> None:
  """Sizes and rates of the released code. Its phases are so many epochs of their own data; here they are shares of the
  steps, and an epoch is one of the CT."""
  phases, swav = SCHEDULES[schedule], objective == 'swav'
  c.steps, c.epochs = 0, sum(EPOCHS[p] for p in phases)
  c.data.phantom_records = 3072                 # k-means wants no fewer samples than clusters
  c.batch.update(dict(ct=12 if swav else 8, xray=128))
  c.model = common.resnet()
  c.model.remat = 'blocks'
  c.head.update(dict(out_dim=3000, hidden_dim=2048, bottleneck_dim=128))
  c.data.tile = 64                # records; those of the released code are whole volumes, cut or filled up to this
  c.views.ct.update(dict(size=(64, 128, 128), extent='centre'))
  c.views.xray.update(dict(size=224, scale=(0.14, 1.0) if swav else (0.08, 1.0), resize='bicubic'))
  c.joint.update(dict(width=640, prototypes=3000, image_clusters=(3000,) * 3, volume_clusters=(4,) * 3,
                      freeze_prototypes=313, image_queue=3840, volume_queue=3000,
                      local=dict(crops=6 if swav else 0, size=96, scale=(0.05, 0.14)),
                      rates=tuple(1. if p in ('intra', 'joint') else 0.01 / 0.15 for p in phases)))
  c.joint.inter.update(dict(layers=4, hidden=720, heads=8, head_dim=64, groups=8, slices=64))
  c.optim.update(dict(lr=0.15, warmup_epochs=0.1 * c.epochs))
  c.checkpoint.every, c.log.every = 1000, 50


def phantom(c: ConfigDict) -> None:
  """Intra learns within hundreds of steps: docs/experiments.md, with what was tried before."""
  c.batch.xray = 64
  common.phantom_views(c.views)
  c.views.ct.size = (16, 64, 64)      # slices enter the 2-D branch, which wants 64 pixels
  c.optim.update(dict(name='adamw', lr=2e-3, weight_decay=0.04, weight_decay_end=0.04))


def base() -> ConfigDict:
  """Sizes of the phantoms. Values not said to be the paper's are chosen by us."""
  c = common.base()
  c.method = 'joint'
  c.steps = 600
  c.batch.update(dict(ct=8, xray=16))
  c.joint = ConfigDict(dict(
      objective='swav',           # swav | deepcluster
      phases=('intra', 'mask', 'inter'), shares=(0.5, 0.2, 0.3),    # in this order; shares of the steps
      rates=(),                   # of each phase: factor of optim.lr; () = 1
      width=64,                   # of slice embeddings and Transformer; 640 in the released code
      inter=dict(layers=2, hidden=72, kind='dat', axis='slice', sampler='interp', heads=4, head_dim=16, groups=4,
                 downsample=4, dropout=0.1, final_dropout=True, slices=16),    # see models/deformable.py
      slice_parts=1,              # parts in which the slices of a batch pass the encoder, one after the other: less
                                  # memory, once more work; a ResNet in training then has the statistics of each part
      mask_ratio=0.1,             # of the slices; the rest as in the released code
      mask_loss='masked_only',    # masked_only | released: over all slices
      prototypes=4,               # swav: of volumes; those of images are head.out_dim
      image_clusters=(16, 16, 16), volume_clusters=(4, 4, 4),       # deepcluster: one head each
      kmeans_rounds=10,
      temp=0.1, eps=0.05, rounds=3,
      image_queue=0, volume_queue=0,    # swav: former rows that share the codes with those of a batch; 0 = none
      local=dict(crops=0, size=64, scale=(0.1, 0.3)),    # small crops of an image beside its two views
      standardize_volumes=True,   # features of volumes over the batch, before they are clustered; else it collapses
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
  c.optim.update(dict(name='larc', lr=0.5, lr_reference_batch=0, min_lr=0., weight_decay=1e-6, weight_decay_end=1e-6,
                      warmup_epochs=1.))    # of every phase, as its share of the run
  c.eval.tasks = ('knn',)
  c.checkpoint.every = 200
  c.log.every = 20
  return c
