"""The jitted step for a mesh: what the loop runs, and what `plan` compiles for devices that are not
there.
"""

import jax
import numpy as np

from tips_jax.train import sharding, state
from tips_jax.train import step as step_lib
from tips_jax.train.method import Method
from tips_jax.train.state import State


def abstract_state(method: Method, mesh: jax.sharding.Mesh) -> tuple[State, State]:
  """(shapes and shardings of the state, shardings alone)."""
  shapes = jax.eval_shape(lambda: state.init(method))
  places = sharding.shardings(method.config.mesh.rules, mesh, shapes)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
  ), places


def abstract_batch(method: Method) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the global batch that the data pipeline yields."""
  c, b = method.config.data, method.config.schedule.batch_size
  shape = lambda dims, dtype: jax.ShapeDtypeStruct((b, *dims), dtype)
  views = {n: shape((v.count, v.size, v.size, 3), np.uint8) for n, v in c.views.items()}
  texts = {n: shape((c.text_length,), np.int32) for n in c.texts}
  return views | texts | {f'{n}_valid': shape((), np.bool_) for n in c.texts}


def lower(method: Method, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """The step, lowered for the devices of `mesh`: `.compile()` it, then call it with (state,
  batch).
  """
  shapes, places = abstract_state(method, mesh)
  jitted = jax.jit(
    step_lib.make(method),
    donate_argnums=0,
    in_shardings=(places, sharding.batch(mesh)),
    out_shardings=(places, sharding.replicated(mesh)),
  )
  with jax.set_mesh(mesh):
    return jitted.lower(shapes, abstract_batch(method))
