"""Checks in seconds that a benchmark on disk is what its protocol says.

Every file that a split names is looked for; a sample of them is opened: masks of the image's size
with class ids in range, depth in millimeters, normals of unit length, labels within the classes,
captions that are not empty.
"""

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import reader as benchmarks_reader
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.data.ingest import checks
from tips_jax.data.pixels.images import open_image
from tips_jax.evals.datasets import protocols

# Examples of a problem in its message.
_MAX_SHOWN = 3
_MAX_PIXELS = 200_000_000


@dataclasses.dataclass
class SplitReport:
  """What was found of one split."""

  split: str
  # Its name in the data set.
  official: str
  # Images; None where no source says how many.
  expected: int | None
  found: int = 0
  # How many of them were opened.
  opened: int = 0


@dataclasses.dataclass
class Report:
  """What was found of one data set."""

  name: str
  title: str
  splits: list[SplitReport] = dataclasses.field(default_factory=list)
  # Each makes a run pointless.
  problems: list[str] = dataclasses.field(default_factory=list)
  # Whether the data set is not there at all.
  missing: bool = False
  seconds: float = 0.0

  @property
  def ok(self) -> bool:
    return not self.problems


def check(
  name: str,
  data_dir: str | os.PathLike,
  *,
  tasks: Sequence[str] = (),
  sample: int = 48,
  seconds: float = 15.0,
) -> Report:
  """Compares one data set below `data_dir` with its protocol.

  `tasks`: names of those that will run, all where empty; only the splits that they need are looked
  at. `sample`: images opened of each split, evenly spaced; fewer (but one) once `seconds` are over.
  Raises InputError only for an unknown name; what is wrong is in the report.
  """
  start = time.monotonic()
  protocol = protocols.get(name)
  report = Report(name, protocol.title)
  needed = set()
  for task in tasks or [task.name for task in protocol.tasks]:
    needed.update(protocol.task(task).splits)
  if not benchmarks.present(name, data_dir):
    report.missing = True
  for split, expected in protocol.splits.items():
    if split not in needed:
      continue
    row = SplitReport(split, expected.official, expected.count)
    report.splits.append(row)
    try:
      reader = benchmarks.open(name, data_dir, split)
    except InputError as error:
      report.problems.append(str(error))
      if report.missing:
        break
      continue
    row.found = len(reader)
    _count(protocol, reader, expected, report)
    row.opened = _look(protocol, reader, sample, seconds, report)
  report.seconds = time.monotonic() - start
  return report


def require_folder(what: str, data_dir: str, names: Iterable[str]) -> None:
  """InputError where the folder of data sets does not exist. what: its flag or field."""
  if data_dir and os.path.isdir(os.path.expanduser(data_dir)):
    return
  got = f'got {data_dir!r}, which is no folder' if data_dir else 'missing'
  names = list(names)
  if len(names) > 3:  # one line, also for a whole suite
    names = [*names[:3], '...']
  raise InputError(
    f'{what}: {got}; expected the folder of {", ".join(names)}; docs/datasets.md says how it must '
    'look'
  )


def require(reports: Sequence) -> None:
  """Raises InputError with the first problem of reports that have any."""
  bad = [report for report in reports if not report.ok]
  if bad:
    rest = sum(len(report.problems) for report in bad) - 1
    more = f' (and {rest} more: run with --check)' if rest else ''
    raise InputError(f'{bad[0].problems[0]}{more}')


def table(reports: Sequence) -> str:
  """The reports as lines for a person: one line a split, then what is wrong."""
  titles = f'{"data set":<14}{"split":<8}{"official name":<20}{"images":>10}{"expected":>10}'
  lines = [f'{titles}{"opened":>8}  ']
  problems = []
  missing = []
  for report in reports:
    state = f'{len(report.problems)} problem(s)'
    if report.ok:
      state = 'ok'
    if report.missing:
      # One line for all of them says enough: most people have a few data sets.
      state = 'not there'
      missing.append(report.name)
    else:
      problems += [f'  {problem}' for problem in report.problems]
    name = report.name
    for row in report.splits:
      expected = '?'
      if row.expected is not None:
        expected = f'{row.expected:,}'
      line = f'{name:<14}{row.split:<8}{row.official:<20}{row.found:>10,}{expected:>10}'
      lines.append(f'{line}{row.opened:>8}  {state}'.rstrip())
      # The first line of a data set has its name and state.
      name = state = ''
  lines += problems
  if missing:
    lines.append(
      f'  not there: {", ".join(missing)}; {benchmarks_reader.PAGE} says where they come from'
    )
  fine = sum(report.ok for report in reports)
  lines.append(
    f'{fine} of {len(reports)} data sets are ready; {sum(r.seconds for r in reports):.0f} s'
  )
  return '\n'.join(lines)


