"""Every leaf that all methods share, with its default: the vocabulary of a run.

A config file is pure data: it starts from `base()` and overrides. Values are the released
UniMiSS+ recipe where one exists; whatever else is "chosen by us".
"""
import difflib

from ml_collections import ConfigDict


def base() -> ConfigDict:
  """All shared leaves. Tuples keep their length; 0 or '' means "off" where a leaf says so."""
  c = ConfigDict()
  c.method = ''                   # module of unimiss_jax.methods, set by the method's config file
  c.preset = ''                   # recorded for the reader of config.json
  c.seed = 0
  c.steps = 0                     # exactly one of steps and epochs is non-zero
  c.epochs = 0                    # an epoch = records of the CT stream // batch.ct
  c.phases = ConfigDict(dict(
      unit='epoch',               # epoch | step: alternate; joint: both streams in every step
      ct=1, xray=1,               # units of each before the other one's turn; 0 = never
  ))
  c.batch = ConfigDict(dict(ct=96, xray=96))      # global: over all devices and hosts
  c.data = ConfigDict(dict(
      ct='',                      # folder or glob(s), comma separated; '' = phantoms
      xray='',                    # likewise
      manifest='',                # instead of both: manifest.jsonl (or its folder), raw or prepared; its split train
      label_fraction=1.,          # fine-tuning: share of the training patients; smaller shares lie in larger ones
      modality='ct',              # ct: values must be HU | mr, other: z-scores of each scan; then there are no DRR
      sequences='',               # mr, other: ends of the names of files of one scan, its channels: '_t1,_flair'; see
                                  # data_pipelines/sequences.py; '' = every file is a scan. Prepared sets know theirs
      tile=24,                    # slices of a record cut from a scan; 0 = whole scans. Prepared sets keep their own
      phantom_records=768,        # phantoms per stream, where data.ct or data.xray is '' and no manifest is named
      views_per_read=1,           # pairs of views drawn from one read of a record, one after the other
      place='host',               # host | device: where crop, augmentation and DRR are computed. device: records and
                                  # drawn numbers are shipped, views are made in the step (pre-training only)
      device_shape=dict(ct=(0, 0, 0), whole=(0, 0, 0), xray=(0, 0)),    # place=device: one shape for all tiles, one for
                                  # all scans (drr.scope=volume), one for all X-rays; 0 = what the largest one needs
      workers=0,                  # data processes beside the trainer; 0 = threads only
      on_bad_file='skip',         # skip: one line and go on; stop: one line and exit 1
      reshuffle=True,             # X-rays: shuffled anew in every pass; False: all epochs' passes are shuffled as one
  ))
  c.views = ConfigDict(dict(
      ct=dict(
          size=(16, 96, 96),
          extent='output',        # crop factor times: output = size (depth: whole slices) | record = its own shape;
                                  # centre = the central `size` voxels, filled up
          precrop=(1.4, 1.8),     # extent=output: both views come from one block of size * U; (0, 0) = off
          scale=(0.8, 1.2),       # crop factor per axis (extent=output: in-plane only)
          resize='linear',        # linear (half-pixel, no antialias) | area (exact box mean)
          pad_hu=-1024,           # fill of CT that are too small; 0 (= water) in the released code
          pad_to=(0, 0),          # extent=output: in-plane size that smaller volumes are padded to before the crop
          flip_p=0.8,             # per axis D, H, W
          aug_unit='slice',       # slice | volume: what shares one intensity draw
          gamma_stats='fixed',    # fixed | bg0197: order in which gamma restores mean and std
          noise_std=(0., 0.1),    # in units of HU/1024 or of z-scores, as all of this group
          blur_sigma=(0.1, 2.0),  # pixels, in-plane
          blur_p=(0.8, 0.8),      # a pair is always (view 0, view 1)
          blur_unit_p=(0.8, 0.5),  # given that the sample is blurred: per slice
          mul=(0.75, 1.25),
          mul_p=(0.8, 1.0),
          add_std=0.4,
          add_p=(0.8, 0.5),
          add_unit_p=(0.8, 0.8),
          contrast=(0.75, 1.25),  # with probability 1/2 from [lo, 1], else from [1, hi]
          contrast_p=(1.0, 1.0),
          gamma=(0.7, 1.5),       # likewise
          gamma_p=(0.8, 1.0),
      ),
      xray=image_views(scale=(0.14, 1.0)) | dict(updown_p=0.),      # beside flip_p, which is left-right
      drr=image_views(scale=(0.3, 1.0)),
  ))
  c.drr = ConfigDict(dict(
      view='axial',               # axial | ap | pa | lateral
      scope='subvolume',          # subvolume = the record | volume = the whole scan
      kind='box',                 # box | linear | bspline
      mu='water',                 # water | bone_soft | minmax
      image='line',               # line | transmission | minmax | reference: cut from the released renderer's file
      p_ref=0.,                   # line integral shown as white; 0 = a length of water that fits the view
      sdd_mm=2000., sod_mm=1800.,
      source_jitter_mm=0.,        # uniform, per axis, parallel to the detector
      tilt_deg=0.,                # uniform, +- yaw, pitch and roll of source and detector about the window's centre
      paired_window=False,        # the DRR shows the window of its CT crop, with its flips
      quantize=False,             # 8-bit, as the released PNG files
  ))
  c.model = ConfigDict(dict(
      name='mit_plus',
      embed_dims=(32, 64, 128, 256, 320, 320), depths=(1, 2, 4, 2), num_heads=(1, 2, 4, 8),
      mlp_ratio=4, sr_ratios=(8, 4, 2, 1),
      decoder_dims=(320, 256, 128, 64, 32), decoder_depths=(1, 1, 1), decoder_heads=(4, 2, 1),
      decoder_sr_ratios=(2, 4, 8),
      in_channels=(3, 1),         # of images; of volumes: their sequences
      image_size=96, volume_size=(16, 96, 96),    # what the position embeddings are made for
      pos_interp='grid',          # grid | reference: how the tables are laid over other sizes
      cls_token=True,
      encoder_drop_path=0., decoder_drop_path=0.1,
      conv_residual=False, last_stride=2, final_norm=False, init='released',
      dtype='float32',            # of the activations; parameters, norms and losses stay float32
      remat='',                   # '' | convs | blocks | all: computed again in the backward pass, for large crops
      fold=True,                  # reconstruct without the decoder's finest map: less work, equal but for rounding
  ))
  c.speed = ConfigDict(dict(      # less work, equal but for rounding; False = the plain form
      shared_2d=True,             # DRR and slices of a CT go through the 2-D branch together
      shared_head=True,           # slices are averaged before the last layer, all students pass it together
  ))
  c.head = ConfigDict(dict(out_dim=65536, hidden_dim=2048, bottleneck_dim=256,
                           batch_standardize=False))   # projections for InfoNCE: zero mean, unit std over the batch
  c.ema = ConfigDict(dict(momentum=0.996, momentum_end=1.0,
                          reference_batch=0))  # momentum ** (batch.ct / reference_batch); 0 = momentum as it is
  c.optim = ConfigDict(dict(
      name='adamw',                      # adamw | larc: SGD with momentum 0.9, steps of 0.001 times a tensor's norm
      lr=8e-4, lr_reference_batch=256,   # effective lr = lr * batch.ct / lr_reference_batch; 0 = lr as it is
      lr_scaling='linear',               # sqrt: lr * sqrt(batch.ct / lr_reference_batch), for AdamW at large batches
      schedule='cosine',                 # cosine | poly (power 0.9, no warm-up) | constant
      schedule_unit='step',              # of poly: step | epoch; dataset: the released counting of the pilot UniMiSS
      min_lr=1e-6, warmup_epochs=10.,    # of an epoch as defined above; may be a fraction
      layer_decay=1.,                    # fine-tuning: rate of a step of the encoder over that of the next one
      eps=1e-8,                          # of AdamW and LARC
      weight_decay=0.04, weight_decay_end=0.4,
      decay_exclude='1d',                # 1d: biases and norms do not decay | tokens: nor positions, class tokens | ''
      clip=0., clip_mode='global',       # global | per_tensor; 0 = off
      freeze_last_layer=2.,              # epochs
      freeze_3d='mask',                  # in X-ray phases: mask = skipped | zero_grad: AdamW drifts on | none
      accum=1,                           # micro-batches per step
      max_skipped=10,                    # non-finite steps in a row before the run stops
  ))
  c.mesh = ConfigDict(dict(data=-1, fsdp=1))           # -1 fills with what is left
  c.checkpoint = ConfigDict(dict(every=1000, keep=3))  # steps
  c.init_from = ''                # weights that a new run starts from: a run, an exported folder, .safetensors, .pth
  c.init_branch = ''              # student | teacher, where that has both; '' = student
  c.init_allow = ''               # comma separated: what that file may lack: decoder, head, 3D, 2D, or pieces of names
  c.init_parts = ('encoder', 'decoder', 'head')   # what of it is taken
  c.pos_resize = 'grid'           # grid | flat_zoom (released): how its position tables are brought to other sizes
  c.eval = ConfigDict(dict(
      every=0,                    # steps; 0 = at the start and the end only
      tasks=('knn', 'retrieval'),
      records=500, fit=300,       # phantoms in all; those that kNN may learn from, the rest is the test
      select='',                  # score by which best/ is kept, 'eval/knn_auc_ct'; '' = none
      patience=0,                 # evaluations without a better eval.select before the run ends; 0 = off
      save=False,                 # fine-tuning: write the predicted label maps of the test cases
      knn='',                     # a labelled manifest.jsonl; '' = phantom findings
  ))
  c.log = ConfigDict(dict(every=50, images_every=0, tensorboard=True, watchdog_min=30.,
                          wandb='',              # project of Weights & Biases; WANDB_MODE=offline: on disk alone
                          health_every=500))     # steps from one verdict on the run's health to the next; 0 = off
  return c


