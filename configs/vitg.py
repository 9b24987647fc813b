"""TIPS ViT-g/14: 15 epochs of 117 M images at batch 16,384 (v1); 90,000 steps of 8,192 (v2).

python -m tips_jax.main --config=configs/vitg.py --workdir=W --config.data.store=STORE
python -m tips_jax.main --config=configs/vitg.py:v2 --workdir=W --config.data.store=STORE
"""

from configs import methods, recipe


def get_config(arg='v1'):
  version, rest = recipe.version(arg)
  steps, batch = (107_100, 16384) if version == 'v1' else (90_000, 8192)
  method = methods.tips('g', version)
  return recipe.finish(
    recipe.pretrain(f'vitg_{version}', method, 'g', steps=steps, batch=batch), rest
  )
