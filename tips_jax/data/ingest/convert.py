"""From readers to a store: every sample is checked, counted and written, and problems are listed.

Images that cannot be used are left out and listed; images with missing texts or copies of another
one are kept and listed. The report goes into the store as report.json.
"""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
import typing
import warnings
from collections.abc import Mapping

from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.core.log import Progress
from tips_jax.data import store, tokenizer
from tips_jax.data.ingest import checks
from tips_jax.data.ingest.cells import utf8
from tips_jax.data.ingest.reader import Reader

# Problems, by their names in the report.
REFUSED = {
  'missing': 'left out: images that are missing',
  'unreadable': 'left out: images that cannot be decoded',
  'tiny': 'left out: images with a side under min_side',
  'giant': 'left out: images of more than max_pixels',
  'bad_row': 'left out: rows that do not fit the table',
  'other_split': 'left out: rows or files of other splits',
  'other_file': 'left out: files that belong to no sample',
}
NOTED = {
  'duplicate': 'kept: images equal to an earlier one, byte for byte',
  'no_text': 'kept: images without any text',
  'no_alt_text': 'kept: images with captions but no alt text',
  'no_captions': 'kept: images with alt text but no captions',
  'empty_caption': 'kept: images with an empty caption among theirs (left out)',
  'bad_metadata': 'kept: samples whose metadata cannot be read',
  'bad_mask': 'kept: images without a usable mask (all pixels ignored)',
  'turned': 'kept: images that EXIF turns, whose annotations are taken as upright',
  'short_row': 'kept: rows with fewer fields than the header',
  'other_image': 'kept: samples with several images (the first is taken)',
  'other_field': 'kept: samples with texts in other fields than the first samples have (left out)',
  'no_label': 'kept: images whose label is unknown (-1)',
  'other_label': 'kept: images with several labels (the first is taken)',
  'label_spaces': 'kept: images whose label has spaces or line breaks (written as one space)',
}
TRAIN_TOKENIZER = 'train'
REPORT_FILE = 'report.json'
_MAX_LISTED = 10_000  # rows of one kind in report.json; the counts are always whole
_TEXTS_FILE = 'texts.growing'


def convert(
  readers: Mapping[str, Reader],
  output: str | pathlib.Path,
  *,
  tokenizer_from: str = '',
  vocab_size: int = 32_000,
  min_side: int = 16,
  max_pixels: int = 50_000_000,
  limit: int = 0,
  test_fraction: float = 0.0,
  stream: typing.TextIO | None = None,
) -> dict[str, typing.Any]:
  """Writes the store `output` from `readers` (by split); returns the report, a JSON-able dict.

  `tokenizer_from`: '' (none), 'train' (on the texts of the first split), or a SentencePiece model
  to copy. `limit`: samples read from each input, 0 for all. `test_fraction` of the first split goes
  to 'test', chosen by the hash of the image, so that copies end up on one side. Raises InputError;
  then, and when interrupted, no file remains.
  """
  # Opened before the work, so that a wrong path is an error at once.
  copied = None
  if tokenizer_from not in ('', TRAIN_TOKENIZER):
    copied = tokenizer.Tokenizer(tokenizer_from)
  folder = store.temporary_folder(output)
  try:
    with (
      warnings.catch_warnings(),
      open(folder / _TEXTS_FILE, 'w', encoding='utf-8') as texts,
    ):
      # check_image refuses such images itself.
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      conversion = _Conversion(
        readers, folder, texts, min_side=min_side, max_pixels=max_pixels, limit=limit
      )
      for number, split in enumerate(readers):
        conversion.read(
          split,
          test_fraction=0.0 if number else test_fraction,
          learn=number == 0,
          stream=stream or sys.stderr,
        )
      report = conversion.close()
    report['tokenizer'] = _put_tokenizer(folder, copied, vocab_size if tokenizer_from else 0)
    (folder / _TEXTS_FILE).unlink()
    for reader in readers.values():
      if 'mask' in conversion.annotations and reader.annotations_json:
        (folder / store.ANNOTATIONS_FILE).write_bytes(reader.annotations_json)
    with open(folder / REPORT_FILE, 'w') as file:
      json.dump(report, file, indent=1)
    inputs = {split: reader.kind for split, reader in readers.items()}
    store.finish(folder, output, {'made_by': 'prepare', 'inputs': inputs})
  except OSError as error:
    raise InputError(f'cannot write the store {str(output)!r} ({error})') from error
  finally:
    shutil.rmtree(folder, ignore_errors=True)  # renamed by now, unless something went wrong
  return report


