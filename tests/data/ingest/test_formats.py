import pytest

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options


def read(path, **options):
  return list(open_input(str(path), Options(**options)))


def test_what_is_no_input_at_all(tmp_path):
  (tmp_path / 'flickr').mkdir()
  with pytest.raises(InputError, match="did you mean 'flickr'"):
    read(tmp_path / 'flikr')
  with pytest.raises(InputError, match='expected a table'):
    read(tmp_path / 'flickr')
  with pytest.raises(InputError, match='no file matches'):
    read(tmp_path / '*.tar')


def test_several_files_of_a_pattern_must_be_of_one_form(tmp_path):
  for name in ('a.csv', 'b.csv'):
    (tmp_path / name).write_text('image,text\n')
  with pytest.raises(InputError, match='a.csv.* and 1 more; expected tars'):
    read(tmp_path / '*.csv')
