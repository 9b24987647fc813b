"""The schema of an experiment: every field a config may hold, its type and its default.

Config files are plain ml_collections data. They pass one door, `strict.build(Config, data)`, and
come out as these frozen dataclasses; unknown, missing and mistyped fields are errors there.
"""

import dataclasses
from typing import Literal


def config(cls: type) -> type:
  """A frozen, keyword-only dataclass."""
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@config
class Ramp:
  """A value that moves from `start` to `end` between fractions `begin` and `until` of a run."""

  start: float
  end: float
  begin: float = 0.0
  until: float = 1.0
  shape: Literal['linear', 'cosine'] = 'linear'


# --- data ---------------------------------------------------------------------------------------


@config
class View:
  """Random-resized crops of one size, `count` of them per image."""

  size: int  # pixels, the crop is square
  count: int = 1
  scale: tuple[float, float] = (0.4, 1.0)  # share of the image area
  ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
  flip: float = 0.5  # probability of a horizontal flip
  # Color, in this order (data/color.py). Blur and solarize: one number, or one for each crop.
  jitter: float = 0.0  # probability of the four below, in random order
  brightness: float = 0.4  # times 1 - it to 1 + it, as contrast and saturation
  contrast: float = 0.4
  saturation: float = 0.2
  hue: float = 0.1  # turned by at most this share of the color circle
  gray: float = 0.0  # probability
  blur: float | tuple[float, ...] = 0.0  # probability
  blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
  solarize: float | tuple[float, ...] = 0.0  # probability that bytes from 128 are inverted


@config
class Text:
  """One text per image: a field of the store, and the field that replaces it where it is empty."""

  field: Literal['alt_text', 'captions']
  pick: Literal['first', 'random'] = 'random'  # which of several captions
  weights: tuple[float, ...] = ()  # of the captions by place, where it is random; (): equal
  fallback: Literal['', 'alt_text', 'captions'] = ''
  mix: float = 0.0  # share of the images whose text is the fallback although the field has one


@config
class Scenes:
  """The embedded data set; `train` > 0 generates it on first use."""

  train: int = 0
  test: int = 0
  size: int = 96  # pixels, square
  objects: int = 5  # the most in a scene
  typical: float = 0.0  # share of objects that look as their kind does; else any color


@config
class Data:
  store: str = ''  # folder written by `prepare`, or any TFDS folder
  split: str = 'train'
  extra_stores: tuple[str, ...] = ()  # mixed in; see mixture
  mixture: tuple[float, ...] = ()  # of (store, *extra_stores); empty: by their sizes
  scenes: Scenes = Scenes()
  tokenizer: str = ''  # SentencePiece model; empty: the store's own
  text_length: int = 64
  views: dict[str, View]
  texts: dict[str, Text] = dataclasses.field(default_factory=dict)
  threads: int = 16
  workers: int = 0  # processes; 0: threads alone
  prefetch: int = 4  # batches read ahead
  max_bad_fraction: float = 0.01  # unreadable images among those seen; above: stop


# --- model --------------------------------------------------------------------------------------


@config
class ViT:
  """Image tower. TIPS: two CLS tokens, the first for web captions, the second for synthetic
  ones.
  """

  kind: Literal['vit']
  width: int
  depth: int
  heads: int
  mlp: int  # hidden width of the feed-forward layer
  ffn: Literal['gelu', 'swiglu'] = 'gelu'
  patch: int = 14  # pixels
  grid: int = 16  # side of the position table, in patches
  cls: tuple[str, ...] = ('web', 'synthetic')  # names of the CLS tokens
  mask_token: bool = False
  centered: bool = False  # initial weights take pixels as (x - 1/2) * 4; else as x (official)
  positions: Literal['normal', 'sincos'] = 'normal'  # the table at the start; see MAE's for fixed
  layer_scale: float = 0.0  # gain of each residual branch at the start; 0: no such parameters
  drop_path: float = 0.0  # share of the crops that skip a residual branch, alike in all blocks


@config
class TextTower:
  """Text tower: bidirectional transformer, ReLU, mean over the tokens."""

  kind: Literal['text']
  width: int
  depth: int
  heads: int
  mlp: int
  vocab: int = 32000
  dropout: float = 0.0


