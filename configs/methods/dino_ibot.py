"""DINO + iBOT ViT-B/14 as DINOv2 (arXiv 2304.07193) trains its large models: images alone.

  python -m tips_jax.main --config=configs/methods/dino_ibot.py --workdir=W \
    --config.data.store=STORE

Published: DINOv2 trains ViT-g (and L) from scratch and distills its ViT-B/14 (82.1 % k-NN on
ImageNet), so no published run is this one. Numbers: facebookresearch/dinov2,
configs/train/vitl14.yaml over ssl_default_config.yaml, which as ours has no layer decay.
"""

import ml_collections

from configs.parts import recipe


def method() -> recipe.Recipe:
  head = dict(
    kind='dino_head', width=768, hidden=2048, bottleneck=384, layers=3, prototypes=131_072
  )
  args = dict(
    student_temperature=0.1,
    teacher_temperature=dict(start=0.04, end=0.07, until=0.06),  # 30 of 500 epochs
    centering='sinkhorn',
    sinkhorn_iterations=3,
  )
  cls_prototypes = dict(
    student_prototypes='student.head.prototypes', teacher_prototypes='ema.head.prototypes'
  )
  masked = 'masks.random.masked_indices'
  return dict(
    name='dino_ibot',
    towers=dict(
      # departs: no LayerScale, no stochastic depth (0.4), a GELU layer instead of SwiGLU.
      image=dict(
        kind='vit',
        width=768,
        depth=12,
        heads=12,
        mlp=3072,
        cls=('cls',),
        mask_token=True,
        patch=14,
        grid=16,
      ),
      head=head,
      patch_head=head,  # ibot.separate_head
    ),
    # departs: random patches at one ratio in every crop; DINOv2 masks blocks, 10 to 50 % of them,
    # in half of the crops. 0.3 is the mean of its range.
    masks=dict(random=dict(view='global', ratio=0.3)),
    passes=dict(
      masked=dict(tower='image', inputs=dict(images='batch.global', mask='masks.random.mask')),
      local=dict(tower='image', inputs=dict(images='batch.local')),
      teacher=dict(by='ema', tower='image', inputs=dict(images='batch.global')),
      student_global=dict(tower='head', inputs=dict(tokens='masked.cls')),
      student_local=dict(tower='head', inputs=dict(tokens='local.cls')),
      student_patch=dict(
        tower='patch_head', inputs=dict(tokens='masked.patch', masked_indices=masked)
      ),
      teacher_cls=dict(by='ema', tower='head', inputs=dict(tokens='teacher.cls')),
      teacher_patch=dict(
        by='ema', tower='patch_head', inputs=dict(tokens='teacher.patch', masked_indices=masked)
      ),
    ),
    losses=dict(
      # The 2 pairs of global crops and the 16 of local with global ones weigh the same.
      distill_global=dict(
        kind='dino',
        inputs=dict(student='student_global.z', teacher='teacher_cls.z') | cls_prototypes,
        weight=2 / 18,
        args=args | dict(pairing='other'),
      ),
      distill_local=dict(
        kind='dino',
        inputs=dict(student='student_local.z', teacher='teacher_cls.z') | cls_prototypes,
        weight=16 / 18,
        args=args | dict(pairing='all'),
      ),
      masked=dict(
        kind='dino',
        inputs=dict(
          student='student_patch.z',
          teacher='teacher_patch.z',
          student_prototypes='student.patch_head.prototypes',
          teacher_prototypes='ema.patch_head.prototypes',
        ),
        weight=1.0,
        args=args | dict(pairing='same'),
      ),
      # departs: DINOv2 adds 0.1 KoLeo on the CLS tokens; this only watches for collapse.
      spread=dict(kind='spread', inputs=dict(features='masked.cls'), weight=0.0),
    ),
    teachers=dict(
      ema=dict(
        kind='ema',
        towers=('image', 'head', 'patch_head'),
        momentum=dict(start=0.994, end=1.0, shape='cosine'),
      )
    ),
    data=dict(
      views={
        # departs: DINOv2 adds color jitter, gray, blur and solarization.
        'global': dict(size=224, count=2, scale=(0.32, 1.0), flip=0.5),
        'local': dict(size=98, count=8, scale=(0.05, 0.32), flip=0.5),
      }
    ),
    optimizer=dict(
      kind='adamw',
      learning_rate=3.46e-4,  # 2e-4 at 1,024 images, times sqrt(3,072 / 1,024)
      b1=0.9,
      b2=0.999,
      eps=1e-8,
      weight_decay=0.04,  # departs: DINOv2 raises it to 0.2 by a cosine
      clip_norm=3.0,  # departs: of all towers at once; DINOv2 clips each
      decay_rules=(('.*/(bias|scale)$', 0.0), ('.*', 1.0)),
      lr_rules=(('image/embedding/.*', 0.2), ('.*', 1.0)),  # patch_embed_lr_mult
      freeze_rules=(('.*/prototypes', 0.002), ('.*', 0.0)),  # 1 of 500 epochs
    ),
    schedule=dict(
      total_steps=625_000,  # 500 "epochs" of 1,250
      batch_size=3_072,  # 32 on each of 96 GPUs (README: 12 nodes)
      warmup_steps=100_000,  # 80 epochs
      decay='cosine',  # departs: to 0, not 1e-6
    ),
    compute=dict(remat='products'),  # ours: docs/plans.md
    evals=dict(encoder='ema'),
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return recipe.finish(method(), arg)
