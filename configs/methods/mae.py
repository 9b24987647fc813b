"""MAE ViT-B/14 (arXiv 2111.06377), images alone: the encoder sees a quarter of the patches, a small
decoder paints the rest.

  python -m tips_jax.main --config=configs/methods/mae.py --workdir=W --config.data.store=STORE

Published: 83.6 % on ImageNet after fine-tuning ViT-B/16 (README of facebookresearch/mae); we have
not reproduced it. Numbers: facebookresearch/mae@efb2a80, file and line beside them.

Departs in every tower, as in all our methods: GELU in its tanh form, weights of patches from a
normal distribution (models_mae.py:76 has a uniform one of nearly the same deviation).
"""

import ml_collections

from configs.parts import recipe


def method() -> recipe.Recipe:
  return dict(
    name='mae',
    towers=dict(
      image=dict(
        kind='vit',
        width=768,  # models_mae.py:225, as the decoder's sizes
        depth=12,
        heads=12,
        mlp=3072,
        cls=('cls',),  # departs: starts at zero, as ours do; MAE's at a deviation of 0.02 (:79)
        patch=14,  # departs: not 16, as all our models: their costs compare
        grid=16,
        positions='sincos',  # :68; fixed by freeze_rules below
        # main_pretrain.py:127 standardizes the pixels; ours start as if they were.
        centered=True,
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
        positions='sincos',  # models_mae.py:71
      ),
    ),
    masks=dict(random=dict(kind='random', view='global', ratio=0.75)),
    passes=dict(
      visible=dict(
        tower='image', inputs=dict(images='batch.global', visible='masks.random.visible')
      ),
      painted=dict(
        tower='decoder',
        inputs=dict(
          patch='visible.patch',
          visible='masks.random.visible',
          mask='masks.random.mask',
          cls='visible.cls',  # models_mae.py:180
        ),
      ),
    ),
    losses=dict(
      pixels=dict(
        kind='pixels',
        inputs=dict(prediction='painted.pixels', images='batch.global', mask='masks.random.mask'),
        weight=1.0,
        args=dict(patch=14, normalize=1),  # PRETRAIN.md:11, with the unbiased variance
      ),
      spread=dict(kind='spread', inputs=dict(features='visible.cls'), weight=0.0),
    ),
    # main_pretrain.py:124. departs: resized linearly with antialiasing, not bicubically.
    data=dict(views={'global': dict(size=224, count=1, scale=(0.2, 1.0), flip=0.5)}),
    optimizer=dict(
      kind='adamw',
      learning_rate=2.4e-3,  # 1.5e-4 for 256 images, times 4,096 / 256 (PRETRAIN.md:15, 19)
      b1=0.9,  # main_pretrain.py:180
      b2=0.95,
      eps=1e-8,  # torch's default
      weight_decay=0.05,  # PRETRAIN.md:15
      clip_norm=0.0,  # engine_pretrain.py:57 gives no norm
      # timm's rule (main_pretrain.py:179): all but biases and gains.
      decay_rules=(('.*/(bias|scale)$', 0.0), ('.*', 1.0)),
      freeze_rules=(('.*/posembed', 1.0), ('.*', 0.0)),  # models_mae.py:37, 51
    ),
    schedule=dict(
      total_steps=249_600,  # 800 epochs of 312 steps: 1,281,167 images, the rest dropped
      batch_size=4_096,  # PRETRAIN.md:18
      warmup_steps=12_480,  # 40 epochs. departs: counted from one; MAE's first rate is 0
      decay='cosine',  # util/lr_sched.py:14
    ),
    compute=dict(remat='products'),  # ours: docs/plans.md
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return recipe.finish(method(), arg)
