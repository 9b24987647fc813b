"""LightCLIP (arXiv 2312.00674) after the paper's description: small towers, softened labels,
patches aligned with words, and masked words.

  python -m tips_jax.main --config=configs/methods/lightclip.py --workdir=W \
    --config.data.store=STORE

Options: resnet18 (the first), mobilenetv2, swin_nano; configs/methods/clip.py has the same towers
without what is new here. There is no official code: what the paper does not say is a choice, and
marked so.
"""

import functools

import ml_collections

from configs.methods import clip
from configs.parts import recipe


def method(image: str) -> recipe.Recipe:
  """The method with an image tower of clip.LIGHT."""
  base = clip.light(clip.method() | dict(name='lightclip'), image)
  guessed = dict(
    kind='masked_words',
    weight=0.05,  # half of the 0.1 of equation 1: equation 15 is the mean of the two
  )
  return recipe.merge(
    base,
    dict(
      towers=dict(
        # choices: 1 x 1 convolutions; both stages in one pass.
        fusion=dict(kind='fusion', widths=_STAGES[image], output=512),
        word_head=dict(kind='word_head', width=512, vocab=32_000),
      ),
      # equations 14 and 15: 15 % of the words, 80 / 10 / 10. <unk> stands for [MASK].
      masks=dict(words=dict(kind='words', text='text', ratio=0.15, hidden=0.8, swapped=0.1)),
      passes=dict(
        masked=dict(tower='text', inputs=dict(ids='masks.words.ids')),
        masked_words=dict(tower='word_head', inputs=_chosen('masked')),
        fusion=dict(
          tower='fusion',
          inputs=dict(stage2='clean.stage2', stage3='clean.stage3', ids='masks.words.ids'),
        ),
        fused=dict(
          tower='text',
          inputs=dict(ids='masks.words.ids', fused2='fusion.fused2', fused3='fusion.fused3'),
        ),
        fused_words=dict(tower='word_head', inputs=_chosen('fused')),
        # choice: patches and words meet in the joint space, by the projections of the contrast.
        patch_embedding=dict(tower='image_projection', inputs=dict(x='clean.patch')),
        word_embedding=dict(tower='text_projection', inputs=dict(x='text.words')),
      ),
      losses=dict(
        contrastive=dict(
          weight=0.8,  # equation 1, as the weight below
          # equations 6 to 9: hard labels, from a third of the run on softened ones (alpha = 0.2),
          # and from two thirds on by similarity. choices: a label sums to one; the shares of the
          # others are their softmax at the contrast's own temperature.
          args=dict(
            negatives=dict(start=0.0, end=0.2, begin=0.33, until=0.33),
            by_similarity=dict(start=0.0, end=1.0, begin=0.66, until=0.66),
          ),
        ),
        alignment=dict(
          kind='token_alignment',  # equations 10 to 13; choice: the mean over the pairs
          inputs=dict(
            patches='patch_embedding.embedding',
            words='word_embedding.embedding',
            ids='batch.text',
            valid='batch.text_valid',
          ),
          weight=0.1,
          args=dict(every_n_steps=1),
        ),
        masked_words=guessed | dict(inputs=_guessed('masked_words')),
        fused_words=guessed | dict(inputs=_guessed('fused_words')),
      ),
      data=dict(
        views={
          # As MoCo and SimCLR; the numbers are those of DeCLIP, whose setting the paper follows.
          'global': dict(
            scale=(0.2, 1.0),
            flip=0.5,
            jitter=0.8,
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.1,
            gray=0.2,
            blur=0.5,
          )
        },
        # EDA, as DeCLIP: one of three ways a text. choices: every text, a tenth of its words.
        # Synonyms need a list: --config.data.texts.text.synonyms=FILE.
        texts=dict(text=dict(augment=1.0, change=0.1)),
        text_length=77,
      ),
      optimizer=dict(weight_decay=0.1),
      schedule=dict(
        # 32 epochs of 15,255,632 pairs; the batch size is not given. choice: 4,096.
        total_steps=119_185,
        batch_size=4_096,
        warmup_steps=5_959,  # 5 %
      ),
    ),
  )


# Channels of stages 2 and 3.
_STAGES = dict(resnet18=(128, 256), mobilenetv2=(32, 96), swin_nano=(96, 192))


def _chosen(words: str) -> recipe.Recipe:
  return dict(words=f'{words}.words', masked_indices='masks.words.masked_indices')


def _guessed(head: str) -> recipe.Recipe:
  return dict(
    tokens=f'{head}.tokens',
    targets='masks.words.targets',
    valid='masks.words.masked_valid',
    kernel='student.word_head.kernel',
    bias='student.word_head.bias',
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return recipe.select(arg, {name: functools.partial(method, name) for name in clip.LIGHT})