VITS = {'vit_b16': dict(embed_dims=(768,), num_heads=(12,)), 'vit_tiny': dict(embed_dims=(192,), num_heads=(3,))}


def vit(name: str) -> ConfigDict:
  """`model` of a ViT: of images, of volumes, of both; it has no decoder."""
  return ConfigDict(dict(
      name=name, **VITS[name], depths=(12,),      # one stage: (width,), (heads,), (blocks,)
      mlp_ratio=4, patch=16, patch_depth=4,       # a token: 16 x 16 pixels, of volumes 4 slices of them
      in_channels=(3, 1), image_size=224, volume_size=(32, 128, 128), encoder_drop_path=0., init='released',
      dtype='float32', remat=''))                 # as above; remat: '' | blocks | all


def resnet(small: bool = False) -> ConfigDict:
  """`model` of a ResNet-50, or a small one for phantoms: of images; volumes go through it slice by slice."""
  return ConfigDict(dict(
      name='resnet50',
      depths=(1, 1, 1, 1) if small else (3, 4, 6, 3),      # blocks of the stages
      width=16 if small else 64,                           # channels of the stem
      in_channels=(3, 1), image_size=224, dtype='float32',
      remat=''))                                           # '' | blocks


def image_views(scale) -> dict:
  """Augmentation of a 2D view; `scale` = crop area as a share of the image."""
  return dict(
      size=96, scale=scale, ratio=(3 / 4, 4 / 3), flip_p=0.5,
      resize='bicubic',           # bicubic (antialiased, as PIL) | area; unused by DRR: there the crop is geometry
      jitter_p=0.8, brightness=0.4, contrast=0.4,   # factors 1 +- x, in random order
      gamma=(1.0, 1.0), gamma_p=(0.0, 0.0),
      noise_std=(0., 0.),
      blur_sigma=(0.1, 2.0), blur_p=(0.5, 1.0),     # (view 0, view 1)
  )


