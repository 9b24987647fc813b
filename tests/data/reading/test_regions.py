"""Regions and tags in a batch: boxes lie where their pixels are, texts belong to their boxes."""

import contextlib
import dataclasses
import io
import json
import os
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Columns, Data, Regions, RegionText, Tags, Text, View
from tips_jax.data import store
from tips_jax.data import tokenizer as tokenizer_lib
from tips_jax.data.ingest import columns as ingest
from tips_jax.data.ingest import convert
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options
from tips_jax.data.reading.in_place import open_data
from tips_jax.data.reading.pipeline import Pipeline, require_texts
from tips_jax.data.reading.records import Records

COLORS = {'red': (230, 20, 20), 'green': (20, 230, 20), 'blue': (20, 20, 230)}
FIELDS = ('boxes', 'region_captions', 'region_tags', 'region_tags_boxes', 'tags')
COUNT = 24
VIEWS = {'global': View(size=64, scale=(0.3, 1.0), flip=0.5)}
REGIONS = Regions(
  count=3,
  texts={
    'words': RegionText(field='region_captions'),
    'marks': RegionText(field='region_tags', count=2),
  },
)


def record(i):
  """Three colored rectangles on black; each says its color, and has one tag, two or none."""
  rng = np.random.default_rng(i)
  image = np.zeros((96, 120, 3), np.uint8)
  boxes = []
  for place, color in enumerate(COLORS.values()):
    top = int(rng.integers(0, 60))
    left = 40 * place + int(rng.integers(0, 8))
    image[top : top + 30, left : left + 30] = color
    boxes.append((top / 96, left / 120, (top + 30) / 96, (left + 30) / 120))
  return {
    'image': cv2.imencode('.png', image[..., ::-1])[1].tobytes(),
    'id': f'id{i}',
    'alt_text': 'three rectangles',
    'captions': [],
    'boxes': np.array(boxes, np.float32),
    'region_captions': list(COLORS),
    'region_tags': ['warm', 'first', 'last'],
    'region_tags_boxes': [0, 0, 2],
    'tags': ['red', 'green', 'blue', ''],
  }


def write_store(parent, records):
  path = parent / 'store'
  folder = store.temporary_folder(path)
  writer = store.Writer(folder, store.features(FIELDS))
  for one in records:
    writer.add('train', one)
  writer.close()
  texts = [*COLORS, 'warm first last three rectangles'] * 9
  tokenizer_lib.train(texts, os.path.join(folder, store.TOKENIZER_FILE), vocab_size=330)
  return store.finish(folder, path, {})


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  return write_store(tmp_path_factory.mktemp('regions'), [record(i) for i in range(COUNT)])


def read(path, **changes):
  config = Data(
    store=str(path),
    views=VIEWS,
    texts={'web': Text(field='alt_text')},
    tags={'kinds': Tags(count=2)},
    regions=REGIONS,
    text_length=8,
  )
  config = dataclasses.replace(config, **changes)
  with contextlib.closing(Pipeline(config, batch_size=COUNT, seed=1)) as pipeline:
    return next(pipeline), pipeline.tokenizer


