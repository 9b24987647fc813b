"""The plan of real steps: ahead of time for a TPU where libtpu is installed, on the CPU's compiler
everywhere.
"""

import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from tests.train.conftest import METHODS, Small
from tips_jax import plan
from tips_jax.core import chips
from tips_jax.core.errors import InputError
from tips_jax.planning import (
  collectives,
  compiler,
  estimate,
  hlo,
  parts,
  report,
  search,
  topologies,
)
from tips_jax.train import lowering, sharding, summary

ROOT = pathlib.Path(__file__).parents[2]
TPU = pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
small = Small()


@pytest.fixture(scope='module')
def quick():
  """The compiler's plainest code."""
  fast = dict(jax_optimization_level='O0')
  if hasattr(jax.config, 'jax_exec_time_optimization_effort'):  # jax 0.11 has none
    fast['jax_exec_time_optimization_effort'] = -1.0
  before = {name: getattr(jax.config, name) for name in fast}
  for name, value in fast.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


# The newest Python compiles one of each kind.
ALIKE = ('tips_distill', 'siglip', 'silc', 'dino_ibot', 'umg_clip_adapt')


@TPU
@pytest.mark.parametrize(
  'name',
  [pytest.param(name, marks=[pytest.mark.once] if name in ALIKE else []) for name in METHODS],
)
def test_every_method_compiles_for_a_tpu(name, quick):
  method = small.method(name, mesh=dict(data=2, fsdp=2))
  chip, devices = topologies.devices('v5e:2x2')
  mesh = sharding.make_mesh(method.config.mesh, method.config.schedule.batch_size, devices=devices)
  lowered = lowering.lower(method, mesh)
  with topologies.hidden_flags():
    compiled = lowered.compile()
  found = compiled.memory_analysis()
  state = sum(estimate.memory(method, mesh, chip)['groups'].values())
  assert state <= found.argument_size_in_bytes < chip.hbm and found.temp_size_in_bytes > 0
  # Where a loop's length depends on its device's data, the others would wait for ever.
  sent = collectives.find(hlo.parse(compiled.as_text()), mesh)
  assert sent and not [one for one in sent if one.open_ended]


def check(result):
  """What holds for every plan."""
  f, t, m = result['flops'], result['time'], result['memory']
  assert m['fits'] and m['over'] <= 0
  assert f['total'] == pytest.approx(
    sum(v for row in f['parts'].values() for k, v in row.items() if k != 'minimum')
  )
  assert 0.6 < f['ratio'] < 1.6
  assert t['overlapped'] <= t['step'] <= t['not_overlapped'] + t['memory']
  assert sum(r['seconds'] for r in result['parts']) == pytest.approx(t['compute'])
  assert t['bound'] in ('compute', 'memory', 'network')
  assert result['collectives']['in_open_loops'] == 0
  assert {parts.Part(r['part'], r['direction'], r['layer']).direction for r in result['parts']} <= {
    'forward',
    'backward',
    'recompute',
  }
  assert json.loads(json.dumps(result)) == result
  page = report.text(result, top=3)
  assert all(
    word in page
    for word in ('memory of a chip', 'FLOPs', 'communication', 'estimated time', 'longest')
  )
  assert max(map(len, page.split('-- the longest')[0].splitlines())) <= 110


def on_cpu(method, count=8, **axes):
  mesh = sharding.make_mesh(
    method.config.mesh, method.config.schedule.batch_size, devices=jax.devices()[:count]
  )
  return mesh, estimate.plan(
    method, mesh, chips.CHIPS['cpu'], topology='cpu', say=lambda text: None
  )


@pytest.fixture(scope='module')
def clip():
  method = small.method('clip', mesh=dict(data=2, fsdp=4))
  return method, *on_cpu(method)


