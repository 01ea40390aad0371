"""Which modality a step trains on: a pure function of the step."""


def schedule(phases, steps_per_epoch: int):
  """CT first, then X-ray, by whole epochs, by steps, or both at once.

  Args:
    phases: unit ('epoch' | 'step' | 'joint') and the number of units of `ct` and `xray` per turn.
    steps_per_epoch: length of an epoch of either phase.

  Returns:
    (step -> (phase name, boundary or None), names of the phases that occur); the boundary is
    ('epoch', n) at the first step of epoch n.
  """
  if phases.unit == 'joint':
    names, phase = ('joint',), lambda step: 'joint'
  else:
    turn = phases.ct + phases.xray
    length = steps_per_epoch if phases.unit == 'epoch' else 1
    names = tuple(n for n in ('ct', 'xray') if phases[n])
    phase = lambda step: 'ct' if (step // length) % turn < phases.ct else 'xray'

  def at(step: int):
    epoch, inside = divmod(step, steps_per_epoch)
    return phase(step), None if inside else ('epoch', epoch)
  return at, names
