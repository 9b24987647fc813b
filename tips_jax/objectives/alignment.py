"""Words and patches that belong together, found by matching."""

import jax
import jax.numpy as jnp
import optax

from tips_jax.core import parallel, schema
from tips_jax.core.types import Loss
from tips_jax.core.vectors import traced_unit

# Cost of a word that is padding. Above every cosine distance, so that a patch is left with padding
# only where no word is left; and near them, as float32 would lose digits to a large one.
_PADDING = 3.0


def tokens(
  patches: jax.Array,
  words: jax.Array,
  ids: jax.Array,
  state: dict,
  valid: jax.Array | None = None,
  *,
  every_n_steps: schema.Count = 1,
) -> Loss:
  """1 - cosine of the patches and words of an image that a bipartite matching of least cost pairs,
  one to one: the mean over the pairs, then over images and views (after LightCLIP, arXiv
  2312.00674, equations 10 to 13). The smaller of the two sets is matched whole; what is left of the
  other has no loss, and neither have negatives.

  Args:
    patches, words: [B, V, P, D] and [B, T, D], L2-normalized here.
    ids: [B, T] int, 0 is padding, which is matched with nothing.
    valid: [B] bool; pairs that are False have no loss, nor have texts without a word.
    every_n_steps: the matching is done at the first of so many steps, and the loss is 0 at the
      others: its mean is that part of what it would be.
  The matching has no gradient. Metric: similarity, the mean cosine of the pairs.
  """
  if valid is None:
    valid = jnp.ones(ids.shape[0], bool)
  x, y = traced_unit(patches), traced_unit(words)
  keep = ids != 0
  counted = valid & keep.any(axis=1)

  def run(x, y, keep, counted):
    # The loops of a matching end with the data: over the devices each turn would wait for all.
    distances = parallel.map_rows(lambda rows: jax.vmap(_distance)(*rows), (x, y, keep))
    return (distances * counted).sum() / jnp.maximum(counted.sum(), 1)

  turn = state['steps'] % every_n_steps == 0
  value = jax.lax.cond(turn, run, lambda *_: jnp.float32(0), x, y, keep, counted)
  similarity = jnp.where(turn & counted.any(), 1 - value, 0.0)
  return Loss(value, {'similarity': similarity}, {'steps': state['steps'] + 1})


def initial_state(shapes: dict) -> dict[str, jax.Array]:
  """How often the loss was computed before: never."""
  return {'steps': jnp.zeros((), jnp.int32)}


def _distance(x_VPD, y_TD, keep_T):
  """Mean distance of the matched pairs of one image: of its views the mean."""

  def view(x_PD):
    cosines = jnp.dot(x_PD, y_TD.T, precision='highest')
    cost = jnp.where(keep_T, 1 - jax.lax.stop_gradient(cosines), _PADDING)
    patch, word = optax.assignment.hungarian_algorithm(cost)
    real = keep_T[word]
    return ((1 - cosines[patch, word]) * real).sum() / jnp.maximum(real.sum(), 1)

  return jax.vmap(view)(x_VPD).mean()
