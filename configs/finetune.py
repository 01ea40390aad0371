"""Fine-tuning and probing: classification or segmentation of labelled images and volumes, on any weights.

  python main.py --config=configs/finetune.py:phantom_cls3d --workdir=runs/cls --config.init_from=runs/demo
  python main.py --config=configs/finetune.py:seg3d --workdir=runs/seg --config.init_from=runs/mine \
      --config.data.manifest=/data/manifest.jsonl --config.task.classes="('liver','spleen')"

Leave init_from away and the same run is the one from scratch.

presets
  phantom_cls3d phantom_cls2d  findings of the embedded phantoms, in CT and in radiographs (the encoder of the demo)
  phantom_seg3d phantom_seg2d  organs and findings in CT; outlines of lungs and heart in radiographs
  cls3d cls2d seg3d seg2d      any manifest with labels or masks (the encoder of the papers)
  ricord chestxr jsrt bcv      protocols of the released UniMiSS+ code, as far as they are known; the data are yours
                               to bring, their splits the doctor applies (--split=ricord; none of bcv was
                               released). `:jsrt,quirks=1` keeps what its code does unlike its paper
`:cls3d,model=mit_small` (or mit_tiny) classifies with the encoder of the pilot UniMiSS, which cannot segment.
`:cls3d,model=vit_b16` (or vit_tiny) takes the ViT of UniMedI; segmentation then grows its patches to full size by
convolutions of its own.
`:seg2d,model=resnet50` takes the ResNet of Joint; it segments by a U-Net on all its maps. Volumes go through it slice
by slice, and are classified by the mean over the slices.
"""
from ml_collections import ConfigDict

from configs import common, unimiss, unimiss_plus

PHANTOM = ('phantom_cls3d', 'phantom_cls2d', 'phantom_seg3d', 'phantom_seg2d')
GENERIC = ('cls3d', 'cls2d', 'seg3d', 'seg2d')
PROTOCOLS = ('ricord', 'chestxr', 'jsrt', 'bcv')
FINDINGS = ('effusion_side', 'consolidation_lobe', 'consolidation_side', 'cardiomegaly')    # named before any run


def get_config(arg: str | None = None) -> ConfigDict:
  preset, given = common.parse_arg(arg, PHANTOM + GENERIC + PROTOCOLS, quirks=0, model='mit_plus')
  name = {'ricord': 'cls3d', 'chestxr': 'cls2d', 'jsrt': 'seg2d', 'bcv': 'seg3d'}.get(preset, preset)
  kind, dims = name[-5:-2], int(name[-2])
  c = base(kind, dims)
  c.preset = preset
  if preset in PHANTOM:
    phantom(c)
  elif preset in PROTOCOLS:
    {'ricord': ricord, 'chestxr': chestxr, 'jsrt': jsrt, 'bcv': bcv}[preset](c, bool(given['quirks']))
    c.optim.decay_exclude = ''      # everything decays
  if given['model'].startswith('vit'):
    vit(c, given['model'])
  elif given['model'] == 'resnet50':
    resnet(c)
  elif given['model'] != 'mit_plus':
    c.model = unimiss.network(given['model'])
  return c.lock()


