"""TIPS in about eight minutes on two CPU cores: generates scenes, trains a tiny model, reports
what it learned.

  python -m tips_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m tips_jax.main --config=configs/quickstart.py:v2 --workdir=runs/quickstart_v2

What it reaches: docs/results.md. Towers and optimizer: configs/parts/small.py.
"""

from collections.abc import Callable

import ml_collections

from configs.parts import recipe, small, tips

TEXT = small.TEXT | dict(vocab=1024)
VIEWS = small.views(flip=0.0)  # captions of scenes say left and right
TRAINING = dict(
  # Twice the rate of the other small configs: better on nearly every task (docs/lab.md).
  optimizer=small.OPTIMIZER | dict(learning_rate=4e-3),
  schedule=dict(total_steps=960, batch_size=64, warmup_steps=60, decay='cosine'),
  compute=dict(dtype='float32'),
  data=dict(text_length=32, scenes=dict(train=12_000, test=500, objects=1, typical=0.8)),
  checkpoint=dict(every_steps=240),
  log=dict(every_steps=20),
  evals=dict(tasks=('retrieval', 'knn', 'segmentation'), size=96, limit=2000),
)
# Small already: fewer steps and scenes, the same model.
RUNLOCAL = dict(
  schedule=dict(total_steps=60, batch_size=32, warmup_steps=10),
  data=dict(scenes=dict(train=128, test=64)),
  evals=dict(limit=128),
)


def v1() -> recipe.Recipe:
  return _short('quickstart_v1', tips.v1)


def v2() -> recipe.Recipe:
  return _short('quickstart_v2', tips.v2)


def _short(name: str, method: Callable[..., recipe.Recipe]) -> recipe.Recipe:
  whole = method(image=small.IMAGE, text=TEXT, head=small.HEAD, views=VIEWS, **small.METHOD)
  # The contrast alone makes twice the images a second, and is what a short run gains most from.
  late = recipe.late(whole, 'distill', 'masked', begin=0.7, until=0.8)
  return recipe.merge(dict(name=name), late, TRAINING)


def get_config(arg: str = 'v1') -> ml_collections.ConfigDict:
  return recipe.select(
    arg,
    {'v1': v1, 'v2': v2},
    changes=tips.CHANGES,
    runlocal=RUNLOCAL,
  )
