"""The check of released weights: numbers that transformers computes from the same weights pass, and
all others fail.
"""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.interop.official.vocabulary import official_vocabulary
from tips_jax import check_released
from tips_jax.interop.official import released

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers', minversion='5.14')
pytest.importorskip('transformers.models.tipsv2_dpt')

pytestmark = pytest.mark.once

WIDTH = 16
VISION = dict(
  hidden_size=WIDTH,
  num_hidden_layers=4,
  num_attention_heads=2,
  mlp_ratio=2,
  image_size=56,
  hidden_act='gelu_pytorch_tanh',
)
TEXT = dict(
  hidden_size=WIDTH,
  num_hidden_layers=2,
  num_attention_heads=2,
  intermediate_size=32,
  layer_norm_eps=1e-6,
)


def randomized(model):
  """The model with random numbers in all of its parameters but the temperature."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name != 'temperature':
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
  return model.eval()


@pytest.fixture(scope='module', name='place')
def _place(tmp_path_factory):
  """A folder with tiny models of transformers, an image, and the facts that transformers gives."""
  place = tmp_path_factory.mktemp('released')
  pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
  Image.fromarray(pixels).save(place / 'image.png')
  x = torch.from_numpy(pixels.transpose(2, 0, 1)[None] / np.float32(255))
  config = transformers.Tipsv2Config(
    vision_config=VISION, text_config=TEXT, temperature_init_value=0.05
  )
  joint = randomized(transformers.Tipsv2Model(config))
  joint.save_pretrained(place / 'joint')
  (place / 'joint' / 'tokenizer.model').write_bytes(official_vocabulary())
  backbone = VISION | dict(
    model_type='tipsv2_vision_model',
    out_indices=[1, 2, 3, 4],
    apply_layernorm=True,
    reshape_hidden_states=False,
  )
  config = transformers.Tipsv2DptConfig(
    backbone_config=backbone,
    neck_hidden_sizes=[2, 4, 8, 16],
    fusion_hidden_size=12,
    num_labels=7,
  )
  dense = randomized(transformers.Tipsv2DptForDensePrediction(config))
  dense.save_pretrained(place / 'dense')
  tokenizer = transformers.Tipsv2Tokenizer.from_pretrained(place / 'joint')
  texts = tokenizer(list(released.TEXTS), padding='max_length', max_length=64, return_tensors='pt')
  with torch.no_grad():
    out = joint(pixel_values=x, **texts)
    maps = dense(x)
  image = out.vision_model_output.last_hidden_state
  vectors = {
    'image_embeds[0, :5]': out.image_embeds[0, :5],
    'vision_pooler[0, :5]': out.vision_model_output.pooler_output[0, :5],
    'patch_tokens[0, 0, :5]': image[:, 2:][0, 0, :5],
    'text_embeds[0, :5]': out.text_embeds[0, :5],
    'text_pooler[0, :5]': out.text_model_output.pooler_output[0, :5],
    'logits_per_image[0]': out.logits_per_image[0],
  }
  decoders = {
    'depth[0, :3, :3]': maps.predicted_depth[0, :3, :3],
    'normals[0, 0, :3, :3]': maps.normals[0, 0, :3, :3],
    'seg_logits[0, 0, :3, :3]': maps.segmentation_logits[0, 0, :3, :3],
  }
  total = sum(p.numel() for p in joint.parameters()) - 1  # without the temperature
  facts = released.Release('tiny', total, numbers(vectors), numbers(decoders))
  return place, facts


def numbers(tensors):
  """Vectors that allow no more than the rounding of float32, which follows the largest number of
  an output: a small one may be what is left of large ones (on another kind of processor it differs
  by 3e-6 of the largest).
  """
  result = {}
  for name, tensor in tensors.items():
    least = 2e-5 * max(1, tensor.abs().max().item())
    result[name] = released.Vector(tuple(tensor.ravel().tolist()), least, 2e-5)
  return result


def differing(vector, place):
  """The vector with another number at a place, by 1e-3 of its largest number."""
  values = list(vector.values)
  values[place] += 1e-3 * max(1, *map(abs, values))
  return vector._replace(values=tuple(values))


@pytest.fixture(name='run')
def _run(place, monkeypatch, capsys):
  """Runs the program on a model against facts: (exit code, its lines)."""
  folder, facts = place

  def run(model, **changes):
    monkeypatch.setitem(released.RELEASES, WIDTH, dataclasses.replace(facts, **changes))
    code = check_released.main(
      ['check_released', f'--checkpoint={folder / model}', f'--image={folder / "image.png"}']
    )
    return code, capsys.readouterr().out.splitlines()

  return run


def test_the_same_facts_are_known_of_tiny_models_as_of_the_released_one(place):
  facts = place[1]
  assert facts.vectors.keys() == released.of(768).vectors.keys()
  assert facts.decoders.keys() == released.of(768).decoders.keys()
  for kind in ('vectors', 'decoders'):
    for name, vector in getattr(released.of(768), kind).items():
      assert len(vector.values) == len(getattr(facts, kind)[name].values), name


def test_weights_pass_against_what_transformers_computes_from_them(run):
  code, lines = run('joint')
  assert code == 0
  assert lines[-1] == '8 of 8 agree with tiny'
  assert not [line for line in lines if 'FAIL' in line]
  assert run('dense') == (0, [*run('dense')[1][:-1], '3 of 3 agree with tiny'])


def failing(lines):
  return [line.removeprefix('FAIL  ') for line in lines if line.startswith('FAIL')]


@pytest.mark.parametrize('name', released.of(768).vectors)
def test_a_vector_of_which_one_number_differs_fails_alone(run, place, name):
  facts = place[1]
  vector = differing(facts.vectors[name], -1)
  code, lines = run('joint', vectors=facts.vectors | {name: vector})
  assert code == 1
  assert failing(lines) == [name]
  assert lines[-1] == '7 of 8 agree with tiny'


@pytest.mark.parametrize('name', released.of(768).decoders)
def test_a_decoder_of_which_one_number_differs_fails_alone(run, place, name):
  facts = place[1]
  vector = differing(facts.decoders[name], 0)
  code, lines = run('dense', decoders=facts.decoders | {name: vector})
  assert code == 1
  assert failing(lines) == [name]


def test_random_weights_fail_against_the_released_ones(run):
  release = released.of(768)
  code, lines = run(
    'joint', parameters=release.parameters, vectors=release.vectors, decoders=release.decoders
  )
  assert code == 1
  assert failing(lines) == ['parameters', *release.vectors]
  assert lines[:3] == [
    'FAIL  parameters',
    f'      got      {run("joint")[1][1].split()[-1]}',
    '      expected 195,948,288',
  ]
  code, lines = run('dense', decoders=release.decoders)
  assert code == 1
  assert failing(lines) == list(release.decoders)


def test_another_vocabulary_fails(run, monkeypatch):
  monkeypatch.setitem(released.PIECES, '▁test', 3214)
  code, lines = run('joint')
  assert code == 1
  assert failing(lines) == ['pieces of the vocabulary']
  assert "      got      44 right, '▁test' as 3213 for 3214" in lines


def refused(capsys, *flags):
  code = check_released.main(['check_released', *flags])
  error = capsys.readouterr().err
  assert code == 2
  return error.splitlines()[-1]


def test_bad_input_is_one_line(place, capsys, monkeypatch):
  folder, facts = place
  joint = f'--checkpoint={folder / "joint"}'
  assert '--checkpoint: missing' in refused(capsys)
  assert 'width 16; expected one of 768' in refused(capsys, joint)
  monkeypatch.setitem(released.RELEASES, WIDTH, facts)
  assert '--image: missing; expected a file, 000000039769.jpg' in refused(capsys, joint)
  assert 'none.jpg' in refused(capsys, joint, f'--image={folder / "none.jpg"}')


def test_sizes_without_vectors_need_no_image(place, capsys, monkeypatch):
  folder, facts = place
  monkeypatch.setitem(
    released.RELEASES, WIDTH, released.Release('tiny', parameters=facts.parameters)
  )
  assert check_released.main(['check_released', f'--checkpoint={folder / "joint"}']) == 0
  assert capsys.readouterr().out.splitlines()[-1] == '2 of 2 agree with tiny'
