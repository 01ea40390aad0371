"""Studies with reports: what phantoms say is drawn, files and reports find each other, batches are alike anywhere."""
import csv
import json
import os
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from configs import unimedi
from data_pipelines import prepare, reports, streams, studies, wordpiece
from data_pipelines.errors import DataError
from data_pipelines.phantom import studies as world
from tests.e2e import tiny

SEEDS = range(300)


def config(**overrides):
  c = unimedi.get_config('phantom').unlock()
  c.batch.ct = c.batch.xray = 4
  c.data.phantom_records = 40
  return tiny.changed(c, overrides)


def test_a_phantom_shows_what_its_report_tells():
  labels = set()
  for i in SEEDS:
    made = world.make(0, i, volume=True)
    labels.add(made.label)
    shape, quadrant, size = world.named(made.label)
    told = world.report(made.label, made.template)
    assert shape in told and quadrant in told and size in told
    first, second = made.planes
    assert first % 2 == 0 and second == first + 1
    bright = made.image > .8 * world.BRIGHT
    rows, columns = np.nonzero(bright[list(made.planes)].all(0))
    top, left = divmod(world.QUADRANTS.index(quadrant), 2)
    assert (rows // 8 == top).all() and (columns // 8 == left).all()
    others = [p for p in range(8) if p not in made.planes]
    assert sorted(bright[others].sum((1, 2)))[-2] >= 8 > sorted(bright[others].sum((1, 2)))[-3]      # the distractors
  assert labels == set(range(32))
  assert world.make(0, 5, False).image.shape == (16, 16)
  np.testing.assert_array_equal(world.make(3, 7, True).image, world.make(3, 7, True).image)


def test_reports_are_of_known_words():
  made = wordpiece.Tokenizer(world.VOCABULARY, 16, fast=False)
  for label in range(32):
    for template in range(2):
      text = world.report(label, template)
      assert reports.clean(text) == text
      ids, mask = made(text)
      assert made.ids['[UNK]'] not in ids and mask.sum() == len(text.split()) + 2 <= 16


def test_batches_of_phantoms():
  made = streams.build(config())
  ct, xray = made['ct'].next(), made['xray'].next()
  assert ct['ct'].shape == (4, 1, 8, 16, 16, 1) and xray['xray'].shape == (4, 1, 16, 16, 3)
  said = {world.report(c, t): c for c in range(32) for t in range(2)}
  tokenizer = wordpiece.Tokenizer(world.VOCABULARY, 16, fast=False)
  for name, rows in (('ct', ct), ('xray', xray)):
    for i in range(4):
      words = tokenizer.tokens(rows['ids'][i][rows['mask'][i] > 0])[1:-1]
      assert said[' '.join(words)] == rows['report'][i]
      study = world.make(0, int(rows['id'][i]), name == 'ct')
      assert study.label == rows['report'][i]
      if name == 'ct':
        np.testing.assert_allclose(rows['ct'][i, 0, ..., 0], study.image, atol=1e-3)
      else:
        np.testing.assert_allclose(4 * rows['xray'][i, 0, ..., 1] - 1, np.clip(study.image, -1, 3), atol=1e-3)
  for s in made.values():
    s.close()


@pytest.mark.slow
def test_batches_are_the_same_with_workers_and_after_a_resume():
  alone, helped = streams.build(config()), streams.build(config(**{'data.workers': 2}))
  for name in ('ct', 'xray'):
    first, position = [alone[name].next() for _ in range(4)], alone[name].position()
    for a, b in zip(first, [helped[name].next() for _ in range(4)]):
      assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    again, more = streams.build(config())[name], alone[name].next()
    again.seek(position)
    got = again.next()
    assert all(np.array_equal(got[k], more[k]) for k in more)
    for s in (again, alone[name], helped[name]):
      s.close()


def folder(path, texts, missing=()):
  """A manifest of X-rays with these reports; rows of ids in `missing` name no file."""
  rows = []
  for i, text in enumerate(texts):
    if i not in missing:
      Image.fromarray(np.full((20, 30), 10 * i, np.uint8)).save(path / f'{i}.png')
    rows.append({'id': f'x{i}', 'path': f'{i}.png', 'kind': 'image', 'split': 'train', 'study': f's{i}'}
                | ({'text': text} if text is not None else {}))
  (path / 'r.txt').write_text('No nodule is seen. Lungs clear.')
  rows.append({'id': 'r', 'kind': 'report', 'path': 'r.txt', 'study': 's1', 'split': 'train'})
  (path / 'manifest.jsonl').write_text('\n'.join(json.dumps(r) for r in rows) + '\n')
  return str(path)


def of_files(path, fixtures, **overrides):
  return config(**{'phases.ct': 0, 'phases.unit': 'step', 'data.manifest': path, 'batch.ct': 0,
                   'unimedi.text.vocab': str(fixtures / 'unimedi' / 'bert_tiny' / 'vocab.txt'),
                   'unimedi.text.vocab_size': 156} | overrides)


def test_files_and_their_reports(tmp_path, fixtures, capsys):
  texts = ['Small pleural effusion.', None, 'Normal.', 'No nodule is seen; lungs clear', 'left rib fracture ' * 30]
  made = streams.build(of_files(folder(tmp_path, texts), fixtures), ['xray'])['xray']
  told = ''.join(capsys.readouterr())
  assert '5 reports: 1 longer than 16 word pieces, cut off, 1 empty, left out' in told
  assert made.records == 4      # of x0, x1 (a report file), x3, x4
  batch = made.next()
  assert batch['xray'].shape == (4, 1, 16, 16, 3) and batch['ids'].shape == (4, 16)
  of = dict(zip(batch['id'].tolist(), batch['report'].tolist()))
  assert of[1] == of[2] and len(set(of.values())) == 3      # x1 and x3 say the same
  made.close()


def test_an_image_that_is_missing_is_named_and_left_out_or_ends_the_run(tmp_path, fixtures, capsys):
  path = folder(tmp_path, ['Lungs are clear.', 'Heart is large.', 'No effusion seen.'], missing=(1,))
  made = studies.source('xray', of_files(path, fixtures), streams.manifest.load(path))
  assert len(made) == 2 and '1.png' in ''.join(capsys.readouterr())
  with pytest.raises(DataError, match='1.png'):
    studies.source('xray', of_files(path, fixtures, **{'data.on_bad_file': 'stop'}), streams.manifest.load(path))


def both_kinds(path):
  """A manifest of X-rays as `folder` writes it, and of scans: one wide, one whose report is a row, one without."""
  folder(path, ['Small pleural effusion.', None, 'Normal.', 'No nodule is seen; lungs clear', 'left rib fracture ' * 9])
  rng, rows = np.random.default_rng(0), (path / 'manifest.jsonl').read_text()
  for i, (text, side) in enumerate([('Heart is large.', 20), ('Liver is normal in size.', 330), (None, 18), (None, 18),
                                    ('Nodule in the left lung.', 16)]):
    hu = rng.integers(-1000, 1000, (side, 17, 20 + i)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([1., 1., 3., 1.])), path / f'{i}.nii.gz')
    row = {'id': f'c{i}', 'path': f'{i}.nii.gz', 'kind': 'volume', 'split': 'train', 'subject': f'p{i // 2}'}
    rows += json.dumps(row | ({'text': text} if text else {'study': 's1'} if i == 2 else {})) + '\n'
  (path / 'manifest.jsonl').write_text(rows)
  return str(path)


