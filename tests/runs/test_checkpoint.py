import errno
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs.test_contract import CONTRACT
from tips_jax.core import schema, tree
from tips_jax.core.errors import InputError
from tips_jax.runs import checkpoint, digests
from tips_jax.runs import folder as runs
from tips_jax.train import initialization as start_lib
from tips_jax.train import state as state_lib


def different(state, seed=0):
  """The same state with other numbers everywhere, so that nothing is equal by chance."""
  rng = np.random.default_rng(seed)
  draw = lambda x: (
    rng.standard_normal(x.shape)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else rng.integers(1, 99, x.shape)
  ).astype(x.dtype)
  return jax.tree.map(draw, state)


def host(x):
  return jax.tree.map(np.asarray, x)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def write(workdir, state, *, step=None, next_index=0, config=None):
  saver = checkpoint.Checkpoints(workdir, config or schema.Checkpoint())
  saver.save(
    int(state.step) if step is None else step, state, next_index=next_index, contract=CONTRACT
  )
  saver.close()


@pytest.fixture(scope='module')
def saved(small, tmp_path_factory):
  """(work folder, state) of a TIPS v2 run on eight devices."""
  method, workdir = small.method('tips_v2'), tmp_path_factory.mktemp('run')
  state = different(small.host_state('tips_v2')).replace(step=np.int32(7))
  write(workdir, small.place(method, small.mesh(8, data=2, fsdp=4), state), next_index=56)
  return workdir, state


def tiny(step, value=0.0):
  return state_lib.State(
    params={'a': {'w': jnp.full(3, value)}},
    teachers={},
    loss_state={},
    optimizer=(jnp.int32(step),),
    step=jnp.int32(step),
    bad_steps=jnp.int32(0),
    skipped=jnp.int32(0),
  )


# --- own run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'count, axes',
  [(8, dict(data=2, fsdp=4)), (4, dict(data=1, fsdp=4)), (4, dict(data=4)), (1, dict())],
)
def test_restores_on_any_mesh(saved, small, count, axes):
  workdir, state = saved
  abstract = small.abstract(small.method('tips_v2'), small.mesh(count, **axes))
  reader = checkpoint.Checkpoints(workdir, schema.Checkpoint())
  assert reader.latest == 7 and reader.next_index(7) == 56 and reader.contract(7) == CONTRACT
  restored, index = reader.restore(7, abstract)
  reader.close()
  assert index == 56
  assert_equal(restored, state)
  assert all(
    jax.tree.leaves(jax.tree.map(lambda x, a: x.sharding == a.sharding, restored, abstract))
  )


def test_checkpoint_of_another_model(saved, small):
  workdir, _ = saved
  reader = checkpoint.Checkpoints(workdir, schema.Checkpoint())

  def message(**towers):
    with pytest.raises(InputError) as error:
      reader.restore(7, small.abstract(small.method('tips_v2', towers=towers), small.mesh()))
    return str(error.value)

  text = message(image=dict(mlp=128))
  assert (
    'params/image/encoder/blocks/mlp/' in text
    and '64' in text
    and '128' in text
    and 'another model' in text
  )
  assert 'got no params/image/' in message(image=dict(ffn='swiglu'))
  reader.close()


def test_the_state_may_be_overwritten_while_it_is_saved(tmp_path):
  saver = checkpoint.Checkpoints(tmp_path, schema.Checkpoint())
  add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = tiny(1, 5.0)
  saver.save(1, state, next_index=0, contract={})
  state = add(state)
  saver.wait()
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  restored, _ = saver.restore(1, abstract)
  saver.close()
  assert_equal(restored, tiny(1, 5.0))


def test_unfinished_checkpoints_are_not_seen(tmp_path):
  write(tmp_path, tiny(3))
  shutil.copytree(
    tmp_path / 'checkpoints' / '3', tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp'
  )
  assert runs.find(tmp_path, 'init_from').name == '3'
  saver = checkpoint.Checkpoints(tmp_path, schema.Checkpoint())
  assert saver.latest == 3
  saver.close()


def test_a_folder_with_an_at_sign_in_its_name_is_a_run(tmp_path):
  write(tmp_path / 'x@2', tiny(3))
  assert runs.find(tmp_path / 'x@2', 'init_from').name == '3'
  assert runs.find(f'{tmp_path / "x@2"}@3', 'init_from').name == '3'
  assert runs.split(tmp_path / 'y@2') == (str(tmp_path / 'y'), 2)