def _put_tokenizer(folder, copied, vocab_size):
  """Puts the tokenizer into the folder of a store; returns its part of the report."""
  path = folder / store.TOKENIZER_FILE
  if copied is not None:
    shutil.copyfile(copied.path, path)
  elif vocab_size:
    with open(folder / _TEXTS_FILE, encoding='utf-8') as texts:
      tokenizer.train(texts, path, vocab_size=vocab_size)
  else:
    return None
  made = tokenizer.Tokenizer(path)
  return {
    'vocab_size': made.vocab_size,
    'wanted': None if copied else vocab_size,
    'sha256': made.sha256,
  }


def _check(sample, *, min_side, max_pixels):
  """(Check, hash) of a sample's image; runs in a thread."""
  if sample.image is None:
    return checks.Check('missing', sample.problem or 'no image', (0, 0)), b''
  check = checks.check_image(sample.image, min_side=min_side, max_pixels=max_pixels)
  return check, hashlib.sha256(sample.image).digest()[:12]


class _Conversion:
  """Writes samples to a store, and counts and lists what is wrong with them."""

  def __init__(self, readers, folder, texts, *, min_side, max_pixels, limit):
    self._readers = readers
    self._texts = texts
    self._max_pixels = max_pixels
    self._limit = limit
    self._check = functools.partial(_check, min_side=min_side, max_pixels=max_pixels)
    # A store has one set of features: the classes of all splits, and the annotations that come
    # with every split.
    self._label_ids = {}
    self.annotations = list(store.ANNOTATIONS)
    for reader in readers.values():
      for name in reader.label_names:
        self._label_ids.setdefault(name, len(self._label_ids))
      self.annotations = [name for name in self.annotations if name in reader.annotations]
    features = store.features(self.annotations, labels=list(self._label_ids))
    self._writer = store.Writer(folder, features)
    self._seen = {}  # hash of an image -> 'split: key' of its first copy
    self._splits = collections.defaultdict(collections.Counter)
    self._listed = collections.defaultdict(list)
    self._started = time.monotonic()

  def read(self, split, *, test_fraction, learn, stream):
    """Writes all samples of a split; with `learn`, the tokenizer is trained on their texts."""
    reader = self._readers[split]
    progress = Progress(reader.total or 0, label=f'{split}: images', every_s=5.0, stream=stream)
    start = time.monotonic()
    count = 0
    samples = itertools.islice(reader, self._limit or None)
    for count, (sample, (check, digest)) in enumerate(_in_threads(self._check, samples), 1):
      if count == 1:
        print(f'{split}: {reader.understood(sample)}')
      if test_fraction and int.from_bytes(digest[:8], 'big') < test_fraction * 2**64:
        self._take(sample, check, digest, 'test', False, reader)
      else:
        self._take(sample, check, digest, split, learn, reader)
      # A reader's total is an estimate, or unknown, until its end.
      progress.total = max(min(reader.total or count, self._limit or sys.maxsize), count)
      progress.update(count, images_per_s=count / max(time.monotonic() - start, 1e-9))
    if progress.total > count:
      progress.total = count
      progress.update(count)
    progress.close()
    for note in reader.notes:
      self._note(note.kind, split, note.id, note.detail, note.count)
    if not self._splits[split]['written']:
      refused = {k: n for k, n in self._splits[split].items() if k in REFUSED}
      raise InputError(
        f'--input: no image of split {split!r} can be used; of {self._splits[split]["read"]} read, '
        f'refused were {refused}'
      )

  def _take(self, sample, check, digest, split, learn, reader):
    counts = self._splits[split]
    counts['read'] += 1
    sample = sample._replace(key=utf8(sample.key))
    if check.problem:
      self._note(check.problem, split, sample.key, check.detail)
      return
    # Copies stay: the same image with other texts is worth training on.
    if digest in self._seen:
      self._note('duplicate', split, sample.key, f'same bytes as {self._seen[digest]}')
    self._seen.setdefault(digest, f'{split}: {sample.key}')
    captions = [text for text in sample.captions if text]
    problems = {
      'no_text': not sample.alt_text and not captions,
      'no_alt_text': captions and not sample.alt_text,
      'no_captions': sample.alt_text and not captions,
      'empty_caption': len(captions) < len(sample.captions),
      'bad_metadata': sample.problem,
    }
    for kind, present in problems.items():
      if present:
        self._note(kind, split, sample.key, sample.problem)
    for note in sample.notes:
      self._note(note.kind, split, sample.key, note.detail)
    # The bytes as they came: a store never encodes an image again.
    example = {
      'image': sample.image,
      'id': sample.key,
      'alt_text': sample.alt_text,
      'captions': captions,
      **self._annotated(sample, check, split, reader),
    }
    self._writer.add(split, example)
    counts['written'] += 1
    counts['alt_texts'] += bool(sample.alt_text)
    counts['captions'] += len(captions)
    if learn:
      self._texts.writelines(text + '\n' for text in (sample.alt_text, *captions) if text)

  def _annotated(self, sample, check, split, reader):
    """The annotations of a sample, complete: an unknown label is -1, an unusable mask all void."""
    values = {name: sample.extra[name] for name in self.annotations if name in sample.extra}
    if 'label' in self.annotations:
      label = values.get('label', -1)
      if not isinstance(label, str):
        label = reader.label_names[label] if 0 <= label < len(reader.label_names) else ''
      values['label'] = self._label_ids.get(label, -1)
      if values['label'] == -1:
        self._note('no_label', split, sample.key, label)
    if 'mask' in self.annotations:
      data = values.get('mask') or b''
      mask, problem = checks.mask_png(data, check, max_pixels=self._max_pixels)
      if problem:
        self._note('bad_mask', split, sample.key, problem)
      values['mask'] = mask or checks.ignored_mask(check.size)
    if check.orientation > 1 and set(values) & set(store.PLACED):
      self._note('turned', split, sample.key, f'EXIF orientation {check.orientation}')
    return values

  def _note(self, kind, split, key, detail, count=1):
    self._splits[split][kind] += count
    if len(self._listed[kind]) < _MAX_LISTED:
      row = {'split': split, 'id': utf8(key)}
      if detail:
        row['detail'] = detail
      self._listed[kind].append(row)

  def close(self):
    """Completes the files of the store; returns the report."""
    self._writer.close()
    return {
      'splits': {split: dict(counts) for split, counts in self._splits.items()},
      'rows': {kind: self._listed[kind] for kind in (*REFUSED, *NOTED) if kind in self._listed},
      'seconds': round(time.monotonic() - self._started, 1),
    }


