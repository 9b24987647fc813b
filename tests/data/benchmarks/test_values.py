"""Index files that others damaged or made up: one line, and no file outside of the data set."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.damage import FUZZ, damaged
from tests.data.benchmarks import fake_benchmarks as fake
from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import dense, values
from tips_jax.data.benchmarks import table as benchmarks

# Of each reader: the index file of its test split, and how that names the first image.
NAMES = {
  'voc': ('VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt', '2007_val0000'),
  'context': ('VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt', '2007_val0000'),
  'nyu': ('nyu/nyu_test.txt', 'bathroom/rgb_00000.jpg'),
  'navi': ('navi_v1/dog/wild_set/annotations.json', '000.jpg'),
  'flickr30k': ('flickr30k/dataset_flickr30k.json', '3.jpg'),
  'coco': ('coco/dataset_coco.json', 'COCO_val2014_000000000003.jpg'),
  'docci': ('docci/docci_descriptions.jsonlines', 'test_00000.jpg'),
  'camvid': ('camvid/train.jsonl', 'train/1.jpg'),
  'rgbd': ('rgbd/train.jsonl', '4.jpg'),
  'flickr8k': ('flickr8k/dev.jsonl', 'dev0.jpg'),
  'coco_mini': ('coco_mini/train.jsonl', 'train/0.jpg'),
}
for domain in fake.UNED:
  first = f'{domain}/test/1.jpg'
  if len(fake.UNED[domain]['test']) == 1:
    first = f'{domain}/test/0.jpg'
  NAMES[f'uned_{domain}'] = (f'uned/info_files/{domain}/test.json', first)
# They list the folders of images, or hold the images themselves.
WITHOUT_NAMES = {'ade20k', 'imagenet', 'cifar10', 'nyu_normals'}
OUTSIDE = ['../secret.jpg', 'a/../../secret.jpg', '/etc/secret.jpg', '..']


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(dense.Navi, 'side', 32)  # pixels: its images take most of the time


def test_every_reader_is_in_the_table():
  assert set(NAMES) | WITHOUT_NAMES == set(benchmarks.READERS)


def rename(data_dir, name, new):
  """Writes another name of the first image into the index file of a reader."""
  file, old = NAMES[name]
  text = (data_dir / file).read_text()
  assert old in text
  (data_dir / file).write_text(text.replace(old, new))


@pytest.mark.parametrize('new', OUTSIDE)
@pytest.mark.parametrize('name', NAMES)
def test_names_never_lead_out_of_the_data_set(tmp_path, name, new):
  fake.WRITE[name](tmp_path)
  rename(tmp_path, name, new)
  if name == 'nyu' and new.startswith('/'):  # BTS writes all its names so; they are inside
    [image, _] = benchmarks.open(name, tmp_path, 'test').files_of(['etc/secret.jpg', 'x'])
    assert image == tmp_path / 'nyu/etc/secret.jpg'
    return
  with pytest.raises(InputError, match=f'^{name}: .*expected one inside of the data set') as error:
    benchmarks.open(name, tmp_path, 'test')
  assert '\n' not in str(error.value)


def test_the_folder_of_an_image_of_coco_stays_inside_too(tmp_path):
  fake.coco(tmp_path)
  file = tmp_path / 'coco/dataset_coco.json'
  file.write_text(file.read_text().replace('"val2014"', '"../.."'))
  with pytest.raises(InputError, match="'../..'; expected one inside"):
    benchmarks.open('coco', tmp_path, 'test')


# Every value of an index file in JSON becomes each of these.
OTHERS = [None, True, 7, 0.5, float('nan'), 'x', [], [1], {}, {'a': 1}]


def places(content, place=()):
  """The places of the values in nested dicts, and of the last ones in lists."""
  found = [place]
  if isinstance(content, dict):
    for key, value in content.items():
      found += places(value, (*place, key))
  if isinstance(content, list) and content:
    found += places(content[-1], (*place, -1))
  return found


def put_at(content, place, value):
  if not place:
    return value
  inner = content
  for key in place[:-1]:
    inner = inner[key]
  inner[place[-1]] = value
  return content


def read_or_refuse(name, data_dir):
  """Reads all samples; those that are damaged say so."""
  try:
    reader = benchmarks.open(name, data_dir, 'test')
  except InputError as error:
    assert '\n' not in str(error)
    return
  reader.missing()
  for sample in reader:
    assert type(sample.key) is str and all(type(text) is str for text in sample.captions)
    assert sample.image is not None or sample.problem
    assert all(type(tag) is str for tag in sample.extra.get('tags', ()))
  assert all(type(text) is str for text in (*reader.label_names, *reader.mask_classes))


def changed(text):
  """A JSON text with every value changed into each of OTHERS."""
  for place in places(json.loads(text)):
    for other in OTHERS:
      yield json.dumps(put_at(json.loads(text), place, other))


@pytest.mark.parametrize('name', fake.WRITE)
def test_values_of_other_types_are_one_line_or_a_problem(tmp_path, name):
  fake.WRITE[name](tmp_path)
  for file in tmp_path.rglob('*.json'):
    whole = file.read_text()
    for text in changed(whole):
      file.write_text(text)
      read_or_refuse(name, tmp_path)
    file.write_text(whole)
  for file in tmp_path.rglob('*.json*l*'):  # jsonl, jsonlines
    lines = file.read_text().splitlines()
    for i, line in enumerate(lines):
      for text in changed(line):
        file.write_text('\n'.join([*lines[:i], text, *lines[i + 1 :]]))
        read_or_refuse(name, tmp_path)
    file.write_text('\n'.join(lines))


@pytest.mark.parametrize('name', NAMES)
def test_a_damaged_index_file_is_read_or_refused_in_one_line(tmp_path, name):
  fake.WRITE[name](tmp_path)
  file = tmp_path / NAMES[name][0]
  whole = file.read_bytes()
  pieces = (b'..', b'../', b'/', b'\0', b'"', b'[' * 5000, b'\xff', b'a' * 300, b'\\ud800')

  @settings(FUZZ, max_examples=60)
  @given(st.data())
  def check(data):
    file.write_bytes(data.draw(damaged(whole, pieces)))
    read_or_refuse(name, tmp_path)

  check()


@pytest.mark.parametrize(
  'row, expected',
  [
    (7, "got 7; expected an object with 'a'"),
    ({}, "got {}; expected an object with 'a'"),
    ({'a': True}, 'a: got True; expected int or str'),
    ({'a': [1]}, r'a: got \[1\]; expected int or str'),
  ],
)
def test_a_value_is_of_the_types_that_are_read(row, expected):
  with pytest.raises(ValueError, match=expected):
    values.get(row, 'a', int, str)
  assert values.get({'a': 1}, 'a', int, str) == 1
