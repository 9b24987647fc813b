import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tips_jax import prepare
from tips_jax.core.errors import InputError
from tips_jax.data import store
from tips_jax.data.ingest import convert
from tips_jax.data.ingest.columns import Columns
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options
from tips_jax.data.ingest.regions import check, of_rows, placed

WIDTH, HEIGHT = 40, 20


def jpeg(i):
  out = io.BytesIO()
  Image.new('RGB', (WIDTH, HEIGHT), (i * 20, 90, 40)).save(out, 'jpeg')
  return out.getvalue()


def made(path, out, columns, **options):
  """({id: what the store says of it}, report) of an input."""
  reader = open_input(path, Options(columns=Columns(**columns), **options))
  report = convert.convert({'train': reader}, out)
  found = {}
  for record in store.open_store(out).source('train'):
    texts = {}
    for name in ('region_captions', 'region_tags'):
      owners = map(int, record[f'{name}_boxes'])
      texts[name] = [(box, text.decode()) for box, text in zip(owners, record[name])]
    tags = [text.decode() for text in record.get('tags', ())]
    boxes = np.asarray(record['boxes']).round(4).tolist()
    found[record['id'].decode()] = {'boxes': boxes, 'tags': tags, **texts}
  return found, report


def test_coco_instances(tmp_path):
  for i in (1, 2, 3):
    (tmp_path / f'{i}.jpg').write_bytes(jpeg(i))
  coco = {
    'images': [{'id': i, 'file_name': f'{i}.jpg', 'width': 40, 'height': 20} for i in (1, 2, 3)],
    'categories': [{'id': 7, 'name': 'cat'}, {'id': 9, 'name': 'dog'}],
    'annotations': [
      {'id': 1, 'image_id': 1, 'category_id': 9, 'bbox': [10, 5, 20, 10]},
      {'id': 2, 'image_id': 2, 'category_id': 7, 'bbox': [0, 0, 40, 20]},
      {'id': 3, 'image_id': 1, 'category_id': 7, 'bbox': [30, 0, 20, 20]},  # half of it is out
      {'id': 4, 'image_id': 1, 'category_id': 7, 'bbox': [50, 0, 20, 20]},  # all of it is
      {'id': 5, 'image_id': 1, 'category_id': 7, 'bbox': [3, 3, 0, 5]},
      {'id': 6, 'image_id': 1, 'category_id': 7, 'bbox': ['a', 3, 4, 5]},
    ],
  }
  (tmp_path / 'instances.json').write_text(json.dumps(coco))
  columns = dict(regions='bbox', region_tags='category', tags='category')
  found, report = made(tmp_path / 'instances.json', tmp_path / 'store', columns)
  assert found['1.jpg'] == {
    'boxes': [[0.25, 0.25, 0.75, 0.75], [0, 0.75, 1, 1]],
    'tags': ['dog', 'cat'],
    'region_captions': [],
    'region_tags': [(0, 'dog'), (1, 'cat')],
  }
  assert found['2.jpg']['boxes'] == [[0, 0, 1, 1]]
  assert found['3.jpg']['boxes'] == [] == found['3.jpg']['tags']
  counts = report['splits']['train']
  assert (counts['boxes'], counts['bad_box'], counts['cut_box']) == (3, 3, 1)
  details = [row['detail'] for row in report['rows']['bad_box']]
  assert 'out of an image of 40x20' in details[0] and 'empty' in details[1]
  assert 'four numbers' in details[2]


def test_visual_genome(tmp_path):
  (tmp_path / 'VG_100K').mkdir()
  rows = []
  for i in (61, 62):
    (tmp_path / 'VG_100K' / f'{i}.jpg').write_bytes(jpeg(i % 9))
    region = dict(region_id=i, image_id=i, x=4, y=2, width=8, height=4, phrase=f'part {i}')
    rows.append({'id': i, 'regions': [region, {**region, 'x': 8, 'phrase': 'other'}]})
  (tmp_path / 'region_descriptions.json').write_text(json.dumps(rows))
  found, _ = made(
    tmp_path / 'region_descriptions.json', tmp_path / 'store', dict(regions='regions')
  )
  assert found['61.jpg']['boxes'] == [
    pytest.approx([0.1, 0.1, 0.3, 0.3]),
    pytest.approx([0.1, 0.2, 0.3, 0.4]),
  ]
  assert found['61.jpg']['region_captions'] == [(0, 'part 61'), (1, 'other')]


