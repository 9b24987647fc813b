"""LightCLIP's step with each of its towers, traced on a mesh: what goes in comes out. Its losses
and towers have tests of their own.
"""

import jax
import numpy as np
import pytest

from configs.methods import lightclip
from tips_jax.core import schema, strict, tree
from tips_jax.train import lowering, sharding, step
from tips_jax.train import method as method_lib


@pytest.mark.parametrize('image', ['resnet18', 'mobilenetv2', 'swin_nano'])
def test_the_step_fits_together(image):
  method = method_lib.build(strict.build(schema.Config, lightclip.get_config(f'{image},runlocal')))
  mesh = sharding.make_mesh(schema.Mesh(data=4, fsdp=2), 8)
  state, _ = lowering.abstract_state(method, mesh)
  batch = lowering.abstract_batch(method)
  with jax.set_mesh(mesh):
    after, metrics = jax.eval_shape(step.make(method), state, batch)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
  assert all(jax.tree.leaves(same))
  wanted = {'contrastive', 'alignment', 'alignment/similarity', 'masked_words', 'fused_words'}
  assert wanted <= metrics.keys()
  names = {name for name, _ in tree.named_leaves(state.params)}
  has = {name for name in names if name.endswith('norm/var')}
  assert bool(has) == (image != 'swin_nano')
  assert {'fusion/conv2/kernel', 'fusion/conv3/kernel', 'word_head/kernel'} <= names
  assert np.prod(metrics['loss'].shape) == 1
