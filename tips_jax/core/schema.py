"""The schema of an experiment: every field a config may hold, its type, its range and its default.

Config files are plain ml_collections data. They pass one door, `strict.build(Config, data)`, and
come out as these frozen dataclasses; unknown, missing and mistyped fields and numbers out of range
are errors there. The groups themselves check which of their fields fit each other.
"""

import dataclasses
from typing import Annotated, Literal

from tips_jax.core.errors import InputError

# `X as X`: also what is not used here, so that one name finds every group and range: schema.View.
from tips_jax.core.ranges import Bytes as Bytes
from tips_jax.core.ranges import Count as Count
from tips_jax.core.ranges import Decay as Decay
from tips_jax.core.ranges import Drop as Drop
from tips_jax.core.ranges import Entries as Entries
from tips_jax.core.ranges import Factor as Factor
from tips_jax.core.ranges import Grid as Grid
from tips_jax.core.ranges import Layers as Layers
from tips_jax.core.ranges import Patch as Patch
from tips_jax.core.ranges import Pixels as Pixels
from tips_jax.core.ranges import Processes as Processes
from tips_jax.core.ranges import Ramp as Ramp
from tips_jax.core.ranges import Seconds as Seconds
from tips_jax.core.ranges import Share as Share
from tips_jax.core.ranges import Whole as Whole
from tips_jax.core.ranges import Width as Width
from tips_jax.core.ranges import ascending as ascending
from tips_jax.core.ranges import config as config
from tips_jax.core.ranges import divides as divides
from tips_jax.core.schema_data import Columns as Columns
from tips_jax.core.schema_data import Data as Data
from tips_jax.core.schema_data import Regions as Regions
from tips_jax.core.schema_data import RegionText as RegionText
from tips_jax.core.schema_data import Scenes as Scenes
from tips_jax.core.schema_data import Tags as Tags
from tips_jax.core.schema_data import Text as Text
from tips_jax.core.schema_data import View as View
from tips_jax.core.schema_towers import Adapters as Adapters
from tips_jax.core.schema_towers import DINOHead as DINOHead
from tips_jax.core.schema_towers import Fusion as Fusion
from tips_jax.core.schema_towers import ImageTower as ImageTower
from tips_jax.core.schema_towers import Logit as Logit
from tips_jax.core.schema_towers import MobileNetV2 as MobileNetV2
from tips_jax.core.schema_towers import PixelDecoder as PixelDecoder
from tips_jax.core.schema_towers import ProjectionHead as ProjectionHead
from tips_jax.core.schema_towers import Reduction as Reduction
from tips_jax.core.schema_towers import RegionHead as RegionHead
from tips_jax.core.schema_towers import ResNet as ResNet
from tips_jax.core.schema_towers import Swin as Swin
from tips_jax.core.schema_towers import TextTower as TextTower
from tips_jax.core.schema_towers import Tower as Tower
from tips_jax.core.schema_towers import ViT as ViT
from tips_jax.core.schema_towers import WordHead as WordHead
from tips_jax.core.strict import Range

# --- computing ----------------------------------------------------------------------------------


@config
class Compute:
  """How towers are computed; never what they compute."""

  dtype: Literal['bfloat16', 'float32'] = 'bfloat16'  # of activations; parameters stay float32
  matmul: Literal['dtype', 'int8'] = 'dtype'  # products of blocks; int8: models/quantized.py
  scan: bool = True  # one compiled block, looped over layers
  remat: Literal['none', 'products', 'full'] = (
    'none'  # kept for the backward pass: all; matrix products; block inputs
  )
  attention: Literal['auto', 'plain', 'fused', 'cudnn'] = 'auto'  # see models/attention.py
  float32_residual: bool = False  # what blocks add to stays float32
  # Of XLA for the training step, as NAME=VALUE, over those that the kind of device gets
  # (train/lowering.py).
  options: tuple[str, ...] = ()

  def __post_init__(self):
    for text in self.options:
      if not text.partition('=')[2]:
        raise InputError(f'options: got {text!r}; expected NAME=VALUE')


