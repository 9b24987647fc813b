"""The towers of the schema."""

from typing import Annotated, Literal

from tips_jax.core.errors import InputError
from tips_jax.core.ranges import (
  Decay,
  Drop,
  Entries,
  Factor,
  Grid,
  Layers,
  Patch,
  Width,
  config,
  divides,
  has_sines,
)
from tips_jax.core.strict import Range


@config
class Reduction:
  """Patches merged to fewer tokens inside of a tower (UMG-CLIP, arXiv 2401.06397, which takes it
  from AiluRus): models/clusters.py. The paper says a quarter; all else here is ours.
  """

  keep: Annotated[float, Range(1e-3, 1)] = (
    1.0  # share of the patches that stay; 1: off; paper: 0.25
  )
  after: Layers = 4  # blocks that see all patches; the paper: an intermediate layer
  neighbors: Annotated[int, Range(1, 1024)] = 5  # of which a patch's density is told
  # Squared distance in the image, in patches, that counts as much as one of the features (mean
  # square of their differences), times this; AiluRus weighs both, its numbers are not known.
  spatial: Factor = 0.0


@config
class Adapters:
  """Small branches beside the attention and the MLP of each block, zero at the start, to adapt a
  tower whose own weights are frozen (Convpass, arXiv 2207.07039, as UMG-CLIP takes it): `Convpass`
  in models/adapters.py.
  """

  width: Annotated[int, Range(0, 1024)] = 0  # channels of a branch; 0: none; paper: 8
  scale: Factor = 0.1  # of what a branch adds
  dropout: Drop = 0.1


@config
class ViT:
  """Image tower. TIPS: two CLS tokens, the first for web captions, the second for synthetic
  ones.
  """

  kind: Literal['vit']
  width: Width
  depth: Layers
  heads: Width
  mlp: Width  # hidden width of the feed-forward layer
  ffn: Literal['gelu', 'swiglu'] = 'gelu'
  patch: Patch = 14
  grid: Grid = 16  # side of the position table, in patches
  cls: tuple[str, ...] = ('web', 'synthetic')  # names of the CLS tokens
  mask_token: bool = False
  centered: bool = False  # initial weights take pixels as (x - 1/2) * 4; else as x (official)
  positions: Literal['normal', 'sincos'] = 'normal'  # the table at the start; see MAE's for fixed
  layer_scale: Factor = 0.0  # gain of each residual branch at the start; 0: no such parameters
  last_layer_scale: Factor = 0.0  # the same of the last block; 0: as the others
  drop_path: Drop = 0.0  # share of the crops that skip a residual branch, alike in all blocks
  reduce: Reduction = Reduction()
  adapters: Adapters = Adapters()

  def __post_init__(self):
    divides('heads', self.heads, 'width', self.width)
    if self.reduce.keep < 1 and self.adapters.width:
      raise InputError(
        f'adapters.width: got {self.adapters.width} with reduce.keep={self.reduce.keep}; expected '
        'one of them: merged patches have no grid to convolve'
      )
    if self.reduce.keep < 1 and self.reduce.after >= self.depth:
      raise InputError(
        f'reduce.after: got {self.reduce.after}; expected less than the depth {self.depth}'
      )
    if self.last_layer_scale and not self.layer_scale:
      raise InputError(
        f'last_layer_scale: got {self.last_layer_scale} with layer_scale 0, which has no such '
        'parameters; expected both'
      )
    has_sines(self.positions, self.width)
    if not self.cls or len({*self.cls, 'patch'}) != len(self.cls) + 1:
      raise InputError(f"cls: got {self.cls}; expected different names, and none of them 'patch'")


# Image towers of four stages, at strides 4, 8, 16 and 32. Their patches are the last stage's, and
# their one token is those patches pooled.


class _Stages:
  patch = 32  # pixels of a patch
  cls = ('pooled',)
  grid = 7  # patches of a side at 224 pixels, for which they are built


Four = tuple[Width, Width, Width, Width]  # a number for each stage


@config
class ResNet(_Stages):
  """ResNet of basic blocks (arXiv 1512.03385, table 1; the defaults are ResNet-18)."""

  kind: Literal['resnet']
  widths: Four = (64, 128, 256, 512)
  depths: Four = (2, 2, 2, 2)  # blocks
  # Mean of the patches, or one attention whose query is their mean (CLIP, arXiv 2103.00020, 2.4).
  pool: Literal['mean', 'attention'] = 'mean'
  grid: Grid = 7  # side of the position table of that attention
  momentum: Decay = 0.9  # of the running statistics: the share that a step keeps

  @property
  def width(self) -> int:
    return self.widths[-1]


