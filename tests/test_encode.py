"""The command line: what lands in the file, and that nothing lands anywhere else."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import tips_jax
from tips_jax import encode
from tips_jax.core import schema
from tips_jax.data import tokenizer
from tips_jax.interop.weights import Weights
from tips_jax.interop.write import write
from tips_jax.models import towers

ROOT = pathlib.Path(__file__).parent.parent
KNOWN = {
  'image': schema.ViT(
    kind='vit', width=32, depth=1, heads=2, mlp=64, patch=4, grid=4, mask_token=True
  ),
  'text': schema.TextTower(kind='text', width=32, depth=1, heads=2, mlp=64, vocab=300),
  'logit': schema.Logit(kind='logit'),
}
TEXTS = ['A red ball', 'a blue box', 'rain on the roof']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with a model, five images (one of them broken) and texts."""
  folder = tmp_path_factory.mktemp('encode')
  tokenizer.train(TEXTS * 20, folder / 'tokenizer.model', vocab_size=300)
  params = {k: jax.device_get(towers.init(k, t, seed=0)) for k, t in KNOWN.items()}
  (folder / 'model').mkdir()
  write(
    Weights(
      name='t',
      towers=KNOWN,
      params=params,
      size=16,
      tokenizer=(folder / 'tokenizer.model').read_bytes(),
    ),
    'safetensors',
    folder / 'model',
  )
  rng = np.random.default_rng(0)
  (folder / 'images').mkdir()
  for name in ('c.png', 'a.png', 'b.jpg', 'e.png'):
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / 'images' / name)
  (folder / 'images' / 'd.png').write_bytes(b'broken')
  (folder / 'texts.txt').write_text('\n'.join(TEXTS) + '\n\n')
  return folder


def run(
  place,
  tmp_path,
  *extra,
  images='images/*',
  texts='texts.txt',
  output='out.npz',
  checkpoint='model',
):
  given = {
    'checkpoint': checkpoint and place / checkpoint,
    'images': images and place / images,
    'texts': texts and place / texts,
    'output': tmp_path / output,
  }
  return encode.main(['encode', *(f'--{k}={v}' for k, v in given.items() if v), *extra])


def test_what_is_in_the_file(place, tmp_path, capsys):
  assert run(place, tmp_path, '--patches') == 0
  told = capsys.readouterr()
  assert (
    'left out' in told.err
    and 'd.png' in told.err
    and told.err.count('left out') == 1
    and 'ETA' in told.err
  )
  out = np.load(tmp_path / 'out.npz')
  e = tips_jax.load(place / 'model')
  paths = [str(place / 'images' / n) for n in ('a.png', 'b.jpg', 'c.png', 'e.png')]
  assert out['paths'].tolist() == paths and out['cls_names'].tolist() == ['web', 'synthetic']
  assert out['texts'].tolist() == TEXTS
  cls, patch = e.encode_image(paths)
  for name, want in {
    'cls': cls,
    'patch': patch,
    'text': e.encode_text(TEXTS),
    'image_embedding': cls[:, 0],
  }.items():
    np.testing.assert_allclose(out[name], want, rtol=1e-5, atol=1e-5)
  assert out['temperature'] == pytest.approx(e.temperature)
  assert os.listdir(tmp_path) == ['out.npz']


def test_images_or_texts_alone_size_and_groups(place, tmp_path, monkeypatch):
  monkeypatch.setattr('tips_jax.interop.encoder.Encoder.group', lambda self, size=None: 1)
  assert run(place, tmp_path, '--size=24', '--batch_size=2', texts='') == 0
  out = np.load(tmp_path / 'out.npz')
  assert sorted(out) == ['cls', 'cls_names', 'image_embedding', 'paths', 'temperature']
  paths = out['paths'].tolist()
  want = tips_jax.load(place / 'model').encode_image(paths, size=24)[0]
  np.testing.assert_allclose(out['cls'], want, rtol=1e-5, atol=1e-5)
  assert run(place, tmp_path, images='', output='two.npz') == 0
  assert sorted(np.load(tmp_path / 'two.npz')) == ['temperature', 'text', 'texts']


