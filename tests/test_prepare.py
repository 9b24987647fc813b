import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece as spm
import tensorflow_datasets as tfds
from PIL import Image

from tests.data.pictures import picture, png_bomb
from tips_jax import prepare
from tips_jax.data import store

pytestmark = pytest.mark.once


def write(folder, images, rows=None):
  folder.mkdir(exist_ok=True)
  for name, data in images.items():
    (folder / name).write_bytes(data)
  rows = rows or [
    {'image': name, 'alt_text': f'alt of {name}', 'captions': ['a red dog', f'the {name} again']}
    for name in images
  ]
  (folder / 'data.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder


def run(*args):
  return prepare.main(['prepare', *map(str, args)])


def report(path):
  return json.loads((path / 'report.json').read_text())


@pytest.fixture
def source(tmp_path):
  return write(tmp_path / 'source', {f'{i}.jpg': picture(i) for i in range(10)})


def test_one_command_gives_a_store_with_the_same_bytes(tmp_path, source, capsys):
  write(
    source,
    {
      'p.png': picture(90, kind='png', mode='RGBA'),
      'w.webp': picture(91, kind='webp'),
      'g.png': picture(92, kind='png', mode='L'),
    },
  )
  out = tmp_path / 'store'
  assert run(f'--input={source}', f'--output={out}') == 0
  records = list(store.open_store(out).source('train'))
  assert {r['id'].decode(): r['image'] for r in records} == {
    n: (source / n).read_bytes() for n in ('p.png', 'w.webp', 'g.png')
  }
  assert records[0]['alt_text'] == b'alt of p.png'
  assert list(records[0]['captions']) == [b'a red dog', b'the p.png again']
  assert len(tfds.builder_from_directory(str(out)).as_data_source('train')) == 3
  printed = capsys.readouterr()
  assert 'images written' in printed.out and '3/3' in printed.err and 'ETA' in printed.err
  assert sorted(os.listdir(tmp_path)) == ['source', 'store']


def test_every_validation_is_counted_and_listed(tmp_path, capsys):
  good = picture(0)
  images = {
    'good.jpg': good,
    'copy.jpg': good,
    'cut.jpg': picture(1, size=(200, 200))[:-3000],
    'text.jpg': b'hello',
    'empty.jpg': b'',
    'tiny.png': picture(2, size=(40, 15), kind='png'),
    'bomb.png': png_bomb(),
    'mute.jpg': picture(3),
    'noalt.jpg': picture(4),
    'nocap.jpg': picture(5),
    'blank.jpg': picture(6),
  }
  texts = {name: {'alt_text': 'alt', 'captions': ['cap']} for name in images}
  texts |= {
    'mute.jpg': {'alt_text': ' \n', 'captions': []},
    'noalt.jpg': {'captions': ['cap']},
    'nocap.jpg': {'alt_text': 'alt'},
    'blank.jpg': {'alt_text': 'alt', 'captions': ['cap', '', ' ']},
  }
  rows = [{'image': name, **texts[name]} for name in images] + [
    {'image': 'gone.jpg', 'alt_text': 'alt'}
  ]
  source, out = write(tmp_path / 'source', images, rows), tmp_path / 'store'
  assert run(f'--input={source}', f'--output={out}') == 0
  found = report(out)
  assert found['splits']['train'] == {
    'read': 12,
    'written': 6,
    'alt_texts': 4,
    'captions': 4,
    'missing': 1,
    'unreadable': 3,
    'tiny': 1,
    'giant': 1,
    'duplicate': 1,
    'no_text': 1,
    'no_alt_text': 1,
    'no_captions': 1,
    'empty_caption': 1,
  }
  listed = {kind: [row['id'] for row in rows] for kind, rows in found['rows'].items()}
  assert listed == {
    'missing': ['gone.jpg'],
    'unreadable': ['cut.jpg', 'text.jpg', 'empty.jpg'],
    'tiny': ['tiny.png'],
    'giant': ['bomb.png'],
    'duplicate': ['copy.jpg'],
    'no_text': ['mute.jpg'],
    'no_alt_text': ['noalt.jpg'],
    'no_captions': ['nocap.jpg'],
    'empty_caption': ['blank.jpg'],
  }
  assert found['rows']['duplicate'][0]['detail'] == 'same bytes as train: good.jpg'
  assert '10000x10000' in found['rows']['giant'][0]['detail']
  printed = capsys.readouterr().out
  assert all(name in printed for names in listed.values() for name in names)
  blank = next(r for r in store.open_store(out).source('train') if r['id'] == b'blank.jpg')
  assert list(blank['captions']) == [b'cap']


def test_the_columns_and_the_first_row_are_printed_as_they_were_understood(tmp_path, capsys):
  rows = [{'image': '0.jpg', 'Title': 'a', 'texts': "['b', 'c']", 'width': 3, 'kind': 'dog'}]
  source = write(tmp_path / 'source', {'0.jpg': picture(0)}, rows)
  assert run(f'--input={source}', f'--output={tmp_path / "store"}', '--label_column=kind') == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[:6] == [
    'train: table',
    "  columns: image from 'image'; alt_text from 'Title'; captions from 'texts'; "
    "label from 'kind'; not read: ['width']",
    "  first sample: '0.jpg'",
    "    alt_text: 'a'",
    "    captions: ['b', 'c']",
    "    label: 'dog'",
  ]


def test_what_was_left_out_is_counted_and_listed(tmp_path, capsys):
  source = tmp_path / 'source'
  source.mkdir()
  for i in range(4):
    (source / f'{i}.jpg').write_bytes(picture(i))
  (source / 't.csv').write_text(
    'image,caption,split,kind\n0.jpg,a,train,x\n1.jpg,b,val,x\n'
    '2.jpg,c,train,NaN\n3.jpg,d, e,train,x\n'
  )
  (source / 'notes.json').write_text('{}')
  assert run(f'--input={source}', f'--output={tmp_path / "store"}', '--label_column=kind') == 0
  found = report(tmp_path / 'store')
  counts = found['splits']['train']
  kinds = ('written', 'bad_row', 'other_split', 'other_file', 'no_label')
  assert {kind: counts[kind] for kind in kinds} == {
    'written': 2,
    'bad_row': 1,
    'other_split': 1,
    'other_file': 1,
    'no_label': 1,
  }
  assert found['rows']['bad_row'][0]['detail'] == 'line 5: 5 fields, the header has 4'
  printed = capsys.readouterr().out
  assert 'line 5: 5 fields' in printed and 'notes.json' in printed
  assert [r['label'] for r in store.open_store(tmp_path / 'store').source('train')] == [0, -1]


def test_limits_are_flags(tmp_path, source):
  out = tmp_path / 'store'
  assert run(f'--input={source}', f'--output={out}', '--min_side=25') == 2
  assert run(f'--input={source}', f'--output={out}', '--max_pixels=700') == 2
  assert not out.exists()
  assert (
    run(f'--input={source}', f'--output={out}', '--min_side=24', '--max_pixels=768', '--limit=4')
    == 0
  )
  assert store.open_store(out).splits == {'train': 4}


def test_test_split_by_input_and_by_fraction(tmp_path, source):
  other = write(tmp_path / 'other', {'7.jpg': picture(7), 'x.jpg': picture(70)})
  assert run(f'--input={source}', f'--test_input={other}', f'--output={tmp_path / "two"}') == 0
  assert store.open_store(tmp_path / 'two').splits == {'test': 2, 'train': 10}
  assert report(tmp_path / 'two')['rows']['duplicate'] == [
    {'split': 'test', 'id': '7.jpg', 'detail': 'same bytes as train: 7.jpg'}
  ]
  images = {f'{i}{c}.jpg': picture(i) for i in range(40) for c in 'ab'}
  assert (
    run(
      f'--input={write(tmp_path / "many", images)}',
      '--test_fraction=0.3',
      f'--output={tmp_path / "part"}',
    )
    == 0
  )
  part = store.open_store(tmp_path / 'part')
  test, train = ({r['id'][:-5] for r in part.source(s)} for s in ('test', 'train'))
  assert (
    not test & train
    and len(test | train) == 40
    and 4 <= len(test) <= 22
    and part.splits['test'] == 2 * len(test)
  )


def test_tokenizer_is_trained_on_the_training_texts_or_copied(tmp_path, source):
  words = 'red green dog cat house tree river under over beside small large'.split()
  rows = [
    {
      'image': f'{i}.jpg',
      'alt_text': '',
      'captions': [' '.join(np.random.default_rng(i).permutation(words))],
    }
    for i in range(10)
  ]
  write(source, {}, rows)
  zebra = [{'image': 'x.jpg', 'alt_text': 'zebra', 'captions': ['zebra']}]
  other = write(tmp_path / 'other', {'x.jpg': picture(70)}, zebra)
  out = tmp_path / 'store'
  assert (
    run(
      f'--input={source}',
      f'--test_input={other}',
      f'--output={out}',
      '--tokenizer',
      '--vocab_size=300',
    )
    == 0
  )
  model = spm.SentencePieceProcessor(model_file=str(out / 'tokenizer.model'))
  assert model.get_piece_size() == report(out)['tokenizer']['vocab_size'] <= 300
  assert len(model.encode('dog cat')) < len('dog cat') and 'z' not in [
    model.id_to_piece(i) for i in range(len(model))
  ]
  assert {'tasks', 'plan.json', 'lock'}.isdisjoint(os.listdir(out))
  copied = tmp_path / 'copied'
  assert (
    run(f'--input={source}', f'--output={copied}', f'--tokenizer={out / "tokenizer.model"}') == 0
  )
  assert (copied / 'tokenizer.model').read_bytes() == (out / 'tokenizer.model').read_bytes()
  assert store.open_store(copied).tokenizer_sha256 == store.open_store(out).tokenizer_sha256


def test_names_and_texts_that_are_no_utf8(tmp_path):
  source, out = tmp_path / 'source', tmp_path / 'store'
  source.mkdir()
  with open(os.fsencode(source) + b'/\xff.jpg', 'wb') as file:
    file.write(picture(0))
  (source / 'data.jsonl').write_text('{"image": "\\udcff.jpg", "text": "a \\ud800 b"}')
  assert run(f'--input={source}', f'--output={out}') == 0
  (record,) = store.open_store(out).source('train')
  assert (record['id'], record['alt_text'], record['image']) == (b'?.jpg', b'a ? b', picture(0))


def test_labels_and_masks(tmp_path):
  mask = picture(50, size=(32, 24), kind='png', mode='L')
  palette = Image.frombytes('P', (32, 24), bytes(range(24)) * 32)
  palette.putpalette([255, 0, 0] * 256)
  palette.save(tmp_path / 'p.png')
  images = {
    '0.jpg': picture(0),
    '1.jpg': picture(1),
    '2.jpg': picture(2),
    '0.png': mask,
    'p.png': (tmp_path / 'p.png').read_bytes(),
    'small.png': picture(51, size=(16, 16), kind='png', mode='L'),
  }
  rows = [
    {'image': '0.jpg', 'text': 'x', 'kind': 'b', 'seg': '0.png'},
    {'image': '1.jpg', 'text': 'y', 'seg': 'p.png'},
    {'image': '2.jpg', 'text': 'z', 'kind': 'a', 'seg': 'small.png'},
  ]
  source, out = write(tmp_path / 'source', images, rows), tmp_path / 'store'
  assert (
    run(f'--input={source}', f'--output={out}', '--label_column=kind', '--mask_column=seg') == 0
  )
  opened = store.open_store(out)
  records = list(opened.source('train'))
  assert opened.label_names() == ('a', 'b') and [r['label'] for r in records] == [1, -1, 0]
  assert records[0]['mask'] == mask
  assert np.asarray(Image.open(io.BytesIO(records[1]['mask']))).tobytes() == bytes(range(24)) * 32
  ignored = np.asarray(Image.open(io.BytesIO(records[2]['mask'])))
  assert ignored.shape == (24, 32) and (ignored == 255).all()
  assert report(out)['splits']['train']['bad_mask'] == 1


def test_photos_that_exif_turns_are_counted_where_annotations_have_places(tmp_path, capsys):
  exif = Image.Exif()
  exif[0x0112] = 6
  photo = io.BytesIO()
  Image.open(io.BytesIO(picture(0))).save(photo, 'jpeg', exif=exif)
  stored, upright = (picture(9, size=s, kind='png', mode='L') for s in ((32, 24), (24, 32)))
  images = {
    'drawn_as_stored.jpg': photo.getvalue(),
    'drawn_upright.jpg': photo.getvalue(),
    'plain.jpg': picture(1),
    'stored.png': stored,
    'upright.png': upright,
  }
  rows = [
    {'image': 'drawn_as_stored.jpg', 'text': 'x', 'seg': 'stored.png'},
    {'image': 'drawn_upright.jpg', 'text': 'y', 'seg': 'upright.png'},
    {'image': 'plain.jpg', 'text': 'z', 'seg': 'stored.png'},
  ]
  source, out = write(tmp_path / 'source', images, rows), tmp_path / 'store'
  assert run(f'--input={source}', f'--output={out}', '--mask_column=seg') == 0
  found = report(out)
  assert found['splits']['train']['turned'] == 2 and 'bad_mask' not in found['splits']['train']
  assert found['rows']['turned'] == [
    {'split': 'train', 'id': f'{name}.jpg', 'detail': 'EXIF orientation 6'}
    for name in ('drawn_as_stored', 'drawn_upright')
  ]
  [line] = [line for line in capsys.readouterr().out.splitlines() if 'EXIF turns' in line]
  assert line.split()[-1] == '2'
  records = list(store.open_store(out).source('train'))
  assert records[0]['image'] == photo.getvalue()
  turned = Image.open(io.BytesIO(stored)).transpose(Image.Transpose.ROTATE_270)
  for record, mask in zip(records, (turned, Image.open(io.BytesIO(upright)))):
    np.testing.assert_array_equal(Image.open(io.BytesIO(record['mask'])), mask)
  plain = tmp_path / 'without masks'
  assert run(f'--input={source}', f'--output={plain}') == 0  # nothing has a place in the image
  assert 'turned' not in report(plain)['splits']['train']


def test_store_as_input_keeps_its_annotations(tmp_path):
  images = {f'{i}.jpg': picture(i) for i in range(4)}
  rows = [{'image': n, 'text': 'x', 'kind': 'dog'} for n in images]
  source = write(tmp_path / 'source', images, rows)
  assert run(f'--input={source}', f'--output={tmp_path / "one"}', '--label_column=kind') == 0
  assert run(f'--input={tmp_path / "one"}', f'--output={tmp_path / "two"}', '--limit=2') == 0
  assert [r['id'] for r in store.open_store(tmp_path / 'two').source('train')] == [
    b'0.jpg',
    b'1.jpg',
  ]
  assert store.open_store(tmp_path / 'two').label_names() == ('dog',)


def test_store_as_input_keeps_its_regions(tmp_path):
  fields = ('boxes', 'region_tags', 'region_tags_boxes', 'tags')
  folder = store.temporary_folder(tmp_path / 'one')
  writer = store.Writer(folder, store.features(fields))
  example = dict(id='a', alt_text='x', captions=[], image=picture(0))
  regions = dict(boxes=np.full((2, 4), 0.5, np.float32), region_tags=['s', 't', 'u'], tags=['t'])
  writer.add('train', example | regions | dict(region_tags_boxes=[1, 0, 1]))
  writer.close()
  store.finish(folder, tmp_path / 'one', {})
  assert run(f'--input={tmp_path / "one"}', f'--output={tmp_path / "two"}') == 0
  [record] = store.open_store(tmp_path / 'two').source('train')
  assert list(record['region_tags_boxes']) == [1, 0, 1]
  assert list(record['region_tags']) == [b's', b't', b'u'] and list(record['tags']) == [b't']


def error_of(capsys, *args):
  capsys.readouterr()
  assert run(*args) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert lines[-1].startswith('error: ') and 'Traceback' not in '\n'.join(lines)
  return lines[-1]


def test_bad_command_lines_are_one_line_and_exit_code_2(tmp_path, source, capsys):
  out = f'--output={tmp_path / "store"}'
  ok = f'--input={source}'
  assert "flag 'ouput'. Did you mean: input" in error_of(capsys, ok, f'--ouput={tmp_path}')
  assert '--input: missing' in error_of(capsys, out)
  assert '--output: missing' in error_of(capsys, ok)
  assert 'expected only flags' in error_of(capsys, ok, out, 'more')
  assert 'vocab_size' in error_of(capsys, ok, out, '--vocab_size=3')
  assert 'test_fraction' in error_of(capsys, ok, out, '--test_fraction=1.5')
  assert 'expected one source' in error_of(
    capsys, ok, out, '--test_fraction=0.5', f'--test_input={source}'
  )
  assert "did you mean 'source'" in error_of(capsys, f'--input={tmp_path / "sorce"}', out)
  assert "did you mean 'alt_text'" in error_of(capsys, ok, out, '--alt_text_column=alttext')
  assert 'No such file' in error_of(capsys, ok, out, '--tokenizer=nothing.model')
  assert 'exists already' in error_of(capsys, ok, f'--output={source}')
  assert 'in a writable folder' in error_of(capsys, ok, f'--output={source / "0.jpg" / "x"}')
  assert sorted(os.listdir(tmp_path)) == ['source'] and len(os.listdir(source)) == 11


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path, capsys):
  source = write(tmp_path / 'source', {'a.jpg': b'no'})
  message = error_of(capsys, f'--input={source}', f'--output={tmp_path / "store"}')
  assert "{'unreadable': 1}" in message and sorted(os.listdir(tmp_path)) == ['source']


