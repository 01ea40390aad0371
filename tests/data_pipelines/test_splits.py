"""Groups and splits: nothing that is linked is ever cut, and nobody moves when others come."""
import collections
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import importers, manifest, splits
from data_pipelines.errors import DataError


def row(i, subject=None, **more):
  return {'id': f'd/{i}', 'kind': 'image', 'path': f'/d/{i}', 'dataset': 'd'} | (
      {} if subject is None else {'subject': str(subject)}) | more


def crowd(n):
  return [row(f'{i}.png', i // 2) for i in range(n)]


def split_of(rows):
  return {r['id']: r['split'] for r in rows}


def components(n, links):
  """Connected components by breadth-first search: another algorithm than the one under test."""
  near, seen, out = collections.defaultdict(set), set(), []
  for link in links:
    for a in link:
      near[a] |= set(link)
  for start in range(n):
    if start not in seen:
      found, queue = {start}, [start]
      while queue:
        new = near[queue.pop()] - found
        found |= new
        queue += new
      seen |= found
      out.append(frozenset(found))
  return set(out)


# ---- groups

@settings(deadline=None, max_examples=200)
@given(st.integers(1, 30), st.data())
def test_groups_are_the_connected_components(n, data):
  subject = data.draw(st.lists(st.integers(0, n), min_size=n, max_size=n))
  case = data.draw(st.lists(st.sampled_from(['', 'x', 'y', 'https://x.org/1', 'https://x.org/2', 'https://x.org/']),
                            min_size=n, max_size=n))
  pairs = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=8))
  rows = [row(i, s, case=c) for i, (s, c) in enumerate(zip(subject, case))]
  made = splits.groups(rows, [(f'd/{a}', f'd/{b}') for a, b in pairs], ['case'] if any(case) else ())
  same = lambda values, drop=(): [[i for i in range(n) if values[i] == v] for v in set(values) - set(drop)]
  wide = [v for v in set(case) if v.startswith('http') and case.count(v) > 20]
  truth = components(n, [*same(subject), *pairs, *same(case, ['', 'https://x.org/', *wide])])
  found = collections.defaultdict(set)
  for i, r in enumerate(made):
    found[r['group']].add(i)
  assert set(map(frozenset, found.values())) == truth
  assert splits.groups(made) == made and 'group' not in rows[0]


def test_a_subject_is_of_one_data_set_and_a_row_without_is_alone():
  rows = [row(0, 7), row(1, 7), row(2, 7) | {'dataset': 'e', 'id': 'e/2'}, row(3), row(4)]
  assert [r['group'] for r in splits.groups(rows)] == ['d/7', 'd/7', 'e/7', 'd/3', 'd/4']


def test_another_scan_does_not_rename_a_group():
  rows = [row('m.png', 'b'), row('n.png', 'c')]
  link = [('d/m.png', 'd/n.png')]
  assert {r['group'] for r in splits.groups(rows, link)} == {'d/b'}
  assert {r['group'] for r in splits.groups([row('a.png', 'b'), *rows], link)} == {'d/b'}


def test_addresses_of_collections_link_nobody():
  url = lambda u, n=2: len({r['group'] for r in splits.groups([row(i, url=u) for i in range(n)], group_by='url')})
  assert url('https://www.eurorad.org/case/16745') == 1 and url('https://x.org/?case=3') == 1
  assert url('https://github.com/someone/images') == 2 and url('https://github.com/someone/images/blob/1.png') == 1
  assert url('https://x.org') == url('https://x.org/') == 2
  assert url('https://x.org/case', 20) == 1 and url('https://x.org/case', 21) == 21
  assert url('family 3', 21) == 1
  two = [row(0, url='http://x.org/case/1/'), row(1, url='https://www.x.org/case/1') | {'dataset': 'e'}]
  assert len({r['group'] for r in splits.groups(two, group_by='url')}) == 1
  two = [row(0, url='family 3'), row(1, url='family 3') | {'dataset': 'e'}]
  assert len({r['group'] for r in splits.groups(two, group_by='url')}) == 2


