"""Image-text retrieval: recall at k in both directions, several captions per image."""

import numpy as np

from tips_jax.evals.features.reading import normalize

KS = (1, 5, 10)
_BLOCK = 256  # queries whose scores are held at once


def recalls(image, text, owner) -> dict[str, float]:
  """R@k of image [N, E] against text [T, E], where text t belongs to image owner[t], by cosine.

  't2i_r1': share of the texts whose image ranks first among all images. 'i2t_r1': share of the
  images with text for which one of their texts ranks first among all texts. A wrong candidate with
  the same score as the right one ranks before it, so that constant features score 0.
  """
  image, text, owner = normalize(image), normalize(text), np.asarray(owner)
  t2i = np.concatenate(
    [
      _ranks_of_images(text[i : i + _BLOCK] @ image.T, owner[i : i + _BLOCK])
      for i in range(0, len(text), _BLOCK)
    ]
  )
  i2t = []
  queries = np.unique(owner)
  for i in range(0, len(queries), _BLOCK):
    rows = queries[i : i + _BLOCK]
    i2t.append(_ranks_of_texts(image[rows] @ text.T, rows[:, None] == owner[None]))
  return {
    **{f't2i_r{k}': float((t2i < k).mean()) for k in KS},
    **{f'i2t_r{k}': float((np.concatenate(i2t) < k).mean()) for k in KS},
  }


def chance(owner, images: int) -> dict[str, float]:
  """The expected recalls of a random ranking among `images` images and len(owner) texts,
  exactly.
  """
  texts, own = len(owner), np.bincount(owner)
  own = own[own > 0]
  result = {f't2i_r{k}': min(k / images, 1.0) for k in KS}
  for k in KS:  # 1 - C(T - c, k) / C(T, k): none of an image's c texts is among k of T
    drawn = np.arange(min(k, texts))
    missed = np.prod(np.maximum(texts - own[:, None] - drawn, 0) / (texts - drawn), axis=1)
    result[f'i2t_r{k}'] = float((1 - missed).mean())
  return result


def _ranks_of_images(scores_BN, right_B):
  right = np.take_along_axis(scores_BN, right_B[:, None], 1)
  return (~(scores_BN < right)).sum(1) - 1  # not below, so that ties (and nan) count; less itself


def _ranks_of_texts(scores_BT, right_BT):
  best = np.where(right_BT, scores_BT, -np.inf).max(1, keepdims=True)
  return (~(scores_BT < best) & ~right_BT).sum(1)
