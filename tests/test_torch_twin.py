"""benchmarks/torch_twin.py does the work of our step: parameters, FLOPs, loss, gradient, update."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step as benchmark
from benchmarks import torch_twin
from configs import vitg, vits
from tips_jax.core import schema, strict, tree
from tips_jax.core.errors import InputError
from tips_jax.train import method as method_lib
from tips_jax.train import state as state_lib
from tips_jax.train import step, summary

# A key's bias moves all scores of a query alike: its gradient is rounding.
NOISE = ('attention/key/bias',)
# Compiles a whole step of ours.
pytestmark = pytest.mark.once


def config_of(page, arg, **schedule):
  config = page.get_config(arg)
  config.schedule.update(schedule)
  return strict.build(schema.Config, config)


@pytest.fixture(scope='module')
def pair():
  """(method, state, batch, twin with the same parameters and another head of the teacher)."""
  config = config_of(vits, 'v2,runlocal', batch_size=4)
  method = method_lib.build(config)
  state = jax.jit(lambda: state_lib.init(method))()
  teachers = jax.tree.map(lambda p: p * 1.1 + 0.01, state.teachers)
  state = state.replace(teachers=teachers)
  batch = benchmark.random_batch(config, 4)
  batch['web_valid'][:] = [True, True, False, True]
  twin = torch_twin.Twin(config, device='cpu')
  for name, leaf in tree.named_leaves(state.params):
    with torch.no_grad():
      twin.params[name].copy_(torch.from_numpy(np.array(leaf)))
  for name, leaf in tree.named_leaves(teachers['ema']['head']):
    twin.teacher[name].copy_(torch.from_numpy(np.array(leaf)))
  return method, state, batch, twin


def test_a_step_is_ours(pair):
  method, state, batch, twin = pair
  key = jax.random.fold_in(jax.random.key(method.config.seed), state.step)
  mask = np.array(step.draw_mask(method, 'random', batch, key)['mask'])[:, 0]
  after, metrics = jax.jit(step.make(method))(state, batch)
  tensors = {name: torch.from_numpy(x) for name, x in batch.items()}
  loss = twin.step(tensors, torch.from_numpy(mask))
  np.testing.assert_allclose(float(loss), float(metrics['loss']), rtol=1e-5)
  for name, leaf in tree.named_leaves(after.params):
    if name.endswith(NOISE):
      continue
    before = np.array(dict(tree.named_leaves(state.params))[name])
    moved = np.array(leaf) - before
    ours = twin.params[name].detach().numpy() - before
    assert np.linalg.norm(ours - moved) <= 2e-2 * np.linalg.norm(moved) + 1e-9, name
  for name, leaf in tree.named_leaves(after.teachers['ema']['head']):
    np.testing.assert_allclose(twin.teacher[name].numpy(), leaf, atol=1e-6, err_msg=name)
  for name, center in twin.centers.items():
    np.testing.assert_allclose(center.numpy(), after.loss_state[name]['center'], atol=1e-6)


def test_parameters_and_flops_are_those_of_vitg():
  config = config_of(vitg, 'v2', batch_size=2)
  # Nothing lowers the dtype of what is on no device.
  config = dataclasses.replace(config, compute=schema.Compute(dtype='float32'))
  with torch.device('meta'):
    twin = torch_twin.Twin(config, device='meta')
    batch = benchmark.random_batch(config, 2)
    batch = {name: torch.from_numpy(x).to('meta') for name, x in batch.items()}
    mask = torch.zeros(2, 256, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
      loss, _ = twin.loss(batch, mask)
      torch.autograd.grad(loss, list(twin.params.values()))
  method = twin.method
  shapes = jax.eval_shape(lambda: state_lib.parameters(method)[0])
  assert sum(p.numel() for p in twin.params.values()) == tree.size(shapes)
  minimum = 2 * sum(summary.flops(method).values())
  assert 0.99 < counter.get_total_flops() / minimum < 1.02


def test_what_is_not_tips_v2_is_refused():
  with pytest.raises(InputError, match='expected a recipe of TIPS v2'):
    torch_twin.Twin(config_of(vits, 'v1,runlocal'), device='cpu')
