"""TPU topologies that can be planned for, without the devices."""

import contextlib
import math
import os
import re

from tips_jax.core.chips import CHIPS, of_kind
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown

TPUS = tuple(c.name for c in CHIPS.values() if c.dims)
_LARGEST = {2: 256, 3: 8960}


def shape_for(chip, count):
  """'v5e:4x8' for a chip and a number: the squarest torus, with the longer sides last.

  2 dimensions: powers of two up to 16x16. 3 dimensions: sides of 1, 2 or multiples of 4.
  """
  if chip not in TPUS:
    raise unknown('--chip', chip, TPUS)
  dims = CHIPS[chip].dims
  sides = [1, 2, 4, 8, 16] if dims == 2 else [1, 2, *range(4, 33, 4)]
  found = [s for s in _shapes(count, sides, dims)]
  if not found or count > _LARGEST[dims]:
    near = [n for n in range(1, _LARGEST[dims] + 1) if next(_shapes(n, sides, dims), None)]
    hint = min(near, key=lambda n: abs(n - count))
    raise InputError(
      f'--chips: got {count}; expected a number that {chip} slices have; did you mean {hint}?'
    )
  return f'{chip}:' + 'x'.join(map(str, min(found, key=sum)))


def _shapes(count, sides, dims, least=1):
  if dims == 1:
    if count in sides and count >= least:
      yield (count,)
    return
  for side in sides:
    if side >= least and count % side == 0:
      for rest in _shapes(count // side, sides, dims - 1, side):
        yield (side, *rest)


def devices(topology, slices=1):
  """(Chip, devices) of 'v5p:8x8x8' ahead of time, or of the attached devices ('gpu', 'cpu').

  InputError: no libtpu; a chip or a shape that it does not know.
  """
  import jax

  if topology in ('gpu', 'cpu'):
    try:
      found = jax.devices('cuda' if topology == 'gpu' else 'cpu')
    except RuntimeError as error:
      raise InputError(
        f'--topology: got {topology!r}; expected an attached device ({error})'
      ) from None
    return of_kind(found[0].device_kind), found
  name, _, shape = topology.partition(':')
  if name not in TPUS:
    raise unknown(
      '--topology', topology, ['auto', 'gpu', 'cpu', *(f'{t}:{_example(t)}' for t in TPUS)]
    )
  chip, sides = CHIPS[name], [int(n) for n in re.findall(r'\d+', shape)]
  if (
    not re.fullmatch(r'\d+(x\d+)*', shape)
    or len(sides) not in (chip.dims, 3)
    or not math.prod(sides)
  ):
    raise InputError(
      f'--topology: got {topology!r}; expected {name}:{"x".join("N" * chip.dims)}; did you mean '
      f'{_nearest(name, math.prod(sides) if sides else 8)!r}?'
    )
  return chip, _topology(topology, sides, chip, slices)


def _topology(topology, sides, chip, slices):
  from jax.experimental import topologies

  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault(
    'ALLOW_MULTIPLE_LIBTPU_LOAD', '1'
  )  # nothing runs on a TPU here: no need for the lock
  bounds = [s if s == 1 else min(s, b) for s, b in zip((*sides, 1)[:3], (2, 2, 1))]
  more = {'chip_config_name': chip.config} if chip.config else {}
  try:
    with hidden_flags():
      return topologies.get_topology_desc(
        platform='tpu',
        topology_name=topology,
        num_slices=slices,
        chips_per_host_bounds=bounds,
        **more,
      ).devices
  except Exception as error:  # the plugin's own type
    text = ' '.join(str(error).split())
    if 'libtpu' in text and ('not' in text.lower() or 'unable' in text.lower()):
      raise InputError(
        "--topology: libtpu, the TPU compiler, is missing; expected `pip install 'tips_jax[tpu]'`"
      ) from None
    raise InputError(
      f'--topology: got {topology!r}; libtpu does not know it ({text[:200]}); did you mean '
      f'{_nearest(chip.name, math.prod(sides))!r}?'
    ) from None


@contextlib.contextmanager
def hidden_flags():
  """Keeps XLA_FLAGS from libtpu, which ends the process at a flag that it does not know, such as
  one for CPUs.

  Flags for libtpu stand in LIBTPU_INIT_ARGS.
  """
  import jax

  jax.devices('cpu')  # the CPU's compiler reads them first
  kept = os.environ.pop('XLA_FLAGS', None)
  try:
    yield
  finally:
    if kept is not None:
      os.environ['XLA_FLAGS'] = kept


def _example(name):
  return '4x4' if CHIPS[name].dims == 2 else '4x4x4'


def _nearest(name, count):
  counts = [2**k for k in range(14) if 2**k <= _LARGEST[CHIPS[name].dims]]
  return shape_for(name, min(counts, key=lambda n: abs(math.log(n / max(count, 1)))))
