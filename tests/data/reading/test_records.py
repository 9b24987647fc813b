import os

import numpy as np
import pytest

from tips_jax.data import store
from tips_jax.data.reading.records import Records


def write(path, first, count):
  """A store of records that do not compress, so that their bytes can be found in its file."""
  folder = store.temporary_folder(path)
  writer = store.Writer(folder, store.features())
  for i in range(first, first + count):
    image = np.random.default_rng(i).bytes(400)
    writer.add('train', {'image': image, 'id': f'id{i:02}', 'alt_text': '', 'captions': []})
  writer.close()
  return store.finish(folder, path, {})


@pytest.fixture
def stores(tmp_path):
  return [write(tmp_path / 'one', 0, 8), write(tmp_path / 'two', 8, 4)]


def ids(examples):
  found = []
  for example in examples:
    if not isinstance(example, ValueError):
      found.append(example['id'].bytes_list.value[0].decode())
  return found


def counted(read, asked):
  def counting(first, stop):
    asked.append((first, stop))
    return read(first, stop)

  return counting


def test_records_come_in_the_order_that_was_asked_for_from_several_stores(stores):
  records = Records([store.open_store(path).source('train') for path in stores])
  assert len(records) == 12
  asked = [9, 3, 7, 8, 2, 9, 0, 11]
  assert ids(records.read(asked)) == [f'id{i:02}' for i in asked]


def test_neighbors_are_one_request_and_stores_are_not_neighbors(stores):
  records = Records([store.open_store(path).source('train') for path in stores])
  asked = []
  for shards in records._shards:
    shards.read = counted(shards.read, asked)
  records.read([5, 9, 6, 8, 7, 1])
  assert asked == [(1, 2), (5, 8), (0, 2)]


def test_of_a_run_only_the_damaged_record_is_lost(stores):
  [name] = [name for name in os.listdir(stores[0]) if '.array_record' in name]
  path = os.path.join(stores[0], name)
  data = bytearray(open(path, 'rb').read())
  data[data.index(b'id03')] ^= 1
  with open(path, 'wb') as file:
    file.write(data)
  records = Records([store.open_store(path).source('train') for path in stores])
  examples = records.read(range(12))
  assert [isinstance(example, ValueError) for example in examples] == [i == 3 for i in range(12)]
  assert 'damaged record: ' in str(examples[3])
  assert ids(examples) == [f'id{i:02}' for i in range(12) if i != 3]
  with pytest.raises(ValueError, match='damaged record'):
    records[3]


def test_a_record_is_not_damaged_because_memory_ran_out(stores):
  def full(first, stop):
    raise MemoryError

  records = Records([store.open_store(path).source('train') for path in stores])
  records._shards[1].read = full
  assert ids(records.read([7])) == ['id07']
  with pytest.raises(MemoryError):
    records.read([7, 8])
