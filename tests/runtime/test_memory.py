import jax
import pytest

from tips_jax.core.errors import InputError
from tips_jax.runtime import memory


def test_what_the_compiler_cannot_place_is_bad_input_of_one_line():
  with pytest.raises(
    InputError, match='does not fit .* Used 102.1G of 15.75G.* tips_jax.plan'
  ) as e:
    with memory.must_fit():
      raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nUsed 102.1G of 15.75G hbm.'
      )
  assert e.value.code == 2 and '\n' not in str(e.value)
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    with memory.must_fit():
      raise jax.errors.JaxRuntimeError('INTERNAL: a fault of ours')


@pytest.mark.parametrize('limit', [3000, 4000])
def test_a_step_that_the_device_cannot_hold_is_refused_before_it_runs(monkeypatch, limit):
  class Device:
    device_kind = 'NVIDIA H100'

    def memory_stats(self):
      return {'bytes_limit': limit}

  # Arguments and results of 1,024 bytes each, and one of 1,024 between them.
  compiled = (
    jax.jit(lambda x: (x @ x) @ x).lower(jax.ShapeDtypeStruct((16, 16), 'float32')).compile()
  )
  monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
  if limit == 4000:
    assert memory.checked(compiled) is compiled
    return
  with pytest.raises(InputError, match='memory of a NVIDIA H100: it needs 0.0 GB of 0.0'):
    memory.checked(compiled)
