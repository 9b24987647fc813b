"""What an evaluation writes: numbers in printed units, tables that line up, pictures that show what
they say.
"""

import base64
import html.parser
import json
import math
import subprocess
import sys
import types

import cv2
import numpy as np
import pytest

from tests.disk import full_disk
from tips_jax.core.errors import InputError
from tips_jax.evals.datasets import protocols
from tips_jax.evals.datasets.published import Figure
from tips_jax.evals.report import results, tables
from tips_jax.evals.tasks import table as tasks

NAMES = ('sky', 'ball', 'cube', 'cup')
RNG = np.random.default_rng(0)


def outcome(task, metrics, **others):
  return types.SimpleNamespace(
    **{
      'dataset': 'toy',
      'task': task,
      'spec': tasks.spec(task.removesuffix('_voc21')),
      'prefix': f'toy/{task}',
      'metrics': metrics,
      'chance': {k: v / 2 for k, v in metrics.items()},
      'baselines': {},
      'published': {},
      'examples': [],
      'seconds': {'encoder': 1.25, 'task': 0.5},
      'classes': (),
      'confusion': None,
      'options': {},
      'chosen': {},
      'data': {},
      **others,
    }
  )


def image(height=20, width=28):
  return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def masks(shape=(20, 28)):
  truth, predicted = RNG.integers(0, 4, shape), RNG.integers(0, 4, shape)
  truth[:4] = 255
  return {'truth': truth.astype(np.uint8), 'predicted': predicted}


def every_task():
  depth = lambda: {
    'truth': np.pad(RNG.uniform(1, 5, (18, 28)), ((2, 0), (0, 0))),
    'predicted': RNG.uniform(1, 5, (5, 7)),
  }
  normals = lambda: {
    'truth': np.pad(RNG.normal(size=(18, 28, 3)), ((2, 0), (0, 0), (0, 0))),
    'predicted': RNG.normal(size=(5, 7, 4)),
  }
  labels = [
    {'image': image(), 'truth': 1, 'predicted': 1},
    {'image': image(), 'truth': 1, 'predicted': 'cup'},
  ]
  known = {
    'classes': NAMES,
    'confusion': np.array([[5, 3, 0, 0], [1, 4, 0, 0], [0, 0, 6, 0], [0, 0, 2, 2]]),
  }
  patch = RNG.normal(size=(3, 4, 8)).astype(np.float16)
  found = {'images': [image() for _ in range(3)]}
  cups = [found | {'text': 'cup', 'right': [0, 2], 'rank': 1}]
  return [
    outcome(
      'segmentation',
      {'miou': 0.5},
      examples=[{'image': image(), 'patch': patch} | masks()],
      **known,
    ),
    outcome(
      'depth',
      {'rmse': 0.5, 'delta1': 0.75},
      examples=[{'image': image(40, 30)} | depth() for _ in range(2)],
    ),
    outcome('dpt_depth', {'rmse': 0.25}, examples=[{'image': image()} | depth()]),
    outcome(
      'dpt_normals',
      {'angular_rmse': 22.5, 'within_11.25': 0.5},
      examples=[{'image': image()} | normals()],
    ),
    outcome('knn', {'accuracy': 0.625}, examples=labels, **known),
    outcome(
      'linear', {'accuracy': 0.75, 'synthetic/accuracy': 0.5}, examples=labels, classes=NAMES
    ),
    outcome(
      'instance_retrieval', {'r1': 0.5}, examples=[{'image': image(), 'right': [0, 2]} | found]
    ),
    outcome(
      'retrieval',
      {'i2t_r1': 0.5, 't2i_r1': 0.25, 't2i_r5': 0.5},
      examples=[
        {'text': 'a <b>', 'right': 1, 'rank': 2} | found,
        {'text': 'far ' * 90, 'right': None, 'rank': 70} | found,
      ],
    ),
    outcome('zeroshot', {'accuracy': 0.5}, examples=labels[:1], classes=NAMES),
    outcome(
      'zeroshot_segmentation_voc21',
      {'miou': 0.125},
      examples=[{'image': image()} | masks((9, 13))],
      classes=NAMES,
    ),
    outcome('region_classification', {'accuracy': 0.5}, examples=labels[:1], classes=NAMES),
    outcome('region_retrieval', {'t2r_r1': 0.25}, examples=cups),
    outcome('tagging', {'map': 0.5}, examples=cups),
  ]


