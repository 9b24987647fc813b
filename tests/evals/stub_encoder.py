"""An encoder without weights: random projections of pixels and of words. It counts what it is asked
for.
"""

import hashlib

import numpy as np


class Stub:
  """What the suite needs of interop.encoder.Encoder. stop_after: images after which it is
  interrupted.
  """

  cls_names, patch, depth, size, name = ('web', 'synthetic'), 8, 4, 32, 'stub'
  region_samples = 4

  def __init__(self, *, seed=0, width=8, has_text=True, stop_after=None):
    rng = np.random.default_rng(seed)
    self.width, self.has_text, self.stop_after = width, has_text, stop_after
    self.sha256 = hashlib.sha256(f'stub {seed} {width}'.encode()).hexdigest()
    self.kernels = rng.normal(size=(8, self.patch**2 * 3, width)).astype(np.float32) / 14
    self.images, self.texts = 0, []

  def inspect(self, images, *, intermediate_layers=(), values=False, regions=False, patches=True):
    if self.stop_after is not None and self.images >= self.stop_after:
      raise KeyboardInterrupt
    self.images += len(images)
    b, h, w, _ = images.shape
    p = self.patch
    cells = images.reshape(b, h // p, p, w // p, p, 3).swapaxes(2, 3).reshape(
      b, h // p, w // p, -1
    ) / np.float32(255)
    whole = cells.mean((1, 2)) - 0.5
    out = {'web': whole @ self.kernels[0], 'synthetic': whole @ self.kernels[1]}
    out['embedding'] = out['web']
    if patches:
      out['patch'] = cells @ self.kernels[2]
    if intermediate_layers:
      out['intermediate_layers'] = tuple(
        (cells @ self.kernels[3 + i], out['web']) for i in range(len(intermediate_layers))
      )
    if values:
      out['value_patch'] = cells @ self.kernels[7]
    if regions:
      out['region_patch'] = cells @ self.kernels[7]
    return out

  def encode_text(self, texts):
    self.texts += texts
    out = np.zeros((len(texts), self.width), np.float32)
    for row, text in zip(out, texts):
      for word in text.split():
        row += np.random.default_rng(list(word.encode())).normal(size=self.width).astype(np.float32)
    return out