def _count(protocol, reader, expected, report):
  where = f'{protocol.name}: split {reader.split!r}'
  if expected.count is not None and len(reader) not in (expected.count, *expected.also):
    report.problems.append(
      f'{where}: {len(reader):,} images; expected {expected.count:,} ({expected.official})'
    )
  gone = reader.missing()
  if gone:
    what = 'captions without images' if protocol.captions else 'missing files'
    report.problems.append(f'{where}: {what}: {len(gone):,}, such as {gone[0]}')
  if protocol.captions:
    silent = 0
    for item in reader.items:
      silent += not ''.join(reader.captions_of(item) or ()).strip()
    if silent:
      report.problems.append(f'{where}: images without captions: {silent:,} of {len(reader):,}')
  if protocol.labels and len(reader.label_names) != protocol.labels:
    report.problems.append(
      f'{where}: wrong class count: {len(reader.label_names):,}; expected {protocol.labels:,}'
    )
  if protocol.mask_classes and reader.mask_classes != protocol.mask_classes:
    report.problems.append(
      f'{where}: wrong class count: {len(reader.mask_classes)}; expected '
      f'{len(protocol.mask_classes)}'
    )


def _look(protocol, reader, sample, seconds, report):
  """Opens evenly spaced samples in random order; each kind of trouble becomes one problem with
  count and examples.
  """
  count = min(sample, len(reader))
  until = time.monotonic() + seconds
  details_of = {}
  spaced = np.arange(count) * len(reader) // max(count, 1)
  # In random order, so that fewer than planned are spread over the split too.
  for done, i in enumerate(np.random.default_rng(0).permutation(spaced).tolist()):
    if done and time.monotonic() > until:
      count = done
      break
    try:
      record = reader[i]
    except InputError as error:  # the reader itself cannot work, a package is missing
      report.problems.append(str(error))
      return 0
    for kind, detail in _troubles(protocol, reader, record):
      details_of.setdefault(kind, []).append(f'{record.key}: {detail}')
  for kind, details in details_of.items():
    examples = '; '.join(details[:_MAX_SHOWN])
    report.problems.append(
      f'{protocol.name}: split {reader.split!r}: {kind}: {len(details)} of {count} opened '
      f'({examples})'
    )
  return count


def _troubles(protocol, reader, record):
  if record.image is None:
    kind = 'unreadable'
    if 'no such file' in record.problem:
      kind = 'missing files'
    yield kind, record.problem
    return
  image = checks.check_image(record.image, min_side=1, max_pixels=200_000_000)
  if image.problem:
    yield 'unreadable images', image.detail
    return
  if 'label' in reader.annotations:
    label = record.extra.get('label')
    most = len(reader.label_names) - 1
    if label is None or not 0 <= label <= most:
      yield 'class ids out of range', f'label {label}; expected 0..{most}'
  for name in ('mask', 'depth', 'normals'):
    if name in reader.annotations:
      try:
        array = np.asarray(open_image(record.extra[name], max_pixels=_MAX_PIXELS))
      except Exception as error:  # a decoder raises anything
        yield f'unreadable {name}', f'{type(error).__name__}: {error}'
        continue
      if array.shape[1::-1] != image.size:
        plural = {'mask': 'masks', 'depth': 'depth maps'}.get(name, name)
        yield (
          f'{plural} of another size than images',
          f'{array.shape[1]}x{array.shape[0]}, image {image.size[0]}x{image.size[1]}',
        )
      else:
        yield from _VALUES[name](array, protocol, reader)


def _mask_values(mask, protocol, reader):
  classes = len(reader.mask_classes)
  wrong = np.unique(mask[(mask >= classes) & (mask != checks.VOID)])
  if wrong.size:
    yield (
      'class ids out of range',
      f'{wrong[:5].tolist()}; expected 0..{classes - 1} or {checks.VOID}',
    )
  if (mask == checks.VOID).all():
    yield 'masks that are all void', ''


def _depth_values(depth, protocol, reader):
  low, high = protocol.depth_mm
  known = depth[depth > 0]
  if depth.ndim != 2 or depth.dtype == np.uint8:
    yield 'depth of the wrong kind', f'{depth.dtype} {depth.shape}; expected uint16 millimeters'
  elif not known.size:
    yield 'depth that is all missing', ''
  elif not low <= np.median(known) <= high:
    yield 'depth not in millimeters', f'median {np.median(known):.0f}; expected {low}..{high}'


def _normal_values(normals, protocol, reader):
  if normals.ndim != 3 or normals.shape[2] != 3 or normals.dtype != np.uint8:
    yield 'normals of the wrong kind', f'{normals.dtype} {normals.shape}; expected uint8 [H, W, 3]'
    return
  known = normals[(normals > 0).any(-1)]
  length = np.linalg.norm(known / 127.5 - 1, axis=-1)
  median = 0.0
  if known.size:
    median = np.median(length)
  # Eight bits round a unit vector by less than a hundredth.
  if not known.size or np.median(np.abs(length - 1)) > 0.05:
    yield 'normals that are not of unit length', f'median length {median:.2f}'


_VALUES = {'mask': _mask_values, 'depth': _depth_values, 'normals': _normal_values}
