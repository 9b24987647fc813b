"""MAE ViT-B/14, images alone.

python -m tips_jax.main --config=configs/mae.py --workdir=W --config.data.store=STORE
"""

from configs import methods, recipe


def get_config(arg=''):
  optimizer = dict(kind='adamw', learning_rate=0.00015, b2=0.95, weight_decay=0.05)
  return recipe.finish(
    recipe.pretrain('mae', methods.mae('b'), 'b', steps=100_000, batch=4096, optimizer=optimizer),
    arg,
  )
