"""DINO + iBOT ViT-B/14 in the style of DINOv2, images alone.

python -m tips_jax.main --config=configs/dino_ibot.py --workdir=W --config.data.store=STORE
"""

from configs import methods, recipe


def get_config(arg=''):
  optimizer = dict(kind='adamw', learning_rate=0.0002, weight_decay=0.04)
  return recipe.finish(
    recipe.pretrain(
      'dino_ibot', methods.dino_ibot('b'), 'b', steps=200_000, batch=2048, optimizer=optimizer
    ),
    arg,
  )
