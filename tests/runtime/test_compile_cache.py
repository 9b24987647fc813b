import jax
import jax.numpy as jnp
import pytest

from tips_jax.runtime import compile_cache as cache


@pytest.fixture(autouse=True)
def restored(monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  names = (
    'jax_compilation_cache_dir',
    'jax_enable_compilation_cache',
    'jax_persistent_cache_min_compile_time_secs',
  )
  before = {n: getattr(jax.config, n) for n in names}
  yield
  for n, value in before.items():
    jax.config.update(n, value)
  jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_programs_are_kept_beside_the_work_folder_and_found_again(tmp_path):
  folder = cache.use(tmp_path / 'runs' / 'one')
  assert folder.parent == tmp_path / 'runs' / '.jax_cache' and folder.name.startswith('cpu-')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.experimental.compilation_cache.compilation_cache.reset_cache()
  results, x = [], jnp.linspace(0, 1, 100).reshape(10, 10)
  for _ in range(2):
    before = cache.hits()
    jax.clear_caches()
    results.append((jax.jit(lambda x: jnp.tanh(x @ x).sum())(x), cache.hits() - before))
  assert list(folder.glob('*-cache'))
  assert results[0][0] == results[1][0] and results[0][1] == 0 and results[1][1] >= 1


def test_the_folder_may_be_named_or_off(tmp_path, monkeypatch):
  assert cache.use(tmp_path / 'run', str(tmp_path / 'named')).parent == tmp_path / 'named'
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'env'))
  assert cache.use(tmp_path / 'run').parent == tmp_path / 'env'
  assert (
    cache.use(tmp_path / 'run', cache.OFF) is None and not jax.config.jax_enable_compilation_cache
  )
