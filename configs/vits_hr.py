"""TIPS ViT-S/14, high-resolution stage: 448 and 140 px from the run of vits.py. v1: 0.1 epoch; v2:
9,000 steps.

The position table keeps its grid and is resized inside the model.

  python -m tips_jax.main --config=configs/vits_hr.py --workdir=W --config.data.store=STORE
  --config.init_from=RUN
"""

from configs import methods, recipe


def get_config(arg='v1'):
  version, rest = recipe.version(arg)
  low = recipe.pretrain(f'vits_{version}', methods.tips('s', version), 's', steps=1)
  return recipe.finish(recipe.high_resolution(low, steps=2_856 if version == 'v1' else 9_000), rest)
