"""UniMedI: X-rays and CT of different patients meet through their reports (He et al., ECCV 2024).

  python main.py --config=configs/unimedi.py --workdir=runs/studies
  python main.py --config=configs/unimedi.py:plain --workdir=runs/x --config.data.manifest=/data/studies \
      --config.unimedi.text.init_from=/weights/bert

presets
  phantom   tiny studies of `data_pipelines/phantom/studies.py`, image-text loss alone, some minutes on a CPU
  plain     ViT-B/16, BERT-base, self-distillation with hidden tokens

No code of the paper was released, and its hyper-parameters are not available to us: those of `plain` are of MGCA (Wang
et al. 2022), whose 2D protocol the paper follows, or chosen by us.
"""
from ml_collections import ConfigDict

from configs import common

PRESETS = ('phantom', 'plain')


def get_config(arg: str | None = None) -> ConfigDict:
  preset, _ = common.parse_arg(arg, PRESETS)
  config = plain()
  config.preset = preset
  if preset == 'phantom':
    phantom(config)
  return config.lock()


def plain() -> ConfigDict:
  c = common.base()
  c.method = 'unimedi'
  c.epochs = 50
  c.phases.unit = 'joint'         # every step holds batch.xray and batch.ct studies; one stream alone: unit=step
  c.batch.ct, c.batch.xray = 48, 96
  c.model = common.vit('vit_b16')
  c.head.update(dict(out_dim=8192, hidden_dim=2048, bottleneck_dim=256))
  c.loss = ConfigDict(dict(student_temp=0.1, teacher_temp=0.04, center_momentum=0.9))
  c.unimedi = ConfigDict(dict(
      embed_dim=128,              # of the space that pictures, volumes and reports share
      vl=1., icl=1., pcl=1.,      # weights: image-text, self-distillation of class token and of hidden tokens; 0 = off
      vl_kind='info_nce',         # info_nce | siglip
      vl_scope='joint',           # joint: one loss over all pairs | per_modality: one of X-rays, one of CT
      multi_positive=False,       # info_nce: reports that say the same are positives of each other
      shuffle_reports=False,      # control: every study gets another one's report; nothing may be learned
      temp=0.07,                  # info_nce: where the learned temperature starts
      patch_teacher_temp=0.07, pcl_domain='hidden',      # hidden | all: tokens that pcl looks at
      hidden=0.5,                 # share of tokens that the student does not see, if icl or pcl is on
      hidden_mode='replace',      # replace: by a learned token | drop: left out, pcl then looks at those that stay
      guided=False,               # hide the tokens that the teacher looks at least, instead of random ones
      slices=2,                   # of a volume, that are seen as pictures as well
      select='teacher',           # teacher: where its class token looks | random | spread: at equal distances
      score_layers='mean', score_keys='full',      # mean | last; full | patch: see models/slices.py
      warmup_steps=0,             # first steps with select=spread
      slice_of_plane='middle',    # middle | random: which slice of a chosen plane
      vision_init='',             # an image ViT of PyTorch, names of timm or DeiT; init_from: weights of ours
      text=dict(
          init_from='',           # folder of a BERT (config.json, vocab.txt, weights): sizes below are its own
          vocab='',               # vocab.txt; '' = that of init_from, or the phantoms' words
          vocab_size=0,           # rows of the table of words; 0 = lines of vocab
          lowercase=True,         # not said by a vocabulary: set it as the weights were trained
          length=112,             # word pieces
          num_layers=12,          # of a file the first so many
          freeze_layers=0,        # the first so many are not trained, nor the tables; -1 = nothing is
          width=768, heads=12, mlp=3072, positions=512,
      ),
  ))
  c.optim.update(dict(lr=2e-5, lr_reference_batch=0, min_lr=1e-8, warmup_epochs=20., weight_decay=.05,
                      weight_decay_end=.05, decay_exclude='tokens', freeze_last_layer=0.))
  c.views.ct.update(dict(
      size=(32, 128, 128), extent='record', precrop=(0., 0.), scale=(0.8, 1.0), resize='area', flip_p=0.,
      noise_std=(0., 0.), blur_p=(0., 0.), mul_p=(0., 0.), add_p=(0., 0.), contrast_p=(0., 0.), gamma_p=(0., 0.)))
  c.views.xray.update(dict(size=224, scale=(0.76, 1.0), ratio=(1., 1.), flip_p=0., jitter_p=0., blur_p=(0., 0.)))
  c.eval.tasks = ()
  return c


def phantom(c: ConfigDict) -> None:
  """Vision-language loss alone; studies of one class (lesion shape, quadrant, size) say the same."""
  c.steps, c.epochs = 300, 0
  c.batch.ct = c.batch.xray = 32
  c.data.phantom_records = 9600   # each is seen once
  c.model.update(dict(embed_dims=(48,), depths=(3,), num_heads=(4,), patch=8, patch_depth=1, image_size=16,
                      volume_size=(8, 16, 16), init='fan_in'))
  c.head.update(dict(out_dim=256, hidden_dim=96, bottleneck_dim=32))
  c.ema.update(dict(momentum=.99, momentum_end=.99))
  c.views.ct.update(dict(size=(8, 16, 16), scale=(1., 1.)))
  c.views.xray.update(dict(size=16, scale=(1., 1.), resize='area'))
  c.views.drr.size = 16
  c.unimedi.update(dict(embed_dim=32, icl=0., pcl=0., multi_positive=True))
  c.unimedi.text.update(dict(vocab_size=29, length=16, num_layers=2, width=48, heads=4, mlp=192, positions=16))
  c.optim.update(dict(lr=1e-3, min_lr=0., warmup_epochs=.1, clip=1.))      # an epoch = 300 steps
  c.eval.update(dict(tasks=('studies',), every=100, records=128, fit=64))
  c.checkpoint.every, c.log.every = 100, 20
