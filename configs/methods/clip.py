"""CLIP ViT-B/14 (arXiv 2103.00020): one caption an image, InfoNCE over the batch.

  python -m tips_jax.main --config=configs/methods/clip.py --workdir=W --config.data.store=STORE

Options: resnet18, mobilenetv2, swin_nano: the small image towers of LightCLIP (arXiv 2312.00674)
and its text tower of 8 layers.

Published: 68.6 % zero-shot on ImageNet for ViT-B/16 after 32 epochs of 400 M private pairs (table
11); we have not reproduced it. Numbers: tables 18 and 19 from memory, and
mlfoundations/open_clip@89fb801 where it has them, file and line beside them.
"""

import functools

import ml_collections

from configs.parts import recipe


def method() -> recipe.Recipe:
  return dict(
    name='clip',
    towers=dict(
      image=dict(
        kind='vit',
        width=768,  # open_clip/model_configs/ViT-B-16.json, as the text tower's sizes
        depth=12,
        heads=12,
        mlp=3072,
        cls=('cls',),
        patch=14,  # departs: not 16, as all our models: their costs compare
        grid=16,
        # CLIP standardizes the pixels; ours start as if they were. departs: no norm before the
        # first block; initial weights of the towers are those of TIPS.
        centered=True,
      ),
      # departs: SentencePiece words, sinusoidal positions, ReLU, all words seen by all, their mean;
      # CLIP has BPE of 49,408, learned positions, GELU, causal attention, the last word.
      text=dict(kind='text', width=512, depth=12, heads=8, mlp=2048, vocab=32_000),
      # section 2.5, both; open_clip/model.py:326, open_clip_train/train.py
      logit=dict(kind='logit', temperature=0.07, max_scale=100.0),
      image_projection=dict(kind='projection', width=768, output=512),
      text_projection=dict(kind='projection', width=512, output=512),
    ),
    passes=dict(
      clean=dict(tower='image', inputs=dict(images='batch.global')),
      text=dict(tower='text', inputs=dict(ids='batch.text')),
      image_embedding=dict(tower='image_projection', inputs=dict(x='clean.cls')),
      text_embedding=dict(tower='text_projection', inputs=dict(x='text.text')),
    ),
    losses=dict(
      contrastive=dict(
        kind='softmax_contrastive',
        inputs=dict(
          images='image_embedding.embedding',
          texts='text_embedding.embedding',
          log_temperature='student.logit.log_temperature',
          valid='batch.text_valid',
        ),
        weight=1.0,
      ),
      spread=dict(kind='spread', inputs=dict(features='clean.cls'), weight=0.0),
    ),
    data=dict(
      views={
        'global': dict(
          size=224,
          count=1,
          # section 2.3: a random square crop; the range is open_clip's (transform.py:64). departs:
          # resized linearly with antialiasing, not bicubically (:438).
          scale=(0.9, 1.0),
          flip=0.0,  # section 2.3: no other augmentation
        )
      },
      texts=dict(text=dict(field='alt_text', fallback='captions')),
    ),
    optimizer=dict(
      kind='adamw',
      learning_rate=5e-4,  # table 19, ViT-B/16; open_clip_train/params.py:9, as b1, b2 and eps
      b1=0.9,
      b2=0.98,
      eps=1e-6,
      weight_decay=0.2,  # params.py:285
      clip_norm=0.0,  # params.py:627: none
      # section 2.5: all weights that are not gains or biases.
      decay_rules=(('.*/(bias|scale|log_temperature)$', 0.0), ('.*', 1.0)),
    ),
    schedule=dict(
      total_steps=390_625,  # 32 epochs of 400 M pairs
      batch_size=32_768,
      warmup_steps=2_000,  # table 18; open_clip_train/scheduler.py:38 counts as ours
      decay='cosine',  # scheduler.py:81
    ),
    compute=dict(remat='products'),  # ours: docs/plans.md
    evals=dict(image_head='image_projection', text_head='text_projection'),
  )


# The towers of LightCLIP. Its parameter counts, 12.51, 2.45 and 7.11 M, are of these with the
# projection to 512: docs/configs.md.
LIGHT = dict(
  resnet18=dict(kind='resnet', pool='attention'),
  mobilenetv2=dict(kind='mobilenetv2', last=768),
  swin_nano=dict(kind='swin'),
)
_WIDTHS = dict(resnet18=512, mobilenetv2=768, swin_nano=384)


def light(base: recipe.Recipe, name: str) -> recipe.Recipe:
  """The recipe with a tower of LIGHT, whose token is `pooled`, and a text tower of 8 layers."""
  towers = base['towers'] | dict(
    image=LIGHT[name],
    image_projection=dict(kind='projection', width=_WIDTHS[name], output=512),
    text=base['towers']['text'] | dict(depth=8),
  )
  spread = base['losses']['spread'] | dict(inputs=dict(features='clean.pooled'))
  return recipe.merge(
    base | dict(towers=towers),
    dict(
      name=f'{base["name"]}_{name}',
      passes=dict(image_embedding=dict(inputs=dict(x='clean.pooled'))),
      losses=dict(spread=spread),
    ),
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  changes = {name: functools.partial(light, name=name) for name in LIGHT}
  return recipe.select(arg, {'': method}, changes=changes)
