"""Eight fake devices on the CPU, set up before anything imports jax."""

import importlib.metadata
import os

# Tests compile much and compute little: XLA's plainest code takes a quarter of the time to make.
PLAIN_XLA = '--xla_backend_optimization_level=0'
# An XLA flag that a version does not know ends the process; jaxlib 0.11 dropped this one.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  PLAIN_XLA += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = ' '.join(
  [os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8', PLAIN_XLA]
)
# Collectives wait for each other: a thread for every device, on any machine.
os.environ.setdefault('NPROC', '32')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope='session')
def plain_xla() -> str:
  """XLA flags for processes that a test starts: the least optimization."""
  return PLAIN_XLA


@pytest.fixture
def mesh():
  """mesh(data, fsdp): a context in which jitted code runs on data * fsdp fake devices."""

  def use(data=1, fsdp=1):
    count = data * fsdp
    if len(jax.devices()) < count:
      pytest.skip(f'needs {count} devices')
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.set_mesh(
      jax.make_mesh((data, fsdp), ('data', 'fsdp'), axis_types=auto, devices=jax.devices()[:count])
    )

  return use