# --- method -------------------------------------------------------------------------------------


@config
class RandomMask:
  """Random patches of a view: exactly round(ratio * P) of them, drawn anew at every step."""

  kind: Literal['random']
  view: str
  ratio: Drop = 0.75
  probability: Share = 1.0  # exactly this share of the batch's crops is masked, the others not


@config
class BlockMask:
  """Rectangles of patches, until a share of them that is drawn from a range is masked (DINOv2)."""

  kind: Literal['blocks']
  view: str
  ratio: tuple[Drop, Drop] = (0.1, 0.5)
  probability: Share = 0.5  # as in RandomMask

  def __post_init__(self):
    ascending('ratio', self.ratio)


@config
class WordMask:
  """Words of a text that are to be guessed (BERT, arXiv 1810.04805, section 3.1), drawn anew at
  every step: `ratio` of each text, at least one. Padding and unknown pieces stay.
  """

  kind: Literal['words']
  text: str
  ratio: Annotated[float, Range(1e-3, 1)] = 0.15
  hidden: Share = 0.8  # of them become id 1: <unk>, which no text has where bytes are pieces
  swapped: Share = 0.1  # of them become any word; the rest stays as it is

  def __post_init__(self):
    if self.hidden + self.swapped > 1:
      raise InputError(
        f'swapped: got {self.swapped} beside hidden {self.hidden}; expected a sum of at most 1'
      )


Mask = RandomMask | BlockMask | WordMask


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


Args = Annotated[dict[str, float | int | str | Ramp], Range()]


@config
class WeightedLoss:
  """One weighted loss. Inputs are paths as in Pass, or parameters 'student.TOWER.NAME',
  'TEACHER.TOWER.NAME'.
  """

  kind: str
  inputs: dict[str, str]
  weight: Annotated[float | Ramp, Range(0, 1e6)] = 1.0
  args: Args = dataclasses.field(default_factory=dict)


@config
class Teacher:
  """Target weights for some towers. Towers that it does not name are the student's, without
  gradient.
  """

  towers: tuple[str, ...]
  kind: Literal['ema', 'frozen'] = 'ema'
  # ema: teacher <- m * teacher + (1 - m) * student
  momentum: Annotated[float | Ramp, Range(0, 1)] = 0.994
  init_from: str = ''  # frozen: a trained run, or foreign weights, as in Config
  rename: dict[str, str] = dataclasses.field(default_factory=dict)  # tower here -> tower there


# --- training -----------------------------------------------------------------------------------

Rules = tuple[tuple[str, Factor], ...]  # (regular expression, value): the first match wins


@config
class Optimizer:
  """What every kind of optimizer has. Rules go from parameter names to multipliers."""

  learning_rate: Annotated[float, Range(0, 100)] = 5e-4  # peak of the schedule
  final_rate: Annotated[float, Range(0, 100)] = 0.0  # where the schedule ends, unless constant
  weight_decay: Annotated[float | Ramp, Range(0, 1e6)] = 0.01  # decoupled
  decay_times: Literal['rate', 'schedule'] = 'rate'  # the rate, or the rate / its peak (big_vision)
  clip_norm: Factor = 1.0  # of the gradient; 0: off
  clip_by: Literal['all', 'tower'] = 'all'  # one norm, or one for each tower
  decay_rules: Rules = (('.*/(kernel|embedding)$', 1.0), ('.*', 0.0))
  lr_rules: Rules = (('.*', 1.0),)
  # A rate is times this for each layer above the parameter's; see optim.layer_decay.
  layer_decay_rules: Rules = (('.*', 1.0),)
  freeze_rules: Rules = (('.*', 0.0),)  # not updated for this fraction of the run; 1: always