def test_memory_of_the_state_is_exact(clip):
  method, mesh, result = clip
  shapes = small.abstract(method, mesh)
  own = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  bytes_of = lambda tree: sum(map(own, jax.tree.leaves(tree)))
  groups = result['memory']['groups']
  assert groups['parameters'] == bytes_of(shapes.params) and groups['optimizer'] == bytes_of(
    shapes.optimizer
  )
  view = method.config.data.views['global'].size
  text = method.config.data.text_length
  assert groups['batch'] == view * view * 3 + text * 4 + 1  # a batch of 8 on 8 devices


def test_a_plan_on_the_cpu(clip):
  _, _, result = clip
  check(result)
  kinds = {r['kind'] for r in result['collectives']['rows']}
  assert {'all-gather', 'reduce-scatter', 'all-reduce'} <= kinds
  assert {'fsdp', 'data'} <= {r['axis'] for r in result['collectives']['rows']}


def test_the_minimum_of_communication_by_hand(clip):
  method, mesh, result = clip
  least = result['collectives']['minimum_by_kind']
  shapes, c = small.abstract(method, mesh), method.config
  split = lambda tower: sum(
    x.size
    for x in jax.tree.leaves(shapes.params[tower])
    if 'fsdp' in jax.tree.leaves(tuple(x.sharding.spec))
  )
  calls = sum(split(c.passes[group[0]].tower) for group in method.order)
  assert least['scatter'] == pytest.approx(3 / 4 * 4 * calls)  # float32 in a tiny config
  assert least['gather'] == pytest.approx(2 * least['scatter'])
  assert least['contrast'] == pytest.approx(2 * 7 / 8 * 8 * 16 * 4)


@pytest.mark.once
def test_flops_of_a_plan_follow_the_batch_and_remat():
  plain = small.method('clip', mesh=dict(data=1), schedule=dict(batch_size=8))
  bigger = small.method('clip', mesh=dict(data=1), schedule=dict(batch_size=16))
  again = small.method('clip', mesh=dict(data=1), compute=dict(remat='full'))
  one, two, three = (on_cpu(m, 1)[1]['flops'] for m in (plain, bigger, again))
  assert (
    one['minimum'] == 8 * sum(summary.flops(plain).values())
    and two['minimum'] == 2 * one['minimum']
  )
  assert two['total'] == pytest.approx(
    2 * one['total'], rel=0.02
  )  # the contrastive loss grows faster
  assert three['recomputed'] > 0.15 * three['total'] > one['recomputed']
  assert three['total'] - three['recomputed'] == pytest.approx(
    one['total'] - one['recomputed'], rel=0.02
  )


def test_what_does_not_fit_says_by_how_much_and_what_would(monkeypatch):
  method = small.method('clip', mesh=dict(data=8))
  tiny = chips.Chip('tiny', 'cpu', 1e11, 2.5e6, 1e10, 1e10)
  monkeypatch.setattr(topologies, 'devices', lambda topology, slices: (tiny, jax.devices()))

  def too_big(*args, **options):
    raise compiler.TooBig(3e6, 2.5e6, 1.0, '')

  monkeypatch.setattr(compiler, 'compile_step', too_big)
  result = search.one(method, topology='cpu', say=lambda text: None)
  assert (
    not result['memory']['fits'] and result['memory']['over'] == 0.5e6 and result['suggestions']
  )
  page = report.text(result)
  assert (
    'DOES NOT FIT: 3.00 MB of 2.50 MB usable, 500.0 kB too much' in page
    and 'what would make it fit' in page
  )
  assert all('by estimate' in line for line in result['suggestions']), result['suggestions']
  now = ('data=8', 'fsdp=1 ', 'remat=none', 'accumulate=1')
  assert not any(
    all(word in line for word in now) for line in result['suggestions']
  )  # that is what does not fit


@pytest.mark.parametrize(
  'text, used, limit',
  [
    (
      'the total memory required for HLO temporaries (23.62G) exceeds available HBM (15.75G).',
      23.62,
      15.75,
    ),
    ('Ran out of memory in memory space hbm. Used 22.43G of 15.75G hbm. Exceeded', 22.43, 15.75),
  ],
)
def test_the_compilers_refusal_is_read(text, used, limit):
  class Lowered:
    def compile(self, compiler_options):
      raise RuntimeError(f'RESOURCE_EXHAUSTED: {text}')

  with pytest.raises(compiler.TooBig) as error:
    compiler.compile_step(Lowered(), platform='tpu')
  assert (error.value.used, error.value.limit) == (
    pytest.approx(used * 2**30),
    pytest.approx(limit * 2**30),
  )


