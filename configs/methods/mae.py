"""MAE ViT-B/14 (arXiv 2111.06377), images alone: the encoder sees a quarter of the patches, a small
decoder paints the rest.

  python -m tips_jax.main --config=configs/methods/mae.py --workdir=W --config.data.store=STORE

Published: 83.6 % on ImageNet after fine-tuning ViT-B/16 (README of facebookresearch/mae); we have
not reproduced it. Numbers: table 8, checked in facebookresearch/mae (PRETRAIN.md,
main_pretrain.py, models_mae.py).
"""

import ml_collections

from configs.parts import recipe


def method() -> recipe.Recipe:
  return dict(
    name='mae',
    towers=dict(
      # departs: patches of 14 pixels, not 16, as all our models; a learned position table, where
      # MAE's is fixed.
      image=dict(
        kind='vit', width=768, depth=12, heads=12, mlp=3072, cls=('cls',), patch=14, grid=16
      ),
      decoder=dict(
        kind='pixel_decoder',
        width=768,
        decoder_width=512,
        depth=8,
        heads=16,
        mlp=2048,
        patch=14,
        grid=16,
      ),
    ),
    masks=dict(random=dict(view='global', ratio=0.75)),
    passes=dict(
      visible=dict(
        tower='image', inputs=dict(images='batch.global', visible='masks.random.visible')
      ),
      painted=dict(
        tower='decoder',
        inputs=dict(
          patch='visible.patch', visible='masks.random.visible', mask='masks.random.mask'
        ),
      ),
    ),
    losses=dict(
      pixels=dict(
        kind='pixels',
        inputs=dict(prediction='painted.pixels', images='batch.global', mask='masks.random.mask'),
        weight=1.0,
        args=dict(patch=14),  # of normalized patches (norm_pix_loss)
      ),
      spread=dict(kind='spread', inputs=dict(features='visible.cls'), weight=0.0),
    ),
    data=dict(views={'global': dict(size=224, count=1, scale=(0.2, 1.0), flip=0.5)}),
    optimizer=dict(
      kind='adamw',
      learning_rate=2.4e-3,  # 1.5e-4 for 256 images, times 4,096 / 256
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.05,
      clip_norm=0.0,  # none
      # timm's rule, all but biases and gains; MAE's positions are not learned.
      decay_rules=(('.*/(bias|scale|posembed)$', 0.0), ('.*', 1.0)),
    ),
    schedule=dict(
      total_steps=250_000,  # 800 epochs of ImageNet-1k, 1.28 M images
      batch_size=4_096,
      warmup_steps=12_500,  # 40 epochs
      decay='cosine',
    ),
    compute=dict(remat='products'),  # ours: docs/plans.md
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return recipe.finish(method(), arg)
