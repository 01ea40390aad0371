"""Ablations of pre-training: every row of a grid is the base row but for the leaves that it names.

  python -m unimiss_jax.cli.sweep --grids=configs/ablations.py --grid=core --out=runs/ablations --jobs=2
  python -m unimiss_jax.cli.sweep --grids=configs/ablations.py --grid=losses --out=runs/mine \
      --config.data.ct=/data/ct --config.data.xray=/data/cxr

The grids stand on the sizes and the trunk of preset phantom, so that a row takes minutes on a CPU; for another scale
name its preset in the entry's place of PHANTOM. A row is one line, and one that changes nothing is refused. Rows are
compared by the online evaluation of their last step: kNN, and retrieval of a CT by its DRR or X-ray. They make equally
many steps, the first 77 (of `core` 38) with a rising rate: hence other `warmup_epochs` where an epoch is longer or
shorter. A row that knows one modality, or has both in every step, sees twice as many samples of it.
"""

PHANTOM = 'configs/unimiss_plus.py:phantom'
PILOT = 'configs/unimiss.py:phantom'
# All terms of preset plain beside the contrastive ones, at the sizes of preset phantom; 128 prototypes for 8 and 16
# samples a step (thousands are too many). Slices of CT enter the 2-D branch, which wants 64 pixels.
LARGER = {'views.ct.size': (16, 64, 64), 'model.volume_size': (16, 64, 64)}
ALL_TERMS = LARGER | {'loss.ct': 1., 'loss.drr': .5, 'loss.slice': .1, 'loss.xray': 1., 'loss.recon_ct': 5.,
             'loss.recon_drr': 5., 'loss.recon_xray': 5., 'loss.slices': 4, 'head.out_dim': 128}
# Half the samples a step and every 8th slice, for rows of two to five minutes of one core.
SHORT = ALL_TERMS | {'batch.ct': 4, 'batch.xray': 8, 'loss.slices': 8, 'steps': 360, 'optim.warmup_epochs': .2,
                     'eval.every': 0}
NO_2D = {'phases.xray': 0, 'loss.drr': 0., 'loss.recon_drr': 0., 'loss.pair_nce': 0., 'loss.slice': 0.}


def grid(rows: dict, base: str = 'base', config: str = PHANTOM, common: dict | None = None, seeds=(0, 1, 2)) -> dict:
  """An entry; `common`: leaves of all rows, which a row may set otherwise."""
  rows = {base: {}} | rows
  return {'config': config, 'base': base, 'seeds': seeds, 'table': 'pretraining',
          'rows': {name: (common or {}) | leaves for name, leaves in rows.items()}}


def only(**terms) -> dict:
  """The losses of these names and weights alone."""
  names = ('ct', 'drr', 'slice', 'slice_slice', 'ct_slice', 'xray', 'recon_ct', 'recon_drr', 'recon_xray', 'nce',
           'pair_nce')
  return {f'loss.{n}': terms.get(n, 0.) for n in names}


def ladder(start: dict, terms: dict, out=(), **entry) -> dict:
  """A cumulative entry: the first row is `start`; each of {row: leaves} has the leaves of all before it too, but for
  those of the rows `out`, and is compared with the last that has not fallen out."""
  rows, against, kept, last = {}, {}, start, 'start'
  for name, leaves in terms.items():
    rows[name], against[name] = kept | leaves, last
    if name not in out:
      kept, last = rows[name], name
  common = entry.pop('common', {}) | start
  return grid(rows, 'start', common=common, **entry) | {'against': against}


def left_out(start: dict, terms: dict, out=(), **entry) -> dict:
  """An entry whose base row `recipe` has `start` and all terms but those of `out`; `start` has none, and in each other
  row one of them is as in `start`."""
  kept = {name: leaves for name, leaves in terms.items() if name not in out}
  recipe = start | {k: v for leaves in kept.values() for k, v in leaves.items()}
  rows = {f'no_{name}': {k: start[k] for k in leaves} for name, leaves in kept.items()}
  return grid({'start': start} | rows, 'recipe', common=entry.pop('common', {}) | recipe, **entry)


# From the objective and the trunk of the released code to a recipe, term by term, at the sizes of preset phantom.
RELEASED = only(ct=1., drr=.5, xray=1.) | {
    'head.out_dim': 128, 'head.batch_standardize': False, 'model.init': 'released', 'model.final_norm': False,
    'model.conv_residual': False, 'drr.view': 'axial', 'drr.scope': 'subvolume', 'drr.paired_window': False}
