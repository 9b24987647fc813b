"""Official npz files: names, pairs, and every way in which they can be wrong."""

import dataclasses
import json
import pathlib
import pickle

import numpy as np
import pytest

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.interop import arrays, read, write
from tips_jax.interop.official import npz
from tips_jax.interop.weights import at_own_size, fit_positions, flat

LAYOUTS = ('official_torch', 'official_jax')


@pytest.mark.parametrize(
  'name,expected',
  [
    ('tips_oss_g14_lowres_vision.npz', ('v1', 'g', True, 'vision')),
    ('tips_oss_g14_highres_text.npz', ('v1', 'g', False, 'text')),
    ('tips_oss_s14_highres_distilled_vision.npz', ('v1', 's', False, 'vision')),
    ('tips_oss_so400m14_highres_largetext_distilled_text.npz', ('v1', 'so400m', False, 'text')),
    ('tips_v2_oss_so14_vision.npz', ('v2', 'so400m', False, 'vision')),
    ('tips_v2_so400m14_text.npz', ('v2', 'so400m', False, 'text')),
    ('tips_v2_oss_b14_text.npz', ('v2', 'b', False, 'text')),
    ('tips_v2_l14_vision.npz', ('v2', 'l', False, 'vision')),
  ],
)
def test_released_names(name, expected):
  assert tuple(npz.released(f'somewhere/{name}').values()) == expected


def test_other_names_are_not_released_ones():
  assert npz.released('tiny_vision.npz') is None and npz.released('tips_oss_x14_vision.npz') is None


def same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    a, b = flat(one[name]), flat(other[name])
    assert a.keys() == b.keys()
    for leaf in a:
      np.testing.assert_array_equal(a[leaf], b[leaf], leaf)


def put(weights, folder, format, **fields):
  folder.mkdir(parents=True, exist_ok=True)
  write.write(weights, format, folder, **fields)
  return folder


@pytest.mark.parametrize('format', [*LAYOUTS, 'safetensors'])
@pytest.mark.parametrize(
  'fields', [{}, {'ffn': 'swiglu', 'grid': 8}, {'text': False, 'cls': ('cls',)}], ids=str
)
def test_round_trip(tmp_path, model, tokenizer_model, format, fields):
  mask = {} if format != 'official_jax' else {'mask_token': False}  # a layout without it
  weights = model(tokenizer=tokenizer_model, **fields, **mask).replace(
    about={'step': 7}, text_length=24
  )
  back = read.read(put(weights, tmp_path / 'there', format))
  same(back.params, weights.params)
  assert {
    f: getattr(back, f) for f in ('name', 'towers', 'tokenizer', 'text_length', 'size', 'about')
  } == {
    f: getattr(weights, f) for f in ('name', 'towers', 'tokenizer', 'text_length', 'size', 'about')
  }


@pytest.mark.parametrize('format', [*LAYOUTS, 'safetensors', 'hf'])
def test_what_only_the_training_of_a_tower_reads_is_kept(tmp_path, model, format):
  mask_token = format != 'official_jax'  # a layout without it
  weights = model(mask_token=mask_token, centered=True, drop_path=0.1, positions='sincos')
  towers = {**weights.towers, 'text': dataclasses.replace(weights.text, dropout=0.1)}
  back = read.read(put(weights.replace(towers=towers), tmp_path / 'there', format))
  assert back.towers == towers
  same(back.params, weights.params)


@pytest.mark.parametrize('format', LAYOUTS)
def test_without_our_contract_the_arrays_tell(tmp_path, model, monkeypatch, format):
  monkeypatch.setitem(npz.pytorch.HEADS, 32, 2)
  weights = model()
  folder = put(weights, tmp_path / 'there', format)
  (folder / write.CONTRACT).unlink()
  for path in (folder, folder / 'tiny_vision.npz', folder / 'tiny_text.npz'):
    back = read.read(path)
    tower = back.image
    assert (tower.width, tower.depth, tower.heads, tower.mlp, tower.grid) == (32, 2, 2, 64, 4)
    assert back.text == weights.text and back.tokenizer is None
    np.testing.assert_array_equal(
      back.params['logit']['log_temperature'], weights.params['logit']['log_temperature']
    )


def test_released_files_whose_names_disagree_are_one_model(tmp_path, model, monkeypatch):
  monkeypatch.setitem(npz._WIDTHS, 'so400m', 32)
  monkeypatch.setitem(npz.pytorch.HEADS, 32, 2)
  folder = put(model(grid=8), tmp_path / 'there', 'official_torch')
  (folder / write.CONTRACT).unlink()
  (folder / 'tiny_vision.npz').rename(folder / 'tips_v2_oss_so14_vision.npz')
  (folder / 'tiny_text.npz').rename(folder / 'tips_v2_so400m14_text.npz')
  for name in ('tips_v2_oss_so14_vision.npz', 'tips_v2_so400m14_text.npz'):
    back = read.read(folder / name)
    assert back.text and back.size == 448


