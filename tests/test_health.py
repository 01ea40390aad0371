"""Each disease has its own name, from rows that show it; a run of the demo shows none."""
import math

import pytest

from configs import joint, unimiss_plus
from unimiss_jax import health
from unimiss_jax.methods import base

HEALTHY = {'train/loss': 2., 'train/grad_norm': 1., 'train/update_norm_rest': .01, 'train/lr': 1e-3, 'train/skipped': 0,
           'train/momentum': .996, 'data/flat_views': 0., 'data/wait_frac': .01, 'collapse/teacher_entropy': 3.,
           'collapse/batch_entropy': 3.5, 'collapse/feature_std': .3, 'collapse/rankme': 5., 'train/nce_loss': 1.,
           'train/pair_nce_loss': .8, 'collapse/nce_gap': .4, 'collapse/pair_nce_gap': .3, 'train/recon_drr_loss': .02,
           'collapse/grey_recon_drr': .03, 'collapse/blur_recon_drr': .003, 'train/log_scale': 2.6}
K = 256
CHANCE = {'ct': {'train/nce_loss': math.log(15), 'train/pair_nce_loss': math.log(8)}}
DISEASES = {
    'not finite': {'train/skipped': 1, 'train/loss': None, 'train/grad_norm': None},
    'empty views': {'data/flat_views': .9},
    'frozen student': {'train/update_norm_rest': 0., 'train/update_norm_3d': .1},
    'frozen teacher': {'train/momentum': 1.},
    'uniform teacher': {'collapse/teacher_entropy': math.log(K) - .001, 'collapse/batch_entropy': math.log(K)},
    'one prototype': {'collapse/teacher_entropy': .01, 'collapse/batch_entropy': .02},
    'dead features': {'collapse/feature_std': 1e-5, 'collapse/rankme': 1.},
    'exploding gradient': {'train/grad_norm': 1e3},
    'loss spikes': {'train/loss': 9.},
    'pairs do not match': {'train/pair_nce_loss': 2.1},
    'temperature ran away': {'train/log_scale': -.2},
    'nothing reconstructed': {'train/recon_drr_loss': .05},
    'data starvation': {'data/wait_frac': .6},
}


@pytest.fixture(scope='module')
def config():
  c = unimiss_plus.get_config('phantom')
  c.unlock()
  c.head.out_dim, c.steps = K, 1000
  return c


def rows(n=20, sick=None, ill=health.LAST, **more):
  """n rows of a healthy run, of which the last `ill` have the values of `sick`."""
  out = [{'step': 30 * i, 'phase': 'ct'} | HEALTHY | more for i in range(n)]
  return [r | (sick if i >= n - ill else {}) for i, r in enumerate(out)] if sick else out


def names(found):
  return [f.disease for f in found]


def test_a_healthy_run(config):
  found = health.findings(rows(), config, CHANCE)
  assert not found
  assert health.line(400, found, rows()) == 'HEALTH step 400: healthy (entropy 3, rankme 5, feature std 0.3)'


@pytest.mark.parametrize('disease', DISEASES)
def test_a_disease_has_its_name_evidence_and_remedy(disease, config):
  found = health.findings(rows(sick=DISEASES[disease]), config, CHANCE)
  assert names(found) == [disease]
  told = health.line(400, found, rows())
  assert told.startswith(f'HEALTH step 400: {disease}: ct: ') and '. FIX: ' in told


def test_a_run_measured_in_epochs_is_judged_by_the_share_that_is_over(config):
  c = config.copy_and_resolve_references()
  c.steps, c.epochs = 0, 10
  of = lambda disease, done: names(health.findings(rows(sick=DISEASES[disease], **{health.DONE: done}), c, CHANCE))
  assert of('frozen teacher', .5) == ['frozen teacher'] and not of('frozen teacher', 1.)
  assert of('pairs do not match', .5) == ['pairs do not match'] and not of('pairs do not match', .01)


