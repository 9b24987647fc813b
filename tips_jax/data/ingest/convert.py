"""From readers to a store: every sample is checked, counted and written, and what was wrong is
listed.

Images that cannot be used are left out and listed; images with missing texts or copies of another
one are kept and listed. The report goes into the store as report.json.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import warnings

from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.core.log import Progress
from tips_jax.data import store, tokenizer
from tips_jax.data.ingest import checks
from tips_jax.data.ingest.columns import utf8

REFUSED = {
  'missing': 'images that are not there',
  'unreadable': 'images that cannot be decoded',
  'tiny': 'images with a side under min_side',
  'giant': 'images of more than max_pixels',
}
NOTED = {
  'duplicate': 'images equal to an earlier one, byte for byte',
  'no_text': 'images without any text',
  'no_alt_text': 'images with captions but no alt text',
  'no_captions': 'images with alt text but no captions',
  'empty_caption': 'images with an empty caption among theirs (left out)',
  'bad_metadata': 'samples whose metadata cannot be read',
  'bad_mask': 'images without a usable mask (all pixels ignored)',
}
TRAIN_TOKENIZER = 'train'
REPORT_FILE = 'report.json'
_MAX_LISTED = 10_000  # rows of one kind in report.json; the counts are always whole
_TEXTS_FILE = 'texts.growing'


def convert(
  readers,
  output,
  *,
  tokenizer_from='',
  vocab_size=32_000,
  min_side=16,
  max_pixels=50_000_000,
  limit=0,
  test_fraction=0.0,
  stream=None,
):
  """Writes the store `output` from `readers` (split -> Reader) and returns the report (a JSON-able
  dict).

  `tokenizer_from`: '' (none), 'train' (on the texts of the first split), or a SentencePiece model
  to copy. `limit`: samples read from each input, 0 for all. `test_fraction` of the first split goes
  to 'test', chosen by the hash of the image, so that copies stay on one side. Raises InputError;
  then, and when stopped, no file remains.
  """
  copied = (
    tokenizer.Tokenizer(tokenizer_from) if tokenizer_from not in ('', TRAIN_TOKENIZER) else None
  )
  labels = list(dict.fromkeys(name for reader in readers.values() for name in reader.label_names))
  annotations = [
    a for a in store.ANNOTATIONS if all(a in reader.annotations for reader in readers.values())
  ]
  folder = store.temporary_folder(output)
  try:
    with (
      warnings.catch_warnings(),
      open(os.path.join(folder, _TEXTS_FILE), 'w', encoding='utf-8') as texts,
    ):
      warnings.simplefilter(
        'ignore', Image.DecompressionBombWarning
      )  # check_image refuses those itself
      job = _Job(
        store.Writer(folder, store.features(annotations, labels=labels)), annotations, labels, texts
      )
      for split, reader in readers.items():
        first = split == next(iter(readers))
        job.read(
          reader,
          split,
          limit=limit,
          test_fraction=test_fraction if first else 0.0,
          learn=first,
          check=lambda sample: _check(sample, min_side=min_side, max_pixels=max_pixels),
          max_pixels=max_pixels,
          stream=stream or sys.stderr,
        )
      report = job.close()
    report['tokenizer'] = _put_tokenizer(folder, copied, vocab_size if tokenizer_from else 0)
    os.remove(os.path.join(folder, _TEXTS_FILE))
    for reader in readers.values():
      if 'mask' in annotations and os.path.isfile(reader.annotations_file):
        shutil.copyfile(reader.annotations_file, os.path.join(folder, 'annotations.json'))
    with open(os.path.join(folder, REPORT_FILE), 'w') as file:
      json.dump(report, file, indent=1)
    store.finish(
      folder, output, {'made_by': 'prepare', 'inputs': {k: r.kind for k, r in readers.items()}}
    )
  except OSError as error:
    raise InputError(f'cannot write the store {output!r} ({error})') from error
  finally:
    shutil.rmtree(folder, ignore_errors=True)  # renamed by now, unless something went wrong
  return report


def _put_tokenizer(folder, copied, vocab_size):
  path = os.path.join(folder, store.TOKENIZER_FILE)
  if copied is not None:
    shutil.copyfile(copied.path, path)
  elif vocab_size:
    with open(os.path.join(folder, _TEXTS_FILE), encoding='utf-8') as texts:
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
  if sample.image is None:
    return checks.Check('missing', sample.problem or 'no image', (0, 0)), b''
  return (
    checks.check_image(sample.image, min_side=min_side, max_pixels=max_pixels),
    hashlib.sha256(sample.image).digest()[:12],
  )


class _Job:
  """The writer and all that is counted on the way."""

  def __init__(self, writer, annotations, labels, texts):
    self._writer, self._annotations, self._texts = writer, annotations, texts
    self._label_ids = {name: i for i, name in enumerate(labels)}
    self._seen = {}  # hash of an image -> 'split: key' of its first copy
    self._splits = collections.defaultdict(collections.Counter)
    self._listed = collections.defaultdict(list)
    self._started = time.monotonic()

  def read(self, reader, split, *, limit, test_fraction, learn, check, max_pixels, stream):
    progress = Progress(reader.total or 0, label=f'{split}: images', every_s=5.0, stream=stream)
    start, counted = time.monotonic(), 0
    samples = itertools.islice(reader, limit or None)
    for counted, (sample, (image, digest)) in enumerate(_in_threads(check, samples), 1):
      to_test = test_fraction and int.from_bytes(digest[:8], 'big') < test_fraction * 2**64
      self._take(
        sample,
        image,
        digest,
        'test' if to_test else split,
        learn and not to_test,
        reader,
        max_pixels,
      )
      progress.total = max(min(reader.total or counted, limit or sys.maxsize), counted)
      progress.update(counted, images_per_s=counted / max(time.monotonic() - start, 1e-9))
    if progress.total > counted:  # the total was an estimate
      progress.total = counted
      progress.update(counted)
    progress.close()
    if not self._splits[split]['written']:
      refused = {k: n for k, n in self._splits[split].items() if k in REFUSED}
      raise InputError(
        f'--input: no image of split {split!r} can be used; of {self._splits[split]["read"]} read, '
        f'refused were {refused}'
      )

  def _take(self, sample, image, digest, split, learn, reader, max_pixels):
    counts = self._splits[split]
    counts['read'] += 1
    sample = sample._replace(key=utf8(sample.key))
    if image.problem:
      self._note(image.problem, split, sample.key, image.detail)
      return
    if digest in self._seen:
      self._note('duplicate', split, sample.key, f'same bytes as {self._seen[digest]}')
    self._seen.setdefault(digest, f'{split}: {sample.key}')
    captions = [text for text in sample.captions if text]
    for kind, wrong in (
      ('no_text', not sample.alt_text and not captions),
      ('no_alt_text', captions and not sample.alt_text),
      ('no_captions', sample.alt_text and not captions),
      ('empty_caption', len(captions) < len(sample.captions)),
      ('bad_metadata', sample.problem),
    ):
      if wrong:
        self._note(kind, split, sample.key, sample.problem)
    example = {
      'image': sample.image,
      'id': sample.key,
      'alt_text': sample.alt_text,
      'captions': captions,
    }
    self._writer.add(
      split, example | self._annotated(sample, image.size, split, reader, max_pixels)
    )
    counts['written'] += 1
    counts['alt_texts'] += bool(sample.alt_text)
    counts['captions'] += len(captions)
    if learn:
      self._texts.writelines(text + '\n' for text in (sample.alt_text, *captions) if text)

  def _annotated(self, sample, size, split, reader, max_pixels):
    values = {name: sample.extra[name] for name in self._annotations if name in sample.extra}
    if 'label' in self._annotations:
      label = values.get('label', -1)
      if not isinstance(label, str):
        label = reader.label_names[label] if 0 <= label < len(reader.label_names) else ''
      values['label'] = self._label_ids.get(label, -1)  # -1: unknown
    if 'mask' in self._annotations:
      mask = checks.mask_png(values.get('mask') or b'', size=size, max_pixels=max_pixels)
      if mask is None:
        self._note('bad_mask', split, sample.key, '')
      values['mask'] = mask or checks.ignored_mask(size)
    return values

  def _note(self, kind, split, key, detail):
    self._splits[split][kind] += 1
    if len(self._listed[kind]) < _MAX_LISTED:
      self._listed[kind].append(
        {'split': split, 'id': key, **({'detail': detail} if detail else {})}
      )

  def close(self):
    self._writer.close()
    return {
      'splits': {split: dict(counts) for split, counts in self._splits.items()},
      'rows': {kind: self._listed[kind] for kind in (*REFUSED, *NOTED) if kind in self._listed},
      'seconds': round(time.monotonic() - self._started, 1),
    }


def _in_threads(function, items):
  """(item, function(item)) in order; a few items ahead run in threads, since decoding releases the
  GIL.
  """
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


def summary(report, *, worst=3):
  """The report as lines for a person: a table of counts by split, and the first rows of each kind
  of trouble.
  """
  splits = report['splits']
  rows = [
    ('read', 'samples read'),
    ('written', 'images written'),
    ('alt_texts', 'with alt text'),
    ('captions', 'captions written'),
    *((k, f'left out: {v}') for k, v in REFUSED.items()),
    *((k, f'kept: {v}') for k, v in NOTED.items()),
  ]
  rows = [(kind, text) for kind, text in rows if any(splits[s].get(kind) for s in splits)]
  width = max(len(text) for _, text in rows)
  lines = [' ' * width + ''.join(f'{split:>12}' for split in splits)]
  lines += [
    f'{text:<{width}}' + ''.join(f'{splits[s].get(kind, 0):>12,}' for s in splits)
    for kind, text in rows
  ]
  for kind, listed in report['rows'].items():
    total = sum(counts.get(kind, 0) for counts in splits.values())
    if total == sum(counts['read'] for counts in splits.values()):
      continue  # a property of the data set, not of rows
    lines.append(f'{kind}:')
    lines += [
      '  ' + f'{row["split"]}: {row["id"]}  {row.get("detail", "")}'.rstrip()
      for row in listed[:worst]
    ]
    if total > worst:
      lines.append(f'  ... {total - worst:,} more in {REPORT_FILE}')
  if report['tokenizer']:
    made = report['tokenizer']
    wanted, size = made['wanted'] or 0, made['vocab_size']
    short = f' (asked for {wanted:,}; the texts give no more)' if wanted > size else ''
    lines.append(f'tokenizer: {size:,} pieces{short}, sha256 {made["sha256"][:12]}')
  return '\n'.join(lines)