class Page(html.parser.HTMLParser):
  """What stands in a page: the links, the pictures and the headings."""

  def __init__(self, text):
    super().__init__()
    self.links, self.images, self.heads, self.inside = [], [], [], ''
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    assert tag not in ('script', 'link', 'iframe')
    self.inside = tag
    self.links += [value for name, value in attributes if name == 'href']
    self.images += [value for name, value in attributes if name == 'src']

  def handle_data(self, data):
    if self.inside == 'h2' and data.strip():
      self.heads.append(data)


def test_everything(tmp_path):
  table = results.write(
    tmp_path,
    every_task(),
    title='a < b',
    facts={'images': '5 & 6'},
    checkpoint='small',
    sha256='ab12',
  )
  content = json.loads((tmp_path / 'results.json').read_text())
  assert content['schema'] == 2 and content['checkpoint'] == {'name': 'small', 'sha256': 'ab12'}
  found = {entry['task']: entry for entry in content['results']}
  assert found['depth']['metrics'] == {
    'rmse': {'value': 0.5, 'unit': 'm', 'better': 'lower', 'chance': 0.25},
    'delta1': {'value': 75.0, 'unit': '%', 'better': 'higher', 'chance': 37.5},
  }
  assert found['dpt_normals']['metrics']['angular_rmse'] == {
    'value': 22.5,
    'unit': 'deg',
    'better': 'lower',
    'chance': 11.25,
  }
  assert (
    found['dpt_normals']['metrics']['within_11.25']['value'] == 50
    and found['depth']['seconds']['encoder'] == 1.25
  )

  text = (tmp_path / 'index.html').read_text()
  page = Page(text)
  titles = ['Classification and retrieval at a glance', 'What the patches know']
  assert page.heads == ['Results', *titles, *(spec.title for spec in tasks.TASKS.values())]
  assert 'a &lt; b' in text and '5 &amp; 6' in text and '://' not in text.replace('data:', '')
  for link in page.links:
    assert (tmp_path / link).exists(), link
  for source in page.images:
    kind, data = source.split(',')
    assert kind == 'data:image/webp;base64'
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture.shape[2] == 4 and picture.std() > 5
  files = sorted(path.name for path in (tmp_path / 'pictures').iterdir())
  assert (
    len(files) == len(page.images) == 2 + 13 + 2
  )  # bars and features, one a task, two confusions
  assert {
    'bars.png',
    'toy-features.png',
    'toy-depth.png',
    'toy-confusion-knn.png',
    'toy-voc21-zeroshot_segmentation.png',
  } < set(files)
  assert not list(tmp_path.glob('**/*.tmp'))

  rows = table.splitlines()
  assert rows[0].split() == ['data', 'set', 'task', 'metric', 'ours', 'chance', 'published']
  assert rows[1].split() == ['toy', 'segmentation', 'mIoU', '%', '↑', '50.0', '25.0', '-']
  assert rows[2].split() == ['depth', 'RMSE', 'm', '↓', '0.500', '0.250', '-']
  assert rows[4].split() == ['dpt_normals', 'RMSE', '°', '↓', '22.5', '11.2', '-']
  assert len(rows) == 15  # retrieval in both directions; of two CLS tokens the first
  assert len({row.rindex('-') for row in rows[1:]}) == 1


RUN = [
  {'step': i, 'loss': 3.0 - i / 50, 'loss/a': None if i == 4 else 1.0, 'rate': 5} for i in range(30)
] + [{'step': i, 'eval/toy/knn/accuracy': i / 30} for i in (0, 10, 20)]


