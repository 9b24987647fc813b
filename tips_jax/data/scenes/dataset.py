"""`scenes`, the embedded data set: small drawn scenes with the annotations of every task.

Each record is a store's record (see store.py): a JPEG, a noisy web-like alt text, a short and a
long synthetic caption (none for 3 %), and exact annotations. mask: ids into MASK_CLASSES (six kinds
of surroundings, then the shapes); label: the shape with most visible pixels; depth: millimeters;
normals: x right, y up, z toward the viewer; the sky has neither (0); boxes: of the visible pixels,
largest object first, with one region caption and one tag (the shape's name) each. A record is a
function of (seed, split, index, size, objects, typical) alone.

Left and right occur in the captions: train on this data set with `flip` 0.
"""

import collections
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import typing
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

import cv2
import numpy as np

from tips_jax.core.errors import InputError, PassingError
from tips_jax.core.processes import end_with_parent
from tips_jax.data import store
from tips_jax.data.scenes import draw, placing, words

LABELS = tuple(draw.SHAPES)
MASK_CLASSES = draw.MASK_CLASSES
# Of the drawing and the grammar: a store of another revision is refused, never taken for this one.
# Whatever changes what is drawn raises it (tests/golden/scenes.json).
REVISION = 4
# Scene number of a split's first record: splits never share a scene.
_FIRST = {'train': 0, 'test': 2**31}
_NO_CAPTIONS = 0.03
# All but the numbers of boxes: there is one text for each.
_ANNOTATIONS = tuple(name for name in store.ANNOTATIONS if not name.endswith('_boxes'))
_DESCRIPTION = 'Drawn scenes of textured solids on structured backgrounds.'
# Records that a process draws at a time, and the fewest for which one more is worth its start.
_CHUNK = 32
_WORTH = 500
_VOCAB_SIZE = 1024  # whole words and file-name pieces; the grammar has about 250 words


