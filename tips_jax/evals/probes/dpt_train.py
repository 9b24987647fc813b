"""Training of a DPT decoder on cached intermediate_layers of a frozen encoder, for depth or
normals, with Probe3D's recipe.

El Banani et al. 2024 and its code: AdamW at 5e-4 with PyTorch's decay of 0.01, 10 epochs in batches
of 8, linear warm-up over the first 1.5 and then a quarter of a cosine, down to 1 %. Depth: 10
sigloss + 0.5 gradient loss; normals: the uncertainty-aware angular loss. Nothing is chosen, so
nothing is held out.
"""

import dataclasses
import functools
import json
import math
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tips_jax.core import tree
from tips_jax.core.errors import InputError
from tips_jax.evals.probes import depth as depth_lib
from tips_jax.evals.probes import dpt, normals

TASKS = ('depth', 'normals')
_FLOOR = 0.01  # of the learning rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  """A trained decoder; params as of evals/probes/dpt.py, losses [steps] of the training. Depth in
  min_depth..max_depth m.
  """

  params: dict
  task: str
  min_depth: float = depth_lib.MIN_DEPTH
  max_depth: float = depth_lib.MAX_DEPTH
  losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))

  def predict(self, intermediate_layers) -> np.ndarray:
    """Depth [B, H', W'] in meters, or normals [B, H', W', 3 or 4] of any length (the fourth: the
    uncertainty's logit).

    H' = 16 ceil(h / 2); `Scorer.add` of the task brings it to the truth's size.
    """
    intermediate_layers = [
      (np.asarray(patch, np.float32), np.asarray(cls, np.float32))
      for patch, cls in intermediate_layers
    ]
    if self.task == 'depth':
      return np.asarray(
        dpt.depth(
          self.params, intermediate_layers, min_depth=self.min_depth, max_depth=self.max_depth
        )
      )
    return np.asarray(dpt.apply(self.params, intermediate_layers))

  def save(self, path):
    """Writes an npz with the whole decoder, the uncertainty too; it replaces `path` only when it is
    complete.
    """
    about = json.dumps(
      {'task': self.task, 'min_depth': self.min_depth, 'max_depth': self.max_depth}
    )
    with open(f'{path}.tmp', 'wb') as file:
      np.savez(file, about=np.array(about), **dict(tree.named_leaves(self.params)))
    os.replace(f'{path}.tmp', path)


def load(path) -> Decoder:
  """What `Decoder.save` wrote. InputError where it is something else."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return Decoder(
        **json.loads(str(file['about'])),
        params=tree.nested({name: file[name] for name in file.files if name != 'about'}),
      )
  except (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    zipfile.BadZipFile,
  ) as error:
    raise InputError(
      f'{str(path)!r}: got no decoder ({error}); expected a file that the evaluation wrote; official '
      'ones are read by dpt.read_official'
    ) from None


