import gzip
import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.columns import Columns
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options
from tips_jax.data.ingest.tars import keys_of


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
  assert len(list(reader)) == sum(map(reader.count, reader.pieces(2**30))) == 2


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


# --- keys ---------------------------------------------------------------------------------------


def write_files(folder, files):
  for name, data in files:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


DOTTED = [
  ('IMG_1.5.jpg', jpeg(0)),
  ('IMG_1.5.txt', b'one five'),
  ('IMG_1.6.jpg', jpeg(1)),
  ('IMG_1.6.txt', b'one six'),
  ('a.final.JPG', jpeg(2)),
  ('a.final.txt', b'final'),
  ('a.jpg', jpeg(3)),
  ('a.seg.png', b'mask'),
  ('a.txt', b'a'),
  ('x.y.jpeg', jpeg(4)),
  ('x.y.json', b'{"caption": "y"}'),
]


@pytest.mark.parametrize('form', ['tar', 'files'])
def test_names_with_dots_are_samples_of_their_own(tmp_path, form):
  if form == 'tar':
    write_tar(tmp_path / 'a.tar', sorted(DOTTED))
  else:
    write_files(tmp_path, DOTTED)
  samples = {s.key: s for s in read(tmp_path, columns=Columns(mask='seg.png'))}
  images = {key: sample.image for key, sample in samples.items()}
  assert images == {
    'IMG_1.5': jpeg(0),
    'IMG_1.6': jpeg(1),
    'a.final': jpeg(2),
    'a': jpeg(3),
    'x.y': jpeg(4),
  }
  assert samples['a'].extra == {'mask': b'mask'} and samples['a.final'].extra == {}
  assert samples['IMG_1.6'].alt_text == 'one six' and samples['x.y'].captions == ['y']


def test_a_mask_is_never_taken_for_the_image_that_is_missing():
  assert keys_of(['a.seg.png', 'a.txt']) == {'a.seg.png': ('a', 'seg.png'), 'a.txt': ('a', 'txt')}
  assert keys_of(['d.1/a.jpg', 'd.1/b.npy']) == {'d.1/a.jpg': ('d.1/a', 'jpg')}


@pytest.mark.parametrize(
  'names', [['a.jpg', 'b.jpg', 'a.txt', 'b.txt'], ['a.jpg', 'a.txt', 'a.jpg'], ['a.jpg', 'a.JPG']]
)
def test_a_key_that_comes_back_is_an_error(tmp_path, names):
  write_tar(tmp_path / 'a.tar', [(name, jpeg(0)) for name in names])
  with pytest.raises(InputError, match="key 'a' comes back with.*sorted by name"):
    read(tmp_path)


def test_samples_with_different_fields_all_keep_their_texts(tmp_path):
  members = [
    ('a.jpg', jpeg(0)),
    ('a.json', b'{"title": "first"}'),
    ('b.jpg', jpeg(1)),
    ('b.txt', b'second'),
    ('c.jpg', jpeg(2)),
    ('c.json', b'{"captions": ["third"]}'),
  ]
  write_tar(tmp_path / 'a.tar', members)
  reader = open_input(
    str(tmp_path), Options(columns=Columns(alt_text='txt', captions=('title', 'captions')))
  )
  texts = [(s.alt_text, s.captions) for s in reader]
  assert texts == [('', ['first']), ('second', []), ('', ['third'])]


def test_a_field_that_shows_up_late_is_noted(tmp_path):
  members = []
  for i in range(120):
    members += [(f'{i:03}.jpg', jpeg(0)), (f'{i:03}.txt', b'x')]
  members += [('999.jpg', jpeg(0)), ('999.json', b'{"captions": ["late"]}')]
  write_tar(tmp_path / 'a.tar', members)
  samples = read(tmp_path)
  assert len(samples) == 121 and {s.alt_text for s in samples[:-1]} == {'x'}
  assert [note.kind for note in samples[-1].notes] == ['other_field']


