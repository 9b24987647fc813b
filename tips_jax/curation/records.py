"""A record of a store as the steps see it, and the images of other sets."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data import store
from tips_jax.data.ingest.cells import utf8
from tips_jax.data.ingest.reader import IMAGES
from tips_jax.data.pixels import images


class Record:
  """A record, whose image is decoded when it is first needed, once."""

  def __init__(self, record: Mapping[str, Any]):
    self.id = _text(record.get('id', b''))
    self.image: bytes = record['image']
    self.alt_text = _text(record.get('alt_text', b''))
    self.captions = list(map(_text, record.get('captions', ())))

  def texts(self, field: str) -> list[str]:
    """Those of a field that are not empty."""
    texts = [self.alt_text]
    if field == 'captions':
      texts = self.captions
    return [text for text in texts if text.strip()]

  @functools.cached_property
  def size(self) -> tuple[int, int]:
    """(height, width) in pixels, upright. ValueError for what is no image."""
    header = images.encoded(self.image)
    return header.height, header.width

  @functools.cached_property
  def pixels(self) -> np.ndarray:
    """uint8 [H, W, 3]. ValueError for an image that cannot be read."""
    return images.decode(self.image)

  def release(self) -> None:
    """Forgets the pixels, which are much larger than the encoded image."""
    self.__dict__.pop('pixels', None)

  def plain(self) -> dict[str, Any]:
    """As functions of users get it."""
    return {
      'id': self.id,
      'image': self.image,
      'pixels': self.pixels,
      'alt_text': self.alt_text,
      'captions': self.captions,
    }


def _text(value):
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  return str(value)


def _digest(content):
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Picture(NamedTuple):
  """An image of another set."""

  name: str  # SET: ID
  image: bytes

  def pixels(self) -> np.ndarray:
    """uint8 [H, W, 3]. ValueError for an image that cannot be read."""
    return images.decode(self.image)


class Pictures:
  """The images of a store, of STORE@SPLIT, or of a folder of files, by number."""

  def __init__(self, name: str, where: str):
    """where: the field of the config that names it, for messages."""
    path, at, split = name.rpartition('@')
    if not at:
      path = name
    self.name = utf8(os.path.basename(path.rstrip('/')))
    self._sources = []  # (name, records)
    self._files = []
    if os.path.isdir(path) and not (pathlib.Path(path) / store.TFDS_FILES[0]).exists():
      endings = {f'.{ending}' for ending in IMAGES}
      found = sorted(pathlib.Path(path).rglob('*'))
      self._files = [file for file in found if file.suffix.lower() in endings]
    # What tells sets apart that have the same name.
    self.identity = _digest([[file.name, file.stat().st_size] for file in self._files])
    if not self._files:
      opened = store.open_store(path)
      self._open(opened, split if at else '')
      self.identity = _digest([opened.fingerprint, split if at else ''])
    self._starts = np.cumsum([0, *(len(source) for _, source in self._sources)])
    if not len(self):
      raise InputError(f'{where}: got {name!r}, which has no images; expected a set of images')

  def _open(self, opened, split):
    if 'image' not in opened.features:
      raise InputError(f'{opened.path!r} has no field image; expected a set of images')
    if split and split not in opened.splits:
      raise unknown(f'split of {opened.path!r}', split, opened.splits)
    for name in [split] if split else opened.splits:
      self._sources.append((name, opened.source(name)))

  def __len__(self) -> int:
    return len(self._files) or int(self._starts[-1])

  def __getitem__(self, number: int) -> Picture:
    if self._files:
      file = self._files[number]
      return Picture(f'{self.name}: {utf8(file.name)}', file.read_bytes())
    part = int(np.searchsorted(self._starts, number, side='right')) - 1
    split, source = self._sources[part]
    within = number - int(self._starts[part])
    record = source[within]
    key = _text(record.get('id', str(within)))
    return Picture(f'{self.name}@{split}: {key}', record['image'])

  def __iter__(self) -> Iterator[Picture]:
    for number in range(len(self)):
      yield self[number]
