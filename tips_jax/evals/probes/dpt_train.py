"""Training of a DPT decoder on cached layers of a frozen encoder, with Probe3D's recipe.

El Banani et al. 2024 and its code: AdamW at 5e-4 with PyTorch's decay of 0.01, 10 epochs in batches
of 8, linear warm-up over the first 1.5 and then a quarter of a cosine, down to 1 %. Depth: 10
sigloss + 0.5 gradient loss; normals: the uncertainty-aware angular loss. Nothing is chosen, so
nothing is held out.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tips_jax.core import files, tree
from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth, dpt, normals
from tips_jax.evals.probes.minibatches import Truth, minibatches

TASKS = ('depth', 'normals')
# Share of the peak learning rate at which the schedule ends.
_FINAL = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  """A trained decoder."""

  # As of evals/probes/dpt.py.
  params: dpt.Params
  # 'depth' or 'normals'.
  task: str
  # Meters of the first and the last bin of depth.
  min_depth: float = depth.MIN_DEPTH
  max_depth: float = depth.MAX_DEPTH
  # [steps], of the training; empty for a decoder that was loaded.
  losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))

  def predict(self, intermediate_layers: dpt.Layers) -> np.ndarray:
    """Depth [B, H', W'] in meters, or normals [B, H', W', 3 or 4] of any length.

    The fourth channel is the logit of the uncertainty. H' = 16 ceil(h / 2); `add` of the task's
    scorer resizes it to the truth.
    """
    # Cached features are float16.
    layers = []
    for patch, cls in intermediate_layers:
      layers.append((np.asarray(patch, np.float32), np.asarray(cls, np.float32)))
    if self.task == 'normals':
      return np.asarray(dpt.apply(self.params, layers))
    meters = dpt.depth(self.params, layers, min_depth=self.min_depth, max_depth=self.max_depth)
    return np.asarray(meters)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes an npz of the complete decoder, with the uncertainty; replaces `path` at the end."""
    about = {'task': self.task, 'min_depth': self.min_depth, 'max_depth': self.max_depth}
    arrays = {'about': np.array(json.dumps(about)), **dict(tree.named_leaves(self.params))}
    files.write(path, lambda file: np.savez(file, **arrays))


# What NumPy and JSON raise for a file that is missing, cut or something else.


