"""Rays and figures: points are on the surface, and shadows are where rays to the light end."""

import numpy as np
import pytest

from tips_jax.data.scenes import solids
from tips_jax.data.scenes.primitives import Relief

FIGURES = [(shape, k) for shape in solids.SHAPES for k in range(len(solids.figures(shape)))]


def _rays(rng, count):
  """(origin, directions) from outside to points in the middle."""
  origin = rng.normal(size=3)
  origin = (4 * origin / np.linalg.norm(origin)).astype(np.float32)
  targets = rng.uniform(-1, 1, (3, count)).astype(np.float32)
  return origin, targets - origin[:, None]


@pytest.mark.parametrize('shape, k', FIGURES)
def test_rays_end_at_the_hull_or_inside_it(shape, k):
  figure = solids.figures(shape)[k]
  corners = figure.hull()
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(10):
    origin, directions = _rays(rng, 200)
    if isinstance(figure, Relief) and abs(origin[2]) < 2:
      continue  # from the edge
    t, face = figure.trace(origin, directions)
    hit = np.isfinite(t)
    hits += np.count_nonzero(hit)
    points = origin[:, None] + t[hit] * directions[:, hit]
    assert (points.T > corners.min(0) - 0.03).all() and (points.T < corners.max(0) + 0.03).all()
    surface = figure.surface(points, np.broadcast_to(face, t.shape)[hit])
    length = np.linalg.norm(surface.normal, axis=0)
    assert (length > 0.1).all()
  assert hits > 10


@pytest.mark.parametrize('shape, k', FIGURES)
def test_a_point_is_shaded_where_a_ray_to_the_light_ends(shape, k):
  figure = solids.figures(shape)[k]
  if isinstance(figure, Relief):
    pytest.skip('its shadow is that of its outline')
  rng = np.random.default_rng(1)
  shaded = 0
  for _ in range(100):
    light = rng.normal(size=3)
    light = (light / np.linalg.norm(light)).astype(np.float32)
    # Far away on the other side, where all rays to the light pass the middle.
    point = (rng.uniform(-1, 1, 3) - 4 * light).astype(np.float32)
    t, _ = figure.trace(point, light[:, None])
    assert figure.shades(point[:, None], light)[0] == np.isfinite(t[0])
    shaded += bool(np.isfinite(t[0]))
  assert shaded > 1
