"""Names that every layer shares.

Axis letters in interface names: B images, V views, H W pixels, P patches, N cls tokens, D width,
T text length, C captions, K prototypes, M masked slots, R regions. `patch_BVPD` is an array of
images x views x patches x width.
"""

from typing import Any, NamedTuple

BATCH_AXES = ('data', 'fsdp')  # mesh axes that the batch is split over


class Loss(NamedTuple):
  """What an objective returns: a float32 scalar, scalars to log, and its state for the next
  step.
  """

  value: Any
  metrics: dict
  state: dict = {}


# {name: shape} of the inputs or outputs of a tower for one image or text: without the batch.
Shapes = dict[str, tuple[int, ...]]
