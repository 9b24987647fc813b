"""Collectives of programs on eight fake devices against counts by hand, and the ways in which
groups are written.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tips_jax.planning import collectives, hlo


def mesh_of(data, fsdp):
  auto = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((data, fsdp), ('data', 'fsdp'), axis_types=auto)


def found(fn, mesh, shape, spec, out):
  """Collectives of fn, run on each device's part of a float32 array."""
  mapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False))
  x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
  return collectives.find(hlo.parse(mapped.lower(x).compile().as_text()), mesh)


@pytest.mark.parametrize('axes, n', [(('data',), 2), (('fsdp',), 4), (('data', 'fsdp'), 8)])
def test_bytes_and_axes_of_each_kind(axes, n):
  mesh, whole = mesh_of(2, 4), P(('data', 'fsdp'))
  gather = found(lambda x: lax.all_gather(x, axes, axis=0, tiled=True), mesh, (64, 16), whole, P())
  assert [(c.kind, c.axes, c.count) for c in gather] == [('all-gather', axes, 1)]
  assert gather[0].bytes == (n - 1) / n * (8 * n * 16 * 4)
  reduced = found(lambda x: lax.psum(x, axes), mesh, (64, 16), whole, P())
  assert [(c.kind, c.axes) for c in reduced] == [('all-reduce', axes)]
  assert reduced[0].bytes == 2 * (n - 1) / n * (8 * 16 * 4)
  scattered = found(
    lambda x: lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True), mesh, (64, 16), whole, P()
  )
  assert [(c.kind, c.axes) for c in scattered] == [('reduce-scatter', axes)]
  assert scattered[0].bytes == (n - 1) / n * (8 * 16 * 4)


def test_all_to_all_and_permutation():
  mesh = mesh_of(2, 4)
  one = found(
    lambda x: lax.all_to_all(x, 'fsdp', 0, 1, tiled=True), mesh, (64, 16), P(('data', 'fsdp')), P()
  )
  assert sum(c.bytes for c in one) == 3 / 4 * 8 * 16 * 4 and {c.axes for c in one} == {('fsdp',)}
  ring = [(i, (i + 1) % 2) for i in range(2)]
  two = found(lambda x: lax.ppermute(x, 'data', ring), mesh, (64, 16), P(('data', 'fsdp')), P())
  assert [(c.kind, c.axes, c.bytes) for c in two] == [('collective-permute', ('data',), 8 * 16 * 4)]


def test_collectives_in_a_loop_count_every_turn():
  def fn(x):
    return lax.scan(lambda x, _: (jnp.tanh(lax.psum(x, 'fsdp')), None), x, None, length=7)[0]

  (one,) = found(fn, mesh_of(2, 4), (64, 16), P(('data', 'fsdp')), P(('data', 'fsdp')))
  assert (one.kind, one.count, one.bytes, one.open_ended) == (
    'all-reduce',
    7,
    7 * 2 * 3 / 4 * 8 * 16 * 4,
    False,
  )


def test_a_collective_in_a_loop_that_the_data_end_is_told():
  def fn(x):
    return lax.while_loop(lambda x: lax.psum(x.sum(), ('data', 'fsdp')) < 100, lambda x: x + 1, x)

  assert all(
    c.open_ended
    for c in found(fn, mesh_of(2, 4), (64, 16), P(('data', 'fsdp')), P(('data', 'fsdp')))
  )


ROWS, COLUMNS = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
  'text, expected',
  [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}, x', ROWS),
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}, x', COLUMNS),
    ('replica_groups=[2,4]<=[8], x', ROWS),
    ('replica_groups=[4,2]<=[2,4]T(1,0), x', COLUMNS),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", ROWS),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", COLUMNS),
    ("replica_groups=mesh['a'=8] {'a':(2)4}, x", ROWS),
    ("replica_groups=mesh['a'=8] {'a':(1)2}, x", COLUMNS),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", [list(range(8))]),
    ('replica_groups={}, x', [list(range(8))]),
  ],
)
def test_groups_in_every_notation(text, expected):
  assert collectives.groups(text, 8) == expected


