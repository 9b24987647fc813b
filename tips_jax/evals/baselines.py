"""The suite on raw pixels: what the tasks yield without any learned features.

k-NN and the like get the image shrunk to 16 x 16, probes the raw pixels of each patch (nothing says
where the patch is), and retrieval a ridge regression, fitted on the training split, from the shrunk
image and its color histogram to the bag of words of its texts.
"""

import hashlib
import logging

import cv2
import numpy as np

from tips_jax.core import vectors
from tips_jax.data.pixels import views
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.evals.datasets.sources import Store
from tips_jax.evals.features import reading

_SIDE = 16  # pixels of the shrunk image
_BINS = 4  # of the color histogram, per channel
_WORDS = 1000  # the commonest tokens make the bag
# Times the mean variance of the features: chosen once, on held-out training images of `scenes`.
_RIDGE = 1.0


class Pixels:
  """The pixel baseline, with what the suite asks of an Encoder; it has one CLS token, 'pixels'.

  patch: pixels of the patches of the model that it is compared with; size: of its images.
  """

  cls_names = ('pixels',)
  depth = 0
  name = 'pixels'

  def __init__(self, *, patch: int, size: int):
    self.patch = patch
    self.size = size
    self.width = 3 * max(patch, _SIDE) ** 2
    self.sha256 = hashlib.sha256(f'pixels {patch} {size}'.encode()).hexdigest()
    self.has_text = False
    self._regression = None

  def inspect(
    self,
    images_BHWC: np.ndarray,
    *,
    intermediate_layers: tuple[int, ...] = (),
    values: bool = False,
    patches: bool = True,
  ) -> dict[str, np.ndarray]:
    """'pixels' [B, D], 'patch' [B, h, w, D], and, once `fit`, 'embedding' [B, E]."""
    shrunk = _shrink(images_BHWC)
    output = {'pixels': shrunk, 'embedding': shrunk}
    if patches:
      output['patch'] = _cut(images_BHWC, self.patch)
    if self._regression is not None:
      mean, kernel = self._regression
      output['embedding'] = (_describe(images_BHWC) - mean) @ kernel
    return output

  def encode_text(self, texts: list[str]) -> np.ndarray:
    """TF-IDF [T, E] over the tokens that `fit` chose, less the mean of the training texts."""
    return self._bag(self._tokenizer.encode_batch(texts, self._length)) - self._mean_bag

  def fit(
    self, data: Store, split: str, *, tokenizer: Tokenizer, text_length: int, limit: int
  ) -> bool:
    """Learns the ridge regression from the images and texts of a split; False where it has no
    texts.
    """
    if split not in data.counts:
      return False
    source = data.source(split)
    seen = []
    ids = []
    owner = []  # which of the images a text belongs to
    for number in reading.records(source, limit).tolist():
      record = source[number]
      texts = reading.texts_of(record, data.text_field)
      if not texts:
        continue
      try:
        image = views.evaluation(record['image'], self.size)
      except ValueError as error:
        logging.warning('evaluation leaves out record %d, which cannot be read: %s', number, error)
        continue
      ids += list(tokenizer.encode_batch(texts, text_length))
      owner += [len(seen)] * len(texts)
      seen.append(_describe(image[None])[0])
    if not seen:
      return False
    # Of how many texts each token is a part.
    present = [np.unique(row[row > 0]) for row in ids]
    counts = np.bincount(np.concatenate(present), minlength=tokenizer.vocab_size)
    self._tokenizer = tokenizer
    self._length = text_length
    self._tokens = np.argsort(-counts, kind='stable')[:_WORDS]
    self._weights = np.log((1 + len(ids)) / (1 + counts[self._tokens])).astype(np.float32)
    bags = self._bag(np.stack(ids))
    self._mean_bag = bags.mean(0)
    target = np.zeros((len(seen), bags.shape[1]), np.float32)
    np.add.at(target, owner, bags - self._mean_bag)
    x = np.stack(seen)
    mean = x.mean(0)
    x = x - mean
    moments = x.T @ x
    ridge = _RIDGE * np.trace(moments) / len(moments)
    regularized = moments + ridge * np.eye(len(moments), dtype=x.dtype)
    self._regression = (mean, np.linalg.solve(regularized, x.T @ target))
    self.has_text = True
    return True

  def _bag(self, ids):
    column = np.full(max(int(ids.max(initial=0)), int(self._tokens.max())) + 1, -1)
    column[self._tokens] = np.arange(len(self._tokens))
    column[0] = -1  # padding
    places = column[ids]
    row, where = np.nonzero(places >= 0)
    bag = np.zeros((len(ids), len(self._tokens)), np.float32)
    bag[row, places[row, where]] = 1
    return vectors.unit(bag * self._weights)


def _shrink(images_BHWC):
  small = np.empty((len(images_BHWC), _SIDE, _SIDE, 3), np.uint8)
  for image, output in zip(images_BHWC, small):
    cv2.resize(image, (_SIDE, _SIDE), output, interpolation=cv2.INTER_AREA)
  return small.reshape(len(small), -1).astype(np.float32) / 255 - 0.5


def _describe(images_BHWC):
  """Shrunk pixels and color histogram, [B, F]."""
  level = images_BHWC // np.uint8(256 // _BINS)
  color = (level[..., 0] * _BINS + level[..., 1]) * _BINS + level[..., 2]  # below 256: stays uint8
  histogram = np.stack([np.bincount(c.ravel(), minlength=_BINS**3) for c in color]) / color[0].size
  return np.concatenate([_shrink(images_BHWC), 10 * np.sqrt(histogram).astype(np.float32)], 1)


def _cut(images_BHWC, patch):
  """The pixels of each patch, [B, h, w, patch * patch * 3]; a rest at the right and the bottom is
  left out.
  """
  images = images_BHWC.astype(np.float32) / 255
  h = images.shape[1] // patch
  w = images.shape[2] // patch
  cells = images[:, : h * patch, : w * patch].reshape(len(images), h, patch, w, patch, 3)
  return cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), h, w, -1)