# --- damaged ones -------------------------------------------------------------------------------


def flip(path):
  """Flips one bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def largest(folder):
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path):
  os.truncate(path, 0)


DAMAGES = {
  'an array with one bit flipped': lambda step: flip(largest(step / 'params')),
  'an array cut short': lambda step: os.truncate(largest(step / 'train'), 9),
  'an array that is gone': lambda step: largest(step / 'params' / 'ocdbt.process_0').unlink(),
  'an empty _CHECKPOINT_METADATA': lambda step: cut(step / '_CHECKPOINT_METADATA'),
  'no _CHECKPOINT_METADATA': lambda step: (step / '_CHECKPOINT_METADATA').unlink(),
  'an empty params/_METADATA': lambda step: cut(step / 'params' / '_METADATA'),
  'no params': lambda step: shutil.rmtree(step / 'params'),
  'an empty manifest': lambda step: cut(step / 'data' / 'manifest.ocdbt'),
  'no digests, and no params': lambda step: (
    shutil.rmtree(step / 'params'),
    (step / 'digests.json').unlink(),
  ),
  'no digests, and an empty _CHECKPOINT_METADATA': lambda step: (
    cut(step / '_CHECKPOINT_METADATA'),
    (step / 'digests.json').unlink(),
  ),
  'digests that are no JSON': lambda step: os.truncate(step / 'digests.json', 40),
}


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """A work folder with whole checkpoints of the steps 4 and 8."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  saver = checkpoint.Checkpoints(workdir, schema.Checkpoint())
  rng = np.random.default_rng(0)
  for step in (4, 8):
    state = tiny(step).replace(params={'a': {'w': jnp.asarray(rng.normal(size=(64, 64)))}})
    saver.save(step, state, next_index=step, contract=CONTRACT)
  saver.close()
  return workdir


def names(workdir):
  return sorted(path.name for path in (workdir / 'checkpoints').iterdir())


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(two_steps, tmp_path, damage):
  workdir = shutil.copytree(two_steps, tmp_path / 'run')
  damage(workdir / 'checkpoints' / '8')
  said = []
  runs.settle(workdir, said.append)
  assert said[0].startswith('checkpoint 8 is damaged: ') and said[0].endswith('damaged-8')
  assert said[1:] == ['going on from the one before, step 4']
  assert names(workdir) == ['4', 'damaged-8']
  saver = checkpoint.Checkpoints(workdir, schema.Checkpoint())
  assert saver.latest == 4 and saver.next_index(4) == 4
  # The run comes to step 8 once more, and finds another damaged one the next time.
  saver.save(8, tiny(8), next_index=8, contract=CONTRACT)
  saver.close()
  flip(largest(workdir / 'checkpoints' / '8' / 'params'))
  runs.settle(workdir, said.append)
  assert names(workdir) == ['4', 'damaged-8', 'damaged-8-2']


def test_whole_checkpoints_are_left_alone(two_steps, tmp_path):
  workdir = shutil.copytree(two_steps, tmp_path / 'run')
  (workdir / 'checkpoints' / '8' / 'digests.json').unlink()  # a kill came before them
  said = []
  runs.settle(workdir, said.append)
  runs.settle(tmp_path / 'new', said.append)
  assert said == [] and names(workdir) == ['4', '8']


def test_only_damaged_checkpoints_are_an_error_and_stay(two_steps, tmp_path):
  workdir = shutil.copytree(two_steps, tmp_path / 'run')
  for step in ('4', '8'):
    flip(largest(workdir / 'checkpoints' / step / 'params'))
  with pytest.raises(InputError, match='only damaged ones.*8: params/.*4: params/'):
    runs.settle(workdir, print)
  assert names(workdir) == ['4', '8']


@pytest.mark.parametrize('name', ['9', '3', '9' * 40])
@pytest.mark.parametrize('kind', ['folder', 'file', 'copy'])
def test_what_only_looks_like_a_checkpoint_is_set_aside(two_steps, tmp_path, name, kind):
  workdir = shutil.copytree(two_steps, tmp_path / 'run')
  path = workdir / 'checkpoints' / name
  if kind == 'folder':
    path.mkdir()
  elif kind == 'file':
    path.write_text('')
  elif name == '3':
    pytest.skip('an old copy is no newest one')
  else:
    shutil.copytree(workdir / 'checkpoints' / '8', path)
  said = []
  runs.settle(workdir, said.append)
  assert name in said[0]
  if kind == 'copy':
    assert 'it is a copy of step 8' in said[0] and names(workdir) == ['4', '8', f'damaged-{name}']
  else:
    assert 'is no checkpoint' in said[0] and names(workdir) == ['4', '8', f'stray-{name}']
  assert runs.find(workdir, 'init_from').name == '8'
  saver = checkpoint.Checkpoints(workdir, schema.Checkpoint())
  assert saver.latest == 8
  saver.close()