def load(path: str | pathlib.Path) -> Decoder:
  """Reads what `Decoder.save` wrote. InputError where it is something else."""
  try:
    with np.load(path, allow_pickle=False) as file:
      leaves = {name: file[name] for name in file.files}
    about = json.loads(str(leaves.pop('about')))
    return Decoder(params=tree.nested(leaves), **about)
  except Exception as error:  # damaged files raise a dozen kinds
    raise InputError(
      f'{str(path)!r}: got no decoder ({error}); expected a file that an evaluation wrote'
    ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPTRecipe:
  """How a decoder is built and trained; the defaults are Probe3D's."""

  # 'depth' or 'normals'.
  task: str
  # Width of the fusion blocks, and of the four levels before them (None: see dpt.init).
  channels: int = dpt.CHANNELS
  widths: tuple[int, ...] | None = None
  epochs: int = 10
  batch: int = 8
  learning_rate: float = 5e-4
  # Epochs over which the learning rate rises linearly, at most half of them.
  warmup_epochs: float = 1.5
  # PyTorch's default for AdamW.
  weight_decay: float = 0.01
  # Of depth: the bins, and the meters of the first and the last one. Truth beyond is missing.
  bins: int = depth.BINS
  min_depth: float = depth.MIN_DEPTH
  max_depth: float = depth.MAX_DEPTH
  # Of depth: weights of `sigloss` and `gradient_loss`.
  sig_weight: float = 10.0
  gradient_weight: float = 0.5
  # Of normals: a fourth output and Probe3D's loss. Without it the loss is the plain angle, as in
  # TIPSv2's heads.
  uncertainty: bool = True
  seed: int = 0

  def __post_init__(self):
    if self.task not in TASKS:
      raise InputError(f'dpt: task: got {self.task!r}; expected one of {TASKS}')
    # A list, as configs and JSON have it, could not be a static argument of a compiled step.
    object.__setattr__(self, 'widths', self.widths and tuple(self.widths))

  @property
  def outputs(self) -> int:
    """Channels of the last layer."""
    if self.task == 'depth':
      return self.bins
    return 3 + bool(self.uncertainty)

  def steps(self, images: int) -> int:
    return self.epochs * self._per_epoch(images)

  def optimizer(self, images: int) -> optax.GradientTransformation:
    return optax.adamw(
      functools.partial(self.schedule, images=images), weight_decay=self.weight_decay
    )

  def schedule(self, step: int | jax.Array, *, images: int) -> jax.Array:
    """Learning rate of a step of the training on so many images."""
    steps = self.steps(images)
    warmup = min(self.warmup_epochs * self._per_epoch(images), steps / 2)
    rising = step / max(warmup, 1e-9)
    falling = jnp.cos(math.pi / 2 * (step - warmup) / max(steps - warmup, 1e-9))
    factor = jnp.where(step <= warmup, rising, falling)
    return self.learning_rate * (_FINAL + (1 - _FINAL) * factor)

  def _per_epoch(self, images):
    return max(images // self.batch, 1)


def fit(intermediate_layers: dpt.Layers, truth: Truth, recipe: DPTRecipe) -> Decoder:
  """Trains a decoder on four intermediate layers (patch [N, h, w, D], cls [N, D]).

  truth(i): depth [H, W] in meters (0 = missing) or unit normals [H, W, 3] (0 = missing) of image i;
  in training all take the size of the first (nearest pixel). Arrays may be memory-mapped.
  InputError where no image has truth.
  """
  count = len(intermediate_layers[0][0])
  width = intermediate_layers[0][0].shape[-1]
  known = normals.known
  if recipe.task == 'depth':
    known = functools.partial(depth.known, max_depth=recipe.max_depth)
  if not any(known(np.asarray(truth(i))).any() for i in range(count)):
    raise InputError(
      f'dpt: got no pixel with {recipe.task} in {count} training images; expected some'
    )
  params = dpt.init(
    jax.random.key(recipe.seed),
    width=width,
    outputs=recipe.outputs,
    channels=recipe.channels,
    widths=recipe.widths,
  )
  state = recipe.optimizer(count).init(params)
  losses = []
  flat = [array for layer in intermediate_layers for array in layer]
  for arrays, target in minibatches(
    flat,
    truth,
    np.arange(count),
    batch=recipe.batch,
    steps=recipe.steps(count),
    seed=recipe.seed,
    shape=np.shape(truth(0))[:2],
  ):
    pairs = list(zip(arrays[::2], arrays[1::2]))
    target = np.asarray(target, np.float32)
    params, state, loss = _step(params, state, pairs, target, recipe=recipe, images=count)
    losses.append(loss)
  return Decoder(
    params=jax.tree.map(np.asarray, params),
    task=recipe.task,
    min_depth=recipe.min_depth,
    max_depth=recipe.max_depth,
    losses=np.array(losses, np.float32),
  )


@functools.partial(jax.jit, static_argnames=('recipe', 'images'), donate_argnums=(0, 1))
def _step(params, state, intermediate_layers, truth, *, recipe, images):
  """One update: (params, optimizer state, loss)."""
  loss, grads = jax.value_and_grad(_loss)(params, intermediate_layers, truth, recipe)
  updates, state = recipe.optimizer(images).update(grads, state, params)
  return optax.apply_updates(params, updates), state, loss


def _loss(params, intermediate_layers, truth, recipe):
  shape = truth.shape[1:3]
  if recipe.task == 'depth':
    valid = depth.known(truth, max_depth=recipe.max_depth)
    small = dpt.depth(
      params, intermediate_layers, min_depth=recipe.min_depth, max_depth=recipe.max_depth
    )
    predicted = depth.resize(small, shape)
    sig = depth.sigloss(predicted, truth, valid)
    gradient = depth.gradient_loss(predicted, truth, valid)
    return recipe.sig_weight * sig + recipe.gradient_weight * gradient
  predicted = dpt.apply(params, intermediate_layers)
  if predicted.shape[1:3] != shape:
    predicted = bicubic(predicted, shape)
  valid = jnp.abs(truth).max(-1) > 1e-6
  if predicted.shape[-1] > 3:
    return normals.uncertain_loss(predicted, truth, valid)
  return normals.angular_loss(predicted, truth, valid)


def bicubic(maps: jax.Array, shape: Sequence[int]) -> jax.Array:
  """[B, h, w, K] to [B, H, W, K] as PyTorch's bicubic interpolate.

  Half-pixel centers, no antialiasing, and a = -0.75, where jax.image.resize has -0.5.
  """
  rows = _cubic(maps.shape[1], shape[0])
  columns = _cubic(maps.shape[2], shape[1])
  return jnp.einsum('yh,bhwc,xw->byxc', rows, maps, columns, optimize='optimal')


def _cubic(n, m, a=-0.75):
  """Weights [m, n] of the four nearest of n cells for each of m pixels."""
  position = (np.arange(m) + 0.5) * n / m - 0.5
  first = np.floor(position).astype(int) - 1
  matrix = np.zeros((m, n), np.float32)
  for offset in range(4):
    t = np.abs(position - (first + offset))
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((t - 5) * t + 8) * t * a - 4 * a
    # Cells beyond the border repeat the last one, whose weights add up.
    cell = np.clip(first + offset, 0, n - 1)
    np.add.at(matrix, (np.arange(m), cell), np.where(t <= 1, near, far))
  return matrix
