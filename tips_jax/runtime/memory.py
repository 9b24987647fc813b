"""Whether the step fits into the memory of the devices."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from tips_jax.core.errors import InputError


@contextlib.contextmanager
def must_fit() -> Iterator[None]:
  """InputError where the compiler or a device has too little memory: another start has no more."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise _too_large(str(error)) from error


def checked(compiled: Any) -> Any:
  """The compiled step, or InputError where this device cannot hold it. A GPU would say so at the
  first step, and only where it allocates.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get('bytes_limit', 0)
  use = compiled.memory_analysis()
  if not limit or use is None:
    return compiled
  needed = use.argument_size_in_bytes + use.temp_size_in_bytes + use.output_size_in_bytes
  needed -= use.alias_size_in_bytes
  if needed > limit:
    raise _too_large(f'it needs {needed / 1e9:.1f} GB of {limit / 1e9:.1f}')
  return compiled


def _too_large(why):
  kind = jax.local_devices()[0].device_kind
  return InputError(
    f'the step does not fit into the memory of a {kind}: {why[:300]}; expected less: more parts in '
    'mesh.fsdp, compute.remat=products or full, schedule.accumulate, a smaller batch or more '
    'devices; python -m tips_jax.plan says which of them fit'
  )
