"""TIPS in ten minutes on two CPU cores: generates scenes, trains a tiny model, reports what it
learned.

  python -m tips_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m tips_jax.main --config=configs/quickstart.py:v2 --workdir=runs/quickstart_v2

What it reaches: docs/results.md. Every number is ours, found by trials there and in docs/lab.md.
"""

import ml_collections

from configs.parts import recipe, tips

IMAGE = dict(width=128, depth=4, heads=4, mlp=384, ffn='gelu', patch=16, grid=6, centered=True)
TEXT = dict(width=128, depth=2, heads=4, mlp=384, vocab=1024)
HEAD = dict(width=128, hidden=256, bottleneck=64, prototypes=1024)
METHOD = dict(
  views={  # no flips: captions of scenes say left and right
    # From 0.7 on, not 0.4: captions name the one object, which a smaller crop may lose.
    'global': dict(size=96, count=1, scale=(0.7, 1.0), flip=0.0),
    'local': dict(size=48, count=3, scale=(0.05, 0.4), flip=0.0),
  },
  mask_ratio=0.75,
  temperature=0.07,
  weights=dict(contrastive=0.5, distill=1.0, masked=2.0),
  # An EMA center lags, and soft targets turn uniform, in so few steps.
  dino=dict(teacher_temperature=0.04, centering='sinkhorn'),
  momentum=dict(start=0.994, end=1.0, shape='cosine'),
)
TRAINING = dict(
  optimizer=dict(
    kind='muon',  # the contrast of 1.7 times as many steps of AdamW
    learning_rate=2e-3,
    weight_decay=0.05,
    freeze_rules=(('.*/prototypes', 0.01), ('.*', 0.0)),
  ),
  schedule=dict(total_steps=1000, batch_size=32, warmup_steps=100, decay='cosine'),
  compute=dict(dtype='float32'),
  data=dict(text_length=32, scenes=dict(train=6000, test=500, objects=1, typical=0.8)),
  checkpoint=dict(every_steps=200),
  log=dict(every_steps=20),
  evals=dict(tasks=('retrieval', 'knn', 'segmentation'), size=96, limit=2000),
)
# The quickstart is small already: fewer steps and scenes, the same model.
RUNLOCAL = dict(
  schedule=dict(total_steps=60),
  data=dict(scenes=dict(train=128, test=64)),
  evals=dict(limit=128),
)


def v1() -> recipe.Recipe:
  method = tips.v1(image=IMAGE, text=TEXT, head=HEAD, **METHOD)
  return recipe.merge(
    dict(name='quickstart_v1'), recipe.late(method, 'distill', 'masked'), TRAINING
  )


def v2() -> recipe.Recipe:
  method = tips.v2(image=IMAGE, text=TEXT, head=HEAD, **METHOD)
  return recipe.merge(
    dict(name='quickstart_v2'), recipe.late(method, 'distill', 'masked'), TRAINING
  )


def get_config(arg: str = 'v1') -> ml_collections.ConfigDict:
  return recipe.select(
    arg,
    {'v1': v1, 'v2': v2},
    changes=tips.CHANGES,
    runlocal=RUNLOCAL,
  )
