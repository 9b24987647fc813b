"""What is said of a class: prompt templates and lists of class names, in the order of their ids.

Sources. clip80: openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb; clip7: seven of them,
chosen there by
forward selection. cifar18: openai/CLIP, data/prompts.md. tcl9: khanrc/tcl, datasets/templates.py
(`custom`), which the zero-shot notebook of google-deepmind/tips has too. photo: CLIP's paper (arXiv
2103.00020, section 3.1.4).
"""

import json
import pathlib
import re

from tips_jax.core import strict
from tips_jax.core.errors import InputError
from tips_jax.data.benchmarks import class_names


def _split(text):
  return tuple(' '.join(part.split()) for part in text.split('|'))


TEMPLATES = {
  'clip80': _split("""
    a bad photo of a {}. | a photo of many {}. | a sculpture of a {}. | a photo of the hard to see {}. |
    a low resolution photo of the {}. | a rendering of a {}. | graffiti of a {}. | a bad photo of the {}. |
    a cropped photo of the {}. | a tattoo of a {}. | the embroidered {}. | a photo of a hard to see {}. |
    a bright photo of a {}. | a photo of a clean {}. | a photo of a dirty {}. | a dark photo of the {}. |
    a drawing of a {}. | a photo of my {}. | the plastic {}. | a photo of the cool {}. |
    a close-up photo of a {}. | a black and white photo of the {}. | a painting of the {}. | a painting of a {}. |
    a pixelated photo of the {}. | a sculpture of the {}. | a bright photo of the {}. | a cropped photo of a {}. |
    a plastic {}. | a photo of the dirty {}. | a jpeg corrupted photo of a {}. | a blurry photo of the {}. |
    a photo of the {}. | a good photo of the {}. | a rendering of the {}. | a {} in a video game. |
    a photo of one {}. | a doodle of a {}. | a close-up photo of the {}. | a photo of a {}. | the origami {}. |
    the {} in a video game. | a sketch of a {}. | a doodle of the {}. | a origami {}. |
    a low resolution photo of a {}. | the toy {}. | a rendition of the {}. | a photo of the clean {}. |
    a photo of a large {}. | a rendition of a {}. | a photo of a nice {}. | a photo of a weird {}. |
    a blurry photo of a {}. | a cartoon {}. | art of a {}. | a sketch of the {}. | a embroidered {}. |
    a pixelated photo of a {}. | itap of the {}. | a jpeg corrupted photo of the {}. | a good photo of a {}. |
    a plushie {}. | a photo of the nice {}. | a photo of the small {}. | a photo of the weird {}. |
    the cartoon {}. | art of the {}. | a drawing of the {}. | a photo of the large {}. |
    a black and white photo of a {}. | the plushie {}. | a dark photo of a {}. | itap of a {}. |
    graffiti of the {}. | a toy {}. | itap of my {}. | a photo of a cool {}. | a photo of a small {}. |
    a tattoo of the {}.
    """),
  'clip7': _split("""
    itap of a {}. | a bad photo of the {}. | a origami {}. | a photo of the large {}. | a {} in a video game. |
    art of the {}. | a photo of the small {}.
    """),
  'cifar18': _split("""
    a photo of a {}. | a blurry photo of a {}. | a black and white photo of a {}. | a low contrast photo of a {}. |
    a high contrast photo of a {}. | a bad photo of a {}. | a good photo of a {}. | a photo of a small {}. |
    a photo of a big {}. | a photo of the {}. | a blurry photo of the {}. | a black and white photo of the {}. |
    a low contrast photo of the {}. | a high contrast photo of the {}. | a bad photo of the {}. |
    a good photo of the {}. | a photo of the small {}. | a photo of the big {}.
    """),
  'tcl9': _split("""
    itap of a {}. | a bad photo of a {}. | a origami {}. | a photo of the large {}. | a {} in a video game. |
    art of the {}. | a photo of the small {}. | a photo of many {}. | a photo of {}s.
    """),
  'photo': ('a photo of a {}.',),
}

# What SCLIP (arXiv 2312.01597, configs/cls_voc21.txt) calls the background of VOC: names for
# `classes(background=...)`.
STUFF = _split("""
    sky | wall | tree | wood | grass | road | sea | river | mountain | sands | desk | bed | building | cloud |
    lamp | door | window | wardrobe | ceiling | shelf | curtain | stair | floor | hill | rail | fence
""")

