"""A model on its way in or out: NumPy parameters by tower, and all that it takes to feed them."""

import dataclasses
import hashlib

import numpy as np

from tips_jax.core import schema, tree
from tips_jax.core.errors import InputError

TOWERS = (
  'image',
  'text',
  'logit',
  'image_head',
  'text_head',
)  # names here, whatever a run calls them
OFFICIAL_CLS = ('web', 'synthetic')
# What pixels and texts go through before a tower sees them. It travels with every export.
PREPROCESSING = {
  'channels': 'RGB',
  'range': [0, 1],
  'mean': 0,
  'std': 1,
  'resize': 'bilinear, antialiased',
  'padding': 'center, zeros, to a multiple of the patch',
  'lower_case': 'ASCII',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """An image tower and, where there are any, a text tower, the temperature, and projections to the
  joint space.

  towers: name -> schema, names from TOWERS; `params`: the same names -> nested dicts of float32
  NumPy arrays, as
  `models.towers` reads them. tokenizer: bytes of a SentencePiece model. size: pixels of the square
  images that the
  model is best at. about: what is known of the training (config, data_fingerprint, evaluation), for
  people.
  """

  name: str
  towers: dict[str, schema.Tower]
  params: dict
  tokenizer: bytes | None = None
  text_length: int = 64
  size: int = 224
  about: dict = dataclasses.field(default_factory=dict)

  @property
  def image(self) -> schema.ViT:
    return self.towers['image']

  @property
  def text(self) -> schema.TextTower | None:
    return self.towers.get('text')

  def replace(self, **fields):
    return dataclasses.replace(self, **fields)

  def cast(self, dtype):
    """The same with parameters rounded as in a file of a dtype ('float32', 'bfloat16', 'float16')."""
    from tips_jax.interop import arrays

    whole = {
      n: np.asarray(x, np.float32) for n, x in arrays.rounded(flat(self.params), dtype).items()
    }
    return self.replace(params=tree.nested(whole))


def flat(params):
  """{'encoder/blocks/mlp/up/kernel': array} of nested dicts."""
  return dict(tree.named_leaves(params))


def only_official(weights, format):
  """InputError where an official layout cannot hold the model: it has no place for projections."""
  heads = [n for n in ('image_head', 'text_head') if n in weights.towers]
  if heads:
    raise InputError(
      f'--to={format}: got a model with {" and ".join(heads)}, projections to the joint space; '
      'expected one without, as TIPS; --to=safetensors holds it'
    )


def sha256(data):
  """Hex digest of bytes; None of None."""
  return None if data is None else hashlib.sha256(data).hexdigest()


def fit_positions(table_1GGD, grid, where):
  """A position table for another grid: [1, grid, grid, D].

  A larger grid is interpolated as the tower does it. A smaller one is what the table was
  interpolated from, by least
  squares, where it was: v1 of the official PyTorch weights holds its 16 x 16 table at 32 x 32.
  Antialiased resampling would lose what it knows; InputError where the table is no interpolation.
  """
  import jax

  old = table_1GGD.shape[1]
  small, large = sorted((old, grid))
  up = np.asarray(
    jax.image.resize(np.eye(small, dtype=np.float32), (large, small), 'bilinear'), np.float64
  )
  along = lambda matrix, x: np.einsum('ag,bh,nghd->nabd', matrix, matrix, x)
  if grid >= old:
    return along(up, table_1GGD).astype(np.float32)
  result = along(np.linalg.pinv(up), table_1GGD)
  error = np.linalg.norm(along(up, result) - table_1GGD) / max(np.linalg.norm(table_1GGD), 1e-30)
  if error > 1e-3:
    raise InputError(
      f'{where}: got a table of {old} x {old} positions that no {grid} x {grid} one gives (relative '
      f'error {error:.2g}); expected towers.IMAGE.grid={old}'
    )
  return result.astype(np.float32)