def test_a_stray_folder_is_no_checkpoint_to_other_programs(two_steps, tmp_path):
  workdir = shutil.copytree(two_steps, tmp_path / 'run')
  (workdir / 'checkpoints' / '9').mkdir()
  assert runs.find(workdir, 'init_from').name == '8'
  with pytest.raises(InputError, match=r'got step 9; expected one that .* has: \[4, 8\]'):
    runs.find(f'{workdir}@9', 'init_from')


@pytest.mark.parametrize(
  'part, read',
  [
    ('params/manifest.ocdbt', lambda path: runs.load(path, 'params', ABSTRACT)),
    ('params/_METADATA', lambda path: runs.names(path, 'params')),
    ('_CHECKPOINT_METADATA', runs.contract),
  ],
)
def test_a_flipped_bit_is_noticed_by_whoever_reads_it(two_steps, tmp_path, part, read):
  path = shutil.copytree(two_steps, tmp_path / 'run') / 'checkpoints' / '8'
  read(path)
  flip(path / part)
  with pytest.raises(InputError, match=f'8.: is damaged: {part} is not as it was written'):
    read(path)


ABSTRACT = {'a': {'w': jax.ShapeDtypeStruct((64, 64), np.float32)}}


def test_the_first_checkpoint_is_read_back(tmp_path):
  """Orbax loses its files in such a folder; main refuses it, and this finds any other that does."""
  saver = checkpoint.Checkpoints(tmp_path / 'a[1]', schema.Checkpoint())
  saver.save(1, tiny(1), next_index=1, contract={})
  with pytest.raises(InputError, match='got params, which cannot be read back'):
    saver.wait()
  saver.close()


# --- errors of the disk -------------------------------------------------------------------------


@pytest.mark.parametrize('number', [errno.EBUSY, errno.ESTALE, errno.ENOSPC])
def test_a_failed_save_says_whether_it_may_pass(tmp_path, monkeypatch, number):
  saver = checkpoint.Checkpoints(tmp_path, schema.Checkpoint())
  write_digests = digests.write

  def fails(path):
    raise OSError(number, os.strerror(number), str(path))

  monkeypatch.setattr(digests, 'write', fails)
  saver.save(1, tiny(1), next_index=1, contract={})
  with pytest.raises(InputError, match=os.strerror(number)) as error:
    saver.wait()
  assert error.value.code == {errno.ENOSPC: 2}.get(number, 75)
  assert not saver.failed  # it was raised once
  saver.save(2, tiny(2), next_index=2, contract={})
  while not saver.failed:
    time.sleep(0.01)
  monkeypatch.setattr(digests, 'write', write_digests)
  with pytest.raises(InputError):
    saver.save(3, tiny(3), next_index=3, contract={})
  saver.save(3, tiny(3), next_index=3, contract={})
  saver.close()
  assert runs.find(tmp_path, 'init_from').name == '3'


def steps_left(tmp_path, config, scores=(), **options):
  saver = checkpoint.Checkpoints(tmp_path, config, **options)
  for step in range(1, 9):
    saver.save(step, tiny(step), next_index=step, contract={})
    saver.scores |= dict(scores[step - 1 : step])  # the evaluation comes later
  saver.close()
  return sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())


def test_keep_last(tmp_path):
  assert steps_left(tmp_path, schema.Checkpoint(keep_last=2)) == [7, 8]


def test_keep_every(tmp_path):
  assert steps_left(tmp_path, schema.Checkpoint(keep_last=1, keep_every=3)) == [3, 6, 8]


def test_keep_best(tmp_path):
  config = schema.Checkpoint(keep_last=1, best_metric='m')
  scores = list(enumerate([0.1, 0.2, 0.9, 0.3, 0.8, 0.4, 0.5, 0.6], 1))
  assert steps_left(tmp_path, config, scores) == [3, 8]


