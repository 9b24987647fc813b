"""The suite on raw pixels: what the tasks yield without any learned features.

k-NN and the like get the image shrunk to 16 x 16, probes the raw pixels of each patch (nothing says
where the patch is), and retrieval a ridge regression, fitted on the training split, from the shrunk
image and its color histogram to the bag of words of its texts. Dense tasks have `PixelsAndPlace`
too.
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
_RIDGE_OF_PATCHES = 0.1


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
    regions: bool = False,
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


class PixelsAndPlace:
  """Least squares from the raw pixels of a patch, with a constant for each place in the image.

  Images are squeezed to a grid (h, w) of patches. Without pixels it is the mean by position.
  """

  def __init__(self, grid: tuple[int, int], patch: int):
    self._grid = grid
    self._patch = patch
    self._sums = None

  def add(self, image: np.ndarray, values: np.ndarray, weight: np.ndarray) -> None:
    """One training image [H, W, 3], with the values [h, w, K] of its patches, which count by their
    weight [h, w].
    """
    x = self._pixels(image)
    y = values.reshape(len(x), -1).astype(np.float32)
    w = weight.reshape(-1, 1).astype(np.float32)
    terms = (w, w * x, w * y, x.T @ (w * x), x.T @ (w * y))
    if self._sums is None:
      self._sums = [np.zeros(term.shape) for term in terms]
    for total, term in zip(self._sums, terms):
      total += term

  def solve(self) -> None:
    """Ends the training."""
    count, x, y, moments, products = self._sums
    seen = np.maximum(count, 1e-12)
    self._x = x / seen
    # A place where nothing is ever known has the mean of all.
    self._y = np.where(count > 0, y / seen, y.sum(0) / max(count.sum(), 1e-12))
    # Within each place: that takes the constants out of the regression.
    moments = moments - self._x.T @ x
    products = products - self._x.T @ y
    ridge = _RIDGE_OF_PATCHES * np.trace(moments) / len(moments) + 1e-9
    self._kernel = np.linalg.solve(moments + ridge * np.eye(len(moments)), products)

  def predict(self, image: np.ndarray) -> np.ndarray:
    """Values [h, w, K] of the patches of an image [H, W, 3]."""
    values = self._y + (self._pixels(image) - self._x) @ self._kernel
    return values.reshape(*self._grid, -1).astype(np.float32)

  def mean(self) -> np.ndarray:
    """Values [h, w, K] by place alone."""
    return self._y.reshape(*self._grid, -1).astype(np.float32)

  def _pixels(self, image):
    h, w = self._grid
    shape = (w * self._patch, h * self._patch)
    squeezed = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
    return _cut(squeezed[None], self._patch).reshape(h * w, -1)


def cell_means(
  values: np.ndarray, known: np.ndarray, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """(mean [h, w, K] of the known pixels of each cell of a grid, their share [h, w]) of values
  [H, W, K].
  """
  shape = grid[::-1]
  share = cv2.resize(known.astype(np.float32), shape, interpolation=cv2.INTER_AREA)
  masked = np.where(known[..., None], values, 0).astype(np.float32)
  sums = cv2.resize(masked, shape, interpolation=cv2.INTER_AREA).reshape(*grid, -1)
  return sums / np.maximum(share, 1e-6)[..., None], share


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