def test_a_file_of_another_variant_than_its_name(tmp_path, model):
  folder = put(model(text=False), tmp_path / 'there', 'official_jax')
  (folder / write.CONTRACT).unlink()
  (folder / 'tiny_vision.npz').rename(folder / 'tips_oss_b14_highres_distilled_vision.npz')
  with pytest.raises(
    InputError, match='image tower: got width 32; expected 768, as the name says b'
  ):
    read.read(folder)


@pytest.mark.parametrize('name', ['temperature', 'temperature_contrastive'])
def test_either_name_of_the_temperature(tmp_path, model, name):
  folder = put(model(), tmp_path / 'there', 'official_jax')
  text = arrays.read_npz(folder / 'tiny_text.npz')
  value = text.pop('temperature_contrastive')
  (folder / write.CONTRACT).unlink()
  arrays.write_npz(folder / 'tiny_text.npz', text | {name: value})
  assert read.read(folder).params['logit']['log_temperature'] == np.float32(np.log(0.0125))
  arrays.write_npz(folder / 'tiny_text.npz', text)
  with pytest.raises(InputError, match='got no temperature'):
    read.read(folder)
  arrays.write_npz(folder / 'tiny_text.npz', text | {name: -value})
  with pytest.raises(InputError, match='expected one number above 0'):
    read.read(folder)


def test_a_truncated_file(tmp_path, model):
  folder = put(model(), tmp_path / 'there', 'official_torch')
  file = folder / 'tiny_vision.npz'
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])
  with pytest.raises(
    InputError, match=f'expected {len(data)} bytes: a half-written or half-copied folder'
  ):
    read.read(folder)
  with pytest.raises(InputError, match='truncated or damaged|no npz file'):
    arrays.read_npz(file)
  file.unlink()
  with pytest.raises(InputError, match='got no file'):
    read.read(folder)


