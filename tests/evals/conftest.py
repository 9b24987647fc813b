"""A small store of colored quadrants with every annotation, and an encoder that reads them."""

import json
import os

import cv2
import numpy as np
import pytest

from tips_jax.data import store as store_lib
from tips_jax.data import tokenizer as tokenizer_lib

SIZE, GRID, CLASSES = 32, 4, 3
COLORS = np.array([[220, 30, 30], [30, 200, 40], [40, 60, 220]], np.uint8)
NAMES = ('red', 'green', 'blue')


def _png(array):
  return cv2.imencode('.png', array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()


def scene(rng):
  """(image, mask, classes [2, 2]): each quadrant has one of three colors, its class; the left edge
  is void.
  """
  quadrants = rng.integers(0, CLASSES, (2, 2))
  mask = np.kron(quadrants, np.ones((SIZE // 2, SIZE // 2), int)).astype(np.uint8)
  image = np.clip(COLORS[mask].astype(int) + rng.integers(-20, 21, (SIZE, SIZE, 1)), 0, 255).astype(
    np.uint8
  )
  mask[:, 0] = 255
  return image, mask, quadrants


def _write_store(
  path, *, train=40, test=20, annotations=('label', 'mask'), captions=True, broken=(), void=()
):
  rng = np.random.default_rng(0)
  folder = store_lib.temporary_folder(path)
  writer = store_lib.Writer(folder, store_lib.features(annotations, labels=NAMES))
  texts = []
  for split, count in (('train', train), ('test', test)):
    for i in range(count):
      image, mask, quadrants = scene(rng)
      if split in void:
        mask[:] = 255
      words = [NAMES[c] for c in quadrants.ravel()]
      own = [' '.join(words), 'corner ' + words[0]][: 1 + i % 2] if captions and i != 3 else []
      texts += own
      example = {
        'image': _png(image),
        'id': f'{split}{i}',
        'alt_text': words[0] if i % 4 else '',
        'captions': own,
        'label': int(quadrants[0, 0]),
        'mask': _png(mask),
      }
      if (split, i) in broken:
        example['image'] = b'\x89PNG\r\n\x1a\nnothing more'
      writer.add(
        split, {k: v for k, v in example.items() if k not in ('label', 'mask') or k in annotations}
      )
  writer.close()
  with open(os.path.join(folder, 'annotations.json'), 'w') as file:
    json.dump({'mask_classes': NAMES}, file)
  tokenizer_lib.train(
    texts or ['nothing'], os.path.join(folder, store_lib.TOKENIZER_FILE), vocab_size=300
  )
  return store_lib.open_store(store_lib.finish(folder, path, {}))


class Reader:
  """An encoder that knows the answer: mean colors, and one-hot words by corner. `noise` spoils
  it.
  """

  cls_names, patch, width, depth, size, name, has_text = (
    ('web', 'synthetic'),
    SIZE // GRID,
    3,
    4,
    SIZE,
    'reader',
    True,
  )

  def __init__(self, noise=0.0):
    self.noise, self.rng = noise, np.random.default_rng(1)
    self.sha256 = f'{noise}'
    self.images, self.texts = [], []

  def _spoil(self, x):
    return (x + self.noise * self.rng.normal(size=x.shape)).astype(np.float32)

  def inspect(self, images, *, intermediate_layers=(), values=False, regions=False, patches=True):
    self.images.append(images.copy())
    side = images.shape[1] // GRID
    patch = images.reshape(len(images), GRID, side, GRID, side, 3).mean((2, 4)) / 255
    corners = np.stack([patch[:, 0, 1], patch[:, 0, 2], patch[:, 3, 1], patch[:, 3, 2]], 1)
    return {
      'web': self._spoil(patch[:, 0, 1]),
      'synthetic': self._spoil(patch[:, 0, 2]),
      'patch': self._spoil(patch),
      'embedding': self._spoil(np.eye(CLASSES)[corners.argmax(-1)].reshape(len(images), -1)),
    }

  def encode_text(self, texts):
    self.texts += texts
    out = np.zeros((len(texts), 4, CLASSES))
    for row, text in zip(out, texts):
      found = [NAMES.index(word) for word in text.split() if word in NAMES]
      row[np.arange(len(found)), found] = 1
    return self._spoil(out.reshape(len(texts), 4 * CLASSES))


@pytest.fixture(scope='session')
def png():
  """Encodes an array as PNG bytes."""
  return _png


@pytest.fixture(scope='session')
def write_store():
  """Writes a small store; see _write_store for what may be left out or broken."""
  return _write_store


@pytest.fixture(scope='session')
def store(tmp_path_factory):
  return _write_store(tmp_path_factory.mktemp('evals') / 'store')


@pytest.fixture(scope='session')
def tokenizer(store):
  return tokenizer_lib.Tokenizer(store.tokenizer_path)


@pytest.fixture
def make_encoder():
  return Reader


@pytest.fixture
def encoder():
  return Reader()