TERMS = {
    'contrast': only(nce=1., pair_nce=1.),
    'frontal_drr': {'drr.view': 'pa', 'drr.scope': 'volume'},
    'trunk': {'model.conv_residual': True, 'model.init': 'fan_in', 'model.final_norm': True},
    'standardised_head': {'head.batch_standardize': True},      # so far the recipe of preset phantom
    'koleo': {'extra_loss.koleo': .1},
    'masked_input': {'extra_loss.mask_ratio': (.1, .6), 'extra_loss.mask_block': (4, 16, 16)},
    'both_in_a_step': {'phases.unit': 'joint', 'steps': 152, 'optim.warmup_epochs': .16},
    'distillation_by_sinkhorn': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'extra_loss.sinkhorn': 3},
    'simdino': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'extra_loss.coding_rate': .5},
    'tokens_do_not_decay': {'optim.decay_exclude': 'tokens'},
    'patches': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'extra_loss.patch': 1.,
                'extra_loss.mask_ratio': (.1, .6), 'extra_loss.mask_block': (4, 16, 16)},
    'small_crops': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'extra_loss.local.crops': 4},
    'paired_window': {'drr.paired_window': True},      # a record of a phantom is its whole scan
}
CLIMB = {'steps': 304, 'optim.warmup_epochs': .32, 'eval.every': 0}
FALLEN = ('koleo', 'masked_input', 'both_in_a_step', 'distillation_by_sinkhorn', 'simdino', 'tokens_do_not_decay',
          'patches', 'small_crops')      # see docs/experiments.md
