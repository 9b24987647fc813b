"""One ingredient of TIPS at a time, small: the rows of the papers' ablations on one data set.

  python -m tips_jax.main --config=configs/ablation.py:ROW --workdir=W
  python -m tips_jax.main --config=configs/ablation.py:ROW,DATA --workdir=W --config.data.store=S

`benchmarks/ablation.py` runs whole tables and says how they are measured. Every row has the same
towers, views, optimizer and schedule; every number is ours.
"""

import functools

import ml_collections

from configs.parts import recipe, tips

# 64 tokens of 8 pixels, not 36 of 16: an object of a scene covers several, and three quarters of
# them can be masked and still be guessed. Narrow, so that a core sees 64,000 images in 20 minutes.
IMAGE = dict(width=96, depth=4, heads=3, mlp=384, ffn='gelu', patch=8, grid=8, centered=True)
TEXT = dict(width=96, depth=2, heads=3, mlp=384)
# Sinkhorn hands every prototype as many tokens of a batch. Of 128, each gets 24 masked patches and
# half a CLS token; of 1,024 it was noise. In 32 dimensions random prototypes are 0.18 apart (in 64:
# 0.12), so that targets at temperature 0.04 are sharp from the start.
HEAD = dict(width=96, hidden=256, bottleneck=32, prototypes=128)
METHOD = dict(
  mask_ratio=0.75,
  temperature=0.07,
  weights=dict(contrastive=0.5, distill=1.0, masked=2.0),
  # An EMA center lags, and soft targets turn uniform, in so few steps (docs/lab.md).
  dino=dict(teacher_temperature=0.04, centering='sinkhorn'),
  # The mean of the last 100 steps. A momentum that rises to 1 would end the teacher's learning
  # halfway (SILC, arXiv 2310.13355).
  momentum=0.99,
)
TRAINING = dict(
  optimizer=dict(
    kind='adamw',
    learning_rate=1.5e-3,
    b2=0.98,
    weight_decay=0.05,
    clip_by='tower',  # in one norm the prototype terms would crowd out the text tower
    freeze_rules=(('.*/prototypes', 0.01), ('.*', 0.0)),
  ),
  schedule=dict(total_steps=1000, batch_size=64, warmup_steps=50, decay='cosine'),
  compute=dict(dtype='float32'),
  checkpoint=dict(every_steps=200, keep_last=1),
  log=dict(every_steps=20, tensorboard=False),
  evals=dict(size=96, report=False),
)


def _views(flip: float) -> recipe.Recipe:
  return {
    'global': dict(size=64, count=1, scale=(0.4, 1.0), flip=flip),
    'local': dict(size=32, count=3, scale=(0.05, 0.4), flip=0.0),
  }


# What fits a data set: views, vocabulary, length of the texts.
DATA = {
  'scenes': dict(  # no flips: their captions say left and right; the scenes are those of `quick`
    views=_views(flip=0.0),
    vocab=1024,
    data=dict(text_length=32, scenes=dict(train=20_000, test=500, objects=1, typical=0.8)),
  ),
  'fashion': dict(views=_views(flip=0.5), vocab=4096, data=dict(text_length=24)),
  'flickr8k': dict(views=_views(flip=0.5), vocab=6144, data=dict(text_length=24)),
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
    image=IMAGE, text=TEXT | dict(vocab=own['vocab']), head=HEAD, views=own['views'], **METHOD
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
