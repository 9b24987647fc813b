import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import Columns
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options


def jpeg(i, *, size=(24, 20), kind='jpeg'):
  pixels = np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, kind)
  return out.getvalue()


def read(path, **options):
  return list(open_input(str(path), Options(**options)))


def write_tar(path, members):
  with tarfile.open(path, 'w') as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def img2dataset(indices):
  for i in indices:
    yield f'{i:09d}.jpg', jpeg(i)
    fields = {'caption': f'alt {i}', 'url': 'http://x', 'key': f'{i:09d}', 'status': 'success'}
    yield f'{i:09d}.json', json.dumps(fields).encode()
    yield f'{i:09d}.txt', f'alt {i}'.encode()


def test_img2dataset_tars(tmp_path):
  write_tar(tmp_path / '00000.tar', img2dataset(range(3)))
  write_tar(tmp_path / '00001.tar', img2dataset(range(3, 5)))
  (tmp_path / '00000_stats.json').write_text('{}')
  (tmp_path / '00000.parquet').write_text('')
  assert len(read(tmp_path)) == 5
  samples = read(tmp_path / '0000*.tar')
  assert [s.key for s in samples] == [f'{i:09d}' for i in range(5)]
  assert [s.alt_text for s in samples] == [f'alt {i}' for i in range(5)] and not samples[0].captions
  assert [s.image for s in samples] == [jpeg(i) for i in range(5)]
  reader = open_input(str(tmp_path / '00001.tar'), Options())
  assert len(list(reader)) == reader.total == 2


def test_tars_with_synthetic_captions_folders_and_other_members(tmp_path):
  write_tar(
    tmp_path / 'a.tar',
    [
      ('v1.0/a.png', jpeg(0, kind='png')),
      ('v1.0/a.txt', b'alt'),
      ('v1.0/a.json', b'{"captions": ["x", "y"]}'),
      ('v1.0/b.json', b'{"captions": ["z"]}'),
      ('v1.0/c.JPG', jpeg(1)),
      ('v1.0/c.txt', 'ü'.encode()),
      ('v1.0/c.emb.npy', b'123'),
      ('v1.0/c.json', b'[broken'),
      ('README', b'hello'),
    ],
  )
  a, b, c = read(tmp_path)
  assert (a.key, a.alt_text, a.captions) == ('v1.0/a', 'alt', ['x', 'y']) and a.image == jpeg(
    0, kind='png'
  )
  assert b.image is None and b.problem == 'no image member'
  assert c.image == jpeg(1) and c.alt_text == 'ü' and 'not a JSON object' in c.problem


def test_first_sample_without_text_does_not_hide_the_columns(tmp_path):
  write_tar(tmp_path / 'a.tar', [('a.jpg', jpeg(0)), ('b.jpg', jpeg(1)), ('b.txt', b'text')])
  assert [s.alt_text for s in read(tmp_path)] == ['', 'text']
  write_tar(tmp_path / 'a.tar', [('a.jpg', jpeg(0)), ('b.jpg', jpeg(1))])
  with pytest.raises(InputError, match='text columns'):
    read(tmp_path)


@pytest.mark.parametrize('where', ['data', 'header', 'boundary', 'middle', 'empty'])
def test_truncated_tar_names_the_tar_the_member_and_the_count(tmp_path, where):
  path = tmp_path / 'cut.tar'
  write_tar(path, img2dataset(range(4)))
  with tarfile.open(path) as tar:
    last = tar.getmember('000000003.jpg')
    cut = {
      'data': last.offset_data + 100,
      'header': last.offset + 100,
      'boundary': last.offset,
      'middle': None,
      'empty': 0,
    }[where]
  if cut is None:  # a header in the middle is overwritten
    data = bytearray(path.read_bytes())
    data[last.offset : last.offset + 512] = b'x' * 512
    path.write_bytes(data)
  else:
    os.truncate(path, cut)
  samples = []
  with pytest.raises(InputError) as error:
    for sample in open_input(str(tmp_path), Options()):
      samples.append(sample.key)
  assert 'cut.tar' in str(error.value) and 'truncated or damaged' in str(error.value)
  assert f'after {len(samples)} samples' in str(error.value)
  if where != 'empty':
    assert '00000000' in str(error.value) and len(samples) in (2, 3)


def test_loose_files_in_folders_as_img2dataset_writes_them(tmp_path):
  for i, (name, data) in enumerate(img2dataset(range(4))):
    folder = tmp_path / f'0000{i // 6}'
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
  (tmp_path / '00000.parquet').write_text('')
  reader = open_input(str(tmp_path), Options())
  assert reader.total == 4
  samples = list(reader)
  assert [s.key for s in samples] == [
    '00000/000000000',
    '00000/000000001',
    '00001/000000002',
    '00001/000000003',
  ]
  assert [(s.image, s.alt_text, s.captions) for s in samples] == [
    (jpeg(i), f'alt {i}', []) for i in range(4)
  ]


def test_masks_come_along_and_labels_cannot(tmp_path):
  write_tar(tmp_path / 'a.tar', [('a.jpg', jpeg(0)), ('a.seg.png', b'mask'), ('a.txt', b'x')])
  (sample,) = read(tmp_path, columns=Columns(mask='seg.png'))
  assert sample.extra == {'mask': b'mask'} and sample.image == jpeg(0)
  with pytest.raises(InputError, match='--label_column'):
    read(tmp_path, columns=Columns(label='cls'))