def example(
  index: int,
  *,
  split: str = 'train',
  size: int = 96,
  seed: int = 0,
  objects: int = placing.MOST,
  typical: float = 0.0,
) -> dict[str, typing.Any]:
  """Record `index` of a split: the dict that the store's features encode, images as JPEG or PNG
  bytes.
  """
  number = _FIRST[split] + index
  scene = draw.draw(number, size=size, seed=seed, objects=objects, typical=typical)
  rng = np.random.default_rng((seed, number, 1))
  captions = words.captions(scene, rng)
  return {
    'image': _encode('.jpg', scene.image[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 92),
    'id': f'{split}-{index:07d}',
    'alt_text': words.alt_text(scene, rng),
    'captions': captions if rng.random() >= _NO_CAPTIONS else [],
    'label': scene.items[0].shape,
    'mask': _png(scene.mask),
    'depth': _png(scene.depth),
    'normals': _png(scene.normals[..., ::-1]),
    'boxes': np.array([item.box for item in scene.items], np.float32),
    'region_captions': words.region_captions(scene, rng),
    'region_tags': [item.shape for item in scene.items],
    'tags': [item.shape for item in scene.items],
  }


def build(
  path: str | os.PathLike,
  *,
  train: int,
  test: int,
  size: int,
  seed: int = 0,
  objects: int = placing.MOST,
  typical: float = 0.0,
  processes: int = 1,
  progress: Callable[[int, int], None] | None = None,
) -> str:
  """Generates the store at `path`, with a tokenizer of its training texts, unless it exists.

  Up to `processes` draw, and the store is the same: as with all of Python's that are spawned, a
  script that asks for more than one needs `if __name__ == '__main__':`. Returns `path`.
  `progress(done, total)` is called after each record. Raises InputError for a bad number, and if
  `path` holds anything but this very data set; PassingError where a process is killed.
  """
  from tips_jax.data import tokenizer  # here, so that drawing alone does not load SentencePiece

  scene = dict(size=size, seed=seed, objects=objects, typical=typical)
  spec = dict(train=train, test=test, **scene)
  _check(spec)
  info = {'scenes': {'revision': REVISION, **spec}}
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.exists(os.path.join(path, store.INFO_FILE)):
    _require_same(path, info)
    return path

  folder = store.temporary_folder(path)
  try:
    features = store.features(_ANNOTATIONS, labels=LABELS)
    writer = store.Writer(folder, features, name='scenes', description=_DESCRIPTION)
    texts = []
    done = 0
    with contextlib.closing(_drawn({'train': train, 'test': test}, scene, processes)) as records:
      for split, record in records:
        writer.add(split, record)
        if split == 'train':
          texts += [record['alt_text'], *record['captions'], *record['region_captions']]
        done += 1
        if progress:
          progress(done, train + test)
    writer.close()
    (folder / store.ANNOTATIONS_FILE).write_text(json.dumps({'mask_classes': MASK_CLASSES}))
    tokenizer.train(texts, folder / store.TOKENIZER_FILE, vocab_size=_VOCAB_SIZE)
    return store.finish(folder, path, info)
  except BaseException:  # an interrupt too leaves nothing behind
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _drawn(counts, scene, processes) -> Iterator[tuple[str, dict]]:
  """(split, record) of all, in their order."""
  chunks = []
  for split, count in counts.items():
    for start in range(0, count, _CHUNK):
      chunks.append((split, range(start, min(start + _CHUNK, count))))
  processes = min(processes, sum(counts.values()) // _WORTH)
  if processes < 2:
    for chunk in chunks:
      yield from _draw(scene, *chunk)
    return
  pool = ProcessPoolExecutor(
    # A fork would share the locks of jax's threads.
    processes,
    multiprocessing.get_context('spawn'),
    initializer=_begin,
  )
  waiting = collections.deque()
  try:
    for chunk in chunks:
      waiting.append(pool.submit(_draw, scene, *chunk))
      if len(waiting) > 2 * processes:
        yield from waiting.popleft().result()
    while waiting:
      yield from waiting.popleft().result()
  except BrokenProcessPool:
    raise PassingError(
      'scenes: a process that drew was killed, as the system does where memory runs out: run the '
      'same command again'
    ) from None
  finally:
    pool.shutdown(cancel_futures=True)


def _begin():
  # What is sent to the whole group is for the first process, which ends these.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  end_with_parent()


def _draw(scene, split, numbers):
  return [(split, example(number, split=split, **scene)) for number in numbers]


def _require_same(path, info):
  existing = store.open_store(path).info
  if existing == info:
    return
  of = existing.get('scenes')
  if isinstance(of, dict) and of | {'revision': REVISION} == info['scenes']:
    raise InputError(
      f'scenes: {path!r} was drawn by another version of tips_jax: got revision '
      f'{of.get("revision")!r}; expected {REVISION}; remove it, and it is drawn again, or give '
      'another path'
    )
  raise InputError(
    f'scenes: {path!r} holds other data: got {existing}; expected {info}; give another path or '
    f'remove that one'
  )


def _check(spec):
  for name, least in dict(train=1, test=0, size=32, seed=0, objects=1).items():
    if not isinstance(spec[name], int) or spec[name] < least:
      raise InputError(
        f'scenes.{name}: got {spec[name]!r}; expected an integer of at least {least}'
      )
  if spec['objects'] > placing.MOST:
    raise InputError(f'scenes.objects: got {spec["objects"]}; expected at most {placing.MOST}')
  if not 0 <= spec['typical'] <= 1:
    raise InputError(f'scenes.typical: got {spec["typical"]}; expected a share from 0 to 1')


def _png(array):
  return _encode('.png', array, cv2.IMWRITE_PNG_COMPRESSION, 1)


def _encode(suffix, array, *options):
  return cv2.imencode(suffix, array, options)[1].tobytes()
