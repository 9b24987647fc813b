"""What the readers share: masks, depth and normals, and errors that name the file."""

import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import reader as benchmarks_reader
from tips_jax.data.benchmarks import table as benchmarks


def test_a_mask_in_colors_is_no_mask(tmp_path):
  fake.voc(tmp_path)
  reader = benchmarks.open('voc', tmp_path, 'test')
  reader.items[0][1].write_bytes(fake.encoded(fake.pixels()))
  assert reader[0].image is None and 'expected class ids' in reader[0].problem


def plane(normal, shape=(24, 32), focal=30.0):
  """Depth of the plane normal . p = -2 seen from the origin: exact, pixel centers at half.

  Axes: x right, y up, z toward the viewer.
  """
  rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
  ray = np.stack(
    [(columns - shape[1] / 2) / focal, -(rows - shape[0] / 2) / focal, -np.ones(shape)], -1
  )
  return -2 / (ray @ np.asarray(normal))


@pytest.mark.parametrize('normal', [(0, 0, 1), (0.6, 0, 0.8), (0, 0.6, 0.8), (-0.48, 0.36, 0.8)])
@pytest.mark.parametrize('step', [1, 3])
def test_normals_of_a_plane_are_exact(normal, step):
  depth = plane(normal)
  normals, valid = benchmarks_reader.normals_from_depth(depth, 30.0, center=(16, 12), step=step)
  assert valid[step:-step, step:-step].all() and valid.sum() == (24 - 2 * step) * (32 - 2 * step)
  np.testing.assert_allclose(
    normals[valid], np.broadcast_to(normal, normals[valid].shape), atol=1e-9
  )


def test_normals_stop_at_holes_and_edges():
  depth = plane((0, 0, 1))
  depth[10, 10] = 0
  depth[:, 20:] *= 2
  _, valid = benchmarks_reader.normals_from_depth(depth, 30.0, center=(16, 12), jump=0.05)
  assert not valid[10, 9:12].any() and not valid[9:12, 10].any() and valid[9, 9]
  assert not valid[:, 19:21].any() and valid[5, 18] and valid[5, 21]
  _, loose = benchmarks_reader.normals_from_depth(depth, 30.0, center=(16, 12), missing=1e6)
  assert not loose[10, 10] and loose[10, 9] and loose[5, 20]


def test_normals_survive_eight_bits():
  normals = fake.unit_normals(0)
  valid = np.ones(normals.shape[:2], bool)
  valid[0] = False
  code = benchmarks_reader.encode_normals(normals, valid)
  assert (code[0] == 0).all()
  np.testing.assert_allclose(code[1:] / 127.5 - 1, normals[1:], atol=0.5 / 127.5 + 1e-6)


def test_depth_in_millimeters_knows_what_is_missing():
  depth = benchmarks_reader.millimeters([[0.5, np.nan, -1, np.inf, 70, 1.2346]])
  assert depth.dtype == np.uint16
  np.testing.assert_array_equal(depth, [[500, 0, 0, 0, 0, 1235]])


def test_broken_lists_name_the_file(tmp_path):
  fake.docci(tmp_path)
  fake.put(tmp_path / 'docci/docci_descriptions.jsonlines', '{"example_id": ')
  with pytest.raises(InputError, match='docci_descriptions.jsonlines is not JSON'):
    benchmarks.open('docci', tmp_path)
  fake.flickr8k(tmp_path)
  fake.put(tmp_path / 'flickr8k/dev.zip', 'no zip')
  with pytest.raises(InputError, match='dev.zip is not a complete zip'):
    benchmarks.open('flickr8k', tmp_path)


def test_a_missing_file_is_told_by_name_and_leaves_no_image(tmp_path):
  fake.voc(tmp_path)
  reader = benchmarks.open('voc', tmp_path, 'test')
  gone = reader.items[1][1]
  gone.unlink()
  assert reader.missing() == [str(gone)]
  assert reader[1].image is None and str(gone) in reader[1].problem and reader[0].image
