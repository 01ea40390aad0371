"""Metrics on disk: metrics.jsonl always, TensorBoard events where tensorboardX is installed. No TensorFlow."""
import json
import logging
import math

from etils import epath

EVAL = 'eval'      # phase of evaluation rows


class Writer:
  """One object per run, on process 0 only.

  Rows of a former life of the run behind its checkpoint are dropped, so a resumed run has each step once: training
  rows carry the index of their step (kept below `first_step`), evaluations the number of steps taken (kept up to it).
  """

  def __init__(self, workdir, first_step: int = 0, tensorboard: bool = True):
    self.path = epath.Path(workdir) / 'metrics.jsonl'
    rows = self.path.read_text().splitlines() if self.path.exists() else []
    kept = [r for r in rows if _belongs(r, first_step)]
    if len(kept) < len(rows):
      new = self.path.with_suffix('.new')       # a full disk must not cost the history
      new.write_text(''.join(r + '\n' for r in kept))
      new.replace(self.path)
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


def _belongs(row: str, first_step: int) -> bool:
  """False for a line from behind the checkpoint, or torn by a crash."""
  try:
    row = json.loads(row)
    return row['step'] < first_step + (row.get('phase') == EVAL and first_step > 0)
  except (ValueError, KeyError, TypeError):
    return False


def _board(workdir, first_step):
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    logging.warning('tensorboardX is not installed: metrics go to metrics.jsonl only')
    return None
  return SummaryWriter(str(workdir), purge_step=first_step + 1 if first_step else None)
