"""UMG-CLIP (arXiv 2401.06397), after the paper's description: captions and tags of images and of
their regions, all through one text tower.

  python -m tips_jax.main --config=configs/methods/umg_clip.py:b16 --workdir=W \
    --config.data.store=STORE

SIZE is `b16` (default), `l14` or `e14`; with `,reduced` a third of the blocks sees all patches and
the others a quarter of them, merged, as in the paper, which names no block. The store has boxes,
region_captions, region_tags and tags (docs/data.md). There is no official training code, and the
paper leaves open what `# ours` marks below: alpha and beta, what Smooth L1 is taken of, RoIAlign's
size, the batch. Not here: UMG-41M itself, the weights of EVA-CLIP that the authors start from,
FC-CLIP's decoder.
"""

import ml_collections

from configs.parts import recipe

# EVA-CLIP's towers, which section 4.1 starts from; from memory of its configs. departs: no rotary
# positions, no norms inside of attention and MLP.
_SIZES = {
  'b16': dict(
    image=dict(width=768, depth=12, heads=12, mlp=2048, ffn='swiglu', patch=16, grid=14),
    text=dict(width=512, depth=12, heads=8, mlp=2048),
    rate=2e-4,  # EVA-CLIP's README: image towers; text towers a tenth
    layer_decay=0.75,
    epochs=10,  # section 4.1
  ),
  'l14': dict(
    image=dict(width=1024, depth=24, heads=16, mlp=2730, ffn='swiglu', patch=14, grid=16),
    text=dict(width=768, depth=12, heads=12, mlp=3072),
    rate=4e-4,
    layer_decay=0.85,
    epochs=10,
  ),
  'e14': dict(
    image=dict(width=1792, depth=64, heads=16, mlp=15360, ffn='gelu', patch=14, grid=16),
    text=dict(width=1024, depth=24, heads=16, mlp=4096),
    rate=4e-4,
    layer_decay=0.9,
    epochs=6,
  ),
}
_IMAGES = 41_410_000  # of UMG-41M
_BATCH = 16_384  # ours
_ALPHA = 1.0  # ours: of the terms of images
_BETA = 1.0  # ours: of the terms of regions
_TAGS = dict(target='multihot', beta=1.0)  # ours; 'pair' is the other reading