@pytest.mark.parametrize(
  'change, message',
  [
    ({'checkpoint': ''}, '--checkpoint: missing'),
    ({'images': 'none/*.jpg'}, 'matches no file'),
    ({'texts': 'none.txt'}, 'cannot read'),
    ({'texts': 'images/b.jpg'}, 'not UTF-8'),
    ({'output': 'x.txt'}, '.npz'),
    ({'output': 'no/such/x.npz'}, 'folder that exists'),
    ({'images': '', 'texts': ''}, 'got neither'),
    ({'extra': ['--dtype=float16']}, 'dtype'),
    ({'extra': ['--sizes=3']}, 'sizes'),
    ({'extra': ['x.jpg']}, 'x.jpg'),
    ({'extra': ['--patches'], 'images': ''}, '--patches'),
  ],
)
def test_bad_flags_are_one_line_before_any_model(
  place, tmp_path, capsys, monkeypatch, change, message
):
  monkeypatch.setattr(tips_jax, 'load', lambda *_, **__: pytest.fail('a model was loaded'))
  change = dict(change)
  assert run(place, tmp_path, *change.pop('extra', []), **change) == 2
  told = capsys.readouterr().err
  assert told.startswith('error: ') and message in told and told.count('\n') == 1
  assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(place, tmp_path, capsys, monkeypatch):
  (tmp_path / 'out.npz').write_text('mine')
  assert run(place, tmp_path) == 2 and 'which exists' in capsys.readouterr().err
  (tmp_path / 'out.npz').unlink()
  before = encode._write

  def appears(output, arrays):  # while the images were encoded
    output.write_text('mine')
    before(output, arrays)

  monkeypatch.setattr(encode, '_write', appears)
  assert run(place, tmp_path) == 2 and 'which exists' in capsys.readouterr().err
  assert (tmp_path / 'out.npz').read_text() == 'mine' and os.listdir(tmp_path) == ['out.npz']


def test_no_readable_image_is_an_error(place, tmp_path, capsys):
  assert run(place, tmp_path, images='images/d.png') == 2
  assert 'none of the 1 files' in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_what_the_model_lacks_is_said_first(place, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(encode, '_images', lambda *_: pytest.fail('images were encoded'))
  e = tips_jax.load(place / 'model')
  e.weights = e.weights.replace(tokenizer=None)
  monkeypatch.setattr(tips_jax, 'load', lambda *_, **__: e)
  assert run(place, tmp_path) == 2 and 'no tokenizer' in capsys.readouterr().err


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_leaves_nothing(place, tmp_path, number, code):
  (tmp_path / 'images').mkdir()
  for i in range(3000):
    os.link(place / 'images/a.png', tmp_path / f'images/{i}.png')
  script = (
    'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); '
    'from tips_jax import encode; from tips_jax.interop.encoder import Encoder; '
    'Encoder.group = lambda self, size=None: 1; sys.exit(encode.main(sys.argv))'
  )
  process = subprocess.Popen(
    [
      sys.executable,
      '-c',
      script,
      f'--checkpoint={place / "model"}',
      f'--images={tmp_path}/images/*.png',
      f'--output={tmp_path}/out.npz',
    ],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  line = ''
  while 'image 1/' not in line:  # the first group is done
    line = process.stderr.readline()
    assert line, process.wait()
  time.sleep(0.05)
  process.send_signal(number)
  assert 'stopped: nothing was written' in process.communicate(timeout=60)[1]
  assert process.returncode == code and os.listdir(tmp_path) == ['images']


def test_a_file_with_brackets_in_its_name(place, tmp_path):
  image = tmp_path / 'photo[1].png'
  image.write_bytes((place / 'images' / 'a.png').read_bytes())
  output = tmp_path / 'out.npz'
  arguments = [f'--checkpoint={place / "model"}', f'--images={image}', f'--output={output}']
  assert encode.main(['encode', *arguments]) == 0
  assert np.load(output)['paths'].tolist() == [str(image)]


def test_a_photo_that_exif_turns_has_the_features_of_the_upright_one(place, tmp_path):
  stored = Image.open(place / 'images' / 'a.png')
  exif = Image.Exif()
  exif[0x0112] = 6  # a phone held upright: 90 degrees clockwise to show it
  folder = tmp_path / 'photos'
  folder.mkdir()
  stored.save(folder / 'a_stored.png')
  stored.save(folder / 'b_turned.png', exif=exif)
  stored.transpose(Image.Transpose.ROTATE_270).save(folder / 'c_upright.png')
  assert run(place, tmp_path, '--patches', images=folder / '*.png', texts='') == 0
  out = np.load(tmp_path / 'out.npz')
  for name in ('cls', 'patch', 'image_embedding'):
    as_stored, turned, upright = out[name]
    np.testing.assert_array_equal(turned, upright)
    assert not np.allclose(turned, as_stored)
