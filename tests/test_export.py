"""Export as a user calls it, of a run's checkpoints: every format, and every way to go wrong."""

import errno
import functools
import json
import math
import os
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tips_jax
from configs import vitb
from configs.methods import lightclip
from tests.disk import full_disk
from tips_jax import export
from tips_jax.core import schema, strict, tree
from tips_jax.data import tokenizer
from tips_jax.interop import arrays, parity, read, write
from tips_jax.interop.weights import flat
from tips_jax.runs import checkpoint
from tips_jax.runs import folder as runs
from tips_jax.train import initialization
from tips_jax.train import method as method_lib
from tips_jax.train import state as state_lib


def save_run(workdir, plain, steps):
  """A run of random weights with a checkpoint at each of the steps; {step: State}."""
  workdir.mkdir()
  tokenizer.train(
    ['a red circle', 'two blue squares on grass'], workdir / runs.TOKENIZER, vocab_size=300
  )
  config = strict.build(schema.Config, plain)
  method = method_lib.build(config)
  shapes = jax.eval_shape(functools.partial(state_lib.init, method))
  pipeline = types.SimpleNamespace(
    tokenizer=tokenizer.Tokenizer(workdir / runs.TOKENIZER), fingerprint='f' * 64
  )
  contract = initialization.contract(config, pipeline)
  saver, states = checkpoint.Checkpoints(workdir, config.checkpoint), {}
  for step in steps:
    rng = np.random.default_rng(step)
    draw = lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), s.dtype)  # noqa: B023
    states[step] = jax.tree.map(draw, shapes).replace(step=jnp.int32(step))
    saver.save(step, states[step], next_index=0, contract=contract)
    saver.wait()
  saver.close()
  return states


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(work folder, {step: State}) of a TIPS run of two checkpoints."""
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  states = save_run(workdir, vitb.get_config('v1,runlocal').to_dict(), (4, 8))
  lines = [
    {'step': 4, 'eval/knn/accuracy': 0.25},
    {'step': 8, 'eval/knn/accuracy': 0.5, 'eval/seconds': 3.0},
  ]
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(l) + '\n' for l in lines))
  return workdir, states


def call(capsys, **flags):
  code = export.main(['export', *(f'--{k}={v}' for k, v in flags.items())])
  return code, *capsys.readouterr()


def same(params, tree):
  a, b = flat(params), flat(tree)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], name)


def test_which_weights(run):
  workdir, states = run
  same(read.read(workdir).params['image'], states[8].params['image'])
  same(read.read(f'{workdir}@4').params['image'], states[4].params['image'])
  teacher = read.read(workdir, weights='teacher')
  same(teacher.params['image'], states[8].teachers['ema']['image'])
  same(teacher.params['text'], states[8].params['text'])  # it has no teacher
  same(read.read(workdir, weights='ema').params, teacher.params)
  assert teacher.about['weights'] == 'ema' and teacher.about['evaluation'] == {'knn/accuracy': 0.5}
  assert read.read(f'{workdir}@4').about['evaluation'] == {'knn/accuracy': 0.25}


@pytest.mark.parametrize('format', write.FORMATS)
def test_every_format(run, capsys, tmp_path, format):
  if format == 'onnx':
    pytest.importorskip('onnxscript')
  workdir, states = run
  output = tmp_path / 'new' / 'folder'
  code, out, err = call(capsys, checkpoint=workdir, to=format, output=output)
  assert code == 0, err
  assert f'written: {output}' in out and 'max abs' in out and 'DIFFERS' not in out
  contract = json.loads((output / write.CONTRACT).read_text())
  assert contract['format'] == format and contract['about']['data_fingerprint'] == 'f' * 64
  assert (output / runs.TOKENIZER).read_bytes() == (workdir / runs.TOKENIZER).read_bytes()
  assert [p.name for p in output.parent.iterdir()] == ['folder']
  if format != 'onnx':
    back = read.read(output)
    same(back.params['text'], states[8].params['text'])
    assert back.about['evaluation'] == {'knn/accuracy': 0.5}


@pytest.mark.parametrize(
  'format, file, read_arrays, name',
  [
    ('official_torch', '*_vision.npz', arrays.read_npz, 'pos_embed'),
    ('hf', '*.safetensors', arrays.read_safetensors, 'vision_encoder.pos_embed'),
  ],
)
def test_a_high_resolution_run_of_v1_is_written_with_the_table_of_its_images(
  capsys, tmp_path, format, file, read_arrays, name
):
  """Trained with a table of 4 x 4 at 8 x 8 patches, as the released v1 with 16 x 16 at 32 x 32."""
  plain = vitb.get_config('v1,hr,runlocal').to_dict()
  plain['evals']['size'] = 8 * 14
  states = save_run(tmp_path / 'run', plain, (8,))
  assert states[8].params['image']['posembed'].shape == (1, 4, 4, 32)
  code, _, err = call(capsys, checkpoint=tmp_path / 'run', to=format, output=tmp_path / 'out')
  assert code == 0 and 'table of 4 x 4 is written for 112 pixels' in err, err
  [path] = (tmp_path / 'out').glob(file)
  assert read_arrays(path)[name].shape == (1, 1 + 8 * 8, 32)  # that of the CLS token comes first
  images = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
  ours, theirs = (tips_jax.load(tmp_path / n).encode_image(images) for n in ('run', 'out'))
  for one, other in zip(ours, theirs):
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.once
def test_a_phone_gets_lightclips_encoders_alone_in_int8(tmp_path, capsys):
  """Nothing of fusion, matching and guessed words; as many weights as CLIP's towers have."""
  pytest.importorskip('onnxscript')
  import onnx

  states = save_run(tmp_path / 'run', lightclip.get_config('swin_nano,runlocal').to_dict(), (1,))
  flags = dict(checkpoint=tmp_path / 'run', to='onnx', dtype='int8', resolution=64)
  code, out, err = call(capsys, output=tmp_path / 'x', **flags)
  assert code == 0, out + err
  assert 'int8 instead of float32: least cosine 0.9' in out
  params = states[1].params
  for name in ('image', 'text'):
    graph = onnx.load(tmp_path / 'x' / f'{name}.onnx').graph
    large = [x for x in graph.initializer if math.prod(x.dims) >= 256]
    assert {onnx.TensorProto.UINT8} <= {x.data_type for x in large}
    assert not any('fus' in x.name or 'word' in x.name for x in graph.initializer)
    here = tree.size({n: params[n] for n in (name, f'{name}_projection')})
    assert sum(math.prod(x.dims) for x in graph.initializer) < 1.2 * here
  assert {'fusion', 'word_head'} <= params.keys()
  assert sorted(p.name for p in (tmp_path / 'x').glob('*.onnx')) == ['image.onnx', 'text.onnx']


