"""Framework-independent model weights: NumPy parameters by tower, tokenizer, preprocessing."""

import dataclasses
import hashlib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

from tips_jax.core import files, schema, tree
from tips_jax.core.errors import InputError
from tips_jax.interop import arrays
from tips_jax.models import towers as towers_lib

# Names of the towers here, whatever the config of a run calls them.
TOWERS = ('image', 'text', 'logit', 'image_head', 'text_head', 'region_head')
_KINDS = dict(
  image=schema.ImageTower,
  text=schema.TextTower,
  logit=schema.Logit,
  image_head=schema.ProjectionHead,
  text_head=schema.ProjectionHead,
  region_head=schema.RegionHead,
)
_GAINS = ('layer_scale', 'last_layer_scale')
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


@jax.tree_util.register_pytree_with_keys_class
class ReadLater(Mapping):
  """{name: parameters}: those of `names` are read when they are first asked for, and then kept.

  known: the others. read: name -> its parameters. jax takes it for the dict that it stands for.
  """

  def __init__(
    self, known: dict[str, Any], names: Iterable[str], read: Callable[[str], dict[str, Any]]
  ):
    self._params = dict.fromkeys(names) | known
    self._read = read

  def __getitem__(self, name: str) -> Any:
    if self._params[name] is None:
      self._params[name] = self._read(name)
    return self._params[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._params)

  def __len__(self) -> int:
    return len(self._params)

  def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], list[str]]:
    names = sorted(self)
    return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

  @classmethod
  def tree_unflatten(cls, names: list[str], values: Any) -> dict[str, Any]:
    return dict(zip(names, values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """An image tower; optionally a text tower, a temperature and projections to the joint space."""

  name: str
  towers: dict[str, schema.Tower]  # keys from TOWERS
  # The same keys -> nested dicts of float32 arrays, as `models.towers` reads them.
  params: Mapping[str, Any]
  tokenizer: bytes | None = None  # a SentencePiece model
  text_length: int = 64  # tokens
  size: int = 224  # pixels of the square images that suit the model best
  # For people: config, data_fingerprint and evaluation of the training run, notes of a conversion.
  about: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    # A file may have made it up, and it becomes the name of others.
    files.check_name(self.name, 'name of the model')
    for role, tower in self.towers.items():
      if not isinstance(tower, _KINDS[role]):
        kinds = [kind.__name__ for kind in typing.get_args(_KINDS[role]) or [_KINDS[role]]]
        raise InputError(
          f'{role}: got a tower of kind {tower.kind!r}; expected {" or ".join(kinds)}'
        )

  @property
  def image(self) -> schema.ImageTower:
    return self.towers['image']

  @property
  def text(self) -> schema.TextTower | None:
    return self.towers.get('text')

  def replace(self, **fields: Any) -> Self:
    return dataclasses.replace(self, **fields)

  def cast(self, dtype: str) -> Self:
    """Parameters rounded as in a file of a dtype ('float32', 'bfloat16', 'float16')."""
    rounded = arrays.rounded(flat(self.params), dtype)
    params = {name: np.asarray(x, np.float32) for name, x in rounded.items()}
    return self.replace(params=tree.nested(params))


def tower_names(config: schema.Evals, towers: dict[str, schema.Tower]) -> dict[str, str]:
  """{name of TOWERS: name in a run} of the towers that make up the encoder of a run."""
  names = {
    'image': config.image_tower,
    'text': config.text_tower,
    'image_head': config.image_head,
    'text_head': config.text_head,
    'region_head': config.region_head,
  }
  for name, tower in towers.items():
    if tower.kind == 'logit':
      names.setdefault('logit', name)
  return {role: name for role, name in names.items() if name in towers}


def fold_layer_scale(
  tower: schema.ViT, params: dict[str, Any]
) -> tuple[schema.ViT, dict[str, Any]]:
  """The same tower without LayerScale, which other formats do not have: the gains of the residual
  branches are multiplied into their last layers.
  """
  if not tower.layer_scale:
    return tower, params
  leaves = flat(params)
  for scale, layer in (('scale1', 'attention/out'), ('scale2', 'mlp/down')):
    gamma = leaves.pop(f'encoder/blocks/{scale}/gamma')
    for leaf, gain in (('kernel', gamma[:, None]), ('bias', gamma)):
      name = f'encoder/blocks/{layer}/{leaf}'
      leaves[name] = leaves[name] * gain
  plain = dataclasses.replace(tower, layer_scale=0.0, last_layer_scale=0.0)
  return plain, tree.nested(leaves)


def initial(weights: Weights, *, seed: int = 0) -> dict[str, Any]:
  """Parameters of the same towers before any training: an image tower of a run has the gains that
  LayerScale started with there, although they are folded now.
  """
  params = {}
  for name, tower in weights.towers.items():
    params[name] = towers_lib.init(name, tower, seed=seed)
  config = weights.about.get('config') or {}
  name = config.get('evals', {}).get('image_tower', 'image')
  fields = config.get('towers', {}).get(name, {})
  gains = {field: fields[field] for field in _GAINS if fields.get(field)}
  if gains:
    tower = dataclasses.replace(weights.image, **gains)
    _, params['image'] = fold_layer_scale(tower, towers_lib.init('image', tower, seed=seed))
  return params


def flat(params: dict[str, Any]) -> dict[str, np.ndarray]:
  """{'encoder/blocks/mlp/up/kernel': array} of nested dicts."""
  return dict(tree.named_leaves(params))


def only_vit(weights: Weights, format: str) -> None:
  """InputError for an image tower that no other project's layout has."""
  if not isinstance(weights.image, schema.ViT):
    raise InputError(
      f'--to={format}: got an image tower of kind {weights.image.kind!r}; expected a vit; '
      '--to=onnx and --to=safetensors hold it'
    )
  if weights.image.adapters.width:
    raise InputError(
      f'--to={format}: got an image tower with adapters (adapters.width='
      f'{weights.image.adapters.width}), whose convolutions no other layer can take in; expected '
      'one without; --to=onnx and --to=safetensors hold them'
    )


def only_whole(weights: Weights, format: str) -> None:
  """InputError for an image tower that merges its tokens, which only our own programs do."""
  if isinstance(weights.image, schema.ViT) and weights.image.reduce.keep < 1:
    raise InputError(
      f'--to={format}: got an image tower that merges patches (reduce.keep='
      f'{weights.image.reduce.keep}); expected reduce.keep=1; --to=safetensors holds it'
    )


def only_official(weights: Weights, format: str) -> None:
  """InputError for a model with projections, which the official layouts cannot hold."""
  heads = [name for name in ('image_head', 'text_head', 'region_head') if name in weights.towers]
  if heads:
    raise InputError(
      f'--to={format}: got a model with {" and ".join(heads)}, projections to the joint space; '
      'expected one without, as TIPS; --to=safetensors holds it'
    )


def sha256(data: bytes | None) -> str | None:
  """Hex digest of bytes; None of None."""
  if data is None:
    return None
  return hashlib.sha256(data).hexdigest()


def at_own_size(weights: Weights) -> Weights:
  """The model with a position table as large as the images that suit it.

  The official PyTorch program builds its model for the size of its images, 448 pixels: it cannot
  load the 16 x 16 table with which v1 is trained at that size too. At that size the features are
  the same; at others they differ, as the table is interpolated twice.
  """
  image = weights.image
  grid, rest = divmod(weights.size, image.patch)
  if rest or grid <= image.grid:
    return weights
  params = tree.nested(flat(weights.params))  # new groups around the same arrays
  table = params['image']['posembed']
  params['image']['posembed'] = fit_positions(table, grid, 'image')
  towers = weights.towers | {'image': dataclasses.replace(image, grid=grid)}
  return weights.replace(towers=towers, params=params)


def fit_positions(table_1GGD: np.ndarray, grid: int, where: str) -> np.ndarray:
  """A position table for another grid: [1, grid, grid, D].

  A larger grid is interpolated as the tower does it. A smaller grid is the least-squares preimage
  of that interpolation: the official PyTorch weights of v1 hold a 16 x 16 table at 32 x 32, and
  antialiased resampling would lose information. InputError where the table is no interpolation of
  a smaller one.
  """
  import jax

  old = table_1GGD.shape[1]
  small, large = sorted((old, grid))
  identity = np.eye(small, dtype=np.float32)
  # Resizing is linear and separable: one matrix for both axes.
  upsample = np.asarray(jax.image.resize(identity, (large, small), 'bilinear'), np.float64)

  def apply(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum('ag,bh,nghd->nabd', matrix, matrix, x)

  if grid >= old:
    return apply(upsample, table_1GGD).astype(np.float32)
  result = apply(np.linalg.pinv(upsample), table_1GGD)
  residual = np.linalg.norm(apply(upsample, result) - table_1GGD)
  error = residual / max(np.linalg.norm(table_1GGD), 1e-30)
  if error > 1e-3:
    raise InputError(
      f'{where}: got a table of {old} x {old} positions that no {grid} x {grid} one gives '
      f'(relative error {error:.2g}); expected towers.IMAGE.grid={old}'
    )
  return result.astype(np.float32)
