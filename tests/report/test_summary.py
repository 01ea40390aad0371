"""The last lines of a run, from rows whose answer is known."""
import json

import pytest

from unimiss_jax.report import summary


def test_a_run_of_studies_tells_its_losses_its_retrieval_and_its_scores_without_labels():
  metrics = [
      {'step': 0, 'phase': 'eval', 'eval/ct_to_text_r1': .03, 'eval/ct_zero_shot_auc': .48, 'eval/ct_probe_auc': .67,
       'eval/slice_recall': .31},
      {'step': 1, 'phase': 'joint', 'train/vl_loss': 4.2, 'train/loss': 4.2, 'train/grad_norm': 3.},
      {'step': 9, 'phase': 'joint', 'train/vl_loss': 1.25, 'train/loss': 1.25},
      {'step': 9, 'phase': 'eval', 'eval/ct_to_text_r1': .9, 'eval/ct_zero_shot_auc': .97, 'eval/ct_probe_auc': .99,
       'eval/slice_recall': .9, 'eval/never_seen_before': 1.}]
  lines = summary.table(metrics, {'joint': {'train/vl_loss': 4.159}})
  assert [line.split() for line in lines] == [
      ['start', 'end', 'chance'], ['joint', 'vl_loss', '4.200', '1.250', '4.159'],
      ['ct_to_text_r1', '0.030', '0.900', '0.031'], ['ct_zero_shot_auc', '0.480', '0.970', '0.500'],
      ['ct_probe_auc', '0.670', '0.990', '0.500'], ['slice_recall', '0.310', '0.900', '-']]
  assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize('tests, chance', [(0, '-'), (40, '0.250'), (5, '1.000')])
def test_the_chance_of_retrieval_hangs_on_the_gallery_and_raw_pixels_stand_beside_it(tests, chance):
  rows = [{'step': s, 'phase': 'eval', 'eval/drr_to_ct_r10': v, 'eval/raw_drr_to_ct_r10': .75}
          for s, v in ((0, .2), (4, .5))]
  assert summary.table(rows, {}, tests)[-1].split() == ['drr_to_ct_r10', '0.200', '0.500', chance, 'raw', 'pixels',
                                                       '0.750']


def test_scores_of_a_test_beside_chance_and_raw_pixels():
  found = {'cases': 3, 'scores': {'dice': .8, 'dice/lung': .9, 'hd95/lung': 4., 'precision': .7},
           'control': {'chance/dice': .4, 'raw/dice': .6}}
  assert [line.split() for line in summary.tested(found)] == [
      ['3', 'test', 'cases', 'test', 'chance', 'raw', 'pix.'], ['dice', '0.800', '0.400', '0.600'],
      ['dice/lung', '0.900', '-', '-'], ['precision', '0.700', '-', '-']]


def test_a_torn_line_and_no_file_at_all(tmp_path):
  assert summary.rows(tmp_path) == []
  row = json.dumps({'step': 1})
  (tmp_path / 'metrics.jsonl').write_text(f'{row}\n{row[:-1]}')
  assert summary.rows(tmp_path) == [{'step': 1}]
