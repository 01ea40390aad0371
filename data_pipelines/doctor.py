"""Reads every file of a folder or list to its end and says what is wrong with it, before training does.

  python -m data_pipelines.doctor DIR|LIST [--workers=N] [--format=auto|nifti|dicom|image] [--modality=ct|mr|other]
    [--sequences=_t1,_flair] [--resample_gaps] [--as=auto|image] [--json=out.jsonl] [--html=out.html]
    [--manifest=OUT_DIR] [--split=.8,.1,.1|ricord|chestxr|jsrt] [--seed=0]
    [--group_by=column,...] [--subject_from=file|folder|PATTERN] [--dataset=NAME] [--licence=TEXT]

One line per finding on stdout, `SEVERITY CODE path: reason; consequence. FIX: remedy`, a table of the codes, and the
counts. An ERROR excludes a file, a WARN does not. Exit code 0: no error; 1: some; 2: wrong usage, or nothing to read.
"""
import collections
import os
import signal
import sys
from typing import NamedTuple

from data_pipelines import (
  duplicates,
  entries,
  examination,
  files,
  finding,
  importers,
  judgement,
  manifest,
  published,
  readers,
  sequences,
  splits,
)
from data_pipelines import workers as processes
from data_pipelines.command import Parser
from data_pipelines.errors import DataError
from data_pipelines.examination import Job, Result
from data_pipelines.finding import Finding

ALL_PICTURES = 300            # beyond that many files only those with errors or warnings are shown
PICTURE_BYTES = 64 << 20      # kept in memory for the page
USAGE = 'python -m data_pipelines.doctor DIR|LIST [--modality=ct|mr|other] [--html=FILE] [--manifest=DIR] ...'


class Report(NamedTuple):
  """What was found.

  Attributes:
    source: as it was given.
    rows: of the manifest, with sha, status, findings, shape ..., group; in order of the source.
    results: of each row.
    findings: of no single file: LEAK, SPLIT_EMPTY, names that cannot be used.
    ignored: what else lay there, '3 *.csv, 12 DICOM reformat'.
  """
  source: str
  rows: list[dict]
  results: list[Result]
  findings: list[Finding]
  ignored: str

  @property
  def all_findings(self) -> list[Finding]:
    return [f for r in self.results for f in r.findings] + self.findings


def main(argv=None) -> int:
  flags = _flags(argv)
  options = entries.Options(dataset=flags.dataset, subject_from=flags.subject_from, lost=True)
  try:
    listed = flags.split[0] if flags.split[0] in published.RELEASED and len(flags.split) == 1 else ''
    shares = (1., 0., 0.) if listed else splits.checked(flags.split)
    report = examine(flags.source, workers=flags.workers, format=flags.format, modality=flags.modality,
                     as_image=flags.as_ == 'image', pictures=bool(flags.html), group_by=flags.group_by,
                     licence=flags.licence, options=options, ends=sequences.parse(flags.sequences),
                     resample_gaps=flags.resample_gaps)
    if listed:
      rows, told = published.apply(report.rows, listed)
      report = report._replace(rows=rows, findings=report.findings + told)
  except DataError as e:
    print(f'ERROR {e}')
    return 2
  from data_pipelines import doctor_page, doctor_report  # late: worker processes import this module, too
  said = []
  if flags.manifest:
    report, done = write_manifest(report, flags.manifest, shares, flags.seed,
                                  {'modality': flags.modality, 'group_by': list(flags.group_by), 'as': flags.as_}
                                  | ({'split': listed} if listed else {}))
    said.append(done)
  for path, made in ((flags.json, doctor_report.json_lines), (flags.html, doctor_page.html)):
    if path:
      try:
        files.write_text(path, made(report))
        said.append(f'wrote {path}')
      except DataError as e:
        report.findings.append(Finding('ERROR', e.code, e.path, e.reason, 'not written', e.remedy))
  for line in doctor_report.terminal(report, said):
    print(line.encode(sys.stdout.encoding or 'utf-8', 'replace').decode(sys.stdout.encoding or 'utf-8'))
  return int(any(f.severity == 'ERROR' for f in report.all_findings))


