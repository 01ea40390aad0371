"""Comparisons: what are weights worth? Every row of a grid is the same recipe but for the leaves that it names.

  python -m unimiss_jax.cli.sweep --grid=phantom_cls3d --out=runs/comparison --weights=runs/demo
  python -m unimiss_jax.cli.sweep --grid=cls2d --out=runs/mine --weights=runs/x --imported=released.pth \
      --config.data.manifest=/data/manifest.jsonl --config.task.classes="('nodule','effusion')"

{weights} and {imported} are filled in by the flags of that name; a row whose flag is not given is left out.
"""

ROWS = {
    'scratch': {},                                    # the row that the others are compared with
    'untrained_frozen': {'task.frozen': True},        # a head on random features
    'pretrained': {'init_from': '{weights}'},
    'pretrained_frozen': {'init_from': '{weights}', 'task.frozen': True},
    'imported': {'init_from': '{imported}'},          # other weights, for instance released ones
}
FRACTIONS = {      # of the labelled patients
    **dict.fromkeys(('phantom_cls3d', 'phantom_cls2d', 'phantom_seg3d', 'phantom_seg2d'), (.05, 1.)),
    **dict.fromkeys(('cls3d', 'cls2d', 'seg3d', 'seg2d', 'ricord', 'chestxr', 'jsrt', 'bcv'), (.2, .4, 1.)),
}
ENCODER_RATE = {'phantom_cls3d': .1, 'phantom_cls2d': .1, 'phantom_seg3d': .3, 'phantom_seg2d': .3}


def rows(task: str) -> dict:
  """Full fine-tuning of the embedded tasks moves a pre-trained encoder slower than the rest: docs/experiments.md."""
  slow = {'task.encoder_rate': ENCODER_RATE[task]} if task in ENCODER_RATE else {}
  return ROWS | {name: ROWS[name] | slow for name in ('pretrained', 'imported')}


def grids(model: str = '') -> dict:
  return {task + (f'_{model}' if model else ''): {
      'config': f'configs/finetune.py:{task}' + (f',model={model}' if model else ''), 'rows': rows(task),
      'base': 'scratch', 'seeds': (0, 1, 2), 'fractions': fractions} for task, fractions in FRACTIONS.items()}


GRIDS = grids() | grids('resnet50')      # cls2d, ..., cls2d_resnet50, ...: with the encoder of Joint