def test_a_second_image_of_a_sample_is_noted(tmp_path):
  write_tar(tmp_path / 'a.tar', [('a.jpg', jpeg(0)), ('a.png', jpeg(1)), ('a.txt', b'x')])
  (sample,) = read(tmp_path)
  assert sample.image == jpeg(0) and [note.kind for note in sample.notes] == ['other_image']


@pytest.mark.parametrize('form', ['tar', 'files'])
def test_texts_by_their_byte_order_mark_and_no_guesses(tmp_path, form):
  texts = ['un café'.encode('latin-1'), b'\xef\xbb\xbfwith mark', 'utf16'.encode('utf-16')]
  members = []
  for i, text in enumerate(texts):
    members += [(f'{i}.jpg', jpeg(i)), (f'{i}.txt', text)]
  if form == 'tar':
    write_tar(tmp_path / 'a.tar', members)
  else:
    write_files(tmp_path, members)
  samples = read(tmp_path)
  assert [s.alt_text for s in samples] == ['', 'with mark', 'utf16']
  assert 'its .txt is left out: it is not UTF-8' in samples[0].problem


@pytest.mark.parametrize('end', ['avif', 'jp2', 'jfif', 'JPEG', 'Png'])
def test_every_ending_of_images_is_one(tmp_path, end):
  write_files(tmp_path, [(f'a.{end}', b'image'), ('a.txt', b'x')])
  (sample,) = read(tmp_path)
  assert (sample.key, sample.image) == ('a', b'image')


def test_what_belongs_to_no_sample_is_noted(tmp_path):
  files = [
    ('0.jpg', jpeg(0)),
    ('0.txt', b'x'),
    ('1.txt', b'alone'),
    ('00000_stats.json', b'{"count": 1}'),
    ('__MACOSX/._0.jpg', b'mac'),
    ('._0.jpg', b'mac'),
  ]
  write_files(tmp_path, files)
  reader = open_input(str(tmp_path), Options())
  assert [s.key for s in reader] == ['0']
  assert sorted(note.id for note in reader.notes) == ['00000_stats.json', '1.txt']


def test_links_without_a_target_are_samples_with_a_problem(tmp_path):
  write_files(tmp_path, [('a.jpg', jpeg(0)), ('a.txt', b'x'), ('b.txt', b'y'), ('c.jpg', jpeg(1))])
  (tmp_path / 'b.jpg').symlink_to(tmp_path / 'gone.jpg')
  (tmp_path / 'c.txt').symlink_to(tmp_path / 'gone.txt')
  a, b, c = read(tmp_path)
  assert a.image == jpeg(0)
  assert (b.image, b.problem) == (None, 'No such file or directory')
  assert c.image == jpeg(1) and c.problem == 'its .txt: No such file or directory'


# --- damaged tars, and tars made to fill the memory ---------------------------------------------


def link(name, target, kind=tarfile.LNKTYPE):
  info = tarfile.TarInfo(name)
  info.type = kind
  info.linkname = target
  return info


def test_links_inside_a_tar_are_followed_and_loops_are_a_problem(tmp_path):
  with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
    info = tarfile.TarInfo('a.jpg')
    info.size = len(jpeg(0))
    tar.addfile(info, io.BytesIO(jpeg(0)))
    tar.addfile(link('b.jpg', 'a.jpg'))
    tar.addfile(link('c.jpg', 'd.jpg', tarfile.SYMTYPE))
    tar.addfile(link('d.jpg', 'c.jpg', tarfile.SYMTYPE))
    tar.addfile(link('e.jpg', 'gone.jpg', tarfile.SYMTYPE))
  samples = read(tmp_path, columns=Columns(captions=('none',), alt_text='none'))
  assert [s.image for s in samples] == [jpeg(0), jpeg(0), None, None, None]
  assert {s.problem for s in samples[2:]} == {'a link without a target in the tar'}


@pytest.mark.parametrize(
  'mode, end',
  [('gz', 'tar.gz'), ('gz', 'TGZ'), ('bz2', 'tar.bz2'), ('xz', 'tar.xz'), ('gz', 'tar')],
)
def test_compressed_tars(tmp_path, mode, end):
  with tarfile.open(tmp_path / f'a.{end}', f'w:{mode}') as tar:
    for name, data in img2dataset(range(2)):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  assert [s.alt_text for s in read(tmp_path)] == ['alt 0', 'alt 1']


