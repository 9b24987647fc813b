"""Damaged and odd files of weights: the model as it was written, or one line."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.damage import FUZZ
from tips_jax.core import tree
from tips_jax.core.errors import InputError
from tips_jax.data.tokenizer import Tokenizer
from tips_jax.interop import arrays, read, write
from tips_jax.interop.official import pytorch

FEW = settings(FUZZ, max_examples=120)
JSON = st.sampled_from(
  [None, True, -1, 0, 3, 10**12, 0.5, float('nan'), '', 'x', '../../x', [], [1], {}, {'a': 1}]
)
PLACES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3)


@pytest.fixture(scope='module')
def exports(tmp_path_factory, tokenizer_model):
  """{format: folder} of a tiny model."""
  from tests.interop.conftest import model

  folders = {}
  for format in ('safetensors', 'official_torch', 'official_jax', 'hf'):
    folders[format] = tmp_path_factory.mktemp('exports') / format
    folders[format].mkdir()
    write.write(model(tokenizer=tokenizer_model), format, folders[format])
  return folders


def one_line(call, *arguments):
  """Whether a call ends well; if not, its error is one line."""
  try:
    call(*arguments)
  except InputError as error:
    assert '\n' not in str(error)
    return False
  return True


def test_files_with_changed_bytes(exports, tmp_path):
  files = [
    (arrays.read_npz, exports['official_torch'] / 'tiny_text.npz'),
    (arrays.read_safetensors, exports['safetensors'] / 'model.safetensors'),
    (Tokenizer, exports['hf'] / 'tokenizer.model'),
  ]

  @FEW
  @given(st.sampled_from(files), PLACES, st.floats(0, 2))
  def run(case, places, cut):
    reader, file = case
    data = bytearray(file.read_bytes())
    for place, value in places:
      data[int(place * (len(data) - 1))] = value
    damaged = tmp_path / file.name
    damaged.write_bytes(data[: int(cut * len(data))])
    one_line(reader, damaged)

  run()


def json_paths(value, prefix=()):
  """The path of every member of an object, at any depth."""
  result = []
  if isinstance(value, dict):
    for name, item in value.items():
      result += [(*prefix, name), *json_paths(item, (*prefix, name))]
  return result


@pytest.mark.parametrize(
  'format, name',
  [
    ('safetensors', 'tips_jax.json'),
    ('hf', 'tips_jax.json'),
    ('hf', 'config.json'),
    ('hf', 'preprocessor_config.json'),
    ('hf', 'tokenizer_config.json'),
  ],
)
def test_json_of_other_types(exports, tmp_path, format, name):
  folder = tmp_path / 'model'
  shutil.copytree(exports[format], folder)
  content = json.loads((folder / name).read_text())
  if name != 'tips_jax.json':  # else it would say what is wrong with the others
    (folder / 'tips_jax.json').unlink()

  @FEW
  @given(st.sampled_from(json_paths(content)), JSON, st.booleans())
  def run(path, value, remove):
    changed = json.loads(json.dumps(content))
    group = changed
    for key in path[:-1]:
      group = group[key]
    group[path[-1]] = value
    if remove:
      del group[path[-1]]
    (folder / name).write_text(json.dumps(changed))
    one_line(read.read, folder)

  run()


@pytest.mark.parametrize('text', ['', '[]', '3', '{"a": ' * 100_000, '{"version": 1', '\ud800x'])
def test_malformed_contracts_are_one_line(exports, tmp_path, text):
  shutil.copytree(exports['safetensors'], tmp_path / 'model')
  (tmp_path / 'model' / write.CONTRACT).write_bytes(text.encode('utf-8', 'surrogatepass'))
  assert not one_line(read.read, tmp_path / 'model')


@pytest.mark.parametrize('format', ['official_torch', 'official_jax', 'hf', 'safetensors'])
def test_arrays_of_other_ranks(exports, tmp_path, monkeypatch, format):
  """Each array flat, with one axis more, and empty: always one line."""
  folder = tmp_path / 'model'
  shutil.copytree(exports[format], folder)
  contract = folder / 'tips_jax.json'
  if format == 'safetensors':  # whose towers stand there alone
    contract.write_text(json.dumps(json.loads(contract.read_text()) | {'sha256': {}, 'files': {}}))
  else:
    contract.unlink()
  file = next(file for file in sorted(folder.iterdir()) if file.suffix in write.ARRAYS)
  monkeypatch.setitem(pytorch.HEADS, 32, 2)  # arrays alone do not tell
  assert one_line(read.read, folder)
  save = safetensors.numpy.save_file if format in ('hf', 'safetensors') else write_npz
  load = arrays.read_safetensors if format in ('hf', 'safetensors') else arrays.read_npz
  tensors = load(file)
  # A temperature may have an axis.
  names = sorted(name for name in tensors if tensors[name].ndim)
  for name in names[:: max(1, len(names) // 12)]:
    for change in (np.ravel, lambda x: x[None], lambda x: x.ravel()[:0]):
      save(tensors | {name: np.ascontiguousarray(change(tensors[name]))}, file)
      if tensors[name].shape != np.shape(change(tensors[name])):
        assert not one_line(read.read, folder), name


def write_npz(tensors, file):
  arrays.write_npz(file, tensors)


def test_a_name_that_is_an_array_and_a_group(tmp_path):
  for names in (('a', 'a/b'), ('a/b', 'a')):
    with pytest.raises(InputError, match='an array and a group'):
      tree.nested(dict.fromkeys(names, 0))


def test_an_npz_larger_than_it_says_or_far_larger_than_its_file_is_refused(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez_compressed(path, a=np.zeros(1 << 26, np.float32))
  with pytest.raises(InputError, match='expands to more than'):
    arrays.read_npz(path)
  data = io.BytesIO()
  np.save(data, np.zeros(3, np.float32))
  for content in (data.getvalue() + b'more', data.getvalue().replace(b'(3,)', b'(9,)')):
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('a.npy', content)
    with pytest.raises(InputError, match='in another number of them'):
      arrays.read_npz(path)
