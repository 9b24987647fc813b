"""A model as a person uses it: images and texts in, NumPy features out, whatever their number,
sizes and the device.
"""

import concurrent.futures
import contextlib
import copy
import functools
import hashlib
import math
import os
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
from PIL import Image

from tips_jax.core import parallel, schema, vectors
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.core.types import BATCH_AXES
from tips_jax.data import tokenizer, views
from tips_jax.data.images import rgb
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
    self.weights, self.size, self.patch = weights, weights.size, weights.image.patch
    self.width, self.cls_names = weights.image.width, tuple(weights.image.cls)
    self.cls = self._known(cls or self.cls_names[0])
    self._compute, self._batch_size, self._exact = schema.Compute(dtype=dtype), batch_size, exact
    self._placed = mesh is not None
    if mesh is None:
      devices = np.array(list(devices or jax.local_devices()))
      mesh = jax.sharding.Mesh(devices, ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    self._mesh = mesh
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    self._batch = NamedSharding(mesh, P(axes))
    self._shards = math.prod(mesh.shape[axis] for axis in axes)
    # How each parameter is split: a compiled program gathers what it reads.
    self._specs = jax.tree.map(lambda x: x.sharding.spec if self._placed else P(), weights.params)
    platform = mesh.devices.flat[0].platform
    cpu = platform == 'cpu'
    self._tokens = _TOKENS.get(platform, 16384) * self._shards
    cores = (
      len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    )
    self._lanes = cores if cpu else 1  # parts that a small batch is cut into
    self._threads = concurrent.futures.ThreadPoolExecutor(cores, 'encoder')
    self._turns = threading.Semaphore(
      cores if cpu else 2
    )  # calls under way: one computes while another is copied
    self._lock, self._params = threading.Lock(), {}
    self._image = jax.jit(self._on_devices(self._image_program), static_argnames=('cls', 'patches'))
    self._inside = jax.jit(
      self._on_devices(self._inside_program), static_argnames=('intermediate_layers', 'values')
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
    x = images if isinstance(images, np.ndarray) else None
    if x is None or x.ndim == 4:
      x = self.features(images, cls=cls, patches=False)['embedding']
    elif x.ndim == 3 and x.shape[1:] == (len(self.cls_names), self.width):
      x = self._project(x[:, self.cls_names.index(cls)])
    y = (
      texts
      if isinstance(texts, np.ndarray) and texts.dtype.kind == 'f'
      else self.encode_text(texts)
    )
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
        'loaded '
        'with tokenizer=PATH'
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
    return self.encode_text(ids_BT) if 'text' in self.weights.towers else None

  def inspect(
    self,
    images_BHWC: np.ndarray,
    *,
    intermediate_layers: Sequence[int] = (),
    values: bool = False,
    patches: bool = True,
  ) -> dict[str, Any]:
    """As `image`, and what some evaluators read inside.

    patches: whether 'patch' is wanted; else it stays on the device, and the other numbers are the
    same to the last bit.
    intermediate_layers: numbers of blocks; they add 'intermediate_layers', a tuple of (patch [B, h,
    w, D], first CLS [B, D]) after each, normalized
    as the output is. values: adds 'value_patch' [B, h, w, E], the patches of a last block that
    mixes no tokens, in the joint space (MaskCLIP, arXiv 2112.01071, section 3.2).
    """
    images = _checked(images_BHWC)
    tokens = np.prod([-(-s // self.patch) for s in images.shape[1:3]])

    def program(params, x):  # one for both, so that no bit can differ
      found = self._inside(params, x, intermediate_layers=tuple(intermediate_layers), values=values)
      return {name: y for name, y in found.items() if patches or name != 'patch'}

    return self._map(program, ('image', 'image_head'), images, int(tokens))

  def features(
    self, images: Any, *, size: int | None = None, cls: str | None = None, patches: bool = True
  ) -> dict[str, np.ndarray]:
    """As `image`, of all that `encode_image` takes; `patches=False` leaves the patches on the
    device.
    """
    program = functools.partial(self._image, cls=self._known(cls or self.cls), patches=patches)
    listed = isinstance(images, (list, tuple))
    size = self.size if size is None else size
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
      raise InputError(f'size: got {size!r}; expected a number of pixels')
    images = images if listed else _checked(images)
    h, w = (-(-s // self.patch) for s in ((size, size) if listed else images.shape[1:3]))
    if len(images):
      for image in images if listed else ():
        if isinstance(image, Image.Image):
          with contextlib.suppress(
            Exception
          ):  # Pillow decodes late, and one image in two threads is not safe;
            image.load()  # what is wrong with it is said in `resize`
      prepare = (lambda some: np.stack([self.resize(x, size) for x in some])) if listed else None
      return self._map(program, ('image', 'image_head'), images, h * w, prepare)
    empty = {name: (self.width,) for name in self.cls_names} | {
      'embedding': (self._joint_width('image'),)
    }
    empty |= {'patch': (h, w, self.width)} if patches else {}
    return {name: np.zeros((0, *shape), np.float32) for name, shape in empty.items()}

  def resize(self, image: Any, size: int | None = None) -> np.ndarray:
    """uint8 [size, size, 3] RGB of a path, a PIL image or a uint8 array, as the evaluators prepare
    theirs.
    """
    size = size or self.size
    if isinstance(image, (str, os.PathLike)):
      try:
        return views.evaluation(pathlib.Path(image).read_bytes(), size)
      except OSError as error:
        raise InputError(f'image: cannot read {os.fspath(image)!r} ({error.strerror})') from None
      except ValueError as error:
        raise InputError(f'image {os.fspath(image)!r}: {error}') from None
    if (
      isinstance(image, np.ndarray)
      and image.dtype == np.uint8
      and image.ndim == 3
      and image.shape[2] == 3
    ):
      image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
      shape = (
        f' of shape {image.shape}, {image.dtype}'
        if isinstance(image, np.ndarray)
        else f' {image!r:.80}'
      )
      raise InputError(
        f'image: got {type(image).__name__}{shape}; expected a path, a PIL image or uint8 [H, W, 3]'
      )
    try:
      pixels = Image.fromarray(rgb(image))
    except ValueError as error:
      raise InputError(f'image: {error}') from None
    return np.asarray(pixels.resize((size, size), Image.Resampling.BILINEAR))

  def group(self, size: int | None = None) -> int:
    """How many images fill the devices a few times over: a good number to hand over at once."""
    return 4 * self._lanes * self._rows(1 << 30, (-(-(size or self.size) // self.patch)) ** 2)

  # --- on the devices ---------------------------------------------------------------------------

  def _on_devices(self, program):
    def run(params, x, **static):
      specs = {name: self._specs[name] for name in params}
      return parallel.map_batch(
        lambda params, x, _: program(params, x, **static), params, x, specs=specs
      )

    return run

  def _apply(self, params, name, **arrays):
    return towers.apply(params[name], self.weights.towers[name], self._compute, arrays)

  def _image_program(self, params, images, *, cls, patches):
    out = {
      k: v[:, 0].astype(jnp.float32)
      for k, v in self._apply(params, 'image', images=images[:, None]).items()
    }
    patch = out.pop('patch')
    head = 'image_head' in params
    out['embedding'] = (
      self._apply(params, 'image_head', x=out[cls])['embedding'] if head else out[cls]
    )
    if patches:
      h, w = (-(-s // self.patch) for s in images.shape[1:3])
      out['patch'] = patch.reshape(len(images), h, w, -1)
    return out

  def _inside_program(self, params, images, *, intermediate_layers, values):
    project = lambda x: (
      self._apply(params, 'image_head', x=x)['embedding'] if 'image_head' in params else x
    )
    return towers.inspect(
      params['image'],
      self.weights.image,
      self._compute,
      images,
      cls=self.cls,
      project=project,
      intermediate_layers=intermediate_layers,
      values=values,
    )

  def _text_program(self, params, ids):
    out = self._apply(params, 'text', ids=ids)['text']
    return self._apply(params, 'text_head', x=out)['embedding'] if 'text_head' in params else out

  def _put(self, names):
    """The parameters of towers, on every device."""
    with self._lock:
      for name in names:
        if name in self.weights.towers and name not in self._params:
          params = self.weights.params[name]
          if not self._placed:
            params = jax.device_put(params, NamedSharding(self._mesh, P()))
          self._params[name] = params
      return {name: self._params[name] for name in names if name in self._params}

  def _rows(self, count, tokens):
    """Rows of one call: a power of two on each device, so that few shapes are compiled."""
    devices = self._shards
    most = self._batch_size or max(self._tokens // max(tokens, 1), 1)
    wanted = most if self._exact else min(-(-count // self._lanes), most)
    each = 1 << (-(-wanted // devices) - 1).bit_length()
    return devices * (each if each * devices <= most or each == 1 else each // 2)

  def _map(self, program, names, rows, tokens, prepare=None):
    """program(parameters, rows) of any number of rows, as NumPy. prepare: makes an array of some of
    them.
    """
    params, n = self._put(names), self._rows(len(rows), tokens)

    whole, first = [], threading.Lock()

    def one(begin):
      some = rows[begin : begin + n]
      x = prepare(some) if prepare else some
      missing = (n if self._exact else _bucket(len(x), n, self._shards)) - len(x)
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
    tower = self.weights.towers
    return tower[f'{name}_head'].output if f'{name}_head' in tower else tower[name].width

  def _project(self, x):
    head = self.weights.params.get('image_head')
    return x @ head['kernel'] if head else x


def _bucket(count, most, devices):
  """The smallest number of rows that is compiled for and holds `count`."""
  return min(most, devices << (-(-count // devices) - 1).bit_length())


def _checked(images):
  """uint8 or float32 [B, H, W, 3] of an array."""
  x = images if hasattr(images, 'dtype') and hasattr(images, 'shape') else None
  if x is None or len(x.shape) != 4 or x.shape[3] != 3 or 0 in x.shape[1:]:
    got = f'an array of shape {x.shape}' if x is not None else type(images).__name__
    raise InputError(f'images: got {got}; expected a list of images or one array [B, H, W, 3]')
  x = np.asarray(x)
  if x.dtype == np.uint8:
    return x
  if x.dtype.kind not in 'fV':  # V: bfloat16
    raise InputError(f'images: got {x.dtype}; expected uint8, or floats in [0, 1]')
  x = x.astype(np.float32)
  if x.size and not (x.min() >= 0 and x.max() <= 1):  # also false for nan
    raise InputError(
      f'images: got floats from {x.min():.4g} to {x.max():.4g}; expected [0, 1], not normalized '
      'further'
    )
  return x
