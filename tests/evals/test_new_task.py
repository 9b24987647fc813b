"""A spec in the table is all that a new task needs."""

import base64
import json

from tests.evals.stub_encoder import Stub
from tests.evals.test_suite import TEST, jobs_of, path  # noqa: F401
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations
from tips_jax.evals.features import cache as cache_lib
from tips_jax.evals.report import results
from tips_jax.evals.tasks import table
from tips_jax.evals.tasks.spec import Metric, TaskSpec


def test_a_task_of_ones_own_is_measured_drawn_and_written(path, tmp_path, monkeypatch):
  """A spec in the table is all that a new task needs."""
  drawn = base64.b64decode(
    'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
  )

  def measure(inputs):
    images = len(inputs.part('test'))
    return {'metrics': {'spread': 2.0 / images}, 'chance': {'spread': 0.5}, 'examples': []}

  spec = TaskSpec(
    name='spread',
    title='Spread of the features',
    caption='A caption.',
    measure=measure,
    metrics=(Metric('spread', 'spread', 'm', 'lower', shown=True),),
    roles=('test',),
    annotation='label',
    draw=lambda result: drawn,
  )
  monkeypatch.setitem(table.TASKS, 'spread', spec)
  cache = cache_lib.Cache(tmp_path / 'cache')
  outcomes = suite.run(Stub(), jobs_of(path, 'spread', 'knn'), cache=cache)
  text = results.write(tmp_path / 'out', outcomes, title='test')
  content = json.loads((tmp_path / 'out' / results.FILE).read_text())
  entry = content['results'][0]
  assert entry['kind'] == 'spread'
  assert entry['metrics']['spread'] == {
    'value': 2 / TEST,
    'unit': 'm',
    'better': 'lower',
    'chance': 0.5,
  }
  assert [png.read_bytes() for png in (tmp_path / 'out').rglob('*spread.png')] == [drawn]
  assert 'spread' in text and 'k-NN' in (tmp_path / 'out' / results.PAGE).read_text()
  assert spec.title in (tmp_path / 'out' / results.PAGE).read_text()
  assert 'spread' in [job.task.name for job in evaluations.of_store(path, texts=False)]