def _in_threads(function, items):
  """Yields (item, function(item)) in order, some items ahead: decoding releases the GIL."""
  threads = os.cpu_count() or 1
  pending = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    try:
      for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) >= 4 * threads:
          item, result = pending.popleft()
          yield item, result.result()
      while pending:
        item, result = pending.popleft()
        yield item, result.result()
    finally:
      for _, result in pending:
        result.cancel()


def summary(report: Mapping[str, typing.Any], *, worst: int = 3) -> str:
  """The report as text: a table of counts by split, and the `worst` first rows of each problem."""
  splits = report['splits']
  texts = {
    'read': 'samples read',
    'written': 'images written',
    'alt_texts': 'with alt text',
    'captions': 'captions written',
    **REFUSED,
    **NOTED,
  }
  counts = {}  # by split, of what occurs at all
  for kind in texts:
    of_kind = [split.get(kind, 0) for split in splits.values()]
    if any(of_kind):
      counts[kind] = of_kind
  width = max(len(texts[kind]) for kind in counts)
  lines = [' ' * width + ''.join(f'{split:>12}' for split in splits)]
  for kind, of_kind in counts.items():
    lines.append(f'{texts[kind]:<{width}}' + ''.join(f'{count:>12,}' for count in of_kind))
  for kind, listed in report['rows'].items():
    total = sum(counts[kind])
    if kind in ('no_text', 'no_alt_text', 'no_captions') and total == sum(counts['read']):
      continue  # a property of the data set, not of rows
    lines.append(f'{kind}:')
    for row in listed[:worst]:
      lines.append(f'  {row["split"]}: {row["id"]}  {row.get("detail", "")}'.rstrip())
    if total > worst:
      lines.append(f'  ... {total - worst:,} more in {REPORT_FILE}')
  made = report['tokenizer']
  if made:
    size = made['vocab_size']
    asked = made['wanted'] or 0  # None: a copied tokenizer
    short = f' (asked for {asked:,}; the texts give no more)' if asked > size else ''
    lines.append(f'tokenizer: {size:,} pieces{short}, sha256 {made["sha256"][:12]}')
  return '\n'.join(lines)