def _flags(argv):
  p = Parser(__doc__, USAGE)
  p.add_argument('source', metavar='DIR|LIST', help='folder, glob pattern, or any list that the importers know')
  p.add_argument('--workers', type=int, help='processes (0: none besides this one); as many as there are cores')
  p.add_argument('--format', default='auto', choices=readers.FORMATS, help='look for this format alone')
  p.add_argument('--modality', default='ct', choices=judgement.MODALITIES, help='ct asks volumes for HU')
  p.add_argument('--sequences', default='', help=sequences.FLAG)
  p.add_argument('--resample_gaps', action='store_true', help='DICOM series with missing slices are not excluded: '
                 'prepare will interpolate them, with the same flag')
  p.add_argument('--as', dest='as_', default='auto', choices=('auto', 'image'), help='image: each CT slice of DICOM '
                 'series is a picture')
  p.add_argument('--json', help='write a row per file here')
  p.add_argument('--html', help='write a page with pictures here')
  p.add_argument('--manifest', metavar='DIR', help='write the checked manifest into this folder')
  p.several('--split', (), ('.8', '.1', '.1'), help='shares of train, val, test, or a released '
            'split (data_pipelines/published.py)')
  p.add_argument('--seed', type=int, default=0, help='of the split')
  p.several('--group_by', (), (), help='columns whose values link rows')
  p.add_argument('--subject_from', default='file', help="'file', 'folder', or a pattern with one group")
  p.add_argument('--dataset', help='name before every id')
  p.add_argument('--licence', help='of rows that name none')
  flags = p.parse_args(argv)
  if flags.workers is not None and flags.workers < 0:
    p.error(f'--workers={flags.workers}: 0 or more')
  return flags


def examine(source, *, workers: int | None = None, format: str = 'auto', modality: str = 'ct', as_image: bool = False,
            pictures: bool = False, group_by=(), licence: str | None = None,
            options: entries.Options = entries.DEFAULT, ends: tuple[str, ...] = (), resample_gaps: bool = False
            ) -> Report:
  """Looks at all samples of a source.

  Args:
    workers: processes; None: one per core; 0: in this process. The result does not depend on it.
    format: 'auto', or the only one of readers.FORMATS that is looked for.
    modality: 'ct', 'mr' or 'other'.
    as_image: each CT slice of a DICOM series is a picture.
    pictures: draw thumbnails.
    group_by: as of splits.groups.
    licence: of rows that name none.
    options: of the importers.
    ends: of the names of the sequences of a scan, see sequences.py.
    resample_gaps: as of dicom.read.

  Raises:
    DataError: EMPTY_DIR, and those of importers.rows: there is nothing that could be looked at.
  """
  source = os.fspath(source)
  jobs, findings, ignored = jobs_of(source, format, as_image, options)
  if ends:
    jobs, left = joined(jobs, ends)
    ignored = ', '.join(text for text in (ignored, left) if text)
  jobs = [_completed(job, modality, format, as_image, pictures, licence)._replace(resample_gaps=resample_gaps)
          for job in jobs]
  splits.groups([j.row for j in jobs], (), group_by)    # a wrong column should not wait for the reading
  results = _look(jobs, workers, pictures)
  pairs = duplicates.pairs(*([of(r) for r in results] for of in (
      lambda r: r.facts.get('sha'), lambda r: r.small, lambda r: r.slices)))
  for pair in {p.second: p for p in reversed(pairs)}.values():    # the first partner of each
    results[pair.second].findings.append(_duplicate(pair, jobs))
  rows = [_row(job, result) for job, result in zip(jobs, results)]
  rows = splits.groups(rows, [(rows[p.first]['id'], rows[p.second]['id']) for p in pairs], group_by)
  return Report(source, rows, results, findings + _leaks(rows) + _empty_splits(rows), ignored)


# ---- what there is to look at

