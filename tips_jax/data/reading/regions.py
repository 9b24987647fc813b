"""What a record says of parts of its image: boxes with texts of their own, and tags."""

from collections.abc import Mapping

import numpy as np

from tips_jax.core.errors import InputError
from tips_jax.core.schema import Data
from tips_jax.data.pixels import boxes as boxes_lib
from tips_jax.data.pixels.views import Box
from tips_jax.data.reading.batch import BOXES, Batch, valid
from tips_jax.data.reading.records import Example, first, values
from tips_jax.data.tokenizer import Tokenizer


def fill(
  batch: Batch,
  row: int,
  example: Example,
  places: Mapping[str, tuple[Box, int, int]],
  rng: np.random.Generator,
  config: Data,
  tokenizer: Tokenizer | None,
) -> None:
  """Fills the tags, the boxes and their texts of one row of a batch.

  places: where the first crop of each view lies, and the size of its image. Where there are more
  than the batch has room for, some are drawn; regions that leave the crop are not among them.
  """
  for name, tags in config.tags.items():
    texts = [text for text in values(example, tags.field) if text.strip()]
    _write(batch, name, row, _some(texts, tags.count, rng), tokenizer)
  regions = config.regions
  if not regions.texts:
    return
  boxes = np.array(example[BOXES].float_list.value if BOXES in example else (), np.float32)
  boxes, kept = boxes_lib.to_crop(boxes.reshape(-1, 4), *places[regions.view])
  inside = np.flatnonzero((kept > 0) & (kept >= regions.least)).tolist()
  chosen = _some(inside, regions.count, rng)
  batch[BOXES][row, : len(chosen)] = boxes[chosen]
  batch[valid(BOXES)][row, : len(chosen)] = True
  for name, text in regions.texts.items():
    texts = _by_box(example, text.field, len(boxes))
    for place, number in enumerate(chosen):
      some = _some(texts.get(number, []), text.count, rng)
      _write(batch, name, (row, place), some, tokenizer)


def _by_box(example, field, boxes):
  """{number of one of so many boxes: its texts}."""
  texts = values(example, field)
  if f'{field}_boxes' in example:
    owners = example[f'{field}_boxes'].int64_list.value
    what = 'numbers of their boxes'
  elif texts:
    owners = range(boxes)  # one for each box
    what = 'boxes'
  else:
    return {}
  problem = ''
  if len(owners) != len(texts):
    problem = f'got {len(texts)} {field} and {len(owners)} {what}; expected as many'
  elif owners and not 0 <= min(owners) <= max(owners) < boxes:
    problem = f'got {field} of boxes {min(owners)} to {max(owners)}; expected numbers below {boxes}'
  if problem:
    name = first(example, 'id').decode('utf-8', 'replace')
    raise InputError(f'record {name!r}: {problem}')
  result = {}
  for owner, text in zip(owners, texts):
    if text.strip():
      result.setdefault(owner, []).append(text)
  return result


def _some(items, count, rng):
  """At most `count` of the items, drawn without replacement, in their order."""
  if len(items) <= count:
    return items
  return [items[i] for i in sorted(rng.permutation(len(items))[:count].tolist())]


def _write(batch, name, place, texts, tokenizer):
  """Tokens of texts, from the first slot on."""
  for slot, text in enumerate(texts):
    ids = tokenizer.encode(text, batch[name].shape[-1])
    batch[name][place][slot] = ids
    batch[valid(name)][place][slot] = ids.any()