def test_a_box_lies_where_its_pixels_are_and_has_its_texts(path):
  batch, tokenizer = read(path)
  words = {tuple(tokenizer.encode(word.encode(), 8)): word for word in (*COLORS, 'warm', 'first')}
  found = 0
  for row, slot in zip(*np.nonzero(batch['boxes_valid'])):
    word = words[tuple(batch['words'][row, slot, 0])]
    ymin, xmin, ymax, xmax = np.rint(batch['boxes'][row, slot] * 64).astype(int)
    middle = batch['global'][row, 0, (ymin + ymax) // 2, (xmin + xmax) // 2]
    assert abs(middle.astype(int) - COLORS[word]).max() < 60
    marks = [words.get(tuple(ids)) for ids in batch['marks'][row, slot][:2]]
    assert marks == {'red': ['warm', 'first'], 'green': [None] * 2, 'blue': marks}[word]
    assert batch['marks_valid'][row, slot].sum() == {'red': 2, 'green': 0, 'blue': 1}[word]
    found += 1
  assert COUNT < found < 3 * COUNT  # some have left their crop
  empty = ~batch['boxes_valid']
  assert not batch['boxes'][empty].any() and not batch['words'][empty].any()


def test_a_region_that_the_crop_cuts_is_left_out(path):
  strict, _ = read(path, regions=dataclasses.replace(REGIONS, least=1.0))
  loose, _ = read(path, regions=dataclasses.replace(REGIONS, least=0.0))
  assert strict['boxes_valid'].sum() < loose['boxes_valid'].sum()
  # Those that are whole have the size of the others' crop: nothing is clipped.
  sides = strict['boxes'][strict['boxes_valid']]
  assert ((sides[:, 2:] - sides[:, :2]) > 0.2).all()


def test_of_more_than_there_is_room_for_some_are_drawn(path):
  batch, tokenizer = read(path, regions=dataclasses.replace(REGIONS, count=1, least=0.0))
  assert batch['boxes'].shape == (COUNT, 1, 4)
  assert len({tuple(ids) for ids in batch['words'][:, 0, 0]}) == 3
  # Two of three tags (an empty one is none), in their order.
  tags = {tuple(tokenizer.encode(word.encode(), 8)): i for i, word in enumerate(COLORS)}
  pairs = {tuple(tags[tuple(ids)] for ids in row) for row in batch['kinds']}
  assert pairs == {(0, 1), (0, 2), (1, 2)} and batch['kinds_valid'].all()


def test_short_texts_have_short_rows(path):
  short = Regions(count=3, texts={'words': RegionText(field='region_captions', length=3)})
  batch, tokenizer = read(path, regions=short, tags={'kinds': Tags(count=2, length=2)})
  whole, _ = read(
    path, regions=dataclasses.replace(REGIONS, texts={'words': REGIONS.texts['words']})
  )
  assert batch['web'].shape == (COUNT, 8)
  assert batch['words'].shape == (COUNT, 3, 1, 3) and batch['kinds'].shape == (COUNT, 2, 2)
  for name in ('words', 'kinds'):
    np.testing.assert_array_equal(batch[name], whole[name][..., : batch[name].shape[-1]])
    np.testing.assert_array_equal(batch[f'{name}_valid'], whole[f'{name}_valid'])


def test_regions_change_nothing_else_of_a_batch(path):
  with_regions, _ = read(path)
  without, _ = read(path, regions=Regions(), tags={})
  for name, array in without.items():
    np.testing.assert_array_equal(array, with_regions[name])


@pytest.mark.parametrize(
  'changes, said',
  [
    (dict(regions=dataclasses.replace(REGIONS, view='globl')), "'globl'.*did you mean 'global'"),
    (
      dict(regions=Regions(texts={'web': RegionText(field='region_tags')})),
      "got 'web' as the name of a view or a text",
    ),
    (
      dict(regions=Regions(texts={'boxes': RegionText(field='region_tags')})),
      "got 'boxes' as the name of a view or a text",
    ),
  ],
)
def test_a_mistake_is_one_line(path, changes, said):
  with pytest.raises(InputError, match=said):
    read(path, **changes)


def test_a_store_without_boxes_is_refused(tmp_path):
  folder = store.temporary_folder(tmp_path / 'store')
  writer = store.Writer(folder, store.features())
  writer.add('train', {k: record(0)[k] for k in ('image', 'id', 'alt_text', 'captions')})
  writer.close()
  tokenizer_lib.train(['a b c red'] * 9, folder / store.TOKENIZER_FILE, vocab_size=330)
  path = store.finish(folder, tmp_path / 'store', {})
  with pytest.raises(InputError, match="data.tags.kinds: feature of the store: got 'tags'"):
    read(path, regions=Regions())
  with pytest.raises(InputError, match="data.regions: feature of the store: got 'boxes'"):
    read(path, tags={})


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'region_captions': ['red', 'green']}, 'got 2 region_captions and 3 boxes; expected as many'),
    (
      {'region_tags_boxes': [0, 2]},
      'got 3 region_tags and 2 numbers of their boxes; expected as many',
    ),
    (
      {'region_tags_boxes': [0, 1, 3]},
      'got region_tags of boxes 0 to 3; expected numbers below 3',
    ),
  ],
)
def test_texts_of_boxes_that_are_not_there_are_refused(path, tmp_path, changes, said):
  store_of = write_store(tmp_path, [record(0) | changes])
  with pytest.raises(InputError, match=f"record 'id0': {said}"):
    read(store_of, tokenizer=os.path.join(path, 'tokenizer.model'))


