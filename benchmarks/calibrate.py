"""The plan's estimate of a run that others measured: Llama 2 70B on a TPU v5p, as MaxText runs it.

  python benchmarks/calibrate.py [--layers=80] [--options=NAME=VALUE,...]

Measured: 65.4 % of the peak on 64 chips (MaxText's Run_Llama2.md: 65 %), with fsdp over all, four
sequences of 4,096 tokens a chip, bfloat16 over weights of float32, flash attention, and of each
layer the results of all matrix products kept but those into the MLP (configs/v5p/llama2_70b.sh:
save_dot_except_mlpwi). Here: the layers of that model, forward and backward, written anew, compiled
ahead of time for v5p:4x4x4 and read as `python -m tips_jax.plan` reads a step. Left out: embedding
and logits (0.4 % of the FLOPs) and the optimizer.

Prints one JSON object. The share of the peak counts as MaxText does: 6 FLOPs a weight and token,
and attention as if no score were masked.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tips_jax.planning import collectives, compiler, cost, estimate, topologies

TOPOLOGY = 'v5p:4x4x4'
MEASURED = 0.654
WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD = 8192, 28_672, 64, 8, 128
SEQUENCES, TOKENS = 4, 4096  # of a chip
BLOCK = 512  # MaxText's default of all blocks of the attention kernel
KEPT = ('query', 'key', 'value', 'out', 'down')
# Inputs lie along the first dimension of each but the two that lead back to the width.
SHAPES = dict(
  query=(WIDTH, HEADS * HEAD),
  key=(WIDTH, KV_HEADS * HEAD),
  value=(WIDTH, KV_HEADS * HEAD),
  out=(HEADS * HEAD, WIDTH),
  gate=(WIDTH, HIDDEN),
  up=(WIDTH, HIDDEN),
  down=(HIDDEN, WIDTH),
)
NORMS = ('norm1', 'norm2')


def flops(layers):
  """Of one chip and step, as MaxText counts them."""
  weights = sum(a * b for a, b in SHAPES.values())
  attention = 12 * TOKENS * HEADS * HEAD  # of a token: two products, forward and twice backward
  return SEQUENCES * TOKENS * layers * (6 * weights + attention)


def layer(x, weights):
  """x [sequences, tokens, width] through a layer; weights: this chip's parts, float32."""

  def product(name, x):
    whole = lax.all_gather(weights[name].astype(jnp.bfloat16), 'fsdp', axis=0, tiled=True)
    return checkpoint_name(x @ whole, name)

  def heads(name, h, count):
    return product(name, h).reshape(*h.shape[:2], count, HEAD).swapaxes(1, 2)

  h = norm(x, weights['norm1'])
  query = rotated(heads('query', h, HEADS)) * HEAD**-0.5
  mixed = attention(query, rotated(heads('key', h, KV_HEADS)), heads('value', h, KV_HEADS))
  x += product('out', mixed.swapaxes(1, 2).reshape(*x.shape[:2], HEADS * HEAD))
  h = norm(x, weights['norm2'])
  x += product('down', jax.nn.silu(product('gate', h)) * product('up', h))
  return x


def norm(x, gain):
  y = x.astype(jnp.float32)
  y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
  return y.astype(x.dtype) * gain.astype(x.dtype)


def rotated(x):
  """x [sequences, heads, tokens, width of a head], turned by its position."""
  angles = np.arange(TOKENS)[:, None] / 10_000 ** (np.arange(HEAD // 2) / (HEAD // 2))
  cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attention(query, key, value):
  names = (
    *('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv'),
    *('block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq'),
  )
  mask = masks.MultiHeadMask([masks.CausalMask((TOKENS, TOKENS))] * HEADS)
  kernel = splash.make_splash_mha(
    mask,
    block_sizes=splash.BlockSizes(**dict.fromkeys(names, BLOCK)),
    head_shards=1,
    q_seq_shards=1,
  )
  return jax.vmap(kernel)(query, key, value)


def gradients(weights, x):
  """Of a loss behind all layers, by this chip's parts of the weights."""
  policy = jax.checkpoint_policies.save_only_these_names(*KEPT)
  step = jax.checkpoint(lambda x, w: (layer(x, w), None), policy=policy, prevent_cse=False)
  loss = lambda weights: lax.scan(step, x, weights)[0].astype(jnp.float32).mean()
  return jax.grad(loss)(weights)


def lowered(mesh, layers):
  """The program for a mesh of one axis, 'fsdp'."""
  parts = P(None, 'fsdp')
  specs = dict.fromkeys(SHAPES, parts) | dict.fromkeys(NORMS, P())
  shapes = SHAPES | dict.fromkeys(NORMS, (WIDTH,))

  def array(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  weights = {k: array((layers, *shape), jnp.float32, specs[k]) for k, shape in shapes.items()}
  x = array((SEQUENCES * mesh.size, TOKENS, WIDTH), jnp.bfloat16, P('fsdp'))
  program = jax.shard_map(
    gradients, mesh=mesh, in_specs=(specs, P('fsdp')), out_specs=specs, check_vma=False
  )
  return jax.jit(program).lower(weights, x)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--layers', type=int, default=80)
  parser.add_argument('--options', default='', help='of XLA, beside its defaults')
  args = parser.parse_args()
  compiler.prepare()
  chip, devices = topologies.devices(TOPOLOGY)
  mesh = jax.sharding.Mesh(np.array(devices), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
  options = dict(option.split('=') for option in filter(None, args.options.split(',')))
  compiled = compiler.compile_step(
    lowered(mesh, args.layers),
    platform='tpu',
    say=compiler.progress,
    options=topologies.options(TOPOLOGY) | options,
  )
  costs = cost.costs(compiled.module, chip, compiled.schedules)
  seconds = estimate.seconds(chip, costs, collectives.find(compiled.module, mesh))
  work = flops(args.layers)
  estimated = work / seconds['step'] / chip.flops
  print(
    json.dumps(
      dict(
        compile_seconds=round(compiled.seconds),
        memory=compiled.stats['temp'],
        flops_compiled=sum(c.flops for _, c in costs) / work,
        milliseconds_of_a_layer={
          name: 1e3 * x / args.layers
          for name, x in (seconds | seconds['compute_by_source']).items()
          if isinstance(x, float)
        },
        estimated_share=estimated,
        measured_share=MEASURED,
        estimated_over_measured=estimated / MEASURED,
      ),
      indent=1,
    )
  )


if __name__ == '__main__':
  main()
