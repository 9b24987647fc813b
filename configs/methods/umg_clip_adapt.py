"""UMG-CLIP's adaptation for recognition (arXiv 2401.06397), after the paper's description: both
towers frozen, and small adapters in the image tower trained with the same losses on the same data.

  python -m tips_jax.main --config=configs/methods/umg_clip_adapt.py:b16 --workdir=A \
    --config.data.store=STORE --config.init_from=RUN_OF_UMG_CLIP
  python -m tips_jax.main --config=configs/methods/umg_clip_adapt.py:b16,tips --workdir=A \
    --config.data.store=STORE --config.init_from=TIPS

SIZE is `b16` (default), `l14` or `e14`. With `,tips` the towers are those of TIPS B/14, L/14 and
g/14: a run of them, or released weights. Adapters are Convpass's (arXiv 2207.07039): 8 channels,
scale 0.1, zero at the start. What the paper leaves open is marked `# ours`. Not here: its dense
adaptation with FC-CLIP's decoder.
"""

import functools

import ml_collections

from configs import vitb, vitg, vitl
from configs.methods import umg_clip
from configs.parts import recipe

_EPOCHS = {'b16': 5, 'l14': 5, 'e14': 2}
_TIPS = {'b16': vitb, 'l14': vitl, 'e14': vitg}


def method(size: str) -> recipe.Recipe:
  base = umg_clip.method(size)
  return recipe.merge(
    base,
    dict(
      name=f'umg_clip_adapt_{size}',
      init_required=True,
      towers=dict(image=dict(adapters=dict(width=8, scale=0.1, dropout=0.1))),
      optimizer=dict(
        # The backbone is frozen. ours: the text tower too; projections and temperature are trained.
        freeze_rules=(
          ('.*/adapter[12]/.*', 0.0),
          ('(image|text)/.*', 1.0),
          ('.*', 0.0),
        ),
        # ours: what is left to train is new in all layers.
        layer_decay_rules=(('.*', 1.0),),
      ),
      schedule=dict(total_steps=umg_clip.steps(_EPOCHS[size])),
    ),
  )


def of_tips(size: str) -> recipe.Recipe:
  """The recipe with the towers of TIPS, whose tokens and texts meet without projections."""
  base = method(size)
  page = _TIPS[size]
  width = page.IMAGE['width']
  alone = ('image_projection', 'text_projection')
  passes = {name: p for name, p in base['passes'].items() if p['tower'] not in alone}
  towers = {name: t for name, t in base['towers'].items() if name not in alone}
  adapters = towers['image']['adapters']
  towers |= dict(
    image=dict(kind='vit', adapters=adapters) | page.IMAGE,
    text=dict(kind='text') | page.TEXT,
    region_projection=dict(kind='region_head', width=width, output=width, samples=14),
  )
  return recipe.merge(
    base | dict(passes=passes, towers=towers),
    dict(
      name=f'{base["name"]}_tips',
      losses=dict(
        caption=dict(inputs=dict(images='clean.web', texts='caption.text')),
        tag=dict(inputs=dict(images='clean.web', texts='tag.text')),
        region_caption=dict(inputs=dict(texts='region_caption.text')),
        region_tag=dict(inputs=dict(texts='region_tag.text')),
        spread=dict(inputs=dict(features='clean.web')),
      ),
      evals=dict(image_head='', text_head=''),
    ),
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  recipes = {size: functools.partial(method, size) for size in _EPOCHS}
  recipes |= {f'{size},tips': functools.partial(of_tips, size) for size in _EPOCHS}
  return recipe.select(arg, recipes)
