"""Sizes of the towers: one row per scale of the papers (TIPS README; TIPSv2, table 16), and one for
a laptop.
"""

SCALES = {
  # name: width, depth, heads, image mlp, ffn, text depth, text mlp
  'tiny': (32, 2, 2, 64, 'gelu', 2, 64),
  'quick': (128, 4, 4, 384, 'gelu', 2, 384),
  's': (384, 12, 6, 1536, 'gelu', 12, 1536),
  'b': (768, 12, 12, 3072, 'gelu', 12, 3072),
  'l': (1024, 24, 16, 4096, 'gelu', 12, 4096),
  'so400m': (1152, 27, 16, 4304, 'gelu', 27, 4304),
  'g': (1536, 40, 24, 4096, 'swiglu', 12, 6144),
}


def image(scale, *, cls=('web', 'synthetic'), grid=16, mask_token=False, patch=14):
  width, depth, heads, mlp, ffn, _, _ = SCALES[scale]
  return dict(
    kind='vit',
    width=width,
    depth=depth,
    heads=heads,
    mlp=mlp,
    ffn=ffn,
    patch=patch,
    grid=grid,
    cls=cls,
    mask_token=mask_token,
  )


def text(scale, *, vocab=32000):
  width, _, heads, _, _, depth, mlp = SCALES[scale]
  return dict(kind='text', width=width, depth=depth, heads=heads, mlp=mlp, vocab=vocab)


def width(scale):
  return SCALES[scale][0]


def compute(scale):
  """What only a matrix product could bring back is kept; see docs/plans.md for where that does not
  fit.
  """
  return dict(remat='none' if scale in ('tiny', 'quick') else 'products')


def mesh(scale):
  """Weights of the large towers are spread over devices, up to 32; the rest are replicas."""
  return dict(data=-1, fsdp=-1) if scale in ('l', 'so400m', 'g') else dict()