def base(kind: str, dims: int) -> ConfigDict:
  """The generic task: chosen by us."""
  c = common.base()
  c.method = 'supervised'
  stream = {2: 'xray', 3: 'ct'}[dims]
  c.task = ConfigDict(dict(
      kind=kind,                  # cls | seg
      classes=(),                 # names; of a segmentation in the order of the values 1, 2, ... of its masks
      exclusive=dims == 3 and kind == 'seg',    # one class a sample or voxel (softmax) | each for itself (sigmoid)
      mask_values=(),             # seg: value, or tuple of values, of each class in the masks; () = 1, 2, ...
      threshold=0,                # seg: masks of one class are 1 from this value on; 0 = off
      features='cls',             # cls: class token | mean: of the last tokens | both: one norm, mean of both logits
      probe_first=False,          # cls: the head starts as the linear probe of the training cases
      frozen=False,               # the encoder stays as it is; head, and decoder of a segmentation, learn
      encoder_rate=1.,            # factor of the learning rate of the encoder
      deep_supervision=True,      # seg: losses at four resolutions, weights 8:4:2:1
      ce_weight=1., dice_weight=1.,
      dice='soft',                # soft | hard_no_grad: of thresholded predictions (released code of JSRT)
      foreground=1 / 3,           # seg 3D: share of patches round a voxel of a class
      rotate=(0., 0., 0.),        # degrees, +- about the axes z, y, x; of pictures the first
      shear=0.,                   # degrees, +-, of rows along x
      warp_p=1.,                  # share of the views that are turned and sheared
      elastic=(0., 0.),           # amplitude of a smooth deformation, as batchgenerators' alpha
      elastic_sigma=(9., 13.),    # its width in pixels
      elastic_p=0.,               # share of the views that are deformed
      spacing_mm=(0., 0., 0.),    # (z, y, x) that volumes are resampled to; 0 = as they are
      clip=(0., 0.),              # HU (or grey values of [0, 1]) outside of it are cut; equal = off
      normalise=(0., 0.),         # (mean, std) in HU or grey values; std 0 = HU / 1024, grey values as they are
      test_view='centre',         # cls: centre | windows (3D, extent=output) | whole | tencrop (2D)
      epoch_steps=0,              # steps that count as an epoch; 0 = one pass over the records
      overlap=0.5, mirror=False,  # seg: of the sliding window; all mirror images are averaged
      tolerance_mm=2.,            # seg: surfaces this near are equal in the normalised surface Dice; px of pictures
      phantoms=(400, 100, 200),   # patients of the embedded benchmark: training, validation, test
      world=0,                    # seed of these patients: runs of other seeds learn from and are tested on the same
  ))
  c.eval.tasks = (kind,)
  c.eval.select = 'eval/auroc' if kind == 'cls' else 'eval/dice'
  c.steps, c.eval.every, c.checkpoint.every, c.log.every = 10_000, 500, 500, 50
  c.phases.update(dict(unit='step', ct=int(dims == 3), xray=int(dims == 2)))
  c.batch.update(dict(ct=8, xray=32))
  c.drr.scope = 'subvolume'       # none are rendered
  c.views.ct.update(dict(extent='record' if kind == 'cls' else 'output', precrop=(0., 0.), scale=(0.8, 1.2),
                         flip_p=0., aug_unit='volume', blur_p=(.2, .2), mul_p=(.3, .3), add_p=(.3, .3), add_std=.1,
                         contrast_p=(.3, .3), gamma_p=(.3, .3)))
  if kind == 'cls':
    c.views.ct.update(dict(scale=(0.7, 1.0), resize='area'))
  c.views.xray.update(dict(size=224, scale=(0.4, 1.0), resize='area', flip_p=0., blur_p=(.2, .2)))
  c.model.update(dict(image_size=224 if stream == 'xray' else 96, cls_token=True))
  c.optim.update(dict(lr=1e-4, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0., weight_decay=0.05,
                      weight_decay_end=0.05, clip=1., freeze_last_layer=0., layer_decay=0.75))
  c.init_allow = 'decoder,head'
  return c


def phantom(c: ConfigDict) -> None:
  """At the sizes of the demo; a run takes about a minute on two cores."""
  demo = unimiss_plus.get_config('phantom')
  c.model.update(demo.model)
  size = demo.views.ct.size
  c.views.ct.update(dict(size=size, noise_std=(0., 0.05), blur_sigma=(0.3, 1.0), mul=(0.85, 1.15),
                         contrast=(0.85, 1.15)))
  c.views.xray.update(dict(size=demo.views.xray.size, noise_std=(0., 0.03), gamma=(0.7, 1.4), gamma_p=(1., 1.)))
  if c.task.kind == 'cls':
    c.task.classes = FINDINGS
  elif c.phases.ct:
    c.task.update(dict(classes=('lung_right', 'lung_left', 'heart', 'spine', 'liver', 'effusion', 'consolidation'),
                       spacing_mm=(16., 7., 7.), tolerance_mm=7.))
    c.views.ct.update(dict(resize='linear', scale=(0.85, 1.15)))
  else:
    c.task.classes = ('lung_right', 'lung_left', 'heart')
    c.views.xray.scale = (0.6, 1.0)
  c.steps, c.eval.every, c.checkpoint.every, c.log.every = 200, 50, 100, 20
  c.batch.update(dict(ct=8, xray=16))
  c.optim.update(dict(lr=1e-3, layer_decay=1.))
  c.task.probe_first = c.task.kind == 'cls'
  if c.task.kind == 'seg':        # the finest maps have 4 channels and the decoder starts anew: both need large steps
    c.steps, c.eval.every, c.task.epoch_steps = (400, 200, 40) if c.phases.ct else (200, 100, 20)
    c.batch.update(dict(ct=2, xray=4))
    c.optim.update(dict(lr=3e-2 if c.phases.ct else 1e-2, warmup_epochs=0.5))
    c.task.phantoms = (100, 16, 48)


def vit(c: ConfigDict, name: str) -> None:
  """The encoder of UniMedI, at the sizes of its pre-training; for phantoms a small one."""
  small, size = c.preset in PHANTOM, tuple(c.views.ct.size)
  c.model = common.vit(name)
  if small:
    plane = size[1] if c.phases.ct else c.views.xray.size
    c.model.update(dict(embed_dims=(48,), num_heads=(4,), depths=(3,), patch=8, patch_depth=2, image_size=plane,
                        volume_size=(size[0], plane, plane), init='fan_in'))
  elif c.preset in GENERIC:
    c.views.ct.size = c.model.volume_size
  if c.phases.ct and not small:
    c.model.volume_size = c.views.ct.size


