"""What benchmarks/fuzz.py reads: a small valid input for each reader, and the function that reads.

Readers may write into the folder of their input alone. `refuses`: a reader may raise ValueError.
"""

import functools
import gzip
import importlib
import io
import json
import sys
import tarfile
import types
import typing
from collections.abc import Callable

import numpy as np
from absl import flags
from array_record.python import array_record_module
from PIL import Image
from tensorboardX import record_writer

from benchmarks.fuzz_files import (
  HEIGHT,
  JPEG,
  MASK,
  OTHER,
  WIDTH,
  Folder,
  encoded,
  lines,
  put,
  zipped,
)
from benchmarks.fuzz_layouts import LAYOUTS, write_nyu_normals
from tips_jax.core import cli, log, schema, strict
from tips_jax.core.errors import InputError
from tips_jax.data import store, tokenizer
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.data.ingest import checks, convert
from tips_jax.data.ingest.columns import Columns
from tips_jax.data.ingest.formats import open_input
from tips_jax.data.ingest.reader import Options
from tips_jax.data.pixels import images

ROOT = Folder(__file__).resolve().parents[1]


class Reader(typing.NamedTuple):
  write: Callable[[Folder], object]  # a valid input into an empty folder
  read: Callable[[Folder], object]
  refuses: type[Exception] | tuple[type[Exception], ...] = InputError


def writer(files: dict[str, bytes | str]) -> Callable[[Folder], None]:
  return functools.partial(put, files=files)


EXIF = Image.Exif()
EXIF[0x0112] = 6  # stored turned


LABELED = {'label': 'label', 'mask': 'mask'}


# --- image-text data ----------------------------------------------------------------------------

ROWS = [
  {'image': '0.jpg', 'caption': 'a "red, big" dog', 'label': '3', 'mask': '0.png'},
  {'image': '1.jpg', 'caption': "['a', 'b']", 'label': 'x', 'mask': '0.png'},
]
CSV = 'image,caption,label,mask\n0.jpg,"a ""red"" dog",3,0.png\n1.jpg,"[\'a\', \'b\']",x,0.png\n'
COCO = {
  'images': [{'id': 1, 'file_name': '0.jpg'}],
  'annotations': [{'image_id': 1, 'caption': 'a'}],
}
PICTURES = {'data/0.jpg': JPEG, 'data/1.jpg': OTHER, 'data/0.png': MASK}


def prepare(folder: Folder, name: str = 'data', **columns: str) -> None:
  """What tips_jax.prepare does: all samples are checked and written to a store."""
  reader = open_input(folder / name, Options(columns=Columns(**columns)))
  to_store(folder, reader)


def to_store(folder, reader):
  with open('/dev/null', 'w') as silent:
    convert.convert({'train': reader}, folder / 'store', min_side=1, stream=silent)


def table(name: str, text: bytes | str, **columns: str) -> Reader:
  read = functools.partial(prepare, name=f'data/{name}', **columns)
  return Reader(writer(PICTURES | {f'data/{name}': text}), read)


def tar(format: int) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w', format=format) as archive:
    files = {'b.jpg': OTHER, 'b.json': b'{"caption": "x"}', 'b.cls': b'3'}
    for name, data in ({'a' * 120 + 'ä.jpg': JPEG, 'a' * 120 + 'ä.txt': b'text'} | files).items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return out.getvalue()[: 12 * 1024]


def arrow_table():
  import pyarrow as pa

  cells = [{'bytes': JPEG, 'path': '0.jpg'}, {'bytes': OTHER, 'path': '1.jpg'}]
  texts = pa.array([[('en', 'a'), ('de', 'b')]] * 2, pa.map_(pa.string(), pa.string()))
  columns = {'image': cells, 'caption': ['a', 'b'], 'captions': texts, 'label': [0, 1]}
  features = {'label': {'_type': 'ClassLabel', 'names': ['cat', 'dog']}}
  metadata = {'huggingface': json.dumps({'info': {'features': features}})}
  return pa.table(columns).replace_schema_metadata(metadata)


