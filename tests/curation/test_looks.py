"""Hashes, comparison of pixels, neighbors and clusters beside plain NumPy."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from tips_jax.curation import looks, neighbors


def photo(seed, height=96, width=128):
  """A smooth picture, as photographs are."""
  rng = np.random.default_rng(seed)
  image = np.zeros((height, width, 3), np.float32)
  for octave in (8, 16, 32):
    noise = rng.normal(size=(height // octave + 2, width // octave + 2, 3)).astype(np.float32)
    image += octave * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
  image = (image - image.mean()) / image.std()
  return np.clip(image * 50 + 128, 0, 255).astype(np.uint8)


def recompressed(pixels, quality=50):
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'jpeg', quality=quality)
  return np.asarray(Image.open(io.BytesIO(out.getvalue())))


def distance(a, b):
  return (a ^ b).bit_count()


def cross():
  """A symmetric drawing: most of its frequencies are zero."""
  pixels = np.full((100, 100, 3), 255, np.uint8)
  pixels[20:80, 45:55] = 0
  pixels[45:55, 20:80] = 0
  return pixels


@pytest.mark.parametrize('pixels', [photo(0), photo(1), cross()])
def test_a_hash_survives_other_sizes_and_compression(pixels):
  size = (pixels.shape[1] * 3 // 5, pixels.shape[0] * 2 // 5)
  other = recompressed(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
  assert distance(looks.hashed(pixels), looks.hashed(other)) <= 6


def test_hashes_of_other_images_are_far_away():
  hashes = [looks.hashed(photo(seed)) for seed in range(20)]
  assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 10


@pytest.mark.parametrize('side', [0.9, 0.93, 0.97])
def test_a_crop_has_a_hash_near_one_of_the_whole_and_the_pixels_agree(side):
  rng = np.random.default_rng(7)
  for seed in range(5):
    whole = photo(seed)
    h, w = round(96 * side), round(128 * side)
    y, x = rng.integers(97 - h), rng.integers(129 - w)
    crop = recompressed(whole[y : y + h, x : x + w])
    hashes = looks.hashes_of_crops(whole)
    assert min(distance(looks.hashed(crop), each) for each in hashes) <= 10
    correlation, color = looks.alike(looks.small(whole), looks.small(crop))
    assert correlation > 0.9 and color < 0.12


def test_another_image_another_color_and_no_contrast_are_not_alike():
  whole = looks.small(photo(0))
  assert looks.alike(whole, looks.small(photo(1)))[0] < 0.6
  assert looks.alike(whole, 255 - whole)[0] < 0.3
  plain = np.full_like(whole, 128)
  assert looks.alike(whole, plain)[0] == 0
  tinted = whole.copy()
  tinted[..., 0] = np.clip(tinted[..., 0].astype(int) + 60, 0, 255)
  assert looks.alike(whole, tinted)[1] > 0.06
  mouth = whole.copy()
  mouth[40:48, 24:32] = 255  # one part of 64
  correlation, color = looks.alike(whole, mouth)
  assert correlation > 0.85 and color > 0.15


def test_a_place_that_is_like_enough_in_both_ends_the_search():
  whole = looks.small(photo(0))
  crop = looks.small(photo(0)[6:90, 8:120])
  best = looks.alike(whole, crop)
  first = looks.alike(whole, crop, 0.8, 0.12)
  assert best[0] >= first[0] >= 0.8 and first[1] <= 0.12


# --- neighbors ----------------------------------------------------------------------------------


@pytest.mark.parametrize('bits', [0, 3, 8, 10])
def test_all_hashes_within_the_bits_are_found_the_nearest_first(bits):
  pytest.importorskip('faiss')
  rng = np.random.default_rng(0)
  base = rng.integers(0, 2**63, 40).astype(np.uint64)
  flips = np.zeros((40, 30), np.uint64)
  for i in range(40):
    for j in range(30):
      places = rng.choice(64, j % 14, replace=False).astype(np.uint64)
      flips[i, j] = np.bitwise_or.reduce(np.uint64(1) << places) if len(places) else 0
  hashes = (base[:, None] ^ flips).ravel()
  owners = np.arange(len(hashes)) // 2  # two of each
  index = neighbors.Hashes(bits)
  index.add(hashes[:700], owners[:700])
  index.add(hashes[700:], owners[700:])
  for query, found in zip(base, index.near(base)):
    distances = np.bitwise_count(hashes ^ query)
    near = {}
    for owner, d in zip(owners.tolist(), distances.tolist()):
      if d <= bits:
        near[owner] = min(d, near.get(owner, 99))
    assert found.tolist() == sorted(near, key=lambda owner: (near[owner], owner))


def test_no_hashes_have_no_neighbors():
  pytest.importorskip('faiss')
  [found] = neighbors.Hashes(8).near(np.array([3], np.uint64))
  assert len(found) == 0


def unit(x):
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_nearest_queries_and_rows_are_those_of_a_product(monkeypatch):
  pytest.importorskip('faiss')
  monkeypatch.setattr(neighbors, 'BLOCK', 7)
  rng = np.random.default_rng(0)
  x = unit(rng.normal(size=(50, 8)))
  queries = unit(rng.normal(size=(5, 8)))
  rows = np.arange(3, 45)
  cosines, numbers = neighbors.nearest(lambda rows: x[rows], rows, queries, 2)
  product = x[rows] @ queries.T
  np.testing.assert_array_equal(numbers, np.argsort(-product, 1)[:, :2])
  np.testing.assert_allclose(cosines, -np.sort(-product, 1)[:, :2], rtol=1e-5)
  found = neighbors.nearest_rows(lambda rows: x[rows], rows, queries, 3)
  np.testing.assert_array_equal(found, rows[np.argsort(-product.T, 1)[:, :3]])


def test_clusters_are_those_that_were_drawn():
  pytest.importorskip('faiss')
  rng = np.random.default_rng(0)
  centers = unit(rng.normal(size=(4, 16)))
  truth = rng.integers(0, 4, 200)
  x = unit(centers[truth] + 0.05 * rng.normal(size=(200, 16)))
  numbers, cosines = neighbors.clusters(lambda rows: x[rows], np.arange(200), 4, 0)
  pairs = set(zip(truth.tolist(), numbers.tolist()))
  assert len(pairs) == 4 and cosines.min() > 0.9
  again, _ = neighbors.clusters(lambda rows: x[rows], np.arange(200), 4, 0)
  np.testing.assert_array_equal(numbers, again)
