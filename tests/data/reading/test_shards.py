import os
import pickle
import threading
import types

import pytest
from array_record.python import array_record_module

from tips_jax.core.errors import InputError
from tips_jax.data.reading import shards
from tips_jax.data.reading.shards import Shards

BYTES = 50_000  # more than a read fetches at least


def write(folder, counts):
  """Files of records that start with their number; returns their instructions, as TFDS has them."""
  instructions = []
  number = 0
  for i, count in enumerate(counts):
    path = str(folder / f'{i}.array_record')
    writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
    for _ in range(count):
      writer.write(b'%d ' % number + os.urandom(BYTES))
      number += 1
    writer.close()
    instructions.append(
      types.SimpleNamespace(filename=path, examples_in_shard=count, skip=0, take=count)
    )
  return instructions


def numbers(records):
  return [int(record.split()[0]) for record in records]


def test_records_are_read_by_number_across_shards_also_of_a_pickled_copy(tmp_path):
  opened = Shards('all', write(tmp_path, [3, 1, 4]))
  for source in (opened, pickle.loads(pickle.dumps(opened))):
    assert len(source) == 8 and numbers(source) == list(range(8))
    assert numbers(source.read(1, 7)) == list(range(1, 7)) and source.read(3, 3) == []
    assert numbers([source[-1]]) == [7]
    with pytest.raises(IndexError):
      source[8]


def test_a_slice_of_a_shard_begins_where_it_says(tmp_path):
  first, second = write(tmp_path, [4, 4])
  first.skip, first.take = 3, 1
  second.skip, second.take = 1, 2
  assert numbers(Shards('slice', [first, second])) == [3, 5, 6]


def test_a_shard_of_another_length_is_an_error_of_one_line(tmp_path):
  instructions = write(tmp_path, [2, 2])
  instructions[1].examples_in_shard = 3
  opened = Shards('cut', instructions)
  with pytest.raises(InputError, match='1.array_record.: got 2 records; expected 3'):
    opened.open()
  assert numbers([opened[0]]) == [0]


def system_calls():
  """Reads that this process has asked the system for."""
  with open('/proc/self/io') as file:
    [line] = [line for line in file if line.startswith('syscr')]
  return int(line.split()[1])


@pytest.mark.skipif(not os.path.exists('/proc/self/io'), reason='Linux counts reads')
def test_neighbors_are_read_in_one_request(tmp_path):
  opened = Shards('one', write(tmp_path, [40]))
  opened.open()
  opened.read(30, 31)
  before = system_calls()
  idle = system_calls() - before
  before = system_calls()
  opened.read(4, 24)
  assert system_calls() - before - idle == 1


def test_shards_are_opened_side_by_side(tmp_path, monkeypatch):
  instructions = write(tmp_path, [1] * 32)
  together = threading.Barrier(32, timeout=30)  # breaks unless all 32 opens are under way at once
  real = array_record_module.ArrayRecordReader

  def slow(*args, **kwargs):
    together.wait()
    return real(*args, **kwargs)

  monkeypatch.setattr(array_record_module, 'ArrayRecordReader', slow)
  opened = Shards('slow', instructions)
  opened.open()
  opened.open()  # nothing is left to open
  assert numbers(opened) == list(range(32))


def test_sizes_are_asked_for_side_by_side(tmp_path):
  together = threading.Barrier(8, timeout=30)

  class Far:
    def __init__(self, size):
      self.size = size

    def stat(self):
      together.wait()
      if self.size is None:
        raise FileNotFoundError
      return types.SimpleNamespace(st_size=self.size)

  wanted = [0, 1, None, 3, 4, 5, None, 7]
  assert shards.sizes(map(Far, wanted)) == wanted
