"""The same step on 1, 2, 4 and 8 fake CPU devices and in 2 processes of 4: how far losses and
gradients lie apart.

  python benchmarks/devices.py [vits.py:v1,runlocal ...]

One JSON line a mesh: relative difference of the loss, and of the gradient in its norm, from one
device. Two processes talk over gloo, on this machine. Exit code 1 where a difference exceeds 1e-5.
"""

import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ('vits.py:v1,runlocal', 'vits.py:v2,runlocal', 'siglip.py:runlocal')
# (processes, data, fsdp, accumulate)
MESHES = (
  (1, 1, 1, 1),
  (1, 2, 1, 1),
  (1, 1, 2, 1),
  (1, 2, 2, 1),
  (1, 2, 4, 1),
  (1, 8, 1, 1),
  (1, 1, 8, 1),
  (1, 2, 2, 2),
  (2, 2, 4, 1),
  (2, 4, 2, 1),
)
LIMIT = 1e-5


def gradient(config, data, fsdp, accumulate, out):
  """Writes loss and gradient of the first step to `out`, from process 0."""
  import jax
  import numpy as np

  if 'JAX_NUM_PROCESSES' in os.environ:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
      os.environ['JAX_COORDINATOR_ADDRESS'],
      int(os.environ['JAX_NUM_PROCESSES']),
      int(os.environ['JAX_PROCESS_ID']),
    )
  from tips_jax.core import schema, strict, tree
  from tips_jax.train import lowering, sharding, state, step
  from tips_jax.train import method as method_lib

  file, _, arg = config.partition(':')
  plain = importlib.import_module(
    'configs.' + file.removesuffix('.py').replace('/', '.')
  ).get_config(arg)
  plain.update(
    dict(mesh=dict(data=data, fsdp=fsdp), schedule=dict(accumulate=accumulate, batch_size=16))
  )
  method = method_lib.build(strict.build(schema.Config, plain))
  mesh = sharding.make_mesh(method.config.mesh, 16)
  places = lowering.abstract_state(method, mesh)[1]
  rng, whole = np.random.default_rng(0), {}
  for name, x in lowering.abstract_batch(method).items():
    high = {np.dtype(np.uint8): 256, np.dtype(np.int32): 1000, np.dtype(bool): 2}[x.dtype]
    whole[name] = rng.integers(0, high, x.shape).astype(x.dtype)
  to = sharding.batch(mesh)
  batch = {
    k: jax.make_array_from_callback(x.shape, to, lambda i, x=x: x[i]) for k, x in whole.items()
  }

  def both(state, batch):
    loss = lambda params: step.loss(method, params, state, batch, jax.random.key(0))
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return value, grads

  with jax.set_mesh(mesh):
    first = jax.jit(lambda: state.init(method), out_shardings=places)()
    value, grads = jax.jit(both, out_shardings=sharding.replicated(mesh))(first, batch)
  if jax.process_index() == 0:
    np.savez(
      out, **{'loss': np.asarray(value)}, **{n: np.asarray(g) for n, g in tree.named_leaves(grads)}
    )


def run(config, mesh):
  """{name: array} of one mesh, computed in processes of its own."""
  import numpy as np

  processes, data, fsdp, accumulate = mesh
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  with tempfile.TemporaryDirectory() as folder:
    out = f'{folder}/gradient.npz'
    env = os.environ | dict(
      JAX_PLATFORMS='cpu',
      NPROC='32',
      PYTHONPATH=str(ROOT),
      XLA_FLAGS=f'--xla_force_host_platform_device_count={data * fsdp // processes} '
      '--xla_backend_optimization_level=0',
    )
    many = (
      dict(JAX_COORDINATOR_ADDRESS=f'localhost:{port}', JAX_NUM_PROCESSES=str(processes))
      if processes > 1
      else {}
    )
    command = [
      sys.executable,
      __file__,
      '--one',
      config,
      str(data),
      str(fsdp),
      str(accumulate),
      out,
    ]
    started = [
      subprocess.Popen(command, env=env | many | ({'JAX_PROCESS_ID': str(i)} if many else {}))
      for i in range(processes)
    ]
    if any(p.wait() for p in started):
      sys.exit(f'{config} on {mesh}: a process failed')
    return dict(np.load(out))


def main():
  import numpy as np

  worst = 0.0
  for config in sys.argv[1:] or CONFIGS:
    alone = None
    for mesh in MESHES:
      found = run(config, mesh)
      alone = alone or found
      norm = lambda x: float(
        np.sqrt(sum(np.square(v, dtype=np.float64).sum() for k, v in x.items() if k != 'loss'))
      )
      loss = abs(float(found['loss']) - float(alone['loss'])) / abs(float(alone['loss']))
      apart = norm({k: found[k] - alone[k] for k in alone}) / norm(alone)
      worst = max(worst, loss, apart)
      print(
        json.dumps(
          dict(
            config=config,
            **dict(zip(('processes', 'data', 'fsdp', 'accumulate'), mesh)),
            loss=loss,
            gradient=apart,
          )
        ),
        flush=True,
      )
  print(json.dumps(dict(worst=worst, limit=LIMIT)))
  sys.exit(worst > LIMIT)


if __name__ == '__main__':
  if sys.argv[1:2] == ['--one']:
    sys.path.insert(0, str(ROOT))
    gradient(sys.argv[2], *map(int, sys.argv[3:6]), sys.argv[6])
  else:
    main()
