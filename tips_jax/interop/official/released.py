"""Published numbers of the released TIPSv2 models, against which a copy of the weights is checked.

Facts of public tests under Apache 2.0; neither weights nor images are here. Parameters:
embeddings-benchmark/mteb, model_implementations/tipsv2_models.py @ a905523d0. The others:
huggingface/transformers, tests/models/: pieces in tipsv2/test_tokenization_tipsv2.py @ 3481a5c0,
vectors in tipsv2/test_modeling_tipsv2.py @ 05a2c94b, decoders in
tipsv2_dpt/test_modeling_tipsv2_dpt.py @ 08113657.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.models import towers as models

IMAGE = '000000039769.jpg of COCO val2017'
TEXTS = ('two cats on a sofa', 'a cat lying down', 'a dog on a couch', 'an empty room')


class Vector(NamedTuple):
  """A part of an output; numbers of ours may differ by `least` + `share` times the value."""

  values: tuple[float, ...]
  least: float
  share: float


@dataclasses.dataclass(frozen=True)
class Release:
  """A released model: its parameters, and {output: Vector} of it and of its decoders, if known."""

  name: str
  parameters: int
  vectors: Mapping[str, Vector] = dataclasses.field(default_factory=dict)
  decoders: Mapping[str, Vector] = dataclasses.field(default_factory=dict)


def _of_image(*values: float) -> Vector:
  # The tests allow 1e-3 of both. transformers computes erf GELU, the towers here tanh GELU, with
  # which TIPS was trained: that is another 1e-3.
  return Vector(values, 2e-3, 1e-3)


def _of_text(*values: float) -> Vector:
  return Vector(values, 1e-4, 1e-4)


_BASE = Release(
  name='TIPSv2-B/14',
  parameters=195_948_288,
  vectors={
    'image_embeds[0, :5]': _of_image(0.03267, 0.02216, 0.00546, 0.01890, -0.05426),
    'vision_pooler[0, :5]': _of_image(0.22055, 0.14960, 0.03689, 0.12756, -0.36632),
    'patch_tokens[0, 0, :5]': _of_image(0.25287, -0.01092, -0.57542, 0.09660, -0.04010),
    'text_embeds[0, :5]': _of_text(0.69319, 0.03710, 0.01194, 0.02136, -0.04281),
    'text_pooler[0, :5]': _of_text(12.07207, 0.64612, 0.20788, 0.37204, -0.74551),
    'logits_per_image[0]': _of_image(31.12190, 26.99341, 20.26748, 17.55544),
  },
  decoders={
    'depth[0, :3, :3]': _of_image(
      *(1.49565, 1.45554, 1.42735),
      *(1.42317, 1.39722, 1.40640),
      *(1.40630, 1.39262, 1.41095),
    ),
    'normals[0, 0, :3, :3]': _of_image(
      *(0.04218, 0.06954, 0.07597),
      *(0.06383, 0.11129, 0.11132),
      *(0.07500, 0.11867, 0.12064),
    ),
    'seg_logits[0, 0, :3, :3]': _of_image(
      *(2.76751, 4.06145, 4.27854),
      *(4.27288, 6.39123, 6.67878),
      *(4.52674, 6.87327, 7.22704),
    ),
  },
)
# By the width of the image tower.
RELEASES = {
  768: _BASE,
  1024: Release('TIPSv2-L/14', 487_941_120),
  1152: Release('TIPSv2-So400m/14', 861_726_816),
  1536: Release('TIPSv2-g/14', 1_525_085_696),
}
# Of the one vocabulary of all sizes. `<s>` is the fourth special piece: there are more than ours.
PIECES = {
  '<s>': 3,
  '▁a': 262,
  '▁i': 279,
  '▁in': 317,
  'ed': 325,
  '▁be': 343,
  '▁and': 346,
  'lo': 353,
  'od': 356,
  '▁is': 512,
  'ly': 547,
  '▁he': 554,
  '▁el': 566,
  '▁you': 900,
  '000': 1043,
  '▁are': 1217,
  '▁this': 1267,
  '▁was': 1300,
  '▁hi': 1697,
  '▁how': 1753,
  '▁his': 1950,
  '▁ด': 2353,
  '▁ir': 2988,
  '▁test': 3213,
  '▁ut': 3742,
  '▁proper': 4433,
  '▁there': 4858,
  '▁enc': 6750,
  '▁92': 7735,
  '▁生活': 7904,
  '▁should': 8037,
  '▁ey': 8264,
  '▁ปี': 8960,
  '▁string': 9208,
  '▁born': 10189,
  '▁following': 10360,
  '▁doing': 11099,
  '▁fals': 22762,
  '▁': 26717,
  'd': 26727,
  'é': 26773,
  '.': 26803,
  '的': 26859,
  '真': 26957,
  '是': 27053,
}


def of(width: int) -> Release:
  """The release whose image tower has a width; InputError where there is none."""
  if width not in RELEASES:
    known = ', '.join(f'{width} ({release.name})' for width, release in RELEASES.items())
    raise InputError(f'checkpoint: got an image tower of width {width}; expected one of {known}')
  return RELEASES[width]


def parameters(towers: Mapping[str, schema.Tower]) -> int:
  """Parameters of image and text tower in the official PyTorch layout; computed from shapes.

  That layout always has a mask token, and has LayerScale and a position of the CLS token, which are
  folded into other weights here. The temperature is not counted.
  """
  image = dataclasses.replace(towers['image'], mask_token=True)
  count = (2 * image.depth + 1) * image.width
  for name, tower in {'image': image, 'text': towers['text']}.items():
    shapes = jax.eval_shape(functools.partial(models.init, name, tower, seed=0))
    count += sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  return count
