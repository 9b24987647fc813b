"""One term of UMG-CLIP at a time, small, on `scenes`: CLIP with and without regions and tags.

  python -m tips_jax.main --config=configs/regions.py:ROW --workdir=W
  python -m tips_jax.evaluate --checkpoint=W --store=W/scenes --recipe=short \
    --task=region_classification,region_retrieval,tagging,retrieval --size=64

ROW: `clip` (captions of images alone), `tags`, `region_captions`, `region_tags`, `regions` (both of
regions) or `all`; with `,reduced` a quarter of the patches is left after the first block. Every row
has the same towers, crops, captions of images, optimizer and schedule; a row without regions is
measured by the values of its patches (evals/tasks/regions.py). Several seeds: benchmarks/rows.py.
"""

import functools

import ml_collections

from configs import ablation
from configs.methods import umg_clip
from configs.parts import recipe, small

ROWS = {
  'clip': ('caption',),
  'tags': ('caption', 'tag'),
  'region_captions': ('caption', 'region_caption'),
  'region_tags': ('caption', 'region_tag'),
  'regions': ('caption', 'region_caption', 'region_tag'),
  'all': ('caption', 'tag', 'region_caption', 'region_tag'),
}
# The one object of an image would be told by its CLS token as well.
_OBJECTS = 4
_WIDTH = small.IMAGE['width']
_HEAD = dict(width=_WIDTH, output=_WIDTH)


def row(name: str) -> recipe.Recipe:
  """The recipe of a row of ROWS."""
  losses = ROWS[name]
  whole = umg_clip.method('b16')
  towers = whole['towers'] | dict(
    image=dict(kind='vit', cls=('cls',)) | small.IMAGE,
    text=dict(kind='text', vocab=1024) | small.TEXT,
  )
  for head in ('image_projection', 'text_projection', 'region_projection'):
    towers[head] = towers[head] | _HEAD
  whole = recipe.only(whole | dict(towers=towers, masks={}, teachers={}), losses)
  # As many as a scene has; its tags are a word each.
  data = recipe.merge(
    whole['data'],
    dict(
      tags=dict(tags=dict(count=_OBJECTS, length=4)),
      regions=dict(
        count=_OBJECTS, texts=dict(region_captions=dict(count=1), region_tags=dict(length=4))
      ),
    ),
  )
  if not any(loss.startswith('region') for loss in losses):
    data.pop('regions')
    whole = whole | dict(evals=whole['evals'] | dict(region_head=''))
  if 'tag' not in losses:
    data.pop('tags')
  # The optimizer of the other small runs, not LAMB, whose numbers are for batches of 16,384.
  return recipe.merge(
    whole | dict(data=data, optimizer={}),
    ablation.TRAINING,
    dict(
      name=f'regions_{name}',
      data=dict(
        views={'global': small.views(flip=0.0)['global']},
        scenes=dict(train=20_000, test=500, objects=_OBJECTS, typical=0.8),
      ),
      evals=dict(size=64),
    ),
  )


def get_config(arg: str = 'all') -> ml_collections.ConfigDict:
  recipes = {name: functools.partial(row, name) for name in ('all', *ROWS)}
  return recipe.select(arg, recipes, changes={'reduced': umg_clip.reduced})
