"""Is this run healthy? The disease by name, the evidence and the knob to turn, from rows of metrics.jsonl alone.

Thresholds are chosen by us on runs of the phantom presets, healthy ones and provoked diseases (tests/test_health.py);
where a level is known (ln K, chance, a still teacher) it comes from the config, never from a constant. Only what lasts
counts: of the last rows of a phase all must show it, so that one odd batch makes no disease.

Three healthy runs of 4,000 steps, which learn kNN and pairs, come down to RankMe 1.28 and feature std .015: RankMe does
not centre, so what all embeddings share counts. They tell samples apart all the same, as their InfoNCE shows. A run
that collapsed (pilot, 2,048 prototypes, rate 4e-3) comes to 1.13 and .008, and its teacher says the same of all
samples: its entropy and that of the mean over the batch differ by less than .01 nats.

Of small batches InfoNCE may come to above ln K although pairs are told apart, where wrong answers are few but certain.
Cosines say so: without them 11 to 26 of 71 verdicts on runs of 100 steps, and one on the demo, were wrong; with them
none was, and of those on shuffled pairs 69 of 71 were right.

Reconstruction is held against one grey per picture, which tells nothing. Of blocks of 4 x 4 pixels, the other baseline
on record, healthy runs of 600 steps on phantoms show less (.02 of a DRR; blocks .003, grey .03): it is no limit.
"""
from __future__ import annotations

import math
from typing import NamedTuple

from unimiss_jax.writers import EVAL

LAST = 3            # rows of a phase that must agree
KEPT = 400          # rows of steps that are looked at, of all phases
LEARNT = .5         # share of the run after which pairs must be told apart; at .48 those of half a demo are not yet
EARLY = .3          # share of the run in which losses may still stand at chance; those of the demo do for .25
REBUILT = .5        # share in which reconstructions may tell nothing; those of healthy runs do for .37
CODED = .5          # share of a phase in which clusters may stand at chance; a healthy run of 120 steps does for .25
NEAR_UNIFORM = .02  # of ln K
ONE = .05           # of ln K: entropy of the mean over a batch
SAME = .02          # nats that the teacher's answer tells about which sample it was,
SHARP = .25         # of ln K: where its entropy is below; a young teacher near uniform may not tell anything yet
DEAD_STD, DEAD_RANK = 5e-3, 1.1
NARROW_RANK = 1.5   # dead as well, where the losses do not tell samples apart
APART = .9          # of chance: a contrastive loss below it does
TELLS = .2          # nats that the teacher's answer tells about the sample: so does this
STILL = 1e-7        # norm of an update
SPIKE = 20.         # times the median gradient norm before
BEFORE, RECENT = 10, 20    # rows: of the median that a loss is held against, and among which spikes are counted
OUT, JUMP = 10., .5        # a spike is so many times the spread of those rows, and such a share of their median, above
FALLS, FALL = 3, .03       # evaluations in which a score falls, to so much below its best
SETTLED = .05              # of 1: samples that stay together from epoch to epoch
CROWDED, EMPTY = .9, .5    # share of the samples in one cluster, share of the clusters without any
STARVED = .2        # share of the time spent waiting for data
FLAT = .5           # share of views that show nothing
APART_BY = .01      # cosine: pairs are nearer to each other than to others by this, where no chance level is known
WRONG = 1.02        # of chance: a loss above is that of wrong answers; pairs are told apart all the same where they are
NEARER, AMONG = .1, 20     # nearer by this cosine in the mean over so many rows
CONTRASTIVE = {'train/nce_loss': 'two views of one sample', 'train/pair_nce_loss': 'a CT and its DRR',
               'train/vl_loss': 'an image and its report'}
TERMS = 'intra', 'inter'    # of clustering
DONE = 'perf/done'  # share of the run that is over


class Finding(NamedTuple):
  """disease: short name; evidence: what was seen; remedy: the knob."""
  disease: str
  evidence: str
  remedy: str


