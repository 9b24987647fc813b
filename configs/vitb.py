"""TIPS ViT-B/14: 70 epochs of 116 M images at batch 16,384 (v1); 90,000 steps of 8,192 (v2).

python -m tips_jax.main --config=configs/vitb.py --workdir=W --config.data.store=STORE
python -m tips_jax.main --config=configs/vitb.py:v2 --workdir=W --config.data.store=STORE
"""

from configs import methods, recipe


def get_config(arg='v1'):
  version, rest = recipe.version(arg)
  steps, batch = (495_600, 16384) if version == 'v1' else (90_000, 8192)
  method = methods.tips('b', version)
  return recipe.finish(
    recipe.pretrain(f'vitb_{version}', method, 'b', steps=steps, batch=batch), rest
  )