@pytest.mark.parametrize(
  'chip, count, shape',
  [
    ('v5e', 256, 'v5e:16x16'),
    ('v5e', 8, 'v5e:2x4'),
    ('v5e', 1, 'v5e:1x1'),
    ('v5p', 512, 'v5p:8x8x8'),
    ('v5p', 1024, 'v5p:8x8x16'),
    ('v4', 16, 'v4:2x2x4'),
    ('v6e', 16, 'v6e:4x4'),
    ('tpu7x', 4, 'tpu7x:2x2x1'),
    ('v5p', 1, 'v5p:1x1x1'),
    ('h100', 8, 'gpu:h100x8'),
    ('gb200', 72, 'gpu:gb200x72'),
  ],
)
def test_topologies_of_a_number_of_chips(chip, count, shape):
  assert topologies.shape_for(chip, count) == shape


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: topologies.shape_for('v5e', 24), '--chips: got 24; .*did you mean 16'),
    (lambda: topologies.shape_for('v5x', 8), "--chip: got 'v5x'; .*did you mean 'v5"),
    (
      lambda: topologies.shape_for('h100', 16),
      '--chips: got 16 of a node; expected at most 8, and',
    ),
    (lambda: topologies.devices('gpu:h100x9'), "got 'gpu:h100x9'; .*did you mean 'gpu:h100x8'"),
    (lambda: topologies.devices('gpu:h10x8'), "got 'gpu:h10x8'; .*did you mean 'gpu:h100x8'"),
    (lambda: topologies.devices('gpu:h100'), "got 'gpu:h100'; .*did you mean 'gpu:h100x8'"),
    (
      lambda: topologies.devices('v5p:4x4'),
      "--topology: got 'v5p:4x4'; expected v5p:NxNxN; did you mean 'v5p:2x2x4'",
    ),
    (lambda: topologies.devices('v7:2x2'), "--topology: got 'v7:2x2'; expected one of"),
    (lambda: chips.of_kind('Abacus'), "device: got 'Abacus'"),
  ],
)
def test_unknown_chips_and_shapes(call, message):
  with pytest.raises(InputError, match=message):
    call()


def test_peaks_are_those_of_the_chips():
  assert {c.name: c.flops for c in chips.CHIPS.values() if c.dims} == {
    'v4': 275e12,
    'v5e': 197e12,
    'v5p': 459e12,
    'v6e': 918e12,
    'tpu7x': 2307e12 / 2,  # of one of its two devices
  }