def test_axes_are_named_by_the_mesh():
  grid, names = np.arange(8).reshape(2, 4), ('data', 'fsdp')
  name = lambda g: collectives.axes_of(g, grid, names)
  assert name(ROWS) == ('fsdp',) and name(COLUMNS) == ('data',) and name([list(range(8))]) == names
  assert name([[0, 1, 2, 7]]) == ('?',)
  small = collectives.axes_of([[0, 1, 2, 3]], np.arange(8).reshape(1, 8), names)
  assert small == ('?',)  # half of an axis is none


CHAIN = """HloModule jit_f, is_scheduled=true

%begin (a: bf16[8,16]) -> bf16[32,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,16]{1,0} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, \
frontend_attributes={chain_id="5"}
}

%middle (b: bf16[8,16], c: bf16[16,16]) -> bf16[8,16] {
  %b = bf16[8,16]{1,0} parameter(0)
  %c = bf16[16,16]{1,0} parameter(1)
  %all-gather.2 = bf16[32,16]{1,0} all-gather(%b), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, \
frontend_attributes={chain_id="5"}
  ROOT %convolution.1 = bf16[8,16]{1,0} convolution(%b, %c), dim_labels=bf_io->bf
}

%end (d: bf16[8,16]) -> bf16[32,16] {
  %d = bf16[8,16]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[32,16]{1,0} all-gather(%d), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, \
frontend_attributes={chain_id="5"}
}

ENTRY %main (p: bf16[8,16], w: bf16[16,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,16]{1,0} parameter(1)
  %async-collective-start = bf16[32,16]{1,0} fusion(%p), kind=kCustom, calls=%begin
  %fusion.1 = bf16[8,16]{1,0} fusion(%p, %w), kind=kOutput, calls=%middle
  ROOT %async-collective-done = bf16[32,16]{1,0} fusion(%p), kind=kCustom, calls=%end
}
"""


def test_pieces_of_a_collective_spread_over_fusions_count_once():
  (one,) = collectives.find(hlo.parse(CHAIN), mesh_of(2, 4))
  assert (one.kind, one.axes, one.count, one.bytes) == (
    'all-gather',
    ('fsdp',),
    1,
    3 / 4 * 32 * 16 * 2,
  )
  assert one.overlapped
  lonely = CHAIN.replace('  %all-gather.2', '  %copy.2').replace(' all-gather(%b)', ' copy(%b)')
  (one,) = collectives.find(hlo.parse(lonely), mesh_of(2, 4))
  assert not one.overlapped


def test_a_start_and_an_end_with_work_between_them():
  text = """HloModule jit_f

ENTRY %main (p: f32[8,16], w: f32[16,16]) -> f32[32,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %w = f32[16,16]{1,0} parameter(1)
  %all-gather-start = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %dot = f32[8,16]{1,0} dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %all-gather-done = f32[32,16]{1,0} all-gather-done(%all-gather-start)
}
"""
  (one,) = collectives.find(hlo.parse(text), mesh_of(2, 4))
  assert (one.kind, one.bytes, one.overlapped) == ('all-gather', 3 / 4 * 32 * 16 * 4, True)
  work = next(line for line in text.splitlines() if '%dot' in line)
  (one,) = collectives.find(hlo.parse(text.replace(work + '\n', '')), mesh_of(2, 4))
  assert not one.overlapped


def test_an_all_gather_of_several_arrays_counts_each():
  text = """HloModule jit_f

ENTRY %main (p: f32[8,16], q: bf16[2,4]) -> (f32[32,16], bf16[8,4]) {
  %p = f32[8,16]{1,0} parameter(0)
  %q = bf16[2,4]{1,0} parameter(1)
  %start = ((f32[8,16]{1,0}, bf16[2,4]{1,0}), (f32[32,16]{1,0}, bf16[8,4]{1,0})) \
all-gather-start(%p, %q), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = (f32[32,16]{1,0}, bf16[8,4]{1,0}) all-gather-done(%start)
}
"""
  [both] = collectives.find(hlo.parse(text), mesh_of(2, 4))
  assert both.bytes == 3 / 4 * (32 * 16 * 4 + 8 * 4 * 2)