class Bomb:
  """Leaves a mark where it is unpickled."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path(self.mark),)


def test_pickles_are_refused_and_never_run(tmp_path):
  mark = tmp_path / 'mark'
  bomb = np.empty(1, object)
  bomb[0] = Bomb(mark)
  np.savez(tmp_path / 'objects_vision.npz', cls_token=bomb)
  (tmp_path / 'plain_vision.npz').write_bytes(pickle.dumps(Bomb(mark)))
  (tmp_path / 'model.pth').write_bytes(pickle.dumps(Bomb(mark)))
  for name in ('objects_vision.npz', 'plain_vision.npz', 'model.pth'):
    with pytest.raises(InputError, match='pickle'):
      read.read(tmp_path / name)
  assert not mark.exists()
  pickle.loads((tmp_path / 'model.pth').read_bytes())  # the bomb is a real one
  assert mark.exists()


def test_what_is_no_checkpoint(tmp_path):
  with pytest.raises(
    InputError, match='does not exist; expected a work folder.*hf download google/tipsv2-b14'
  ):
    read.read('google/tipsv2-b14')
  with pytest.raises(InputError, match='expected a work folder'):
    read.read(tmp_path)
  np.savez(tmp_path / 'x.npz', weights=np.zeros(3, np.float32))
  with pytest.raises(InputError, match='expected those of one tower of TIPS'):
    read.read(tmp_path / 'x.npz')


def test_two_models_in_a_folder(tmp_path, model):
  folder = put(model(), tmp_path / 'there', 'official_jax')
  (folder / write.CONTRACT).unlink()
  (folder / 'other_vision.npz').write_bytes((folder / 'tiny_vision.npz').read_bytes())
  with pytest.raises(InputError, match='got 2 models'):
    read.read(folder)


def test_bfloat16_has_no_npz(tmp_path, model):
  with pytest.raises(InputError, match="--dtype: got 'bfloat16'"):
    put(model(), tmp_path / 'there', 'official_jax', dtype='bfloat16')


def test_projections_have_no_place(tmp_path, model):
  with pytest.raises(
    InputError, match='got a model with image_head and text_head.*safetensors holds it'
  ):
    put(model(heads=True), tmp_path / 'there', 'official_torch')
  same(
    read.read(put(model(heads=True), tmp_path / 'own', 'safetensors')).params,
    model(heads=True).params,
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_smaller_numbers(tmp_path, model, dtype):
  weights = model()
  back = read.read(put(weights, tmp_path / 'there', 'safetensors', dtype=dtype))
  same(back.params, weights.cast(dtype).params)
  assert np.abs(flat(back.params)['image/cls'] - flat(weights.params)['image/cls']).max() > 0


def edit(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
  'old,new,message',
  [
    ('"mean": 0', '"mean": 0.5', 'got the preprocessing'),
    ('"version": 1', '"version": 9', 'version: got 9; expected'),
    ('"kind": "vit"', '"kind": "vat"', 'towers.*kind'),
    ('{', '', 'cannot be read'),
    ('"mlp": 64', '"mlp": 65', 'expected'),
  ],
)
def test_the_contract_is_kept(tmp_path, model, tokenizer_model, old, new, message):
  folder = put(model(tokenizer=tokenizer_model), tmp_path / 'there', 'safetensors')
  edit(folder / write.CONTRACT, old, new)
  with pytest.raises(InputError, match=message):
    read.read(folder)


@pytest.mark.parametrize('name', ['../../x', '/x', 'a/b', '..', '', 'x\\y', 'x\0'])
def test_a_name_from_a_file_is_never_a_path(tmp_path, model, name):
  folder = put(model(), tmp_path / 'there', 'safetensors')
  path = folder / write.CONTRACT
  contract = json.loads(path.read_text())
  path.write_text(json.dumps(contract | {'name': name}))
  with pytest.raises(InputError, match='name: got .* no path'):
    read.read(folder)
  path.write_text(json.dumps(contract | {'files': {name: 3}}))
  with pytest.raises(InputError, match='files: got .* no path'):
    read.read(folder)
  with pytest.raises(InputError, match='name of the model: got'):
    model().replace(name=name)


@pytest.mark.parametrize('format', [*LAYOUTS, 'safetensors', 'hf'])
def test_a_flipped_bit_and_a_number_that_is_none_are_noticed(tmp_path, model, format):
  folder = put(model(), tmp_path / 'there', format)
  file = max(folder.iterdir(), key=lambda file: file.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with pytest.raises(InputError, match='got other bytes than were written'):
    read.read(folder)
  weights = model()
  weights.params['image']['cls'][0, 0, 3] = np.nan
  name = {'official_jax': 'cls', 'hf': 'cls_token', 'official_torch': 'cls_token'}.get(format)
  with pytest.raises(InputError, match=f'{name or "image/cls"}: got 1 of .* not finite'):
    read.read(put(weights, tmp_path / 'other', format))


def test_models_of_released_sizes_have_the_names_of_the_official_program(model):
  def vit(scale, grid):
    width = npz._WIDTHS[scale]
    return schema.ViT(
      kind='vit',
      width=width,
      depth=npz._DEPTHS[scale],
      heads=npz.pytorch.HEADS[width],
      mlp=8,
      grid=grid,
    )

  assert npz.variant(vit('b', 16)) == 'tips_oss_b14_highres_distilled'
  assert npz.variant(vit('so400m', 32)) == 'tips_v2_so14'
  assert npz.variant(vit('s', 32)) is None and npz.variant(model().image) is None
  for name in npz._VARIANTS.values():
    assert npz.released(f'{name}_vision.npz')


def test_a_table_of_its_images_size_gives_the_same_features_there(model):
  import jax

  from tips_jax.models import towers

  weights = model(grid=4).replace(size=8 * 14)
  large = at_own_size(weights)
  assert large.image.grid == 8 and large.params['image']['posembed'].shape == (1, 8, 8, 32)
  assert weights.params['image']['posembed'].shape == (1, 4, 4, 32)
  images = jax.random.uniform(jax.random.key(0), (2, 1, 112, 112, 3))
  compute = schema.Compute(dtype='float32', attention='plain')
  one, other = (
    towers.apply(w.params['image'], w.image, compute, {'images': images}) for w in (weights, large)
  )
  for name in one:
    np.testing.assert_allclose(one[name], other[name], atol=1e-5)
  assert at_own_size(large) is large and at_own_size(model(grid=4).replace(size=28)).image.grid == 4


def test_another_tokenizer_beside_the_weights(tmp_path, model, tokenizer_model):
  from tips_jax.data import tokenizer

  folder = put(model(tokenizer=tokenizer_model), tmp_path / 'there', 'official_torch')
  tokenizer.train(
    ['other words altogether', 'and more of these'], folder / 'tokenizer.model', vocab_size=290
  )
  with pytest.raises(InputError, match='got another tokenizer than the weights were trained with'):
    read.read(folder)


def test_nothing_is_left_of_a_failed_write_and_nothing_overwritten(tmp_path):
  with pytest.raises(ZeroDivisionError):
    with write.new_folder(tmp_path / 'new') as folder:
      (folder / 'file').write_text('x')
      raise ZeroDivisionError
  assert list(tmp_path.iterdir()) == []
  with write.new_folder(tmp_path / 'new') as folder:
    (folder / 'file').write_text('x')
  with pytest.raises(InputError, match='nothing is overwritten'):
    with write.new_folder(tmp_path / 'new'):
      pass
  assert (tmp_path / 'new' / 'file').read_text() == 'x'


def test_positions_of_another_grid():
  rng = np.random.default_rng(0)
  table = rng.normal(size=(1, 16, 16, 8)).astype(np.float32)
  larger = fit_positions(table, 32, 'x')
  np.testing.assert_allclose(
    fit_positions(larger, 16, 'x'), table, atol=1e-5
  )  # and nothing is lost on the way back
  with pytest.raises(
    InputError, match='got a table of 32 x 32 positions that no 16 x 16 one gives'
  ):
    fit_positions(rng.normal(size=(1, 32, 32, 8)).astype(np.float32), 16, 'x')
