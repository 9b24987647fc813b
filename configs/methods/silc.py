"""SILC ViT-B/14 (arXiv 2310.13355): CLIP, and DINO from local crops to global ones.

  python -m tips_jax.main --config=configs/methods/silc.py --workdir=W --config.data.store=STORE

There is no public code. Crops and the constant momentum are the paper's, as cited by others; what
is marked ours is not known to be. We have not reproduced its results.
"""

import ml_collections

from configs.parts import recipe


def method() -> recipe.Recipe:
  return dict(
    name='silc',
    towers=dict(
      image=dict(
        kind='vit', width=768, depth=12, heads=12, mlp=3072, cls=('cls',), patch=14, grid=16
      ),  # departs: patches of 14 pixels, not 16, as all our models: their costs compare
      text=dict(
        kind='text', width=768, depth=12, heads=12, mlp=3072, vocab=32_000
      ),  # ours: as TIPS
      logit=dict(kind='logit', temperature=0.07, max_scale=100.0),  # ours: CLIP's
      image_projection=dict(kind='projection', width=768, output=512),
      text_projection=dict(kind='projection', width=768, output=512),
      head=dict(
        kind='dino_head', width=768, hidden=2048, bottleneck=256, layers=3, prototypes=65_536
      ),  # ours: DINO's
    ),
    passes=dict(
      clean=dict(tower='image', inputs=dict(images='batch.global')),
      text=dict(tower='text', inputs=dict(ids='batch.text')),
      image_embedding=dict(tower='image_projection', inputs=dict(x='clean.cls')),
      text_embedding=dict(tower='text_projection', inputs=dict(x='text.text')),
      local=dict(tower='image', inputs=dict(images='batch.local')),
      teacher=dict(by='ema', tower='image', inputs=dict(images='batch.global')),
      student_cls=dict(tower='head', inputs=dict(tokens='local.cls')),
      teacher_cls=dict(by='ema', tower='head', inputs=dict(tokens='teacher.cls')),
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
      distill=dict(
        kind='dino',
        inputs=dict(
          student='student_cls.z',
          teacher='teacher_cls.z',
          student_prototypes='student.head.prototypes',
          teacher_prototypes='ema.head.prototypes',
        ),
        weight=1.0,
        args=dict(
          pairing='all',
          reduction='mean',
          student_temperature=0.1,  # ours, as the three below: DINO's
          teacher_temperature=dict(start=0.04, end=0.07, until=0.1),
          centering='ema',
          center_momentum=0.9,
        ),
      ),
      spread=dict(kind='spread', inputs=dict(features='clean.cls'), weight=0.0),
    ),
    # Constant: a momentum that goes to 1 stops the teacher from learning of texts; 0.996 is ours,
    # where DINO starts.
    teachers=dict(ema=dict(kind='ema', towers=('image', 'head'), momentum=0.996)),
    data=dict(
      views={
        'global': dict(size=224, count=2, scale=(0.4, 1.0), flip=0.5),
        'local': dict(
          size=98,  # departs: 96 does not divide by 14
          count=8,
          scale=(0.05, 0.4),
          flip=0.5,
        ),
      },
      texts=dict(text=dict(field='alt_text', fallback='captions')),
    ),
    optimizer=dict(
      kind='adamw',  # ours, as all below: no source at hand
      learning_rate=5e-4,
      b1=0.9,
      b2=0.999,
      eps=1e-8,
      weight_decay=0.01,
      clip_norm=1.0,
    ),
    schedule=dict(
      total_steps=100_000,  # ours, as all below
      batch_size=16_384,
      warmup_steps=2_000,
      decay='linear',
    ),
    compute=dict(remat='products'),  # ours: docs/plans.md
    evals=dict(image_head='image_projection', text_head='text_projection'),
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return recipe.finish(method(), arg)
