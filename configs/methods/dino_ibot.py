"""DINO + iBOT ViT-B/14 as DINOv2 (arXiv 2304.07193) trains its large models: images alone.

  python -m tips_jax.main --config=configs/methods/dino_ibot.py --workdir=W \
    --config.data.store=STORE

Published: DINOv2 trains ViT-g (and L) from scratch and distills its ViT-B/14 (82.1 % k-NN on
ImageNet), so no published run is this one. Numbers: facebookresearch/dinov2@b8931f7,
configs/train/vitl14.yaml (L) over configs/ssl_default_config.yaml (S), line beside them.

Departs in every tower, as in all our methods: GELU in its tanh form, initial weights of TIPS.
"""

import ml_collections

from configs.parts import recipe

COLOR = dict(  # data/augmentations.py:66
  jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2
)


def method() -> recipe.Recipe:
  head = dict(
    kind='dino_head',
    width=768,
    hidden=2048,  # S:48
    bottleneck=384,  # L:3
    layers=3,  # S:47
    # L:2, L:6. departs: of length one, as DINO's; DINOv2 learns the lengths (dino_head.py:27).
    prototypes=131_072,
  )
  args = dict(
    student_temperature=0.1,  # dino_clstoken_loss.py:15
    teacher_temperature=dict(start=0.04, end=0.07, until=0.06),  # S:89 to 91, 30 of 500 epochs
    centering='sinkhorn',  # L:10
    sinkhorn_iterations=3,  # dino_clstoken_loss.py:34
    reduction='mean',
  )
  cls_prototypes = dict(
    student_prototypes='student.head.prototypes', teacher_prototypes='ema.head.prototypes'
  )
  masked = 'masks.blocks.masked_indices'
  return dict(
    name='dino_ibot',
    towers=dict(
      image=dict(
        kind='vit',
        width=768,
        depth=12,
        heads=12,
        mlp=2048,  # swiglu_ffn.py:66: two thirds of 3,072
        ffn='swiglu',  # L:15
        cls=('cls',),
        mask_token=True,
        patch=14,  # L:13
        grid=16,
        layer_scale=1e-5,  # S:75
        # L:14, the same in all blocks (S:76). departs: each crop by itself; DINOv2 drops exactly
        # this share of a batch, and saves its computation (layers/block.py:173).
        drop_path=0.4,
        centered=True,  # DINOv2 standardizes the pixels; ours start as if they were
      ),
      head=head,
      patch_head=head,  # L:5
    ),
    # S:52 to 55. The head computes as many slots as the largest mask has patches, half of them;
    # DINOv2 packs the masked patches of a device instead. The loss is the same.
    masks=dict(blocks=dict(kind='blocks', view='global', ratio=(0.1, 0.5), probability=0.5)),
    passes=dict(
      masked=dict(tower='image', inputs=dict(images='batch.global', mask='masks.blocks.mask')),
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
      # The 2 pairs of global crops and the 16 of local with global ones weigh the same
      # (ssl_meta_arch.py:282, 303).
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
          valid='masks.blocks.masked_valid',
        ),
        weight=1.0,  # S:51
        args=args | dict(pairing='same', packed=1),
      ),
      koleo=dict(
        kind='koleo',
        inputs=dict(features='masked.cls'),
        weight=0.1,  # S:49, summed over the two crops (ssl_meta_arch.py:314)
        args=dict(group=32),  # L:8: the images of one GPU
      ),
      spread=dict(kind='spread', inputs=dict(features='masked.cls'), weight=0.0),
    ),
    teachers=dict(
      ema=dict(
        kind='ema',
        towers=('image', 'head', 'patch_head'),
        momentum=dict(start=0.994, end=1.0, shape='cosine'),  # L:18, S:88
      )
    ),
    data=dict(
      views={
        # S:107 to 116, L:26, data/augmentations.py:66 to 82. departs: resized linearly with
        # antialiasing, not bicubically.
        'global': dict(
          size=224,
          count=2,
          scale=(0.32, 1.0),
          flip=0.5,
          **COLOR,
          # Of the first and the second crop. The code says 1 and 0.1 and does 1 minus that
          # (data/transforms.py:21); the released models were trained so (dinov3#342).
          blur=(0.0, 0.9),
          solarize=(0.0, 0.2),
        ),
        'local': dict(size=98, count=8, scale=(0.05, 0.32), flip=0.5, **COLOR, blur=0.5),
      }
    ),
    optimizer=dict(
      kind='adamw',
      learning_rate=2e-4 * 3**0.5,  # L:22, S:102: 2e-4 at 1,024 images, times sqrt(3,072 / 1,024)
      final_rate=1e-6,  # S:99
      b1=0.9,  # S:105
      b2=0.999,  # S:106
      eps=1e-8,  # torch's default
      weight_decay=dict(start=0.04, end=0.2, shape='cosine'),  # S:94, L:21
      clip_norm=3.0,  # S:100
      clip_by='tower',  # train/train.py:252
      decay_rules=(('.*/(bias|scale|gamma)$', 0.0), ('.*', 1.0)),  # utils/param_groups.py:80
      lr_rules=(('image/embedding/.*', 0.2), ('.*', 1.0)),  # S:103
      layer_decay_rules=(('.*', 1.0),),  # L:24; 0.9 in S
      freeze_rules=(('.*/prototypes', 0.002), ('.*', 0.0)),  # S:101, 1 of 500 epochs
    ),
    schedule=dict(
      total_steps=625_000,  # L:20, S:68: 500 "epochs" of 1,250
      batch_size=3_072,  # L:8: 32 on each of 96 GPUs (README.md:501)
      warmup_steps=100_000,  # L:23: 80 epochs. departs: counted from one; DINOv2's first rate is 0
      decay='cosine',  # utils/utils.py:77
    ),
    compute=dict(remat='products'),  # ours: docs/plans.md
    evals=dict(encoder='ema'),
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return recipe.finish(method(), arg)
