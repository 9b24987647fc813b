"""Zero-shot segmentation against the notebook's steps in PyTorch, plain loops, and scikit-learn."""

import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.features import windows
from tips_jax.evals.probes import masks as masks_lib
from tips_jax.evals.tasks import prompts, zeroshot
from tips_jax.evals.tasks import zeroshot_segmentation as zs


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def resize(planes_hwK, shape):
  """Bilinear with half-pixel centers, one pixel after the other."""
  (h, w, count), (height, width) = planes_hwK.shape, shape
  out = np.zeros((height, width, count))
  for i in range(height):
    for j in range(width):
      y, x = (
        min(max((p + 0.5) * n / m - 0.5, 0), n - 1) for p, n, m in ((i, h, height), (j, w, width))
      )
      for a, b in ((int(y), 1 - y % 1), (min(int(y) + 1, h - 1), y % 1)):
        for c, d in ((int(x), 1 - x % 1), (min(int(x) + 1, w - 1), x % 1)):
          out[i, j] += b * d * planes_hwK[a, c]
  return out


def test_whole_is_the_largest_cosine_resized():
  rng = np.random.default_rng(0)
  classes, patch = unit(rng.normal(size=(5, 6))), 3 * rng.normal(size=(3, 4, 6))
  [cosine] = zs.cosines(classes, patch[None])
  np.testing.assert_allclose(
    cosine, np.einsum('hwe,ke->hwk', unit(patch), classes), rtol=1e-5, atol=1e-6
  )
  for shape in ((11, 17), (70, 65), (3, 4), (2, 2)):
    expected = resize(cosine.astype(np.float64), shape)
    found = zs.labels(cosine, shape)
    best = np.sort(expected, -1)
    clear = best[..., -1] - best[..., -2] > 1e-5
    assert (
      found.shape == shape and clear.mean() > 0.98 and (found == expected.argmax(-1))[clear].all()
    )
  assert (zs.labels(np.zeros((3, 4, 5), np.float32), (9, 9)) == 0).all()  # equal: the lowest class


def test_broken_patches_are_far_from_all():
  patch = np.ones((1, 2, 3), np.float32)
  patch[0, 1, 2] = np.nan
  [cosine] = zs.cosines(np.eye(3)[:2], patch[None])
  np.testing.assert_allclose(cosine, [[[3**-0.5] * 2, [0, 0]]], rtol=1e-6)
  with pytest.raises(InputError, match=r'expected \[n, h, w, E\] and \[M, E\]'):
    zs.cosines(np.eye(4), patch[None])


def notebook(torch, classes, image, encode, *, side, stride, size):
  """TIPSv2's sliding windows: PyTorch's own resizing and softmax. image [H, W, 3], already
  resized.
  """
  height, width, _ = image.shape
  probabilities, count = torch.zeros(len(classes), height, width), torch.zeros(height, width)
  for i in range(max(height - side + stride - 1, 0) // stride + 1):
    for j in range(max(width - side + stride - 1, 0) // stride + 1):
      bottom, right = min(i * stride + side, height), min(j * stride + side, width)
      rows, columns = slice(max(bottom - side, 0), bottom), slice(max(right - side, 0), right)
      patch = torch.tensor(encode(image[None, rows, columns])[0])
      cosine = torch.einsum(
        'cd,hwd->chw', torch.tensor(classes), torch.nn.functional.normalize(patch, dim=-1)
      )
      cosine = torch.nn.functional.interpolate(
        cosine[None], size=image[rows, columns].shape[:2], mode='bilinear'
      )[0]
      probabilities[:, rows, columns] += cosine.softmax(0)
      count[rows, columns] += 1
  both = torch.nn.functional.interpolate((probabilities / count)[None], size=size, mode='bilinear')[
    0
  ]
  return (probabilities / count).permute(1, 2, 0).numpy(), both.permute(1, 2, 0).numpy()


def encoder(patch, seed=0):
  """Value patches: a fixed random map of the mean colors of each patch."""
  kernel = np.random.default_rng(seed).normal(size=(3, 6)).astype(np.float32)

  def encode(images):
    n, h, w, _ = images.shape
    cells = images.reshape(n, h // patch, patch, w // patch, patch, 3).mean((2, 4)) / 255 - 0.5
    return (cells @ kernel).astype(np.float32)

  return encode


@pytest.mark.parametrize('shape', [(30, 44), (67, 32), (32, 32)])
def test_slide_equals_the_notebook(shape):
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (*shape, 3), np.uint8)
  classes = unit(rng.normal(size=(5, 6))).astype(np.float32)
  segmenter = zs.Segmenter(classes=classes, mode='slide', side=32, stride=24, patch=8)
  views = segmenter.views(image)
  height, width = segmenter.size(*shape)
  assert min(height, width) == 32 and views.shape[1:] == (32, 32, 3)
  whole = np.zeros((height, width, 3), np.uint8)
  for (rows, columns), view in zip(windows.windows(height, width, 32, 24), views):
    whole[rows, columns] = view
  size = (41, 55)
  scores, resized = notebook(torch, classes, whole, encoder(8), side=32, stride=24, size=size)
  patches = encoder(8)(views)
  np.testing.assert_allclose(segmenter.scores(patches, shape), scores, rtol=1e-4, atol=1e-6)
  found = segmenter.predict(patches, shape, size=size)
  best = np.sort(resized, -1)
  clear = best[..., -1] - best[..., -2] > 1e-5
  assert clear.mean() > 0.95 and (found == resized.argmax(-1))[clear].all()
  with pytest.raises(InputError, match='expected . windows'):
    segmenter.scores(np.repeat(patches, 2, axis=0), shape)


def test_views_of_whole_images_keep_the_aspect():
  image = np.zeros((60, 100, 3), np.uint8)
  image[:, 50:] = 255
  segmenter = zs.Segmenter(classes=np.eye(3), side=28)
  [view] = segmenter.views(image)
  assert view.shape == (28, 56, 3) and segmenter.size(60, 100) == (
    28,
    56,
  )  # 46 pixels, up to 4 patches
  assert (view[:, :26] < 20).all() and (view[:, 30:] > 235).all()
  assert segmenter.views(np.zeros((28, 28, 3), np.uint8)).shape == (1, 28, 28, 3)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'mode': 'hole'}, "did you mean 'whole'"),
    ({'side': 450}, 'a side of whole patches'),
    ({'mode': 'slide', 'stride': 449}, 'a stride of at most a side'),
    ({'mode': 'slide', 'stride': 0}, 'a stride of at most a side'),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(InputError, match=message):
    zs.Segmenter(classes=np.eye(3), **options)


