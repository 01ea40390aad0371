"""Metrics on disk: metrics.jsonl always, TensorBoard events where tensorboardX is installed. No TensorFlow."""
import json
import logging
import math

from etils import epath


class Writer:
  """One object per run, on process 0 only.

  Rows of a former life of the run behind `first_step` are dropped, so a resumed run has each step once.
  """

  def __init__(self, workdir, first_step: int = 0, tensorboard: bool = True):
    self.path = epath.Path(workdir) / 'metrics.jsonl'
    rows = self.path.read_text().splitlines() if self.path.exists() else []
    kept = [r for r in rows if _step(r) is not None and _step(r) < first_step]
    self.path.write_text(''.join(r + '\n' for r in kept))
    self._file = self.path.open('a')
    self._board = _board(workdir, first_step) if tensorboard else None

  def write_scalars(self, step: int, scalars: dict, phase: str = '') -> None:
    """One line {"step", "phase", name: value}; a value that is not finite is written as null."""
    row = {'step': int(step)} | ({'phase': phase} if phase else {})
    row |= {k: _plain(v) for k, v in scalars.items()}
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    if self._board:
      for k, v in scalars.items():
        if math.isfinite(v):
          self._board.add_scalar(f'{k}/{phase}' if phase else k, float(v), int(step))

  def write_images(self, step: int, images: dict) -> None:
    """{name: [H, W, 3] uint8}, TensorBoard only (the PNG files are the report's)."""
    if self._board:
      for k, v in images.items():
        self._board.add_image(k, v, int(step), dataformats='HWC')

  def close(self) -> None:
    self._file.close()
    if self._board:
      self._board.close()


def _plain(v):
  v = v.item() if hasattr(v, 'item') else v
  return None if isinstance(v, float) and not math.isfinite(v) else v


def _step(row: str):
  """Step of a line; None for a line torn by a crash."""
  try:
    return json.loads(row)['step']
  except (ValueError, KeyError, TypeError):
    return None


def _board(workdir, first_step):
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    logging.warning('tensorboardX is not installed: metrics go to metrics.jsonl only')
    return None
  return SummaryWriter(str(workdir), purge_step=first_step or None)
