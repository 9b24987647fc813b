"""UnED as its protocol says: eight data sets, one index."""

import numpy as np
import pytest

from tests.data.benchmarks import fake_benchmarks as fake
from tests.evals.stub_encoder import Stub
from tips_jax.evals import suite
from tips_jax.evals.datasets import evaluations, protocols
from tips_jax.evals.features import cache as cache_lib
from tips_jax.evals.features import splits as suite_parts
from tips_jax.evals.report import results as sheet
from tips_jax.evals.tasks import instance_retrieval as instance


def test_uned_is_searched_in_one_index(tmp_path):
  names = protocols.SUITES['uned']
  for name in names:
    fake.WRITE[name](tmp_path / 'data')
  jobs = [
    job for name in names for job in evaluations.of_benchmark(name, tmp_path / 'data', size=16)
  ]
  cache = cache_lib.Cache(tmp_path / 'cache')
  outcomes = suite.run(Stub(), jobs, cache=cache, batch_size=2)
  domains = {}
  for job in jobs:
    features_of = lambda split, job=job: Stub().inspect(
      np.stack([suite_parts.Resize(16, 16)(record) for record in job.data.source(split)])
    )['web']
    tags = lambda split, job=job: [record['tags'] for record in job.data.source(split)]
    own = (
      dict(index=features_of('index'), index_tags=tags('index')) if 'index' in job.splits else {}
    )
    domains[job.dataset] = instance.Domain(query=features_of('test'), tags=tags('test'), **own)
  merged, apart = instance.evaluate(domains, merged=True), instance.evaluate(domains)
  assert merged != apart
  for outcome in outcomes:
    assert outcome.metrics['r1'] == pytest.approx(merged[f'r1/{outcome.dataset}'])
    assert outcome.metrics['r1_own'] == pytest.approx(apart[f'r1/{outcome.dataset}'])
    assert outcome.options['merged'] == 8 and outcome.chance['r1'] < outcome.chance['r1_own']
    for example in outcome.examples:
      assert len(example['images']) == 6
  mean = sheet.content(outcomes, checkpoint='stub')['results'][-1]
  assert mean['dataset'] == 'uned, mean of 8' and mean['published']
  assert mean['metrics']['r1']['value'] == pytest.approx(100 * merged['r1'])
  assert mean['data']['uned_met index'] == outcomes[5].data['index']
  [alone] = suite.run(Stub(), jobs[:1], cache=cache, batch_size=2)
  assert alone.options['merged'] == 1 and alone.metrics['r1'] == outcomes[0].metrics['r1_own']
