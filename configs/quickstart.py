"""TIPS in ten minutes on two CPU cores: generates scenes, trains a tiny model, reports what it
learned.

python -m tips_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
python -m tips_jax.main --config=configs/quickstart.py:v2 --workdir=runs/quickstart_v2
"""

from configs import methods, recipe, scales

PATCH = 16


def get_config(arg='v1'):
  version, rest = recipe.version(arg)
  method = recipe.late(methods.tips('quick', version), 'distill', 'masked', begin=0.1, until=0.3)
  method['towers'] |= dict(
    image=scales.image('quick', grid=6, mask_token=True, patch=PATCH) | dict(centered=True),
    text=scales.text('quick', vocab=1024),
    head=dict(
      kind='dino_head', width=scales.width('quick'), hidden=256, bottleneck=64, prototypes=1024
    ),
  )
  for term in (
    'distill',
    'masked',
  ):  # an EMA center and soft targets turn uniform in so few steps (docs/lab.md)
    method['losses'][term]['args'] |= dict(teacher_temperature=0.04, centering='sinkhorn')
  # Scenes' captions say left and right: no flips.
  views = {'global': dict(size=96, scale=(0.4, 1.0), flip=0.0), 'local': dict(size=48, count=3)}
  small = (
    dict(total_steps=60, batch_size=32)
    if rest == 'runlocal'
    else dict(total_steps=1000, batch_size=32)
  )
  scenes = dict(train=128, test=64) if rest == 'runlocal' else dict(train=6000, test=500)
  config = recipe.pretrain(
    f'quickstart_{version}',
    method,
    'quick',
    steps=1,
    compute=dict(dtype='float32'),
    data=dict(
      views=views, text_length=32, scenes=scenes | dict(objects=1, typical=0.8)
    ),  # docs/lab.md
    optimizer=dict(kind='adamw', learning_rate=1.5e-3, weight_decay=0.05),
    schedule=dict(warmup_steps=100, decay='cosine', **small),
    checkpoint=dict(every_steps=200),
    log=dict(every_steps=20),
    evals=dict(tasks=('retrieval', 'knn', 'segmentation'), size=96, limit=2000),
  )
  if rest == 'runlocal':
    config['evals'] |= dict(limit=128)
  return recipe.finish(config, '' if rest == 'runlocal' else rest)