def test_onnx_of_one_resolution(run, capsys, tmp_path):
  pytest.importorskip('onnxscript')
  code, out, err = call(
    capsys, checkpoint=run[0], to='onnx', output=tmp_path / 'x', resolution='42x28'
  )
  assert code == 0 and '42x28 cls' in out and '56x56' not in out, err


def test_an_export_is_a_checkpoint_too(run, capsys, tmp_path):
  """Run -> safetensors in bfloat16 -> official JAX, and loaded."""
  workdir, _ = run
  code, out, err = call(
    capsys, checkpoint=workdir, to='safetensors', output=tmp_path / 'a', dtype='bfloat16'
  )
  assert code == 0 and 'bfloat16 instead of float32: least cosine' in out, err
  code, _, err = call(capsys, checkpoint=tmp_path / 'a', to='official_jax', output=tmp_path / 'b')
  assert code == 0 and (tmp_path / 'b' / 'vitb_v1_vision.npz').exists(), err
  one, other = (tips_jax.load(tmp_path / n) for n in 'ab')
  images = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
  np.testing.assert_array_equal(one.encode_image(images)[0], other.encode_image(images)[0])
  np.testing.assert_array_equal(
    one.encode_text(['A red circle']), other.encode_text(['a red circle'])
  )


def test_files_that_differ_leave_nothing(run, capsys, tmp_path, monkeypatch):
  """One weight of the file is another than the model's."""
  genuine = write.write

  def spoilt(weights, *args, **kwargs):
    image = {**weights.params['image'], 'cls': weights.params['image']['cls'] * 2}
    genuine(weights.replace(params={**weights.params, 'image': image}), *args, **kwargs)

  monkeypatch.setattr(write, 'write', spoilt)
  code, out, err = call(capsys, checkpoint=run[0], to='official_torch', output=tmp_path / 'x')
  assert code == 4 and 'DIFFERS' in out and 'do not reproduce the model; nothing was written' in err
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('format', write.FORMATS)
def test_full_disk_is_one_line_and_leaves_nothing(run, capsys, tmp_path, format):
  if format == 'onnx':
    pytest.importorskip('onnxscript')
  with full_disk(8192):  # the probe at the start fits
    code, out, err = call(capsys, checkpoint=run[0], to=format, output=tmp_path / 'x')
  last = err.splitlines()[-1]
  assert code == 2 and 'Traceback' not in err, err
  assert last == f"error: --output: cannot write '{tmp_path / 'x'}' (File too large)"
  assert list(tmp_path.iterdir()) == []