_CLASSES = {
  'ade150': class_names.ADE20K,
  'context59': class_names.CONTEXT[1:],
  'context60': class_names.CONTEXT,
  'imagenet': class_names.IMAGENET,
  'voc20': class_names.VOC[1:],
  'voc21': class_names.VOC,
  'camvid11': _split("""
    sky | building | pole | road | pavement | tree | traffic sign | fence | car | pedestrian | bicyclist
    """),
  'cifar10': _split("""
    airplane | automobile | bird | cat | deer | dog | frog | horse | ship | truck
    """),
  'coco80': _split("""
    person | bicycle | car | motorcycle | airplane | bus | train | truck | boat | traffic light | fire hydrant |
    stop sign | parking meter | bench | bird | cat | dog | horse | sheep | cow | elephant | bear | zebra |
    giraffe | backpack | umbrella | handbag | tie | suitcase | frisbee | skis | snowboard | sports ball | kite |
    baseball bat | baseball glove | skateboard | surfboard | tennis racket | bottle | wine glass | cup | fork |
    knife | spoon | bowl | banana | apple | sandwich | orange | broccoli | carrot | hot dog | pizza | donut |
    cake | chair | couch | potted plant | bed | dining table | toilet | tv | laptop | mouse | remote | keyboard |
    cell phone | microwave | oven | toaster | sink | refrigerator | book | clock | vase | scissors | teddy bear |
    hair drier | toothbrush
    """),
}
_WORDNET = re.compile(r'n\d{8}\b[\s,:]*')


def templates(name) -> tuple[str, ...]:
  """The templates of a name of TEMPLATES, or those given as a tuple; each has one place, {}, for
  the class.
  """
  if isinstance(name, str):
    if name not in TEMPLATES:
      raise strict.unknown('templates', name, TEMPLATES)
    return TEMPLATES[name]
  for template in name:
    if template.count('{}') != 1:
      raise InputError(
        f'templates: got {template!r}; expected one place {{}} for the name of the class'
      )
  return tuple(name)


def classes(name, *, background=()) -> tuple[tuple[str, ...], ...]:
  """The names of each class of a known list ('voc21', 'ade150', ...) or, where `name` is a path, of
  a file.

  background: names instead of 'background', for class 0 of voc21 and context60 (STUFF, for
  instance).
  """
  if name not in _CLASSES:
    if pathlib.Path(name).is_file():
      return read_classes(name)
    raise strict.unknown('classes', str(name), [*_CLASSES, 'FILE'])
  names = tuple((class_names.prompt(one),) for one in _CLASSES[name])
  if background and names[0] != ('background',):
    raise InputError(
      f'background: got names for {name!r}; expected a list with a background: voc21, context60'
    )
  return (tuple(background), *names[1:]) if background else names


def read_classes(path, *, count=None) -> tuple[tuple[str, ...], ...]:
  """Class names of a file, one class a line or a JSON list, several names of a class separated by
  commas.

  Reads what goes round for ImageNet: lists of names, 'n01440764 tench, Tinca tinca' (WordNet ids
  are left out), and {"0": ["n01440764", "tench"]}, in the order of the numbers. count: the expected
  number of classes. Raises InputError.
  """
  path = pathlib.Path(path)
  try:
    text = path.read_text(encoding='utf-8')
    entries = json.loads(text) if path.suffix == '.json' else text.strip().splitlines()
    if isinstance(entries, dict):
      numbers = sorted(map(int, entries))
      if numbers != list(range(len(numbers))):
        raise ValueError(
          f'its numbers run from {numbers[0]} to {numbers[-1]}; expected 0 to {len(numbers) - 1}'
        )
      entries = [entries[str(n)] for n in numbers]
    found = tuple(map(_names, entries))
  except (OSError, ValueError, TypeError) as error:
    raise InputError(f'class names: got {str(path)!r}, which cannot be read: {error}') from None
  empty = [i for i, names in enumerate(found) if not names]
  if not found or empty:
    raise InputError(
      f'class names: got {str(path)!r} with no name for class {empty[0] if empty else 0}; expected one '
      'class a line, or a JSON list'
    )
  if count is not None and len(found) != count:
    raise InputError(f'class names: got {len(found)} classes in {str(path)!r}; expected {count}')
  return found


def _names(entry):
  parts = entry.split(',') if isinstance(entry, str) else list(entry)
  names = (' '.join(_WORDNET.sub('', part, count=1).replace('_', ' ').split()) for part in parts)
  return tuple(name for name in names if name)