def findings(rows: list[dict], config, chance: dict[str, dict[str, float]]) -> list[Finding]:
  """What is wrong, causes before their effects; [] = healthy.

  Args:
    rows: of metrics.jsonl, in order, those of evaluations among them.
    config: of the run.
    chance: {phase: {metric: value for a network that tells nothing apart}}.
  """
  of = {p: ([r for r in rows if r.get('phase') == p], levels) for p, levels in chance.items()}
  of |= {EVAL: ([r for r in rows if r.get('phase') == EVAL], {})}
  of |= {f'{p}, X-rays': (of_xrays(mine), of_xrays([levels])[0]) for p, (mine, levels) in of.items()
         if mine and any('/xray_' in k for k in mine[-1])}
  return [f for check, _ in CHECKS.values() for phase, (mine, levels) in of.items() if len(mine) >= LAST
          for f in check(phase, mine, config, levels)]


class Judge:
  """What a run has told so far, as far as a verdict needs it."""

  def __init__(self, config, chance, rows: list[dict]):
    """config, chance: of `findings`; rows: of former lives."""
    self.config, self.chance, self.rows = config, chance, kept(rows)

  def add(self, step: int, phase: str, values: dict) -> None:
    self.rows = kept([*self.rows, {'step': step, 'phase': phase} | values])

  def verdict(self, steps: int) -> tuple[list[Finding], str]:
    """What is wrong after so many steps, and the line that says so."""
    found = findings(self.rows, self.config, self.chance)
    return found, line(steps, found, self.rows)


def kept(rows: list[dict]) -> list[dict]:
  """The rows that a verdict needs: the last of steps, and all of evaluations, which are few."""
  return [r for r in rows if r.get('phase') == EVAL] + [r for r in rows if r.get('phase') != EVAL][-KEPT:]


def of_xrays(rows: list[dict]) -> list[dict]:
  """What rows of steps that see both modalities say of X-rays ('train/xray_nce_loss'), under the usual names."""
  keep = lambda k: k in ('step', DONE) or '/xray_' in k
  return [{k.replace('/xray_', '/', 1): v for k, v in r.items() if keep(k)} for r in rows]


def line(step: int, found: list[Finding], rows: list[dict]) -> str:
  """'HEALTH step 400: ...', one line for a log."""
  if found:
    others = list(dict.fromkeys(f.disease for f in found if f.disease != found[0].disease))      # phases repeat it
    more = f' (and: {", ".join(others)})' if others else ''
    return f'HEALTH step {step}: {found[0].disease}: {found[0].evidence}. FIX: {found[0].remedy}{more}'
  last = {k: v for r in rows for k, v in r.items()}
  shown = [f'{name} {last[key]:.3g}' for name, key in (
      ('entropy', 'collapse/teacher_entropy'), ('rankme', 'collapse/rankme'), ('feature std', 'collapse/feature_std'))
           if key in last]
  return f'HEALTH step {step}: healthy' + (f' ({", ".join(shown)})' if shown else '')


def _last(rows, key) -> list[float]:
  """Values of the last rows; [] unless all have one."""
  values = [r.get(key) for r in rows[-LAST:]]
  return [] if None in values else values


def not_finite(phase, rows, config, chance):
  if any(r.get('train/skipped') for r in rows[-LAST:]):
    n = sum(bool(r.get('train/skipped')) for r in rows)
    yield Finding('not finite', f'{phase}: loss or gradient of step {rows[-1]["step"]} or before is not finite, {n} '
                  'steps skipped', 'look at nan/ for the records; lower optim.lr or set optim.clip')


def flat_input(phase, rows, config, chance):
  share = _last(rows, 'data/flat_views')
  if share and min(share) > FLAT:
    yield Finding('empty views', f'{phase}: {min(share):.0%} of the views show the same value everywhere',
                  'look at the input sheets; check views.* (scale, mul, gamma) and the intensities of the data')


def still_student(phase, rows, config, chance):
  keys = [k for k in rows[-1] if k.startswith('train/update_norm_') and not k.endswith(('_3d', '_last_layer'))]
  moves = [v for k in keys for v in _last(rows, k)]
  if moves and max(moves) < STILL:
    yield Finding('frozen student', f'{phase}: the largest change of the weights in a step is {max(moves):.1g}',
                  f'raise optim.lr (now {rows[-1].get("train/lr", float("nan")):.1g}); check what is frozen')


def still_teacher(phase, rows, config, chance):
  momentum = _last(rows, 'train/momentum')
  if momentum and min(momentum) >= 1 and (_done(config, rows) or 1.) < .99:
    yield Finding('frozen teacher', f'{phase}: the momentum of the teacher is {momentum[-1]:g}, it never follows',
                  'set ema.momentum below 1, .99 for short runs to .9995 for long ones')


