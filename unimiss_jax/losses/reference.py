"""What the released UniMiSS+ code does with the centre of its self-distillation, and we would not."""


def center_of_next(before, after):
  """The centre that the next loss of the same step uses: `after`, as the last loss has left it.

  So the losses of a step use different centres, and its three updates with the same teacher logits leave only
  momentum^3 of the old one.
  """
  return after
