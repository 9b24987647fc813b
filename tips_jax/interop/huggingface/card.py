"""The model card of a Hugging Face repository: the model, how to load it, how it was trained."""

import json

from tips_jax.interop.weights import Weights

_LOAD = """```python
import torch
from transformers import AutoModel, {auto}

model = AutoModel.from_pretrained('{name}')
{processor}
with torch.no_grad():
  {call}
tokens = {outputs}.last_hidden_state    # {cls}, then the patches
```
"""
_JOINT = dict(
  auto='AutoProcessor',
  processor="processor = AutoProcessor.from_pretrained('{name}')\ninputs = processor("
  "text=['a photo of a cat', 'a photo of a dog'], images=image, return_tensors='pt')",
  call='out = model(**inputs)                        # out.logits_per_image, out.text_embeds',
  outputs='out.vision_model_output',
)
_IMAGE = dict(
  auto='AutoImageProcessor',
  processor="processor = AutoImageProcessor.from_pretrained('{name}')\n"
  "inputs = processor(images=image, return_tensors='pt')",
  call='out = model(**inputs)',
  outputs='out',
)
_OURS = """```python
import tips_jax

encoder = tips_jax.load('{name}')
cls, patch = encoder.encode_image(images)
{text}```
"""


def card(weights: Weights) -> str:
  """README.md of the repository. What is not known is left out; no license is claimed."""
  # The license is the owner's decision: an export must not make it.
  sections = [_head(weights), _use(weights), _evaluation(weights), _training(weights)]
  lines = []
  for section in sections:
    lines += section
  lines += [f'- {note}' for note in weights.about.get('notes', [])]
  return '\n'.join(lines).rstrip() + '\n'


def _head(weights: Weights) -> list[str]:
  image = weights.image
  text = weights.text
  # By the task the hub lists a model, and chooses the widget on its page.
  task = 'image-feature-extraction'
  if text:
    task = 'zero-shot-image-classification'
  out = [
    '---',
    'library_name: transformers',
    f'pipeline_tag: {task}',
    'tags:',
    '- tips',
    '- tipsv2',
    '- vision',
    '- tips_jax',
    '---',
    '',
    f'# {weights.name}',
    '',
    f'Image tower of TIPS: ViT, width {image.width}, {image.depth} layers, patches of '
    f'{image.patch} pixels, position table {image.grid} x {image.grid}, CLS tokens: '
    f'{", ".join(image.cls)}.',
  ]
  preprocessing = (
    f'Images are RGB in [0, 1], resized to {weights.size} x {weights.size} (bilinear, antialiased) '
    'and not normalized further.'
  )
  if text:
    out.append(
      f'Text tower: width {text.width}, {text.depth} layers, {text.vocab} pieces, '
      f'{weights.text_length} tokens.'
    )
    preprocessing += (
      ' Texts are lower-cased, A-Z alone; load the tokenizer with AutoTokenizer or '
      'AutoProcessor, which take `tokenizer.json` as it is.'
    )
  return [*out, '', preprocessing, '']


def _use(weights: Weights) -> list[str]:
  name = weights.name
  snippets = _JOINT if weights.text else _IMAGE
  parts = {key: snippet.format(name=name) for key, snippet in snippets.items()}
  encode_text = ''
  if weights.text:
    encode_text = "texts = encoder.encode_text(['a photo of a cat'])\n"
  return [
    '## Use',
    '',
    'With transformers 5.14 or later, without remote code:',
    '',
    _LOAD.format(name=name, cls=', '.join(weights.image.cls), **parts),
    'With tips_jax:',
    '',
    _OURS.format(name=name, text=encode_text),
  ]


def _evaluation(weights: Weights) -> list[str]:
  metrics = weights.about.get('evaluation')
  if not metrics:
    return []
  out = ['## Evaluation', '', '| metric | value |', '|---|---|']
  for metric, value in sorted(metrics.items()):
    number = f'{value:.4g}' if isinstance(value, float) else value
    out.append(f'| {metric} | {number} |')
  return [*out, '']


def _training(weights: Weights) -> list[str]:
  config = weights.about.get('config')
  fingerprint = weights.about.get('data_fingerprint')
  if not config and not fingerprint:
    return []
  out = ['## Training', '']
  if fingerprint:
    out += [f'Fingerprint of the data: `{fingerprint}`.', '']
  if config:
    out += [
      '<details><summary>Config of the run</summary>',
      '',
      '```json',
      json.dumps(config, indent=1),
      '```',
      '',
      '</details>',
      '',
    ]
  return out