def write_parquet(folder: Folder) -> None:
  import pyarrow.parquet as pq

  put(folder, {'data/README.md': '# data'})
  pq.write_table(arrow_table(), folder / 'data/train-0.parquet')
  pq.write_table(arrow_table(), folder / 'data/train-1.parquet', compression='none')


def write_hugging_face(folder: Folder) -> None:
  import pyarrow as pa

  state = {'_data_files': [{'filename': 'data-00000-of-00001.arrow'}]}
  put(folder, {'data/state.json': json.dumps(state), 'data/dataset_info.json': '{}'})
  rows = arrow_table()
  with pa.ipc.new_stream(str(folder / 'data' / 'data-00000-of-00001.arrow'), rows.schema) as file:
    file.write_table(rows)


def write_store(folder: Folder, whole: bool = True) -> None:
  """A store; without its store.json a folder of TFDS."""
  building = folder / 'building'
  building.mkdir()
  out = store.Writer(building, store.features(['label', 'mask'], labels=['cat', 'dog']))
  for i, image in enumerate((JPEG, OTHER)):
    texts = {'id': str(i), 'alt_text': 'a', 'captions': ['b', 'c']}
    out.add('train', {'image': image, 'label': i, 'mask': MASK, **texts})
  out.close()
  if whole:
    store.finish(building, folder / 'data', {})
  else:
    building.rename(folder / 'data')


def write_tfrecords(folder: Folder) -> None:
  """A folder of TFDS in its older format."""
  write_store(folder, whole=False)
  [file] = folder.rglob('*.array_record*')
  records = array_record_module.ArrayRecordReader(str(file)).read_all()
  written = record_writer.RecordWriter(str(file).replace('array_record', 'tfrecord'))
  for record in records:
    written.write(record)
  written.close()
  file.unlink()
  info = folder / 'data/dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))


def read_store(folder: Folder) -> None:
  opened = store.open_store(folder / 'data')
  opened.label_names()
  list(opened.source('train'))


def image(kind: str, **options: object) -> Reader:
  return Reader(writer({'x': encoded(kind, **options)}), read_image, ValueError)


def read_image(folder: Folder) -> None:
  data = (folder / 'x').read_bytes()
  checks.check_image(data, min_side=1, max_pixels=images.MAX_PIXELS)
  images.decode(data)
  images.encoded(data).rgbx(4)


def read_mask(folder: Folder) -> None:
  check = checks.Check('', '', (WIDTH, HEIGHT))
  for path in sorted(folder.iterdir()):
    _, problem = checks.mask_png(path.read_bytes(), check, max_pixels=images.MAX_PIXELS)
    if problem:
      raise ValueError(problem)


# --- models, runs and what is kept of them ------------------------------------------------------

WORDS = ['a red square on a blue field', 'two green circles', 'the photo shows a dog']
VIT = {'kind': 'vit', 'width': 16, 'depth': 1, 'heads': 2, 'mlp': 32, 'patch': 14, 'grid': 2}
TEXT = {'kind': 'text', 'width': 16, 'depth': 1, 'heads': 2, 'mlp': 32, 'vocab': 300}


def model(folder: Folder):
  import jax

  from tips_jax.interop.weights import Weights
  from tips_jax.models import towers

  tokenizer.train(WORDS, folder / 'made.model', vocab_size=300)
  known = {'image': schema.ViT(**VIT), 'text': schema.TextTower(**TEXT)}
  known['logit'] = schema.Logit(kind='logit')
  params = {}
  for name, tower in known.items():
    shapes = jax.eval_shape(functools.partial(towers.init, name, tower, seed=0))
    params[name] = jax.tree.map(np.ones_like, jax.tree.map(zeros, shapes))
  pieces = (folder / 'made.model').read_bytes()
  (folder / 'made.model').unlink()
  return Weights(name='x', towers=known, params=params, tokenizer=pieces, size=28)


