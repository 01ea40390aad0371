"""What porting refuses."""


class PortingError(Exception):
  """Weights are missing, unexpected, mis-shaped, unreadable or unsafe; the message names them and what to do."""


def check_tensors(path, found: dict, shapes: dict) -> None:
  """Raises PortingError that names every tensor that is missing, unexpected or mis-shaped.

  Args:
    path: for the message.
    found: name -> array.
    shapes: name -> shape that is expected.
  """
  faults = {'missing': sorted(set(shapes) - set(found)), 'unexpected': sorted(set(found) - set(shapes)),
            'mis-shaped': [f'{n} {found[n].shape}, expected {tuple(shape)}' for n, shape in shapes.items()
                           if n in found and found[n].shape != tuple(shape)]}
  told = [f'{len(names)} {what}: {", ".join(names[:8])}{" ..." if len(names) > 8 else ""}'
          for what, names in faults.items() if names]
  if told:
    raise PortingError(f'{path}: {"; ".join(told)}. FIX: take weights of the architecture that is asked for')
