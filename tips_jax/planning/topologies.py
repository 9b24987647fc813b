"""TPU topologies to plan for, without the devices."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tips_jax.core.chips import CHIPS, Chip, of_kind
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown

if TYPE_CHECKING:
  import jax

TPUS = tuple(c.name for c in CHIPS.values() if c.dims)
_LARGEST = {2: 256, 3: 8960}  # chips of a slice by dimensions of the torus
_SIDES = {2: (1, 2, 4, 8, 16), 3: (1, 2, *range(4, 33, 4))}


def shape_for(chip: str, count: int) -> str:
  """'v5e:4x8' for a chip and a number: the squarest torus, with the longer sides last.

  2 dimensions: powers of two up to 16x16. 3 dimensions: sides of 1, 2 or multiples of 4.
  """
  if chip not in TPUS:
    raise unknown('--chip', chip, TPUS)
  dims = CHIPS[chip].dims
  sides = _SIDES[dims]
  shapes = list(_shapes(count, sides, dims))
  if not shapes or count > _LARGEST[dims]:
    possible = [n for n in range(1, _LARGEST[dims] + 1) if any(_shapes(n, sides, dims))]
    hint = min(possible, key=lambda n: abs(n - count))
    raise InputError(
      f'--chips: got {count}; expected a number that {chip} slices have; did you mean {hint}?'
    )
  return f'{chip}:' + 'x'.join(map(str, min(shapes, key=sum)))


def _shapes(
  count: int, sides: Sequence[int], dims: int, least: int = 1
) -> Iterator[tuple[int, ...]]:
  """All shapes with that many chips, sides in increasing order."""
  if dims == 1:
    if count in sides and count >= least:
      yield (count,)
    return
  for side in sides:
    if side >= least and count % side == 0:
      for rest in _shapes(count // side, sides, dims - 1, side):
        yield (side, *rest)


def devices(topology: str, slices: int = 1) -> tuple[Chip, Sequence['jax.Device']]:
  """(Chip, devices) of 'v5p:8x8x8' ahead of time, or of the attached devices ('gpu', 'cpu').

  InputError without libtpu, and for a chip or a shape that libtpu does not know.
  """
  import jax

  if topology in ('gpu', 'cpu'):
    try:
      attached = jax.devices({'gpu': 'cuda', 'cpu': 'cpu'}[topology])
    except RuntimeError as error:
      raise InputError(
        f'--topology: got {topology!r}; expected an attached device ({error})'
      ) from None
    return of_kind(attached[0].device_kind), attached
  name, _, shape = topology.partition(':')
  if name not in TPUS:
    raise unknown('--topology', topology, ['auto', 'gpu', 'cpu', *map(_example, TPUS)])
  chip = CHIPS[name]
  sides = [int(n) for n in re.findall(r'\d+', shape)]
  valid = re.fullmatch(r'\d+(x\d+)*', shape) and math.prod(sides)
  # libtpu takes 4x4x1 for a chip of two dimensions, too.
  if not valid or len(sides) not in (chip.dims, 3):
    count = math.prod(sides) if sides else 8
    raise InputError(
      f'--topology: got {topology!r}; expected {name}:{"x".join("N" * chip.dims)}; did you mean '
      f'{_nearest(name, count)!r}?'
    )
  return chip, _topology(topology, sides, chip, slices)


def _topology(
  topology: str, sides: Sequence[int], chip: Chip, slices: int
) -> Sequence['jax.Device']:
  from jax.experimental import topologies

  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # libtpu locks the TPU for one process, but nothing runs on a TPU here.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # A host has up to 2 x 2 chips.
  bounds = list(map(min, (*sides, 1), (2, 2, 1)))
  more = {}
  if chip.config:
    more['chip_config_name'] = chip.config
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
def hidden_flags() -> Iterator[None]:
  """Hides XLA_FLAGS from libtpu, which exits the process at an unknown flag, such as one for CPUs.

  Flags for libtpu are in LIBTPU_INIT_ARGS.
  """
  import jax

  jax.devices('cpu')  # so that the CPU's compiler has read the flags
  kept = os.environ.pop('XLA_FLAGS', None)
  try:
    yield
  finally:
    if kept is not None:
      os.environ['XLA_FLAGS'] = kept


def _example(name: str) -> str:
  return f'{name}:{"x".join("4" * CHIPS[name].dims)}'


def _nearest(name: str, count: int) -> str:
  """The topology with the power of two of chips that is nearest to a number."""
  counts = [2**k for k in range(14) if 2**k <= _LARGEST[CHIPS[name].dims]]
  return shape_for(name, min(counts, key=lambda n: abs(math.log(n / max(count, 1)))))
