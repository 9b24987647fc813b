"""A trained model as what the evaluators ask for: images and texts in, NumPy features out."""

import secrets

import jax
import jax.numpy as jnp
import numpy as np

from tips_jax.core import parallel
from tips_jax.evals.features import reading as features
from tips_jax.models import towers
from tips_jax.train import sharding


class Encoder:
  """`evals.features.Encoder` of one set of weights, and what `evals.suite.run` asks for.
  `of(state)` gives the same one with a state's weights; its compiled programs are the same.

  The towers, heads and CLS token of the joint space are those that config.evals names; weights are
  the student's or a teacher's. Batches are split over the devices, the last rows repeated where
  they do not divide. In a run of several processes each holds the whole weights and works on its
  own devices: none needs another one to encode.
  `tokenizer`: of the run, once it is known; `encode_text` needs it.
  """

  def __init__(self, method, mesh, params=None):
    self._method, self._params, self._whole = method, params, None
    if jax.process_count() > 1:
      self._whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
      own = jax.local_devices()
      mesh = jax.sharding.Mesh(
        np.reshape(own, [len(own) if a == 'data' else 1 for a in mesh.axis_names]),
        mesh.axis_names,
        axis_types=mesh.axis_types,
      )
    self._mesh = mesh
    self._image, self._text = (
      self._per_device(self._encode_image),
      self._per_device(self._encode_text),
    )
    self._inside = self._per_device(self._inspect, static=('intermediate_layers', 'values'))
    self.tokenizer, self.name, self.size = None, method.config.name, method.config.evals.size

  def of(self, state):
    """The encoder with the weights of a state. All processes call it together."""
    params = {**state.params, **state.teachers.get(self._method.config.evals.encoder, {})}
    if self._whole:
      here = sharding.replicated(self._mesh)
      params = jax.tree.map(
        lambda x: jax.make_array_from_single_device_arrays(
          x.shape, here, [s.data for s in x.addressable_shards]
        ),
        self._whole(params),
      )
    other = Encoder.__new__(Encoder)
    # No other encoder may take its features for its own; hashing the weights would cost more than
    # computing some again.
    other.__dict__ = {**self.__dict__, '_params': params, 'sha256': secrets.token_hex(32)}
    return other

  def image(self, images_BHWC):
    return self._call(self._image, images_BHWC)

  def text(self, ids_BT):
    if not self.has_text:
      return None
    return self._call(self._text, ids_BT)

  # --- what the suite calls: see interop/encoder.py -----------------------------------------------

  cls_names = property(lambda self: tuple(self._tower.cls))
  patch = property(lambda self: self._tower.patch)
  width = property(lambda self: self._tower.width)
  depth = property(lambda self: self._tower.depth)
  width = property(lambda self: self._tower.width)
  has_text = property(lambda self: self._method.config.evals.text_tower in self._params)

  def inspect(self, images_BHWC, *, intermediate_layers=(), values=False, patches=True):
    """As `image`, and what `towers.inspect` says; without `patches` these stay on the device."""

    def program(params, x):
      found = self._inside(params, x, intermediate_layers=tuple(intermediate_layers), values=values)
      return {name: y for name, y in found.items() if patches or name != 'patch'}

    return self._call(program, images_BHWC)

  def encode_text(self, texts):
    """[B, E] of a list of str; [0, 0] of none."""
    c = self._method.config
    if not texts:
      return np.zeros((0, 0), np.float32)
    return features.encode_texts(
      self, texts, self.tokenizer, c.data.text_length, c.evals.batch_size
    )

  # --- on the devices -----------------------------------------------------------------------------

  def _per_device(self, fn, static=()):
    specs = lambda params: sharding.specs(self._method.config.mesh.rules, params)
    return jax.jit(
      lambda params, x, **options: parallel.map_batch(
        lambda params, x, _: fn(params, x, **options), params, x, specs=specs(params)
      ),
      static_argnames=static,
    )

  def _call(self, fn, x):
    missing = -len(x) % (self._mesh.shape['data'] * self._mesh.shape['fsdp'])
    whole = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    with jax.set_mesh(self._mesh):
      out = fn(self._params, jax.device_put(whole, sharding.batch(self._mesh)))
      return jax.tree.map(lambda y: np.asarray(y)[: len(x)], out)

  def _apply(self, params, tower, **inputs):
    c = self._method.config
    return towers.apply(params[tower], c.towers[tower], c.compute, inputs)

  @property
  def _tower(self):
    return self._method.config.towers[self._method.config.evals.image_tower]

  def _encode_image(self, params, images):
    e = self._method.config.evals
    out = self._apply(params, e.image_tower, images=images[:, None])
    out = {k: v[:, 0].astype(jnp.float32) for k, v in out.items()}
    out['embedding'] = self._project(params, out[self._joint])
    h, w = (-(-s // self.patch) for s in images.shape[1:3])
    out['patch'] = out['patch'].reshape(len(images), h, w, -1)
    return out

  def _inspect(self, params, images, *, intermediate_layers, values):
    c = self._method.config
    return towers.inspect(
      params[c.evals.image_tower],
      self._tower,
      c.compute,
      images,
      cls=self._joint,
      intermediate_layers=intermediate_layers,
      values=values,
      project=lambda x: self._project(params, x),
    )

  @property
  def _joint(self):
    """Name of the CLS token of the joint space."""
    e = self._method.config.evals
    return e.retrieval_cls if e.retrieval_cls in self.cls_names else e.cls

  def _project(self, params, x):
    head = self._method.config.evals.image_head
    return self._apply(params, head, x=x)['embedding'] if head else x

  def _encode_text(self, params, ids):
    e = self._method.config.evals
    out = self._apply(params, e.text_tower, ids=ids)['text']
    return self._apply(params, e.text_head, x=out)['embedding'] if e.text_head else out
