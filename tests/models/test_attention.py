"""The fused kernel against the plain formula, forward and backward. It runs in Pallas' interpreter
here.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.models import attention, attention_tpu


def arrays(b, t, width, dtype=np.float32, masked=False):
  rng = np.random.default_rng(0)
  q, k, v, dy = (jnp.asarray(rng.normal(size=(b, t, width)), dtype) for _ in range(4))
  mask = jnp.asarray(rng.random((b, t)) < 0.7).at[:, 0].set(True) if masked else None
  return q, k, v, dy, mask


def both_ways(kernel, heads, q, k, v, dy, mask, parts=1):
  """Output and gradients of all inputs."""
  run = functools.partial(attention.attention, heads=heads, kernel=kernel, parts=parts)
  y, back = jax.vjp(lambda *x: run(*x, mask), q, k, v)
  return y, *back(dy)


# Heads of 64 lie two to a register, heads of 72 (So400m) across registers, 16 is the tests' tower;
# 600 is more than one block of queries.
@pytest.mark.parametrize(
  'b, t, heads, size, masked',
  [
    (2, 258, 2, 64, False),
    (3, 51, 4, 64, True),
    (1, 64, 16, 72, True),
    (2, 17, 2, 16, True),
    (1, 600, 1, 128, False),
  ],
)
def test_fused_equals_plain(b, t, heads, size, masked):
  given = arrays(b, t, heads * size, masked=masked)
  for name, a, e in zip(
    'y dq dk dv'.split(), both_ways('fused', heads, *given), both_ways('plain', heads, *given)
  ):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=3e-6, err_msg=name)


@pytest.mark.parametrize('t, parts, masked', [(153, 3, False), (34, 2, True), (1100, 2, False)])
def test_parts_of_a_sequence_read_themselves_alone(t, parts, masked):
  """As sequences of their own; parts begin anywhere in the chip's tiles."""
  q, k, v, dy, mask = arrays(2, t, 64, masked=masked)
  if masked:
    mask = mask.at[:, :: t // parts].set(True)
  cut = lambda x: x if x is None else x.reshape(2 * parts, t // parts, *x.shape[2:])
  expected = both_ways('plain', 2, *map(cut, (q, k, v, dy, mask)))
  for kernel in ('fused', 'plain'):
    for a, e in zip(both_ways(kernel, 2, q, k, v, dy, mask, parts=parts), expected):
      np.testing.assert_allclose(cut(a), e, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(
  'sequences, tokens, expected',
  [
    (6, 51, 6),  # ViT-g's local crops: 0.94 MB
    (6, 102, 6),
    (6, 258, 2),  # three are more than 2 MiB
    (1, 258, 1),
    (6, 64, 1),  # whole tiles
    (2, 1026, 1),  # one is more than 2 MiB
  ],
)
def test_crops_of_an_image_that_make_a_block_lie_together(sequences, tokens, expected):
  assert attention_tpu.together(sequences, tokens, 1536, 'bfloat16') == expected


def test_fused_in_bfloat16_is_as_near_to_the_truth_as_plain():
  given = arrays(2, 70, 128, jnp.bfloat16, masked=True)
  exact = both_ways(
    'plain', 2, *(x if x is None or x.dtype == bool else x.astype(jnp.float32) for x in given)
  )
  error = lambda kernel: [
    float(jnp.abs(a.astype(jnp.float32) - e).max() / jnp.abs(e).max())
    for a, e in zip(both_ways(kernel, 2, *given), exact)
  ]
  for fused, plain in zip(error('fused'), error('plain')):
    assert fused < max(2 * plain, 0.01)


def test_masked_keys_are_not_read_and_get_no_gradient():
  q, k, v, dy, mask = arrays(2, 24, 64, masked=True)
  wild = jnp.where(mask[..., None], v, 1e4)
  y, _, dk, dv = both_ways('fused', 2, q, k, wild, dy, mask)
  np.testing.assert_allclose(y, both_ways('fused', 2, q, k, v, dy, mask)[0], rtol=1e-5, atol=1e-5)
  assert not np.any(dk[~mask]) and not np.any(dv[~mask])


def test_heads_over_the_tensor_axis():
  given = arrays(2, 24, 64, masked=True)
  auto = (jax.sharding.AxisType.Auto,)
  with jax.set_mesh(jax.make_mesh((2,), ('tensor',), axis_types=auto, devices=jax.devices()[:2])):
    split = jax.jit(lambda *x: both_ways('fused', 4, *x))(*given)
  for a, e in zip(split, both_ways('plain', 4, *given)):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(
  'platform, kind, dtype, size, expected',
  [
    ('tpu', 'TPU v5', 'bfloat16', 64, 'fused'),
    ('tpu', 'TPU v5', 'float32', 20, 'fused'),
    ('gpu', 'NVIDIA H100 80GB HBM3', 'bfloat16', 64, 'cudnn'),
    ('gpu', 'NVIDIA A100-SXM4-80GB', 'bfloat16', 72, 'cudnn'),
    ('gpu', 'NVIDIA H100 80GB HBM3', 'float32', 64, 'plain'),
    ('gpu', 'NVIDIA H100 80GB HBM3', 'bfloat16', 20, 'plain'),
    ('gpu', 'NVIDIA H100 80GB HBM3', 'bfloat16', 256, 'plain'),
    ('gpu', 'AMD Instinct MI300X', 'bfloat16', 64, 'plain'),
    ('cpu', 'cpu', 'bfloat16', 64, 'plain'),
  ],
)
def test_auto_is_the_fastest_kernel_that_takes_it(
  platform, kind, dtype, size, expected, monkeypatch
):
  device = types.SimpleNamespace(platform=platform, device_kind=kind)
  monkeypatch.setattr(attention, 'device', lambda: device)
  assert attention.chosen('auto', dtype, size) == expected
  over_heads = jax.sharding.AbstractMesh((2,), ('tensor',))
  with jax.sharding.use_abstract_mesh(over_heads):
    assert attention.chosen('auto', dtype, size) == expected.replace('cudnn', 'plain')
  assert attention.chosen('plain', dtype, size) == 'plain'


def test_extreme_logits_are_finite():
  q, k, v, dy, _ = arrays(1, 16, 64)
  assert all(np.isfinite(x).all() for x in both_ways('fused', 1, q * 1e3, k * 1e3, v, dy, None))


def test_a_tower_over_devices_uses_the_kernel(mesh):
  """Under map_batch's manual axes, with gradients."""
  from tips_jax.core import parallel

  given = arrays(4, 16, 32)[:3]
  loss = lambda q, k, v: parallel.map_batch(
    lambda w, b, rows: attention.attention(*b, heads=2, kernel='fused') * w,
    jnp.float32(2),
    (q, k, v),
    specs=jax.sharding.PartitionSpec(),
  ).sum()
  alone = jax.grad(loss, (0, 1, 2))(*given)
  with mesh(data=2, fsdp=2):
    split = jax.jit(jax.grad(loss, (0, 1, 2)))(*given)
  for a, e in zip(split, alone):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