def phantom_views(views: ConfigDict) -> None:
  """Of phantoms: small, mild changes, no flips."""
  views.ct.update(dict(
      size=(16, 48, 48), extent='record', precrop=(0., 0.), scale=(0.7, 1.0), resize='area', flip_p=0.,
      aug_unit='volume', noise_std=(0., 0.05), blur_sigma=(0.3, 1.0), blur_p=(0.5, 0.5), blur_unit_p=(1., 1.),
      mul=(0.85, 1.15), mul_p=(1., 1.), add_std=0.05, add_p=(1., 1.), add_unit_p=(1., 1.),
      contrast=(1., 1.), contrast_p=(0., 0.), gamma=(0.8, 1.25), gamma_p=(0.5, 0.5)))
  for images in (views.xray, views.drr):
    images.update(dict(
        size=64, scale=(0.5, 1.0), ratio=(0.78, 1.28), flip_p=0., resize='area',
        jitter_p=1.0, brightness=0.2, contrast=0.2, gamma=(0.7, 1.4), gamma_p=(1., 1.),
        noise_std=(0., 0.03), blur_sigma=(0.3, 1.0), blur_p=(0.3, 0.3)))


def parse_arg(arg: str | None, presets, **allowed) -> tuple[str, dict]:
  """'plain,drr=off' -> ('plain', {'drr': 'off'}); the preset may be left out (then the first one).

  Args:
    arg: text behind the ':' of --config=FILE:ARG.
    presets: names in order; the first is the default.
    **allowed: key -> default (str, int or float); the value takes its type.

  Raises:
    ValueError: unknown preset or key, with the nearest known one.
  """
  preset, values = presets[0], dict(allowed)
  for i, part in enumerate(p.strip() for p in (arg or '').split(',') if p.strip()):
    key, sep, value = part.partition('=')
    known = presets if not sep else list(allowed)
    if key not in known or (not sep and i):
      near = difflib.get_close_matches(key, known, 1)
      hint = f'; did you mean "{near[0]}"?' if near else ''
      raise ValueError(f'config argument "{part}" unknown{hint} (known: {", ".join(known) or "none"})')
    if sep:
      values[key] = type(allowed[key])(value)
    else:
      preset = key
  return preset, values
