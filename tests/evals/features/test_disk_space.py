"""The room that features take is what is then written, and too little of it is refused before any
is computed.
"""

import re

import pytest

from tests.evals.stub_encoder import Stub
from tips_jax.core.errors import InputError
from tips_jax.data.scenes import dataset as scenes
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations
from tips_jax.evals.features import cache as cache_lib
from tips_jax.evals.features import disk_space


def test_room_on_the_disk(tmp_path_factory, tmp_path, monkeypatch):
  path = scenes.build(tmp_path_factory.mktemp('space') / 'scenes', train=20, test=12, size=32)
  kinds = ('knn', 'segmentation', 'zeroshot_segmentation')
  jobs = evaluations.of_store(path, only=kinds, size=32)
  encoder, cache, told = Stub(), cache_lib.Cache(tmp_path), []
  usage = disk_space.shutil.disk_usage(tmp_path)
  monkeypatch.setattr(disk_space.shutil, 'disk_usage', lambda _: usage._replace(free=10_000))
  with pytest.raises(
    InputError, match='has 0.0 MB free; the features take about .* MB more .*scenes train .*--limit'
  ):
    suite.run(encoder, jobs, cache=cache)
  assert encoder.images == 0 and not list(tmp_path.iterdir())
  monkeypatch.setattr(disk_space.shutil, 'disk_usage', lambda _: usage)
  needed, check = [], disk_space.needed
  monkeypatch.setattr(disk_space, 'needed', lambda works: needed.append(check(works)) or needed[-1])
  suite.run(encoder, jobs, cache=cache, tell=told.append)
  assert re.match(r'features: about \d+\.\d MB to be written \(scenes .* free in ', told[0])
  written = sum(
    file.stat().st_size - 128
    for file in tmp_path.glob('features/*/*.npy')
    if file.stem not in ('done', 'label')
  )
  assert sum(needed[0].values()) == pytest.approx(written, rel=0.1)
  suite.run(encoder, jobs, cache=cache)
  assert sum(needed[1].values()) == 0  # all of it is there
