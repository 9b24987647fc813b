"""A trained model as what the evaluators ask for: images and ids in, NumPy features out."""
import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import parallel
from tips_jax.models import towers
from tips_jax.train import sharding


class Encoder:
  """`evals.features.Encoder` of one set of weights. `of(state)` gives the same one with a state's weights.

  The towers, heads and CLS token of the joint space are those that config.evals names; weights are the student's or a
  teacher's. Batches are split over the devices, the last rows repeated where they do not divide. In a run of
  several processes each holds the whole weights and works on its own devices: none needs another one to encode.
  """

  def __init__(self, method, mesh, params=None):
    self._method, self._params, self._whole = method, params, None
    if jax.process_count() > 1:
      self._whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
      own = jax.local_devices()
      mesh = jax.sharding.Mesh(np.reshape(own, [len(own) if a == 'data' else 1 for a in mesh.axis_names]),
                               mesh.axis_names, axis_types=mesh.axis_types)
    self._mesh = mesh
    self._image, self._text = self._per_device(self._encode_image), self._per_device(self._encode_text)

  def of(self, state):
    """The encoder with the weights of a state. All processes call it together."""
    params = {**state.params, **state.teachers.get(self._method.config.evals.weights, {})}
    if self._whole:
      here = sharding.replicated(self._mesh)
      params = jax.tree.map(lambda x: jax.make_array_from_single_device_arrays(
          x.shape, here, [s.data for s in x.addressable_shards]), self._whole(params))
    other = Encoder.__new__(Encoder)
    other.__dict__ = {**self.__dict__, '_params': params}
    return other

  def image(self, images_BHWC):
    return self._call(self._image, images_BHWC)

  def text(self, ids_BT):
    if self._method.config.evals.text_tower not in self._params:
      return None
    return self._call(self._text, ids_BT)

  def _per_device(self, fn):
    specs = lambda params: sharding.specs(self._method.config.mesh.rules, params)
    return jax.jit(lambda params, x: parallel.map_batch(
        lambda params, x, _: fn(params, x), params, x, specs=specs(params)))

  def _call(self, fn, x):
    missing = -len(x) % (self._mesh.shape['data'] * self._mesh.shape['fsdp'])
    whole = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    with jax.set_mesh(self._mesh):
      out = fn(self._params, jax.device_put(whole, sharding.batch(self._mesh)))
      return jax.tree.map(lambda y: np.asarray(y)[:len(x)], out)

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