def test_a_record_without_texts_of_regions_has_boxes(path, tmp_path):
  nothing = {'region_captions': [], 'region_tags': [], 'region_tags_boxes': []}
  store_of = write_store(tmp_path, [record(0) | nothing])
  batch, _ = read(store_of, tokenizer=os.path.join(path, 'tokenizer.model'))
  assert batch['boxes_valid'].any()
  assert not batch['words_valid'].any() and not batch['marks_valid'].any()


def test_tags_and_texts_that_no_record_has_are_errors_of_their_losses(path, tmp_path):
  names = ['web', 'kinds', 'words', 'marks']
  texts = {'web': Text(field='alt_text')}
  config = Data(store=str(path), views=VIEWS, texts=texts, tags={'kinds': Tags()}, regions=REGIONS)
  require_texts(config, names)
  empty = write_store(tmp_path, [record(0) | {'region_captions': [''] * 3, 'tags': [' ']}])
  config = dataclasses.replace(config, store=str(empty))
  for name, said in {
    'kinds': "data.tags.kinds: got no tags in any of 1 records of split 'train'; expected some, or "
    "weight 0 for the losses of 'kinds'",
    'words': 'data.regions.texts.words: got no region_captions in any',
  }.items():
    with pytest.raises(InputError, match=said):
      require_texts(config, ['web', 'marks', name])
  require_texts(config, ['web', 'marks'])


# --- of files that are read as they lie ---------------------------------------------------------


def rows():
  """The records as tables have them: boxes in pixels, of which one is malformed."""
  for i in range(COUNT):
    one = record(i)
    boxes = (one['boxes'] * ([96, 120] * 2)).round()[:, [1, 0, 3, 2]].tolist()
    tags = [['warm', 'first'], [], ['last']]
    found = [
      {'bbox': box, 'caption': caption, 'tags': of_box}
      for box, caption, of_box in zip(boxes, one['region_captions'], tags)
    ]
    found.insert(1, {'bbox': [5, 5, 5], 'caption': 'none'})
    texts = {'alt_text': one['alt_text'], 'regions': found[: 4 if i else 0], 'tags': one['tags']}
    yield f'{i:03}', one['image'], texts


def write_tar(path):
  with tarfile.open(path, 'w') as tar:
    for key, image, texts in rows():
      for end, data in {'png': image, 'json': json.dumps(texts).encode()}.items():
        info = tarfile.TarInfo(f'{key}.{end}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def write_parquet(path):
  table = []
  for key, image, texts in rows():
    table.append({'id': key, 'image': image, **texts, 'regions': json.dumps(texts['regions'])})
  pq.write_table(pa.Table.from_pylist(table), path, row_group_size=5)


@pytest.mark.parametrize('write, name', [(write_tar, '0.tar'), (write_parquet, '0.parquet')])
def test_regions_of_files_as_they_lie_are_those_of_a_store_made_of_them(
  path, tmp_path, write, name
):
  (tmp_path / 'files').mkdir()
  write(tmp_path / 'files' / name)
  named = dict(regions='regions', tags='tags')
  options = Options(columns=ingest.Columns(**named), box_format='xyxy')
  reader = open_input(tmp_path / 'files', options)
  convert.convert({'train': reader}, tmp_path / 'store')
  more = dict(
    columns=Columns(**named, box_format='xyxy'), tokenizer=os.path.join(path, 'tokenizer.model')
  )
  records = []
  for place in ('files', 'store'):
    data = Data(store=str(tmp_path / place), views=VIEWS, **more)
    read_here = Records([open_data(data.store, data).source('train')])
    records.append([dict(read_here[i]) for i in range(COUNT)])
  for here, there in zip(*records, strict=True):
    assert here == there
  assert sum(len(one['boxes'].float_list.value) for one in records[0]) == (COUNT - 1) * 3 * 4
  if write is write_parquet:
    return  # rows of groups have another order
  here, _ = read(tmp_path / 'files', **more)
  there, _ = read(tmp_path / 'store', **more)
  for key in here:
    np.testing.assert_array_equal(here[key], there[key], err_msg=key)
  assert here['boxes_valid'].any(axis=1).sum() >= COUNT // 2 and here['kinds_valid'].any()


def test_files_whose_columns_are_not_named_have_no_regions(path, tmp_path):
  write_tar(tmp_path / '0.tar')
  with pytest.raises(InputError, match='data.regions: feature of the store'):
    read(tmp_path, tags={}, tokenizer=os.path.join(path, 'tokenizer.model'))