def zeros(shape):
  return np.zeros(shape.shape, shape.dtype)


def write_export(folder: Folder, format: str) -> None:
  from tips_jax.interop import write

  weights = model(folder)
  (folder / 'model').mkdir()
  write.write(weights, format, folder / 'model')


def read_model(folder: Folder) -> None:
  from tips_jax.interop import read

  read.read(folder / 'model')


def export(format: str) -> Reader:
  return Reader(functools.partial(write_export, format=format), read_model)


def config_of(name: str, argument: str) -> dict:
  return importlib.import_module(f'configs.{name}').get_config(argument).to_dict()


def write_run(folder: Folder) -> None:
  import jax

  from tips_jax.runs import checkpoint
  from tips_jax.train import initialization, state
  from tips_jax.train import method as method_lib

  workdir = folder / 'model'
  put(workdir, {'metrics.jsonl': '{"step": 4, "eval/knn/accuracy": 0.25}\n'})
  tokenizer.train(WORDS, workdir / 'tokenizer.model', vocab_size=300)
  config = config_of('vitb', 'v1,runlocal')
  config['towers']['image'] |= {'width': 16, 'depth': 1, 'heads': 2, 'mlp': 32}
  config['towers']['text'] |= {'width': 16, 'depth': 1, 'heads': 2, 'mlp': 32}
  config = strict.build(schema.Config, config)
  shapes = jax.eval_shape(functools.partial(state.init, method_lib.build(config)))
  pipeline = types.SimpleNamespace(
    tokenizer=tokenizer.Tokenizer(workdir / 'tokenizer.model'), fingerprint='f' * 64
  )
  saver = checkpoint.Checkpoints(workdir, config.checkpoint)
  contract = initialization.contract(config, pipeline)
  saver.save(4, jax.tree.map(zeros, shapes), next_index=0, contract=contract)
  saver.close()


def read_tokenizer(folder: Folder) -> None:
  tokenizer.Tokenizer(folder / 'tokenizer.model').encode('a red square', 8)


def read_metrics(folder: Folder) -> None:
  log.read(folder / log.FILE)
  log.Metrics(folder, config=schema.Log(tensorboard=False), resume_step=2).close()
  log.UniqueLines(folder / 'bad_records.jsonl').add({'a': 1})


def write_config(folder: Folder) -> None:
  put(folder, {'config.json': json.dumps(config_of('quickstart', 'v2,runlocal'))})


def read_config(folder: Folder) -> None:
  from tips_jax.train import method

  try:
    content = json.loads((folder / 'config.json').read_bytes())
  except (ValueError, RecursionError) as error:
    raise InputError('no config') from error
  method.build(strict.build(schema.Config, content))


OVERRIDES = """schedule.batch_size=8 towers.image.heads=2 towers.image.patch=14 data.store=/x
data.views.local.scale=(0.4,1.0) optimizer.eps=1e-8 checkpoint.best_metric=knn log.every_steps=1
towers.text.vocab=1000 schedule.total_steps=9 mesh.fsdp=1 evals.every_steps=4"""


def read_overrides(folder: Folder) -> None:
  values = cli.Flags()
  values.add_config_file()
  text = (folder / 'overrides.txt').read_bytes().decode(errors='surrogateescape')
  sys.argv = ['x', f'--config={ROOT}/configs/quickstart.py:v2,runlocal']  # ml_collections reads it
  sys.argv += [f'--config.{word}' for word in text.split()]
  cli.parse(values, sys.argv)
  cli.load_config(values)


class Encoder:
  """What the feature cache asks of an encoder."""

  cls_names = ('web',)
  sha256 = '0' * 64

  def inspect(self, pixels: np.ndarray, **_: object) -> dict[str, object]:
    rows = np.ones((len(pixels), 4), np.float32)
    return {'web': rows, 'embedding': rows, 'patch': rows[:, None, None], 'intermediate_layers': ()}

  def encode_text(self, texts: list[str]) -> np.ndarray:
    return np.ones((len(texts), 4), np.float32)


