"""UniMiSS, the pilot of UniMiSS+: CT volumes, their axial slices, and real X-rays; one set of weights.

  python main.py --config=configs/unimiss.py --workdir=runs/pilot
  python main.py --config=configs/unimiss.py:plain,model=mit_tiny --workdir=runs/x \
      --config.data.ct=/data/ct --config.data.xray=/data/cxr

presets
  phantom   the losses of the pilot on embedded phantoms, minutes on a CPU: shows that the machine runs. Nothing is
            learned: after 200 steps kNN is where it began and the embeddings have nearly collapsed (RankMe 1.4).
            With InfoNCE beside it kNN rises, while the distillation still collapses: docs/experiments.md.
  reference what the released code of UniMiSS computes, defects included, to compare against it.
  plain     the losses, schedule and augmentation of the released code with its defects mended; made for accelerators.
arguments
  model     mit_small (default), mit_tiny: the pilot's networks, whose embedding is the decoder's class token;
            mit_plus: the network of UniMiSS+ under the pilot's objective.
"""
from ml_collections import ConfigDict

from configs import common, unimiss_plus

PRESETS = ('phantom', 'plain', 'reference')
MODELS = ('mit_small', 'mit_tiny', 'mit_plus')


def get_config(arg: str | None = None) -> ConfigDict:
  preset, given = common.parse_arg(arg, PRESETS, model='mit_small')
  config = plain(given['model'])
  config.preset = preset
  if preset != 'plain':
    {'phantom': phantom, 'reference': reference}[preset](config)
  return config.lock()


def plain(model: str) -> ConfigDict:
  c = unimiss_plus.plain()
  c.method = 'unimiss'
  c.epochs = 200                  # of X-rays, X-rays, CT, CT, ...: each one pass over its own stream
  c.phases.update(dict(ct=2, xray=2))
  c.batch.update(dict(ct=192, xray=192))
  c.views.xray.size = 224         # CT crops and their slices stay at 16 x 96 x 96
  c.model = network(model)
  c.loss.update(dict(
      ct=1.0, slice=1.0, slice_slice=1.0, ct_slice=1.0, xray=1.0,      # student_teacher; one word: the teacher sees CT
      drr=0., recon_ct=0., recon_drr=0., recon_xray=0.,
      slices=1))
  c.optim.update(dict(clip=0.3, clip_mode='per_tensor', freeze_last_layer=1.))
  return c


def network(model: str) -> ConfigDict:
  """The leaves `model.*` of this network at 224 pixels. Raises ValueError."""
  if model not in MODELS:
    raise ValueError(f'config argument "model={model}" unknown (known: {", ".join(MODELS)})')
  if model == 'mit_plus':
    return ConfigDict(common.base().model.to_dict() | dict(image_size=224))
  one = model == 'mit_tiny'
  return ConfigDict(dict(
      name=model,
      embed_dims=(48, 128, 256, 512), depths=(1, 1, 1, 1) if one else (2, 3, 4, 3), num_heads=(1, 2, 4, 8),
      mlp_ratio=4, sr_ratios=(6, 4, 2, 1),
      decoder_dims=(256, 128, 48), decoder_depths=(1, 1, 1) if one else (3, 4, 3), decoder_heads=(8, 4, 2),
      decoder_sr_ratios=(2, 4, 6),
      in_channels=(3, 1), image_size=224, volume_size=(16, 96, 96), pos_interp='grid', dtype='float32'))


def phantom(c: ConfigDict) -> None:
  """Small crops and widths; steps alternate between 16 X-rays and 8 CT with every 4th slice."""
  losses, model = c.loss.to_dict(), c.model.to_dict()
  unimiss_plus.phantom(c)
  c.loss = ConfigDict(losses | dict(slices=4))
  c.phases.update(dict(ct=1, xray=1))
  c.steps = 400
  c.views.ct.size = (16, 64, 64)
  if model['name'] == 'mit_plus':
    c.model.volume_size = (16, 64, 64)
  else:
    c.model = ConfigDict(model | dict(
        embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), decoder_dims=(64, 32, 16), decoder_depths=(1, 1, 1),
        image_size=64, volume_size=(16, 64, 64)))
  c.head.update(dict(out_dim=128, batch_standardize=False))      # thousands are too many for 8 and 16 samples a step
  c.ema.momentum = 0.98
  c.optim.update(dict(lr=5e-4, clip=0.3, clip_mode='per_tensor'))
  c.checkpoint.every, c.eval.every = 100, 200


def reference(c: ConfigDict) -> None:
  """The released code where `plain` departs from it. Not reproduced: the end of a run where its schedules are read
  beyond their last value, random numbers that its loader's workers share, tiles every 4 slices (ours: every 12),
  hence other lengths of an epoch."""
  c.data.reshuffle = False
  c.views.ct.update(dict(pad_hu=0, pad_to=(256, 256), gamma_stats='bg0197'))
  c.model.pos_interp = 'reference'
  c.loss.center_updates = 'sequential'
  c.optim.update(dict(freeze_3d='zero_grad', schedule_unit='dataset', max_skipped=1))
