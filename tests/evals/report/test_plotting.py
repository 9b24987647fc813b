"""Pictures show what they say."""

import matplotlib.colors
import numpy as np
import pytest

from tests.evals.report.test_results import NAMES, RNG, image, masks, outcome
from tips_jax.evals.report import charts, plotting, style


@pytest.fixture
def strips(monkeypatch):
  """The strips of tiles of what is drawn: title -> tiles."""
  held, draw = {}, plotting._grid
  monkeypatch.setattr(
    plotting,
    '_grid',
    lambda rows: held.update({title: (tiles, notes) for title, tiles, notes in rows}) or draw(rows),
  )
  return held


def test_wrong_pixels_are_red_and_void_is_striped(strips):
  example = {'image': image(240, 240)} | masks((240, 240))
  plotting.segmented(outcome('segmentation', {}, examples=[example], classes=NAMES))
  known, wrong = example['truth'] != 255, example['truth'] != example['predicted']
  (tile,), (note,) = strips['wrong']
  red = (tile == matplotlib.colors.to_rgb(style.WRONG)).all(-1)
  np.testing.assert_array_equal(red, known & wrong)
  assert note == f'{100 * (~wrong)[known].mean():.0f} % right'
  colors = plotting.palette(NAMES)
  (truth,), (predicted,) = strips['truth'][0], strips['predicted'][0]
  np.testing.assert_array_equal(truth[known], colors[example['truth'][known]])
  np.testing.assert_array_equal(predicted, colors[example['predicted']])
  assert {tuple(c) for c in truth[~known]} == {tuple(c) for c in style.STRIPES}


def test_depths_share_one_scale(strips):
  truth = np.zeros((240, 240), np.float32)
  truth[100:170], truth[170:] = 1, 4
  examples = [
    {'image': image(240, 240), 'truth': truth, 'predicted': np.full((240, 240), depth)}
    for depth in (1, 4)
  ]
  assert plotting.depths(outcome('depth', {}, examples=examples))
  (first, second), shown = strips['predicted'][0], strips['truth'][0][0]
  np.testing.assert_array_equal(shown[120, 5], first[0, 0])
  np.testing.assert_array_equal(shown[200, 5], second[0, 0])
  assert strips['error'][1] == [
    'RMSE 2.12 m',
    'RMSE 2.12 m',
  ]  # half of the pixels by 3 m; missing ones left out
  assert not np.array_equal(first[0, 0], second[0, 0])


def test_nothing_known_is_drawn_too():
  for draw, shape in ((plotting.depths, (8, 8)), (plotting.normals, (8, 8, 3))):
    example = {'image': image(8, 8), 'truth': np.zeros(shape), 'predicted': np.ones(shape)}
    assert draw(outcome('depth', {}, examples=[example])).startswith(b'\x89PNG')
  example = {'image': image(8, 8), 'truth': np.full((8, 8), 255), 'predicted': np.full((8, 8), 300)}
  assert plotting.segmented(outcome('segmentation', {}, examples=[example]))
  assert plotting.segmented(outcome('segmentation', {})) is None


def test_the_worst_classes():
  share = np.eye(30) * 0.5
  share[3, 7], share[7, 4], share[20, 21] = 0.3, 0.2, 0.4
  assert charts.most_confused(share) == [20, 21, 3, 7, 4]
  assert charts.most_confused(share, most=3) == [20, 21]
  assert (
    charts.most_confused(np.eye(5)) == []
    and len(charts.most_confused(RNG.uniform(size=(40, 40)))) <= 10
  )
  assert charts.confusion(outcome('knn', {}, confusion=np.eye(5))) is None


def test_palettes_tell_classes_apart():
  colors = plotting.palette(['background', *map(str, range(30))])
  distance = np.linalg.norm(colors[:31, None] - colors[None, :31], axis=-1)
  assert distance[~np.eye(31, dtype=bool)].min() > 0.05


def test_components_are_the_principal_ones():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
  scores = rng.normal(size=(6 * 25, 8)) * np.array([9, 5, 3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2])
  found = plotting.components(scores @ basis)
  assert found.min() == 0 and found.max() == 1
  for k in range(3):
    inside = (found[:, k] > 0) & (found[:, k] < 1)
    assert abs(np.corrcoef(found[inside, k], scores[inside, k])[0, 1]) > 0.99
  assert plotting.components(np.ones((18, 2))).shape == (18, 3)  # narrow and constant


def test_smoothing_keeps_lines_straight_and_means_right():
  y = np.random.default_rng(0).normal(size=40)
  found = charts.smoothed(y, 5)
  assert found[20] == pytest.approx(y[15:26].mean()) and found[0] == pytest.approx(y[0])
  assert found[-1] == pytest.approx(y[-6:].mean())
  np.testing.assert_allclose(charts.smoothed(np.arange(20.0), 3)[:17], np.arange(17.0))