def test_shards_give_the_batches_of_the_files(tmp_path, fixtures, capsys):
  (tmp_path / 'files').mkdir()
  path, shards = both_kinds(tmp_path / 'files'), str(tmp_path / 'shards')
  assert prepare.main([path, f'--out={shards}', '--uncut', '--num_shards=3', '--workers=0']) == 0
  told = capsys.readouterr().out
  assert '5 train' in told and '4 with a report: configs/unimedi.py --config.data.manifest=' in told
  more = {'phases.ct': 1, 'batch.ct': 3, 'views.ct.scale': (.8, 1.)}
  a, b = (streams.build(of_files(p, fixtures, **more), ['ct', 'xray']) for p in (path, shards))
  for name in ('ct', 'xray'):
    assert a[name].records == b[name].records == 4 and a[name].digest == b[name].digest
    for _ in range(4):
      ours, theirs = a[name].next(), b[name].next()
      assert ours.keys() == theirs.keys()
      for k in ours:
        np.testing.assert_array_equal(ours[k], theirs[k], err_msg=k)
    a[name].close(), b[name].close()
  small = of_files(shards, fixtures, **{'unimedi.text.vocab_size': 29})
  with pytest.raises(DataError, match='156 word pieces, the network has 29'):
    studies.source('xray', small, streams.manifest.load(shards))


OFFLINE = '''
import os, socket
def refuse(*args, **kwargs):
  with open({log!r}, 'a') as f:
    f.write(f'{{os.getpid()}} {{args}}\\n')
  raise OSError('the network is unreachable')
connect = socket.socket.connect
socket.socket.connect = lambda self, *a: connect(self, *a) if self.family == socket.AF_UNIX else refuse(*a)
socket.getaddrinfo = socket.create_connection = refuse
with open({log!r} + '.up', 'a') as f:
  f.write(f'{{os.getpid()}}\\n')
'''