def test_a_busy_disk_has_the_code_for_another_try(run, capsys, tmp_path, monkeypatch):
  def busy(*args, **kwargs):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

  monkeypatch.setattr(write, 'write', busy)
  code, _, err = call(capsys, checkpoint=run[0], to='hf', output=tmp_path / 'x')
  assert code == 75 and 'cannot write' in err and 'busy' in err
  assert list(tmp_path.iterdir()) == []


def test_stopped(run, capsys, tmp_path, monkeypatch):
  def stop(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(parity, 'fixed_inputs', stop)
  code, _, err = call(capsys, checkpoint=run[0], to='safetensors', output=tmp_path / 'x')
  assert code == 130 and 'nothing was written' in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'flags,message',
  [
    (dict(to='hf', output='x'), '--checkpoint: missing'),
    (dict(checkpoint='RUN', output='x'), '--to: missing'),
    (dict(checkpoint='RUN', to='huggingface', output='x'), 'huggingface'),
    (
      dict(checkpoint='RUN@5', to='hf', output='x'),
      r'got step 5; expected one that .* has: \[4, 8\]',
    ),
    (
      dict(checkpoint='RUN', to='hf', output='x', weights='emma'),
      r"got 'emma'; expected one of \['student', 'ema'\]",
    ),
    (dict(checkpoint='nowhere', to='hf', output='x'), 'does not exist; expected a work folder'),
    (dict(checkpoint='RUN', to='hf', output='RUN'), 'nothing is overwritten'),
    (dict(checkpoint='RUN', to='onnx', output='x', resolution='huge'), "--resolution: got 'huge'"),
    (
      dict(checkpoint='RUN', to='onnx', output='x', dtype='float16'),
      "--dtype: got 'float16'; expected float32 or int8",
    ),
    (dict(checkpoint='RUN', to='hf', output='x', dtype='int8'), 'only --to=onnx has it'),
    (
      dict(checkpoint='RUN', to='official_jax', output='x', dtype='bfloat16'),
      "--dtype: got 'bfloat16'",
    ),
    (
      dict(checkpoint='RUN', to='hf', output='x', tokenizer='missing.model'),
      'tokenizer: got .*missing.model',
    ),
  ],
)
def test_bad_flags(run, capsys, tmp_path, monkeypatch, flags, message):
  monkeypatch.chdir(tmp_path)
  flags = {k: v.replace('RUN', str(run[0])) for k, v in flags.items()}
  code, _, err = call(capsys, **flags)
  assert code == 2 and len(err.strip().splitlines()) == 1
  assert re.search(message, err), err
  assert list(tmp_path.iterdir()) == []


def test_a_run_without_its_tokenizer_asks_for_it(run, capsys, tmp_path):
  workdir = tmp_path / 'run'
  (workdir / 'checkpoints').mkdir(parents=True)
  (workdir / 'checkpoints' / '8').symlink_to(run[0] / 'checkpoints' / '8')
  code, _, err = call(capsys, checkpoint=workdir, to='hf', output=tmp_path / 'x')
  assert code == 2 and '--tokenizer: missing' in err
  code, _, err = call(
    capsys,
    checkpoint=workdir,
    to='safetensors',
    output=tmp_path / 'x',
    tokenizer=run[0] / runs.TOKENIZER,
  )
  assert code == 0, err