@config
class DINOHead:
  """DINO head: MLP, bottleneck on the unit sphere, and weight-normalized prototypes."""

  kind: Literal['dino_head']
  width: int  # of the tokens that come in
  hidden: int = 2048
  bottleneck: int = 256
  layers: int = 3
  prototypes: int = 32768


@config
class ProjectionHead:
  """Linear projection into a joint space (CLIP)."""

  kind: Literal['projection']
  width: int
  output: int


@config
class PixelDecoder:
  """MAE decoder: a narrow ViT over visible tokens and mask tokens, to the pixels of each patch."""

  kind: Literal['pixel_decoder']
  width: int
  decoder_width: int = 512
  depth: int = 8
  heads: int = 16
  mlp: int = 2048
  patch: int = 14
  grid: int = 16
  positions: Literal['normal', 'sincos'] = 'normal'  # as in ViT


@config
class Logit:
  """Learned scale (kept as log temperature) and bias of a contrastive loss; no clamp."""

  kind: Literal['logit']
  temperature: float = 0.07  # at initialization
  bias: float | None = None  # SigLIP: -10


Tower = ViT | TextTower | DINOHead | ProjectionHead | PixelDecoder | Logit


@config
class Compute:
  """How towers are computed; never what they compute."""

  dtype: Literal['bfloat16', 'float32'] = 'bfloat16'  # of activations; parameters stay float32
  scan: bool = True  # one compiled block, looped over layers
  remat: Literal['none', 'products', 'full'] = (
    'none'  # kept for the backward pass: all; matrix products; block inputs
  )
  attention: Literal['auto', 'plain', 'fused', 'cudnn'] = 'auto'  # see models/attention.py
  float32_residual: bool = False  # what blocks add to stays float32


# --- method -------------------------------------------------------------------------------------


@config
class RandomMask:
  """Random patches of a view: exactly round(ratio * P) of them, drawn anew at every step."""

  kind: Literal['random']
  view: str
  ratio: float = 0.75
  probability: float = 1.0  # exactly this share of the batch's crops is masked, the others not


@config
class BlockMask:
  """Rectangles of patches, until a share of them that is drawn from a range is masked (DINOv2)."""

  kind: Literal['blocks']
  view: str
  ratio: tuple[float, float] = (0.1, 0.5)
  probability: float = 0.5  # as in RandomMask


Mask = RandomMask | BlockMask


@config
class Pass:
  """One tower applied to inputs, by the student or by a named teacher. Its output dict joins the
  features.

  Inputs are paths: 'batch.NAME', 'masks.NAME.OUTPUT' (objectives/masks.py), or 'PASS.OUTPUT'. They
  decide the order.
  """

  tower: str
  inputs: dict[str, str]
  by: str = 'student'


@config
class WeightedLoss:
  """One weighted loss. Inputs are paths as in Pass, or parameters 'student.TOWER.NAME',
  'TEACHER.TOWER.NAME'.
  """

  kind: str
  inputs: dict[str, str]
  weight: float | Ramp = 1.0
  args: dict[str, float | int | str | Ramp] = dataclasses.field(default_factory=dict)


@config
class Teacher:
  """Target weights for some towers. Towers that it does not name are the student's, without
  gradient.
  """

  towers: tuple[str, ...]
  kind: Literal['ema', 'frozen'] = 'ema'
  momentum: float | Ramp = 0.994  # ema: teacher <- m * teacher + (1 - m) * student
  init_from: str = ''  # frozen: a trained run, or foreign weights, as in Config
  rename: dict[str, str] = dataclasses.field(default_factory=dict)  # tower here -> tower there


# --- training -----------------------------------------------------------------------------------

Rules = tuple[tuple[str, float], ...]  # (regular expression, value): the first match wins


@config
class Optimizer:
  """What every kind of optimizer has. Rules go from parameter names to multipliers."""

  learning_rate: float = 5e-4  # peak of the schedule
  final_rate: float = 0.0  # where the schedule ends, unless it is constant
  weight_decay: float | Ramp = 0.01  # decoupled
  decay_times: Literal['rate', 'schedule'] = 'rate'  # the rate, or the rate / its peak (big_vision)
  clip_norm: float = 1.0  # of the gradient; 0: off
  clip_by: Literal['all', 'tower'] = 'all'  # one norm, or one for each tower
  decay_rules: Rules = (('.*/(kernel|embedding)$', 1.0), ('.*', 0.0))
  lr_rules: Rules = (('.*', 1.0),)
  # A rate is times this for each layer above the parameter's; see optim.depth_below_top.
  layer_decay_rules: Rules = (('.*', 1.0),)
  freeze_rules: Rules = (('.*', 0.0),)  # not updated for this fraction of the run; 1: always


