"""Images and alt texts from the web, without junk and copies.

--config=configs/curation/web.py; with arguments, separated by commas:
  encoder=PATH      drops texts that do not fit their images, by a dual encoder, and finds copies by
                    its features, too
  least=0.2         cosine of text and image that is needed; else the better half stays
  evaluation=STORE  (or STORE@SPLIT, or a folder of images) drops what is in it; several times
"""

from ml_collections import config_dict

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown

_ARGUMENTS = ('encoder', 'least', 'evaluation')


def get_config(arguments: str = '') -> config_dict.ConfigDict:
  """The curation as nested dicts."""
  given = {name: [] for name in _ARGUMENTS}
  for argument in filter(None, arguments.split(',')):
    name, equals, value = argument.partition('=')
    if name not in given or not equals:
      raise unknown('--config=configs/curation/web.py:ARGUMENT=VALUE', name, _ARGUMENTS)
    given[name].append(value)
  encoder = ''.join(given['encoder'][-1:])
  # Cheap steps first: what goes by them is not encoded.
  steps = [
    dict(kind='image_size', least=32, aspect=4.0),
    dict(kind='text_length', words=(1, 256), letters=(3, 2000)),
    dict(kind='junk_text'),
    dict(kind='repeated_text', most=10, keep=1),
    dict(kind='language', languages=('en',)),
    dict(kind='exact_duplicates'),
  ]
  if encoder:
    similarity = dict(kind='similarity', encoder=encoder, best=0.5)
    if given['least']:
      similarity = dict(kind='similarity', encoder=encoder, least=_number(given['least'][-1]))
    steps.append(similarity)
  steps.append(dict(kind='near_duplicates', encoder=encoder))
  if given['evaluation']:
    steps.append(dict(kind='decontaminate', evaluations=tuple(given['evaluation'])))
  return config_dict.ConfigDict(dict(steps=steps, splits=('train',), seed=0))


def _number(text):
  try:
    return float(text)
  except ValueError:
    raise InputError(f'least: got {text!r}; expected a number, as least=0.2') from None
