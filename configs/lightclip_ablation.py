"""One term of LightCLIP at a time, small, on `scenes`, beside CLIP with the same towers.

  python -m tips_jax.main --config=configs/lightclip_ablation.py:ROW --workdir=W
  python -m tips_jax.evaluate --checkpoint=W --store=W/scenes --task=zeroshot,retrieval --size=128 \
    --recipe=short

ROW: `clip`, `softened` (its labels), `aligned` (patches with words), `masked` (words, alone and
fused with the image) or `all`. Every row has the same towers, crops, texts, optimizer and schedule;
what LightCLIP changes of images and texts is in none.
"""

import functools

import ml_collections

from configs import ablation
from configs.methods import lightclip
from configs.parts import recipe, small

# Row: the losses beside the contrast, whose labels are softened in SOFTENED.
ROWS = {
  'clip': (),
  'softened': (),
  'aligned': ('alignment',),
  'masked': ('masked_words', 'fused_words'),
  'all': ('alignment', 'masked_words', 'fused_words'),
}
SOFTENED = ('softened', 'all')
# A quarter of ResNet-18's; 16 patches of 128 pixels.
_WIDTHS = (16, 32, 64, 128)
_SIZE = 128
_JOINT = small.TEXT['width']


def row(name: str) -> recipe.Recipe:
  """The recipe of a row of ROWS."""
  whole = lightclip.method('resnet18')
  contrast = dict(whole['losses']['contrastive'])
  if name not in SOFTENED:
    del contrast['args']
  towers = dict(
    image=dict(widths=_WIDTHS, grid=_SIZE // 32),
    text=small.TEXT | dict(depth=8, vocab=1024),
    image_projection=dict(width=_WIDTHS[-1], output=_JOINT),
    text_projection=dict(width=_JOINT, output=_JOINT),
    fusion=dict(widths=_WIDTHS[1:3], output=_JOINT),
    word_head=dict(width=_JOINT, vocab=1024),
  )
  view = small.views(flip=0.0)['global'] | dict(size=_SIZE)
  whole = recipe.merge(
    whole | dict(losses=whole['losses'] | dict(contrastive=contrast), teachers={}, data={}),
    ablation.TRAINING,
    dict(
      name=f'lightclip_{name}',
      towers=towers,
      data=ablation.DATA['scenes']['data']
      | dict(views={'global': view}, texts=dict(text=dict(field='captions', fallback='alt_text'))),
      # As the method has it, not Muon: kernels of convolutions are no matrices.
      optimizer=whole['optimizer'] | dict(learning_rate=1.5e-3),
      schedule=dict(total_steps=450, batch_size=32, warmup_steps=22),
      evals=dict(size=_SIZE),
    ),
  )
  return recipe.only(whole, ('contrastive', *ROWS[name]))


def get_config(arg: str = 'all') -> ml_collections.ConfigDict:
  return recipe.select(arg, {name: functools.partial(row, name) for name in ('all', *ROWS)})
