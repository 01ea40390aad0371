"""The one exception of the data path: which file, what was found, what to do."""


class DataError(Exception):
  """A file (or a folder) that cannot be used.

  Attributes:
    code: short upper-case name of the fault, e.g. 'TRUNCATED'.
    path: the file, for the message.
    reason: what was found and what was expected.
    remedy: what the user can do.
  """

  def __init__(self, code: str, path, reason: str, remedy: str):
    self.code, self.path = code, ' '.join(str(path).splitlines())    # one line, whatever a file is called
    self.reason, self.remedy = ' '.join(str(reason).split()), ' '.join(str(remedy).split())
    super().__init__(f'{code} {self.path}: {self.reason}. FIX: {self.remedy}')

  def __reduce__(self):    # so that worker processes can send it
    return type(self), (self.code, self.path, self.reason, self.remedy)
