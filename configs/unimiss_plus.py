"""UniMiSS+: CT volumes, their slices and DRR, and real X-rays; one set of weights.

  python main.py --config=configs/unimiss_plus.py --workdir=runs/phantom
  python main.py --config=configs/unimiss_plus.py:plain --workdir=runs/x \
      --config.data.ct=/data/ct --config.data.xray=/data/cxr

presets
  phantom   the demo: learns visibly on embedded phantoms within minutes on a CPU. Our recipe
            (contrastive terms, standardised projections, residual trunk), not the papers'.
  phantom_long  the same for 4,000 steps on twice as many phantoms, some twenty minutes: the encoder that the phantom
            tasks of configs/finetune.py start from, see docs/experiments.md.
  base      plain with the first four terms that the grid `base` of configs/ablations.py kept, on phantoms alone
            (docs/experiments.md): at this size it was never trained
  pod       plain with 1,024 CT and 4,096 X-rays a step, for hundreds of accelerators: as many samples as plain, which
            are fewer steps; learning rate by the square root of the batch, momentum of the teacher by its power;
            `:pod,recipe=base` does that to base
  plain     the losses, schedule and augmentation of the released UniMiSS+ code with its defects
            mended; 63.3 M parameters, made for accelerators.
  reference what the released code computes, defects included, to compare against it.

`:plain,model=vit_b16` (or vit_tiny) takes a ViT as backbone, without reconstruction.
"""
from ml_collections import ConfigDict

from configs import common

PRESETS = ('phantom', 'plain', 'reference', 'phantom_long', 'base', 'pod')


def get_config(arg: str | None = None) -> ConfigDict:
  preset, given = common.parse_arg(arg, PRESETS, model='mit_plus', recipe='plain')
  if given['recipe'] not in ('plain', 'base') or given['recipe'] == 'base' and preset != 'pod':
    raise ValueError(f'recipe={given["recipe"]}: of preset pod alone, plain or base')
  config = plain()
  config.preset = preset
  if given['recipe'] == 'base':
    base(config)
  if preset != 'plain':
    {'phantom': phantom, 'reference': reference, 'phantom_long': phantom_long, 'base': base, 'pod': pod}[preset](config)
  if given['model'] != 'mit_plus':
    vit(config, given['model'])
  return config.lock()


def plain() -> ConfigDict:
  c = common.base()
  c.method = 'unimiss_plus'
  c.epochs = 402                  # pairs of one CT and one X-ray epoch
  c.eval.select = 'eval/knn_auc_ct'
  c.loss = ConfigDict(dict(
      ct=1.0, drr=0.5, slice=0.1, xray=1.0,             # self-distillation; 0 = the term is not built
      slice_slice=0.0, ct_slice=0.0,                    # of the pilot UniMiSS, student_teacher: its teacher sees slices
      recon_ct=5.0, recon_drr=5.0, recon_xray=5.0,      # MSE(sigmoid(reconstruction), the input)
      nce=0.0, pair_nce=0.0, nce_temp=0.2,              # InfoNCE: two views of one instance; a CT and its DRR
      student_temp=0.1, teacher_temp=0.04,
      warmup_teacher_temp=0.04, teacher_temp_warmup=0.,  # epochs
      center_momentum=0.9,
      center_updates='once',      # once: after the step | sequential: after every loss of it
      slices=2,                   # every 2nd slice of a CT crop goes through the 2D branch
      slice_pool='logits',        # what is averaged over them: logits (released) | probability | feature (embeddings)
      slice_intensity='raw',      # raw (HU/1024, as the crop) | minmax
      recon_minmax_eps=1e-6,      # smallest range that a crop's min-max divides by
      shuffle_pairs=False,        # control: positives are other instances; nothing may be learned
  ))
  c.extra_loss = ConfigDict(dict(     # none of them in the released code
      koleo=0.,                   # spreads the embeddings of a batch; 0.1 in DINOv2
      coding_rate=0.,             # > 0: distillation compares embeddings, as SimDINO with this weight; no prototypes
      sinkhorn=0,                 # > 0: rounds that give all prototypes an even share of each teacher's rows, in place
                                  # of the moving centre; 3 in DINOv2
      mask_ratio=(0., 0.),        # share of the blocks that are hidden from the student, U(lowest, highest) a view;
      mask_block=(4, 32, 32),     # slices, pixels; reconstruction is judged by hidden blocks alone then
      patch=0.,                   # distils the tokens of hidden blocks, as iBOT; 1 there
      local=dict(crops=0, size=64, scale=(0.05, 0.3)),      # small crops of an X-ray beside its two views, as DINO; 4
  ))
  return c


