"""A small TIPS (or CLIP) for a few thousand captioned images on a CPU: the runs of docs/results.md.

  python -m tips_jax.main --config=configs/laptop.py --workdir=W --config.data.store=STORE
  python -m tips_jax.main --config=configs/laptop.py:v2 --workdir=W --config.data.store=STORE
  python -m tips_jax.main --config=configs/laptop.py:clip --workdir=W --config.data.store=STORE

Every number is ours, found by the trials in docs/lab.md.
"""

import ml_collections

from configs.methods import clip as clip_method
from configs.parts import recipe, tips

IMAGE = dict(width=128, depth=4, heads=4, mlp=384, ffn='gelu', patch=16, grid=6, centered=True)
TEXT = dict(width=128, depth=2, heads=4, mlp=384, vocab=8192, dropout=0.1)
HEAD = dict(width=128, hidden=256, bottleneck=64, prototypes=1024)
GLOBAL = dict(size=96, count=1, scale=(0.4, 1.0), flip=0.5)
METHOD = dict(
  views={'global': GLOBAL, 'local': dict(size=48, count=2, scale=(0.05, 0.4), flip=0.0)},
  mask_ratio=0.75,
  temperature=0.07,
  weights=dict(contrastive=0.5, distill=1.0, masked=2.0),
  # An EMA center lags, and soft targets turn uniform, in so few steps.
  dino=dict(teacher_temperature=0.04, centering='sinkhorn'),
  momentum=dict(start=0.994, end=1.0, shape='cosine'),
)
OPTIMIZER = dict(kind='adamw', learning_rate=1.5e-3, b2=0.98, weight_decay=0.1)
FREEZE = dict(optimizer=dict(freeze_rules=(('.*/prototypes', 0.01), ('.*', 0.0))))
CAPTIONS = dict(data=dict(texts=dict(synthetic=dict(pick='random'))))  # five an image, for v1 too
TRAINING = dict(
  schedule=dict(total_steps=1500, batch_size=64, warmup_steps=100, decay='cosine'),
  compute=dict(dtype='float32', remat='none'),
  data=dict(text_length=24),
  checkpoint=dict(every_steps=500),
  evals=dict(tasks=('retrieval',), size=96, every_steps=750),
)


def _tips(name: str, method: recipe.Recipe) -> recipe.Recipe:
  method = recipe.late(method, 'distill', 'masked')
  return recipe.merge(dict(name=name, optimizer=OPTIMIZER), method, FREEZE, CAPTIONS, TRAINING)


def v1() -> recipe.Recipe:
  return _tips('laptop_tips_v1', tips.v1(image=IMAGE, text=TEXT, head=HEAD, **METHOD))


def v2() -> recipe.Recipe:
  return _tips('laptop_tips_v2', tips.v2(image=IMAGE, text=TEXT, head=HEAD, **METHOD))


def clip() -> recipe.Recipe:
  small = dict(
    name='laptop_clip',
    towers=dict(
      image=IMAGE, text=TEXT, image_projection=dict(width=128), text_projection=dict(width=128)
    ),
    data=dict(views={'global': GLOBAL}),
  )
  # CLIP's optimizer is for batches of 32,768; this one is the same as for TIPS, to compare.
  return recipe.merge(clip_method.method(), small, TRAINING) | dict(optimizer=OPTIMIZER)


def get_config(arg: str = 'v1') -> ml_collections.ConfigDict:
  return recipe.select(arg, {'v1': v1, 'v2': v2, 'clip': clip})
