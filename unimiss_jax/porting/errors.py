"""What porting refuses."""


class PortingError(Exception):
  """Weights are missing, unexpected, mis-shaped, unreadable or unsafe; the message names them and what to do."""
