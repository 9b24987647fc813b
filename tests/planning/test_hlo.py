"""Reading HLO: how often things run, and what they cost, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core.chips import CHIPS
from tips_jax.core.errors import InputError
from tips_jax.planning import cost, estimate, hlo

CPU = CHIPS['cpu']


def module(fn, *args):
  return hlo.parse(jax.jit(fn).lower(*args).compile().as_text())


def flops(fn, *args):
  return sum(c.flops for _, c in cost.costs(module(fn, *args), CPU))


def array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_matmul_costs_two_per_multiplication():
  assert flops(lambda a, b: a @ b, array(32, 48), array(48, 16)) == 2 * 32 * 48 * 16


def test_a_batched_contraction_over_two_axes():
  fn = lambda a, b: jnp.einsum('bij,bjik->bk', a, b)
  assert flops(fn, array(3, 8, 16), array(3, 16, 8, 32)) == 2 * 3 * 8 * 16 * 32


def test_attributes_over_several_lines_end_nothing():
  """As jax's splash attention has them: what follows in the computation is still read."""
  parsed = hlo.parse("""
HloModule m

ENTRY %main (x: f32[8,16], y: f32[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %kernel = f32[8,16]{1,0} custom-call(%x), custom_call_target="k", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512}"
}}, metadata={op_name="jit(f)/kernel"}
  %y = f32[16,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%kernel, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""")
  assert [run.instruction.name for run in parsed.runs] == ['x', 'kernel', 'y', 'dot']
  assert parsed.runs[1].op_name == 'jit(f)/kernel'
  assert sum(c.flops for _, c in cost.costs(parsed, CPU)) == 2 * 8 * 16 * 4


@pytest.mark.parametrize('turns', [1, 2, 7, 40])
def test_a_scan_counts_every_turn(turns):
  fn = lambda x, w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=turns)[0]
  assert flops(fn, array(16, 32), array(32, 32)) == turns * 2 * 16 * 32 * 32


def test_nested_loops_multiply():
  def outer(x, w):
    inner = lambda x, _: (jnp.tanh(x @ w), None)
    return jax.lax.scan(
      lambda x, _: (jax.lax.scan(inner, x, None, length=5)[0] @ w, None), x, None, length=3
    )[0]

  assert flops(outer, array(16, 32), array(32, 32)) == (3 * 5 + 3) * 2 * 16 * 32 * 32


def test_the_backward_pass_of_a_scan_and_what_remat_adds():
  def loss(x, w, body):
    return jax.lax.scan(lambda x, _: (body(x, w), None), x, None, length=6)[0].sum()

  plain = lambda x, w: jnp.tanh(x @ w)
  count = lambda body: flops(
    jax.grad(lambda x, w: loss(x, w, body), argnums=(0, 1)), array(16, 32), array(32, 32)
  )
  one = 2 * 16 * 32 * 32
  assert count(plain) == 6 * 3 * one
  assert count(jax.checkpoint(plain)) == 6 * 4 * one


def test_a_loop_that_only_the_data_end_is_known_as_such():
  fn = lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)
  dots = [
    r
    for r in module(fn, array(16, 32), array(32, 32)).runs
    if r.instruction.opcode == 'dot' or 'dot' in r.instruction.name
  ]
  assert dots and all(r.open_ended and r.times == 1 for r in dots)


def test_a_loop_from_a_start_that_is_not_zero():
  fn = lambda x, w: jax.lax.fori_loop(3, 10, lambda _, x: jnp.tanh(x @ w), x)
  assert flops(fn, array(16, 32), array(32, 32)) == 7 * 2 * 16 * 32 * 32


