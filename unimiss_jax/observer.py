"""What a run measures and shows of itself beside its losses: scores on unseen samples, picture sheets.

Every process computes (the weights may be split over all of them) and gets the same values; process 0 writes.
"""
import jax
import numpy as np
from etils import epath

from unimiss_jax import sharding
from unimiss_jax.evals import online, retrieval, supervised
from unimiss_jax.report import sheets

ROWS = 50                # samples per call of the embedding, at least; chosen by us
VOXELS = 300_000         # of one call of a task's network, about; chosen by us


class Observer:
  """evalset, preview: as data_pipelines.evalset makes them; evalset may be None."""

  def __init__(self, config, method, mesh, evalset, preview):
    self.config, self.mesh, self.evalset, self.preview = config, mesh, evalset, preview
    weights = method.weights['teacher' if 'teacher' in method.weights else 'student']
    self._predict = {n: jax.jit(lambda s, b, f=f: f(weights(s.params, s.extra), s.extra, b),
                                out_shardings=sharding.replicated(mesh))
                     for n, f in method.predict.items()}

  def scores(self, state, at: int) -> dict[str, float]:
    """{'eval/...': value}; at step 0 of pre-training also 'eval/raw_...', the same from raw pixels."""
    if 'task' in self.config:
      task, logits = self.config.task, self.logits(state, self.evalset)
      outcome = (supervised.classify(logits, self.evalset, task.exclusive) if task.kind == 'cls' else
                 supervised.segment(logits, self.evalset, task))
      return {f'eval/{k}': v for k, v in outcome.scores.items() if np.isfinite(v)}
    features = {k: self.embedding(state, k, x[:, 0]) for k, x in self.evalset.views.items()}
    pairs = ({k: self._apply('project', state, {k: e[:, None]})[k][:, 0] for k, e in features.items()}
             if 'project' in self._predict else features)
    values = online.run(features, self.evalset, self.config.eval.tasks, pairs)
    if self.evalset.studies:
      said = self._apply('text', state, self.evalset.studies['reports'])['text']
      looked_at = self._apply('planes', state, {'ct': self.evalset.views['ct']})['ct'][:, 0]
      values |= retrieval.studies(pairs, said, looked_at, self.evalset.studies, features)
    values = {k: v for k, v in values.items() if np.isfinite(v)}
    if at == 0:
      values |= online.control(self.evalset, self.config.eval.tasks, self.config.drr.view)
    return values

  def logits(self, state, cases):
    """[N, *S, C] -> what the network of a task says, [N, ...]; in calls of one static size."""
    rows = max(1, min(ROWS, VOXELS // int(np.prod(cases.size))))
    if self.config.task.kind == 'seg' and cases.stream == 'xray':
      rows = 1                                    # the whole picture is one window
    return lambda x: self._apply('logits', state, {cases.stream: x[:, None]}, rows)[cases.stream][:, 0]

  def embedding(self, state, stream: str, views) -> np.ndarray:
    """[N, *S, C] of a stream -> [N, E]."""
    return self._apply('embed', state, {stream: views[:, None]})[stream][:, 0]

  def tests(self) -> int:
    """Size of the retrieval gallery."""
    fit = getattr(self.evalset, 'fit', {})
    return int((~fit['ct']).sum()) if 'ct' in fit else 0

  def reconstructions(self, state) -> dict:
    """Of the previewed views, {field: [n, 2, ...] in [0, 1]}; empty for a method that does not reconstruct."""
    out = {}
    if 'reconstruct' in self._predict:
      for part in self.preview.values():
        out |= self._apply('reconstruct', state, part['views'])
    return out

  def sheets(self, folder, at: int, reconstructions) -> dict:
    """Writes report/*.png below `folder`; returns {stream: (path, [H, W, 3] uint8)}."""
    made = sheets.write(folder, at, self.preview, reconstructions, self.config.drr.view)
    return {epath.Path(p).stem.split('_')[0]: (p, np.stack([np.asarray(s)] * 3, -1)) for p, s in made.items()}

  def _apply(self, name, state, batch, rows: int = 0) -> dict:
    """predict[name] of rows that every process holds, in calls of one static size: `rows`, or as many as fit."""
    n = len(next(iter(batch.values())))
    devices = self.mesh.size
    size = -(-(rows or min(ROWS, n)) // devices) * devices
    parts = []
    for start in range(0, n, size):
      at = np.minimum(np.arange(start, start + size), n - 1)
      rows = {k: sharding.from_whole(x[at], self.mesh) for k, x in batch.items()}
      parts.append(jax.device_get(self._predict[name](state, rows)))
    return {k: np.concatenate([p[k] for p in parts])[:n] for k in parts[0]} if parts else {}