def test_a_training_run(tmp_path):
  metrics_path = tmp_path / 'metrics.jsonl'
  metrics_path.write_text(''.join(json.dumps(line) + '\n' for line in RUN))
  (tmp_path / 'pictures').mkdir()
  (tmp_path / 'pictures' / 'old.png').write_text('of an earlier report')
  run = [
    outcome('knn', {'accuracy': 1.0, 'b/accuracy': math.nan}, chance={'accuracy': 0.4}),
    outcome('depth', {'rmse': 0.4567}),
  ]
  table = results.write(
    tmp_path,
    run,
    title='a run',
    before={'toy/knn/accuracy': 0.25, 'toy/depth/rmse': None},
    pixel_baseline={'toy/knn/accuracy': 0.123},
    metrics_path=metrics_path,
    losses=('loss', 'loss/a', 'none'),
  )
  rows = [line.split() for line in table.splitlines()]
  assert rows[0] == [
    *('data', 'set', 'task', 'metric'),
    *('before', 'after', 'chance', 'pixels', 'published'),
  ]
  assert rows[1] == ['toy', 'knn', 'accuracy', '%', '↑', '25.0', '100.0', '40.0', '12.3', '-']
  assert rows[2] == ['depth', 'RMSE', 'm', '↓', '-', '0.457', '0.228', '-', '-']
  entry = json.loads((tmp_path / 'results.json').read_text())['results'][0]
  assert entry['metrics'] == {
    'accuracy': {
      'value': 100.0,
      'unit': '%',
      'better': 'higher',
      'chance': 40.0,
      'before': 25.0,
      'pixel_baseline': pytest.approx(12.3),
    },
    'b/accuracy': {
      'value': None,
      'unit': '%',
      'better': 'higher',
      'chance': None,
      'before': None,
      'pixel_baseline': None,
    },
  }
  assert json.loads((tmp_path / 'report.json').read_text()) == {
    'before': {'toy/knn/accuracy': 0.25, 'toy/depth/rmse': None},
    'after': {'toy/knn/accuracy': 1.0, 'toy/knn/b/accuracy': None, 'toy/depth/rmse': 0.4567},
    'chance': {'toy/knn/accuracy': 0.4, 'toy/depth/rmse': 0.22835},
    'pixel_baseline': {'toy/knn/accuracy': 0.123},
  }
  page = Page((tmp_path / 'index.html').read_text())
  assert page.heads[:3] == ['Results', 'Losses', 'Progress'] and len(page.images) == 3
  pictures = sorted(path.name for path in (tmp_path / 'pictures').iterdir())
  assert pictures == ['bars.png', 'losses.png', 'progress.png']
  for name in pictures:
    image = cv2.imread(str(tmp_path / 'pictures' / name), cv2.IMREAD_UNCHANGED)
    assert min(image.shape[:2]) > 100 and image.std() > 5, name


def test_an_evaluation_has_no_columns_of_a_run(tmp_path):
  results.write(tmp_path, [outcome('knn', {'accuracy': 1.0})], title='t')
  metric = json.loads((tmp_path / 'results.json').read_text())['results'][0]['metrics']['accuracy']
  assert set(metric) == {'value', 'unit', 'better', 'chance'}
  assert not (tmp_path / 'report.json').exists()


def test_answers_without_features_stand_beside_chance(tmp_path):
  baselines = {
    'position': {'rmse': 0.75},
    'pixels_position': {'rmse': 0.625},
    'oracle': {'rmse': 0.125},
  }
  run = [outcome('depth', {'rmse': 0.5}, baselines=baselines), outcome('knn', {'accuracy': 1.0})]
  rows = results.write(tmp_path, run, title='t').splitlines()
  heads = 'chance by position pixels and position oracle published'.split()
  assert rows[0].split()[-len(heads) :] == heads
  assert rows[1].split()[-6:] == ['0.500', '0.250', '0.750', '0.625', '0.125', '-']
  assert rows[2].split()[-6:] == ['100.0', '50.0', '-', '-', '-', '-']
  metric = json.loads((tmp_path / 'results.json').read_text())['results'][0]['metrics']['rmse']
  assert (metric['position'], metric['pixels_position'], metric['oracle']) == (0.75, 0.625, 0.125)
  page = (tmp_path / 'index.html').read_text()
  assert 'By position: ' in page and 'Pixels and position: ' in page and 'Oracle: ' in page


def test_averages_have_the_columns_of_a_run():
  domains = [name for name in protocols.PROTOCOLS if name.startswith('uned_')][:2]
  run = []
  for i, name in enumerate(domains):
    run.append(
      outcome(
        'instance_retrieval', {'r1': i / 4}, dataset=name, prefix=f'{name}/instance_retrieval'
      )
    )
  before = {f'{domains[0]}/instance_retrieval/r1': 0.5, f'{domains[1]}/instance_retrieval/r1': 0.25}
  mean = results.content(run, checkpoint='c', before=before, pixel_baseline={})['results'][2]
  assert mean['metrics']['r1'] == {
    'value': 12.5,
    'unit': '%',
    'better': 'higher',
    'chance': 6.25,
    'before': 37.5,
    'pixel_baseline': None,
  }