TPU = """HloModule jit_f, is_scheduled=true

%fused_computation (param_0: bf16[32,64,1536], param_1: bf16[1536,24,64]) -> bf16[32,64,24,64] {
  %param_0 = bf16[32,64,1536]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[1536,24,64]{2,0,1:T(8,128)(2,1)S(1)} parameter(1)
  %left = bf16[32,64,1536,1]{2,1,0,3:T(8,128)(2,1)} bitcast(%param_0)
  %right = bf16[1536,24,64,1]{2,0,1,3:T(8,128)(2,1)} bitcast(%param_1)
  ROOT %convolution.898 = bf16[32,64,24,64]{3,1,2,0:T(8,128)(2,1)} convolution(%left, %right), \
window={size=1x24 pad=0_0x23_23 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f, \
metadata={op_name="jit(f)/blocks/attention/query/dot_general" stack_frame_id=1219}
}

%body (state: (s32[], bf16[32,64,1536])) -> (s32[], bf16[32,64,1536]) {
  %state = (s32[]{:T(128)}, bf16[32,64,1536]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[32,64,1536]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %w = bf16[1536,24,64]{2,0,1:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.1 = bf16[32,64,24,64]{3,1,2,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused_computation, \
metadata={op_name="blocks/attention/query/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %fusion.2 = bf16[32,64,24,64]{3,1,2,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused_computation, \
backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %kernel.3 = (bf16[32,64,1536]{2,1,0}, /*index=1*/f32[8]{0}) custom-call(%x, %x), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TU(zv{",\
"cost_estimate":{"bytes_accessed":"819000","flops":"394000000","transcendentals":"7"}}}
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[32,64,1536]{2,1,0:T(8,128)(2,1)}) tuple(%i, %x)
}

%condition (state.1: (s32[], bf16[32,64,1536])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[32,64,1536]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %end = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (p: bf16[32,64,1536]) -> bf16[32,64,1536] {
  %p = bf16[32,64,1536]{2,1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[32,64,1536]{2,1,0:T(8,128)(2,1)}) tuple(%zero, %p)
  %while.1 = (s32[]{:T(128)}, bf16[32,64,1536]{2,1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body, \
metadata={op_name="jit(step)/transpose(jvp())/shard_map/clean/ViT/while"}
  ROOT %out = bf16[32,64,1536]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""


def test_valid_positions_of_a_convolution_leave_out_padding_and_holes():
  def brute(size, kernel, out, stride, pad, dilate_in, dilate_kernel):
    held = {k * dilate_in for k in range(size)}
    return sum(
      o * stride - pad + k * dilate_kernel in held for o in range(out) for k in range(kernel)
    )

  rng = np.random.default_rng(0)
  for _ in range(50):
    case = [
      int(n)
      for n in (
        rng.integers(1, 9),
        rng.integers(1, 9),
        rng.integers(1, 12),
        rng.integers(1, 3),
        rng.integers(0, 8),
        rng.integers(1, 4),
        rng.integers(1, 3),
      )
    ]
    assert cost._valid(*case) == brute(*case), case
  assert (
    cost._valid(1, 24, 24, 1, 23, 1, 1) == 24
  )  # a product over heads, as the TPU's compiler writes it


def test_a_tpu_program_is_read():
  parsed = hlo.parse(TPU)
  runs = {r.instruction.name: r for r in parsed.runs}
  assert runs['fusion.1'].times == 12 and not runs['fusion.1'].open_ended
  loop = 'jit(step)/transpose(jvp())/shard_map/clean/ViT/while'
  assert runs['fusion.1'].op_name == f'{loop}/blocks/attention/query/dot_general'
  assert runs['convolution.898'].inside.name in ('fusion.1', 'fusion.2')
  kernel = runs['kernel.3'].instruction
  assert kernel.target == 'tpu_custom_call' and [a.dtype for a in kernel.arrays] == ['bf16', 'f32']
  assert kernel.operands == ('x', 'x')
  conv = runs['convolution.898']
  assert cost.flops(conv.instruction, conv.computation) == 2 * 32 * 64 * 1536 * 24 * 64
  assert (
    runs['fusion.2'].instruction.cycles is None
  )  # the compiler's way to say that it does not know


def test_kernels_are_never_free():
  chip = CHIPS['v5e']
  seconds = lambda schedules: {
    r.instruction.name: c for r, c in cost.costs(hlo.parse(TPU), chip, schedules)
  }
  without, told = seconds({}), seconds({'kernel.3': 15_000})
  assert without['fusion.1'].seconds == pytest.approx(12 * 1000 / chip.clock)
  assert without['fusion.1'].source == 'compiler'
  assert without['kernel.3'].flops == 12 * 394e6
  assert without['kernel.3'].seconds == pytest.approx(12 * 394e6 / chip.flops)
  assert without['kernel.3'].source == 'roofline'
  assert (
    told['kernel.3'].seconds == pytest.approx(12 * 15_000 / chip.clock)
    and told['kernel.3'].source == 'schedule'
  )
  assert without['fusion.2'].seconds > 0 and without['fusion.2'].source == 'roofline'


def test_on_chip_memory_is_no_traffic():
  parsed = hlo.parse(TPU)
  run = next(r for r in parsed.runs if r.instruction.name == 'fusion.1')
  assert cost.traffic(parsed, run.instruction, run.computation) == 2 * (32 * 64 * 1536) + 2 * (
    32 * 64 * 24 * 64
  )


SCHEDULE = """
= control target key start
LB: loop body
     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1 LB: > { %s2 = smov.u32 0 }
   0x2   : > { %p9_p0 = scmp.ge.s32.totalorder %s2, 14 /* loop exit test */ }
