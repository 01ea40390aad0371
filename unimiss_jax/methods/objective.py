"""Terms of UniMiSS and UniMiSS+: which there are, what chance gives for each, and which settings are refused."""
import math


def ct_terms(loss) -> dict:
  """Self-distillation of CT: {name: (weight, what the student sees, what the teacher sees)}, in the released order."""
  return {'dino': (loss.ct, 'ct', 'ct'), 'drr': (loss.drr, 'drr', 'ct'), 'slice': (loss.slice, 'slice', 'ct'),
          'slice_slice': (loss.slice_slice, 'slice', 'slice'), 'ct_slice': (loss.ct_slice, 'ct', 'slice')}


def chance(config, batch, stream) -> dict[str, float]:
  """Value of each loss part for a model that tells nothing apart."""
  uniform, out = math.log(config.head.out_dim), {}
  loss = config.loss
  weights = {name: weight for name, (weight, *_) in ct_terms(loss).items()} if stream == 'ct' else {'dino': loss.xray}
  for name, weight in weights.items():
    if weight and not config.extra_loss.coding_rate:
      out[f'train/{name}_loss'] = uniform
  if stream == 'xray' and config.extra_loss.local.crops:
    out['train/local_loss'] = uniform
  if config.extra_loss.patch:
    out['train/patch_loss'] = uniform
  if loss.nce:
    out['train/nce_loss'] = math.log(2 * batch - 1)
  if loss.pair_nce and stream == 'ct':
    out['train/pair_nce_loss'] = math.log(batch)
  return out


def check_terms(loss, phases) -> None:
  """Raises ValueError for a phase that would have no loss."""
  of = {'ct': ('ct', 'drr', 'slice', 'slice_slice', 'ct_slice', 'recon_ct', 'recon_drr', 'nce', 'pair_nce'),
        'xray': ('xray', 'recon_xray', 'nce')}
  for phase, terms in of.items():
    if phases[phase] and not any(loss[t] for t in terms):
      raise ValueError(f'phases.{phase}={phases[phase]}, but none of its losses is on ({", ".join(terms)} are all 0): '
                       f'give loss.{terms[0]} a weight, or set phases.{phase}=0')


def check_masks(ratio) -> None:
  if not 0 <= ratio[0] <= ratio[1] < 1:
    raise ValueError(f'extra_loss.mask_ratio={tuple(ratio)}: expected (lowest, highest) share of hidden blocks, both '
                     'from 0 to below 1; (0, 0) = off')


def check_patches(config) -> None:
  more, loss, phases = config.extra_loss, config.loss, config.phases
  if more.patch and (more.coding_rate or not any(more.mask_ratio) or phases.ct and not loss.ct
                     or phases.xray and not loss.xray):
    raise ValueError(f'extra_loss.patch={more.patch} compares the tokens of hidden blocks by the prototypes of the '
                     'whole view: set extra_loss.mask_ratio, loss.ct and loss.xray, and extra_loss.coding_rate=0')


def check_local(config, model) -> None:
  more, loss, phases = config.extra_loss, config.loss, config.phases
  crops, size = more.local.crops, more.local.size
  if crops < 0 or crops and (more.coding_rate or not loss.xray or not phases.xray):
    raise ValueError(f'extra_loss.local.crops={crops} compares small crops of X-rays with the prototypes of its two '
                     'views: set phases.xray, loss.xray and extra_loss.coding_rate=0, or 0 crops')
  if crops:
    try:
      model.check((size,) * 2, model.in_channels[0])
    except ValueError as e:
      raise ValueError(f'extra_loss.local.size: {e}') from e
