"""TIPS ViT-S/14 distilled from a frozen ViT-g/14 (a finished run of vitg.py or vitg_hr.py).

  python -m tips_jax.main --config=configs/vits_distill.py --workdir=W --config.data.store=STORE \
    --config.teachers.large.init_from=RUN
"""

from configs import methods, recipe


def get_config(arg='v2'):
  version, rest = recipe.version(arg)
  method = methods.tips('s', version, teacher_scale='g')
  return recipe.finish(
    recipe.pretrain(f'vits_distill_{version}', method, 'g', steps=90_000, batch=8192), rest
  )