iteration_bounds: (12)
   0x3 LB: >> { %v1 = vlaneseq.b32 }
   0x4   : >> { %p3_p1 = scmp.ge.s32.totalorder %s3, 8 /* loop exit test */  ;;  %v2 = vld [vmem:[%s3]] }
   0x5   : > { %v3 = vld [vmem:[%s3]] }
   0x6   : > { %267 = sbr.rel (!%p3_p1) target = $region104 }
   0x7   : >> { %v4 = vld [vmem:[%s3]] }
   0x8   : > { %21 = sbr.rel (!%p9_p0) target = $region115 }
   0x9   :  { %s9 = smov.u32 0 }
"""


def test_a_kernels_schedule_counts_its_loops():
  inner, outer = 4, 2 + 2
  assert cost.schedule(SCHEDULE) == 2 + 12 * (outer + 8 * inner)


LOOP = """
HloModule loop

%body (state.1: (s32[], f32[16,32], f32[32,32])) -> (s32[], f32[16,32], f32[32,32]) {{
  %state.1 = (s32[], f32[16,32], f32[32,32]) parameter(0)
  %one = s32[] constant(1)
{elements}
  %next = s32[] add({i}, %one)
  %dot = f32[16,32] dot({x}, {w}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (s32[], f32[16,32], f32[32,32]) tuple(%next, %dot, {w})
}}

%condition (state.2: (s32[], f32[16,32], f32[32,32])) -> pred[] {{
  %end = s32[] constant(9)
  %state.2 = (s32[], f32[16,32], f32[32,32]) parameter(0)
{counter}
  ROOT %less = pred[] compare({j}, %end), direction=LT
}}

ENTRY %main (x: f32[16,32], w: f32[32,32]) -> (s32[], f32[16,32], f32[32,32]) {{
  %x = f32[16,32] parameter(0)
  %w = f32[32,32] parameter(1)
  %begin = s32[] constant(2)
  %start = (s32[], f32[16,32], f32[32,32]) tuple(%begin, %x, %w)
  ROOT %while = (s32[], f32[16,32], f32[32,32]) while(%start), condition=%condition, body=%body
}}
"""
# The elements of a loop's state, as jaxlib 0.10 and as 0.11 write them.
NAMED = dict(
  elements="""  %i = s32[] get-tuple-element(%state.1), index=0
  %a = f32[16,32] get-tuple-element(%state.1), index=1
  %b = f32[32,32] get-tuple-element(%state.1), index=2""",
  counter='  %j = s32[] get-tuple-element(%state.2), index=0',
  i='%i',
  x='%a',
  w='%b',
  j='%j',
)
NUMBERED = dict(
  elements='', counter='', i='%state.1#0', x='%state.1#1', w='%state.1#2', j='%state.2#0'
)


BOTH = pytest.mark.parametrize('names', [NAMED, NUMBERED], ids=['get-tuple-element', 'tuple#index'])


@BOTH
def test_elements_of_a_tuple_are_read_in_both_ways_of_writing_them(names):
  parsed = hlo.parse(LOOP.format(**names))
  [loop] = [run for run in parsed.runs if run.instruction.opcode == 'while']
  assert hlo.trips(parsed, loop.instruction, loop.computation) == 7
  assert sum(c.flops for _, c in cost.costs(parsed, CPU)) == 7 * 2 * 16 * 32 * 32


@BOTH
def test_a_plan_of_a_loop_without_a_count_is_refused(names):
  text = LOOP.format(**names)
  one = dict(ratio=1.0, embedding_share=0.0)
  estimate.check_read(one, cost.costs(hlo.parse(text), CPU))
  endless = text.replace('constant(9)', 'custom-call(), custom_call_target="end"')
  with pytest.raises(
    InputError, match="a loop of unknown length around 'dot'.* no plan is printed"
  ):
    estimate.check_read(one, cost.costs(hlo.parse(endless), CPU))


@pytest.mark.parametrize(
  'ratio, embedding_share, sound',
  [(0.033, 0, False), (0.89, 0, False), (0.91, 0, True), (1.9, 0, True), (2.1, 0, False)]
  # A tiny tower, most of whose least work is to embed patches, which a compiler may leave out.
  + [(0.6, 0.4, True), (0.5, 0.4, False), (2.1, 0.4, False)],
)
def test_a_plan_of_too_few_or_too_many_flops_is_refused(ratio, embedding_share, sound):
  work = dict(ratio=ratio, embedding_share=embedding_share)
  if sound:
    estimate.check_read(work, [])
    return
  with pytest.raises(InputError, match=f"{ratio:.3f} of the method's FLOPs; expected 0.9 to 2"):
    estimate.check_read(work, [])


FMHA = """HloModule jit_f, is_scheduled=true

ENTRY %main (q: bf16[64,258,6,64]) -> bf16[64,258,6,64] {
  %q = bf16[64,258,6,64]{3,2,1,0} parameter(0)
  %call = (bf16[64,258,6,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": \
{"algorithm": {"algo_id": "0"}, "fmha_scale": 0.125, "intermediate_tensor_shape": \
{"element_type": "BF16", "dimensions": ["64", "6", "258", "258"], "tuple_shapes": []}}}
  ROOT %y = bf16[64,258,6,64]{3,1,2,0} get-tuple-element(%call), index=0
}
"""


@pytest.mark.parametrize('spaces', [' ', ''])
@pytest.mark.parametrize('target, products', [('fmhaSoftmax', 2), ('fmhaSoftmaxBackward', 5)])
def test_attention_of_cudnn_has_flops(target, products, spaces):
  text = FMHA.replace('fmhaSoftmax', target).replace('": ', '":' + spaces)
  [work] = [c.flops for _, c in cost.costs(hlo.parse(text), CHIPS['h100']) if c.flops]
  assert work == products * 2 * 64 * 6 * 258 * 258 * 64


def test_scratch_memory_of_libraries_is_no_traffic():
  text = """HloModule jit_f

%slice_fusion (p: bf16[2,32,64], q: bf16[144,64]) -> (bf16[144,32], s8[33554432]) {
  %p = bf16[2,32,64]{2,1,0} parameter(0)
  %q = bf16[144,64]{1,0} parameter(1)
  %w = bf16[1,32,64]{2,1,0} slice(%p), slice={[0:1], [0:32], [0:64]}
  %b = bf16[32,64]{1,0} bitcast(%w)
  ROOT %call = (bf16[144,32]{1,0}, s8[33554432]{0}) custom-call(%q, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
}

ENTRY %main (p: bf16[2,32,64], q: bf16[144,64]) -> (bf16[144,32], s8[33554432]) {
  %p = bf16[2,32,64]{2,1,0} parameter(0)
  %q = bf16[144,64]{1,0} parameter(1)
  ROOT %fusion = (bf16[144,32]{1,0}, s8[33554432]{0}) fusion(%p, %q), kind=kCustom, calls=%slice_fusion
}
"""
  parsed = hlo.parse(text)
  [(run, c)] = [(run, c) for run, c in cost.costs(parsed, CHIPS['h100']) if c.bytes]
  assert run.instruction.name == 'fusion' and c.bytes == 2 * (32 * 64 + 144 * 64 + 144 * 32)


NESTED = """HloModule m

%slice (s: f32[40,8,128], k: s32[]) -> f32[8,128] {
  %s = f32[40,8,128] parameter(0)
  %k = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,8,128] dynamic-slice(%s, %k, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %one = f32[8,128] bitcast(%cut)
}

%outer (stack: f32[40,8,128], kept: f32[40,8,128], k: s32[]) -> (f32[40,8,128], f32[8,128]) {
  %stack = f32[40,8,128] parameter(0)
  %same = f32[40,8,128] bitcast(%stack)
  %kept = f32[40,8,128] parameter(1)
  %k = s32[] parameter(2)
  %x = f32[8,128] fusion(%same, %k), kind=kLoop, calls=%slice
  %zero = s32[] constant(0)
  %row = f32[1,8,128] bitcast(%x)
  %new = f32[40,8,128] dynamic-update-slice(%kept, %row, %k, %zero, %zero)
  ROOT %both = (f32[40,8,128], f32[8,128]) tuple(%new, %x)
}

ENTRY %main (stack: f32[40,8,128], kept: f32[40,8,128], k: s32[]) -> (f32[40,8,128], f32[8,128]) {
  %stack = f32[40,8,128] parameter(0)
  %kept = f32[40,8,128] parameter(1)
  %k = s32[] parameter(2)
  ROOT %layer = (f32[40,8,128], f32[8,128]) fusion(%stack, %kept, %k), kind=kLoop, calls=%outer
}
"""


def test_a_layer_of_a_stack_costs_a_layer():
  """Also where the slice is in a fusion inside of the fusion, behind another name of the stack."""
  parsed = hlo.parse(NESTED)
  [layer] = [run for run in parsed.runs if run.instruction.name == 'layer']
  one = 4 * 8 * 128
  # Read from the one stack, written into the other, and written by itself; and the index.
  assert cost.traffic(parsed, layer.instruction, layer.computation) == 3 * one + 4


def test_a_layer_that_is_copied_in_the_background_costs_a_layer():
  """As XLA of jax 0.11 writes it for GPUs: the operands are among the results."""
  results = '(f32[40,8,128], f32[8,128]) fusion(%stack'
  operands = '(f32[40,8,128], f32[40,8,128], s32[])'
  started = f'({operands}, f32[40,8,128], f32[8,128], u32[]) fusion-start(%stack'
  text = NESTED.replace(results, started)
  assert text != NESTED
  parsed = hlo.parse(text)
  [layer] = [run for run in parsed.runs if run.instruction.name == 'layer']
  assert cost.traffic(parsed, layer.instruction, layer.computation) == 3 * 4 * 8 * 128 + 4
  assert all(run.inside for run in parsed.runs if run.instruction.name in ('new', 'cut'))