def resnet(c: ConfigDict) -> None:
  """The encoder of Joint; for phantoms a small one."""
  c.model = common.resnet(small=c.preset in PHANTOM)
  c.model.image_size = c.views.xray.size


def ricord(c: ConfigDict, quirks: bool) -> None:
  """RICORD 1A against 1B; 194 / 52 / 84 scans of 137 / 45 / 45 patients: the doctor's --split=ricord.
  Not reproduced: cubic interpolation (ours is linear), low resolution simulation."""
  c.task.update(dict(classes=('class_0', 'class_1'), exclusive=True, features='both', spacing_mm=(2., 2., 2.),
                     clip=(-1024., 325.), normalise=(158.58, 324.70), test_view='whole', epoch_steps=73,
                     rotate=(15., 15., 15.), warp_p=0.2, elastic=(0., 900.), elastic_p=0.2))
  c.views.ct.update(dict(size=(64, 128, 128), extent='record', scale=(0.6, 1.0), flip_p=0.5,
                         pad_hu=0 if quirks else -1024))
  c.steps, c.epochs, c.eval.every = 200 * 73, 0, 73     # 582 samples an "epoch"
  c.eval.patience = 0 if quirks else 30
  c.eval.select = '' if quirks else 'eval/auroc'        # quirk: the last weights are tested, not the best
  c.batch.ct = 8
  c.optim.update(dict(lr=1e-5, schedule='constant', weight_decay=5e-3, weight_decay_end=5e-3, clip=0., layer_decay=1.))
  c.init_parts = ('encoder',)


def chestxr(c: ConfigDict, quirks: bool) -> None:
  """CXR-Covid (ChestXR): covid, normal, pneumonia; 17,958 training and 3,432 test images; no validation set
  (the doctor's --split=chestxr). Turned views are made by area means, the others bicubic."""
  c.task.update(dict(classes=('class_1', 'class_2', 'class_3'), exclusive=True, features='cls',
                     normalise=(0.5056, 0.252), test_view='tencrop', rotate=(7., 0., 0.), epoch_steps=17_958 // 32))
  c.views.xray.update(dict(size=224, scale=(0.08, 1.0), resize='bicubic', flip_p=0.5, updown_p=0.5, jitter_p=0.,
                           blur_p=(0., 0.)))
  c.steps, c.epochs, c.eval.select = 0, 30, ''
  c.batch.xray = 32
  c.optim.update(dict(lr=1e-4, schedule='poly', weight_decay=3e-5, weight_decay_end=3e-5, clip=0., layer_decay=1.))
  c.init_parts = ('encoder',)


def jsrt(c: ConfigDict, quirks: bool) -> None:
  """JSRT with SCR masks: clavicles, heart, lungs; odd ids train (124), even ids test (123), no validation set
  (the doctor's --split=jsrt).
  One mask an image: where structures overlap, give it a value of its own and list it for each (task.mask_values).
  Not reproduced: vertical shift beyond that of the crop."""
  c.task.update(dict(classes=('clavicle', 'heart', 'lung'), exclusive=False, deep_supervision=False, epoch_steps=50,
                     dice='hard_no_grad' if quirks else 'soft', rotate=(10., 0., 0.), shear=5.73))
  c.views.xray.update(dict(size=224, scale=(0.77, 1.0), flip_p=0.5, updown_p=0.5, jitter_p=0., blur_p=(0., 0.)))
  c.model.cls_token = False
  c.steps, c.epochs, c.eval.select = 10_000, 0, ''
  c.batch.xray = 32
  c.optim.update(dict(lr=1e-4, schedule='poly', weight_decay=3e-5, weight_decay_end=3e-5, eps=1e-4, clip=0.,
                      layer_decay=1.))


def bcv(c: ConfigDict, quirks: bool) -> None:
  """13 abdominal organs of BCV; the authors' split is not released. The decoder starts anew, as in their code.
  Spacing and patch come from your own plan."""
  c.task.update(dict(classes=('spleen', 'right kidney', 'left kidney', 'gallbladder', 'esophagus', 'liver', 'stomach',
                              'aorta', 'vena cava', 'portal and splenic veins', 'pancreas', 'right adrenal',
                              'left adrenal'),
                     exclusive=True, overlap=0.7, mirror=True, foreground=1 / 3, epoch_steps=250,
                     rotate=(30., 30., 30.), warp_p=0.2))
  c.views.ct.update(dict(size=(48, 192, 192), scale=(0.7, 1.4), flip_p=0.5))
  c.model.update(dict(cls_token=False, volume_size=(48, 192, 192), decoder_drop_path=0.))
  c.steps, c.eval.every = 100 * 250, 250
  c.batch.ct = 2
  c.optim.update(dict(lr=1e-4, schedule='poly', schedule_unit='epoch', weight_decay=3e-5, weight_decay_end=3e-5,
                      clip=12., layer_decay=1.))
  c.init_parts = ('encoder',)
