"""From a run of UniMedI and a labelled folder to zero-shot scores, retrieval and probes."""
import json
import logging

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.phantom.studies import VOCABULARY
from data_pipelines.wordpiece import Tokenizer
from tests.cli.test_towers import built, out, params, run  # noqa: F401
from unimiss_jax.cli import studies
from unimiss_jax.evals import classification
from unimiss_jax.models.bert import Bert
from unimiss_jax.models.vit import ViT
from unimiss_jax.porting import PortingError


@pytest.fixture(autouse=True)
def no_log_to_a_closed_stream():
  yield
  logging.getLogger().handlers = [h for h in logging.getLogger().handlers if type(h) is not logging.StreamHandler]


SAID = {'ring': ['ring shaped opacity in the left upper zone'], 'bar': ['small bar form']}
WORDS = ('left', 'right', 'upper', 'lower', 'ring', 'cross', 'bar', 'wedge', 'small', 'large', 'zone', 'clear')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder, rng, rows = tmp_path_factory.mktemp('data'), np.random.default_rng(0), []
  for i in range(24):
    Image.fromarray(rng.integers(0, 256, (16, 16)).astype(np.uint8)).save(folder / f'{i}.png')
    rows.append({'id': f'x{i}', 'path': f'{i}.png', 'kind': 'image', 'split': ('train', 'test')[i % 2],
                 'text': ' '.join((WORDS[i % 12], WORDS[(i + 5) % 12], 'zone seen')),
                 'label': {'ring': int(i % 3 == 0), 'bar': int(i % 3 != 0)}})
  for i in range(10):
    hu = rng.integers(-400, 900, (16, 16, 16)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([1., 1., 1., 1.])), folder / f'{i}.nii.gz')
    rows.append({'id': f'v{i}', 'path': f'{i}.nii.gz', 'kind': 'volume', 'split': 'test',
                 'label': {'ring': i % 2, 'bar': 1 - i % 2}})
  (folder / 'manifest.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  (folder / 'prompts.json').write_text(json.dumps(SAID))
  return folder


@pytest.mark.slow
def test_scores_are_those_of_the_parts(run, params, data):  # noqa: F811
  got = studies.score(run, data / 'manifest.jsonl', data / 'prompts.json')
  assert got['xray_zero_shot_cases'] == 24 and got['ct_zero_shot_cases'] == 10 and got['xray_probe_cases'] == 12
  assert got['xray_to_text_reports'] == 12 and {f'xray_to_ct_p{k}' for k in (1, 5, 10)} < got.keys()
  assert got['xray_to_text_r1'] <= got['xray_to_text_r5'] <= got['xray_to_text_r10']
  model = ViT(embed_dims=(8,), num_heads=(2,), depths=(2,), patch=8, patch_depth=1, image_size=16,
              volume_size=(8, 16, 16))
  x = np.stack([np.asarray(Image.open(data / f'{i}.png')) for i in range(24)])[..., None] / np.float32(255)
  image = model.apply({'params': params['backbone']}, np.repeat(x, 3, -1)).embedding
  ids, mask = map(np.stack, zip(*(Tokenizer(VOCABULARY, 16)(SAID[k][0]) for k in SAID)))
  text = Bert(29, 8, 1, 2, 8, 16).apply({'params': params['text']}, ids, mask).last[:, 0]
  unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
  cosine = unit(image @ params['vision_proj']['kernel']) @ unit(text @ params['text_proj']['kernel']).T
  logits = np.exp(params['log_scale']) * np.asarray(cosine)
  labels = np.eye(2)[[0 if i % 3 == 0 else 1 for i in range(24)]]
  want = classification.scores(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels, True, tuple(SAID))
  for name in ('accuracy', 'auroc', 'ece'):
    assert got[f'xray_zero_shot/{name}'] == pytest.approx(want[name], abs=1e-5), name


@pytest.mark.parametrize('text', ['[]', '{}', '{"a": []}', '{"a": ["x"], "b": {"yes": ["y"], "no": ["z"]}}', 'no JSON'])
def test_prompts_that_are_none_are_named(text, tmp_path):
  (tmp_path / 'p.json').write_text(text)
  with pytest.raises(DataError, match='no prompts'):
    studies.said(tmp_path / 'p.json')
  (tmp_path / 'p.json').write_text('{"a": {"yes": ["x y"], "no": ["z"]}}')
  assert studies.said(tmp_path / 'p.json') == (('a',), {'yes': [['x y']], 'no': [['z']]})


@pytest.mark.slow
def test_an_export_scores_as_its_run(run, out, data):  # noqa: F811
  """Volumes with their slices, too; and a reason where there is no text tower."""
  assert studies.score(out, data, data / 'prompts.json') == pytest.approx(
      studies.score(run, data, data / 'prompts.json'), abs=1e-5)
  with pytest.raises(PortingError, match='has no text tower'):
    studies.score(run, data, branch='teacher')