@pytest.mark.parametrize('at', [-8, -4])  # check sum and length at the end
def test_the_check_sum_of_a_compressed_tar_is_checked(tmp_path, at):
  write_tar(tmp_path / 'a', img2dataset(range(3)))
  data = bytearray(gzip.compress((tmp_path / 'a').read_bytes()))
  data[at] ^= 1
  (tmp_path / 'a.tar').write_bytes(data)
  with pytest.raises(InputError, match='truncated or damaged'):
    read(tmp_path / 'a.tar')


def header(name, size, kind=tarfile.REGTYPE):
  info = tarfile.TarInfo(name)
  info.type = kind
  info.size = size
  return info.tobuf(tarfile.GNU_FORMAT)


SPARSE = header('a.jpg', 0, tarfile.GNUTYPE_SPARSE)


def pax(text):
  return header('x', len(text), tarfile.XHDTYPE) + text + bytes(-len(text) % 512)


ZEROS = 300 * 2**20
BOMBS = {
  'declares 8 GB': (header('a.jpg', 8 * 2**30), ''),
  'a long name of 4 GB': (header('x', 2**32, tarfile.GNUTYPE_LONGNAME), ''),
  'attributes of 4 GB': (header('x', 2**32, tarfile.XHDTYPE), ''),
  'a huge attribute': (pax(b'9' * 30 + b' path=x\n') + header('a.jpg', 0), ''),
  'nested headers': (header('x', 0, tarfile.GNUTYPE_LONGNAME) * 5000 + header('a.jpg', 0), ''),
  'no tar at all': (b'hello' * 1000, ''),
  'gz of one large member': (lambda: header('a.jpg', ZEROS) + bytes(ZEROS), 'gz'),
}


@pytest.mark.parametrize('bomb', BOMBS)
def test_a_tar_that_is_made_to_fill_the_memory_is_an_error_of_one_line(tmp_path, bomb):
  data, compression = BOMBS[bomb]
  if compression:
    data = gzip.compress(data(), compresslevel=1)
  (tmp_path / 'a.tar').write_bytes(data)
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match='a.tar.* is truncated or damaged') as error:
      read(tmp_path / 'a.tar')
    assert tracemalloc.get_traced_memory()[1] < 2**26
  finally:
    tracemalloc.stop()
  assert '\n' not in str(error.value) and len(str(error.value)) < 600


def test_a_sparse_member_of_50_gb_is_a_sample_with_a_problem_and_reading_goes_on(tmp_path):
  size = 50 * 2**30
  records = b''
  for name, value in (('major', '0'), ('minor', '1'), ('name', 'a.jpg'), ('realsize', size)):
    text = f' GNU.sparse.{name}={value}\n'
    records += f'{len(text) + 2}{text}'.encode()
  map_of_size = f' GNU.sparse.map={size},0\n'
  records += f'{len(map_of_size) + 2}{map_of_size}'.encode()
  write_tar(tmp_path / 'b', [('b.jpg', jpeg(0)), ('b.txt', b'x')])
  (tmp_path / 'a.tar').write_bytes(
    pax(records) + header('a.jpg', 0) + (tmp_path / 'b').read_bytes()
  )
  bad, good = read(tmp_path / 'a.tar')
  assert bad.image is None and bad.problem.startswith('53,687,091,200 bytes')
  assert good.image == jpeg(0) and good.alt_text == 'x'


def test_texts_of_brackets_without_end_stay_texts(tmp_path):
  deep = b'[' * 200_000 + b']' * 200_000
  write_tar(tmp_path / 'a.tar', [('a.jpg', jpeg(0)), ('a.json', deep), ('a.txt', deep)])
  (sample,) = read(tmp_path)
  assert sample.alt_text == deep.decode() and 'not a JSON object' in sample.problem
