"""A model as a person uses it: images and texts in, NumPy features out, whatever their number,
sizes and the device.
"""

import concurrent.futures
import copy
import functools
import hashlib
import math
import pathlib
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tips_jax.core import parallel, processes, schema, vectors
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.core.types import BATCH_AXES
from tips_jax.data import tokenizer
from tips_jax.interop import pictures
from tips_jax.interop.weights import Weights, flat
from tips_jax.models import towers

# Tokens of one call of the program on each device. On a CPU what a layer writes for them stays in
# the cache; several such calls run at once, as XLA computes the many small products of attention
# one after the other.
_TOKENS = {'cpu': 1024, 'gpu': 16384, 'tpu': 16384}
_LENGTHS = (16, 32)  # texts are cut to these where they are no longer; else to what came in


class Encoder:
  """The encoder of `Weights`, on all local devices. One Encoder may be used by several threads.

  weights: see interop/weights.py; a tower goes to the devices when it is first used.
  dtype: of activations, 'float32' or 'bfloat16'; outputs are always float32 NumPy arrays.
  batch_size: images or texts of one call of the compiled program; as many as suit the device where
  it is not given.
  cls: name of the CLS token of the joint space; the first, as in transformers, where it is not
  given.
  exact: every call has as many rows on each device, at the price of padding, so that an image's
  numbers depend neither
    on how many images nor on how many devices there are: a product of other shape is rounded in
    another order.
  mesh: of a training run, on which the parameters already lie, split as they are; else they are
  copied to each of `devices`.
  """

  def __init__(
    self,
    weights: Weights,
    *,
    dtype: str = 'float32',
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    cls: str | None = None,
    exact: bool = False,
    mesh: jax.sharding.Mesh | None = None,
  ):
    if dtype not in ('float32', 'bfloat16'):
      raise unknown('dtype', dtype, ('float32', 'bfloat16'))
    if batch_size is not None and batch_size < 1:
      raise InputError(f'batch_size: got {batch_size}; expected at least 1')
    self.weights = weights
    self.size = weights.size
    self.patch = weights.image.patch
    self.width = weights.image.width
    self.cls_names = tuple(weights.image.cls)
    self.cls = self._known(cls or self.cls_names[0])
    self._compute = schema.Compute(dtype=dtype)
    self._batch_size = batch_size
    self._exact = exact
    self._placed = mesh is not None
    if mesh is None:
      devices = np.array(list(devices or jax.local_devices()))
      mesh = jax.sharding.Mesh(devices, ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    self._mesh = mesh
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    self._batch = NamedSharding(mesh, P(axes))
    self._shards = math.prod(mesh.shape[axis] for axis in axes)
    # How each parameter is split: a compiled program gathers what it reads.
    if self._placed:
      self._specs = jax.tree.map(lambda x: x.sharding.spec, weights.params)
    platform = mesh.devices.flat[0].platform
    self._tokens = _TOKENS.get(platform, 16384) * self._shards
    cores = processes.cores()
    self._lanes = 1  # parts that a small batch is cut into
    turns = 2  # calls under way: one computes while another is copied
    if platform == 'cpu':
      self._lanes = turns = cores
    self._threads = concurrent.futures.ThreadPoolExecutor(cores, 'encoder')
    self._turns = threading.Semaphore(turns)
    self._lock = threading.Lock()
    self._params = {}
    self._image = jax.jit(self._on_devices(self._image_program), static_argnames=('cls', 'patches'))
    self._inside = jax.jit(
      self._on_devices(self._inside_program),
      static_argnames=('intermediate_layers', 'values', 'regions'),
    )
    self._text = jax.jit(self._on_devices(self._text_program))

  def with_params(self, params: dict) -> 'Encoder':
    """The encoder of the same towers with other parameters; compiled programs are shared."""
    other = copy.copy(self)
    other.weights = self.weights.replace(params=params)
    other._params = {}
    other.__dict__.pop('sha256', None)
    return other

  # --- what people call -------------------------------------------------------------------------

  def encode_image(self, images: Any, *, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(cls [B, N, D], patch [B, h, w, D]) float32, before any projection; N as in `cls_names`.

    images: a list of paths, PIL images or uint8 arrays [H, W, 3] of any sizes, each resized to size
    x size (default: `self.size`) without regard to its aspect; or one array [B, H, W, 3], uint8 or
    floats in [0, 1], taken as it is. Raises InputError for an image that cannot be read, or for
    values out of range.
    """
    out = self.features(images, size=size)
    return np.stack([out[name] for name in self.cls_names], axis=1), out['patch']

  def encode_text(self, texts: Sequence[str] | np.ndarray) -> np.ndarray:
    """[B, E] float32 in the joint space, of a list of str, or of int ids [B, T] padded with 0.

    Each text is lower-cased (ASCII), tokenized and cut to `weights.text_length` tokens on its own.
    Raises InputError where the model has no text tower or, for str, no tokenizer.
    """
    self._need('text', 'a text tower')
    if isinstance(texts, str):
      raise InputError(f'texts: got {texts!r}; expected a list of str')
    if isinstance(texts, (list, tuple)) and all(isinstance(t, str) for t in texts):
      ids = self.tokenizer.encode_batch(texts, self.weights.text_length)
    else:
      ids = np.asarray(texts)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
      raise InputError(
        f'texts: got shape {ids.shape}, {ids.dtype}; expected a list of str or int ids [B, T]'
      )
    if ids.size and not 0 <= ids.min() <= ids.max() < self.weights.text.vocab:
      raise InputError(
        f'texts: got ids from {ids.min()} to {ids.max()}; expected 0 to '
        f'{self.weights.text.vocab - 1}'
      )
    out = np.zeros((len(ids), self._joint_width('text')), np.float32)
    # Padding costs time and changes nothing. A text's own length decides, so that its neighbors do
    # not matter.
    own = np.where(ids != 0, np.arange(1, ids.shape[1] + 1), 0).max(axis=1, initial=0)
    lengths = [n for n in _LENGTHS if n < ids.shape[1]] + [ids.shape[1]]
    bucket = np.searchsorted(lengths, own)
    for i, length in enumerate(lengths):
      where = np.flatnonzero(bucket == i)
      if len(where) and length:
        rows = np.ascontiguousarray(ids[where, :length], np.int32)
        out[where] = self._map(self._text, ('text', 'text_head'), rows, length)
    return out

  def similarity(
    self, images: Any, texts: Sequence[str] | np.ndarray, *, cls: str | None = None
  ) -> np.ndarray:
    """[I, T] float32 logits: cosine / temperature, plus the bias where there is one.

    images: as for `encode_image`, or its cls [I, N, D], or embeddings [I, E]. texts: as for
    `encode_text`, or what it
    returned. cls: name of the CLS token that is compared; `self.cls` where it is not given.
    """
    logit = self.weights.params.get('logit', {})
    scale = self.temperature
    cls = self._known(cls or self.cls)
    x = images
    if not isinstance(images, np.ndarray) or images.ndim == 4:
      x = self.features(images, cls=cls, patches=False)['embedding']
    elif x.ndim == 3 and x.shape[1:] == (len(self.cls_names), self.width):
      x = self._project(x[:, self.cls_names.index(cls)])
    y = texts
    if not isinstance(texts, np.ndarray) or texts.dtype.kind != 'f':
      y = self.encode_text(texts)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
      raise InputError(
        f'similarity: got images {x.shape} and texts {y.shape}; expected [I, E] and [T, E]'
      )
    cosines = vectors.unit(x) @ vectors.unit(y).T
    return (cosines / scale + np.float32(logit.get('bias', 0))).astype(np.float32)

  @property
  def temperature(self) -> float:
    """What the cosine is divided by."""
    self._need('logit', 'a temperature')
    return float(np.exp(np.float32(self.weights.params['logit']['log_temperature'])))

  @functools.cached_property
  def tokenizer(self) -> tokenizer.Tokenizer:
    """The model's own `data.tokenizer.Tokenizer`."""
    if self.weights.tokenizer is None:
      raise InputError(
        f'texts: the model {self.weights.name!r} carries no tokenizer; expected ids, or a model '
        'loaded with tokenizer=PATH'
      )
    with tempfile.TemporaryDirectory() as folder:  # SentencePiece models are known by their path
      path = pathlib.Path(folder, 'tokenizer.model')
      path.write_bytes(self.weights.tokenizer)
      return tokenizer.Tokenizer(path)

  # --- what the evaluators call -----------------------------------------------------------------

  @property
  def name(self) -> str:
    return self.weights.name

  @property
  def depth(self) -> int:
    """Blocks of the image tower."""
    return self.weights.image.depth

  @property
  def region_samples(self) -> int:
    """Points a side of a region, whose mean is its feature."""
    head = self.weights.towers.get('region_head')
    return head.samples if head else schema.RegionHead.samples

  @property
  def has_text(self) -> bool:
    return self.weights.text is not None

  @functools.cached_property
  def sha256(self) -> str:
    """Of towers, parameters and the dtype of activations: whoever has the same one gives the same
    features.
    """
    digest = hashlib.sha256(repr((self.weights.towers, self.cls, self._compute.dtype)).encode())
    for name, x in sorted(flat(self.weights.params).items()):
      digest.update(name.encode())
      digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()

  def image(self, images_BHWC: np.ndarray) -> dict[str, np.ndarray]:
    """Each CLS token [B, D], 'patch' [B, h, w, D] and 'embedding' [B, E], of an array of images."""
    return self.features(images_BHWC)

  def text(self, ids_BT: np.ndarray) -> np.ndarray | None:
    """Embeddings [B, E] of ids; None where there is no text tower."""
    if not self.has_text:
      return None
    return self.encode_text(ids_BT)

  def inspect(
    self,
    images_BHWC: np.ndarray,
    *,
    intermediate_layers: Sequence[int] = (),
    values: bool = False,
    regions: bool = False,
    patches: bool = True,
  ) -> dict[str, Any]:
    """As `image`, and what some evaluators read inside.

    patches: whether 'patch' is wanted; else it stays on the device, and the other numbers are the
    same to the last bit.
    intermediate_layers: numbers of blocks; they add 'intermediate_layers', a tuple of (patch [B, h,
    w, D], first CLS [B, D]) after each, normalized
    as the output is. values: adds 'value_patch' [B, h, w, E], the patches of a last block that
    mixes no tokens, in the joint space (MaskCLIP, arXiv 2112.01071, section 3.2). regions: adds
    'region_patch' [B, h, w, E], of which a region is the mean: the patches through the projection
    of regions, or, of a model without one, as 'value_patch'.
    """
    images = pictures.checked(images_BHWC)
    h, w = self._grid(*images.shape[1:3])

    def program(params, x):  # one for both, so that no bit can differ
      layers = tuple(intermediate_layers)
      out = self._inside(params, x, intermediate_layers=layers, values=values, regions=regions)
      if not patches:
        del out['patch']
      return out

    return self._map(program, ('image', 'image_head', 'region_head'), images, h * w)

  def features(
    self, images: Any, *, size: int | None = None, cls: str | None = None, patches: bool = True
  ) -> dict[str, np.ndarray]:
    """As `image`, of all that `encode_image` takes; `patches=False` leaves the patches on the
    device.
    """
    program = functools.partial(self._image, cls=self._known(cls or self.cls), patches=patches)
    if size is None:
      size = self.size
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
      raise InputError(f'size: got {size!r}; expected a number of pixels')
    if isinstance(images, (list, tuple)):
      pictures.decode(images)
      h, w = self._grid(size, size)
      prepare = functools.partial(self._resize_all, size=size)
    else:
      images = pictures.checked(images)
      h, w = self._grid(*images.shape[1:3])
      prepare = None
    if len(images):
      return self._map(program, ('image', 'image_head'), images, h * w, prepare)
    # No image tells the program's shapes.
    shapes = dict.fromkeys(self.cls_names, (self.width,))
    shapes['embedding'] = (self._joint_width('image'),)
    if patches:
      shapes['patch'] = (h, w, self.width)
    return {name: np.zeros((0, *shape), np.float32) for name, shape in shapes.items()}

  def _resize_all(self, images, size):
    return np.stack([self.resize(image, size) for image in images])

  def resize(self, image: Any, size: int | None = None) -> np.ndarray:
    """uint8 [size, size, 3] RGB of a path, a PIL image or a uint8 array."""
    return pictures.resize(image, size or self.size)

  def group(self, size: int | None = None) -> int:
    """How many images fill the devices a few times over: a good number to hand over at once."""
    h, w = self._grid(size or self.size, size or self.size)
    return 4 * self._lanes * self._rows(1 << 30, h * w)

  def _grid(self, height, width):
    """Patches of an image: (rows, columns)."""
    return math.ceil(height / self.patch), math.ceil(width / self.patch)

  # --- on the devices ---------------------------------------------------------------------------

  def _on_devices(self, program):
    def run(params, x, **static):
      specs = jax.tree.map(lambda _: P(), params)
      if self._placed:
        specs = {name: self._specs[name] for name in params}
      return parallel.map_batch(
        lambda params, x, _: program(params, x, **static), params, x, specs=specs
      )

    return run

  def _apply(self, params, name, **arrays):
    return towers.apply(params[name], self.weights.towers[name], self._compute, arrays)

  def _image_program(self, params, images, *, cls, patches):
    out = {}
    features = self._apply(params, 'image', images=images[:, None])
    for name in (*self.cls_names, 'patch'):
      out[name] = features[name][:, 0].astype(jnp.float32)  # of the one view
    patch = out.pop('patch')
    out['embedding'] = self._joint(params, 'image_head', out[cls])
    if patches:
      out['patch'] = patch.reshape(len(images), *self._grid(*images.shape[1:3]), -1)
    return out

  def _joint(self, params, head, x):
    """x [..., D] in the joint space; a model without heads, as TIPS, has no other."""
    if head not in params:
      return x
    return self._apply(params, head, x=x)['embedding']

  def _inside_program(self, params, images, *, intermediate_layers, values, regions):
    head = params.get('region_head')
    out = towers.inspect(
      params['image'],
      self.weights.image,
      self._compute,
      images,
      cls=self.cls,
      project=functools.partial(self._joint, params, 'image_head'),
      intermediate_layers=intermediate_layers,
      values=values or regions and head is None,
    )
    if regions and head is None:
      out['region_patch'] = out['value_patch']
      if not values:
        del out['value_patch']
    elif regions:
      # A mean of projections is the projection of the mean: there is no bias.
      out['region_patch'] = out['patch'] @ parallel.whole(head['kernel'], jnp.float32)
    return out

  def _text_program(self, params, ids):
    return self._joint(params, 'text_head', self._apply(params, 'text', ids=ids)['text'])

  def _put(self, names):
    """The parameters of towers, on every device."""
    with self._lock:
      for name in names:
        if name in self.weights.towers and name not in self._params:
          params = self.weights.params[name]
          if not self._placed:
            params = _copied(params, NamedSharding(self._mesh, P()))
          self._params[name] = params
      return {name: self._params[name] for name in names if name in self._params}

  def _rows(self, count, tokens):
    """Rows of one call: a power of two on each device, so that few shapes are compiled."""
    devices = self._shards
    most = self._batch_size or max(self._tokens // max(tokens, 1), 1)
    wanted = most
    # A small batch is cut into parts, so that all cores have one.
    if not self._exact:
      wanted = min(math.ceil(count / self._lanes), most)
    each = 1 << (math.ceil(wanted / devices) - 1).bit_length()
    if each > 1 and each * devices > most:
      each //= 2
    return devices * each

  def _map(self, program, names, rows, tokens, prepare=None):
    """program(parameters, rows) of any number of rows, as NumPy. prepare: makes an array of some of
    them.
    """
    params = self._put(names)
    n = self._rows(len(rows), tokens)
    whole = []  # one tree of arrays, made by the first call to come back
    first = threading.Lock()

    def one(begin):
      some = rows[begin : begin + n]
      x = some
      if prepare:
        x = prepare(some)
      compiled = n
      # The last rows of many: padding them to n would compute most of it for nothing.
      if not self._exact:
        compiled = _bucket(len(x), n, self._shards)
      missing = compiled - len(x)
      if missing:
        x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
      with self._turns, jax.set_mesh(self._mesh):
        out = program(params, jax.device_put(x, self._batch))
        out = jax.tree.map(lambda y: np.asarray(y)[: len(some)], out)
      with first:
        if not whole:
          whole.append(jax.tree.map(lambda y: np.empty((len(rows), *y.shape[1:]), y.dtype), out))
      jax.tree.map(lambda all, y: np.copyto(all[begin : begin + n], y), whole[0], out)

    jobs = [self._threads.submit(one, begin) for begin in range(0, len(rows), n)]
    try:
      for job in jobs:
        job.result()
    finally:  # an error or Ctrl-C: what has not begun is not done
      for job in jobs:
        job.cancel()
    return whole[0]

  # --- small print ------------------------------------------------------------------------------

  def _known(self, cls):
    if cls not in self.cls_names:
      raise unknown('CLS token', cls, self.cls_names)
    return cls

  def _need(self, name, what):
    if name not in self.weights.towers:
      raise InputError(
        f'the model {self.weights.name!r} has no {name!r}; expected one with {what}; it has '
        f'{", ".join(self.weights.towers)}'
      )

  def _joint_width(self, name):
    head = self.weights.towers.get(f'{name}_head')
    if head is None:
      return self.weights.towers[name].width
    return head.output

  def _project(self, x):
    # On the host: a few vectors that have been there already.
    head = self.weights.params.get('image_head')
    if head is None:
      return x
    return x @ head['kernel']


def _copied(params, place):
  """A tree of parameters on the devices. Where these are CPUs, the tree itself then holds views of
  the copies: one array after the other, so that no two copies of a tower are in memory.
  """
  result = {}
  for name, x in params.items():
    if isinstance(x, dict):
      result[name] = _copied(x, place)
      continue
    result[name] = jax.device_put(x, place)
    if isinstance(x, np.ndarray) and next(iter(place.device_set)).platform == 'cpu':
      params[name] = np.asarray(result[name])
  return result


def _bucket(count, most, devices):
  """The smallest number of rows that is compiled for and holds `count`."""
  return min(most, devices << (math.ceil(count / devices) - 1).bit_length())