PHANTOMS_ALONE = ('paired_window',)      # gains, but stays out of preset base: crops of `plain` are thin
GRIDS = {
    'base': ladder(RELEASED, TERMS, FALLEN, common=CLIMB),
    'base_held_out': left_out(RELEASED, TERMS, FALLEN, common=CLIMB, seeds=(3, 4, 5)),
    'core': grid({
        'no_drr': {'loss.drr': 0., 'loss.recon_drr': 0., 'loss.pair_nce': 0.},
        'no_slices': {'loss.slice': 0.},
        'no_reconstruction': {'loss.recon_ct': 0., 'loss.recon_drr': 0., 'loss.recon_xray': 0.},
        'unimiss': {'method': 'unimiss'} | only(ct=1., slice=1., slice_slice=1., ct_slice=1., xray=1., nce=1.),
        'only_2d': {'phases.ct': 0, 'optim.warmup_epochs': .4},
        'only_3d': NO_2D,
    }, 'unimiss_plus', common=SHORT),
    'losses': grid({
        **{f'no_{n}': {f'loss.{n}': 0.} for n in ('ct', 'drr', 'slice', 'xray', 'recon_ct', 'recon_drr', 'recon_xray',
                                                  'nce', 'pair_nce')},
        'distillation_only': only(ct=1., drr=.5, slice=.1, xray=1.),
        'reconstruction_only': only(recon_ct=5., recon_drr=5., recon_xray=5.),
        'contrast_only': only(nce=1., pair_nce=1.),
        'weak_reconstruction': {'loss.recon_ct': .5, 'loss.recon_drr': .5, 'loss.recon_xray': .5},
        'unimiss_on_mit_plus': only(ct=1., slice=1., slice_slice=1., ct_slice=1., xray=1.),
    }, common=ALL_TERMS),
    'slices': grid({
        'every_2nd': {'loss.slices': 2}, 'every_8th': {'loss.slices': 8},
        'mean_probability': {'loss.slice_pool': 'probability'}, 'mean_feature': {'loss.slice_pool': 'feature'},
        'minmax': {'loss.slice_intensity': 'minmax'},
    }, common=ALL_TERMS),
    'drr': grid({
        'axial': {'drr.view': 'axial'}, 'lateral': {'drr.view': 'lateral'},
        'of_the_tile': {'drr.view': 'axial', 'drr.scope': 'subvolume'},
        'bone_and_soft': {'drr.mu': 'bone_soft'}, 'minmax': {'drr.mu': 'minmax', 'drr.image': 'minmax'},
        'transmission': {'drr.image': 'transmission'}, 'bspline': {'drr.kind': 'bspline'},
        'tilted': {'drr.tilt_deg': 10., 'drr.source_jitter_mm': 100.},
        'near': {'drr.sdd_mm': 1200., 'drr.sod_mm': 1000.}, 'paired_window': {'drr.paired_window': True},
    }),
    'schedule': grid({
        'joint': {'phases.unit': 'joint'}, 'epochs_1_1': {'phases.unit': 'epoch'},
        'epochs_2_2': {'phases.unit': 'epoch', 'phases.ct': 2, 'phases.xray': 2},
        'three_ct_to_one_xray': {'phases.ct': 3},
    }),
    'batch': grid({
        'half': {'batch.ct': 4, 'batch.xray': 8, 'optim.warmup_epochs': .4},
        'double': {'batch.ct': 16, 'batch.xray': 32, 'optim.warmup_epochs': 1.6},
        'more_xrays': {'batch.xray': 64},
    }),
    'data': grid({
        'quarter': {'data.phantom_records': 192, 'optim.warmup_epochs': 3.2},
        'double': {'data.phantom_records': 1536, 'optim.warmup_epochs': .4},
    }),
    'trunk': grid({
        'no_residual': {'model.conv_residual': False},
        'no_final_norm': {'model.final_norm': False}, 'released_init': {'model.init': 'released'},
        'not_standardised': {'head.batch_standardize': False}, 'deeper': {'model.depths': (1, 2, 4, 2)},
        'wider': {'model.embed_dims': (8, 16, 64, 128, 160, 160), 'model.decoder_dims': (160, 128, 64, 16, 8)},
    }),
    'last_stride': grid({'stride_1': {'model.last_stride': 1}}, 'stride_2', seeds=(0, 1, 2, 3, 4, 5),
                        common=CLIMB | LARGER | {'model.last_stride': 2}),      # at smaller sizes it is 1 from the start
    'backbone': grid({      # the pilot's networks with the pilot's objective, at its sizes: slow rows
        'vit_tiny': {'config': PHANTOM + ',model=vit_tiny'},
        'mit_tiny': {'config': PILOT + ',model=mit_tiny'}, 'mit_small': {'config': PILOT},
    }),
    'start': grid({         # --weights, --imported: a run, an exported folder, .safetensors, .pth; {seed} in the path
        'weights': {'init_from': '{weights}'}, 'imported': {'init_from': '{imported}'},
        'hires': LARGER | {'init_from': '{weights}', 'views.xray.size': 96, 'views.drr.size': 96,
                           'model.image_size': 96},
    }),
    'released_quirks': grid({
        'sequential_centre': {'loss.center_updates': 'sequential'}, 'no_freezing_of_3d': {'optim.freeze_3d': 'none'},
        'zero_grad_freezing': {'optim.freeze_3d': 'zero_grad'}, 'clip_per_tensor': {'optim.clip_mode': 'per_tensor'},
        'no_clip': {'optim.clip': 0.}, 'no_drop_path': {'model.decoder_drop_path': 0.},
    }, common=ALL_TERMS),
    'terms': grid({      # of preset phantom, one at a time
        'koleo': {'extra_loss.koleo': .1}, 'tokens_do_not_decay': {'optim.decay_exclude': 'tokens'},
        'self_distillation': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'head.out_dim': 128},
        'sinkhorn': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'head.out_dim': 128, 'extra_loss.sinkhorn': 3},
        'simdino': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'extra_loss.coding_rate': .5},
        'reconstruction': {'loss.recon_ct': 5., 'loss.recon_drr': 5., 'loss.recon_xray': 5.},
        'masked_reconstruction': {'loss.recon_ct': 5., 'loss.recon_drr': 5., 'loss.recon_xray': 5.,
                                  'extra_loss.mask_ratio': (.1, .6), 'extra_loss.mask_block': (4, 16, 16)},
        'patches': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'head.out_dim': 128, 'extra_loss.patch': 1.,
                    'extra_loss.mask_ratio': (.1, .6), 'extra_loss.mask_block': (4, 16, 16)},
        'small_crops': {'loss.ct': 1., 'loss.drr': .5, 'loss.xray': 1., 'head.out_dim': 128,
                        'extra_loss.local.crops': 4},
        'masked_input': {'extra_loss.mask_ratio': (.1, .6), 'extra_loss.mask_block': (4, 16, 16)},
    }),
    'teacher': grid({
        'momentum_099': {'ema.momentum': .99}, 'constant_momentum': {'ema.momentum_end': .996},
        'cooler': {'loss.teacher_temp': .02, 'loss.warmup_teacher_temp': .02},
        'warmed_up': {'loss.teacher_temp': .07, 'loss.teacher_temp_warmup': 3.},
        'prototypes_2048': {'head.out_dim': 2048}, 'quick_centre': {'loss.center_momentum': .5},
    }, common=ALL_TERMS),
}