def fit(
  intermediate_layers,
  truth,
  *,
  task,
  channels=dpt.CHANNELS,
  widths=None,
  epochs=10,
  batch=8,
  learning_rate=5e-4,
  warmup_epochs=1.5,
  weight_decay=0.01,
  bins=depth_lib.BINS,
  min_depth=depth_lib.MIN_DEPTH,
  max_depth=depth_lib.MAX_DEPTH,
  sig_weight=10.0,
  gradient_weight=0.5,
  uncertainty=True,
  seed=0,
) -> Decoder:
  """Trains a decoder on four intermediate_layers (patch [N, h, w, D], cls [N, D]), which may lie on
  disk.

  truth(i): depth [H, W] in meters (0 = missing) or unit normals [H, W, 3] (0 = missing) of image i;
  in the training all take the size of the first (nearest pixel). `uncertainty`: a fourth output and
  Probe3D's loss for normals; without it, as in TIPSv2's released heads, the plain angle.
  InputError: unknown task, no image, nothing known in any image.
  """
  if task not in TASKS:
    raise InputError(f'dpt: task: got {task!r}; expected one of {TASKS}')
  count, width = len(intermediate_layers[0][0]), intermediate_layers[0][0].shape[-1]
  valid = (
    normals.known if task == 'normals' else functools.partial(depth_lib.known, max_depth=max_depth)
  )
  if not any(valid(np.asarray(truth(i))).any() for i in range(count)):
    raise InputError(f'dpt: got no pixel with {task} in {count} training images; expected some')
  outputs = bins if task == 'depth' else 3 + bool(uncertainty)
  params = dpt.init(
    jax.random.key(seed),
    width=width,
    outputs=outputs,
    channels=channels,
    widths=widths and tuple(widths),
  )
  per_epoch = max(count // batch, 1)
  steps = epochs * per_epoch
  recipe = _Recipe(
    task=task,
    steps=steps,
    warmup=min(warmup_epochs * per_epoch, steps / 2),
    min_depth=min_depth,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    max_depth=max_depth,
    sig_weight=sig_weight,
    gradient_weight=gradient_weight,
  )
  state, losses = recipe.optimizer.init(params), []
  flat = [array for layer in intermediate_layers for array in layer]
  for arrays, target in depth_lib.minibatches(
    flat, truth, np.arange(count), batch=batch, steps=steps, seed=seed, shape=np.shape(truth(0))[:2]
  ):
    pairs = list(zip(arrays[::2], arrays[1::2]))
    params, state, loss = _step(params, state, pairs, np.asarray(target, np.float32), recipe=recipe)
    losses.append(loss)
  return Decoder(
    params=jax.tree.map(np.asarray, params),
    task=task,
    min_depth=min_depth,
    max_depth=max_depth,
    losses=np.array(losses, np.float32),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
  task: str
  steps: int
  warmup: float
  learning_rate: float
  weight_decay: float
  min_depth: float
  max_depth: float
  sig_weight: float
  gradient_weight: float

  @property
  def optimizer(self):
    return optax.adamw(self.schedule, weight_decay=self.weight_decay)

  def schedule(self, step):
    rising = step / max(self.warmup, 1e-9)
    falling = jnp.cos(math.pi / 2 * (step - self.warmup) / max(self.steps - self.warmup, 1e-9))
    return self.learning_rate * (
      _FLOOR + (1 - _FLOOR) * jnp.where(step <= self.warmup, rising, falling)
    )


@functools.partial(jax.jit, static_argnames='recipe', donate_argnums=(0, 1))
def _step(params, state, intermediate_layers, truth, *, recipe):
  """One update: (params, optimizer state, loss)."""
  loss, grads = jax.value_and_grad(_loss)(params, intermediate_layers, truth, recipe)
  updates, state = recipe.optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state, loss


def _loss(params, intermediate_layers, truth, recipe):
  shape = truth.shape[1:3]
  if recipe.task == 'depth':
    valid = depth_lib.known(truth, max_depth=recipe.max_depth)
    small = dpt.depth(
      params, intermediate_layers, min_depth=recipe.min_depth, max_depth=recipe.max_depth
    )
    predicted = depth_lib.resize(small, shape)
    return recipe.sig_weight * depth_lib.sigloss(
      predicted, truth, valid
    ) + recipe.gradient_weight * depth_lib.gradient_loss(predicted, truth, valid)
  raw = dpt.apply(params, intermediate_layers)
  predicted = raw if raw.shape[1:3] == shape else bicubic(raw, shape)
  valid = jnp.abs(truth).max(-1) > 1e-6
  loss = normals.uncertain_loss if raw.shape[-1] > 3 else normals.angular_loss
  return loss(predicted, truth, valid)


def bicubic(maps, shape):
  """[B, h, w, K] to [B, H, W, K] as PyTorch's bicubic interpolate: half-pixel centers, a = -0.75,
  no antialiasing.
  """
  return jnp.einsum(
    'yh,bhwc,xw->byxc',
    _cubic(maps.shape[1], shape[0]),
    maps,
    _cubic(maps.shape[2], shape[1]),
    optimize='optimal',
  )


def _cubic(n, m, a=-0.75):
  position = (np.arange(m) + 0.5) * n / m - 0.5
  first = np.floor(position).astype(int) - 1
  matrix = np.zeros((m, n), np.float32)
  for layer in range(4):
    t = np.abs(position - (first + layer))
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((t - 5) * t + 8) * t * a - 4 * a
    np.add.at(matrix, (np.arange(m), np.clip(first + layer, 0, n - 1)), np.where(t <= 1, near, far))
  return matrix