def test_xrays_of_steps_that_see_both_are_judged(config):
  sick = {k.replace('/', '/xray_', 1): v for k, v in DISEASES['dead features'].items()}
  found = health.findings(rows(sick=sick), config, CHANCE)
  assert names(found) == ['dead features'] and found[0].evidence.startswith('ct, X-rays: ')


@pytest.mark.parametrize('disease', [d for d in DISEASES if d != 'not finite'])
def test_one_odd_row_is_no_disease(disease, config):
  assert not health.findings(rows(sick=DISEASES[disease], ill=1), config, CHANCE)


def test_levels_come_from_the_config(config):
  """The entropy that is uniform among 256 prototypes is not among 65,536."""
  wide = config.copy_and_resolve_references()
  wide.head.out_dim = 65536
  assert not health.findings(rows(sick=DISEASES['uniform teacher']), wide, CHANCE)


def test_losses_may_stand_at_chance_at_first_and_the_teacher_still_at_the_end(config):
  assert not health.findings(rows(4, sick=DISEASES['pairs do not match']), config, CHANCE)
  assert not health.findings(rows(34, sick=DISEASES['frozen teacher']), config, CHANCE)


def test_the_last_step_of_a_run_waits_for_no_data(config):
  sick = rows(sick=DISEASES['data starvation'], ill=4)
  over = [*sick[:-1], sick[-1] | {health.DONE: 1., 'data/wait_frac': 0.}]
  assert names(health.findings(over, config, CHANCE)) == ['data starvation']
  assert not health.findings(over[-health.LAST:], config, CHANCE)      # two rows


def test_causes_come_before_effects(config):
  found = health.findings(rows(sick=DISEASES['data starvation'] | DISEASES['dead features'] | DISEASES['empty views']),
                          config, CHANCE)
  assert names(found) == ['empty views', 'dead features', 'data starvation']
  assert health.line(1, found, []).endswith('(and: dead features, data starvation)')


# Of a run that collapsed (pilot, 2,048 prototypes, rate 4e-3, step 31 to 51 of 200), and of one that did not although
# its embeddings share much (phantom_long, 4,000 steps, seed 0).
SIGNS = 'collapse/teacher_entropy', 'collapse/batch_entropy', 'collapse/rankme', 'collapse/feature_std'
COLLAPSED = [dict(zip(SIGNS, v)) for v in (
    (.516, .517, 1.29, .0189), (.472, .473, 1.22, .0142), (.249, .249, 1.16, .00994))]
ALIKE = {'collapse/rankme': 1.38, 'collapse/feature_std': .0215, 'train/nce_loss': .27, 'train/pair_nce_loss': .307}


def test_a_run_that_has_nearly_collapsed_is_told(config):
  """Before its numbers reach 0: the teacher says the same of all samples, and no loss tells them apart."""
  config = config.copy_and_resolve_references()
  config.head.out_dim = 2048
  old = [{k: v for k, v in r.items() if 'nce' not in k} for r in rows()]
  found = health.findings(old[:-3] + [r | sick for r, sick in zip(old[-3:], COLLAPSED)], config, {'ct': {}})
  assert names(found) == ['one prototype', 'dead features']
  assert 'entropy 0.249, of the mean over a batch 0.249' in found[0].evidence
  young = [r | sick for r, sick in zip(old[:3], COLLAPSED)]
  assert not health.findings(young, config, {'ct': {}})      # step 40 of 1,000


def test_embeddings_that_share_much_are_healthy_where_a_loss_tells_them_apart(config):
  assert not health.findings(rows(sick=ALIKE), config, CHANCE)
  blind = ALIKE | {k: .95 * v for k, v in CHANCE['ct'].items()}
  assert not health.findings(rows(sick=blind), config, CHANCE)      # the teacher tells them apart
  found = health.findings(rows(sick=blind | {'collapse/batch_entropy': 3.1}), config, CHANCE)
  assert names(found) == ['dead features']