@pytest.mark.parametrize(
  'kind, name',
  [
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU7x', 'tpu7x'),
    ('NVIDIA A100-SXM4-40GB', 'a100-40gb'),
    ('NVIDIA A100-SXM4-80GB', 'a100'),
    ('NVIDIA A100-PCIE-40GB', 'a100-pcie-40gb'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H100 PCIe', 'h100-pcie'),
    ('NVIDIA H100 NVL', 'h100-nvl'),
    ('NVIDIA H200', 'h200'),
    ('NVIDIA B200', 'b200'),
    ('NVIDIA GB200', 'gb200'),
    ('NVIDIA L40S', 'l40s'),
  ],
)
def test_chips_by_the_kind_that_jax_reports(kind, name):
  assert chips.of_kind(kind).name == name


@pytest.mark.parametrize(
  'name, field, value',
  [
    ('v6e', 'ici', 0.4e12),
    ('v6e', 'dcn', 100e9 / 8),  # bytes of 100 Gbit
    ('v5e', 'dcn', 2 * 100e9 / 8 / 8),  # two NICs of 100 Gbit/s for the 8 chips of a host
    ('v5p', 'dcn', 50e9 / 8),
    ('tpu7x', 'dcn', 100e9 / 8 / 2),
    ('tpu7x', 'hbm', 94.74 * 2**30),
    ('h100', 'hbm', 0.9 * 84.94e9),  # jax takes no more
    ('h100-pcie', 'flops', 756e12),
    ('h100-nvl', 'bandwidth', 3.938e12),
    ('b200', 'flops', 2250e12),
    ('gb200', 'ici', 0.9e12),
    ('l40s', 'ici', 32e9),
    ('a100-40gb', 'bandwidth', 1.555e12),
  ],
)
def test_figures_of_chips(name, field, value):
  assert getattr(chips.CHIPS[name], field) == pytest.approx(value)


PASSES, LOSSES = {'clean+masked', 'masked', 'local'}, {'loss_masked', 'loss_distill'}


@pytest.mark.parametrize(
  'op_name, expected',
  [
    (
      'jit(step)/jvp()/shard_map/clean+masked/ViT/encoder/while/body/blocks/mlp/up/dot_general',
      ('clean+masked', 'forward', 'mlp'),
    ),
    (
      'jit(step)/transpose(jvp())/shard_map/local/ViT/blocks/checkpoint/rematted_computation/blocks/attention/query/dot',
      ('local', 'recompute', 'attention'),
    ),
    (
      'jit(step)/transpose(jvp())/shard_map/masked/ViT/blocks/norm1/mul',
      ('masked', 'backward', 'norm'),
    ),
    (
      'jit(step)/transpose(jvp(loss_masked))/shard_map/while/body/dot_general',
      ('loss masked', 'backward', 'loss'),
    ),
    ('jit(step)/jvp(local)/ViT/blocks/attention/pallas_call', ('local', 'forward', 'kernel')),
    (
      'jit(step)/transpose(jvp(local))/ViT/blocks/attention/dot_product_attention_bwd',
      ('local', 'backward', 'kernel'),
    ),
    ('jit(step)/jvp(local)/TextTower/TextTower.tokens/gather', ('local', 'forward', 'embedding')),
    ('jit(step)/jvp(local)/TextTower.setup/all_gather', ('local', 'forward', 'embedding')),
    ('jit(step)/mul', ('update', 'forward', 'optimizer')),
    ('', ('other', 'forward', 'rest')),
  ],
)
def test_parts_of_a_method(op_name, expected):
  assert parts.part(op_name, PASSES, LOSSES) == parts.Part(*expected)


def run(*words):
  return subprocess.run(
    [sys.executable, '-m', 'tips_jax.plan', *words], cwd=ROOT, capture_output=True, text=True
  )


@TPU
def test_the_command_for_a_tpu():
  done = run(
    '--config=configs/vits.py:v1,runlocal',
    '--topology=v5e:2x2',
    '--batch=16',
    '--json',
    '--top=2',
    '--config.mesh.data=2',
    '--config.mesh.fsdp=2',
    '--price_per_chip_hour=2',
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  check(result)
  assert result['header']['chip'] == 'v5e' and result['memory']['limit'] == 15.75 * 2**30
  assert result['time']['compute_by_source']['compiler'] > 0
  assert result['time']['compute_by_source']['schedule'] > 0  # of the attention kernels
  assert sum(result['memory']['temporaries_by_kind'].values()) >= result['memory']['temporaries']
  assert {r['axis'] for r in result['collectives']['rows']} <= {'data', 'fsdp', 'data+fsdp'}
  assert (
    result['header']['batch'] == 16
    and result['header']['chips'] == 4
    and len(result['instructions']) == 2
  )
  assert result['time']['cost'] == pytest.approx(2 * result['time']['chip_hours'])
  assert 'lowering vits_v1' in done.stderr


@pytest.mark.parametrize(
  'words, message',
  [
    (['--config=configs/methods/clip.py:runlocal'], '--topology: missing'),
    (
      ['--config=configs/methods/clip.py:runlocal', '--topology=auto'],
      '--topology=auto: expected --chip and --chips',
    ),
    (['--topology=cpu'], '--config: missing'),
    (
      ['--config=configs/methods/clip.py:runlocal', '--topology=cpu', '--compute'],
      'command line: Unknown command line flag',
    ),
  ],
)
def test_bad_input_is_one_line(words, message):
  done = run(*words)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith(f'error: {message}') and done.stderr.count('\n') == 1


@pytest.mark.parametrize(
  'option, message',
  [
    ('--compiler_options=xla_no_such=1', "compute.options: .*No such compile option: 'xla_no"),
    ('--slices=1000000', 'slices'),
  ],
)
def test_what_the_compiler_does_not_take_is_an_error_in_one_line(option, message, capfd):
  arguments = ['plan', '--config=configs/quickstart.py:v1', '--topology=cpu', option]
  assert plan.main(arguments) == 2
  [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error: ')]
  assert re.search(message, error)


def test_a_fault_of_the_program_is_not_taken_for_a_plan_that_does_not_fit(monkeypatch, capsys):
  def fail(values, argv):
    raise ZeroDivisionError('a fault')

  monkeypatch.setattr(plan.cli, 'parse', fail)
  assert plan.main(['plan']) == 2 and 'a fault' in capsys.readouterr().err


@pytest.mark.parametrize('value', ['true', 'false', 'True', 'False'])
def test_a_compiler_option_is_true_or_false(value):
  options = dict([lowering._option(f'xla_cpu_enable_fast_min_max={value}')])
  lowered = jax.jit(jax.numpy.sin).lower(1.0)
  compiler.compile_step(lowered, platform='cpu', options=options)


def test_a_compiler_option_that_is_neither_is_an_error_in_one_line():
  lowered = jax.jit(jax.numpy.sin).lower(1.0)
  with pytest.raises(InputError, match='compute.options: .*maybe.*not a valid') as error:
    compiler.compile_step(lowered, platform='cpu', options={'xla_cpu_enable_fast_min_max': 'maybe'})
  assert '\n' not in str(error.value)


def test_a_program_that_was_not_understood_is_refused_and_nothing_is_printed(monkeypatch, capsys):
  unknown = compiler.Compiled(hlo.parse(''), {}, {}, [], 0.0)
  monkeypatch.setattr(estimate, '_temporaries', lambda *args: None)
  monkeypatch.setattr(compiler, 'compile_step', lambda *args, **options: unknown)
  arguments = ['plan', '--config=configs/methods/clip.py:runlocal', '--topology=cpu', '--json']
  assert plan.main(arguments) == 2
  printed = capsys.readouterr()
  assert printed.out == ''
  [error] = [line for line in printed.err.splitlines() if line.startswith('error: ')]
  assert "0.000 of the method's FLOPs; expected 0.9 to 2" in error


def test_figures_of_a_chip_of_two_devices():
  method = small.method('clip', mesh=dict(data=1))
  mesh = sharding.make_mesh(method.config.mesh, 8, devices=jax.devices()[:1])
  one = chips.Chip('one', '', 1e12, 1e9, 1e9, 1e9)
  two = chips.Chip('two', '', 1e12, 1e9, 1e9, 1e9, devices=2)
  moved = [collectives.Collective('all-reduce', ('data',), 'f32', 1, 1e9, False, '', False)]
  whole = estimate.time(method, mesh, one, [], moved, 3.0)
  half = estimate.time(method, mesh, two, [], moved, 3.0)
  assert whole['step'] == half['step'] == 1.0 and whole['peak_share'] == half['peak_share']
  assert half['cost'] == whole['cost'] / 2
  assert half['images_per_second_per_chip'] == 2 * whole['images_per_second_per_chip'] == 16
  assert estimate.header(method, mesh, two, '', 1)['chips'] == 0.5


def test_a_compiler_option_without_a_value_is_an_error_in_one_line(capsys):
  arguments = ['--config=configs/quickstart.py', '--topology=cpu', '--compiler_options=fast']
  assert plan.main(['plan', *arguments]) == 2
  expected = "error: --compiler_options: got 'fast'; expected NAME=VALUE\n"
  assert capsys.readouterr().err == expected
