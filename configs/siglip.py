"""SigLIP ViT-B/14.

python -m tips_jax.main --config=configs/siglip.py --workdir=W --config.data.store=STORE
"""

from configs import methods, recipe


def get_config(arg=''):
  optimizer = dict(kind='adamw', learning_rate=0.001)
  return recipe.finish(
    recipe.pretrain(
      'siglip', methods.siglip('b'), 'b', steps=100_000, batch=16384, optimizer=optimizer
    ),
    arg,
  )