def read_cache(folder: Folder) -> None:
  from tips_jax.evals.features import cache

  records = [{'label': 0}] * 6
  kept = cache.Cache(folder / 'cache')
  found = kept.extract(Encoder(), records, one_pixel, key='x', outputs=('patch',))
  texts, _ = kept.texts(Encoder(), ['a', 'b'])
  for array in (*found.arrays.values(), texts):
    if not (np.asarray(array) == 1).all():
      raise AssertionError('other numbers than were computed')


def one_pixel(record):
  return np.zeros((1, 1, 3), np.uint8)


# --- benchmarks ---------------------------------------------------------------------------------


def read_benchmark(folder: Folder, name: str) -> None:
  to_store(folder, benchmarks.open(name, folder, 'test'))


# --- all ----------------------------------------------------------------------------------------

READERS = {
  'csv': table('t.csv', CSV, **LABELED),
  'tsv': table('t.tsv', CSV.replace(',', '\t').encode('utf-16'), **LABELED),
  'json': table('t.json', json.dumps(ROWS), **LABELED),
  'json_coco': table('t.json', json.dumps(COCO)),
  'json_lines': table('t.jsonl', lines(*ROWS), **LABELED),
  'zip': Reader(
    writer({'data.zip': zipped({'t.csv': CSV, '0.jpg': JPEG, '1.jpg': OTHER, '0.png': MASK})}),
    functools.partial(prepare, name='data.zip', **LABELED),
  ),
  'tar': Reader(writer({'data/a.tar': tar(tarfile.PAX_FORMAT)}), prepare),
  'tar_gnu': Reader(writer({'data/a.tar': tar(tarfile.GNU_FORMAT)}), prepare),
  'tar_gz': Reader(writer({'data/a.tar.gz': gzip.compress(tar(tarfile.PAX_FORMAT))}), prepare),
  'parquet': Reader(write_parquet, functools.partial(prepare, label='label')),
  'hugging_face': Reader(write_hugging_face, functools.partial(prepare, label='label')),
  'tfds': Reader(functools.partial(write_store, whole=False), prepare),
  'tfds_tfrecord': Reader(write_tfrecords, prepare),
  'store': Reader(write_store, read_store),
  'jpeg': image('jpeg', exif=EXIF),
  'jpeg_progressive': image('jpeg', progressive=True),
  'png': image('png'),
  'webp': image('webp'),
  'tiff': image('tiff', compression='tiff_lzw'),
  'avif': image('avif'),
  'gif': image('gif'),
  'bmp': image('bmp'),
  'masks': Reader(
    writer({'0.png': MASK, '1.tif': encoded('tiff', 1), '2.gif': encoded('gif', 1)}),
    read_mask,
    ValueError,
  ),
  'safetensors': export('safetensors'),
  'hf_model': export('hf'),
  'npz_torch': export('official_torch'),
  'npz_jax': export('official_jax'),
  'run': Reader(write_run, read_model),
  'tokenizer': Reader(
    lambda folder: tokenizer.train(WORDS, folder / 'tokenizer.model', vocab_size=300),
    read_tokenizer,
  ),
  'metrics': Reader(
    writer({'metrics.jsonl': '{"step": 1, "loss": 0.5}\n' * 3, 'bad_records.jsonl': '{"a": 1}\n'}),
    read_metrics,
  ),
  'config': Reader(write_config, read_config),
  'overrides': Reader(
    writer({'overrides.txt': OVERRIDES}), read_overrides, (InputError, flags.Error)
  ),
  'cache': Reader(read_cache, read_cache),
  'nyu_normals': Reader(write_nyu_normals, functools.partial(read_benchmark, name='nyu_normals')),
}
for name, files in LAYOUTS.items():
  READERS[name] = Reader(writer(files), functools.partial(read_benchmark, name=name))
