"""The model card of a Hugging Face repository: what the model is, how to load it, where it comes
from.
"""

import json

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


def card(weights):
  """README.md of the repository. What is not known is left out; no license is claimed."""
  image, text, about, name = weights.image, weights.text, weights.about, weights.name
  out = [
    '---',
    'library_name: transformers',
    f'pipeline_tag: {"zero-shot-image-classification" if text else "image-feature-extraction"}',
    'tags:',
    '- tips',
    '- tipsv2',
    '- vision',
    '- tips_jax',
    '---',
    '',
    f'# {name}',
    '',
  ]
  cls = ', '.join(image.cls)
  out += [
    f'Image tower of TIPS: ViT, width {image.width}, {image.depth} layers, patches of {image.patch} pixels, '
    f'position table {image.grid} x {image.grid}, CLS tokens: {cls}.'
  ]
  if text:
    out += [
      f'Text tower: width {text.width}, {text.depth} layers, {text.vocab} pieces, {weights.text_length} tokens.'
    ]
  out += [
    '',
    f'Images are RGB in [0, 1], resized to {weights.size} x {weights.size} (bilinear, antialiased) and not '
    'normalized further.'
    + (
      ' Texts are lower-cased, A-Z alone; load the tokenizer with AutoTokenizer or '
      'AutoProcessor, which take `tokenizer.json` as it is.'
      if text
      else ''
    ),
    '',
  ]
  parts = {k: v.format(name=name) for k, v in (_JOINT if text else _IMAGE).items()}
  out += [
    '## Use',
    '',
    'With transformers 5.14 or later, without remote code:',
    '',
    _LOAD.format(name=name, cls=cls, **parts),
    'With tips_jax:',
    '',
    _OURS.format(
      name=name, text="texts = encoder.encode_text(['a photo of a cat'])\n" if text else ''
    ),
  ]
  if about.get('evaluation'):
    out += ['## Evaluation', '', '| metric | value |', '|---|---|']
    out += [
      f'| {metric} | {_number(value)} |' for metric, value in sorted(about['evaluation'].items())
    ] + ['']
  if about.get('config') or about.get('data_fingerprint'):
    out += ['## Training', '']
  if about.get('data_fingerprint'):
    out += [f'Fingerprint of the data: `{about["data_fingerprint"]}`.', '']
  if about.get('config'):
    out += [
      '<details><summary>Config of the run</summary>',
      '',
      '```json',
      json.dumps(about['config'], indent=1),
      '```',
      '',
      '</details>',
      '',
    ]
  out += [f'- {note}' for note in about.get('notes', [])]
  return '\n'.join(out).rstrip() + '\n'


def _number(value):
  return f'{value:.4g}' if isinstance(value, float) else str(value)