@config
class MobileNetV2(_Stages):
  """MobileNetV2 (arXiv 1801.04381, table 2): inverted residuals of seven widths, in four stages."""

  kind: Literal['mobilenetv2']
  stem: Width = 32
  widths: tuple[Width, Width, Width, Width, Width, Width, Width] = (16, 24, 32, 64, 96, 160, 320)
  depths: tuple[Layers, Layers, Layers, Layers, Layers, Layers, Layers] = (1, 2, 3, 4, 3, 3, 1)
  expansion: Annotated[int, Range(1, 64)] = 6  # hidden channels of a block, times its input's
  last: Width = 1280  # channels of the last convolution
  momentum: Decay = 0.9  # as in ResNet

  @property
  def width(self) -> int:
    return self.last


@config
class Swin(_Stages):
  """Swin (arXiv 2103.14030): attention in shifted windows; the width doubles from stage to
  stage.
  """

  kind: Literal['swin']
  embedding: Width = 48  # of the first stage
  depths: Four = (2, 2, 6, 2)  # blocks
  head_width: Width = 16
  mlp_ratio: Annotated[int, Range(1, 64)] = 4
  window: Annotated[int, Range(1, 64)] = 7  # patches of a side

  def __post_init__(self):
    divides('head_width', self.head_width, 'embedding', self.embedding)

  @property
  def width(self) -> int:
    return 8 * self.embedding


@config
class TextTower:
  """Text tower: bidirectional transformer, ReLU, mean over the tokens."""

  kind: Literal['text']
  width: Width
  depth: Layers
  heads: Width
  mlp: Width
  vocab: Entries = 32000
  dropout: Drop = 0.0

  def __post_init__(self):
    if self.width % 2:
      raise InputError(f'width: got {self.width}; expected an even number: half are sines')
    divides('heads', self.heads, 'width', self.width)


@config
class DINOHead:
  """DINO head: MLP, bottleneck on the unit sphere, and weight-normalized prototypes."""

  kind: Literal['dino_head']
  width: Width  # of the tokens that come in
  hidden: Width = 2048
  bottleneck: Width = 256
  layers: Annotated[int, Range(1, 16)] = 3
  prototypes: Entries = 32768


@config
class ProjectionHead:
  """Linear projection into a joint space (CLIP)."""

  kind: Literal['projection']
  width: Width
  output: Width


@config
class Fusion:
  """Adds what an image shows to the words of a text, between the stages of a text tower."""

  kind: Literal['fusion']
  widths: tuple[Width, Width]  # of the image tower's stages 2 and 3
  output: Width  # of the text tower


@config
class WordHead:
  """Which word of the vocabulary a token is: one linear layer, whose logits the loss forms."""

  kind: Literal['word_head']
  width: Width
  vocab: Entries = 32000


@config
class RegionHead:
  """RoIAlign of patch features and a linear projection into a joint space (UMG-CLIP)."""

  kind: Literal['region_head']
  width: Width
  output: Width
  samples: Annotated[int, Range(1, 64)] = 14  # points a side of a box, whose mean is its feature


@config
class PixelDecoder:
  """MAE decoder: a narrow ViT over visible tokens and mask tokens, to the pixels of each patch."""

  kind: Literal['pixel_decoder']
  width: Width
  decoder_width: Width = 512
  depth: Layers = 8
  heads: Width = 16
  mlp: Width = 2048
  patch: Patch = 14
  grid: Grid = 16
  positions: Literal['normal', 'sincos'] = 'normal'  # as in ViT

  def __post_init__(self):
    divides('heads', self.heads, 'decoder width', self.decoder_width)
    has_sines(self.positions, self.decoder_width)


@config
class Logit:
  """Learned scale (kept as log temperature) and bias of a contrastive loss."""

  kind: Literal['logit']
  temperature: Annotated[float, Range(1e-4, 1e4)] = 0.07  # at initialization
  max_scale: Annotated[float, Range(0, 1e4)] = 0.0  # of 1 / temperature after updates; 0: none
  bias: Annotated[float | None, Range(-1e4, 1e4)] = None  # SigLIP: -10


ImageTower = ViT | ResNet | MobileNetV2 | Swin
Tower = (
  ImageTower
  | TextTower
  | DINOHead
  | ProjectionHead
  | RegionHead
  | Fusion
  | WordHead
  | PixelDecoder
  | Logit
)