def test_missing_tasks_do_not_appear(tmp_path):
  results.write(
    tmp_path, [outcome('knn', {'accuracy': math.nan}), outcome('depth', {'rmse': 1.0})], title='t'
  )
  page = Page((tmp_path / 'index.html').read_text())
  assert page.heads == ['Results', 'Linear depth', 'k-NN classification'] and not page.images
  entry = json.loads((tmp_path / 'results.json').read_text())['results'][0]
  assert entry['metrics']['accuracy']['value'] is None


def test_options_are_plain_json():
  content = results.content(
    [
      outcome(
        'knn',
        {'accuracy': 1.0},
        options={
          'rates': (np.float32(0.5), 1),
          'k': np.int64(3),
          'crop': None,
          'far': math.inf,
          'how': np.array([True]),
        },
      )
    ],
    checkpoint='c',
  )
  assert json.loads(json.dumps(content, allow_nan=False))['results'][0]['options'] == {
    'rates': [0.5, 1],
    'k': 3,
    'crop': None,
    'far': 'inf',
    'how': [True],
  }


@pytest.mark.parametrize(
  'name, models',
  [
    ('quickstart', ['TIPS S/14 HR (released)', 'TIPSv2 B/14']),
    ('tips_oss_g14_lowres_vision.npz', ['TIPS g/14 LR (released)']),
    ('TIPS B/14 HR', ['TIPS B/14 HR (released)']),
    ('google/tipsv2-so400m14', ['TIPSv2 So400m/14']),
    ('TIPS-v2 L14', ['TIPSv2 L/14']),
    ('clip ViT-B/16', ['TIPS B/14 HR (released)', 'TIPSv2 B/14']),
    ('tips_jax, large', ['TIPS L/14 HR (released)', 'TIPSv2 L/14']),
  ],
)
def test_the_nearest_published_model(name, models):
  figures = [vars(figure) for figure in protocols.get('voc').published('segmentation', 'miou')]
  assert [figure['model'] for figure in tables.nearest(figures, name)] == models


def test_published_rows_stand_in_the_table(tmp_path):
  published = {
    'miou': (
      Figure('TIPS S/14 HR (released)', 80.6, 'V', 'README'),
      Figure('TIPSv2 g/14', 51.6, 'T2', 'x'),
    )
  }
  table = results.write(
    tmp_path, [outcome('segmentation', {'miou': 0.5}, published=published)], title='t'
  ).splitlines()
  assert table[1].endswith('80.6  TIPS S/14 HR [V]') and table[2].split() == [
    '51.6',
    'TIPSv2',
    'g/14',
    '[T2]',
  ]
  assert table[1].index('TIPS') == table[2].index('TIPS')
  assert 'TIPS S/14 HR [V]' in (tmp_path / 'index.html').read_text()


def test_averages_are_compared_with_averages():
  domains = [name for name in protocols.PROTOCOLS if name.startswith('uned_')]
  published = {'r1': protocols.get('uned_met').published('instance_retrieval', 'r1')}
  run = [
    outcome('instance_retrieval', {'r1': i / 8}, dataset=name, published=published)
    for i, name in enumerate(domains)
  ]
  whole = results.content([*run, outcome('knn', {'accuracy': 1.0})], checkpoint='c')['results']
  assert [e['dataset'] for e in whole] == [*domains, 'uned, mean of 8', 'toy']
  assert whole[8]['metrics']['r1']['value'] == 43.75 and len(whole[8]['published']) == len(
    published['r1']
  )
  assert not any(e['published'] for e in whole[:8])
  part = results.content(run[:3], checkpoint='c')['results']
  assert part[3]['dataset'] == 'uned, mean of 3' and not any(e['published'] for e in part)
  assert len(results.content(run[:1], checkpoint='c')['results']) == 1


