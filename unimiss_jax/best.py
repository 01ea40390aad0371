"""best/: the one checkpoint with the highest eval.select, and when to stop waiting for a higher one."""
import logging

from unimiss_jax import processes
from unimiss_jax.checkpoint import Checkpoints


class Best:
  """Process 0 decides for all.

  Args:
    folder: best/ of the run.
    cfg: config.eval; reads select, patience, every.
  """

  def __init__(self, folder, cfg):
    self.cfg = cfg
    self.checkpoints = Checkpoints(folder, 1)
    self._value, self._at = self._so_far() if processes.main() else (None, None)

  def offer(self, at: int, state, values: dict, about: dict) -> None:
    """Saves the state of step `at` if its score rose."""
    name = self.cfg.select
    value = values.get(name)
    if value is None:
      logging.warning('eval.select="%s" is not among the scores (%s): no best checkpoint is kept', name,
                      ', '.join(values) or 'none')
    rose = lambda: (value is not None and (self._value is None or value > self._value)
                    and at not in self.checkpoints.steps())
    if processes.on_main(rose):
      self._value, self._at = value, at
      self.checkpoints.save(at, state, about | {'select': name, 'value': value})

  def exhausted(self, at: int) -> bool:
    """Whether eval.patience evaluations up to step `at` brought nothing better."""
    late = lambda: self._at is not None and at - self._at >= self.cfg.patience * self.cfg.every
    return bool(self.cfg.patience and self.cfg.every) and processes.on_main(late)

  def restore(self, template):
    """(state, meta) of the best step, or None."""
    self.checkpoints.wait()
    return self.checkpoints.restore(template)

  def _so_far(self) -> tuple:
    """Score and step of what lies there, if it is of the kind that eval.select names."""
    try:
      at = self.checkpoints.steps()[-1]
      meta = self.checkpoints.meta(at)
      return (meta['value'], at) if meta['select'] == self.cfg.select else (None, None)
    except Exception:      # none yet, or torn
      return None, None