@config
class Adafactor(Optimizer):
  """Factored second moments, as big_vision has it: no clipping of its own, b1 in bfloat16."""

  kind: Literal['adafactor'] = 'adafactor'
  b1: Decay = 0.9
  b2_cap: Decay = 0.999  # the second moment's decay, 1 - step^-0.8, stays below it


@config
class AdamW(Optimizer):
  kind: Literal['adamw'] = 'adamw'
  b1: Decay = 0.9
  b2: Decay = 0.999
  eps: Annotated[float, Range(1e-30, 1)] = 1e-8  # 0 would divide by a second moment of 0


@config
class Muon(AdamW):
  """The matrices of blocks by Muon (kellerjordan.github.io/posts/muon), all else by Adam."""

  kind: Literal['muon'] = 'muon'
  momentum: Decay = 0.95


@config
class Lamb(AdamW):
  """Adam's direction with decay, times the norm of each layer's parameter over its own (arXiv
  1904.00962); `trust` bounds the ratio (DeepSpeed's LAMB, which UMG-CLIP and EVA-CLIP use).
  """

  kind: Literal['lamb'] = 'lamb'
  trust: Annotated[tuple[float, float], Range(0, 1e9)] = (0.01, 10.0)

  def __post_init__(self):
    ascending('trust', self.trust)


@config
class Schedule:
  total_steps: Count
  batch_size: Annotated[int, Range(1, 1 << 24)]  # global
  warmup_steps: Whole = 0
  decay: Literal['linear', 'cosine', 'constant'] = 'linear'
  accumulate: Count = 1  # forward passes in this many parts; the contrast stays global


@config
class Checkpoint:
  every_steps: Count = 1000
  every_minutes: Factor = 0.0  # since the last one, beside those by step; 0: by step alone
  keep_last: Count = 2
  keep_every: Whole = 0  # steps; these are kept for good
  best_metric: str = ''  # the best checkpoint by it is kept too; of errors the lowest is best


@config
class Mesh:
  """Devices by axis; -1 takes the rest (data and fsdp both: fsdp up to 32 of a slice or GPU host).

  Rules: pattern -> mesh axis of each trailing dimension.
  """

  data: Annotated[int, Range(-1, 1e6)] = -1
  fsdp: Annotated[int, Range(-1, 1e6)] = 1
  tensor: Annotated[int, Range(-1, 1e6)] = 1
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
  every_steps: Whole = 0  # 0: only at the start and the end
  at_start: bool = True
  split: str = 'test'
  encoder: str = 'student'  # or the name of a teacher
  image_tower: str = 'image'
  text_tower: str = 'text'
  image_head: str = ''  # projection between the tower and the joint space
  text_head: str = ''
  # RoIAlign's projection, by which regions are told apart; '': by the patches' own values.
  region_head: str = ''
  size: Pixels = 224  # square
  batch_size: Count = 64
  limit: Count = 5000  # images of each split
  report: bool = True


@config
class Log:
  every_steps: Count = 10
  tensorboard: bool = True
  stall_seconds: Factor = 600.0  # without a step: write what every thread is doing; 0: never


@config
class Hosts:
  """Several processes (`--multihost`): how long one waits for the others."""

  rendezvous_seconds: Seconds = 300.0  # for all to come; then the run ends and names the missing
  lost_seconds: Seconds = 60.0  # for a sign of life; then the run ends and names the lost


@config
class Config:
  name: str
  seed: Annotated[int, Range(0, (1 << 32) - 1)] = 0
  init_from: str = ''  # run, Hugging Face folder or official files to start from
  init_required: bool = False  # of a later stage: without init_from it is an error
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
  optimizer: Adafactor | AdamW | Muon | Lamb = Adafactor()
  schedule: Schedule
  mesh: Mesh = Mesh()
  checkpoint: Checkpoint = Checkpoint()
  evals: Evals = Evals()
  log: Log = Log()
  hosts: Hosts = Hosts()
  max_bad_steps: Count = 20  # non-finite updates in a row; then the run stops