@pytest.mark.parametrize('options, message', [
    (dict(duplicates=[('d/0.png', 'other')]), 'other: is said to be a duplicate'),
    (dict(group_by='url'), 'no row has it')])
def test_links_that_lead_nowhere(options, message):
  with pytest.raises(DataError, match=message):
    splits.groups(crowd(4), **options)


# ---- splits

def test_no_group_is_cut():
  """1,000 random groups of 1 to 5 subjects, linked by duplicates."""
  rng, rows, links = random.Random(0), [], []
  for g in range(1000):
    members = [row(f'{g}-{i}-{j}.png', f'{g}-{i}') for i in range(rng.randint(1, 5))
               for j in range(rng.randint(1, 3))]
    links += [(a['id'], b['id']) for a, b in zip(members, members[1:])]
    rows += members
  rng.shuffle(rows)
  rng.shuffle(links)
  made = splits.assign(splits.groups(rows, links))
  found = collections.defaultdict(set)
  for r in made:
    found[r['id'].split('/')[1].split('-')[0]].add((r['group'], r['split']))
  assert len(found) == 1000 and all(len(v) == 1 for v in found.values())
  assert len({r['group'] for r in made}) == 1000
  count = collections.Counter(next(iter(v))[1] for v in found.values())
  for name, share in zip(manifest.SPLITS, (.8, .1, .1)):    # 5 standard deviations of a binomial
    assert abs(count[name] - 1000 * share) < 5 * (1000 * share * (1 - share)) ** .5


def test_nobody_moves_when_others_come():
  few = split_of(splits.assign(splits.groups(crowd(200))))
  many = split_of(splits.assign(splits.groups(crowd(900)[::-1])))
  assert few.items() <= many.items()


def test_the_split_is_a_function_of_seed_and_group():
  rows = [row(i, group=f'g{i}') for i in range(12)]
  dealt = ''.join(r['split'][1] for r in splits.assign(rows, (.4, .3, .3)))
  assert dealt == 'arrraaerrera'    # from the program b2sum: printf '0\ng3' | b2sum -l 64, over 2**64
  assert split_of(splits.assign(crowd(400), seed=1)) != split_of(splits.assign(crowd(400)))


def test_a_larger_share_only_takes_over():
  a, b = (split_of(splits.assign(crowd(600), f)) for f in ((.6, .2, .2), (.7, .1, .2)))
  assert all(b[i] == 'train' for i in a if a[i] == 'train')
  assert set(split_of(splits.assign(crowd(50), (1, 0, 0))).values()) == {'train'}


def test_splits_of_the_source_are_kept_for_the_whole_group():
  rows = [r | ({'split': 'test'} if i in (0, 10) else {}) for i, r in enumerate(crowd(300))]
  made = split_of(splits.assign(rows))
  assert made['d/0.png'] == made['d/1.png'] == made['d/10.png'] == made['d/11.png'] == 'test'
  free = split_of(splits.assign(crowd(300)))
  assert {i for i in made if made[i] != free[i]} <= {'d/0.png', 'd/1.png', 'd/10.png', 'd/11.png'}
  assert split_of(splits.assign(rows, keep=False)) == free


def test_a_leak_of_the_source_is_named():
  rows = crowd(300)
  for i, name in ((0, 'train'), (1, 'test'), (2, 'val'), (3, 'train')):
    rows[i]['split'] = name
  with pytest.raises(DataError) as e:
    splits.assign(rows)
  assert str(e.value).startswith('LEAK group d/0: train (d/0.png) and test (d/1.png); 1 more groups: d/1. FIX: ')
  rows[1]['status'] = rows[2]['status'] = 'excluded'    # such rows are not used
  assert split_of(splits.assign(rows))['d/1.png'] == 'train'