def test_losses_that_leap_now_and_then_are_spikes_where_it_is_often(config):
  """The loss falls slowly and is noisy; then it leaps."""
  calm = [r | {'train/loss': 3 - .02 * i + .1 * (i % 3)} for i, r in enumerate(rows(50))]
  leaping = lambda at: [r | {'train/loss': 8.} if i in at else r for i, r in enumerate(calm)]
  assert not health.findings(calm, config, CHANCE) and not health.findings(leaping((35, 45)), config, CHANCE)
  found = health.findings(leaping((32, 38, 45)), config, CHANCE)
  assert names(found) == ['loss spikes']
  assert found[0].evidence.startswith('ct: 3 of the last 20 losses are far above those before, at step 1350 8, median')
  assert not health.findings(leaping((12, 15, 18)), config, CHANCE)      # long over


def test_scores_that_fall_for_several_evaluations(config):
  of = lambda *values: [{'step': 100 * i, 'phase': 'eval', 'eval/knn_auc_ct': v, 'eval/knn_auc_ct/nodule': 1 - v}
                        for i, v in enumerate(values)]
  judged = lambda *values: names(health.findings([*of(*values), *rows()], config, CHANCE))
  assert judged(.5, .7, .68, .66, .64) == ['scores fall']
  assert not judged(.5, .6, .7, .69, .69, .68)      # by less than noise
  assert not judged(.5, .7, .6, .65, .64)           # up and down
  assert not judged(.7, .6) and not judged(.7, .6, .5)
  told = health.findings(of(.5, .7, .68, .66, .64), config, CHANCE)[0]
  assert told.evidence == 'eval/knn_auc_ct 0.640, at step 100 0.700, falling for 3 evaluations'


def test_old_evaluations_are_kept_beside_the_last_rows_of_steps():
  evals = [{'step': i, 'phase': 'eval'} for i in range(3)]
  many = [evals[0], *rows(300), evals[1], *rows(300), evals[2]]
  assert health.kept(many) == [*evals, *[r for r in many if r not in evals][-health.KEPT:]]


def test_pairs_without_a_chance_level_are_told_by_their_cosines(config):
  sick = {'collapse/vl_gap': .002, 'train/vl_loss': .7}
  assert names(health.findings(rows(sick=sick), config, CHANCE)) == ['pairs do not match']
  assert not health.findings(rows(sick=sick | {'collapse/vl_gap': .2}), config, CHANCE)
  assert not health.findings(rows(sick=sick), config, {'ct': CHANCE['ct'] | {'train/vl_loss': 4.}})


def test_a_loss_above_chance_is_blind_where_pairs_are_no_nearer_than_others(config):
  """Numbers of two runs on 16 X-rays (chance 2.71): of the second the pairs were shuffled."""
  gaps = lambda *values: [r | {'collapse/nce_gap': v, 'train/nce_loss': 4.} for r, v in zip(rows(len(values)), values)]
  late = {health.DONE: .5}
  told = lambda found: names(health.findings([r | late for r in found], config, CHANCE))
  assert not told(gaps(.5, .6, .2, .7, .4, .3, .5, .12, .43, .05))
  assert told(gaps(.3, .26, -.29, -.33, .22, -.2, .01, .34, -.15, .04)) == ['pairs do not match']
  assert told([r | {'train/nce_loss': 2.71} for r in gaps(*[.5] * 10)]) == ['pairs do not match']      # at chance
  demo = (1.742, .116), (2.272, .266), (2.103, .042), (2.235, .172), (2.079, .209)      # seed 0, half of 380 steps
  assert not told([r | {'train/pair_nce_loss': v, 'collapse/pair_nce_gap': g} for r, (v, g) in zip(rows(5), demo)])


