"""A small TIPS (or CLIP) for a few thousand captioned images on a CPU: the runs of docs/results.md.

python -m tips_jax.main --config=configs/laptop.py --workdir=W --config.data.store=STORE
python -m tips_jax.main --config=configs/laptop.py:v2 --workdir=W --config.data.store=STORE
python -m tips_jax.main --config=configs/laptop.py:clip --workdir=W --config.data.store=STORE
"""

from configs import methods, recipe, scales

PATCH = 16


def get_config(arg='v1'):
  options = arg.split(',')
  version, rest = recipe.version(','.join(o for o in options if o != 'clip'))
  if 'clip' in options:
    name, cls, method = 'clip', ('cls',), methods.clip('quick')
  else:
    name, cls, method = f'tips_{version}', ('web', 'synthetic'), methods.tips('quick', version)
    recipe.late(method, 'distill', 'masked', begin=0.1, until=0.3)
    method['towers']['head'] = dict(
      kind='dino_head', width=scales.width('quick'), hidden=256, bottleneck=64, prototypes=1024
    )
    for term in ('distill', 'masked'):  # an EMA center lags in so few steps (docs/lab.md)
      method['losses'][term]['args'] |= dict(teacher_temperature=0.04, centering='sinkhorn')
    method['data']['views']['local'] = methods.LOCAL | dict(size=48, count=2)
    method['data']['texts']['synthetic'] = dict(field='captions')
  method['towers'] |= dict(
    image=scales.image('quick', cls=cls, grid=6, mask_token=name != 'clip', patch=PATCH)
    | dict(centered=True),
    text=scales.text('quick', vocab=8192) | dict(dropout=0.1),
  )
  method['data']['views']['global'] = methods.GLOBAL | dict(size=96)
  config = recipe.pretrain(
    f'laptop_{name}',
    method,
    'quick',
    steps=1,
    compute=dict(dtype='float32'),
    data=dict(text_length=24),
    optimizer=dict(kind='adamw', learning_rate=1.5e-3, b2=0.98, weight_decay=0.1),
    schedule=dict(total_steps=1500, batch_size=64, warmup_steps=100, decay='cosine'),
    checkpoint=dict(every_steps=500),
    evals=dict(tasks=('retrieval',), size=96, every_steps=750),
  )
  return recipe.finish(config, rest)
