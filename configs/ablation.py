"""One ingredient of TIPS at a time, small: the rows of the papers' ablations on one data set.

  python -m tips_jax.main --config=configs/ablation.py:ROW --workdir=W
  python -m tips_jax.main --config=configs/ablation.py:ROW,DATA --workdir=W --config.data.store=S

`benchmarks/ablation.py` runs whole tables and says how they are measured. Every row has the same
towers, views, optimizer (configs/parts/small.py) and schedule.
"""

import functools

import ml_collections

from configs.parts import recipe, small, tips

TRAINING = dict(
  optimizer=small.OPTIMIZER,
  schedule=dict(total_steps=1000, batch_size=64, warmup_steps=50, decay='cosine'),
  compute=dict(dtype='float32'),
  checkpoint=dict(every_steps=200, keep_last=1),
  log=dict(every_steps=20, tensorboard=False),
  evals=dict(size=96, report=False),
)


# What fits a data set: views, vocabulary, length of the texts.
DATA = {
  'scenes': dict(  # no flips: their captions say left and right; the scenes are those of `quick`
    views=small.views(flip=0.0),
    vocab=1024,
    data=dict(text_length=32, scenes=dict(train=20_000, test=500, objects=1, typical=0.8)),
  ),
  'fashion': dict(views=small.views(flip=0.5), vocab=4096, data=dict(text_length=24)),
  'flickr8k': dict(views=small.views(flip=0.5), vocab=6144, data=dict(text_length=24)),
}
# Changes of rows. One branch has one CLS token, and the weight of two.
ONE = dict(towers=dict(image=dict(cls=('web',))), losses=dict(contrastive_web=dict(weight=1.0)))
CAPTION = dict(field='captions', pick='first', fallback='')
MIXED = dict(field='alt_text', fallback='captions', pick='first', mix=0.5)
FULL_EMA = dict(
  passes=dict(
    teacher=dict(by='ema', tower='image', inputs=dict(images='batch.global')),
    teacher_cls=dict(inputs=dict(tokens='teacher.web')),
    teacher_patch=dict(inputs=dict(tokens='teacher.patch')),
  ),
  teachers=dict(ema=dict(towers=('image', 'head'))),
)


def _read(field: str, text: recipe.Recipe) -> recipe.Recipe:
  return dict(data=dict(texts={field: text}))


BOTH = ('contrastive_web', 'contrastive_synthetic')
EVERY = (*BOTH, 'distill', 'masked')
# Row: the method that it starts from, the losses that it keeps, its changes.
ROWS = {
  # TIPS, Table 1.
  'web': (tips.v1, ('contrastive_web',), (ONE,)),
  'synthetic': (tips.v1, ('contrastive_web',), (ONE, _read('web', CAPTION))),
  'sampled': (tips.v1, ('contrastive_web',), (ONE, _read('web', MIXED))),
  'both': (tips.v1, BOTH, ()),
  'distill': (tips.v1, (*BOTH, 'distill'), ()),
  'masked': (tips.v1, (*BOTH, 'masked'), ()),
  'all': (tips.v1, EVERY, ()),
  # TIPSv2, Tables 3, 4 and 9, each on top of the last: iBOT++, EMA of the head alone, sampled
  # captions.
  'ibotpp': (tips.v2, EVERY, (FULL_EMA, _read('synthetic', CAPTION))),
  'head_ema': (tips.v2, EVERY, (_read('synthetic', CAPTION),)),
  'v2': (tips.v2, EVERY, ()),
}


def row(name: str, data: str) -> recipe.Recipe:
  """The recipe of a row of ROWS on a data set of DATA."""
  method, losses, changes = ROWS[name]
  own = DATA[data]
  whole = method(
    image=small.IMAGE,
    text=small.TEXT | dict(vocab=own['vocab']),
    head=small.HEAD,
    views=own['views'],
    **small.METHOD,
  )
  whole = recipe.merge(recipe.late(whole, 'distill', 'masked'), *changes)
  return recipe.merge(
    dict(name=f'ablation_{name}_{data}'),
    recipe.only(whole, losses),
    TRAINING,
    dict(data=own['data']),
  )


def get_config(arg: str = 'all') -> ml_collections.ConfigDict:
  recipes = {}
  for data in DATA:
    for name in ROWS:
      recipes[f'{name},{data}'] = functools.partial(row, name, data)
  return recipe.select(arg, recipes)
