"""Metrics on disk: metrics.jsonl always, TensorBoard events where tensorboardX is installed. No TensorFlow. The same
numbers and pictures to Weights & Biases where log.wandb names a project."""
import hashlib
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

  def __init__(self, workdir, first_step: int = 0, tensorboard: bool = True, project: str = '', config=None):
    """project: of Weights & Biases, '' = none; config: what it is told of the run."""
    self.path = epath.Path(workdir) / 'metrics.jsonl'
    rows = self.path.read_text().splitlines() if self.path.exists() else []
    kept = [r for r in rows if _belongs(r, first_step)]
    if len(kept) < len(rows):
      new = self.path.with_suffix('.new')       # a full disk must not cost the history
      new.write_text(''.join(r + '\n' for r in kept))
      new.replace(self.path)
    self._file = self.path.open('a')
    self._board = _board(workdir, first_step) if tensorboard else None
    self._wandb = _wandb(workdir, project, config) if project else None

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
    if self._wandb:
      finite = {f'{k}/{phase}' if phase else k: float(v) for k, v in scalars.items() if math.isfinite(v)}
      self._wandb.log(finite | {'step': int(step)})

  def write_images(self, step: int, images: dict) -> None:
    """{name: [H, W, 3] uint8}, not for metrics.jsonl (the PNG files are the report's)."""
    if self._board:
      for k, v in images.items():
        self._board.add_image(k, v, int(step), dataformats='HWC')
    if self._wandb:
      import wandb
      self._wandb.log({k: wandb.Image(v) for k, v in images.items()} | {'step': int(step)})

  def close(self) -> None:
    self._file.close()
    if self._board:
      self._board.close()
    if self._wandb:
      self._wandb.finish()


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


def _wandb(workdir, project: str, config):
  """The run of this folder there, which a resumed run goes on with: rows since its last checkpoint stand there twice.
  None where it cannot be begun: training does not wait for it."""
  import wandb
  name = str(epath.Path(workdir).resolve())
  try:
    run = wandb.init(project=project, dir=str(workdir), name=name.rsplit('/', 1)[-1], resume='allow', config=config,
                     id=hashlib.sha256(name.encode()).hexdigest()[:16], settings=wandb.Settings(console='off'))
  except Exception as e:
    logging.warning('Weights & Biases: no run was begun (%s: %s). FIX: WANDB_MODE=offline keeps it on disk for '
                    '`wandb sync`', type(e).__name__, e)
    return None
  run.define_metric('*', step_metric='step')
  return run
