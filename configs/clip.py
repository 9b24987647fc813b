"""CLIP ViT-B/14, one caption an image.

python -m tips_jax.main --config=configs/clip.py --workdir=W --config.data.store=STORE
"""

from configs import methods, recipe


def get_config(arg=''):
  optimizer = dict(kind='adamw', learning_rate=0.0005)
  return recipe.finish(
    recipe.pretrain(
      'clip', methods.clip('b'), 'b', steps=100_000, batch=16384, optimizer=optimizer
    ),
    arg,
  )