def method(size: str) -> recipe.Recipe:
  sizes = _SIZES[size]
  width = sizes['image']['width']
  joint = sizes['text']['width']
  return dict(
    name=f'umg_clip_{size}',
    towers=dict(
      image=dict(kind='vit', cls=('cls',), centered=True) | sizes['image'],
      # departs: SentencePiece words, sinusoidal positions, ReLU, the mean of the words (clip.py).
      text=dict(kind='text', vocab=32_000) | sizes['text'],
      logit=dict(kind='logit', temperature=0.07, max_scale=100.0),
      image_projection=dict(kind='projection', width=width, output=joint),
      text_projection=dict(kind='projection', width=joint, output=joint),
      region_projection=dict(kind='region_head', width=width, output=joint, samples=14),
    ),
    passes=dict(
      clean=dict(tower='image', inputs=dict(images='batch.global')),
      caption=dict(tower='text', inputs=dict(ids='batch.caption')),
      tag=dict(tower='text', inputs=dict(ids='batch.tags')),
      region_caption=dict(tower='text', inputs=dict(ids='batch.region_captions')),
      region_tag=dict(tower='text', inputs=dict(ids='batch.region_tags')),
      image_embedding=dict(tower='image_projection', inputs=dict(x='clean.cls')),
      region_embedding=dict(
        tower='region_projection', inputs=dict(patch='clean.patch', boxes='batch.boxes')
      ),
      caption_embedding=dict(tower='text_projection', inputs=dict(x='caption.text')),
      tag_embedding=dict(tower='text_projection', inputs=dict(x='tag.text')),
      region_caption_embedding=dict(tower='text_projection', inputs=dict(x='region_caption.text')),
      region_tag_embedding=dict(tower='text_projection', inputs=dict(x='region_tag.text')),
    ),
    losses=dict(
      caption=dict(
        kind='softmax_contrastive',
        inputs=dict(
          images='image_embedding.embedding',
          texts='caption_embedding.embedding',
          log_temperature='student.logit.log_temperature',
          valid='batch.caption_valid',
        ),
        weight=_ALPHA,
      ),
      tag=dict(
        kind='tags',
        inputs=dict(
          images='image_embedding.embedding',
          texts='tag_embedding.embedding',
          ids='batch.tags',
          valid='batch.tags_valid',
        ),
        weight=_ALPHA,
        args=_TAGS,
      ),
      region_caption=dict(
        kind='region_contrastive',
        inputs=dict(
          regions='region_embedding.embedding',
          texts='region_caption_embedding.embedding',
          log_temperature='student.logit.log_temperature',
          valid='batch.region_captions_valid',
        ),
        weight=_BETA,
      ),
      region_tag=dict(
        kind='tags',
        inputs=dict(
          images='region_embedding.embedding',
          texts='region_tag_embedding.embedding',
          ids='batch.region_tags',
          valid='batch.region_tags_valid',
        ),
        weight=_BETA,
        args=_TAGS,
      ),
      spread=dict(kind='spread', inputs=dict(features='clean.cls'), weight=0.0),
    ),
    data=dict(
      # ours: as CLIP's; the paper's resolution is not known. Captions may say left and right.
      views={'global': dict(size=224, count=1, scale=(0.9, 1.0), flip=0.0)},
      text_length=32,  # ours: captions have 8 to 11 words on average (section 3)
      texts=dict(caption=dict(field='captions', pick='random', fallback='alt_text')),
      tags=dict(tags=dict(field='tags', count=8, length=8)),  # ours
      regions=dict(
        view='global',
        count=8,  # ours: an image of UMG-41M has 9.4
        least=0.5,  # ours
        texts=dict(
          # ours: of four and more, of 5.85 words on average. What is padded costs as much as words.
          region_captions=dict(field='region_captions', count=2, length=16),
          region_tags=dict(field='region_tags', count=1, length=8),
        ),
      ),
    ),
    optimizer=dict(
      kind='lamb',  # section 4.1; its numbers are those of EVA-CLIP's README
      learning_rate=sizes['rate'],
      b1=0.9,
      b2=0.98,
      eps=1e-6,
      weight_decay=0.05,
      clip_norm=5.0,
      decay_rules=(('.*/(bias|scale|log_temperature)$', 0.0), ('.*', 1.0)),
      lr_rules=(('text.*', 0.1), ('.*', 1.0)),
      layer_decay_rules=(('text/.*', 0.75), ('.*', sizes['layer_decay'])),
    ),
    schedule=dict(
      total_steps=steps(sizes['epochs']),
      batch_size=_BATCH,
      warmup_steps=2_000,
      decay='cosine',
    ),
    compute=dict(remat='products'),  # ours: docs/plans.md
    evals=dict(
      image_head='image_projection', text_head='text_projection', region_head='region_projection'
    ),
  )


def steps(epochs: int) -> int:
  """Of so many epochs of UMG-41M."""
  return round(epochs * _IMAGES / _BATCH)


def reduced(base: recipe.Recipe) -> recipe.Recipe:
  """The recipe with three quarters of the patches merged."""
  depth = base['towers']['image']['depth']
  return recipe.merge(
    base,
    dict(
      name=f'{base["name"]}_reduced',
      towers=dict(image=dict(reduce=dict(keep=0.25, after=depth // 3))),
    ),
  )


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  recipes = {size: (lambda size=size: method(size)) for size in _SIZES}
  return recipe.select(arg, recipes, changes={'reduced': reduced})