CLUSTERS = {      # disease: rows of each objective
    'one cluster': ({'clusters/intra_batch_entropy': .1}, {'clusters/inter_batch_entropy': .02},
                    {'clusters/intra_largest': .95}, {'clusters/inter_empty': .6}),
    'clusters do not settle': ({'clusters/intra_kept': .01}, {'clusters/inter_kept': -.02})}
CODES = {'clusters/intra_batch_entropy': 2.5, 'clusters/inter_batch_entropy': 1.3}
BANK = {f'clusters/{t}_{k}': v for t in health.TERMS for k, v in (('largest', .2), ('empty', .02), ('kept', .5))}


@pytest.mark.parametrize('disease, sick', [(d, sick) for d, all_ in CLUSTERS.items() for sick in all_])
def test_diseases_of_clusters(disease, sick):
  c, phases = joint.get_config(), {'joint': {'train/intra_loss': math.log(16)}}
  healthy = next(h for h in (CODES, BANK) if set(sick) <= set(h))
  of = lambda **how: [{'step': 25 * i, 'phase': 'joint', 'train/intra_loss': 2.} | healthy | (
      sick if i >= 20 - how.get('ill', 0) else {}) for i in range(20)]
  assert not health.findings(of(), c, phases) and not health.findings(of(ill=1), c, phases)
  found = health.findings(of(ill=health.LAST), c, phases)
  assert names(found) == [disease] and found[0].evidence.startswith(f'joint: {next(iter(sick))[9:14]}: ')


# Of runs of 120 steps on 32 X-rays with 4 prototypes: loss, entropy of a code and of their mean. Those of the second
# have projections that are not standardised over the batch.
TOLD = 'train/intra_loss', 'clusters/intra_entropy', 'clusters/intra_batch_entropy'
LEARNED = [dict(zip(TOLD, v)) for v in ((1.607, 1.155, 1.368), (1.696, 1.064, 1.346), (1.424, 1.079, 1.376))]
AT_LN_4 = [dict(zip(TOLD, v)) for v in ((1.388, 1.385, 1.385), (1.387, 1.385, 1.385), (1.386, 1.386, 1.386))]


@pytest.mark.parametrize('phases, shares, begins, ends', [
    (('intra',), (1.,), 0., 1.), (('mask', 'intra'), (.6, .4), .6, 1.), (('intra', 'inter'), (.5, .5), 0., .5)])
def test_codes_that_nothing_predicts_late_in_their_phase(phases, shares, begins, ends):
  c = joint.get_config().unlock()
  c.joint.phases, c.joint.shares = phases, shares
  levels = {'intra': {'train/intra_loss': math.log(4)}}

  def of(three, share):
    at = {'phase': 'intra', health.DONE: begins + share * (ends - begins)}
    return names(health.findings([at | {'step': i} | r for i, r in enumerate(three)], c, levels))
  assert of(AT_LN_4, .55) == of(AT_LN_4, 1.) == ['clusters at chance'] and not of(AT_LN_4, .45)
  assert not of(LEARNED, .9) and not of([*AT_LN_4[:2], LEARNED[2]], .9)
  bare = [{'train/intra_loss': r['train/intra_loss']} for r in AT_LN_4]      # deepcluster tells of no codes
  assert of(bare, .9) == ['clusters at chance']


def test_a_disease_of_both_phases_is_named_once(config):
  sick = rows(sick=DISEASES['pairs do not match'] | {'train/nce_loss': 2.7})
  found = health.findings([*sick, *(r | {'phase': 'xray'} for r in sick)], config, CHANCE | {'xray': CHANCE['ct']})
  assert names(found) == ['pairs do not match'] * 4
  assert '(and' not in health.line(400, found, sick)


def test_metrics_of_the_method(config):
  """The names that the verdict reads are those that the method writes."""
  assert set(CHANCE['ct']) <= set(base.make(config, {'ct': (96, {}), 'xray': (96, {})}).phases['ct'].chance)