@config
class Adafactor(Optimizer):
  """Factored second moments, as big_vision has it: no clipping of its own, b1 in bfloat16."""

  kind: Literal['adafactor'] = 'adafactor'
  b1: float = 0.9
  b2_cap: float = 0.999  # the second moment's decay, 1 - step^-0.8, stays below it


@config
class AdamW(Optimizer):
  kind: Literal['adamw'] = 'adamw'
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8


@config
class Schedule:
  total_steps: int
  batch_size: int  # global
  warmup_steps: int = 0
  decay: Literal['linear', 'cosine', 'constant'] = 'linear'
  accumulate: int = 1  # forward passes in this many parts; the contrast stays global


@config
class Checkpoint:
  every_steps: int = 1000
  keep_last: int = 2
  keep_every: int = 0  # steps; these are kept for good
  best_metric: str = ''  # the best checkpoint by it is kept too; of errors the lowest is best


@config
class Mesh:
  """Devices by axis; -1 takes the rest (data and fsdp both: fsdp up to 32 of it).

  Rules: pattern -> mesh axis of each trailing dimension.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  rules: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ('.*/(query|key|value)/kernel$', ('fsdp', 'tensor')),
    ('.*/attention/out/kernel$', ('tensor', 'fsdp')),
    ('.*/mlp/(up|gate)/kernel$', ('fsdp', 'tensor')),
    ('.*/mlp/down/kernel$', ('tensor', 'fsdp')),
    ('.*/prototypes$', ('tensor', 'fsdp')),
    ('.*/(embedding|kernel)$', (None, 'fsdp')),
    ('.*', ()),
  )


@config
class Evals:
  """What a run measures on the way, by the code of `evaluate`.

  Tasks that learn do so on the split 'train'. Tasks of the run's own store are measured with the
  short recipes (`evaluate --recipe=short`), public benchmarks with their own.
  """

  tasks: tuple[str, ...] = ()  # of the store; evals/tasks/table.py has their names
  suite: str = ''  # public benchmarks too, as --suite of `evaluate`, but not 'quick'
  data: str = ''  # their folder
  every_steps: int = 0  # 0: only at the start and the end
  at_start: bool = True
  split: str = 'test'
  encoder: str = 'student'  # or the name of a teacher
  image_tower: str = 'image'
  text_tower: str = 'text'
  image_head: str = ''  # projection between the tower and the joint space
  text_head: str = ''
  size: int = 224  # pixels, square
  batch_size: int = 64
  limit: int = 5000  # images of each split
  report: bool = True


@config
class Log:
  every_steps: int = 10
  tensorboard: bool = True
  stall_seconds: float = 600.0  # without a step: write what every thread is doing; 0: never


@config
class Hosts:
  """Several processes (`--multihost`): how long one waits for the others."""

  rendezvous_seconds: float = 300.0  # for all to come; then the run ends and names the missing
  lost_seconds: float = 60.0  # for a sign of life; then the run ends and names the lost


@config
class Config:
  name: str
  seed: int = 0
  init_from: str = ''  # run, Hugging Face folder or official files to start from
  init_from_rules: tuple[tuple[str, bool], ...] = (
    ('.*', True),
  )  # pattern of parameter names -> take it from there
  init_parts: tuple[Literal['params', 'teachers', 'loss_state', 'optimizer'], ...] = (
    'params',
    'teachers',
    'loss_state',
  )
  data: Data
  towers: dict[str, Tower]
  compute: Compute = Compute()
  masks: dict[str, Mask] = dataclasses.field(default_factory=dict)
  passes: dict[str, Pass]
  losses: dict[str, WeightedLoss]
  teachers: dict[str, Teacher] = dataclasses.field(default_factory=dict)
  optimizer: Adafactor | AdamW = Adafactor()
  schedule: Schedule
  mesh: Mesh = Mesh()
  checkpoint: Checkpoint = Checkpoint()
  evals: Evals = Evals()
  log: Log = Log()
  hosts: Hosts = Hosts()
  max_bad_steps: int = 20  # non-finite updates in a row; then the run stops
