"""What the small configs share (quickstart, laptop, ablation): towers, weights and optimizer for
some ten thousand images on a CPU. Every number is ours, found by the trials of docs/lab.md.
"""

from configs.parts import recipe

IMAGE = dict(
  width=96,
  depth=4,
  heads=3,
  mlp=384,
  ffn='gelu',
  # 64 tokens of 8 pixels: an object of a scene covers several, and three quarters of them can be
  # masked and still be guessed.
  patch=8,
  grid=8,
  centered=True,
  # Without it attention makes the patches of an image nearly one, and a prototype of a patch is a
  # prototype of its image. The last block may bring into each patch what the image is of: then
  # masks and texts find patches best (docs/lab.md has the other gains).
  layer_scale=0.3,
  last_layer_scale=1.0,
)
TEXT = dict(width=96, depth=2, heads=3, mlp=384)
# Sinkhorn hands every prototype as many tokens of a batch. Of 128, each gets 24 masked patches and
# half a CLS token; of 1,024 it was noise. In 32 dimensions random prototypes are 0.18 apart (in 64:
# 0.12), so that targets at temperature 0.04 are sharp from the start.
HEAD = dict(width=96, hidden=256, bottleneck=32, prototypes=128)
METHOD = dict(
  mask_ratio=0.75,
  temperature=0.07,
  # The published 0.5, 1 and 2 take most of a step from the contrast, which is what learns first.
  weights=dict(contrastive=0.5, distill=0.5, masked=0.5),
  # An EMA center lags, and soft targets turn uniform, in so few steps.
  dino=dict(teacher_temperature=0.04, centering='sinkhorn'),
  # The mean of the last 100 steps. A momentum that rises to 1 would end the teacher's learning
  # halfway (SILC, arXiv 2310.13355).
  momentum=0.99,
)
OPTIMIZER = dict(
  kind='muon',
  learning_rate=2e-3,
  weight_decay=0.05,
  clip_by='tower',  # in one norm the prototype terms would crowd out the text tower
  freeze_rules=(('.*/prototypes', 0.01), ('.*', 0.0)),
)


def views(*, flip: float) -> recipe.Recipe:
  """One global and two local crops of 64 and 16 patches."""
  return {
    # From 0.7 on, not 0.4: captions name the one object, which a smaller crop may lose.
    'global': dict(size=64, count=1, scale=(0.7, 1.0), flip=flip),
    'local': dict(size=32, count=2, scale=(0.05, 0.4), flip=0.0),
  }
