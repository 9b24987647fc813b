"""A small TIPS (or CLIP) for a few thousand captioned images on a CPU: the runs of docs/results.md.

  python -m tips_jax.main --config=configs/laptop.py --workdir=W --config.data.store=STORE
  python -m tips_jax.main --config=configs/laptop.py:v2 --workdir=W --config.data.store=STORE
  python -m tips_jax.main --config=configs/laptop.py:clip --workdir=W --config.data.store=STORE

Towers, weights and optimizer: configs/parts/small.py, wider and at 96 pixels.
"""

from collections.abc import Callable

import ml_collections

from configs.methods import clip as clip_method
from configs.parts import recipe, small, tips

IMAGE = small.IMAGE | dict(width=128, heads=4, patch=16, grid=6)
TEXT = small.TEXT | dict(width=128, heads=4, vocab=8192, dropout=0.1)
HEAD = small.HEAD | dict(width=128)
GLOBAL = dict(size=96, count=1, scale=(0.4, 1.0), flip=0.5)
LOCAL = dict(size=48, count=2, scale=(0.05, 0.4), flip=0.0)
CAPTIONS = dict(data=dict(texts=dict(synthetic=dict(pick='random'))))  # five an image, for v1 too
TRAINING = dict(
  optimizer=small.OPTIMIZER,
  schedule=dict(total_steps=1500, batch_size=64, warmup_steps=100, decay='cosine'),
  compute=dict(dtype='float32', remat='none'),
  data=dict(text_length=24),
  checkpoint=dict(every_steps=500),
  evals=dict(tasks=('retrieval',), size=96, every_steps=750),
)


def _tips(name: str, method: Callable[..., recipe.Recipe]) -> recipe.Recipe:
  views = {'global': GLOBAL, 'local': LOCAL}
  whole = method(image=IMAGE, text=TEXT, head=HEAD, views=views, **small.METHOD)
  whole = recipe.late(whole, 'distill', 'masked')
  return recipe.merge(dict(name=name), whole, CAPTIONS, TRAINING)


def v1() -> recipe.Recipe:
  return _tips('laptop_tips_v1', tips.v1)


def v2() -> recipe.Recipe:
  return _tips('laptop_tips_v2', tips.v2)


def clip() -> recipe.Recipe:
  own = dict(
    name='laptop_clip',
    towers=dict(
      image=IMAGE, text=TEXT, image_projection=dict(width=128), text_projection=dict(width=128)
    ),
    data=dict(views={'global': GLOBAL}),
  )
  # CLIP's optimizer is for batches of 32,768; this one is the same as for TIPS, to compare.
  return recipe.merge(clip_method.method() | dict(optimizer={}), own, TRAINING)


def get_config(arg: str = 'v1') -> ml_collections.ConfigDict:
  return recipe.select(arg, {'v1': v1, 'v2': v2, 'clip': clip})
