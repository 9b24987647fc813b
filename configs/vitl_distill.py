"""TIPS ViT-L/14 distilled from a frozen ViT-g/14 (a finished run of vitg.py or vitg_hr.py).

  python -m tips_jax.main --config=configs/vitl_distill.py --workdir=W --config.data.store=STORE \
    --config.teachers.large.init_from=RUN
"""

from configs import methods, recipe


def get_config(arg='v2'):
  version, rest = recipe.version(arg)
  method = methods.tips('l', version, teacher_scale='g')
  return recipe.finish(
    recipe.pretrain(f'vitl_distill_{version}', method, 'g', steps=90_000, batch=8192), rest
  )
