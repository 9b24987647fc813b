"""The jitted step for a mesh: what the loop runs, and what `plan` compiles for devices that are not
there.
"""

import re
from collections.abc import Collection

import jax

from tips_jax.core import chips
from tips_jax.core.errors import InputError
from tips_jax.data.reading.batch import layout
from tips_jax.train import sharding, state, summary
from tips_jax.train import step as step_lib
from tips_jax.train.method import Method, only
from tips_jax.train.state import State

# Options of XLA where its defaults cost time, by platform or by the name of a chip, which goes
# before its platform (docs/plans.md has the figures).
OPTIONS = {
  # Else products of several crops with the same weights become one, for which their inputs and its
  # results are copied.
  'gpu': {'xla_gpu_dot_merger_threshold_mb': '0'},
  # Products get larger tiles than with libtpu's own limit, and enough is left for weights that stay
  # on chip from one crop to the next.
  'v5e': {'xla_tpu_scoped_vmem_limit_kib': '32768'},
  'v5p': {'xla_tpu_scoped_vmem_limit_kib': '32768'},
}


def options(method: Method, device: jax.Device) -> dict[str, str]:
  """Options of XLA for the step on devices like this one: `compute.options` over OPTIONS."""
  own = OPTIONS.get(device.platform, {}) | OPTIONS.get(chips.name(device.device_kind), {})
  return own | dict(map(_option, method.config.compute.options))


def _option(text):
  """(name, value) as jax takes them."""
  name, _, value = text.partition('=')
  if value in ('true', 'false'):
    value = value.title()
  return name, value


def refused_option(error: Exception) -> InputError | None:
  """What a compiler says of an option that it does not know or that its device must not have, or
  whose value it cannot read; None for its other errors.
  """
  line = str(error).splitlines()[0]
  if not re.search('compile option|While setting option|is not a valid|disable it with xla', line):
    return None
  return InputError(
    f'compute.options: {line}; expected options of the XLA of jax {jax.__version__}'
  )


def abstract_state(method: Method, mesh: jax.sharding.Mesh) -> tuple[State, State]:
  """(shapes and shardings of the state, shardings alone)."""
  # Shapes alone: the devices may not be there, or too small for a state without shardings.
  shapes = jax.eval_shape(lambda: state.init(method))
  places = sharding.shardings(method.config.mesh.rules, mesh, shapes)

  def placed(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  return jax.tree.map(placed, shapes, places), places


def abstract_batch(method: Method) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the global batch that the data pipeline yields."""
  rows = method.config.schedule.batch_size
  entries = layout(method.config.data)
  return {name: jax.ShapeDtypeStruct((rows, *e.shape), e.dtype) for name, e in entries.items()}


def lower(
  method: Method, mesh: jax.sharding.Mesh, losses: Collection[str] | None = None
) -> jax.stages.Lowered:
  """The step, lowered for the devices of `mesh`: `.compile()` it, then call it with (state, batch).

  losses: only these, with the passes that they need; the state is that of the whole method.
  InputError for a method whose arrays do not fit each other.
  """
  summary.shapes(method)
  part = method
  if losses is not None:
    part = only(method, losses)
  shapes, places = abstract_state(method, mesh)
  # The old state is given away: two of them would not fit where one of a large model does.
  jitted = jax.jit(
    step_lib.make(part),
    donate_argnums=0,
    in_shardings=(places, sharding.batch(mesh)),
    out_shardings=(places, sharding.replicated(mesh)),
    compiler_options=options(method, mesh.devices.flat[0]),
  )
  try:
    with jax.set_mesh(mesh):
      return jitted.lower(shapes, abstract_batch(method))
  except InputError:
    raise
  except RuntimeError as error:
    if 'cuDNN' not in str(error):
      raise
    raise InputError(
      f'compute.attention: it needs cuDNN ({error}); expected `pip install nvidia-cudnn-cu12`, or '
      "'plain'"
    ) from None
  except (TypeError, ValueError) as error:  # jax's, of arrays that an operation cannot take
    raise InputError(
      f'config: passes and losses that do not fit each other: {str(error).splitlines()[0]}'
    ) from error


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """The program; InputError for options that the compiler does not take."""
  try:
    return lowered.compile()
  except Exception as error:  # jax raises its runtime error, of several names
    raise (refused_option(error) or error) from None
