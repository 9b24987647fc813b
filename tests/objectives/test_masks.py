"""Random masks and blocks."""

import functools
import math

import jax
import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.objectives import masks


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _draw(mask, key, shape, grid):
  return masks.draw(mask, key, shape, grid)


def draw(mask, seed=0, shape=(3, 2), grid=(4, 4)):
  return jax.tree.map(np.asarray, _draw(mask, jax.random.key(seed), shape, grid))


def random(**fields):
  return schema.RandomMask(kind='random', view='v', **fields)


def blocks(**fields):
  return schema.BlockMask(kind='blocks', view='v', **fields)


def assert_consistent(m, count):
  assert m['mask'].dtype == m['masked_valid'].dtype == bool
  assert m['masked_indices'].dtype == np.int32
  assert m['masked_indices'].shape[-1] == m['masked_valid'].shape[-1] == count
  for i in np.ndindex(m['mask'].shape[:2]):
    filled = m['masked_indices'][i][m['masked_valid'][i]]
    np.testing.assert_array_equal(filled, np.flatnonzero(m['mask'][i]))
    assert len(set(m['masked_indices'][i])) == count


@pytest.mark.parametrize(
  'grid, ratio', [((16, 16), 0.75), ((3, 3), 0.5), ((1, 7), 0.3), ((4, 4), 0.0), ((1, 5), 0.99)]
)
def test_counts_are_exact_and_parts_consistent(grid, ratio):
  m = draw(random(ratio=ratio), grid=grid)
  patches = math.prod(grid)
  count = round(ratio * patches)
  assert_consistent(m, count)
  assert m['masked_valid'].all()
  assert m['visible'].dtype == np.int32 and m['visible'].shape == (3, 2, patches - count)
  for i in np.ndindex(3, 2):
    np.testing.assert_array_equal(m['visible'][i], np.flatnonzero(~m['mask'][i]))


def test_masks_are_uniform_and_differ():
  mask = draw(random(), seed=1, shape=(4000, 2), grid=(2, 4))['mask'].reshape(-1, 8)
  assert np.abs(mask.mean(0) - 0.75).max() < 0.03  # every patch as often, 6 standard deviations
  pairs = mask.T.astype(float) @ mask / len(mask)  # and every pair: 3/4 * 5/7
  assert np.abs(pairs[~np.eye(8, dtype=bool)] - 15 / 28).max() < 0.03
  assert np.abs(mask[::2].mean(0) - mask[1::2].mean(0)).max() < 0.05
  assert (mask[::2] != mask[1::2]).any(1).mean() > 0.9
  again = draw(random(), seed=1, shape=(4000, 2), grid=(2, 4))['mask'].reshape(-1, 8)
  other = draw(random(), seed=2, shape=(4000, 2), grid=(2, 4))['mask'].reshape(-1, 8)
  assert (again == mask).all() and (other != mask).any()


@pytest.mark.parametrize('mask', [random(probability=0.3, ratio=0.5), blocks(probability=0.3)])
def test_exactly_the_share_of_the_crops_is_masked(mask):
  counts = set()
  for seed in range(3):
    m = draw(mask, seed=seed, shape=(10, 2), grid=(8, 8))
    masked = m['mask'].any(-1)
    assert masked.sum() == 6
    counts.add(tuple(np.argwhere(masked).ravel()))
    assert not m['masked_valid'][~masked].any()
  assert len(counts) == 3  # other crops each time
  assert 'visible' not in m and 'visible' not in masks.outputs(mask)


def test_a_random_mask_of_some_crops_has_its_ratio_in_each():
  m = draw(random(probability=0.5, ratio=0.75))
  assert_consistent(m, 12)
  assert sorted(m['mask'].sum(-1).ravel()) == [0, 0, 0, 12, 12, 12]


# --- blocks -------------------------------------------------------------------------------------


def reference(goal, side, rng):
  """DINOv2's masking generator, one mask at a time."""
  mask = np.zeros((side, side), bool)
  misses = 0
  while mask.sum() < goal and misses < 10:
    most = goal - mask.sum()
    area = 4 + rng.random() * (most - 4)
    aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    misses += 1
    if h < side and w < side:
      top, left = rng.integers(0, side - h + 1), rng.integers(0, side - w + 1)
      inside = mask[top : top + h, left : left + w]
      if 0 < h * w - inside.sum() <= most:
        inside[:] = True
        misses = 0
  return mask


def edges(mask):
  """Neighbors of which one is masked, [N, side, side] -> a number: few where masks are blocks."""
  down = (mask[:, 1:] != mask[:, :-1]).sum((1, 2))
  across = (mask[:, :, 1:] != mask[:, :, :-1]).sum((1, 2))
  return down + across


def test_blocks_follow_the_law_of_dinov2():
  m = draw(blocks(), shape=(2000, 2), grid=(16, 16))
  assert_consistent(m, 128)
  mask = m['mask'].reshape(-1, 16, 16)
  mask = mask[mask.any((1, 2))]
  assert len(mask) == 2000
  rng = np.random.default_rng(0)
  want = np.stack([reference(int(256 * rng.uniform(0.1, 0.5)), 16, rng) for _ in range(2000)])
  for measure, tolerance in ((lambda x: x.sum((1, 2)), 3), (edges, 2)):
    shares = np.linspace(0.05, 0.95, 10)
    got, expected = np.quantile(measure(mask), shares), np.quantile(measure(want), shares)
    assert np.abs(got - expected).max() <= tolerance, (got, expected)
  assert np.abs(mask.mean(0) - want.mean(0)).max() < 0.06  # 4 standard deviations of both
  random_edges = edges(
    draw(random(ratio=0.3), shape=(500, 1), grid=(16, 16))['mask'].reshape(-1, 16, 16)
  )
  assert edges(mask).mean() < 0.5 * random_edges.mean()


def test_each_masked_crop_has_its_own_part_of_the_range():
  counts = draw(blocks(probability=1.0), shape=(40, 1), grid=(16, 16))['mask'].sum(-1).ravel()
  wanted = 256 * (0.1 + 0.4 * np.arange(41) / 40)
  # A mask may end a few patches short of its goal, never beyond.
  assert (np.sort(counts) <= wanted[1:]).all()
  assert np.abs(np.sort(counts) - wanted[:-1]).max() < 8


def test_no_block_is_as_high_or_wide_as_the_picture_by_itself():
  m = draw(blocks(ratio=(0.05, 0.05), probability=1.0), shape=(200, 1), grid=(16, 16))
  mask = m['mask'].reshape(-1, 16, 16)
  assert (mask.sum((1, 2)) <= 12).all() and mask.any(2).sum(1).max() < 12


def test_a_picture_of_four_patches_ends():
  m = draw(blocks(ratio=(0.1, 0.5), probability=1.0), grid=(2, 2))
  assert_consistent(m, 2)