@pytest.mark.parametrize('kind', ['tar', 'parquet', 'jsonl'])
def test_one_json_an_image_and_columns_of_tables(tmp_path, kind):
  regions = [
    {'bbox': [0.0, 0.0, 0.5, 1.0], 'captions': ['left', 'a half'], 'tags': ['wall']},
    {'bbox': [0.5, 0.0, 1.0, 1.0], 'captions': [], 'tags': ['door', 'wood']},
  ]
  row = {'caption': 'a room', 'tags': ['room', 'room', 'house'], 'regions': regions}
  if kind == 'tar':
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
      for name, data in (('k.jpg', jpeg(1)), ('k.json', json.dumps(row).encode())):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  elif kind == 'parquet':
    pq.write_table(
      pa.Table.from_pylist([{'image': jpeg(1), 'id': 'k', **row}]), tmp_path / 'a.parquet'
    )
  else:
    (tmp_path / 'k').write_bytes(jpeg(1))
    (tmp_path / 'a.jsonl').write_text(json.dumps({'image': 'k', **row}))
  found, report = made(
    tmp_path / f'a.{kind}',
    tmp_path / 'store',
    dict(regions='regions', tags='tags'),
    box_format='xyxy',
    box_unit='shares',
  )
  assert found == {
    'k': {
      'boxes': [[0, 0, 1, 0.5], [0, 0.5, 1, 1]],
      'tags': ['room', 'house'],
      'region_captions': [(0, 'left'), (0, 'a half')],
      'region_tags': [(0, 'wall'), (1, 'door'), (1, 'wood')],
    }
  }
  assert not report['splits']['train'].get('bad_box')


def test_columns_side_by_side_and_pairs():
  columns = Columns(regions='boxes', region_captions='says')
  rows = [{'boxes': '[[0, 0, 4, 4], [2, 2, 4, 4]]', 'says': ['one', ['two', 'three']]}]
  found, problems = of_rows(rows, columns)
  assert [region.captions for region in found] == [['one'], ['two', 'three']] and not problems
  found, problems = of_rows([{'boxes': [[0, 0, 4, 4]] * 2, 'says': ['one']}], columns)
  assert problems == [('bad_region_text', "'says' has 1 texts for 2 boxes")]
  assert [region.captions for region in found] == [[], []]
  found, _ = of_rows([{'boxes': [['bowl', [1, 2, 3, 4]]]}], columns)
  assert found[0].tags == ['bowl'] and found[0].box == [1, 2, 3, 4]


@pytest.mark.parametrize(
  'cell, kinds',
  [
    ([[0, 0, 40.9, 20]], []),  # rounding
    ([[0, 0, 41.1, 20]], ['cut_box']),
    ([[-5, -5, 5, 25]], ['bad_box']),
    ([[0, 0, float('nan'), 3]], ['bad_box']),
    ([[0, 0, 3]], ['bad_box']),
    (['words'], ['bad_box']),
    ({'x': 1}, ['bad_box']),
    ([None], ['bad_box']),
    (7, ['bad_box']),
    ('', []),
    (None, []),
  ],
)
def test_boxes_are_left_out_or_cut_and_counted(cell, kinds):
  found, _ = of_rows([{'b': cell}], Columns(regions='b'))
  values, problems = placed(found, (WIDTH, HEIGHT), 'xywh', 'pixels')
  assert [kind for kind, _ in problems] == kinds
  for box in values['boxes']:
    assert all(0 <= x <= 1 for x in box)
  assert len(values['boxes']) == len(found) - kinds.count('bad_box')


def test_a_wrong_format_and_a_wrong_column_are_one_line(tmp_path, capsys):
  with pytest.raises(InputError, match="--box_format: got 'xyhw'"):
    check('xyhw', 'pixels')
  (tmp_path / '1.jpg').write_bytes(jpeg(1))
  (tmp_path / 'a.jsonl').write_text(json.dumps({'image': '1.jpg', 'boxes': [[0, 0, 4, 4]]}))
  code = prepare.main(
    ['prepare', f'--input={tmp_path}/a.jsonl', f'--output={tmp_path}/out', '--regions_column=box']
  )
  assert code == 2
  assert "--regions_column: got 'box'" in capsys.readouterr().err