def phantom(c: ConfigDict) -> None:
  """The demo recipe. Steps alternate between 8 CT (with their DRR) and 16 X-rays."""
  c.steps, c.epochs = 760, 0
  c.phases.unit = 'step'
  c.batch.ct, c.batch.xray = 8, 16
  common.phantom_views(c.views)
  c.drr.view, c.drr.scope = 'pa', 'volume'
  c.model.update(dict(
      embed_dims=(4, 8, 32, 64, 80, 80), depths=(1, 1, 1, 1), decoder_dims=(80, 64, 32, 8, 4),
      image_size=64, volume_size=(16, 48, 48),
      conv_residual=True, last_stride=1, final_norm=True, init='fan_in'))
  c.head.update(dict(out_dim=2048, hidden_dim=256, bottleneck_dim=64, batch_standardize=True))
  c.loss.update(dict(ct=0., drr=0., slice=0., xray=0., recon_ct=0., recon_drr=0., recon_xray=0.,
                     nce=1.0, pair_nce=1.0))
  c.optim.update(dict(lr=2e-3, lr_reference_batch=0, warmup_epochs=0.8, min_lr=1e-6, clip=1.0, freeze_last_layer=0.))
  c.checkpoint.every = 190
  c.eval.every = 380
  c.log.every, c.log.health_every = 20, 190


def phantom_long(c: ConfigDict) -> None:
  phantom(c)
  c.steps, c.eval.every, c.checkpoint.every = 4000, 1000, 250
  c.data.phantom_records = 1536


def base(c: ConfigDict) -> None:
  c.drr.view, c.drr.scope = 'pa', 'volume'
  c.model.update(dict(conv_residual=True, final_norm=True, init='fan_in'))
  c.head.batch_standardize = True
  c.loss.update(dict(ct=0., drr=0., slice=0., xray=0., recon_ct=0., recon_drr=0., recon_xray=0.,
                     nce=1.0, pair_nce=1.0))


def pod(c: ConfigDict) -> None:
  """Square root: Malladi et al. 2022, of Adam; momentum: Busbridge et al. 2023. 96 is the batch of plain."""
  c.optim.update(dict(lr=c.optim.lr * c.batch.ct / c.optim.lr_reference_batch, lr_reference_batch=c.batch.ct,
                      lr_scaling='sqrt', warmup_epochs=c.optim.warmup_epochs / 1.6,
                      freeze_last_layer=c.optim.freeze_last_layer / 1.6))      # 1.6 times the samples an epoch
  c.ema.reference_batch = c.batch.ct
  c.batch.update(dict(ct=1024, xray=4096))
  c.phases.ct = 4                 # passes over the CT for each one of X-rays, whose steps see four times as many
  c.epochs = 251                  # 201 of CT; those of X-rays see what 200 of plain do


def reference(c: ConfigDict) -> None:
  """The released code where `plain` departs from it. Not reproduced: its crash after the last epoch, phases that swap
  when a run is resumed, random numbers that its loader's workers share."""
  c.epochs = 401                  # 201 of CT, 200 of X-rays
  c.data.reshuffle = False
  c.views.ct.update(dict(pad_hu=0, pad_to=(256, 256), gamma_stats='bg0197'))
  c.drr.update(dict(kind='bspline', mu='minmax', image='reference', quantize=True))
  c.model.pos_interp = 'reference'
  c.loss.update(dict(center_updates='sequential', recon_minmax_eps=0.))
  c.optim.update(dict(freeze_3d='zero_grad', max_skipped=1))    # a constant crop is not a number: the run ends


def vit(c: ConfigDict, name: str) -> None:
  """Another backbone under the same method: a ViT has no decoder, so nothing is reconstructed."""
  if name not in common.VITS:
    raise ValueError(f'model={name} unknown: use mit_plus, {" or ".join(common.VITS)}')
  model = common.vit(name)
  model.update(dict(image_size=c.views.xray.size, volume_size=c.views.ct.size, init=c.model.init,
                    patch_depth=min(4, c.views.ct.size[0])))
  c.model = model
  c.loss.update(dict.fromkeys(('recon_ct', 'recon_drr', 'recon_xray'), 0.))