def test_scorer_equals_scikit_learn():
  metrics = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(0)
  masks = [
    rng.choice([0, 1, 2, 4, 255], (9, 7 + i)).astype(np.uint8) for i in range(4)
  ]  # 3 and 5: never there
  found = [rng.choice([0, 1, 4], mask.shape) for mask in masks]
  scorer = zs.SegmentationScorer(6)
  for prediction, mask in zip(found, masks):
    scorer(prediction, mask)
  truth, found = (np.concatenate([x.ravel() for x in both]) for both in (masks, found))
  truth, found = truth[truth != 255], found[truth != 255]
  each = metrics.jaccard_score(truth, found, labels=[0, 1, 2, 4], average=None)
  assert each[2] == 0 < each[0]  # class 2 is never predicted, and counts
  np.testing.assert_allclose(
    masks_lib.class_iou(scorer.counts), [*each[:3], np.nan, each[3], np.nan]
  )
  assert scorer.result() == pytest.approx(
    {'miou': each.mean(), 'pixel_accuracy': (truth == found).mean()}, abs=1e-12
  )
  assert scorer.counts.sum() == len(truth) and scorer.counts.dtype == np.int64


def test_scorer_refuses_what_it_cannot_count():
  scorer = zs.SegmentationScorer(3)
  scorer(np.zeros((2, 2), int), np.full((2, 2), 255))
  assert np.isnan(scorer.result()['miou']) and np.isnan(scorer.chance()['miou'])
  for predicted, mask in (
    (np.zeros((2, 2)), np.full((2, 2), 3)),
    (np.full((2, 2), 3), np.zeros((2, 2))),
  ):
    with pytest.raises(InputError, match='expected ids below 3'):
      scorer(predicted.astype(int), mask.astype(int))
  with pytest.raises(InputError, match='expected one shape'):
    scorer(np.zeros((2, 3), int), np.zeros((3, 2), int))


def test_chance_is_the_mean_of_random_answers():
  rng = np.random.default_rng(0)
  mask = rng.choice(4, (300, 300), p=[0.7, 0.2, 0.1, 0])
  scorer, random = zs.SegmentationScorer(4), zs.SegmentationScorer(4)
  scorer(np.zeros_like(mask), mask)
  random(rng.integers(0, 4, mask.shape), mask)
  assert scorer.chance() == pytest.approx(random.result(), abs=0.005)


def test_scenes_of_colors_are_found_by_their_names():
  """Names to masks through every part, with an encoder that knows colors."""
  rng = np.random.default_rng(0)
  colors = {'red': (220, 30, 30), 'green': (30, 200, 40), 'blue': (40, 60, 220)}
  kernel = np.linalg.qr(rng.normal(size=(8, 3)))[0].T
  mean = lambda images: images.reshape(
    len(images), images.shape[1] // 8, 8, images.shape[2] // 8, 8, 3
  ).mean((2, 4))
  encode = lambda images: (mean(images) - 100) @ kernel
  say = lambda texts: np.stack(
    [sum(np.subtract(c, 100) for n, c in colors.items() if n in t) @ kernel for t in texts]
  )
  classes = zeroshot.class_embeddings(say, list(colors), prompts.templates('tcl9'))
  examples = []
  for i in range(4):
    mask = np.kron(rng.integers(0, 3, (2, 3)), np.ones((32, 32), int))
    image = np.array(list(colors.values()), np.uint8)[mask]
    mask[:, :2] = 255
    examples.append((image, mask if i else mask[::2, ::2]))  # a mask may be smaller than its image
  for mode in zs.MODES:
    segmenter = zs.Segmenter(classes=classes, mode=mode, side=64, stride=48, patch=8)
    scorer = zs.SegmentationScorer(len(classes))
    for image, mask in examples:
      predicted = segmenter.predict(encode(segmenter.views(image)), image.shape, size=mask.shape)
      assert predicted.shape == mask.shape
      scorer(predicted, mask)
    assert scorer.result()['miou'] > 0.9 > 0.4 > scorer.chance()['miou']
