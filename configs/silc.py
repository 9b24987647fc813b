"""SILC ViT-B/14: CLIP and local-to-global self-distillation.

python -m tips_jax.main --config=configs/silc.py --workdir=W --config.data.store=STORE
"""

from configs import methods, recipe


def get_config(arg=''):
  optimizer = dict(kind='adamw', learning_rate=0.0005)
  return recipe.finish(
    recipe.pretrain(
      'silc', methods.silc('b'), 'b', steps=100_000, batch=16384, optimizer=optimizer
    ),
    arg,
  )