def test_keep_the_lowest_error(tmp_path):
  config = schema.Checkpoint(keep_last=1, best_metric='m')
  scores = list(enumerate([float('nan'), 0.9, 0.5, 0.2, 0.8, float('nan'), 0.5, 0.6], 1))
  assert steps_left(tmp_path, config, scores, lower_is_better=True) == [4, 8]


# --- weights of other runs ----------------------------------------------------------------------


def begin(small, name, said=None, **changes):
  method, mesh = small.method(name, **changes), small.mesh(8, data=4, fsdp=2)
  abstract = small.abstract(method, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return start_lib.initial_state(
    method, shardings, abstract, (said if said is not None else []).append
  )


def test_high_resolution_stage_takes_all_but_the_step(saved, small):
  workdir, low = saved
  parts = ('params', 'teachers', 'loss_state', 'optimizer')
  high = begin(
    small,
    'tips_v2',
    init_from=str(workdir),
    init_parts=parts,
    data=dict(views={'global': dict(size=112), 'local': dict(size=56)}),
  )
  for part in parts:
    assert_equal(getattr(high, part), getattr(low, part))
  assert high.params['image']['posembed'].shape == (1, 4, 4, 32)
  assert int(high.step) == 0 and int(high.skipped) == 0


def test_only_the_named_parts(saved, small):
  workdir, low = saved
  state = begin(small, 'tips_v2', init_from=str(workdir), init_parts=('params',))
  fresh = small.host_state('tips_v2')
  assert_equal(state.params, low.params)
  assert_equal(
    state.teachers['ema']['head'], low.params['head']
  )  # not the old teacher, not a random one
  for part in ('loss_state', 'optimizer'):
    assert_equal(getattr(state, part), getattr(fresh, part))


def test_towers_that_the_other_run_lacks_start_afresh(saved, small):
  workdir, low = saved
  said, fresh = [], small.host_state('tips_v1')
  state = begin(small, 'tips_v1', said, init_from=str(workdir), init_parts=('params', 'teachers'))
  assert_equal(state.params, low.params)
  assert_equal(state.teachers['ema']['head'], low.teachers['ema']['head'])
  assert_equal(
    state.teachers['ema']['image'], low.params['image']
  )  # an EMA teacher starts as the student
  assert not np.array_equal(fresh.params['image']['posembed'], low.params['image']['posembed'])
  assert any('ema' in line and 'fresh: image' in line for line in said)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(init_from_rules=(('.*', False),)), "of which nothing is taken; .*'image'"),
    (dict(init_parts=()), "init_parts: got .*expected one of .*'optimizer', 'params', 'teachers'"),
  ],
)
def test_taking_nothing_is_an_error(saved, small, changes, message):
  with pytest.raises(InputError, match=message):
    begin(small, 'tips_v2', init_from=str(saved[0]), **changes)


def test_weights_of_another_shape(saved, small):
  with pytest.raises(InputError, match='params/text/.*another model'):
    begin(small, 'tips_v2', init_from=str(saved[0]), towers=dict(text=dict(mlp=96)))


def test_run_without_checkpoint(small, tmp_path):
  with pytest.raises(InputError, match='init_from: got .*expected a work folder'):
    begin(small, 'tips_v2', init_from=str(tmp_path))


def test_frozen_teacher_by_other_names(saved, small):
  workdir, other = saved
  state = begin(
    small,
    'tips_distill',
    teachers=dict(large=dict(init_from=str(workdir))),
    towers=dict(large_image=dict(ffn='gelu')),
  )
  large = state.teachers['large']
  assert_equal(large['large_image'], other.params['image'])  # v2's teacher has no image tower
  assert_equal(
    large['large_head'], other.teachers['ema']['head']
  )  # its EMA head rather than the student's
  assert_equal(state.params['image'], small.host_state('tips_distill').params['image'])
  # Its centers are those that it was trained with, not zero.
  for loss in ('distill', 'masked'):
    assert_equal(state.loss_state[loss], other.loss_state[loss])


def test_frozen_teacher_needs_a_run(small):
  with pytest.raises(InputError, match='teachers.large.init_from'):
    begin(small, 'tips_distill')


def test_names_of_a_saved_part(saved):
  path = runs.find(saved[0], 'x')
  names = runs.names(path, 'params')
  assert {n for n, _ in tree.named_leaves(saved[1].params)} == set(names)
  assert (
    names['image/posembed'] == ((1, 4, 4, 32), np.float32) and runs.names(path, 'nothing') == {}
  )