def jobs_of(source: str, format: str, as_image: bool, options: entries.Options
            ) -> tuple[list[Job], list[Finding], str]:
  """Samples of a source, what hinders the reading of some, and what else lies there; arguments as of `examine`."""
  files.check_storage(source.partition('*')[0])
  kind = importers.detect(source)
  if kind == 'tree':
    return _found(source, format, as_image, options)
  if kind == 'manifest':
    rows = manifest.read(source, labelled=False, root=options.root, torn=True)
  else:
    rows = importers.rows(source, kind, **vars(options))
  return [Job(row) for row in rows], [], ''


def _found(source: str, format: str, as_image: bool, options: entries.Options
           ) -> tuple[list[Job], list[Finding], str]:
  found = readers.discover(source, None, format)
  strays = _strays(source, found) if format in ('auto', 'dicom') else []
  no_reader = [f for f in found.faults if f.code == 'DICOM']    # one for all files
  if not found.items and len(no_reader) == len(found.faults) and not (strays and format == 'dicom'):
    raise _empty(source, format)
  items = [part for item in found.items for part in (_slices(item) if as_image else [item])]
  samples = sorted([(i.path, i.kind, i, None) for i in items + strays]
                   + [(f.path, 'volume', None, f) for f in found.faults if f not in no_reader], key=lambda s: s[0])
  unusable = [s for s in samples if not s[0].isprintable()]
  samples = [s for s in samples if s[0].isprintable()]
  findings = [finding.of_error(f) for f in no_reader]
  findings += [Finding('ERROR', 'NAME', ascii(path), 'the name cannot be printed', 'excluded', 'rename it')
               for path, *_ in unusable]
  listed = [entries.Entry(os.path.basename(path), files.absolute(path), {'kind': kind})
            for path, kind, _, _ in samples]
  rows = importers.of_files(source, listed, options) if listed else []
  return [Job(row, item, fault) for row, (_, _, item, fault) in zip(rows, samples)], findings, found.others


def joined(jobs: list[Job], ends) -> tuple[list[Job], str]:
  """Volumes as samples of several sequences, and what was left out."""
  kept = {j.row['id']: j for j in jobs if j.fault or j.row['kind'] != 'volume'}
  rows, left = sequences.of_rows([j.row for j in jobs if j.row['id'] not in kept], ends)
  return sorted([*kept.values(), *(Job(row, fault=fault) for row, fault in rows)], key=lambda j: j.row['id']), left


def _slices(item: readers.Item) -> list[readers.Item]:
  """Each file of a DICOM series alone; other samples as they are."""
  if item.kind == 'image' or item.format != 'dicom':
    return [item]
  return [item._replace(path=file, files=(file,)) for file in item.files]


def _strays(source: str, found: readers.Found) -> list[readers.Item]:
  """Files that are called .dcm and are not DICOM (any more), as samples: reading them tells why."""
  known = {file for item in found.items for file in item.files} | {fault.path for fault in found.faults}
  return [readers.Item(path, 'volume', 'dicom', (path,)) for path in files.expand(source)
          if path.lower().endswith('.dcm') and path not in known and not readers.is_dicom(path)]


def _empty(source: str, format: str) -> DataError:
  ends = collections.Counter('*' + os.path.splitext(path)[1].lower() for path in files.expand(source))
  there = ', '.join(f'{n} {end}' for end, n in sorted(ends.items())) or 'nothing'
  if '*.dcm' in ends and format != 'dicom':
    remedy = 'install [dicom] or pass --format=dicom'
  else:
    remedy = 'name a folder with NIfTI, DICOM, PNG or JPEG files' + ', or leave --format out' * (format != 'auto')
  return DataError('EMPTY_DIR', source, f'no readable image (found {there})', remedy)


def _completed(job: Job, modality: str, format: str, as_image: bool, picture: bool, licence: str | None) -> Job:
  row = dict(job.row)
  if licence:
    row.setdefault('licence', licence)
  single = as_image and row['kind'] == 'volume' and job.item and job.item.format == 'dicom'
  if single:    # see _slices
    row['kind'] = 'image'
  return job._replace(row=row, modality=modality, format=format, as_slice=bool(single), picture=picture)


