"""Patch labels, full-resolution mIoU and the majority level against plain loops."""

import collections
import types

import cv2
import numpy as np
import pytest

from tips_jax.core.errors import InputError
from tips_jax.evals.probes import logistic
from tips_jax.evals.probes import masks as masks_lib


def vote(cell):
  """The commonest class of a list of ids; void where more than half is void; ties: the lowest."""
  counts = collections.Counter(int(c) for c in cell)
  void = counts.pop(255, 0)
  return 255 if 2 * void > len(cell) else min(counts, key=lambda c: (-counts[c], c))


@pytest.mark.parametrize('shape, grid', [((12, 12), (3, 3)), ((24, 8), (4, 2)), ((8, 8), (8, 8))])
def test_patch_labels_equal_the_loop(shape, grid):
  rng = np.random.default_rng(0)
  for _ in range(20):
    mask = rng.choice([0, 1, 2, 254, 255], shape, p=[0.2, 0.2, 0.1, 0.1, 0.4]).astype(np.uint8)
    a, b = shape[0] // grid[0], shape[1] // grid[1]
    expected = [
      [vote(mask[i * a : (i + 1) * a, j * b : (j + 1) * b].ravel()) for j in range(grid[1])]
      for i in range(grid[0])
    ]
    assert masks_lib.patch_labels(mask, grid).tolist() == expected


def test_patch_labels_of_a_grid_that_does_not_divide_the_mask():
  mask = np.repeat([[0] * 50 + [3] * 50], 75, 0).astype(np.uint8)  # 75 x 100, left 0 and right 3
  assert masks_lib.patch_labels(mask, (7, 6)).tolist() == [[0, 0, 0, 3, 3, 3]] * 7
  assert (
    masks_lib.patch_labels(mask[:2, :2], (4, 4)).tolist() == [[0] * 4] * 4
  )  # finer than the mask


def bilinear(plane, shape):
  """Half-pixel centers, clamped at the borders."""

  def line(n, m):
    x = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    low = np.minimum(x.astype(int), max(n - 2, 0))
    weights = np.zeros((m, n))
    weights[np.arange(m), low] = 1 - (x - low)
    weights[np.arange(m), np.minimum(low + 1, n - 1)] += x - low
    return weights

  return line(plane.shape[0], shape[0]) @ plane @ line(plane.shape[1], shape[1]).T


def test_logits_are_upsampled_bilinearly_before_the_argmax():
  rng = np.random.default_rng(0)
  for shape in ((37, 50), (24, 24), (5, 3)):
    logits = rng.normal(size=(5, 3, 4)).astype(np.float32)
    expected = np.stack([bilinear(logits[..., k], shape) for k in range(4)]).argmax(0)
    found = masks_lib.upsample_argmax(logits, shape)
    assert (
      found.shape == shape and (found == expected).mean() > 0.995
    )  # but for rounding at borders of classes


def test_of_equal_classes_the_lowest_is_found():
  logits = np.random.default_rng(1).integers(-1, 2, (4, 5, 6)).astype(np.float32)
  resized = np.stack(
    [cv2.resize(logits[..., k], (15, 12), interpolation=cv2.INTER_LINEAR) for k in range(6)]
  )
  assert ((resized == resized.max(0)).sum(0) > 1).mean() > 0.05
  np.testing.assert_array_equal(masks_lib.upsample_argmax(logits, (12, 15)), resized.argmax(0))


def test_every_known_pixel_counts_once():
  rng = np.random.default_rng(0)
  probe = logistic.LinearProbe(
    kernel=rng.normal(size=(6, 4)).astype(np.float32), bias=np.zeros(4, np.float32), l2=1.0
  )
  patch = rng.normal(size=(3, 2, 2, 6)).astype(np.float32)
  masks = [
    rng.choice([0, 1, 2, 9, 255], shape).astype(np.uint8)  # 9: the probe does not know it
    for shape in ((8, 8), (11, 7), (4, 16))
  ]
  truth = np.concatenate([m.ravel() for m in masks])
  found = np.concatenate(
    [
      masks_lib.upsample_argmax(patch[i] @ probe.kernel, m.shape).ravel()
      for i, m in enumerate(masks)
    ]
  )
  truth, found = truth[truth != 255], found[truth != 255]
  ious = [
    np.sum((truth == c) & (found == c)) / np.sum((truth == c) | (found == c))
    for c in np.union1d(truth, found)
  ]
  counts = masks_lib.confusion(truth, found, size=256)
  assert counts.sum() == len(truth)
  assert masks_lib.mean_iou(counts) == pytest.approx(np.mean(ious), abs=1e-12)


def test_majority_level():
  rng = np.random.default_rng(0)
  train, test = rng.choice([2, 2, 2, 0, 1], 400), rng.choice([0, 1, 2], 300)
  counts = lambda labels: np.bincount(labels, minlength=256)
  expected = np.mean(
    [np.mean(test == 2), 0, 0]
  )  # class 2 everywhere: its share of the pixels, over three classes
  assert masks_lib.majority(counts(train), counts(test)) == pytest.approx(expected, abs=1e-12)


def test_confusion_and_mean_iou_equal_sets():
  rng = np.random.default_rng(0)
  truth, found = (
    rng.integers(0, 5, 500),
    rng.integers(0, 6, 500),
  )  # 5 occurs in no truth: 0. 6 occurs nowhere
  expected = []
  for c in range(6):
    a, b = set(np.flatnonzero(truth == c)), set(np.flatnonzero(found == c))
    expected.append(len(a & b) / len(a | b))
  counts = masks_lib.confusion(truth, found, size=7)
  assert counts.sum() == 500 and counts.shape == (7, 7)
  assert masks_lib.mean_iou(counts) == pytest.approx(np.mean(expected), abs=1e-12)
  assert np.isnan(masks_lib.mean_iou(np.zeros((3, 3), int)))


def test_class_names_come_from_the_annotations_of_a_store(tmp_path):
  store = types.SimpleNamespace(path=str(tmp_path))
  assert masks_lib.class_names(store) == ()
  annotations = tmp_path / 'annotations.json'
  annotations.write_text('{"mask_classes": ["sky", "wall"]}')
  assert masks_lib.class_names(store) == ('sky', 'wall')
  for text in ('{', '[]', '{"mask_classes": 3}', '[' * 10**5):
    annotations.write_text(text)
    with pytest.raises(InputError, match="expected JSON with a list 'mask_classes'"):
      masks_lib.class_names(store)
