"""Towers of a Hugging Face folder, which are read when they are first used."""

import numpy as np

from tips_jax.interop import arrays
from tips_jax.interop.huggingface import folder as huggingface
from tips_jax.interop.weights import flat


def test_a_tower_is_read_when_it_is_used(model, tmp_path, monkeypatch):
  """It is checked before, and takes no memory until then; afterwards it stays."""
  written = model()
  huggingface.write(written, tmp_path)
  weights = huggingface.read(tmp_path)
  read = []
  load = arrays.Stored.read
  monkeypatch.setattr(arrays.Stored, 'read', lambda x: read.append(x.name) or load(x))
  for name in ('text', 'image'):
    assert set(weights.params) == set(written.params) and not read
    params = weights.params[name]
    assert read and all(x.startswith({'text': 'text', 'image': 'vision'}[name]) for x in read)
    read.clear()
    assert weights.params[name] is params
  for name, x in flat(written.params).items():
    np.testing.assert_array_equal(flat(weights.params)[name], x, err_msg=name)
