"""What an Arrow stream says of its size: known, and bounded, before pyarrow makes room for it."""

import json
import struct

import pyarrow as pa
import pytest

from tips_jax.core.errors import InputError
from tips_jax.data.ingest import arrow_sizes
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options

HUGE = 8 * 2**30


def write(folder, batches, *, metadata=None, **options):
  """The stream of a folder as `datasets.Dataset.save_to_disk` writes it."""
  folder.mkdir()
  file = folder / 'a.arrow'
  options = pa.ipc.IpcWriteOptions(**options)
  with pa.ipc.new_stream(str(file), batches[0].schema, options=options) as writer:
    for batch in batches:
      writer.write_batch(batch, custom_metadata=metadata)
  (folder / 'state.json').write_text(json.dumps({'_data_files': [{'filename': file.name}]}))
  return file


def table(*, images, captions=('a',)):
  captions = pa.array([captions[i % len(captions)] for i in range(len(images))])
  return pa.record_batch({'image': pa.array(images, pa.binary()), 'caption': captions})


def declare(file, size, declared):
  """Says of the last buffer of `size` bytes that it has others."""
  before, found, after = file.read_bytes().rpartition(struct.pack('<q', size))
  assert found
  file.write_bytes(before + struct.pack('<q', declared) + after)


def refused(folder, message):
  """Opens the folder, which is refused in one line; the bytes that pyarrow took for it."""
  pool = pa.system_memory_pool()
  before = pa.default_memory_pool()
  pa.set_memory_pool(pool)
  peak = pool.max_memory()
  try:
    with pytest.raises(InputError, match=message) as error:
      open_input(str(folder), Options())
  finally:
    pa.set_memory_pool(before)
  assert '\n' not in str(error.value)
  return pool.max_memory() - peak


@pytest.mark.parametrize('compression', ['zstd', 'lz4'])
def test_sizes_of_compressed_columns_are_those_in_memory(tmp_path, compression):
  images = [bytes(5_000), b'x' * 3_000]
  file = write(tmp_path / 'one', [table(images=images)] * 3, compression=compression)
  taken, size = arrow_sizes.of_stream(str(file))
  # Two columns of texts: three offsets of four bytes each, and the texts.
  assert size == 3 * (12 + 8_000 + 12 + 2) and taken < 3_000
  samples = list(open_input(str(tmp_path / 'one'), Options()))
  assert [sample.image for sample in samples] == images * 3


def test_sizes_of_other_columns_are_those_in_the_file(tmp_path):
  file = write(tmp_path / 'one', [table(images=[bytes(5_000), b''])] * 2)
  taken, size = arrow_sizes.of_stream(str(file))
  assert size == 2 * (12 + 5_000 + 12 + 2) and 0 <= taken - size < 500


@pytest.mark.parametrize('compression', ['zstd', 'lz4'])
def test_a_buffer_that_declares_gigabytes_is_one_line_and_takes_no_memory(tmp_path, compression):
  file = write(tmp_path / 'one', [table(images=[bytes(5_003)])], compression=compression)
  declare(file, 5_003, HUGE)
  assert file.stat().st_size < 2_000
  taken = refused(tmp_path / 'one', r'a.arrow.: 1\d\d bytes of it expand to 8,589,934,6')
  assert taken < 2**20


def test_a_dictionary_that_declares_gigabytes_is_one_line_and_takes_no_memory(tmp_path):
  captions = pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int8()), ['a' * 5_003])
  batch = pa.record_batch({'image': pa.array([b'', b'']), 'caption': captions})
  file = write(tmp_path / 'one', [batch], compression='zstd')
  declare(file, 5_003, HUGE)
  assert refused(tmp_path / 'one', 'bytes of it expand to 8,589,93') < 2**20


def test_a_compression_as_early_versions_named_it_is_seen(tmp_path):
  file = write(
    tmp_path / 'one',
    [table(images=[struct.pack('<q', HUGE)])],
    metadata={'ARROW:experimental_compression': 'zstd'},
    metadata_version=pa.ipc.MetadataVersion.V4,
  )
  assert file.stat().st_size < 2_000
  # Offsets count too: 8 and 1 in their upper halves.
  assert refused(tmp_path / 'one', '32 bytes of it expand to 47,244,640,353') < 2**20


def test_a_buffer_of_less_than_nothing_makes_up_for_no_other(tmp_path):
  batch = table(images=[bytes(5_003)], captions=['b' * 4_001])
  file = write(tmp_path / 'one', [batch], compression='zstd')
  declare(file, 5_003, HUGE)
  declare(file, 4_001, -HUGE)
  assert refused(tmp_path / 'one', 'bytes of it expand to 8,589,93') < 2**20


def test_many_batches_that_each_expand_little_are_refused_together(tmp_path):
  batches = [table(images=[bytes(10_000_000)])] * 50
  write(tmp_path / 'one', batches, compression='zstd')
  assert refused(tmp_path / 'one', 'bytes of it expand to 500,00') < 2**20


def test_rows_of_nulls_that_take_no_bytes_are_refused(tmp_path):
  """They would be counted as bad, one by one, for days."""
  count = 2**30
  batch = pa.record_batch({'image': pa.nulls(count), 'caption': pa.nulls(count)})
  file = write(tmp_path / 'one', [batch])
  assert file.stat().st_size < 2_000
  assert refused(tmp_path / 'one', '0 bytes of it expand to 8,589,934,592 or more') < 2**20
