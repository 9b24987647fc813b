"""Mutated tables and zips of them: rows, or an InputError of one line."""

import io
import json
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.damage import FUZZ, damaged
from tests.data.pictures import picture
from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import Columns
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options

SETTINGS = settings(FUZZ, max_examples=400, deadline=10_000)
# What readers of tables stumble over: quotes, ends of lines, depth, digits and a mark of UTF-16.
PIECES = tuple(b'\' " \\ \n \r \0 , \t {" \xff\xfe'.split(b' ')) + (b'[' * 3000, b'9' * 40)
ROWS = [
  {'image': '0.jpg', 'caption': 'a "red, big" dog', 'label': '3'},
  {'image': '1.jpg', 'caption': "['a', 'b']", 'label': 'x'},
]
CSV = 'image,caption,label\n0.jpg,"a ""red, big"" dog",3\n1.jpg,"[\'a\', \'b\']",x\n'
COCO = {
  'images': [{'id': 1, 'file_name': '0.jpg', 'label': 1}],
  'annotations': [{'image_id': 1, 'caption': 'a'}],
}
TABLES = {
  'csv': CSV.encode(),
  'tsv': CSV.replace(',', '\t').encode('utf-16'),
  'json': json.dumps(ROWS, indent=1).encode(),
  'jsonl': '\n'.join(map(json.dumps, ROWS)).encode(),
}


def check(path):
  try:
    samples = list(open_input(str(path), Options(columns=Columns(label='label'))))
  except InputError as error:
    assert '\n' not in str(error)
    return
  for sample in samples:
    assert all(isinstance(text, str) and '\n' not in text for text in sample.captions)
    assert isinstance(sample.alt_text, str) and isinstance(sample.key, str)


@pytest.mark.once
@pytest.mark.parametrize('end', TABLES)
@SETTINGS
@given(data=st.data())
def test_a_mutated_table_gives_rows_or_one_line(tmp_path, end, data):
  (tmp_path / '0.jpg').write_bytes(picture(0))
  (tmp_path / f't.{end}').write_bytes(data.draw(damaged(TABLES[end], PIECES)))
  check(tmp_path / f't.{end}')


JSON_VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(['0.jpg', 'a', '']),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(
        ['image', 'caption', 'label', 'images', 'annotations', 'data', 'columns', '0.jpg']
      ),
      inner,
      max_size=4,
    )
  ),
  max_leaves=12,
)


@SETTINGS
@given(value=JSON_VALUES)
def test_json_of_any_form_gives_rows_or_one_line(tmp_path, value):
  (tmp_path / '0.jpg').write_bytes(picture(0))
  (tmp_path / 't.json').write_text(json.dumps(value))
  check(tmp_path / 't.json')


def zipped(compression):
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', compression) as archive:
    archive.writestr('t.csv', CSV)
    archive.writestr('0.jpg', picture(0))
    archive.writestr('coco.json', json.dumps(COCO))
  return out.getvalue()


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@SETTINGS
@given(data=st.data())
def test_a_mutated_zip_gives_rows_or_one_line(tmp_path, compression, data):
  (tmp_path / 'a.zip').write_bytes(data.draw(damaged(zipped(compression), PIECES)))
  check(tmp_path / 'a.zip')