@pytest.mark.slow
def test_files_and_shards_with_workers_without_a_network(tmp_path, fixtures, monkeypatch):
  """Batches are those of no workers, after a resume too; no process asks for a connection."""
  for name in ('files', 'python'):
    (tmp_path / name).mkdir()
  path, shards = both_kinds(tmp_path / 'files'), str(tmp_path / 'shards')
  assert prepare.main([path, f'--out={shards}', '--uncut', '--num_shards=3', '--workers=0']) == 0
  log = tmp_path / 'asked'
  (tmp_path / 'python' / 'sitecustomize.py').write_text(OFFLINE.format(log=str(log)))
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path / 'python'), *sys.path]))
  more = {'phases.ct': 1, 'batch.ct': 3, 'views.ct.scale': (.8, 1.)}
  for where in (path, shards):
    alone, helped, again = (streams.build(of_files(where, fixtures, **more | {'data.workers': n}), ['ct', 'xray'])
                            for n in (0, 2, 2))
    for name in ('ct', 'xray'):
      want = [alone[name].next() for _ in range(6)]
      got = [helped[name].next() for _ in range(4)]
      again[name].seek(helped[name].position())
      got += [again[name].next() for _ in range(2)]
      for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        for k in a:
          np.testing.assert_array_equal(a[k], b[k], err_msg=f'{where} {name} {k}')
      for made in (alone, helped, again):
        made[name].close()
  workers = set((tmp_path / 'asked.up').read_text().split()) - {str(os.getpid())}
  assert len(workers) >= 16 and not log.exists(), log.read_text()


def test_shards_that_cannot_serve_studies(tmp_path, fixtures, capsys):
  (tmp_path / 'files').mkdir()
  path = both_kinds(tmp_path / 'files')
  assert prepare.main([path, f'--out={tmp_path / "a"}', '--tile=0', '--num_shards=1', '--workers=0']) == 0
  cut = streams.manifest.load(str(tmp_path / 'a'))
  with pytest.raises(DataError, match='TILES .*parts of scans .--tile=0, wide planes cut.*--uncut'):
    studies.source('ct', of_files('', fixtures), cut)
  assert len(studies.source('xray', of_files('', fixtures), cut)) == 4      # pictures are never cut
  silent = cut._replace(rows=[{k: v for k, v in r.items() if k != 'text'} for r in cut.rows])
  with pytest.raises(DataError, match='no row of kind image in split train has a report'):
    studies.source('xray', of_files('', fixtures), silent)
  (tmp_path / 'files' / 'r.txt').write_text('A nodule is seen. Lungs clear.')      # what the report says has changed
  capsys.readouterr()
  assert prepare.main([path, f'--out={tmp_path / "a"}', '--tile=0', '--num_shards=1', '--workers=0']) == 1
  assert 'was begun with other files: 2 changed content: c2, x1' in capsys.readouterr().err


def test_mistakes_are_named(tmp_path, fixtures):
  path = folder(tmp_path, ['Normal.', None])
  (tmp_path / 'manifest.jsonl').write_text((tmp_path / 'manifest.jsonl').read_text().splitlines()[0] + '\n')
  load = streams.manifest.load
  with pytest.raises(DataError, match='not one of 1 reports has 3 words'):
    studies.source('xray', of_files(path, fixtures), load(path))
  with pytest.raises(DataError, match='neither vocab nor init_from is set'):
    studies.source('xray', config(**{'data.manifest': path}), load(path))
  with pytest.raises(DataError, match='156 word pieces, the network has 29'):
    studies.source('xray', of_files(path, fixtures, **{'unimedi.text.vocab_size': 29}), load(path))
  with pytest.raises(DataError, match='data.xray has no reports'):
    studies.source('xray', config(**{'data.xray': '/data'}))


def test_the_tests_are_other_patients():
  known = studies.tests(config(), 6)
  assert known['views']['ct'].shape == (6, 1, 8, 16, 16, 1) and known['planes'].shape == (6, 2)
  assert known['reports']['ids'].shape == (32, 16) and len(np.unique(known['reports']['ids'], axis=0)) == 32
  seen = world.make(0, studies.TEST_REPORTS + 3, True)
  np.testing.assert_allclose(known['views']['ct'][3, 0, ..., 0], seen.image, atol=1e-3)
  assert known['labels']['ct'][3] == seen.label and tuple(known['planes'][3]) == seen.planes


@pytest.mark.realdata
def test_real_radiographs_and_their_notes_become_batches(shared, fixtures, tmp_path):
  """COVID X-rays, views from the front, with the notes of their cases."""
  with (shared / 'data' / 'cxr' / 'covid' / 'labels.csv').open(newline='') as f:
    found = [r for r in csv.DictReader(f) if r['view'].startswith(('PA', 'AP')) and r['clinical_notes']][:12]
  rows = [{'id': r['image'], 'path': str(shared / 'data' / r['image']), 'kind': 'image', 'split': 'train',
           'text': r['clinical_notes']} for r in found]
  (tmp_path / 'manifest.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  c = of_files(str(tmp_path), fixtures, **{'views.xray.size': 64, 'unimedi.text.length': 112, 'batch.xray': 8})
  made = streams.build(c, ['xray'])['xray']
  batch = made.next()
  assert batch['xray'].shape == (8, 1, 64, 64, 3) and batch['xray'].std() > .05 and not batch['bad'].any()
  assert (batch['mask'].sum(1) > 10).all() and len(set(batch['report'].tolist())) > 1
  made.close()
