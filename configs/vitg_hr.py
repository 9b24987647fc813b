"""TIPS ViT-g/14, high-resolution stage: 448 and 140 px from the run of vitg.py. v1: 0.1 epoch; v2:
9,000 steps.

The position table keeps its grid and is resized inside the model.

  python -m tips_jax.main --config=configs/vitg_hr.py --workdir=W --config.data.store=STORE
  --config.init_from=RUN
"""

from configs import methods, recipe


def get_config(arg='v1'):
  version, rest = recipe.version(arg)
  low = recipe.pretrain(f'vitg_{version}', methods.tips('g', version), 'g', steps=1)
  return recipe.finish(recipe.high_resolution(low, steps=2_856 if version == 'v1' else 9_000), rest)