def uniform_teacher(phase, rows, config, chance):
  levels, entropy = math.log(config.head.out_dim), _last(rows, 'collapse/teacher_entropy')
  if entropy and min(entropy) > (1 - NEAR_UNIFORM) * levels:
    yield Finding('uniform teacher', f'{phase}: teacher entropy {entropy[-1]:.3f} of ln {config.head.out_dim} = '
                  f'{levels:.3f}', 'lower loss.teacher_temp or head.out_dim, check loss.center_momentum')


def one_prototype(phase, rows, config, chance):
  levels, told = math.log(config.head.out_dim), _told(rows)
  entropy, teacher = _last(rows, 'collapse/batch_entropy'), _last(rows, 'collapse/teacher_entropy')
  if entropy and max(entropy) < ONE * levels:
    evidence = f'entropy of the mean over a batch {entropy[-1]:.3f}: all samples choose the same'
  elif told and max(told) < SAME and max(entropy) < SHARP * levels and _late(config, rows):
    evidence = (f'the teacher says the same of all samples: entropy {teacher[-1]:.3f}, of the mean over a batch '
                f'{entropy[-1]:.3f}')
  else:
    return
  yield Finding('one prototype', f'{phase}: {evidence}',
                'raise loss.teacher_temp, lower loss.center_momentum; lower optim.lr or head.out_dim')


def dead_features(phase, rows, config, chance):
  std, rank = _last(rows, 'collapse/feature_std'), _last(rows, 'collapse/rankme')
  dead = std and max(std) < DEAD_STD or rank and max(rank) < DEAD_RANK
  if dead or rank and max(rank) < NARROW_RANK and _late(config, rows) and _alike(rows, chance):
    yield Finding('dead features', f'{phase}: embeddings {"do not" if dead else "hardly"} differ between samples (std '
                  f'{std[-1] if std else float("nan"):.1g}, effective rank {rank[-1] if rank else float("nan"):.2f})',
                  'lower optim.lr; model.init=fan_in, model.final_norm=True, head.batch_standardize=True')