# ---- the look

def _look(jobs, workers: int | None, pictures: bool) -> list[Result]:
  if workers is None:
    workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  results, progress, kept = [None] * len(jobs), files.Progress('doctor: reading files', len(jobs)), 0
  for index, result in processes.run(examination.examine, jobs, workers):
    if isinstance(result, processes.Died):
      result = Result([_died(jobs[index], result.code)], {})
    if result.picture:
      shown = len(jobs) <= ALL_PICTURES or finding.status(result.findings) != 'ok'
      kept += len(result.picture) * shown
      result = result if shown and kept <= PICTURE_BYTES else result._replace(picture=None)
    results[index] = result
    progress.advance()
  progress.end()
  return results


def _died(job: Job, code: int | None) -> Finding:
  if code is not None and code < 0:
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'
    why = f'was ended by {name}' + ' (out of memory?)' * (name == 'SIGKILL')
  else:
    why = f'ended with exit code {code}'
  return Finding('ERROR', 'WORKER', job.shown, f'the process that read it {why}', 'excluded',
                 'take fewer --workers, or leave the file out')


def _duplicate(pair: duplicates.Pair, jobs) -> Finding:
  first, second = jobs[pair.first], jobs[pair.second]
  names = [j.row.get('subject') for j in (second, first)]
  own = [n is None or entries.TILE.sub('', j.row['id']).endswith(n) for n, j in zip(names, (second, first))]
  subjects = f', subjects {names[0]} and {names[1]}' if names[0] != names[1] and not any(own) else ''
  return Finding('WARN', 'DUPLICATE', f'{second.shown} = {first.shown} ({pair.how}){subjects}', 'put in one group')


def _row(job: Job, result: Result) -> dict:
  codes, status = [f.code for f in result.findings], finding.status(result.findings)
  if job.row.get('status') == 'excluded':    # by who made the list
    codes, status = [*dict.fromkeys([*job.row.get('findings', ()), *codes])], 'excluded'
  known = {k: v for k, v in result.facts.items() if k in manifest.FIELDS}
  return job.row | known | {'status': status, 'findings': codes}


# ---- splits

def _leaks(rows) -> list[Finding]:
  found = collections.defaultdict(set)
  for row in manifest.usable(rows):
    if row.get('split'):
      found[row['group']].add(row['split'])
  return [Finding('ERROR', 'LEAK', f'group {group}', ' and '.join(s for s in manifest.SPLITS if s in said), '',
                  'give the group one split')
          for group, said in sorted(found.items()) if len(said) > 1]


def _empty_splits(rows) -> list[Finding]:
  """Splits of the source that keep no sample."""
  out = []
  for split in manifest.SPLITS:
    mine = [r for r in rows if r.get('split') == split]
    if mine and not manifest.usable(mine):
      codes = collections.Counter(code for r in mine for code in r['findings'])
      told = ', '.join(f'{n} {code}' for code, n in codes.most_common())
      reason = f'0 samples after exclusion ({len(mine)} excluded: {told})'
      out.append(Finding('ERROR', 'SPLIT_EMPTY', split, reason, '', 'repair them, or split anew'))
  return out


def write_manifest(report: Report, folder, shares=(.8, .1, .1), seed: int = 0, config=None) -> tuple[Report, str]:
  """Deals the splits and writes the rows; -> the report with the splits, or with what hinders, and a line on it."""
  try:
    rows = splits.assign(report.rows, shares, seed)
    about = {'split': list(map(float, shares)), 'seed': seed} | (config or {})
    digest = manifest.write(folder, rows, config=about)
    file = os.path.join(os.fspath(folder), manifest.NAME)
    return report._replace(rows=rows), f'wrote {file} (hash {digest}): train with --config.data.manifest={file}'
  except DataError as e:
    known = {f.code for f in report.findings}
    told = [] if e.code in known else [Finding('ERROR', e.code, e.path, e.reason, '', e.remedy)]
    return report._replace(findings=report.findings + told), f'manifest not written ({e.code})'


if __name__ == '__main__':
  sys.exit(main())
