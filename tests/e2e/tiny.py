"""The whole program at the smallest size: every loss term on, drop-path on, 8 virtual devices."""
import json

from configs import finetune, unimiss, unimiss_plus

MODEL = dict(embed_dims=(4, 4, 8, 8, 8, 8), decoder_dims=(8, 8, 8, 4, 4), num_heads=(1, 1, 1, 1),
             decoder_heads=(1, 1, 1), decoder_drop_path=0.5)


def config(**overrides):
  """Preset phantom with the released losses beside its own; overrides by dotted name."""
  c = unimiss_plus.get_config('phantom')
  c.unlock()
  c.steps, c.data.phantom_records = 8, 16
  c.batch.ct = c.batch.xray = 8
  c.views.ct.size = c.model.volume_size = (16, 64, 64)
  c.model.update(MODEL)
  c.head.update(dict(out_dim=32, hidden_dim=16, bottleneck_dim=8))
  c.loss.update(dict(ct=1., drr=.5, slice=.1, xray=1., recon_ct=5., recon_drr=5., recon_xray=5., slices=8))
  c.eval.update(dict(every=0, records=24, fit=12))
  c.checkpoint.every, c.log.every = 100, 1
  return changed(c, overrides)


def pilot(model='mit_small', **overrides):
  """Pilot UniMiSS, preset phantom: two epochs of X-rays, two of CT, each of two steps."""
  c = unimiss.get_config(f'phantom,model={model}')
  c.unlock()
  c.steps, c.epochs, c.data.phantom_records = 0, 4, 16
  c.phases.update(dict(unit='epoch', ct=2, xray=2))
  c.batch.ct = c.batch.xray = 8
  c.model.update(dict(embed_dims=(8, 8, 8, 8), decoder_dims=(8, 8, 8), num_heads=(1, 1, 1, 1),
                      decoder_heads=(1, 1, 1)) if model != 'mit_plus' else MODEL)
  c.head.update(dict(out_dim=32, hidden_dim=16, bottleneck_dim=8))
  c.loss.slices = 8
  c.eval.update(dict(every=0, records=24, fit=12))
  c.checkpoint.every, c.log.every = 100, 1
  return changed(c, overrides)


def task(preset='phantom_cls3d', **overrides):
  """Fine-tuning of the same network."""
  c = finetune.get_config(preset)
  c.unlock()
  c.steps, c.task.phantoms = 8, (16, 8, 8)
  c.batch.ct = c.batch.xray = 8
  c.views.ct.size = c.model.volume_size = (16, 64, 64)
  c.model.update(MODEL | dict(image_size=64))
  c.eval.every, c.checkpoint.every, c.log.every = 4, 100, 1
  return changed(c, overrides)


def changed(c, overrides: dict):
  """A config with other leaves, by dotted name, and locked."""
  for name, value in overrides.items():
    section, _, leaf = name.rpartition('.')
    part = c
    for key in section.split('.') if section else ():
      part = part[key]
    part[leaf] = value
  return c.lock()


def metrics(folder) -> dict:
  """{(step, phase): values that must be reproducible}."""
  rows = [json.loads(r) for r in (folder / 'metrics.jsonl').read_text().splitlines()]
  assert len({(r['step'], r['phase']) for r in rows}) == len(rows), 'a step was logged twice'
  return {(r['step'], r['phase']): {k: v for k, v in r.items() if not k.startswith('perf/') and k != 'data/wait_frac'}
          for r in rows}


def get_config(arg=None):
  """For main.py --config=tests/e2e/tiny.py."""
  return config()