COMMAND = [sys.executable, '-m', 'tips_jax.prepare']


def start(source, out, *flags):
  """A run that is in the middle of writing: its input has more rows than it can read soon."""
  process = subprocess.Popen(
    [*COMMAND, f'--input={source}', f'--output={out}', *flags],
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    # A shell's background job ignores SIGINT, and its children would too.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  deadline = time.monotonic() + 60
  while not list(out.parent.glob('store.partial/train-*')):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  return process


@pytest.fixture
def slow_source(tmp_path):
  big = picture(0, size=(1200, 900), kind='png')
  images = {f'{i}.png': big for i in range(1)}
  source = write(tmp_path / 'source', images)
  for i in range(1, 400):
    os.link(source / '0.png', source / f'{i}.png')
  rows = [{'image': f'{i}.png', 'text': 'x'} for i in range(400)]
  return write(source, {}, rows)


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_first_task_leaves_nothing_and_says_what_to_do(
  tmp_path, slow_source, number, code
):
  process = start(slow_source, tmp_path / 'store', '--task_mib=4096')
  process.send_signal(number)
  _, printed = process.communicate(timeout=60)
  assert process.returncode == code
  assert 'run the same command again to go on' in printed and 'Traceback' not in printed
  assert sorted(os.listdir(tmp_path)) == ['source']


def test_killed_in_the_middle_never_looks_whole_and_nobody_else_can_write_it(
  tmp_path, slow_source, capsys
):
  flags = (f'--input={slow_source}', f'--output={tmp_path / "store"}')
  process = start(slow_source, tmp_path / 'store', '--workers=1', '--limit=300')
  assert 'another process is writing' in error_of(capsys, *flags)
  process.kill()
  process.communicate()
  assert not (tmp_path / 'store').exists()
  with pytest.raises(store.InputError, match='half-written'):
    store.open_store(tmp_path / 'store.partial')
  message = error_of(capsys, *flags, '--limit=3')
  assert 'was begun with limit 300; got 3' in message and 'remove the folder' in message


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path, slow_source):
  code = (
    'import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 2**20,) * 2);'
    'from tips_jax import prepare; sys.exit(prepare.main(sys.argv))'
  )
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      code,
      f'--input={slow_source}',
      f'--output={tmp_path / "store"}',
      '--limit=20',
    ],
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  assert (
    done.returncode == 2
    and 'error: cannot write the store' in done.stderr
    and 'Traceback' not in done.stderr
  )
  assert sorted(os.listdir(tmp_path)) == ['source']


def test_neither_jax_nor_tensorflow_is_imported(tmp_path, source):
  code = (
    f'import sys; sys.path[:0] = {sys.path!r}\nfrom tips_jax import prepare\n'
    f'arguments = ["--input={source}", "--output={tmp_path / "store"}", "--tokenizer"]\n'
    f'prepare.main(["prepare", *arguments])\n'
    f'assert not {{"jax", "tensorflow", "torch"}} & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
