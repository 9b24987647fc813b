"""The encoder of a run on the way: interop's Encoder, on the parameters where they lie."""

import jax
import numpy as np

from tips_jax.interop.encoder import Encoder
from tips_jax.interop.weights import Weights, tower_names
from tips_jax.train import sharding
from tips_jax.train.method import Method
from tips_jax.train.state import State


class RunEncoder:
  """Gives the Encoder of any state of a run. Numbers are those of the saved checkpoint, loaded with
  `exact`: activations in float32, whatever the devices are.

  Of several processes each holds the whole weights and works on its own devices: none needs another
  one to encode.
  """

  def __init__(self, method: Method, mesh: jax.sharding.Mesh):
    config = method.config
    self._names = tower_names(config.evals, config.towers)
    self._config = config
    self._mesh = mesh
    self._gather = None
    self._encoder = None
    # Bytes of the SentencePiece model, once the data is open; texts cannot be encoded without.
    self.tokenizer: bytes | None = None
    if jax.process_count() > 1:
      # Split weights would need the other processes at every image.
      self._gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
      devices = np.array(jax.local_devices())
      self._mesh = jax.sharding.Mesh(devices, ('data',), axis_types=(mesh.axis_types[0],))

  def of(self, state: State) -> Encoder:
    """The encoder with the weights of a state. All processes call it together."""
    teacher = state.teachers.get(self._config.evals.encoder, {})
    towers = {**state.params, **teacher}
    params = {role: towers[name] for role, name in self._names.items() if name in towers}
    if self._gather:
      params = jax.tree.map(self._here, self._gather(params))
    # Once: its programs are compiled for the shapes, which all states share.
    if self._encoder is None:
      weights = Weights(
        name=self._config.name,
        towers={role: self._config.towers[self._names[role]] for role in params},
        params=params,
        tokenizer=self.tokenizer,
        text_length=self._config.data.text_length,
        size=self._config.evals.size,
      )
      self._encoder = Encoder(weights, exact=True, mesh=self._mesh)
    return self._encoder.with_params(params)

  def _here(self, x: jax.Array) -> jax.Array:
    """A replicated array as one of this process's devices alone."""
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(
      x.shape, sharding.replicated(self._mesh), shards
    )