def exploding(phase, rows, config, chance):
  norms = [r['train/grad_norm'] for r in rows if r.get('train/grad_norm') is not None]
  if len(norms) > 2 * LAST:
    before = sorted(norms[:-LAST])[(len(norms) - LAST) // 2]
    if min(norms[-LAST:]) > SPIKE * before:
      yield Finding('exploding gradient', f'{phase}: gradient norm {norms[-1]:.3g}, median before {before:.3g}',
                    'lower optim.lr, set optim.clip=1, lengthen optim.warmup_epochs')


def spikes(phase, rows, config, chance):
  """Losses that keep leaping, or have leapt and stay up."""
  told = [(r['step'], r['train/loss']) for r in rows if r.get('train/loss') is not None]
  found = []
  for i in range(max(BEFORE, len(told) - RECENT), len(told)):
    middle, spread = _middle([v for _, v in told[i - BEFORE:i]])
    if told[i][1] > middle + max(OUT * spread, JUMP * abs(middle)):
      found.append((*told[i], middle))
  if len(found) >= LAST:
    step, value, middle = max(found, key=lambda f: f[1] - f[2])
    yield Finding('loss spikes', f'{phase}: {len(found)} of the last {min(RECENT, len(told) - BEFORE)} losses are far '
                  f'above those before, at step {step} {value:.3g}, median before {middle:.3g}',
                  'lower optim.lr, set optim.clip=1, lengthen optim.warmup_epochs; look for odd records in the data')


def at_chance(phase, rows, config, chance):
  """Pairs that are none: long after the start the network cannot tell them apart."""
  if (_done(config, rows) or 0.) < LEARNT:
    return
  for key, what in CONTRASTIVE.items():
    values, gap = _last(rows, key), _last(rows, gap_of(key))
    blind = values and min(values) >= .98 * chance[key] if key in chance else gap and max(gap) < APART_BY
    wrong = key in chance and values and max(values) > WRONG * chance[key]
    if blind and not (wrong and _mean(rows, gap_of(key)) > NEARER):
      told = [f'{key[6:]} {values[-1]:.3f}, chance {chance[key]:.3f}'] if key in chance else []
      told += [f'cosine of pairs {gap[-1]:+.3f} beside that of others'] if gap else []
      yield Finding('pairs do not match', f'{phase}: {", ".join(told)}: {what} cannot be told from those of others',
                    'check that they belong together; weaken views.*, raise batch.* or optim.lr')


def gap_of(loss: str) -> str:
  """'train/nce_loss' -> the metric that says how much nearer its pairs are."""
  return loss.replace('train/', 'collapse/').replace('_loss', '_gap')


def temperature(phase, rows, config, chance):
  scale = _last(rows, 'train/log_scale')
  if scale and max(scale) < 0:
    yield Finding('temperature ran away', f'{phase}: cosines are divided by {math.exp(-scale[-1]):.3g}, at 1 and above '
                  'no pair can stand out', 'lower optim.lr; check that images and reports belong together')


def nothing_rebuilt(phase, rows, config, chance):
  if (_done(config, rows) or 0.) < REBUILT:
    return
  for kind in ('ct', 'drr', 'xray'):
    loss, grey = _last(rows, f'train/recon_{kind}_loss'), _last(rows, f'collapse/grey_recon_{kind}')
    if loss and grey and all(a >= b for a, b in zip(loss, grey)):
      blur = rows[-1].get(f'collapse/blur_recon_{kind}', float('nan'))
      yield Finding('nothing reconstructed', f'{phase}: recon_{kind}_loss {loss[-1]:.3g}, one grey per picture gives '
                    f'{grey[-1]:.3g}, blocks of 4 x 4 pixels {blur:.3g}',
                    f'raise loss.recon_{kind} or optim.lr; check the range of the input (see the sheets)')


def falling(phase, rows, config, chance):
  """A score that falls from evaluation to evaluation."""
  asked = config.get('eval', {}).get('select', '')
  keys = [k for k in rows[-1] if k == asked or k.startswith('eval/knn_auc') and k.count('/') == 1]
  for key in keys if phase == EVAL else ():
    values = [(r['step'], r[key]) for r in rows if r.get(key) is not None]
    last = [v for _, v in values[-FALLS:]]
    step, best = max(values[:-FALLS], key=lambda v: v[1], default=(0, -math.inf))
    if len(values) > FALLS and max(last) < best and last[-1] < best - FALL and last == sorted(last, reverse=True):
      yield Finding('scores fall', f'{key} {last[-1]:.3f}, at step {step} {best:.3f}, falling for {FALLS} evaluations',
                    'best/ keeps the best weights (eval.select); lower optim.lr, or end earlier: eval.patience')


def one_cluster(phase, rows, config, chance):
  """Codes that are all alike, or clusters of which most are empty."""
  for term in TERMS:
    mean, largest, empty = (_last(rows, f'clusters/{term}_{k}') for k in ('batch_entropy', 'largest', 'empty'))
    k = (config.head.out_dim if term == 'intra' else config.joint.prototypes) if mean else 0
    if mean and max(mean) < ONE * math.log(k):
      evidence = f'entropy of the mean over a batch {mean[-1]:.3f} of ln {k} = {math.log(k):.3f}: all choose the same'
    elif largest and (min(largest) > CROWDED or min(empty) > EMPTY):
      evidence = f'{largest[-1]:.0%} of the samples are in one cluster, {empty[-1]:.0%} of the clusters are empty'
    else:
      continue
    yield Finding('one cluster', f'{phase}: {term}: {evidence}', 'lower optim.lr; head.batch_standardize=True; longer '
                  'joint.freeze_prototypes; fewer joint.image_clusters or joint.volume_clusters')


def at_random(phase, rows, config, chance):
  """Codes or clusters that the network does not predict, although its phase is half over.

  Losses of single batches of a healthy run come to chance as well; then its codes tell samples apart.
  """
  for term in TERMS:
    key = f'train/{term}_loss'
    values, told = _last(rows, key), _told(rows, f'clusters/{term}_batch_entropy', f'clusters/{term}_entropy')
    blind = values and key in chance and min(values) >= .98 * chance[key] and not (told and max(told) > SAME)
    if blind and _of_phase(phase, rows, config) >= CODED:
      yield Finding('clusters at chance', f'{phase}: {term}_loss {values[-1]:.3f}, chance {chance[key]:.3f}'
                    + (f', codes tell {told[-1]:.3f} nats of a sample' if told else ''),
                    'head.batch_standardize=True for images, joint.standardize_volumes=True for volumes; fewer '
                    'clusters or prototypes, or a joint.image_queue or joint.volume_queue')


def unsettled(phase, rows, config, chance):
  """Clusters that are new ones in every epoch."""
  for term in TERMS:
    together = _last(rows, f'clusters/{term}_kept')
    if together and max(together) < SETTLED and _late(config, rows):
      yield Finding('clusters do not settle', f'{phase}: {term}: who shares a cluster shares it an epoch later no more '
                    f'often than by chance (index {together[-1]:.3f} of 1)',
                    'lower optim.lr or joint.rates; fewer clusters, more joint.kmeans_rounds')


def starved(phase, rows, config, chance):
  rows = [r for r in rows if r.get(DONE) != 1]      # the last step of a run waits for no other batch
  wait = _last(rows, 'data/wait_frac')
  if len(wait) == LAST and min(wait) > STARVED:
    yield Finding('data starvation', f'{phase}: {min(wait):.0%} of the time is spent waiting for data',
                  'raise data.workers, prepare the data, data.views_per_read, or data.place=device')


CHECKS = {      # disease: check, what it reads; the cause before its effects
    'not finite': (not_finite, 'train/skipped'), 'empty views': (flat_input, 'data/flat_views'),
    'frozen student': (still_student, 'train/update_norm_rest'), 'frozen teacher': (still_teacher, 'train/momentum'),
    'one prototype': (one_prototype, 'collapse/batch_entropy'),
    'uniform teacher': (uniform_teacher, 'collapse/teacher_entropy'),
    'one cluster': (one_cluster, tuple(f'clusters/{t}_{k}' for t in TERMS for k in ('batch_entropy', 'largest'))),
    'clusters at chance': (at_random, tuple(f'train/{t}_loss' for t in TERMS)),
    'clusters do not settle': (unsettled, tuple(f'clusters/{t}_kept' for t in TERMS)),
    'dead features': (dead_features, 'collapse/rankme'), 'exploding gradient': (exploding, 'train/grad_norm'),
    'loss spikes': (spikes, 'train/loss'), 'pairs do not match': (at_chance, tuple(CONTRASTIVE)),
    'temperature ran away': (temperature, 'train/log_scale'),
    'nothing reconstructed': (nothing_rebuilt, tuple(f'collapse/grey_recon_{k}' for k in ('ct', 'drr', 'xray'))),
    'scores fall': (falling, ('eval/knn_auc_ct', 'eval/knn_auc_xray')), 'data starvation': (starved, 'data/wait_frac')}


def _mean(rows, key) -> float:
  """Of the last AMONG rows that have it; -inf where none has."""
  values = [r[key] for r in rows[-AMONG:] if r.get(key) is not None]
  return sum(values) / len(values) if values else -math.inf


def _middle(values) -> tuple:
  """Median, and median distance from it."""
  median = lambda x: sorted(x)[len(x) // 2]
  middle = median(values)
  return middle, median([abs(v - middle) for v in values])


def _told(rows, mean='collapse/batch_entropy', own='collapse/teacher_entropy') -> list[float]:
  """What an answer (of the teacher) tells about which sample it was, in nats, in the last rows; [] where it is not
  known. mean, own: the entropy of all answers together, and that of one."""
  return [b - t for b, t in zip(_last(rows, mean), _last(rows, own))]


def _alike(rows, chance) -> bool:
  """Whether all that the last rows say of it is that samples look alike; False where they say nothing."""
  contrast = [r[key] < APART * chance[key] for r in rows[-LAST:] for key in CONTRASTIVE
              if key in chance and r.get(key) is not None]
  said = contrast + [nats > TELLS for nats in _told(rows)]
  return bool(said) and not any(said)


def _late(config, rows) -> bool:
  return (_done(config, rows) or 0.) >= EARLY


def _of_phase(phase, rows, config) -> float:
  """Share of a phase that is over, of those that come one after the other; else of the run."""
  done, phases = _done(config, rows) or 0., tuple(config.get('joint', {}).get('phases', ()))
  if phase not in phases:
    return done
  i = phases.index(phase)
  return (done - sum(config.joint.shares[:i])) / config.joint.shares[i]


def _done(config, rows) -> float | None:
  """Share of the run that is over; None where nothing tells."""
  return rows[-1].get(DONE, rows[-1]['step'] / config.steps if config.steps else None)