@pytest.mark.parametrize('kind', ['dict', 'csv', 'json'])
def test_an_override_comes_first(tmp_path, kind):
  rows = crowd(300)
  rows[0]['split'], rows[1]['split'] = 'train', 'test'
  override = {'d/0': 'test', 'd/9.png': 'val'}
  file = tmp_path / f'o.{kind}'
  file.write_text(json.dumps(override) if kind == 'json' else 'split;id;group\nTesting;;d/0\nval;d/9.png;\n')
  made = split_of(splits.assign(rows, override=override if kind == 'dict' else str(file)))
  assert made['d/0.png'] == made['d/1.png'] == 'test' and made['d/8.png'] == made['d/9.png'] == 'val'


@pytest.mark.parametrize('name, text, message', [
    ('o.csv', 'group,split\nd/0,train\nd/1,fit\n', "IMPORT .*o.csv line 3: split is 'fit'"),
    ('o.csv', 'group,split\nnobody,train\n', 'IMPORT .*line 2: nobody is neither'),
    ('o.csv', 'group,split\nd/0,\n', 'line 2: d/0: split is None'),
    ('o.csv', 'who,split\nd/0,train\n', 'no column with the group or id'),
    ('o.csv', 'id,split\nd/0.png,train\nd/1.png,val\n', 'LEAK .*line 3: group d/0: train and val'),
    ('o.json', '["d/0"]', 'not an object'), ('o.json', '{"d/0": ["train"]}', 'split is '),
    ('o.json', '{', 'not JSON')])
def test_faults_of_an_override(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(DataError, match=message):
    splits.assign(crowd(300), override=tmp_path / name)


def test_an_empty_split_says_what_was_excluded():
  rows = crowd(300)
  for i, r in enumerate(splits.assign(rows)):
    if r['split'] == 'val':
      rows[i]['status'] = 'excluded'
      rows[i]['findings'] = ['TOO_SMALL', 'TOO_SMALL'] if i % 4 else ['TRUNCATED', 'TOO_SMALL']
  out = [r for r in rows if 'status' in r]
  cut = sum('TRUNCATED' in r['findings'] for r in out)
  with pytest.raises(DataError) as e:
    splits.assign(rows)
  assert str(e.value).startswith(f'SPLIT_EMPTY val: 0 samples after exclusion ({len(out)} excluded: {len(out)} '
                                 f'TOO_SMALL, {cut} TRUNCATED); 150 groups in all. FIX: ')
  with pytest.raises(DataError, match='SPLIT_EMPTY val: 0 samples after exclusion .none excluded.; 1 groups'):
    splits.assign([row(0, split='train')])


@pytest.mark.parametrize('fractions', [(.5, .5), (.8, .1, .2), (1.1, -.1, 0), 'abc', (float('nan'), .5, .5), None])
def test_fractions_add_up(fractions):
  with pytest.raises(DataError, match='SPLIT fractions'):
    splits.assign(crowd(10), fractions)


# ---- real radiographs

@pytest.mark.realdata
def test_patients_of_one_published_case_stay_together(shared):
  rows = importers.rows(shared / 'data/cxr/covid/labels.csv') + importers.rows(shared / 'data/cxr/nih/labels.csv')
  assert len({r['id'] for r in rows}) == 169
  made = splits.assign(splits.groups(rows, group_by=['url']))
  found = collections.defaultdict(set)
  for r in made:
    found[r['group']].add((r['dataset'], r['subject']))
  assert sorted(sorted(p for _, p in g) for g in found.values() if len(g) > 1) == [
      ['211', '212', '214', '215'], ['331a', '331b']]
  assert len(found) == 47 + 83 - 4
  assert all(len({r['split'] for r in made if r['group'] == g}) == 1 for g in found)
  apart = splits.groups(rows)
  assert len({r['group'] for r in apart}) == 47 + 83
