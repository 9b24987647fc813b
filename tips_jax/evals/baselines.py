"""What the tasks yield without any learned features: chance, and the same evaluators on raw pixels.

The pixel baseline is an `Encoder` like any other: kNN gets the image shrunk to 16 x 16, the
segmentation probe the raw pixels of each patch (nothing tells it where the patch lies), and
retrieval a ridge regression, fitted on the training split, from the shrunk image and its color
histogram to the bag of words of its texts.
"""

import cv2
import numpy as np

from tips_jax.core.schema import Evals
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.features import reading as features
from tips_jax.evals.probes import masks as segmentation
from tips_jax.evals.tasks import knn, retrieval

_SIDE = 16  # pixels of the shrunk image
_BINS = 4  # of the color histogram, per channel
_WORDS = 1000  # the commonest tokens make the bag
# times the mean variance of the features: chosen once, on held-out training images of `scenes`
_RIDGE = 1.0


class Pixels:
  """The pixel baseline as an `Encoder`; `patch` (pixels) is the patch size of the model it stands
  beside.
  """

  def __init__(self, config: Evals, *, patch: int):
    self._config, self._patch = config, patch
    self._regression = self._weights = None

  def image(self, images_BHWC):
    shrunk = _shrink(images_BHWC)
    output = {self._config.cls: shrunk, 'patch': _cut(images_BHWC, self._patch)}
    if self._regression is not None:
      mean, kernel = self._regression
      output['embedding'] = (_describe(images_BHWC) - mean) @ kernel
    return output

  def text(self, ids_BT):
    """TF-IDF [B, E] over the tokens that `fit` chose, less the mean of the training texts."""
    return None if self._weights is None else self._bag(ids_BT) - self._mean_bag

  def fit(self, store, split: str, *, tokenizer, text_length: int) -> bool:
    """Learns the ridge regression from the images and texts of a split; False where it has no
    texts.
    """
    source = store.source(split)
    seen, ids, owner = [], [], []
    for images, rows in features.batches(
      source, features.records(source, self._config.limit), config=self._config
    ):
      for description, (_, record) in zip(_describe(images), rows):
        texts = features.texts_of(record, self._config.retrieval_text)
        if texts:
          ids += list(tokenizer.encode_batch(texts, text_length))
          owner += [len(seen)] * len(texts)
          seen.append(description)
    if not seen:
      return False
    counts = np.bincount(
      np.concatenate([np.unique(row[row > 0]) for row in ids]), minlength=tokenizer.vocab_size
    )
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
    self._regression = (
      mean,
      np.linalg.solve(moments + ridge * np.eye(len(moments), dtype=x.dtype), x.T @ target),
    )
    return True

  def _bag(self, ids):
    column = np.full(max(int(ids.max()), int(self._tokens.max())) + 1, -1)
    column[self._tokens] = np.arange(len(self._tokens))
    column[0] = -1  # padding
    places = column[ids]
    row, where = np.nonzero(places >= 0)
    bag = np.zeros((len(ids), len(self._tokens)), np.float32)
    bag[row, places[row, where]] = 1
    return features.normalize(bag * self._weights)


def chance(store, config: Evals) -> dict[str, float]:
  """Chance levels of the tasks: retrieval of a random ranking, exactly; the commonest class
  everywhere elsewhere.
  """
  result, labels, pixels = {}, {}, {}
  splits = (config.split,) if config.tasks == ('retrieval',) else (config.split, 'train')
  for split in splits:
    source = store.source(split)
    labels[split], pixels[split], owner, images = [], np.zeros(256, np.int64), [], 0
    for number in features.records(source, config.limit):
      record = source[int(number)]
      labels[split].append(int(record.get('label', -1)))
      if 'segmentation' in config.tasks:
        pixels[split] += np.bincount(
          segmentation.decode_mask(record['mask']).ravel(), minlength=256
        )
      if 'retrieval' in config.tasks:
        owner += [images] * len(features.texts_of(record, config.retrieval_text))
        images += 1
    pixels[split][VOID] = 0
    if split == config.split and 'retrieval' in config.tasks and owner:
      result.update(
        {f'retrieval/{k}': v for k, v in retrieval.chance(np.array(owner), images).items()}
      )
  if 'knn' in config.tasks:
    result['knn/accuracy'] = knn.majority(labels['train'], labels[config.split])
  if 'segmentation' in config.tasks:
    result['segmentation/miou'] = segmentation.majority(pixels['train'], pixels[config.split])
  return result


def _shrink(images_BHWC):
  small = np.stack(
    [cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA) for image in images_BHWC]
  )
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
  h, w = images.shape[1] // patch, images.shape[2] // patch
  cells = images[:, : h * patch, : w * patch].reshape(len(images), h, patch, w, patch, 3)
  return cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), h, w, -1)