def test_compare(tmp_path):
  first = [
    outcome('segmentation', {'miou': 0.5}),
    outcome('depth', {'rmse': 0.5}),
    outcome('knn', {'accuracy': 0.5}),
  ]
  second = [outcome('segmentation', {'miou': 0.25}), outcome('depth', {'rmse': 0.25})]
  results.write(tmp_path / 'a', first, title='TIPS', sha256='abcdef1')
  results.write(tmp_path / 'b', second, title='CLIP')
  rows = results.compare([tmp_path / 'a', tmp_path / 'b' / 'results.json']).splitlines()
  assert rows[0].split()[4:6] == ['TIPS', 'CLIP']
  assert rows[1].split()[-4:] == ['50.0*', '25.0', '25.0', '-']
  assert rows[2].split()[-4:] == ['0.500', '0.250*', '0.250', '-']
  assert rows[3].split()[-4:] == ['50.0*', '-', '25.0', '-']
  assert 'TIPS abcdef' in results.compare([tmp_path / 'a'] * 2)
  random = results.content(second, checkpoint='random weights')
  table = results.write(
    tmp_path / 'c', first, title='t', checkpoint='TIPS', others=[random, tmp_path / 'b']
  )
  assert table.splitlines()[1].split()[-5:] == ['50.0*', '25.0', '25.0', '25.0', '-']
  assert '<th>random weights</th>' in (tmp_path / 'c' / 'index.html').read_text()


def test_what_was_measured_otherwise_is_marked(tmp_path):
  on = lambda images, sha256='a': {'test': {'images': images, 'sha256': sha256}}
  one = lambda value, **about: results.content(
    [outcome('knn', {'accuracy': value}, **about)], checkpoint='x'
  )
  first = one(0.5, options={'size': 224, 'k': (1, 2)}, data=on(100), chosen={'k': 1})
  alike = one(0.25, options={'size': 224, 'k': (1, 2)}, data=on(100), chosen={'k': 2})
  size = one(0.75, options={'size': 448, 'k': (1, 2)}, data=on(100))
  count, other = (
    one(0.8, options=first['results'][0]['options'], data=on(90)),
    one(0.9, options=first['results'][0]['options'], data=on(100, 'b')),
  )
  contents = [json.loads(json.dumps(x)) for x in (first, alike, size, count, other)]
  lines = tables.table(contents).splitlines()
  assert lines[1].split()[5:10] == ['50.0*', '25.0', '75.0≠', '80.0≠', '90.0≠']
  assert lines[2].startswith('≠ measured otherwise than the first number')
  assert [line.split(': ', 1)[1] for line in lines[3:]] == [
    'size 448, not 224',
    '90 images of test, not 100',
    'other images of test',
  ]
  results.write(
    tmp_path,
    [outcome('knn', {'accuracy': 0.5}, options={'size': 224, 'k': (1, 2)}, data=on(100))],
    title='t',
    others=contents[1:3],
  )
  page = (tmp_path / 'index.html').read_text()
  assert (
    page.count('<abbr title="size 448, not 224">≠</abbr>') == 1 and 'x 3: size 448, not 224' in page
  )


@pytest.mark.parametrize(
  'text, words',
  [
    (None, 'cannot read'),
    ('{"a"', 'not JSON'),
    ('[]', 'got schema None'),
    ('{"schema": 9}', 'got schema 9'),
    ('{"schema": 1}', 'got schema 1'),
  ],
)
def test_results_that_are_none(tmp_path, text, words):
  if text:
    (tmp_path / 'results.json').write_text(text)
  with pytest.raises(InputError, match=words):
    results.compare([tmp_path / 'results.json'])


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot write the results'):
    results.write(tmp_path / 'file', [outcome('knn', {'accuracy': 1.0})], title='t')


@pytest.mark.parametrize('size, name', [(16, 'results.json'), (4096, '.*png')])
def test_a_full_disk_is_one_line_that_says_where(tmp_path, size, name):
  with pytest.raises(InputError, match=f'cannot write .*{name}. .File too large.') as error:
    with full_disk(size):
      results.write(tmp_path / 'out', [outcome('knn', {'accuracy': 1.0})], title='t')
  assert error.value.code == 2
  left = [path.name for path in (tmp_path / 'out').rglob('*') if path.is_file()]
  assert left == ['results.json'][: size > 16]  # whole files alone


def test_importing_the_results_does_not_import_matplotlib():
  code = 'import sys, tips_jax.evals.during_training; sys.exit("matplotlib" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
