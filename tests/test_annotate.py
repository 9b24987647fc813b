import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from benchmarks import caption as bench
from tests.data.pictures import picture
from tests.test_caption import blip
from tips_jax import annotate
from tips_jax.data import store
from tips_jax.data.ingest import annotating, annotators
from tips_jax.data.ingest.annotators import Ask, Box
from tips_jax.data.ingest.captioners import Answer, Caption
from tips_jax.data.ingest.reader import Sample
from tips_jax.data.pixels import boxes as boxes_lib
from tips_jax.data.pixels import images

pytestmark = pytest.mark.once

CLASSES = ('cat', 'dog', 'car')
SIZE = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def run(*flags):
  return annotate.main(['annotate', *map(str, flags)])


# --- models of random weights -------------------------------------------------------------------


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Folders of a DETR, an OWL-ViT, a CLIP, a SAM and a BLIP, of some thousand parameters each."""
  pytest.importorskip('transformers')
  folder = tmp_path_factory.mktemp('models')
  for make in (detr, owl, clip, sam, blip):
    (folder / make.__name__).mkdir()
    make(folder / make.__name__)
  return folder


def detr(folder):
  import transformers

  backbone = transformers.ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic'
  )
  backbone.set_output_features_output_indices(out_features=['stage2'], out_indices=None)
  config = transformers.DetrConfig(
    use_timm_backbone=False,
    use_pretrained_backbone=False,
    backbone=None,
    backbone_config=backbone,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    num_queries=12,
    id2label=dict(enumerate(CLASSES)),
    label2id={name: number for number, name in enumerate(CLASSES)},
  )
  transformers.set_seed(0)
  model = transformers.DetrForObjectDetection(config)
  # Boxes and classes that differ.
  for name, weight in model.model.decoder.named_parameters():
    if name.endswith('proj.weight'):
      weight.data.normal_(std=0.5)
  model.model.query_position_embeddings.weight.data.normal_(std=2.0)
  model.class_labels_classifier.weight.data.normal_(std=0.5)
  for layer in model.bbox_predictor.layers:
    layer.weight.data.normal_(std=0.4)
  model.save_pretrained(folder)
  size = {'shortest_edge': 32, 'longest_edge': 64}
  transformers.DetrImageProcessor(size=size).save_pretrained(folder)


def letters(folder):
  """A tokenizer of letters."""
  import transformers

  words = [chr(code) for code in range(ord('a'), ord('z') + 1)]
  words = [*words, *(f'{word}</w>' for word in words), '.</w>']
  words += ['!</w>', '<|startoftext|>', '<|endoftext|>']
  vocabulary = {word: number for number, word in enumerate(words)}
  tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
  last = len(words) - 1
  config = dict(SIZE, vocab_size=len(words), max_position_embeddings=32)
  return tokenizer, config | dict(bos_token_id=last - 1, eos_token_id=last, pad_token_id=last)


def owl(folder):
  import transformers

  tokenizer, text = letters(folder)
  config = transformers.OwlViTConfig(
    text_config=text, vision_config=dict(SIZE, image_size=32, patch_size=8), projection_dim=16
  )
  transformers.set_seed(0)
  transformers.OwlViTForObjectDetection(config).save_pretrained(folder)
  images = transformers.OwlViTImageProcessor(size={'height': 32, 'width': 32}, do_center_crop=False)
  transformers.OwlViTProcessor(images, tokenizer).save_pretrained(folder)


def clip(folder):
  import transformers

  tokenizer, text = letters(folder)
  config = transformers.CLIPConfig(
    text_config=text, vision_config=dict(SIZE, image_size=32, patch_size=16), projection_dim=16
  )
  transformers.set_seed(0)
  transformers.CLIPModel(config).save_pretrained(folder)
  images = transformers.CLIPImageProcessor(size={'shortest_edge': 32}, crop_size=32)
  transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)


def sam(folder):
  import transformers

  size = dict(num_hidden_layers=1, num_attention_heads=2)
  config = transformers.SamConfig(
    vision_config=dict(
      size,
      hidden_size=16,
      output_channels=8,
      image_size=64,
      patch_size=8,
      window_size=2,
      global_attn_indexes=[0],
      mlp_dim=16,
      num_pos_feats=4,
    ),
    prompt_encoder_config=dict(hidden_size=8, image_size=64, patch_size=8, mask_input_channels=4),
    mask_decoder_config=dict(
      size, hidden_size=8, mlp_dim=8, iou_head_hidden_dim=8, iou_head_depth=2
    ),
  )
  transformers.set_seed(0)
  transformers.SamModel(config).save_pretrained(folder)
  square = {'height': 64, 'width': 64}
  images = transformers.SamImageProcessor(size={'longest_edge': 64}, pad_size=square)
  transformers.SamProcessor(images).save_pretrained(folder)


# --- a store ------------------------------------------------------------------------------------


def write_store(path, count=8, annotations=(), **values):
  """Noise of two sizes with alt texts, the last image in a split of its own."""
  folder = store.temporary_folder(path)
  writer = store.Writer(folder, store.features(annotations))
  for i in range(count):
    size = (64, 48) if i % 2 else (40, 56)
    example = {'image': picture(i, size=size), 'id': f'{i}', 'alt_text': f'alt {i}'}
    writer.add('test' if i == count - 1 else 'train', {**example, 'captions': [f'c{i}'], **values})
  writer.close()
  return store.finish(folder, path, {'captions': [{'captioner': 'somebody'}]})


def records(path, split='train'):
  return list(store.open_store(path).source(split))


def counts(path):
  return json.loads((path / 'report.json').read_text())['splits']['train']


def texts(values):
  return [value.decode() for value in values]


def test_all_annotators(models, tmp_path):
  source = write_store(tmp_path / 'in')
  flags = [f'--detector={models}/detr', f'--detector={models}/owl', '--classes=cat,a red car']
  flags += [f'--segmenter={models}/sam', f'--captioner=hf:{models}/blip', '--prompt=a picture of']
  flags += [f'--tagger={models}/clip', '--tags=cat,dog,tree', '--tag_confidence=0.4']
  flags += ['--least_side=2', '--confidence=0.35', '--most_boxes=6', '--stability=0.01']
  assert run(f'--store={source}', f'--output={tmp_path / "out"}', *flags) == 0
  written = records(tmp_path / 'out')
  for before, after in zip(records(source), written, strict=True):
    assert before['image'] == after['image'] and before['alt_text'] == after['alt_text']
    assert list(before['captions']) == list(after['captions'])
    boxes = after['boxes']
    assert len(boxes) <= 6 and ((0 <= boxes) & (boxes <= 1)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert list(after['region_tags_boxes']) == list(range(len(boxes)))
    assert set(texts(after['region_tags'])) <= {*CLASSES, 'a red car'}
    assert set(after['region_captions_boxes']) <= set(range(len(boxes)))
    assert set(texts(after['tags'])) <= {'cat', 'dog', 'tree'}
  found = counts(tmp_path / 'out')
  for kind in ('boxes', 'region_captions', 'region_tags', 'tags', 'box_unsure', 'box_overlap'):
    assert found[kind], kind
  for kind in ('boxes', 'region_captions', 'tags'):
    assert found[kind] == sum(len(record[kind]) for record in written)
  [made] = store.open_store(tmp_path / 'out').info['annotations']
  assert made['detectors'] == [f'{models}/detr', f'{models}/owl'] and made['confidence'] == 0.35
  assert made['captions']['prompts'] == ['a picture of'] and made['segmenter'] == f'{models}/sam'
  assert made['of'] == store.open_store(source).fingerprint
  assert store.open_store(tmp_path / 'out').info['captions'] == [{'captioner': 'somebody'}]


def test_boxes_are_those_of_the_model(models, tmp_path):
  """What DETR itself says of an image, without a pipeline."""
  import torch
  import transformers

  source = write_store(tmp_path / 'in', 3)
  flags = [f'--detector={models}/detr', '--least_side=1', '--overlap=1', '--confidence=0.36']
  assert run(f'--store={source}', f'--output={tmp_path / "out"}', *flags, '--batch_size=1') == 0
  model = transformers.DetrForObjectDetection.from_pretrained(models / 'detr').eval()
  processor = transformers.DetrImageProcessor.from_pretrained(models / 'detr')
  for record in records(tmp_path / 'out'):
    pixels = images.decode(record['image'])
    height, width = pixels.shape[:2]
    with torch.no_grad():
      out = model(**processor(images=Image.fromarray(pixels), return_tensors='pt'))
    scores = out.logits[0].softmax(-1)[:, :-1].max(-1)
    sure = scores.values >= 0.36
    x, y, w, h = out.pred_boxes[0][sure].numpy().T
    expected = np.stack([y - h / 2, x - w / 2, y + h / 2, x + w / 2], 1).clip(0, 1)
    expected = expected[np.argsort(-scores.values[sure].numpy(), kind='stable')]
    assert len(expected) == len(record['boxes']) > 0
    # Pipelines round down to pixels.
    off = np.abs(expected - record['boxes']) * [height, width, height, width]
    assert off.max() <= 1.01
    labels = [CLASSES[label] for label in scores.indices[sure].tolist()]
    assert sorted(labels) == sorted(texts(record['region_tags']))


def test_parts_kills_and_a_merge_write_the_same(models, tmp_path, monkeypatch):
  source = write_store(tmp_path / 'in', 10)
  flags = [f'--store={source}', f'--detector={models}/detr', '--least_side=2', '--batch_size=2']
  flags += [f'--captioner=hf:{models}/blip', '--task_mib=0.01']
  assert run(*flags, f'--output={tmp_path / "a"}') == 0
  asked = []
  answers = annotators.Annotators.answers

  def stopping(self, samples):
    asked.extend(sample.key for sample in samples)
    if len(asked) in (4, 10):
      raise KeyboardInterrupt
    return answers(self, samples)

  monkeypatch.setattr(annotators.Annotators, 'answers', stopping)
  for part, code in (('1/2', 130), ('1/2', 0), ('0/2', 130), ('0/2', 0)):
    assert run(*flags, f'--output={tmp_path / "b"}', f'--part={part}') == code
  assert run(*flags, f'--output={tmp_path / "b"}', '--merge') == 0
  assert len(asked) <= 10 + 2 * 2  # what was stopped is asked again, and nothing else
  one, other = (store.open_store(tmp_path / name) for name in 'ab')
  assert one.fingerprint == other.fingerprint
  assert (tmp_path / 'a/report.json').read_text() == (tmp_path / 'b/report.json').read_text()


def test_beam_annotates_too(models, tmp_path):
  pytest.importorskip('apache_beam')
  source = write_store(tmp_path / 'in')
  flags = [f'--store={source}', f'--detector={models}/detr', '--least_side=2', '--task_mib=0.01']
  assert run(*flags, f'--output={tmp_path / "a"}') == 0
  assert run(*flags, f'--output={tmp_path / "b"}', '--runner=DirectRunner') == 0
  one, other = (store.open_store(tmp_path / name) for name in 'ab')
  assert one.fingerprint == other.fingerprint


REGIONS = dict(
  boxes=np.array([[0, 0, 0.5, 0.5], [0.25, 0, 1, 1]], np.float32),
  region_captions=['left', 'right'],
  region_tags=['x', 'y', 'z'],
  region_tags_boxes=[1, 0, 1],
  tags=['old'],
)


def test_what_a_store_has_stays_and_gets_captions(models, tmp_path):
  source = write_store(tmp_path / 'in', 3, list(REGIONS), **REGIONS)
  assert run(f'--store={source}', f'--output={tmp_path}/no', f'--detector={models}/detr') == 2
  with bench.Server(failing=0.2, stall_s=0.1) as server:
    flags = [f'--store={source}', f'--captioner=openai:{server.url}#m', '--prompt=what is it?']
    assert run(*flags, f'--output={tmp_path / "more"}', '--requests=2', '--timeout_s=1') == 0
    assert run(*flags, f'--output={tmp_path / "new"}', '--replace') == 0
  for number, record in enumerate(records(tmp_path / 'more')):
    pixels = images.decode(picture(number, size=(64, 48) if number % 2 else (40, 56)))
    said = [
      bench.caption_of(_png(pixels[: len(pixels) // 2, : pixels.shape[1] // 2])),
      bench.caption_of(_png(pixels[len(pixels) // 4 :])),
    ]
    captions = texts(record['region_captions'])
    assert captions == ['left', said[0], 'right', said[1]]
    assert list(record['region_captions_boxes']) == [0, 0, 1, 1]
    by_box = dict.fromkeys(range(2), ())
    for owner, tag in zip(list(record['region_tags_boxes']), texts(record['region_tags'])):
      by_box[owner] += (tag,)
    assert by_box == {0: ('y',), 1: ('x', 'z')}
    assert texts(record['tags']) == ['old']
    np.testing.assert_array_equal(record['boxes'], REGIONS['boxes'])
    new = records(tmp_path / 'new')[number]
    assert texts(new['region_captions']) == said
    assert list(new['region_captions_boxes']) == [0, 1]


def _png(pixels):
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'png', compress_level=1)
  return out.getvalue()


def test_unstable_boxes_go_with_their_texts(models, tmp_path, monkeypatch):
  source = write_store(tmp_path / 'in', 2, list(REGIONS), **REGIONS)
  monkeypatch.setattr(
    annotators.Segmenter, 'stability', lambda self, picture, boxes, shift: boxes[:, 0] * 4
  )
  flags = [f'--store={source}', f'--output={tmp_path / "out"}', f'--segmenter={models}/sam']
  assert run(*flags, '--stability=1') == 0
  [record] = records(tmp_path / 'out')
  np.testing.assert_array_equal(record['boxes'], REGIONS['boxes'][1:])
  assert texts(record['region_captions']) == ['right'] and texts(record['region_tags']) == [
    'x',
    'z',
  ]
  assert list(record['region_captions_boxes']) == [0]
  assert list(record['region_tags_boxes']) == [0, 0]
  assert counts(tmp_path / 'out')['box_unstable'] == 1


def test_the_stability_of_a_mask(models):
  """By SAM itself, box by box, on masks as large as the image."""
  import torch
  import transformers

  model = transformers.SamModel.from_pretrained(models / 'sam').eval()
  processor = transformers.SamProcessor.from_pretrained(models / 'sam')
  noise = Image.fromarray(images.decode(picture(1, size=(64, 48))))
  boxes = np.array([[0.1, 0.2, 0.7, 0.9], [0.3, 0.1, 0.9, 0.4]], np.float32)
  found = annotators.Segmenter(str(models / 'sam')).stability(noise, boxes, 0.3)

  def mask(box):
    corners = [box[1] * 64, box[0] * 48, box[3] * 64, box[2] * 48]
    inputs = processor(images=noise, input_boxes=[[list(map(float, corners))]], return_tensors='pt')
    with torch.no_grad():
      out = model(
        pixel_values=inputs['pixel_values'],
        input_boxes=inputs['input_boxes'],
        multimask_output=False,
      )
    side = out.pred_masks.shape[-1]
    return out.pred_masks[0, 0, 0, : side * 48 // 64].numpy() > 0

  for box, stability in zip(boxes, found):
    height, width = box[2] - box[0], box[3] - box[1]
    shares = []
    for part in (-0.3, -0.15, 0.15, 0.3):
      one, other = mask(box), mask(box + np.array([height, width] * 2) * part)
      shares.append((one & other).sum() / max((one | other).sum(), 1))
    assert abs(np.mean(shares) - stability) < 1e-5


# --- boxes --------------------------------------------------------------------------------------


def test_suppression_keeps_no_two_boxes_that_overlap_and_drops_none_that_does_not():
  rng = np.random.default_rng(0)
  low = rng.random((60, 2)) * 0.6
  boxes = np.concatenate([low, low + 0.05 + rng.random((60, 2)) * 0.35], 1)

  def overlap(a, b):
    """On a grid of 2,000 x 2,000 points."""
    grid = (np.arange(2000) + 0.5) / 2000
    inside = [(grid > a[0]) & (grid < a[2]), (grid > b[0]) & (grid < b[2])]
    across = [(grid > a[1]) & (grid < a[3]), (grid > b[1]) & (grid < b[3])]
    both = (inside[0] & inside[1]).sum() * (across[0] & across[1]).sum()
    areas = [y.sum() * x.sum() for y, x in zip(inside, across)]
    return both / (sum(areas) - both)

  found = boxes_lib.suppress(boxes, 0.3)
  kept = []
  for number in range(len(boxes)):
    over = [overlap(boxes[number], boxes[other]) for other in kept]
    if max(over, default=0) <= 0.3:
      kept.append(number)
  assert found == kept and 10 < len(found) < 60
  assert boxes_lib.suppress(boxes[:0], 0.3) == []


def test_the_filters_of_boxes():
  found = [
    Box([0.0, 0.0, 0.5, 0.5], 'cat', 0.5),
    Box([0.0, 0.0, 0.5, 0.52], 'dog', 0.9),  # covers the first
    Box([0.5, 0.5, 1.0, 1.0], 'cat', 0.3),  # just sure enough
    Box([0.5, 0.0, 1.0, 0.5], 'cat', 0.2999),
    Box([0.0, 0.8, 0.16, 1.0], 'cat', 0.8),  # 16 pixels
    Box([0.2, 0.8, 0.35, 1.0], 'cat', 0.8),  # 15
    Box([0.6, 0.1, 0.6, 0.4], 'cat', 0.8),  # empty
  ]
  boxes, dropped = annotators.usable(found, (100, 100), Ask())
  assert [(box.label, box.confidence) for box in boxes] == [
    ('dog', 0.9),
    ('cat', 0.8),
    ('cat', 0.3),
  ]
  assert dropped == {'box_unsure': 1, 'box_small': 2, 'box_overlap': 1, 'box_many': 0}
  boxes, dropped = annotators.usable(found, (100, 100), Ask(most=1))
  assert [box.label for box in boxes] == ['dog'] and dropped['box_many'] == 2
  assert annotators.usable([], (10, 10), Ask())[0] == []
  again, _ = annotators.usable(found[::-1], (100, 100), Ask())
  assert again == annotators.usable(found, (100, 100), Ask())[0]


@pytest.mark.parametrize(
  'box, expected',
  [
    ([0, 0, 1, 1], (0, 0, 30, 20)),
    ([0.1, 0.1, 0.5, 0.5], (3, 2, 15, 10)),
    ([0.12, 0.12, 0.5, 0.52], (3, 2, 16, 10)),
    ([1, 1, 1, 1], (29, 19, 30, 20)),
  ],
)
def test_the_pixels_of_a_box(box, expected):
  assert boxes_lib.pixels(np.array(box, np.float32), 20, 30) == expected


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  'flags, message',
  [
    ([], '--detector: missing, and so are'),
    (['--detector={}/clip'], 'cannot load'),
    (['--detector=/nowhere'], "--detector: cannot load '/nowhere'"),
    (['--detector={}/owl'], 'finds what it is told; expected --classes'),
    (['--detector={}/detr', '--classes=cat'], 'find classes of their own'),
    (['--detector={}/detr', '--classes=names.txt'], "got 'names.txt', which is no file"),
    (['--segmenter={}/sam'], 'which has no boxes'),
    (['--captioner=hf:{}/blip'], 'which has no boxes'),
    (['--captioner=table:x.csv'], 'expected hf:NAME_OR_FOLDER or openai:URL#MODEL'),
    (['--tagger={}/clip'], 'it lacks 2 weights, such as classifier.bias'),
    (['--tagger={}/clip', '--splits=tset'], "did you mean 'test'"),
    (['--detector={}/detr', '--segmenter={}/clip'], '--segmenter: cannot load'),
  ],
)
def test_bad_command_lines_are_one_line(models, tmp_path, capsys, flags, message):
  source = write_store(tmp_path / 'in', 2)
  flags = [flag.format(models) for flag in flags]
  capsys.readouterr()
  assert run(f'--store={source}', f'--output={tmp_path / "out"}', *flags) == 2
  assert message in capsys.readouterr().err.splitlines()[-1]
  assert os.listdir(tmp_path) == ['in']


def test_names_from_a_file(tmp_path):
  (tmp_path / 'names').write_text('cat\n\n a red car \ncat\n')
  assert annotating.read_names([str(tmp_path / 'names')], 'tags') == ('cat', 'a red car')
  assert annotating.read_names(['cat', 'dog'], 'tags') == ('cat', 'dog')


def test_an_image_that_cannot_be_read_is_asked_about_again(models):
  detector = annotators.Annotators(Ask(detectors=(f'{models}/detr',)), None, batch=2)
  samples = [Sample(str(i), image, '', [], {}) for i, image in enumerate([b'none', picture(0)])]
  broken, read = detector.answers(samples)
  assert 'no known image format' in broken.problem and not read.problem
  assert annotating.Regions([], {}).stored(['boxes'])['boxes'].shape == (0, 4)


def test_answers_come_back_from_json():
  said = annotators.Annotation(
    [1], [[0.1, 0.2, 0.3, 0.4]], ['cat'], [Answer([Caption('a', False)])], ['t'], {'box_small': 2}
  )
  reader = object.__new__(annotating.AnnotatingReader)
  assert reader._answer(json.loads(json.dumps(said))) == said
