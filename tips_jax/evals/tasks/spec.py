"""What a task is (TaskSpec), one measurement of it (Evaluation) and what came of it (Result)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tips_jax.evals.datasets import protocols


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number that a task gives."""

  name: str
  # As papers print it.
  label: str
  # A key of protocols.UNITS: '%' (a share in [0, 1]), 'm' or 'deg'.
  unit: str = '%'
  better: str = 'higher'
  # Whether tables have it; the page and results.json have all.
  shown: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
  """What a task needs, and how it is measured; tasks/table.py lists all of them."""

  # In flags, protocols and results.
  name: str
  # TaskInputs -> fields of a Result.
  measure: Callable[[Any], dict[str, Any]]
  metrics: tuple[Metric, ...]
  # Of its section of the page: what the picture shows, and what a good one looks like.
  title: str
  caption: str
  # PNG bytes of the examples; None without any.
  draw: Callable[['Result'], bytes | None]
  # Splits it needs: 'train', 'test'.
  roles: tuple[str, ...] = ('train', 'test')
  # Outputs of the encoder beside the CLS tokens: 'patch', 'value_patch', 'region_patch',
  # 'intermediate_layers'.
  outputs: tuple[str, ...] = ()
  # Annotation that records must carry.
  annotation: str = ''
  # Whether images are compared with texts.
  needs_text: bool = False
  # How the encoder sees an image: 'square', squeezed; 'cut', the central square; 'center', 7/8 of
  # it; 'native', squeezed to the shape of the first image; 'aspect', each at its own aspect ratio.
  shape: str = 'square'
  # Where shape is 'aspect': (TaskInputs, (H, W)) -> patches kept of an image of that size.
  cells: Callable[[Any, tuple[int, int]], int] | None = None
  # The protocol on a store of one's own.
  constants: Mapping[str, protocols.Constant] = dataclasses.field(default_factory=dict)
  # What the recipe of minutes on a CPU changes (--recipe=short); without any it is the protocol.
  short_constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # The constant that says how many pixels the short side of an image has.
  size_constant: str = ''
  # Whether the metrics are drawn as bars beside those of other tasks.
  charted: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """One task on one data set."""

  dataset: str
  spec: TaskSpec
  # The protocol: constants, splits and classes.
  task: protocols.Task
  # A data set as evals/datasets/sources.py describes it.
  data: Any
  # Role ('train', 'test', 'index') -> split of the data set.
  splits: dict[str, str]
  # Pixels of the short side; 0: as the images are (depth), or the encoder's size.
  size: int = 0
  # Evaluations of one pool may search the indexes of all of them (tasks/instance_retrieval.Pool).
  pool: str = ''
  # Metric -> published figures.
  published: dict[str, tuple] = dataclasses.field(default_factory=dict)
  # Before the names of its metrics: 'knn' of a user's store, 'voc/segmentation' of a public one.
  prefix: str = ''

  @property
  def shape(self) -> str:
    """How images are seen: the protocol's word where it has one, else the task's."""
    mode = self.options.get('mode', self.options.get('resize'))
    if mode in ('square', 'cut', 'center'):
      return mode
    return self.spec.shape

  @functools.cached_property
  def options(self) -> dict[str, Any]:
    return self.task.options()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What an evaluation found."""

  dataset: str
  task: str
  spec: TaskSpec
  prefix: str
  # Shares in [0, 1], meters, degrees; 'TOKEN/NAME' is NAME of another CLS token.
  metrics: dict
  # The metrics of an answer that knows no image.
  chance: dict
  # Of dense tasks, by the columns of report/tables.py: the metrics of answers without features, and
  # of the truth at the resolution of the patches ('position', 'pixels_position', 'oracle').
  baselines: dict = dataclasses.field(default_factory=dict)
  # Metric -> Figures, in the printed unit.
  published: dict
  # At most six of the measured split, evenly spaced; evals/report/plotting.py says what they hold.
  examples: list
  # 'encoder' and 'reading' (its share of what several evaluations have in common), 'task'.
  seconds: dict
  classes: tuple = ()
  # Counts [K, K] of (truth, prediction).
  confusion: np.ndarray | None = None
  # The constants of the protocol and the size in pixels, and role -> 'images', 'sha256' of the
  # split: where both are equal two results may be compared.
  options: dict = dataclasses.field(default_factory=dict)
  data: dict = dataclasses.field(default_factory=dict)
  # What validation chose, and other finds.
  chosen: dict = dataclasses.field(default_factory=dict)
