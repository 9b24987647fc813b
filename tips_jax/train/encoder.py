"""A trained model as what the evaluators ask for: images and ids in, NumPy features out."""
import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.models import towers
from tips_jax.train import sharding


class Encoder:
  """`evals.features.Encoder` of one set of weights. `of(state)` gives the same one with a state's weights.

  The towers, heads and CLS token of the joint space are those that config.evals names; weights are the student's or a
  teacher's. Batches are split over the devices where they divide.
  """

  def __init__(self, method, mesh, params=None):
    self._method, self._mesh, self._params = method, mesh, params
    self._image, self._text = jax.jit(self._encode_image), jax.jit(self._encode_text)

  def of(self, state):
    weights = self._method.config.evals.weights
    other = Encoder.__new__(Encoder)
    other.__dict__ = {**self.__dict__, '_params': {**state.params, **state.teachers.get(weights, {})}}
    return other

  def image(self, images_BHWC):
    return self._call(self._image, images_BHWC)

  def text(self, ids_BT):
    if self._method.config.evals.text_tower not in self._params:
      return None
    return self._call(self._text, ids_BT)

  def _call(self, fn, x):
    devices = self._mesh.shape['data'] * self._mesh.shape['fsdp']
    to = sharding.batch(self._mesh) if len(x) % devices == 0 else sharding.replicated(self._mesh)
    with jax.set_mesh(self._mesh):
      return jax.tree.map(np.asarray, fn(self._params, jax.device_put(x, to)))

  def _apply(self, params, tower, **inputs):
    c = self._method.config
    return towers.apply(params[tower], c.towers[tower], c.compute, inputs)

  def _encode_image(self, params, images):
    e = self._method.config.evals
    tower = self._method.config.towers[e.image_tower]
    out = self._apply(params, e.image_tower, images=images[:, None])
    out = {k: v[:, 0].astype(jnp.float32) for k, v in out.items()}
    joint = out[e.retrieval_cls if e.retrieval_cls in out else e.cls]
    out['embedding'] = self._apply(params, e.image_head, x=joint)['embedding'] if e.image_head else joint
    h, w = (-(-s // tower.patch) for s in images.shape[1:3])
    out['patch'] = out['patch'].reshape(len(images), h, w, -1)
    return out

  def _encode_text(self, params, ids):
    e = self._method.config.evals
    out = self._apply(params, e.text_tower, ids=ids)['text']
    return self._apply(params, e.text_head, x=out)['embedding'] if e.text_head else out
